"""The base that a cluster serves: found, named and measured. Loads no weights."""

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from veneer_cluster.folder import ClusterError
from veneer_digests.safetensors_file import read_safetensors_header

DEMONSTRATION_MODEL = "veneer-tiny"
_LOCATE = "import sys; from veneer_vlm.weights import locate; print(locate(sys.argv[1]))"


@dataclass(frozen=True)
class Base:
    """A base.

    Attributes:
        model: its id within `models/`.
        directory: where it lies.
        parameters: how many it has.
        stored_bytes: what they take as they are stored.
        kv_numbers: numbers that the keys and values of one token take, over all layers.
        tied_numbers: of the embedding, where it is the head too.
    """

    model: str
    directory: Path
    parameters: int
    stored_bytes: int
    kv_numbers: int
    tied_numbers: int = 0


def find(reference: str | None) -> Base:
    """Returns a base by its directory or hub id; the demonstration base where none is named.

    Raises:
        ClusterError: it cannot be had.
    """
    if reference is None:
        from veneer_base.unfold import base_directory

        directory = base_directory()
        return _measured(DEMONSTRATION_MODEL, directory)
    directory = Path(reference)
    if not directory.is_dir():
        return _measured(model_id(reference.rpartition("/")[2]), _fetch(reference))
    return _measured(model_id(directory.resolve().name), directory.resolve())


def model_id(name: str) -> str:
    """A name as an id: `Qwen3-VL-2B-Instruct` is `qwen3-vl-2b-instruct`."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (words if words[:1].isalpha() else f"model-{words}")[:63].rstrip("-")


def weights(directory: Path) -> tuple[int, int]:
    """Counts the parameters in a directory's safetensors files, and their bytes there; reads headers only.

    Raises:
        ClusterError: there are none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ClusterError(f"{directory} holds no *.safetensors file: name the directory of a base model")
    slots = [slot for file in files for slot in read_safetensors_header(file).slots.values()]
    return sum(math.prod(slot.shape) for slot in slots), sum(slot.end - slot.start for slot in slots)


def _measured(model: str, directory: Path) -> Base:
    try:
        config = json.loads((directory / "config.json").read_bytes())
        text = config["text_config"]
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
        tied_numbers = text["vocab_size"] * text["hidden_size"] if tied else 0
        kv_numbers = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"{directory} holds no config.json of a Qwen3-VL: {error!r}") from error
    return Base(model, directory, *weights(directory), kv_numbers, tied_numbers)


def _fetch(reference: str) -> Path:
    # In a process of its own: it imports torch, which the launcher has no other use for.
    found = subprocess.run([sys.executable, "-c", _LOCATE, reference], capture_output=True, text=True)  # noqa: S603
    if found.returncode != 0:
        problem = found.stderr.strip().rpartition("\n")[2].partition("WeightsError: ")[2] or found.stderr
        raise ClusterError(problem)
    return Path(found.stdout.strip())
