"""Trained weights in the compact form that ships: half precision, the trained rows of the embedding alone.

Owns the files of `weights/`. The way back is `unfold`.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from veneer_base.shape import configuration
from veneer_base.unfold import EMBEDDING
from veneer_base.vocabulary import CompactVocabulary, choose_ids, qwen_tokenizer


def write_compact(checkpoint: Path, directory: Path) -> dict[str, str]:
    """Writes config.json, vocab_ids.json and model.safetensors from a training checkpoint.

    Returns:
        The sha256 of each file: what `unfold.WEIGHTS_SHA256` must say.
    """
    tokenizer = qwen_tokenizer()
    ids = choose_ids(tokenizer)
    kept = {
        n: t for n, t in load_file(checkpoint).items() if not n.startswith(("head.", "adam.")) and n != "lm_head.weight"
    }
    if kept[EMBEDDING].shape[0] != len(ids) + 1:
        raise ValueError(f"{checkpoint}: {kept[EMBEDDING].shape[0]} rows of embedding for {len(ids)} ids and one more")
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.to(torch.float16).contiguous() for name, t in kept.items()}, directory / "model.safetensors")
    (directory / "vocab_ids.json").write_text(json.dumps(ids, separators=(",", ":")), encoding="utf-8")
    config = configuration(CompactVocabulary(tokenizer, ids)).to_dict()
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
