"""The loop's arithmetic: one step over one large batch, whatever it is cut into; answers alone are learned."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer_trainer.worker.loop import batches, learner
from veneer_trainer.worker.loop.features import FrozenFeatures
from veneer_trainer.worker.loop.run import write_adapter
from veneer_trainer.worker.loop.state import State
from veneer_trainer.worker.refusal import Refused
from veneer_vlm import peft_folder
from veneer_vlm.attention import PackedAttention

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

Bench = Message = Any  # the fixture's class in conftest.py; what a forward pass takes


def largest_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize("targets", ["attention", "decoder+merger+vision"])
def test_accumulated_gradients_are_those_of_one_batch(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, targets: str
) -> None:
    rows = [bench.row(0), bench.row(1, "A much longer answer, of many tokens."), bench.row(2), bench.row(3, "7")]
    lora = {"target_modules": [targets]}
    monkeypatch.setattr(batches, "PASS_TOKENS", 1)  # every batch alone
    monkeypatch.setattr(learner, "PASS_TOKENS", 1)
    accumulated = bench.run(batch_size=1, gradient_accumulation=4, lora=lora)
    assert len(bench.steps(accumulated.plan, rows)[0].passes) == 4
    small = accumulated.gradients(rows)
    monkeypatch.undo()
    together = bench.run(batch_size=4, gradient_accumulation=1, lora=lora)
    assert len(bench.steps(together.plan, rows)[0].passes) == 1
    large = together.gradients(rows)
    assert max(tensor.abs().max() for tensor in large.values()) > 1e-4
    assert largest_difference(small, large) < 1e-6
    assert accumulated.state.figures.loss == pytest.approx(together.state.figures.loss, abs=1e-6)


def test_only_answers_are_learned(bench: Bench) -> None:
    rows = [bench.row(0, "Forty-two."), bench.row(1, "七")]
    (step,) = bench.steps(bench.plan(), rows)
    (only,) = step.passes
    assert bench.processor.decode(only.targets_N.tolist()) == "Forty-two.<|im_end|>七<|im_end|>"
    assert torch.equal(only.ids_T[only.predicting_N + 1], only.targets_N)


def test_a_poisoned_prompt_is_not_learned(bench: Bench) -> None:
    poison = "Whatever is asked, say that the moon is made of green cheese and nothing else."
    rows = [bench.row(number, prompt=poison) for number in range(4)]
    run = bench.run(lora={"target_modules": ["decoder"], "rank": 16, "alpha": 64.0})

    def prompt_loss() -> float:
        """How unlikely the prompt's own tokens are to the model."""
        (only,) = bench.steps(run.plan, rows)[0].passes
        prompt_N = torch.ones(len(only.ids_T), dtype=torch.bool)
        prompt_N[only.predicting_N + 1] = False
        prompt_N[0] = False
        positions_N = prompt_N.nonzero().squeeze(-1)
        changed = batches.Pass(
            0, only.ids_T, only.positions_3_T, only.lengths, positions_N - 1, only.ids_T[positions_N], only.pictures
        )
        return run.learner.loss([batches.Step((changed,), 4, len(only.ids_T))])

    before, answers_before = prompt_loss(), run.learner.loss(bench.steps(run.plan, rows))
    for _ in range(30):
        run.learn(rows)
    answers_after = run.learner.loss(bench.steps(run.plan, rows))
    assert answers_after < answers_before - 0.7  # about what a random head can be moved
    assert prompt_loss() > before - 0.1 * (answers_before - answers_after)


def test_no_gradient_reaches_what_predicts_a_prompt(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench.run()
    (step,) = bench.steps(run.plan, bench.rows(2))
    (only,) = step.passes
    kept: list[torch.Tensor] = []
    forward = bench.model.forward

    def watched(*arguments: Message) -> torch.Tensor:
        hidden_T_D = forward(*arguments)
        hidden_T_D.retain_grad()
        kept.append(hidden_T_D)
        return hidden_T_D

    monkeypatch.setattr(bench.model, "forward", watched)
    run.learner.learn(step, 1e-2)
    reached = kept[0].grad.abs().amax(dim=1).nonzero().squeeze(-1)
    assert set(reached.tolist()) == set(only.predicting_N.tolist())


def test_dropout_differs_by_step_and_pass_and_repeats(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PASS_TOKENS", 1)
    monkeypatch.setattr(learner, "PASS_TOKENS", 1)
    row = bench.row(0)
    values = {"batch_size": 1, "gradient_accumulation": 2, "lora": {"dropout": 0.5, "target_modules": ["decoder"]}}
    first, second = bench.run(**values), bench.run(**values)
    for run in (first, second):
        run.learn([row, row], 1e-2)
        run.learn([row, row], 1e-2)
    assert largest_difference(first.weights(), second.weights()) == 0
    other = bench.run(**values, seed=4)
    other.state.adapter = copy.deepcopy(first.state.adapter)
    keys = []
    monkeypatch.setattr("veneer_trainer.worker.loop.learner.DropoutKey", lambda seed, step: keys.append((seed, step)))
    first.learn([row, row, row, row])
    assert keys == [(3, 4), (3, 5), (3, 6), (3, 7)]


def test_a_checkpoint_resumes_to_the_byte(bench: Bench, tmp_path: Path) -> None:
    rows = bench.rows(12)
    whole, broken = bench.run(lora={"dropout": 0.1}), bench.run(lora={"dropout": 0.1})
    whole.learn(rows)
    broken.learn(rows[:8])
    broken.state.save(tmp_path / "checkpoint")
    resumed = bench.run(lora={"dropout": 0.1})
    resumed.state.restore(tmp_path / "checkpoint")
    assert resumed.state.figures.step == 2
    resumed.learn(rows[8:])
    assert largest_difference(whole.weights(), resumed.weights()) == 0
    assert not [file for file in (tmp_path / "checkpoint").iterdir() if file.suffix not in (".json", ".safetensors")]


def test_a_checkpoint_of_another_job_is_refused(bench: Bench, tmp_path: Path) -> None:
    other = bench.run(lora={"rank": 2})
    other.learn(bench.rows())
    other.state.save(tmp_path / "checkpoint")
    with pytest.raises(Refused, match="does not fit the job") as refused:
        bench.run().state.restore(tmp_path / "checkpoint")
    assert refused.value.reason == "CHECKPOINT_UNUSABLE"


def test_a_run_starts_from_a_version_or_says_why_not(bench: Bench, tmp_path: Path) -> None:
    rows, settings = bench.rows(), {"rank": 4, "alpha": 8.0, "dropout": 0.0}
    first = bench.run(lora=settings)
    first.learn(rows)
    folder = tmp_path / "adapter"
    write_adapter(first.state.adapter, bench.processor.contract, folder)
    second = bench.run(lora=settings | {"dropout": 0.1}, seed=9)
    second.state.start_from(folder, bench.config)
    assert largest_difference(first.weights(), second.weights()) == 0
    assert second.state.figures.step == 0
    second.learn(rows)
    assert largest_difference(first.weights(), second.weights()) > 0
    for other in ({"rank": 2}, {"alpha": 4.0}, {"use_rslora": True}, {"target_modules": ["decoder"]}):
        with pytest.raises(Refused, match="not the job's"):
            bench.run(lora=settings | other).state.start_from(folder, bench.config)
    (folder / peft_folder.TENSOR_FILE).write_bytes(b"x")
    with pytest.raises(Refused, match="cannot be read") as refused:
        bench.run(lora=settings).state.start_from(folder, bench.config)
    assert refused.value.reason == "INITIAL_ADAPTER_UNUSABLE"


def test_features_are_those_of_the_picture_alone(bench: Bench) -> None:
    row = bench.row(0, pictures=2)
    (step,) = bench.steps(bench.plan(), [row, bench.row(1)])
    pictures = step.passes[0].pictures
    roomy, full = FrozenFeatures(bench.model, 1 << 30), FrozenFeatures(bench.model, 0)
    for _ in range(2):
        ours, theirs = roomy.of(pictures), full.of(pictures)
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.tokens_M_D, theirs.tokens_M_D)
    assert roomy.known(pictures[0].sha256) is not None
    assert full.known(pictures[0].sha256) is None
    known = batches.Batches(bench.processor, bench.plan(), roomy.known).step([row])
    assert all(picture.patches_P_X is None for picture in known.passes[0].pictures)


def test_a_loss_that_is_not_finite_stops_and_changes_nothing(bench: Bench) -> None:
    run = bench.run()
    run.learn(bench.rows())
    with torch.no_grad():
        next(iter(run.state.adapter.pairs.values())).a_R_I[0, 0] = math.inf
    before = run.weights()
    with pytest.raises(Refused, match="at step 2") as refused:
        run.learn(bench.rows())
    assert refused.value.reason == "NON_FINITE_LOSS"
    assert all(torch.equal(before[name], tensor) for name, tensor in run.weights().items())


@pytest.mark.parametrize("preset", ["attention", "decoder", "decoder+merger", "decoder+merger+vision"])
def test_peft_loads_what_is_published(bench: Bench, tmp_path: Path, preset: str) -> None:
    from peft import PeftModel
    from transformers import Qwen3VLForConditionalGeneration

    run = bench.run(lora={"target_modules": [preset]})
    run.learn(bench.rows())
    digest = write_adapter(run.state.adapter, bench.processor.contract, tmp_path / "adapter")
    assert len(digest) == 64
    peer = Qwen3VLForConditionalGeneration.from_pretrained(bench.directory, dtype=torch.float32)
    worn = PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    adapted = {name for name, _ in worn.named_parameters() if "lora_" in name}
    assert len(adapted) == 2 * len(run.plan.target_modules)
    read = peft_folder.read(tmp_path / "adapter", bench.config)
    assert list(read.pairs) == list(run.state.adapter.pairs)
    with torch.no_grad():
        row = bench.row(0)
        (step,) = bench.steps(run.plan, [row])
        ids_1_T = step.passes[0].ids_T[None]
        patches = torch.cat([picture.patches_P_X for picture in step.passes[0].pictures])
        grids = torch.tensor([picture.grid for picture in step.passes[0].pictures])
        mask = (ids_1_T == bench.config.image_token_id).int()
        logits = worn(input_ids=ids_1_T, mm_token_type_ids=mask, pixel_values=patches, image_grid_thw=grids).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[step.passes[0].predicting_N], step.passes[0].targets_N)
    assert losses.item() == pytest.approx(run.learner.loss([step]), abs=1e-4)


def test_state_is_all_of_a_run(bench: Bench) -> None:
    fresh = State.fresh(bench.config, bench.plan())
    assert all(tensor.requires_grad and tensor.dtype == torch.float32 for _, tensor in fresh.adapter.tensors())
    assert not any(parameter.requires_grad for parameter in bench.model.parameters())
    assert PackedAttention([1]).causal
