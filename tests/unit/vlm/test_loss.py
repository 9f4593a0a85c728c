from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from veneer_vlm.loss import token_losses

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Toy


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_losses_and_gradients_are_the_plain_ones(toy: Toy, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, 64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 128, (17,), generator=generator)
    weights = torch.rand(17, generator=generator)  # a loss that is not a plain mean

    plain = F.cross_entropy(toy.model.logits(hidden), targets, reduction="none")
    (expected,) = torch.autograd.grad((plain * weights).sum(), hidden)
    ours = token_losses(toy.model.lm_head, hidden, targets, chunk)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), hidden)
    assert_close(ours, plain)
    assert_close(gradient, expected)


def test_no_logits_outlive_their_chunk(toy: Toy) -> None:
    """The graph keeps one gradient of the hidden states' size; a chunk of logits at most is made."""
    sizes = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), kwargs=None):  # noqa: ANN001, ANN204
            result = function(*arguments, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (128,):
                sizes.append(len(result))
            return result

    hidden = torch.randn(40, 64, requires_grad=True)
    with Spy():
        loss = token_losses(toy.model.lm_head, hidden, torch.zeros(40, dtype=torch.long), chunk=8)
    assert max(sizes) == 8
    assert [tensor.shape for tensor in loss.grad_fn.saved_tensors] == [(40, 64)]


def test_without_gradients_only_losses_are_made(toy: Toy) -> None:
    loss = token_losses(toy.model.lm_head, torch.randn(3, 64), torch.tensor([1, 2, 3]))
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    assert not loss.requires_grad
