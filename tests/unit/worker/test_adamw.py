"""Steps are those of the paper's algorithm, and weights without a gradient stay."""

import subprocess
import sys

import torch

from veneer_trainer.worker.loop.adamw import AdamW

BETAS, DECAY = (0.9, 0.95), 0.1


def test_steps_are_the_papers() -> None:
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=draw) for shape in ((3, 5), (7,))]
    expected = [weight.double() for weight in weights]
    first, second = ([torch.zeros_like(weight) for weight in expected] for _ in range(2))
    optimizer = AdamW(weights, BETAS, DECAY)
    for step in range(1, 5):
        rate = 0.1 / step
        for at, weight in enumerate(weights):
            gradient = weight.grad = torch.randn(weight.shape, generator=draw)
            first[at] = BETAS[0] * first[at] + (1 - BETAS[0]) * gradient
            second[at] = BETAS[1] * second[at] + (1 - BETAS[1]) * gradient**2
            mean, size = first[at] / (1 - BETAS[0] ** step), (second[at] / (1 - BETAS[1] ** step)).sqrt()
            expected[at] = expected[at] * (1 - rate * DECAY) - rate * mean / (size + 1e-8)
        optimizer.step(rate)
    for weight, double in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, double.float())


def test_steps_are_torchs_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(2)
    ours = [torch.randn(shape, generator=draw) for shape in ((33, 5), (7,))]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in ours]
    own, peer = AdamW(ours, BETAS, DECAY), torch.optim.AdamW(theirs, 0.1, BETAS, weight_decay=DECAY, fused=True)
    for step in range(1, 5):
        for weight, its_peer in zip(ours, theirs, strict=True):
            weight.grad = its_peer.grad = torch.randn(weight.shape, generator=draw)
        own.step(peer.param_groups[0]["lr"])
        peer.step()
        peer.param_groups[0]["lr"] = 0.1 / (1 + step)
    for weight, its_peer in zip(ours, theirs, strict=True):
        assert torch.equal(weight, its_peer)


def test_torchs_compiler_stays_out() -> None:
    code = """
import sys
import torch
import veneer_trainer.worker.loop.run
from veneer_trainer.worker.loop.adamw import AdamW

weight = torch.ones(2, requires_grad=True)
weight.sum().backward()
AdamW([weight], (0.9, 0.99), 0).step(0.1)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_weight_without_a_gradient_stays() -> None:
    moved, kept = torch.ones(2), torch.ones(2)
    optimizer = AdamW([moved, kept], BETAS, DECAY)
    moved.grad = torch.ones(2)
    optimizer.step(0.1)
    optimizer.forget_gradients()
    assert (moved.grad, kept.tolist()) == (None, [1.0, 1.0])
    assert list(optimizer.state) == [moved]
