import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLProcessor

from veneer_base.unfold import base_directory
from veneer_processing import Processor

os.environ["HF_HUB_OFFLINE"] = "1"

MODEL_DIGEST = "ab" * 32

MakeDirectory = Callable[..., Path]


@pytest.fixture(scope="session")
def base() -> Path:
    return base_directory()


@pytest.fixture
def make_directory(base: Path, tmp_path: Path) -> MakeDirectory:
    """Makes a directory like the base, with other files: None leaves one out, a dict is written as JSON."""

    def make(**files: object) -> Path:
        named = {name.replace("__", "."): content for name, content in files.items()}
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "preprocessor_config.json",
        ):
            if name not in named:
                (tmp_path / name).symlink_to(base / name)
        for name, content in named.items():
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return make


@pytest.fixture(scope="session")
def processor(base: Path) -> Processor:
    return Processor.load(base, MODEL_DIGEST)


class PictureProcessor(Qwen3VLProcessor):
    """transformers' own processor without its video part, which needs torchvision even to be left out."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type | None:
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


@pytest.fixture(scope="session")
def reference(base: Path, processor: Processor) -> Qwen3VLProcessor:
    """transformers' processor of the base, with the same bounds."""
    bounds = processor.pixels.bounds
    return PictureProcessor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(
            base, size={"shortest_edge": bounds.min_pixels, "longest_edge": bounds.max_pixels}
        ),
        tokenizer=AutoTokenizer.from_pretrained(base),
        video_processor=None,
        chat_template=(base / "chat_template.jinja").read_text(encoding="utf-8"),
    )
