"""The three products of an adapter's factors with a linear's many numbers: activations, or their gradients.

Owns the choice of who multiplies. The compiled library reads bfloat16 as it lies and sums in float32; torch would have
a float32 copy of it first, which takes three times as long as the product. Of many rows in float32 torch's product is
up to twice as fast as the library's of AVX2; with AVX-512 that was not compared. Shapes: N tokens, C numbers of each,
rank R.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer_vlm import native


def _by_library(matrix_N_C: Tensor) -> bool:
    return native.takes(matrix_N_C) and (native.WIDE or matrix_N_C.dtype is torch.bfloat16)


def exact(matrix_N_C: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix as the products here read it: itself where the library does, else in the dtype of factors."""
    return matrix_N_C if _by_library(matrix_N_C) else matrix_N_C.to(dtype)


def inner_products(matrix_N_C: Tensor, factor_R_C: Tensor) -> Tensor:
    """Each token's products with the factor's rows, (N, R)."""
    if _by_library(matrix_N_C):
        return native.inner(matrix_N_C, factor_R_C)
    return F.linear(matrix_N_C.to(factor_R_C.dtype), factor_R_C)


def add_products(matrix_N_C: Tensor, inner_N_R: Tensor, factor_R_C: Tensor) -> None:
    """Adds combinations of the factor's rows to a matrix where it lies, rounded once."""
    if _by_library(matrix_N_C):
        native.add(matrix_N_C, inner_N_R.float(), factor_R_C)
    elif matrix_N_C.dtype is factor_R_C.dtype:
        matrix_N_C.addmm_(inner_N_R, factor_R_C)
    else:
        matrix_N_C.copy_((inner_N_R @ factor_R_C).add_(matrix_N_C))


def outer_products(inner_N_R: Tensor, matrix_N_C: Tensor) -> Tensor:
    """Combinations of a matrix's rows, (R, C): the gradient of a factor."""
    if _by_library(matrix_N_C):
        return native.outer(inner_N_R.float(), matrix_N_C).to(inner_N_R.dtype)
    return inner_N_R.T @ matrix_N_C.to(inner_N_R.dtype)
