"""The limits of this machine in this minute: how fast memory is read, how fast a packed GEMM runs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # as the engine chooses
_READ_BYTES = 1 << 30
_SHAPES = ((4096, 2048), (2048, 2048), (12_288, 2048), (2048, 6144))  # a decoder layer of Qwen3-VL-2B, fused


@dataclass
class Limits:
    """Measured again before each measured run, so that both see the same minute."""

    dtype: torch.dtype
    tokens: int = 512
    read_bytes_s: list[float] = field(default_factory=list)
    gemm_flop_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._memory = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device=DEVICE)
        self._inputs = [torch.randn(self.tokens, inputs, device=DEVICE).to(self.dtype) for _, inputs in _SHAPES]
        weights = [torch.randn(outputs, inputs, device=DEVICE).to(self.dtype) for outputs, inputs in _SHAPES]
        self._products = [self._product(weight) for weight in weights]

    def _product(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        if DEVICE == "cuda":
            return lambda rows: F.linear(rows, weight)
        ops = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight, self.tokens)
        return lambda rows: ops._linear_pointwise(rows, packed, None, "none", [], "")

    def measure(self) -> None:
        """Takes one sample of each, warm."""
        self._memory.sum()
        settle()
        self.read_bytes_s.append(_READ_BYTES / _seconds(self._memory.sum))
        flop = sum(2 * self.tokens * outputs * inputs for outputs, inputs in _SHAPES)
        self.gemm_flop_s.append(flop / _seconds(self._layer))

    def _layer(self) -> None:
        for product, rows in zip(self._products, self._inputs, strict=True):
            product(rows)

    @property
    def read(self) -> float:
        """Bytes a second."""
        return statistics.median(self.read_bytes_s)

    @property
    def gemm(self) -> float:
        """Floating-point operations a second."""
        return statistics.median(self.gemm_flop_s)

    def __str__(self) -> str:
        return (
            f"memory read {spread([each / 1e9 for each in self.read_bytes_s])} GB/s, "
            f"packed {str(self.dtype).removeprefix('torch.')} GEMM at {self.tokens} tokens "
            f"{spread([each / 1e9 for each in self.gemm_flop_s])} GFLOP/s"
        )


def floats(dtype: str) -> torch.dtype:
    """What a packed GEMM is measured in beside an engine of this precision: not every CPU multiplies bfloat16."""
    bfloat16 = DEVICE == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if dtype == "float32" or not bfloat16 else torch.bfloat16


def settle() -> None:
    """Waits for a device that works on after it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float], digits: int = 0) -> str:
    """Median, and the least and greatest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _seconds(work: Callable[[], object], times: int = 3) -> float:
    started_s = time.perf_counter()
    for _ in range(times):
        work()
    settle()
    return (time.perf_counter() - started_s) / times
