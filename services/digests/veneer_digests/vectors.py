"""The test vectors of protos/DIGESTS.md: how a case is evaluated, and the command that fills in the outputs.

    python -m veneer_digests.vectors protos/digest_vectors.json

To add a case, write a line with its kind, name and input into the file, and run the command.
"""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer_digests.blob import blob_digest
from veneer_digests.dataset_version import DatasetVersionHasher
from veneer_digests.errors import DigestError
from veneer_digests.jcs import canonical_json
from veneer_digests.row import row_digest
from veneer_digests.sampling import epoch_order, split_of
from veneer_digests.weights import (
    TensorDigest,
    adapter_digest,
    contract_digest,
    model_digest_of,
    tensor_digest,
)


def evaluate(kind: str, value: Any) -> dict[str, Any]:  # noqa: ANN401  # a case's input is any JSON
    """{"output": ...} or {"refused": True} of a case; raises KeyError for an unknown kind."""
    try:
        return {"output": _EVALUATORS[kind](value)}
    except DigestError:
        return {"refused": True}


def with_outputs(text: str) -> str:
    """The text of a file of vectors, its outputs computed anew.

    A case stands on a line, in ASCII, so that no editor can normalise a string.
    """
    content = json.loads(text)
    lines = []
    for case in content["cases"]:
        kept = {name: case[name] for name in ("kind", "name", "same_as", "input") if name in case}
        lines.append(json.dumps(kept | evaluate(case["kind"], case["input"])))
    cases = ",\n".join(lines)
    return f'{{"rules": {content["rules"]}, "cases": [\n{cases}\n]}}\n'


def _version_digest(value: dict[str, Any]) -> str:
    version = DatasetVersionHasher()
    for split, row in value["rows"]:
        version.add(split, row)
    return version.hexdigest()


def _tensors(value: dict[str, Any]) -> list[TensorDigest]:
    return [
        tensor_digest(tensor["name"], tensor["dtype"], tensor["shape"], base64.b64decode(tensor["base64"]))
        for tensor in value["tensors"]
    ]


_EVALUATORS: dict[str, Callable[[Any], str | list[int]]] = {
    "canonical_json": lambda value: canonical_json(value).decode("utf-8"),
    "blob": lambda value: blob_digest(base64.b64decode(value["base64"])),
    "row": row_digest,
    "dataset_version": _version_digest,
    "contract": contract_digest,
    "adapter": lambda value: adapter_digest(_tensors(value), value["config"], value["contract"]),
    "model": lambda value: model_digest_of(_tensors(value), value["config"]),
    "epoch_order": lambda value: epoch_order(int(value["seed"]), int(value["epoch"]), value["rows"]),
    "split": lambda value: split_of(value["group_key"], value["shares"], int(value["seed"])),
}

if __name__ == "__main__":
    vectors_path = Path(sys.argv[1])
    vectors_path.write_text(with_outputs(vectors_path.read_text("ascii")), "ascii")
