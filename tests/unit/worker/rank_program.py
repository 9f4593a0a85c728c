"""What each rank runs: python rank_program.py BASE OUT ROWS, under torchrun."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import Bench, spec
from safetensors.torch import save_file

from veneer_trainer.worker.loop.batches import Batches
from veneer_trainer.worker.loop.features import FrozenFeatures
from veneer_trainer.worker.loop.learner import Learner
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.ranks import Ranks
from veneer_trainer.worker.loop.state import State


def main(base: str, out: str, row_count: int) -> None:
    ranks = Ranks.joined(Path(out, "meeting"), "cpu")
    bench = Bench(Path(base))
    plan = Plan.of(spec(batch_size=2, gradient_accumulation=2, lora={"target_modules": ["decoder"]}), bench.config)
    state = State.fresh(bench.config, plan)
    features = FrozenFeatures(bench.model, 1 << 30)
    learner = Learner(bench.model, state, plan, features, ranks)
    batches = Batches(bench.processor, plan, features.known, ranks)
    rows, size, losses = bench.rows(row_count), plan.rows_per_step, []
    steps = [batches.step(rows[start : start + size]) for start in range(0, row_count, size)]
    for step in steps:
        learner.learn(step, 1e-2)
        losses.append(state.figures.loss)
    told = {
        "losses": losses,
        "validation": learner.loss(steps),
        "agreed": ranks.agreed(ranks.rank == 0, ranks.rank == 1),
        "gradients": gradients(ranks),
    }
    Path(out, f"{ranks.rank}.json").write_text(json.dumps(told))
    save_file(
        {name: tensor.detach() for name, tensor in state.adapter.tensors()}, Path(out, f"{ranks.rank}.safetensors")
    )


def gradients(ranks: Ranks) -> list[list[float] | None]:
    """Sums of a gradient that both have, one that rank 1 has alone, and one that nobody has."""
    weights = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    weights[0].grad = torch.tensor([1.0, ranks.rank])
    if ranks.rank == 1:
        weights[1].grad = torch.tensor([5.0, 6.0])
    ranks.add_gradients(weights)
    return [None if weight.grad is None else weight.grad.tolist() for weight in weights]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads must not see the interpreter's end
