"""What a pointwise function gives is made again for a gradient that wants it, and the gradient is the same."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from veneer_vlm.pointwise import made_again, swiglu


@pytest.mark.parametrize("wanted", [True, False])
def test_it_is_made_once_for_each_who_keeps_it(wanted: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    source, weight = (torch.randn(shape, generator=draw).requires_grad_() for shape in ((6, 32), (16, 4)))
    (swiglu(source) @ weight).sum().backward()
    right = source.grad, weight.grad
    source.grad = weight.grad = None
    made: list[Tensor] = []

    def counted(values: Tensor) -> Tensor:
        made.append(swiglu(values))
        return made[-1]

    gated = swiglu(source)
    with made_again(gated, counted, source, wanted=wanted):
        output = gated @ weight
    assert not made
    output.sum().backward()
    assert len(made) == (1 if wanted else 0)
    assert not any(each.requires_grad for each in made)
    for gradient, right_gradient in zip((source.grad, weight.grad), right, strict=True):
        assert gradient is not None
        assert right_gradient is not None
        assert torch.equal(gradient, right_gradient)


def test_without_gradients_nothing_is_hooked() -> None:
    learned = torch.ones(2, 16).requires_grad_()
    with torch.no_grad():
        assert isinstance(made_again(learned, swiglu, learned, wanted=True), nullcontext)
    assert isinstance(made_again(torch.ones(2, 16), swiglu, learned, wanted=True), nullcontext)
