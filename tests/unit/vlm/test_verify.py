from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from typer.testing import CliRunner, Result

from veneer_base.unfold import base_directory
from veneer_vlm import verify
from veneer_vlm.cli import verify as command


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture(scope="session")
def base() -> Path:
    return base_directory()


@pytest.fixture(scope="session")
def small(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights whose vocabulary is bytes and control tokens, so that a run costs nothing."""
    directory = tmp_path_factory.mktemp("small")
    for name in ("tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(base / name, directory)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        token: number for token, number in tokenizer["model"]["vocab"].items() if number < 256
    }
    tokenizer["model"]["merges"] = []
    for number, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = 256 + number
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    raw = Qwen3VLConfig.from_pretrained(base).to_dict()
    raw["text_config"] |= {"vocab_size": 300, "num_hidden_layers": 2}
    raw["vision_config"] |= {"depth": 2}
    raw |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
    raw |= {"vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**raw)).save_pretrained(directory)
    return directory


def test_the_demonstration_base_passes(base: Path) -> None:
    result = run(str(base))
    assert result.exit_code == 0, result.output
    for words in (
        "packed: greatest logit difference",
        "moved 10 of 10 B, 0 of 10 A",
        "0 of 105 of the",
        "MiB",
    ):
        assert words in result.output


def test_bfloat16_passes(small: Path) -> None:
    result = run(str(small), "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [stage["passed"] for stage in found["stages"]] == [True] * 5
    assert "two pictures: relative difference" in found["stages"][2]["findings"][2]
    assert isinstance(found["answer"], str)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_difference_beyond_the_limit_fails(small: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(verify, f"{dtype.upper()}_LIMIT", -1.0)
    result = run(str(small), "--dtype", dtype)
    assert result.exit_code == 1
    assert "FAILED one picture: " in result.output
    assert "FAILED loss" not in result.output


def test_what_is_no_base_is_named(tmp_path: Path) -> None:
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert "config.json: cannot be read" in result.output
    assert "neither a directory nor a hub id" in run(str(tmp_path / "missing")).output
