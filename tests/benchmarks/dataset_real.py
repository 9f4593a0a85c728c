"""Real pictures on a live service: emoji with their CLDR names in English and Chinese, and rendered Chinese documents.

    npm install --prefix DIR emoji-datasource-google@16.0.0 cldr-annotations-full@48.2.0 \
        cldr-annotations-derived-full@48.2.0
    python tests/benchmarks/dataset_real.py DIR/node_modules

Each is pushed with the Python client (hash, upload, freeze), pushed again, and read back with its pictures. Prints
rows accepted and refused, findings by code, and seconds.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from veneer.dataset.v1 import dataset_service_pb2 as pb
from veneer.dataset.v1.dataset_pb2 import DatasetVersion, Split
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from veneer_base import documents
from veneer_base.synth import write_dataset
from veneer_client import Client
from veneer_rpc.tokens import add_token

DOCUMENTS = 1000
LANGUAGES = {"en": "What is this?", "zh": "这是什么?"}
_EMOJI_PRESENTATION = "\ufe0f"


def main(modules: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written, nameless = _write_emoji(modules, folder / "emoji")
        print(f"emoji: {written:,} rows written; {nameless:,} names are in no annotation")
        write_dataset(
            folder / "documents", rows=DOCUMENTS, kinds=documents.KINDS, languages=("zh",), answer="sentence", seed=0
        )
        token = add_token(folder / "tokens.json", "bench", ["user"])
        command = [sys.executable, "-m", "veneer_dataset", "--bind", "127.0.0.1:0", "--log-level", "warning"]
        command += ["--tokens-file", str(folder / "tokens.json"), "--data", str(folder / "data")]
        command += ["--die-with-parent", "true"]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # our own module
        try:
            assert service.stdout is not None
            address = service.stdout.readline().split()[-1]
            stub = DatasetServiceStub(grpc.insecure_channel(address))
            metadata = (("authorization", f"Bearer {token}"),)
            with Client(dataset=address, trainer=address, inference=[address], token=token) as client:
                for dataset in ("emoji", "documents"):
                    version = _pushed_twice(client, folder / dataset, dataset)
                    for split in version.splits:
                        _read(stub, metadata, version.name, split)
        finally:
            service.terminate()
            service.wait(30)


def _pushed_twice(client: Client, folder: Path, name: str) -> DatasetVersion:
    for _ in range(2):
        start_s = time.perf_counter()
        push = client.datasets.push(folder, name)
        seconds = time.perf_counter() - start_s
        report = push.version.report
        print(
            f"{name}: {report.submitted_rows:,} = {report.accepted_rows:,} accepted + {report.refused_rows:,} refused; "
            f"{push.version.picture_count:,} pictures; sent {push.sent_blobs:,} files, {push.sent_bytes / 1e6:.1f} MB; "
            f"{seconds:.1f} s"
        )
    for each in report.finding_counts:
        print(f"  {each.code}: {each.count:,}")
    return push.version


def _read(stub: DatasetServiceStub, metadata: "tuple[tuple[str, str], ...]", version: str, split: Split) -> None:
    start_s, rows, size_bytes = time.perf_counter(), 0, 0
    request = pb.ReadExamplesRequest(
        dataset_version=version,
        split=split.split,
        picture_form=pb.PICTURE_FORM_ORIGINAL,
        shuffle=pb.Shuffle(seed=1),
    )
    for response in stub.ReadExamples(request, metadata=metadata):
        rows += 1
        size_bytes += len(response.example.messages[0].parts[0].picture.data)
    seconds = time.perf_counter() - start_s
    print(f"  {split.split}: {rows:,} rows read shuffled, {size_bytes / 1e6:.1f} MB of pictures; {seconds:.1f} s")
    assert rows == split.row_count


def _write_emoji(modules: Path, folder: Path) -> tuple[int, int]:
    """Writes the rows beside the pictures; returns rows written, and names that are missing."""
    source = modules / "emoji-datasource-google"
    shutil.copytree(source / "img" / "google" / "64", folder / "images")
    names = {language: _names(modules, language) for language in LANGUAGES}
    written = nameless = 0
    with (folder / "train.jsonl").open("w", encoding="utf-8") as out:
        for unified, image in _pictures(json.loads((source / "emoji.json").read_bytes())):
            text = "".join(chr(int(each, 16)) for each in unified.split("-"))
            for language, prompt in LANGUAGES.items():
                found = names[language].get(text) or names[language].get(text.replace(_EMOJI_PRESENTATION, ""))
                if found is None:
                    nameless += 1
                    continue
                row = {"image": f"images/{image}", "prompt": prompt, "text": found}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
    return written, nameless


def _pictures(emoji: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for each in emoji:
        for form in (each, *each.get("skin_variations", {}).values()):
            if form["has_img_google"]:
                yield form["unified"], form["image"]


def _names(modules: Path, language: str) -> dict[str, str]:
    names = {}
    for package, key in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        file = modules / package / key / language / "annotations.json"
        for text, annotation in json.loads(file.read_bytes())[key]["annotations"].items():
            if "tts" in annotation:
                names[text] = annotation["tts"][0]
    return names


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
