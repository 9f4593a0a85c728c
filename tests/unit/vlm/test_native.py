"""The compiled attention: torch's numbers, and the same bits whoever else is in the pass."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from veneer_vlm import native
from veneer_vlm.attention import attend
from veneer_vlm.native import BLOCK_TOKENS, FewTokens, most_tokens

SOURCES = Path(__file__).resolve().parents[3] / "services" / "vlm" / "native"
needs_library = pytest.mark.skipif(
    not native.AVAILABLE, reason="the library is for AVX2 and AVX-512, and compiled where a compiler is at hand"
)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Pass:
    """Sequences of `lengths` tokens, the last `new` of each new, in blocks that are drawn by a seed."""

    def __init__(
        self, lengths: Sequence[int], new: Sequence[int], heads: int, groups: int, width: int, dtype: torch.dtype,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.shape, self.lengths, self.new = (heads, groups, width), lengths, new
        counts = [-(-length // BLOCK_TOKENS) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
        self.blocks = [[order.pop() for _ in range(count)] for count in counts]
        shape = (sum(counts) + 3, BLOCK_TOKENS, groups, width)
        self.key, self.value = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))  # where nobody wrote
        self.keys = [numbers(2 * length, length, groups, width, dtype=dtype) for length in lengths]
        self.values = [numbers(2 * length + 1, length, groups, width, dtype=dtype) for length in lengths]
        for held, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            for memory, of in ((self.key, keys), (self.value, values)):
                for block, part in zip(held, of.split(BLOCK_TOKENS), strict=True):
                    memory[block, : len(part)] = part
        self.queries = [
            numbers(7 * length, count, heads, width, dtype=dtype) for length, count in zip(lengths, new, strict=True)
        ]

    def gathered(self, order: Sequence[int] | None = None) -> list[Tensor]:
        """By the library, of these sequences in one call."""
        order = range(len(self.lengths)) if order is None else order
        blocks, pasts = [self.blocks[i] for i in order], [self.lengths[i] - self.new[i] for i in order]
        starts = torch.tensor([0, *(self.new[i] for i in order)]).cumsum(0).tolist()
        queries = [slice(start, start + self.new[i]) for start, i in zip(starts, order, strict=False)]
        call = FewTokens(blocks, pasts, queries, self.shape)
        found = call.attend(torch.cat([self.queries[i] for i in order]), self.key, self.value)
        return list(found.split([self.new[i] for i in order]))

    def right(self) -> list[Tensor]:
        """By torch in float32, each sequence alone."""
        found = []
        for query, key, value, length, count in zip(
            self.queries, self.keys, self.values, self.lengths, self.new, strict=True
        ):
            seen = torch.arange(length) <= (length - count + torch.arange(count))[:, None]
            found.append(attend(query.float(), key.float(), value.float(), mask_T_C=seen))
        return found


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(4, 2, 128), (16, 8, 128), (6, 2, 48), (3, 3, 16), (5, 1, 256), (2, 2, 144)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_it_gathers_what_torch_does(heads: int, groups: int, width: int, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        many = Pass([1, 16, 17, 64, 201, 5, 33, 90], [1, 1, 2, 16, 3, 5, 16, 63], heads, groups, width, dtype)
        bits = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 4e-3}
        for found, right in zip(many.gathered(), many.right(), strict=True):
            assert found.dtype is dtype
            assert_close(found.float(), right, **bits)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_gets_the_same_bits_alone_among_others_and_from_other_blocks(dtype: torch.dtype) -> None:
    lengths, new = [40, 7, 130, 16], [1, 2, 4, 1]
    one, other = (Pass(lengths, new, 4, 2, 128, dtype, seed) for seed in (1, 2))
    assert one.blocks != other.blocks
    together = one.gathered()
    for number, found in enumerate(together):
        assert torch.equal(one.gathered([number])[0], found)
    for found, turned in zip(together, reversed(other.gathered([3, 2, 1, 0])), strict=True):
        assert torch.equal(found, turned)


@needs_library
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_went_astray_is_told_and_reaches_no_other(part: str, number: float) -> None:
    many = Pass([20, 20], [1, 1], 4, 2, 128, torch.bfloat16)
    (getattr(many, part[:-1]))[many.blocks[0][0], 3] = number
    astray, right = many.gathered()
    assert not astray.isfinite().any()
    assert_close(right.float(), many.right()[1], rtol=1e-2, atol=4e-3)


@needs_library
def test_scores_of_any_size_are_a_softmax() -> None:
    """One far above the others takes all; equal ones share, whatever they are."""
    many = Pass([50, 50], [1, 1], 2, 2, 16, torch.float32)
    for number, size in enumerate((1e4, -1e4)):
        many.queries[number].fill_(size)
    assert_close(many.gathered(), many.right(), rtol=1e-4, atol=1e-4)


@needs_library
def test_its_threads_are_torchs() -> None:
    """Two runtimes of OpenMP would each have their threads, and wait for one another's."""
    program = "import veneer_vlm.native; print(open('/proc/self/maps').read())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert native.FILE.name in told
    assert len({line.split()[-1] for line in told.splitlines() if "libgomp" in line}) == 1


@needs_library
def test_how_many_tokens_it_takes() -> None:
    def of(*shape: int, heads: int, dtype: torch.dtype = torch.float32) -> int:
        return most_tokens(torch.empty(shape, dtype=dtype), heads)

    assert of(2, 9, BLOCK_TOKENS, 8, 128, heads=16) == 32
    assert of(2, 9, BLOCK_TOKENS, 4, 256, heads=64) == 16  # a task's numbers must fit a thread's stack
    assert of(2, 9, BLOCK_TOKENS, 8, 40, heads=16) == 0
    assert of(2, 9, 4, 8, 128, heads=16) == 0
    assert of(2, 9, BLOCK_TOKENS, 8, 128, heads=16, dtype=torch.float16) == 0


@needs_library
@pytest.mark.parametrize("shape", [(64, 4, 256), (16, 8, 128), (8, 1, 16)])
def test_a_task_fits_a_threads_stack_and_all_heads_are_some_tasks(shape: tuple[int, int, int]) -> None:
    heads, groups, width = shape
    tokens = most_tokens(torch.empty(1, 2, BLOCK_TOKENS, groups, width), heads)
    tasks = FewTokens([[0] * 9], [100], [slice(0, tokens)], shape)._tasks
    for first, last in tasks[:, -2:].tolist():
        assert (last - first) * heads // groups * tokens * width <= native._MOST_NUMBERS
    assert [head for first, last in tasks[:, -2:].tolist() for head in range(first, last)] == list(range(groups))


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module that compiles, into another folder."""
    monkeypatch.syspath_prepend(SOURCES)
    module = import_module("compile")
    elsewhere = [replace(each, file=tmp_path / each.file.name) for each in module.LIBRARIES]
    monkeypatch.setattr(module, "LIBRARIES", elsewhere)
    return module


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="no compiler is at hand")
def test_they_are_compiled_where_there_is_a_compiler(compiling: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    files = [each.file for each in compiling.LIBRARIES]
    assert all((Path(native.__file__).parent / file.name).exists() for file in files), "installed without: make setup"
    assert compiling.compile_native() == files
    assert all(file.stat().st_size > 10_000 for file in files)
    compiling._FLAGS.append("--no-such-flag")
    try:
        assert not compiling.compile_native()
    finally:
        compiling._FLAGS.pop()
    assert not any(file.exists() for file in files)
    assert "no-such-flag" in caplog.text


def test_without_a_compiler_there_is_none(compiling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in compiling.LIBRARIES:
        each.file.touch()  # of another machine
    monkeypatch.setenv("PATH", "")
    assert not compiling.compile_native()
    assert not any(each.file.exists() for each in compiling.LIBRARIES)
