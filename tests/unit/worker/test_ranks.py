"""Two processes under torchrun learn what one learns from twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veneer_trainer.worker.loop.ranks import ALONE, Ranks

Bench = Any  # the fixture's class in conftest.py
LORA = {"target_modules": ["decoder"]}
ROWS, TIMEOUT_S = 7, 90


@pytest.mark.parametrize(
    ("rows", "shares"), [(8, [4, 4]), (7, [4, 3]), (1, [1, 0]), (0, [0, 0])], ids=["even", "odd", "one", "none"]
)
def test_shares_are_neighbours_and_miss_no_row(rows: int, shares: list[int]) -> None:
    parts = [list(range(rows))[Ranks(rank, 2).share(rows)] for rank in range(2)]
    assert [len(part) for part in parts] == shares
    assert parts[0] + parts[1] == list(range(rows))
    assert list(range(rows))[ALONE.share(rows)] == list(range(rows))


def test_two_ranks_are_one_with_twice_the_batch(bench: Bench, tmp_path: Path) -> None:
    """Two steps over seven rows: the last has three, and of the rows of a step each rank has its half."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(Path(__file__).with_name("rank_program.py")), str(bench.directory), str(tmp_path), str(ROWS)),
    ]
    loopback = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=loopback)
    assert done.returncode == 0, done.stderr[-4000:]
    one = bench.run(batch_size=4, gradient_accumulation=1, lora=LORA)
    losses = []
    for step in bench.steps(one.plan, bench.rows(ROWS)):
        one.learner.learn(step, 1e-2)
        losses.append(one.state.figures.loss)
    validation = one.learner.loss(bench.steps(one.plan, bench.rows(ROWS)))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["agreed"] == [True, False]  # as rank 0 says
    assert ranks[0]["gradients"] == [[2, 1], [5, 6], None]
    assert ranks[0]["losses"] == pytest.approx(losses, abs=1e-5)
    assert ranks[0]["validation"] == pytest.approx(validation, abs=1e-5)
    weights = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for name, tensor in one.weights().items():
        assert torch.equal(weights[0][name], weights[1][name])
        assert torch.allclose(weights[0][name], tensor, atol=1e-5)
