"""Attention over blocks is the same as over whole sequences, in any mixture of pieces."""

import pytest
import torch
from torch import Tensor

from veneer_vlm import native, paged
from veneer_vlm.attention import PackedAttention
from veneer_vlm.config import TextConfig
from veneer_vlm.paged import PADDING_BLOCK, BlockCache, Chunk, PagedAttention

HEADS, GROUPS, WIDTH, SIZE = 4, 2, 16, 4
CONFIG = TextConfig(8, 64, 96, 2, HEADS, GROUPS, WIDTH, 1e-6, 1e4, (4, 2, 2), 512)


def cache(blocks: int = 128, size: int = SIZE) -> BlockCache:
    return BlockCache(CONFIG, blocks, size, torch.float32, "cpu")


@pytest.fixture(params=["by the library", "in place", "gathered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How few tokens are attended."""
    if request.param != "by the library":
        monkeypatch.setattr(native, "_MOST_TOKENS", 0)
        monkeypatch.setattr(paged, "_IN_PLACE_FROM", 0 if request.param == "in place" else 1 << 40)
    elif not native.AVAILABLE:
        pytest.skip("the library is for AVX2 and AVX-512, and compiled where a compiler is at hand")
    return str(request.param)


def heads(seed: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, HEADS, WIDTH), (tokens, GROUPS, WIDTH), (tokens, GROUPS, WIDTH))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("scattered", [1, 2, 3, 16])  # the sequences' blocks change places so many at a time
@pytest.mark.parametrize(
    "passes",
    [
        [[3, 9, 1, 5], [1, 1, 1, 1], [1, 1, 1, 1]],  # prompts, then answers
        [[4, 0, 8, 0], [1, 7, 1, 70], [5, 1, 3, 1], [1, 1, 66, 1]],  # prompts in pieces beside answers
        [[70, 0, 0, 0], [1, 65, 64, 63]],
        [[7, 6, 5, 4], [7, 6, 0, 0], [0, 0, 7, 6]],  # padded to one another
    ],
)
def test_any_mixture_attends_as_whole_sequences_do(passes: list[list[int]], scattered: int, way: str) -> None:
    """Over two layers, with blocks that earlier sequences have used and left astray."""
    size = native.BLOCK_TOKENS if way == "by the library" else SIZE
    memory = cache(size=size)
    memory.key_L_B_C_G_K[:, 1:] = torch.nan
    memory.value_L_B_C_G_K[:, 1:] = torch.nan
    totals = [sum(each[number] for each in passes) for number in range(4)]
    whole = [heads(number, total) for number, total in enumerate(totals)]
    right = [PackedAttention([total])(0, *three) for total, three in zip(totals, whole, strict=True)]
    free = iter(range(1, 129))
    blocks: list[list[int]] = [[] for _ in totals]
    while any(len(own) * size < total for own, total in zip(blocks, totals, strict=True)):
        for own, total in zip(blocks, totals, strict=True):
            own += [next(free) for _ in range(min(scattered, -(-total // size) - len(own)))]
    pasts = [0] * 4
    for lengths in passes:
        here = [number for number, tokens in enumerate(lengths) if tokens]
        chunks = [Chunk(blocks[number], pasts[number], lengths[number]) for number in here]
        attention = PagedAttention(memory, chunks, HEADS)
        new = [
            torch.cat([whole[number][part][pasts[number] : pasts[number] + lengths[number]] for number in here])
            for part in range(3)
        ]
        for layer in range(2):
            gathered = attention(layer, *new).split([lengths[number] for number in here])
            for number, found in zip(here, gathered, strict=True):
                torch.testing.assert_close(found, right[number][pasts[number] : pasts[number] + lengths[number]])
        for number in here:
            pasts[number] += lengths[number]
    assert pasts == totals
    assert not memory.key_L_B_C_G_K[:, PADDING_BLOCK].any()


def test_a_sequence_that_went_astray_reaches_no_other() -> None:
    memory = cache()
    query, key, value = heads(1, 3)
    right = PackedAttention([3])(0, query, key, value)
    astray = torch.full_like(key, torch.nan)
    attention = PagedAttention(memory, [Chunk([1], 0, 3), Chunk([2, 3], 0, 3)], HEADS)
    gathered = attention(0, torch.cat([query, query]), torch.cat([astray, key]), torch.cat([astray, value]))
    assert gathered[:3].isnan().all()
    torch.testing.assert_close(gathered[3:], right)
    # Its block, used by the next one.
    torch.testing.assert_close(PagedAttention(memory, [Chunk([1], 0, 3)], HEADS)(0, query, key, value), right)


@pytest.mark.parametrize("chunk", [Chunk([1], 3, 2), Chunk([1], 0, 0), Chunk([PADDING_BLOCK], 0, 1), Chunk([], 0, 1)])
def test_a_chunk_must_fit_its_blocks(chunk: Chunk) -> None:
    with pytest.raises(ValueError, match="do not fit blocks"):
        PagedAttention(cache(), [chunk], HEADS)


def test_memory_is_what_was_asked_for() -> None:
    memory = cache(blocks=7)
    assert memory.size_bytes == 2 * 2 * 8 * SIZE * GROUPS * WIDTH * 4
