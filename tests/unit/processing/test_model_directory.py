import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from veneer_processing import ModelDirectoryError, PixelBounds
from veneer_processing.model_directory import chat_template, pixel_settings

SETTINGS: dict[str, object] = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.25, 0.5],
    "image_std": [0.5, 0.5, 1],
}
NEW = SETTINGS | {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
OLD = SETTINGS | {"min_pixels": 3_136, "max_pixels": 1_003_520}


def write(directory: Path, **files: object) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "bounds"),
    [
        ({"preprocessor_config__json": NEW}, (65_536, 16_777_216)),
        ({"preprocessor_config__json": OLD}, (3_136, 1_003_520)),
        ({"processor_config__json": {"image_processor": NEW}}, (65_536, 16_777_216)),
        ({"processor_config__json": {"image_processor": OLD}}, (3_136, 1_003_520)),
        (
            {"processor_config__json": {"image_processor": OLD}, "preprocessor_config__json": NEW},
            (3_136, 1_003_520),
        ),
        (
            {"processor_config__json": {"processor_class": "x"}, "preprocessor_config__json": NEW},
            (65_536, 16_777_216),
        ),
        ({"preprocessor_config__json": NEW | {"max_pixels": 100_000}}, (65_536, 100_000)),
        ({"preprocessor_config__json": NEW | {"min_pixels": None, "max_pixels": None}}, (65_536, 16_777_216)),
    ],
)
def test_settings_are_read_where_and_as_transformers_reads_them(
    tmp_path: Path, files: dict[str, object], bounds: tuple[int, int]
) -> None:
    write(tmp_path, **files)
    settings = pixel_settings(tmp_path)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert settings.bounds == PixelBounds(*bounds)
    assert (theirs.size["shortest_edge"], theirs.size["longest_edge"]) == bounds
    assert settings.image_mean == (0.5, 0.25, 0.5) == tuple(theirs.image_mean)
    assert settings.image_std == (0.5, 0.5, 1.0) == tuple(theirs.image_std)
    assert (settings.patch_size, settings.merge_size, settings.temporal_patch_size) == (16, 2, 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("[1]", "preprocessor_config.json: must hold an object, got list"),
        ("{", "preprocessor_config.json: not JSON"),
        (SETTINGS, "size.shortest_edge must be a whole number above 0, got None"),
        (NEW | {"size": 5}, "size must be an object, got int"),
        (NEW | {"size": {"shortest_edge": 9, "longest_edge": 8}}, "size.longest_edge: pixel bounds are"),
        (NEW | {"patch_size": 0}, "patch_size must be a whole number above 0, got 0"),
        (NEW | {"merge_size": True}, "merge_size must be a whole number above 0, got True"),
        (NEW | {"temporal_patch_size": "2"}, "temporal_patch_size must be a whole number above 0, got 2"),
        (NEW | {"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
        (NEW | {"image_mean": 0.5}, "image_mean must be three numbers, got 0.5"),
        (NEW | {"image_std": [0.5, 0.5, float("nan")]}, "image_std must be three numbers"),
        (NEW | {"image_std": [0.5, 0.5, 0]}, "image_std must be above 0, got 0.0"),
        (NEW | {"resample": 2}, "resample must be 3, got 2"),
        (NEW | {"do_rescale": False}, "do_rescale must be True, got False"),
        (NEW | {"rescale_factor": 1}, "rescale_factor must be 0.0039"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_by_file_and_key(
    tmp_path: Path, settings: object, words: str
) -> None:
    write(tmp_path, preprocessor_config__json=settings)
    with pytest.raises(ModelDirectoryError, match=words) as refusal:
        pixel_settings(tmp_path)
    assert str(refusal.value).startswith("preprocessor_config.json")
    assert str(tmp_path) not in str(refusal.value)


def test_a_directory_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match=r"neither preprocessor_config.json nor the key image_processor"):
        pixel_settings(tmp_path)


def test_settings_that_are_no_object_are_refused(tmp_path: Path) -> None:
    write(tmp_path, processor_config__json={"image_processor": [1]})
    with pytest.raises(ModelDirectoryError, match=r"^processor_config.json image_processor: must be"):
        pixel_settings(tmp_path)


TEMPLATES: dict[str, object] = {
    "processor_config__json": {"chat_template": "of the processor's config"},
    "chat_template__json": {"chat_template": "of the old file"},
    "chat_template__jinja": "of the new file: 你好",
}


@pytest.mark.parametrize(
    "names",
    [
        list(TEMPLATES),
        list(TEMPLATES)[1:],
        list(TEMPLATES)[2:],
        list(TEMPLATES)[::2],
    ],
    ids=len,
)
def test_the_template_is_the_one_transformers_takes(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, **{name: TEMPLATES[name] for name in names})
    expected = ProcessorMixin.get_processor_dict(tmp_path)[0]["chat_template"]
    assert chat_template(tmp_path) == expected
    write(tmp_path, tokenizer_config__json={"chat_template": "of the tokenizer"})
    assert chat_template(tmp_path) == expected


@pytest.mark.parametrize(
    "value",
    [
        "of the tokenizer",
        [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "of the tokenizer"}],
    ],
)
def test_the_tokenizers_template_is_the_last_resort(tmp_path: Path, value: object) -> None:
    write(
        tmp_path,
        tokenizer__json=tokenizers.Tokenizer(tokenizers.models.BPE()).to_str(),
        tokenizer_config__json={"chat_template": value, "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    assert chat_template(tmp_path) == AutoTokenizer.from_pretrained(tmp_path).get_chat_template()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no chat template: neither chat_template.jinja nor the key chat_template of"),
        (
            {"tokenizer_config__json": {"chat_template": [{"name": "tool_use", "template": "x"}]}},
            "no chat template",
        ),
        (
            {"tokenizer_config__json": {"chat_template": 5}},
            "tokenizer_config.json: chat_template must be a text, got int",
        ),
        (
            {"chat_template__json": {"chat_template": ["x"]}},
            "chat_template.json: chat_template must be a text, got list",
        ),
        ({"chat_template__json": "x"}, "chat_template.json: not JSON"),
    ],
)
def test_a_directory_without_a_template_is_refused(tmp_path: Path, files: dict[str, object], words: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(ModelDirectoryError, match=words):
        chat_template(tmp_path)


def test_a_template_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"abc\xff")
    with pytest.raises(ModelDirectoryError, match=r"chat_template.jinja: not UTF-8 at byte 3"):
        chat_template(tmp_path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(ModelDirectoryError, match=r"chat_template.jinja: cannot be read \(Is a directory\)"):
        chat_template(tmp_path)
