"""The head: hidden states to logits, computed once for rows of its weight that are the same.

A base whose vocabulary was never trained in full holds one filler row many thousand times (the demonstration base:
some 150,000 of 151,936). Equal rows give equal logits, so a product with the distinct ones gives all, and a sum over
the vocabulary is a sum over them weighted by how often each stands there. Exact, and nothing changes where rows differ.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer_vlm.linear import Linear, product
from veneer_vlm.native import LANES
from veneer_vlm.pointwise import cross_entropy

_SAMPLE = 4096  # rows that are looked at before all are
_HASHED_AT_ONCE = 512  # rows: 8 MB of int64 at a hidden size of 2,048


@dataclasses.dataclass(frozen=True)
class DistinctRows:
    """U distinct rows among the V of a head, and as many of zeros, which no id has, as make U whole vectors.

    Attributes:
        weight_U_D: they themselves.
        row_V: which of them each id has.
        log_count_U: logarithm of how many ids have each, float32; minus infinity for none.
    """

    weight_U_D: Tensor
    row_V: Tensor
    log_count_U: Tensor

    @classmethod
    def of(cls, weight_V_D: Tensor, dtype: torch.dtype | None = None) -> "DistinctRows | None":
        """The distinct rows of a weight, in its dtype or another; None where they are more than half of all."""
        step = max(1, len(weight_V_D) // _SAMPLE)
        sample = _hashes(weight_V_D[::step])
        if 2 * len(torch.unique(sample)) > len(sample):
            return None
        _, row_V, counts_U = torch.unique(_hashes(weight_V_D), return_inverse=True, return_counts=True)
        if 2 * len(counts_U) > len(row_V):
            return None
        first_U = torch.empty_like(counts_U).scatter_(0, row_V, torch.arange(len(row_V), device=row_V.device))
        weight_U_D = weight_V_D[first_U].clone()
        # Hashes may collide: only equal rows share one.
        if not all(
            torch.equal(rows, weight_U_D[index])
            for rows, index in zip(
                torch.split(weight_V_D, _HASHED_AT_ONCE), torch.split(row_V, _HASHED_AT_ONCE), strict=True
            )
        ):
            return None
        more = -len(counts_U) % LANES
        weight_U_D = F.pad(weight_U_D.to(dtype or weight_U_D.dtype), (0, 0, 0, more))
        return cls(weight_U_D, row_V, F.pad(counts_U, (0, more)).log())


class Head(Linear):
    """The model's `lm_head`; its weight must not change after the first product.

    Attributes:
        dtype: of hidden states and logits; None: the weight's.
    """

    dtype: torch.dtype | None = None
    _distinct: DistinctRows | None = None
    _searched = False

    def distinct(self) -> DistinctRows | None:
        """The distinct rows of the weight, found at the first call; None where they would save nothing."""
        if not self._searched:
            with torch.inference_mode(False), torch.no_grad():  # found while serving, they must do for training too
                self._distinct = DistinctRows.of(self.weight, self.dtype)
            self._searched = True
        return self._distinct

    def project(self, input_T_I: Tensor) -> Tensor:
        """Logits of all ids, (T, V)."""
        distinct = self.distinct()
        if distinct is None:
            return super().project(input_T_I)
        return product(input_T_I, distinct.weight_U_D).index_select(-1, distinct.row_V)

    def cross_entropy(self, input_T_I: Tensor, targets_T: Tensor) -> Tensor:
        """The negative log-likelihood (T,) of each target, float32."""
        distinct = self.distinct()
        if distinct is None:
            return cross_entropy(super().project(input_T_I), targets_T)
        # -log(exp(l_u) / sum_v n_v exp(l_v)) is the usual loss of l + log n, but for the n_u in its numerator.
        rows_T = distinct.row_V[targets_T]
        logits_T_U = product(input_T_I, distinct.weight_U_D).float() + distinct.log_count_U
        return cross_entropy(logits_T_U, rows_T) + distinct.log_count_U[rows_T]


def _hashes(rows_N_D: Tensor) -> Tensor:
    """An int64 for each row that equal rows share: a sum of its bits under fixed odd factors, modulo 2^64."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[rows_N_D.element_size()]
    factor_D = torch.randint(
        -(2**62), 2**62, rows_N_D.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.int64
    ).to(rows_N_D.device)
    hashes_N = factor_D.new_empty(len(rows_N_D))
    # All products in one place: of a new one each time the C library may keep them all, small results between them.
    place = factor_D.new_empty(min(_HASHED_AT_ONCE, len(rows_N_D)), len(factor_D))
    for rows, hashes in zip(
        torch.split(rows_N_D, _HASHED_AT_ONCE), torch.split(hashes_N, _HASHED_AT_ONCE), strict=True
    ):
        products = torch.mul(rows.contiguous().view(bits), 2 * factor_D + 1, out=place[: len(rows)])
        torch.sum(products, -1, out=hashes)
    return hashes_N
