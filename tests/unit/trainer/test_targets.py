import pytest

from veneer_rpc.errors import InvalidArgument
from veneer_trainer.domain.spec import Lora
from veneer_trainer.domain.targets import Linear, targeted, trainable_parameters


def full_size() -> dict[str, Linear]:
    """The decoder's linears of Qwen3-VL-2B, and one of each other part."""
    found = {"model.visual.merger.linear_fc1": Linear("merger", 4096, 4096)}
    found["model.visual.blocks.0.attn.qkv"] = Linear("vision", 3072, 1024)
    sizes = {"self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (1024, 2048), "self_attn.v_proj": (1024, 2048),
             "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (6144, 2048)}  # fmt: skip
    for layer in range(28):
        for name, size in sizes.items():
            found[f"model.language_model.layers.{layer}.{name}"] = Linear("decoder", *size)
    return found


BASE = full_size()


def test_the_owners_job_trains_1605632_parameters() -> None:
    linears = targeted(BASE, Lora())
    assert len(linears) == 56
    assert trainable_parameters(linears.values(), Lora()) == 1_605_632


@pytest.mark.parametrize(
    ("names", "count"),
    [(["decoder"], 140), (["decoder+merger"], 141), (["decoder+merger+vision"], 142), (["o_proj", "qkv"], 29),
     (["model.language_model.layers.3.self_attn.q_proj"], 1)],
)  # fmt: skip
def test_presets_and_names(names: list[str], count: int) -> None:
    assert len(targeted(BASE, Lora(target_modules=tuple(names)))) == count


def test_dora_adds_a_magnitude_for_each_output() -> None:
    linear = [Linear("decoder", 10, 6)]
    assert trainable_parameters(linear, Lora(rank=2)) == 32
    assert trainable_parameters(linear, Lora(rank=2, use_dora=True)) == 42


def test_every_name_without_a_linear_is_told_and_a_rank_too_great() -> None:
    with pytest.raises(InvalidArgument) as raised:
        targeted(BASE, Lora(target_modules=("q_prj", "proj", "q_proj")))
    assert [found.description for found in raised.value.violations] == [
        "'q_prj' matches no linear of the base", "'proj' matches no linear of the base",
    ]  # fmt: skip
    small = {"a.q_proj": Linear("decoder", 16, 8)}
    with pytest.raises(
        InvalidArgument, match=r"spec\.lora\.rank: must be at most 8, the smaller side of a\.q_proj, was 9"
    ):
        targeted(small, Lora(rank=9, target_modules=("q_proj",)))
