"""The products of low rank: by the compiled library and by torch, of any shape, in any dtype, in any order of rows."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from veneer_vlm import native
from veneer_vlm.low_rank import add_products, exact, inner_products, outer_products

needs_library = pytest.mark.skipif(
    not native.AVAILABLE, reason="the library is for AVX2 and AVX-512, and compiled where a compiler is at hand"
)
DTYPES = [torch.float32, torch.bfloat16]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["by the library", "by torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "by torch":
        monkeypatch.setattr(native, "AVAILABLE", False)
    elif not native.AVAILABLE:
        pytest.skip("the library is for AVX2 and AVX-512, and compiled where a compiler is at hand")
    else:
        monkeypatch.setattr(native, "WIDE", True)  # float32 too, which torch multiplies sooner on AVX2
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 16), (3, 48), (4, 64), (9, 1040), (37, 272), (66, 2064)])
@pytest.mark.parametrize("rank", [1, 4, 5, 16, 19])
def test_the_three_products(
    by: str, dtype: torch.dtype, factors: torch.dtype, tokens: int, columns: int, rank: int
) -> None:
    """Of a matrix that is part of a wider one, with factors as they are and turned."""
    wide = numbers(1, tokens, columns + 32, dtype=dtype)
    matrix, factor = wide[:, 16:-16], numbers(2, rank, columns, dtype=factors)
    rounded = by == "by torch" and torch.bfloat16 in (dtype, factors)
    near = {"rtol": 2e-2, "atol": 0.02 * (columns * tokens) ** 0.5} if rounded else {"rtol": 1e-4, "atol": 1e-4}
    right = matrix.double() @ factor.double().T
    for given in (factor, factor.T.contiguous().T):
        inner = inner_products(exact(matrix, factors), given)
        assert_close(inner.double(), right, **near)
    outer = outer_products(inner, exact(matrix, inner.dtype))
    assert outer.dtype is inner.dtype
    assert_close(outer.double(), inner.double().T @ matrix.double(), **near | {"rtol": 2e-2 if rounded else 1e-4})
    before = wide.clone()
    expected = matrix.double() + inner.double() @ factor.double()
    add_products(matrix, inner, factor.T.contiguous().T)
    assert_close(
        matrix, expected.to(dtype), **near if rounded or dtype is torch.float32 else {"rtol": 8e-3, "atol": 1e-2}
    )
    for edge in (slice(16), slice(-16, None)):
        assert torch.equal(wide[:, edge], before[:, edge])


def test_columns_that_the_library_does_not_take_are_torchs() -> None:
    matrix = numbers(1, 5, 40)
    assert not native.takes(matrix)
    assert not native.takes(numbers(1, 40, 5).T)
    assert not native.takes(matrix[:, :32].half())
    assert_close(inner_products(matrix, matrix), matrix @ matrix.T)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [32, 1360])
def test_what_tokens_of_several_adapters_get(dtype: torch.dtype, threads: int, width: int) -> None:
    """Each its own adapter's update and the same bits as alone; who wears nothing gets nothing."""
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = (
            numbers(1, 3, 2 * 5, 48, dtype=dtype),
            [numbers(2, 3, 5, 16, dtype=dtype), numbers(3, 3, 5, width, dtype=dtype)],
        )
        updates = native.Updates(a, b, [0, 32])
        inputs, outputs = numbers(4, 9, 48, dtype=dtype), numbers(5, 9, 32 + width, dtype=dtype)
        own = [[7, 0, 3, 8, 1, 2], [], [5]]  # tokens 4 and 6 wear nothing, nobody the second adapter
        before, rows = outputs.clone(), torch.tensor(own[0] + own[2])
        updates.add(inputs, outputs, rows, torch.tensor([0, 6, 6, 7]))
        for place, tokens in enumerate(own):
            for token in tokens:
                inner = inputs[token].double() @ a[place].double().T
                for part, (first, of) in enumerate(((0, b[0]), (32, b[1]))):
                    columns = slice(first, first + of.shape[-1])
                    added = inner[5 * part : 5 * part + 5] @ of[place].double()
                    right = (before[token, columns].double() + added).to(dtype)
                    assert_close(outputs[token, columns], right, rtol=8e-3, atol=1e-4)
                alone = before.clone()
                updates.add(inputs, alone, torch.tensor([token]), torch.tensor([0] * (place + 1) + [1] * (3 - place)))
                assert torch.equal(alone[token], outputs[token])
        assert torch.equal(outputs[[4, 6]], before[[4, 6]])
        assert torch.equal(outputs[:, 16:32], before[:, 16:32])
    finally:
        torch.set_num_threads(before_threads)


@needs_library
def test_what_is_not_a_number_is_none_in_bfloat16_either() -> None:
    """One whose bits are all set would be rounded up to a zero."""
    astray = torch.tensor([[-1]], dtype=torch.int32).view(torch.float32)
    matrix = torch.zeros(1, 16, dtype=torch.bfloat16)
    native.add(matrix, astray, torch.ones(1, 16))
    assert matrix.isnan().all()
