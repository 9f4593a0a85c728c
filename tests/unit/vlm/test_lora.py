from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from veneer_vlm.layout import HEAD
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig, DropoutKey, LowRankPair, Segment
from veneer_vlm.loss import token_losses

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Row, Toy

# peft 0.21 reads an attribute that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

EXACT = {"rtol": 0, "atol": 1e-4}
DECODER = AdapterConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"))
ALL_LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv", "attn.proj",
    "linear_fc1", "linear_fc2",
)  # fmt: skip
CONFIGS = [
    DECODER,
    AdapterConfig(r=2, lora_alpha=3, target_modules=("gate_proj", "down_proj", "o_proj", "k_proj"), use_rslora=True),
    AdapterConfig(r=3, lora_alpha=6, target_modules=ALL_LINEARS),
]


def filled(toy: Toy, config: AdapterConfig, seed: int) -> Adapter:
    """An adapter that changes something."""
    adapter = Adapter.new(toy.config, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for pair in adapter.pairs.values():
        pair.b_O_R.normal_(0, 0.2, generator=generator)
    return adapter


def in_peft(toy: Toy, adapter: Adapter) -> peft.PeftModel:
    """The peer wearing the adapter by PEFT's own hands."""
    config = peft.LoraConfig(
        r=adapter.config.r,
        lora_alpha=adapter.config.lora_alpha,
        lora_dropout=adapter.config.lora_dropout,
        target_modules=list(adapter.config.target_modules),
        use_rslora=adapter.config.use_rslora,
    )
    model = peft.get_peft_model(copy.deepcopy(toy.peer), config).eval()
    state = {f"base_model.model.{name}": tensor for name, tensor in adapter.tensors()}
    result = peft.set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_has_pefts_logits(toy: Toy, rows: list[Row], config: AdapterConfig) -> None:
    adapter = filled(toy, config, seed=1)
    model = in_peft(toy, adapter)
    tokens = sum(len(row.ids_T) for row in rows)
    patches = sum(len(row.patches_P_X) for row in rows)
    worn = toy.logits(rows, AdapterBatch.uniform(adapter, tokens), AdapterBatch.uniform(adapter, patches))
    for row, logits, bare in zip(rows, worn, toy.logits(rows), strict=True):
        assert_close(logits, toy.peer_logits(row, model), **EXACT)
        assert (logits - bare).abs().max() > 0.1


def test_mixed_adapters_in_one_batch_are_pefts_each(toy: Toy, rows: list[Row]) -> None:
    """Five rows: two adapters, none, the first again, a third; pictures wear what their row wears."""
    adapters = [filled(toy, config, seed) for seed, config in enumerate(CONFIGS)]
    worn = [adapters[0], adapters[1], None, adapters[0], adapters[2]]

    def batch(sizes: list[int]) -> AdapterBatch:
        segments, start = [], 0
        for size, adapter in zip(sizes, worn, strict=True):
            if adapter is not None:
                segments.append(Segment(adapter, start, start + size))
            start += size
        return AdapterBatch(segments)

    logits = toy.logits(rows, batch([len(row.ids_T) for row in rows]), batch([len(row.patches_P_X) for row in rows]))
    models = {id(adapter): in_peft(toy, adapter) for adapter in adapters}
    for row, adapter, ours in zip(rows, worn, logits, strict=True):
        assert_close(ours, toy.peer_logits(row, models.get(id(adapter))), **EXACT)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_pefts_and_only_the_adapters(toy: Toy, rows: list[Row], config: AdapterConfig) -> None:
    """All rows packed into one pass, against PEFT's autograd over one row after another."""
    adapter = filled(toy, config, seed=2)
    model = in_peft(toy, adapter)
    expected_loss = 0.0
    for row in rows:
        logits = model(**toy.peer_arguments(row)).logits[0]
        if len(row.ids_T) > 1:
            loss = torch.nn.functional.cross_entropy(logits[:-1], row.ids_T[1:], reduction="sum")
            loss.backward()
            expected_loss += loss.item()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }

    ours = dict(adapter.tensors())
    for tensor in ours.values():
        tensor.requires_grad_()
    tokens = sum(len(row.ids_T) for row in rows)
    patches = sum(len(row.patches_P_X) for row in rows)
    hidden_T_D = toy.hidden(rows, AdapterBatch.uniform(adapter, tokens), AdapterBatch.uniform(adapter, patches))
    ids_T = torch.cat([row.ids_T for row in rows])
    ends = torch.tensor([len(row.ids_T) for row in rows]).cumsum(0) - 1
    supervised_N = torch.tensor([place for place in range(tokens) if place not in ends])
    loss = token_losses(toy.model.lm_head, hidden_T_D[supervised_N], ids_T[supervised_N + 1]).sum()
    loss.backward()

    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert expected[name].abs().max() > 0
        assert_close(tensor.grad, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()) + 1e-5)
    assert all(parameter.grad is None for parameter in toy.model.parameters())


def test_a_float32_adapter_on_a_bfloat16_base_is_rounded_once(toy: Toy) -> None:
    """As PEFT does it: the update in float32, added, then rounded into the base's dtype."""
    linear = copy.deepcopy(toy.model.language_model.layers[0].self_attn.o_proj).bfloat16()
    adapter = filled(toy, AdapterConfig(r=4, target_modules=("o_proj",)), seed=0)
    (name,) = linear.names
    a_R_I, b_O_R = adapter.pairs[name].a_R_I.requires_grad_(), adapter.pairs[name].b_O_R
    input_T_I = torch.randn(5, 64).bfloat16()
    output = linear(input_T_I, AdapterBatch.uniform(adapter, 5))
    update = adapter.config.scale * input_T_I.float() @ a_R_I.T @ b_O_R.T
    assert output.dtype == torch.bfloat16
    assert_close(output, (linear.project(input_T_I).float() + update).bfloat16())
    output.sum().backward()
    assert a_R_I.grad.dtype == torch.float32


def test_a_new_adapter_changes_nothing_and_starts_as_pefts_do(toy: Toy, rows: list[Row]) -> None:
    adapter = Adapter.new(toy.config, DECODER, seed=3)
    (bare,), (worn,) = (
        toy.logits(rows[:1]),
        toy.logits(rows[:1], AdapterBatch.uniform(adapter, len(rows[0].ids_T))),
    )
    assert torch.equal(bare, worn)
    again, other = Adapter.new(toy.config, DECODER, seed=3), Adapter.new(toy.config, DECODER, seed=4)
    for (name, tensor), (_, same), (_, another) in zip(
        adapter.tensors(), again.tensors(), other.tensors(), strict=True
    ):
        assert torch.equal(tensor, same)
        if name.endswith("lora_A.weight"):
            # kaiming_uniform with a = sqrt(5) on 64 inputs
            assert 0.115 < tensor.abs().max() <= 1 / 8
            assert not torch.equal(tensor, another)
        else:
            assert not tensor.any()


def key_mask(seed: int, step: int, name: str) -> torch.Tensor:
    values = torch.ones(40, 50)
    DropoutKey(seed, step).drop(name, values, 0.3)
    return values


def test_dropout_is_a_function_of_seed_step_and_module() -> None:
    torch.manual_seed(0)
    mask = key_mask(1, 2, "a")
    torch.manual_seed(9)
    torch.rand(3)
    assert torch.equal(mask, key_mask(1, 2, "a"))
    assert mask.mean().item() == pytest.approx(0.7, abs=0.04)
    for seed, step, name in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b"), (12, 2, "a"), (-1, 2, "a")):
        assert not torch.equal(mask, key_mask(seed, step, name))


def test_dropout_leaves_the_global_generator_alone_and_repeats_in_backward(toy: Toy, rows: list[Row]) -> None:
    adapter = filled(toy, AdapterConfig(r=4, lora_dropout=0.5), seed=5)
    tokens = len(rows[1].ids_T)

    def run(step: int | None) -> torch.Tensor:
        key = None if step is None else DropoutKey(7, step)
        return toy.logits([rows[1]], AdapterBatch.uniform(adapter, tokens, key))[0]

    state = torch.get_rng_state()
    first = run(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))
    assert not torch.equal(first, run(None))


def test_dropout_keeps_the_expectation(toy: Toy) -> None:
    config = AdapterConfig(r=4, lora_dropout=0.25, target_modules=("o_proj",))
    adapter = filled(toy, config, seed=5)
    name = next(iter(adapter.pairs))
    input_T_I = torch.randn(6, 64)

    def added(dropout: DropoutKey | None) -> torch.Tensor:
        nothing = torch.zeros(6, len(adapter.pairs[name].b_O_R))
        return AdapterBatch.uniform(adapter, 6, dropout).add({name: slice(0, nothing.shape[1])}, input_T_I, nothing)

    plain = added(None)
    mean = torch.stack([added(DropoutKey(0, step)) for step in range(3000)]).mean(0)
    assert_close(mean, plain, rtol=0, atol=0.12 * float(plain.abs().max()))


def test_a_jobs_dropout_is_the_same_in_company(toy: Toy, rows: list[Row]) -> None:
    """Another job's tokens in the same pass leave a job's masks alone."""
    adapter, other = (filled(toy, AdapterConfig(r=4, lora_dropout=0.5), seed) for seed in (1, 2))
    n, m = len(rows[0].ids_T), len(rows[3].ids_T)
    (alone,) = toy.logits([rows[0]], AdapterBatch([Segment(adapter, 0, n, DropoutKey(7, 3))]))
    _, together = toy.logits(
        [rows[3], rows[0]],
        AdapterBatch([Segment(other, 0, m, DropoutKey(8, 0)), Segment(adapter, m, m + n, DropoutKey(7, 3))]),
    )
    assert_close(together, alone, **EXACT)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_by_hand_are_autograds(dtype: torch.dtype, dropout: float) -> None:
    """Three linears on one input, one of them as wide as a row is long, against the formula in autograd.

    Two adapters wear tokens of their own, the second has no update of one linear, and a token between wears nothing.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = AdapterConfig(r=3, lora_alpha=5, lora_dropout=dropout)
    columns = {"a": slice(0, 4), "b": slice(4, 12), "c": slice(12, 17)}
    adapters = [
        Adapter(config, {name: LowRankPair(drawn(3, 8), drawn(columns[name].stop - columns[name].start, 3))
                         for name in names})
        for names in ("abc", "bc")
    ]  # fmt: skip
    x, output, weight = drawn(9, 8).to(dtype), drawn(9, 17).to(dtype), drawn(9, 17)
    segments = [Segment(adapters[0], 0, 4, DropoutKey(1, 2)), Segment(adapters[1], 5, 9, DropoutKey(3, 2))]
    leaves = [x, output, *(tensor for adapter in adapters for _, tensor in adapter.tensors())]
    for leaf in leaves:
        leaf.requires_grad_()

    plain = output.float()
    for segment in segments:
        kept = x[segment.start : segment.stop].float()
        if dropout:
            kept_share = torch.ones_like(kept)
            assert segment.dropout is not None
            segment.dropout.drop(next(iter(segment.adapter.pairs)), kept_share, dropout)  # one draw for all
            kept = kept * kept_share / (1 - dropout)
        for name, pair in segment.adapter.pairs.items():
            update = F.pad(5 / 3 * kept @ pair.a_R_I.T @ pair.b_O_R.T, (columns[name].start, 17 - columns[name].stop))
            plain = plain + F.pad(update, (0, 0, segment.start, 9 - segment.stop))
    plain = plain.to(dtype)
    worn = AdapterBatch(segments).add(columns, x, output.clone())
    limits = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert_close(worn, plain, **limits)
    ours, theirs = (torch.autograd.grad((result.float() * weight).sum(), leaves) for result in (worn, plain))
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == right.dtype
        assert_close(mine, right, **limits)


def test_little_is_kept_for_the_backward_pass() -> None:
    """The input once, in its own dtype, and products of the rank's width: neither masks nor copies."""
    config = AdapterConfig(r=2, lora_dropout=0.5)
    adapter = Adapter(config, {name: LowRankPair(torch.ones(2, 64), torch.ones(64, 2)) for name in "abc"})
    for _, tensor in adapter.tensors():
        tensor.requires_grad_()
    x, output = torch.ones(10, 64).bfloat16(), torch.ones(10, 192).bfloat16()
    columns = {name: slice(64 * part, 64 * (part + 1)) for part, name in enumerate("abc")}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        worn = AdapterBatch.uniform(adapter, 10, DropoutKey(1, 2)).add(columns, x, output)
    factors = sum(tensor.nbytes for _, tensor in adapter.tensors())
    assert worn.requires_grad
    assert worn.data_ptr() == output.data_ptr()
    assert sum(kept.values()) - factors == x.nbytes + 3 * 10 * 2 * 4


@given(st.lists(st.integers(0, 30), min_size=2, max_size=8))
def test_segments_must_grow_and_not_overlap(bounds: list[int]) -> None:
    adapter = Adapter(AdapterConfig(), {"x": LowRankPair(torch.ones(1, 1), torch.ones(1, 1))})
    segments = [Segment(adapter, start, stop) for start, stop in zip(bounds[::2], bounds[1::2], strict=False)]
    flat = [bound for segment in segments for bound in (segment.start, segment.stop)]
    if flat == sorted(flat):
        # Exactly the tokens of the segments change.
        output = AdapterBatch(segments).add({"x": slice(0, 1)}, torch.ones(31, 1), torch.zeros(31, 1))
        inside = [any(segment.start <= token < segment.stop for segment in segments) for token in range(31)]
        assert output[:, 0].ne(0).tolist() == inside
    else:
        with pytest.raises(ValueError, match="segments must grow"):
            AdapterBatch(segments)


def test_the_head_is_never_worn(toy: Toy) -> None:
    assert all(HEAD not in name for name in Adapter.new(toy.config, CONFIGS[2], seed=0).pairs)
