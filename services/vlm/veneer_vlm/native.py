"""The way to a library that is compiled with the project, from `services/vlm/native`.

Owns the library: whether there is one for this CPU, what tensors it takes, and its calls of attention (few tokens over
blocks), of low rank and of packed weights; those of `pointwise` are made there. Where there is none torch does it all.
"""

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_TOKENS = 16
"""Of the blocks that keys and values must lie in."""

LANES = 16
"""Rows that the library reads, and its weights, are whole numbers of so many: a vector of AVX-512, two of AVX2."""
_GROUP_BYTES = 4
_MOST_TOKENS = 32  # of a sequence: with more torch's products pay
_MOST_NUMBERS = 1 << 16  # of a task's queries, which stand on a thread's stack and in a core's cache
_DTYPES = (torch.float32, torch.bfloat16)
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
WIDE = _CAPABILITY == "AVX512"
"""Whether the library, where there is one, is that of vectors of sixteen numbers."""
FILE = Path(__file__).with_name(f"native_{_CAPABILITY.lower()}.so")
"""The library of this CPU's kind; compiled for AVX-512 and for AVX2."""


class _Pass(ctypes.Structure):
    """`Pass` in attention.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "gathered", "blocks")),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "width")),
        ("bfloat16", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


class _LowRank(ctypes.Structure):
    """`LowRank` in low_rank.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("matrix", "rows", "starts", "inner", "factor")),
        ("sets", ctypes.c_int64),
        *((f"{name}_stride", ctypes.c_int64) for name in ("matrix", "inner", "factor")),
        *((name, ctypes.c_int64) for name in ("factor_of_set", "rank", "columns", "first_column")),
        *((name, ctypes.c_int) for name in ("matrix_bfloat16", "factor_bfloat16")),
    ]


class _Product(ctypes.Structure):
    """`Product` in product.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "input", "bias", "output")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "row_middle", "output_scale", "output_sum", "shift")),
        *((name, ctypes.c_int64) for name in ("rows", "outputs", "inputs", "input_stride", "output_stride")),
        *((name, ctypes.c_int) for name in ("bias_bfloat16", "output_bfloat16")),
    ]


class Rows(ctypes.Structure):
    """`Rows` in pointwise.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("outer", "inner", "width", "outer_stride", "inner_stride")),
        ("bfloat16", ctypes.c_int),
    ]


def _library() -> ctypes.CDLL | None:
    if not FILE.exists():
        return None
    library = ctypes.CDLL(str(FILE))  # its threads are torch's: both ask for the same libgomp
    library.veneer_attend.argtypes = (ctypes.POINTER(_Pass), ctypes.c_void_p, ctypes.c_int64)
    library.veneer_attend.restype = None
    for function in (library.veneer_inner, library.veneer_add, library.veneer_outer):
        function.argtypes, function.restype = (ctypes.POINTER(_LowRank),), None
    memory, number = ctypes.c_void_p, ctypes.c_int64
    update = library.veneer_update
    update.argtypes = (*[memory] * 2, number, *[memory] * 4, number, memory, number, ctypes.c_int)
    update.restype = None
    rows, norm, norm_grad = ctypes.POINTER(Rows), library.veneer_norm, library.veneer_norm_grad
    norm.argtypes, norm.restype = (rows, *[memory] * 4, ctypes.c_float), None
    norm_grad.argtypes, norm_grad.restype = (rows, *[memory] * 5), None
    loss = library.veneer_cross_entropy
    loss.argtypes, loss.restype = (*[memory] * 3, number, number, ctypes.c_int, ctypes.c_int), None
    for function, tensors in ((library.veneer_swiglu, 2), (library.veneer_swiglu_grad, 3)):
        function.argtypes, function.restype = (*[memory] * tensors, number, number, ctypes.c_int), None
    library.veneer_product_stored.argtypes = (ctypes.POINTER(_Product), ctypes.c_int)
    library.veneer_product_stored.restype = None
    if WIDE:
        _declare_packed(library)
    return library


def _declare_packed(library: ctypes.CDLL) -> None:
    memory, number = ctypes.c_void_p, ctypes.c_int64
    library.veneer_pack.argtypes, library.veneer_pack.restype = (memory, memory, number, number), None
    for function in (library.veneer_product, library.veneer_product_int8):
        function.argtypes, function.restype = (ctypes.POINTER(_Product),), None
    quantise = library.veneer_quantise
    quantise.argtypes = (memory, number, ctypes.c_int, *[memory] * 3, number, number, ctypes.c_float, ctypes.c_float)
    quantise.restype = None


_LIBRARY = _library()
AVAILABLE = _LIBRARY is not None
"""Whether there is a library, and this CPU can run it."""

_AMX = torch.cpu._is_amx_tile_supported()  # oneDNN's products are then of another kind, and several times as fast
MULTIPLIES = {
    torch.bfloat16: AVAILABLE and WIDE and torch.cpu._is_avx512_bf16_supported() and not _AMX,
    torch.int8: AVAILABLE and WIDE and torch.cpu._is_vnni_supported() and not _AMX,
    torch.float32: AVAILABLE and not WIDE,
}
"""Whether the library multiplies inputs of a dtype, and this CPU has nothing that is faster."""


def multiplies(weight_O_I: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether products with a weight are the library's: it MULTIPLIES the dtype, inputs and outputs fill vectors.

    Args:
        weight_O_I: as it is held: in bfloat16 for inputs of float32, else in the inputs' dtype.
        dtype: of the inputs; None for the weight's.
    """
    dtype = dtype or weight_O_I.dtype
    return (
        MULTIPLIES.get(dtype, False)
        and weight_O_I.dtype is (torch.bfloat16 if dtype is torch.float32 else dtype)
        and weight_O_I.device.type == "cpu"
        and weight_O_I.is_contiguous()
        and all(size % LANES == 0 for size in weight_O_I.shape)
    )


def takes(numbers: Tensor) -> bool:
    """Whether the library reads and writes such a tensor: its last axis lies together, in whole vectors."""
    return (
        AVAILABLE
        and numbers.device.type == "cpu"
        and numbers.dtype in _DTYPES
        and numbers.shape[-1] % LANES == 0
        and numbers.stride(-1) == 1
    )


def inner(matrix_N_C: Tensor, factor_R_C: Tensor) -> Tensor:
    """Each row's products with the factor's rows, (N, R), float32; the library `takes` such a matrix."""
    inner_N_R = matrix_N_C.new_empty(len(matrix_N_C), len(factor_R_C), dtype=torch.float32)
    starts, factor_R_C = torch.tensor([0, len(matrix_N_C)]), factor_R_C.contiguous()
    loaded().veneer_inner(_product(matrix_N_C, starts, inner_N_R, factor_R_C))
    return inner_N_R


def add(matrix_N_C: Tensor, inner_N_R: Tensor, factor_R_C: Tensor) -> None:
    """Adds combinations of the factor's rows, weights float32, to a matrix where it lies, rounded once."""
    starts, factor_R_C = torch.tensor([0, len(matrix_N_C)]), factor_R_C.contiguous()
    loaded().veneer_add(_product(matrix_N_C, starts, inner_N_R, factor_R_C))


def outer(inner_N_R: Tensor, matrix_N_C: Tensor) -> Tensor:
    """Combinations of a matrix's rows, weights float32: (R, C), float32."""
    factor_R_C = inner_N_R.new_empty(inner_N_R.shape[1], matrix_N_C.shape[1])
    starts = torch.tensor([0, len(matrix_N_C)])
    loaded().veneer_outer(_product(matrix_N_C, starts, inner_N_R, factor_R_C))
    return factor_R_C


class Updates:
    """What several adapters add to linears that read one input, made ready once: their factors stay where they are.

    Args:
        a_S_PR_I: each adapter's A of all P linears, one under the other.
        b_P_S_R_O: for each linear each adapter's B, turned.
        columns: where each linear's outputs begin.
    """

    def __init__(self, a_S_PR_I: Tensor, b_P_S_R_O: Sequence[Tensor], columns: Sequence[int]) -> None:
        self._factors = (a_S_PR_I, *b_P_S_R_O)  # kept, as their addresses are
        self._a = _of_factors(a_S_PR_I)
        self._b = (_LowRank * len(b_P_S_R_O))(*map(_of_factors, b_P_S_R_O, columns))

    def add(self, input_T_I: Tensor, output_T_O: Tensor, by_adapter_N: Tensor, starts: Tensor) -> None:
        """Adds to the outputs where they lie, rounded once.

        Args:
            input_T_I: what the linears read, of the outputs' dtype; the library `takes` both.
            output_T_O: what they made of it.
            by_adapter_N: which tokens wear something, adapter by adapter.
            starts: where each adapter's begin among those, and where the last ones end.
        """
        inner_N_PR = torch.empty(len(by_adapter_N), self._a.rank)
        loaded().veneer_update(
            ctypes.addressof(self._a), ctypes.addressof(self._b), len(self._b), by_adapter_N.data_ptr(),
            starts.data_ptr(), inner_N_PR.data_ptr(), input_T_I.data_ptr(), input_T_I.stride(0),
            output_T_O.data_ptr(), output_T_O.stride(0), output_T_O.dtype is torch.bfloat16,
        )  # fmt: skip


class Quantised(NamedTuple):
    """Rows in eight bits.

    Attributes:
        integers_T_I: uint8.
        scale_T: of each row, float32.
        middle_T: what `zero` stands for in each row, float32.
        dtype: of the numbers that these were.
    """

    integers_T_I: Tensor
    scale_T: Tensor
    middle_T: Tensor
    dtype: torch.dtype


def quantised(input_T_I: Tensor, zero: int, least_scale: float) -> Quantised:
    """Rows (T, I), of whole vectors, in eight bits: `zero` is the middle of a row's range, twice that its greatest."""
    input_T_I = input_T_I if input_T_I.stride(-1) == 1 else input_T_I.contiguous()
    tokens, inputs = input_T_I.shape
    integers_T_I = input_T_I.new_empty(tokens, inputs, dtype=torch.uint8)
    scale_T, middle_T = input_T_I.new_empty(2, tokens, dtype=torch.float32)
    loaded().veneer_quantise(
        input_T_I.data_ptr(), input_T_I.stride(0), input_T_I.dtype is torch.bfloat16,
        integers_T_I.data_ptr(), scale_T.data_ptr(), middle_T.data_ptr(), tokens, inputs, zero, least_scale,
    )  # fmt: skip
    return Quantised(integers_T_I, scale_T, middle_T, input_T_I.dtype)


def product_stored(
    input_T_I: Tensor, weight_O_I: Tensor, bias_O: Tensor | None = None, *, turned: bool = False
) -> Tensor:
    """Of inputs and a weight as it is stored, (T, O); `turned`: of (T, O) with the weight itself, (T, I).

    Keeps nothing of a shape, where oneDNN keeps code of some hundred KB for each number of tokens.

    Args:
        input_T_I: of a dtype that the library `multiplies` the weight with.
        weight_O_I: in bfloat16.
        bias_O: of either dtype.
        turned: for what a gradient is multiplied with.
    """
    input_T_I = input_T_I.contiguous()
    inputs, outputs = weight_O_I.shape if turned else weight_O_I.shape[::-1]
    output_T_O = input_T_I.new_empty(len(input_T_I), outputs)
    call = _call(weight_O_I, input_T_I, inputs * input_T_I.element_size() // _GROUP_BYTES, bias_O, output_T_O)
    loaded().veneer_product_stored(call, turned)
    return output_T_O


class Weight:
    """A base's weight, packed; one that the library `multiplies`."""

    def __init__(self, weight_O_I: Tensor) -> None:
        self.outputs, inputs = weight_O_I.shape
        self._groups = inputs * weight_O_I.element_size() // _GROUP_BYTES
        self._packed = torch.empty_like(weight_O_I)
        loaded().veneer_pack(weight_O_I.data_ptr(), self._packed.data_ptr(), self.outputs, self._groups)

    def product(self, input_T_I: Tensor, bias_O: Tensor | None) -> Tensor:
        """Of inputs in bfloat16 with a weight in it, (T, O), bfloat16, rounded once."""
        input_T_I = input_T_I.contiguous()
        output_T_O = input_T_I.new_empty(len(input_T_I), self.outputs)
        loaded().veneer_product(_call(self._packed, input_T_I, self._groups, bias_O, output_T_O))
        return output_T_O

    def product_int8(
        self, rows: Quantised, bias_O: Tensor | None, shift_O: Tensor, scale_O: Tensor, sum_O: Tensor
    ) -> Tensor:
        """Of inputs with a weight in eight bits, (T, O), in the dtype that the inputs had.

        Args:
            rows: the inputs.
            bias_O: float32 or bfloat16.
            shift_O: what `zero` in every input makes of each output, int32.
            scale_O: float32.
            sum_O: of each output's weights, times its scale: float32.
        """
        output_T_O = rows.scale_T.new_empty(len(rows.integers_T_I), self.outputs, dtype=rows.dtype)
        call = _call(self._packed, rows.integers_T_I, self._groups, bias_O, output_T_O)
        call.row_scale, call.row_middle = rows.scale_T.data_ptr(), rows.middle_T.data_ptr()
        call.output_scale, call.output_sum, call.shift = (each.data_ptr() for each in (scale_O, sum_O, shift_O))
        loaded().veneer_product_int8(call)
        return output_T_O


def loaded() -> ctypes.CDLL:
    """The library, of who has been told that it takes a tensor."""
    assert _LIBRARY is not None  # noqa: S101  # nobody asks who has not been told so
    return _LIBRARY


def _of_factors(factor_S_R_C: Tensor, first_column: int = 0) -> _LowRank:
    """A product but for what changes from pass to pass."""
    sets, rank, columns = factor_S_R_C.shape
    return _LowRank(
        factor=factor_S_R_C.data_ptr(), sets=sets, factor_stride=columns, factor_of_set=rank * columns, rank=rank,
        columns=columns, first_column=first_column, factor_bfloat16=factor_S_R_C.dtype is torch.bfloat16,
    )  # fmt: skip


def _call(weight: Tensor, input_T_I: Tensor, groups: int, bias_O: Tensor | None, output_T_O: Tensor) -> _Product:
    """Of contiguous tensors; the inputs must be so many groups."""
    tokens, outputs = output_T_O.shape
    if input_T_I.nbytes != tokens * groups * _GROUP_BYTES:
        raise ValueError(
            f"inputs {tuple(input_T_I.shape)} of {input_T_I.dtype} are not {groups} groups of the weight's"
        )
    return _Product(
        packed=weight.data_ptr(), input=input_T_I.data_ptr(), output=output_T_O.data_ptr(),
        bias=None if bias_O is None else bias_O.data_ptr(),
        bias_bfloat16=bias_O is not None and bias_O.dtype is torch.bfloat16,
        rows=tokens, outputs=outputs, inputs=groups, input_stride=groups, output_stride=outputs,
        output_bfloat16=output_T_O.dtype is torch.bfloat16,
    )  # fmt: skip


def _product(matrix_N_C: Tensor, starts: Tensor, inner_N_R: Tensor, factor_R_C: Tensor) -> _LowRank:
    """Of all rows with one factor."""
    product = _of_factors(factor_R_C[None])
    product.matrix, product.matrix_stride = matrix_N_C.data_ptr(), matrix_N_C.stride(0)
    product.matrix_bfloat16 = matrix_N_C.dtype is torch.bfloat16
    product.starts = starts.data_ptr()
    product.inner, product.inner_stride = inner_N_R.data_ptr(), inner_N_R.stride(0)
    return product


def most_tokens(key_L_B_C_G_K: Tensor, heads: int) -> int:
    """How many new tokens of a sequence the library attends for; 0 where it does not.

    Args:
        key_L_B_C_G_K: the memory of keys, in blocks; that of values is alike.
        heads: H, of the queries.
    """
    *_, block_tokens, groups, width = key_L_B_C_G_K.shape
    fits = (
        AVAILABLE
        and key_L_B_C_G_K.device.type == "cpu"
        and key_L_B_C_G_K.dtype in _DTYPES
        and block_tokens == BLOCK_TOKENS
        and width % LANES == 0
    )
    return min(_MOST_TOKENS, _MOST_NUMBERS // (heads // groups * width)) if fits else 0


class FewTokens:
    """New tokens of several sequences, `most_tokens` of each at most, attended in one call.

    Args:
        blocks: of each sequence, as many as its tokens fill at least.
        pasts: tokens of each that were before.
        queries: which of the pass's tokens are new ones of it.
        shape: heads of queries, heads of keys, and numbers of each.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[int]],
        pasts: Sequence[int],
        queries: Sequence[slice],
        shape: tuple[int, int, int],
    ) -> None:
        heads, groups, width = shape
        tasks: list[tuple[int, ...]] = []
        table: list[int] = []
        self._tokens = 0
        read = [past + query.stop - query.start for past, query in zip(pasts, queries, strict=True)]
        share = max(1, sum(read) // torch.get_num_threads())
        for held, past, query, length in zip(blocks, pasts, queries, read, strict=True):
            tokens = query.stop - query.start
            together = max(1, _MOST_NUMBERS // (heads // groups * width * tokens))  # heads of keys in a task
            parts = min(groups, max(-(-length // share), -(-groups // together)))
            for part in range(parts):
                own = part * groups // parts, (part + 1) * groups // parts
                tasks.append((len(table), past, tokens, query.start, self._tokens, *own))
            table += held
            self._tokens += tokens
        self._tasks = torch.tensor(tasks)
        self._blocks = torch.tensor(table)

    def attend(self, query_T_H_K: Tensor, key_B_C_G_K: Tensor, value_B_C_G_K: Tensor) -> Tensor:
        """What they gather, (N, H, K), sequence by sequence."""
        _, heads, width = query_T_H_K.shape
        query_T_H_K = query_T_H_K.contiguous()
        gathered_N_H_K = query_T_H_K.new_empty(self._tokens, heads, width)
        tensors = (query_T_H_K, key_B_C_G_K, value_B_C_G_K, gathered_N_H_K, self._blocks)
        scale = math.log2(math.e) / math.sqrt(width)  # for powers of two
        told = (heads, key_B_C_G_K.shape[2], width, query_T_H_K.dtype is torch.bfloat16, scale)
        call = _Pass(*(tensor.data_ptr() for tensor in tensors), *told)
        loaded().veneer_attend(call, self._tasks.data_ptr(), len(self._tasks))
        return gathered_N_H_K
