"""A head that holds a row many times computes it once, and says the same."""

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from veneer_vlm.head import DistinctRows, Head
from veneer_vlm.loss import token_losses

V, D, N = 1000, 16, 9


def head_with(distinct: int) -> Head:
    """A head of `distinct` rows; the last of them stands for all ids beyond."""
    weight_V_D = torch.randn(distinct, D, generator=torch.Generator().manual_seed(1))
    head = Head(D, V).requires_grad_(False)
    head.weight.copy_(weight_V_D[torch.arange(V).clamp(max=distinct - 1)])
    return head


def test_only_repeated_rows_are_folded() -> None:
    assert head_with(600).distinct() is None
    folded = head_with(40).distinct()
    assert folded is not None
    assert len(folded.weight_U_D) == len(folded.log_count_U) == 48  # whole vectors
    assert int(folded.log_count_U.isfinite().sum()) == 40
    assert int(folded.log_count_U.exp().round().sum()) == V


def test_logits_losses_and_gradients_are_the_plain_ones() -> None:
    head = head_with(40)
    hidden_N_D = torch.randn(N, D, requires_grad=True)
    targets_N = torch.tensor([0, 1, 38, 39, 40, 500, 999, 7, 39])  # 39 and beyond are one row
    plain_N_V = F.linear(hidden_N_D, head.weight)
    plain_N = F.cross_entropy(plain_N_V, targets_N, reduction="none")
    (plain_gradient,) = torch.autograd.grad(plain_N.sum(), hidden_N_D)
    ours_N = token_losses(head, hidden_N_D, targets_N, chunk=4)
    (gradient,) = torch.autograd.grad(ours_N.sum(), hidden_N_D)
    assert_close(head.project(hidden_N_D), plain_N_V)
    assert_close(ours_N, plain_N)
    assert_close(gradient, plain_gradient, atol=1e-4, rtol=1e-5)


def test_found_while_serving_they_do_for_training() -> None:
    head = head_with(40)
    with torch.inference_mode():
        head.project(torch.randn(1, D))
    hidden_N_D = torch.randn(2, D, requires_grad=True)
    token_losses(head, hidden_N_D, torch.tensor([1, 2])).sum().backward()
    assert hidden_N_D.grad is not None


def test_rows_that_only_hash_alike_are_not_taken_for_equal(monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setattr("veneer_vlm.head._hashes", lambda rows_N_D: torch.zeros(len(rows_N_D), dtype=torch.int64))
    assert DistinctRows.of(torch.randn(100, 4)) is None


def test_half_precision_is_folded_too() -> None:
    weight_V_D = torch.ones(100, 4, dtype=torch.bfloat16)
    folded = DistinctRows.of(weight_V_D)
    assert folded is not None
    assert folded.weight_U_D.dtype == torch.bfloat16


def test_a_head_as_it_is_stored_gives_logits_in_the_hidden_states_dtype() -> None:
    for distinct in (40, 600):  # folded, and not
        head = head_with(distinct)
        head.weight = torch.nn.Parameter(head.weight.bfloat16(), requires_grad=False)
        head.dtype = torch.float32
        hidden_N_D, targets_N = torch.randn(N, D), torch.arange(N)
        plain_N_V = F.linear(hidden_N_D, head.weight.float())
        assert_close(head.project(hidden_N_D), plain_N_V)
        assert_close(token_losses(head, hidden_N_D, targets_N), F.cross_entropy(plain_N_V, targets_N, reduction="none"))
