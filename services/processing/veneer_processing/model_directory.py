"""What a model directory says about processing.

Owns which files and keys are read, in which order, and their checks: the same as transformers'. Errors name
file and key, never a path.
"""

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from veneer_processing.errors import ModelDirectoryError
from veneer_processing.pixels import PixelBounds, PixelSettings

TOKENIZER_FILE = "tokenizer.json"

_PROCESSOR_FILE = "processor_config.json"
_PICTURE_FILE = "preprocessor_config.json"
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_TEXT_FILE = "chat_template.jinja"
_TEMPLATE_JSON_FILE = "chat_template.json"

_FIXED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
"""Settings that this package always follows (3 is Pillow's bicubic); a directory may repeat them, not change
them.
"""


def read_bytes(directory: Path, name: str) -> bytes:
    """A file that must be there.

    Raises:
        ModelDirectoryError: it is not.
    """
    try:
        return (directory / name).read_bytes()
    except OSError as error:
        raise ModelDirectoryError(f"{name}: cannot be read ({error.strerror})") from error


def chat_template(directory: Path) -> str:
    """The chat template's text.

    Looked for in processor_config.json, chat_template.json, chat_template.jinja, tokenizer_config.json (a
    text, or the one named `default`), in this order.

    Raises:
        ModelDirectoryError: none of them has it, or one is not what it should be.
    """
    for name in (_PROCESSOR_FILE, _TEMPLATE_JSON_FILE):
        if (found := _json(directory, name).get("chat_template")) is not None:
            return _text(found, name)
    if (directory / _TEMPLATE_TEXT_FILE).exists():
        return _decoded(directory, _TEMPLATE_TEXT_FILE)
    found = _json(directory, _TOKENIZER_CONFIG_FILE).get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    if found is None:
        raise ModelDirectoryError(
            f"no chat template: neither {_TEMPLATE_TEXT_FILE} nor the key chat_template of "
            f"{_PROCESSOR_FILE}, {_TEMPLATE_JSON_FILE} or {_TOKENIZER_CONFIG_FILE}"
        )
    return _text(found, _TOKENIZER_CONFIG_FILE)


def pixel_settings(directory: Path) -> PixelSettings:
    """The settings for pictures, with the model's own bounds.

    Read from the key image_processor of processor_config.json, else from preprocessor_config.json; bounds
    from min_pixels and max_pixels, else from size.shortest_edge and size.longest_edge (areas in pixels all of
    them).

    Raises:
        ModelDirectoryError: a file or key is missing, of another type, or asks for what this package does not
            do.
    """
    name, settings = (
        f"{_PROCESSOR_FILE} image_processor",
        _json(directory, _PROCESSOR_FILE).get("image_processor"),
    )
    if settings is None:
        name, settings = _PICTURE_FILE, _json(directory, _PICTURE_FILE)
        if not settings:
            raise ModelDirectoryError(f"neither {_PICTURE_FILE} nor the key image_processor of {_PROCESSOR_FILE}")
    if not isinstance(settings, dict):
        raise ModelDirectoryError(f"{name}: must be an object, got {type(settings).__name__}")
    for key, fixed in _FIXED.items():
        if settings.get(key, fixed) != fixed:
            raise ModelDirectoryError(f"{name}: {key} must be {fixed}, got {str(settings[key])[:80]}")
    size = settings.get("size", {})
    if not isinstance(size, dict):
        raise ModelDirectoryError(f"{name}: size must be an object, got {type(size).__name__}")
    flat = {f"size.{key}": value for key, value in size.items()} | settings
    least = "min_pixels" if flat.get("min_pixels") is not None else "size.shortest_edge"
    most = "max_pixels" if flat.get("max_pixels") is not None else "size.longest_edge"
    try:
        bounds = PixelBounds(_count(flat, least, name), _count(flat, most, name))
    except ModelDirectoryError:
        raise
    except ValueError as error:
        raise ModelDirectoryError(f"{name}: {least}, {most}: {error}") from error
    std = _three(flat, "image_std", name)
    if min(std) <= 0:
        raise ModelDirectoryError(f"{name}: image_std must be above 0, got {min(std)}")
    return PixelSettings(
        bounds=bounds,
        patch_size=_count(flat, "patch_size", name),
        merge_size=_count(flat, "merge_size", name),
        temporal_patch_size=_count(flat, "temporal_patch_size", name),
        image_mean=_three(flat, "image_mean", name),
        image_std=std,
    )


def _json(directory: Path, name: str) -> dict[str, object]:
    """The object in a JSON file; an empty one where there is no file."""
    if not (directory / name).exists():
        return {}
    try:
        value = json.loads(_decoded(directory, name))
    except json.JSONDecodeError as error:
        raise ModelDirectoryError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelDirectoryError(f"{name}: must hold an object, got {type(value).__name__}")
    return value


def _decoded(directory: Path, name: str) -> str:
    try:
        return read_bytes(directory, name).decode()
    except UnicodeDecodeError as error:
        raise ModelDirectoryError(f"{name}: not UTF-8 at byte {error.start}") from error


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ModelDirectoryError(f"{name}: chat_template must be a text, got {type(value).__name__}")
    return value


def _count(settings: Mapping[str, object], key: str, name: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelDirectoryError(f"{name}: {key} must be a whole number above 0, got {str(value)[:80]}")
    return value


def _three(settings: Mapping[str, object], key: str, name: str) -> tuple[float, float, float]:
    value = settings.get(key)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(each, int | float) and isfinite(each) for each in value)
    ):
        raise ModelDirectoryError(f"{name}: {key} must be three numbers, got {str(value)[:80]}")
    red, green, blue = map(float, value)
    return red, green, blue
