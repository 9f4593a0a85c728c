"""Exports by real processes: trained, merged, held against the adapter, downloaded, and loaded without PEFT."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from peft import PeftModel
from transformers import Qwen3VLForConditionalGeneration

from veneer.dataset.v1 import conversation_pb2
from veneer.inference.v1 import inference_pb2
from veneer.inference.v1 import inference_service_pb2 as inference_pb
from veneer.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from veneer.trainer.v1 import adapter_service_pb2 as pb
from veneer.trainer.v1 import export_pb2, model_pb2
from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceStub
from veneer_rpc.certificate import verify

from .conftest import Cluster, Process, picture, until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
Message = Answer = Any  # of generated code
ENDED = (job_pb.JOB_STATE_SUCCEEDED, job_pb.JOB_STATE_FAILED, job_pb.JOB_STATE_DEAD_LETTERED)


@pytest.fixture(scope="module")
def exporter(cluster: Cluster) -> Iterator[Process]:
    started = cluster.worker("exporter", export_prompts="3")
    yield started
    started.close()


@pytest.fixture(scope="module")
def adapters(cluster: Cluster) -> AdapterServiceStub:
    return AdapterServiceStub(cluster.channel(cluster.trainer, cluster.user))


@pytest.fixture(scope="module")
def trained(cluster: Cluster, exporter: Process, version: str) -> str:
    """A version whose numbers are far from the base's own."""
    job = cluster.create(version, "export", epochs=3, optimizer={"learning_rate": 5e-2})
    ended = cluster.ended(job, 180)
    assert ended.state == job_pb.JOB_STATE_SUCCEEDED, ended.failure
    name: str = ended.adapter_version
    return name


def export(adapters: AdapterServiceStub, trained: str, **values: Message) -> Answer:
    spec = export_pb2.ExportSpec(**{"adapter_version": trained, "format": export_pb2.EXPORT_FORMAT_MERGED} | values)
    made = adapters.ExportAdapterVersion(pb.ExportAdapterVersionRequest(spec=spec))
    return until(lambda: (now := adapters.GetExport(pb.GetExportRequest(name=made.name))).state in ENDED and now, 200)


def download(stream: Iterator[Message], folder: Path) -> Path:
    for piece in stream:
        (folder / piece.path).parent.mkdir(parents=True, exist_ok=True)
        with (folder / piece.path).open("ab") as file:
            file.write(piece.data)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = model(input_ids=torch.arange(100, 140)[None]).logits
    return answer.float()


def test_a_merged_model_answers_as_the_adapter_does_and_loads_without_peft(
    cluster: Cluster, adapters: AdapterServiceStub, trained: str, tmp_path: Path
) -> None:
    made = export(adapters, trained)
    assert made.state == job_pb.JOB_STATE_SUCCEEDED, made.failure
    folder = download(adapters.DownloadExport(pb.DownloadExportRequest(name=made.name)), tmp_path / "merged")
    measured = verify(folder).predicate["measured"]
    assert measured["prompts"] == 3
    assert measured["answers_identical"] + measured["answers_within_tie"] == 3
    assert measured["greatest_logit_difference"] <= measured["tie_limit"]
    assert measured["logits_compared"] >= 3
    assert measured["tokens_per_second"]["export"] > 0
    assert verify(folder).predicate["split"] == "validation"

    request = pb.DownloadAdapterVersionRequest(name=trained)
    adapter = download(adapters.DownloadAdapterVersion(request), tmp_path / "adapter")
    base = Qwen3VLForConditionalGeneration.from_pretrained(cluster.base, dtype=torch.float32)
    untouched = logits(base)
    peft = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert merged.dtype == torch.float32
    expected = dict(peft.named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(merged), logits(peft), rtol=0, atol=1e-4)
    assert (logits(merged) - untouched).abs().max() > 1e-2  # there was something to merge


@pytest.mark.e2e_long
def test_a_rounded_model_says_what_it_lost_and_an_imported_adapter_is_asked_drawings(
    cluster: Cluster, adapters: AdapterServiceStub, trained: str, tmp_path: Path
) -> None:
    made = export(adapters, trained, dtype=model_pb2.DTYPE_BFLOAT16)
    assert made.state == job_pb.JOB_STATE_SUCCEEDED, made.failure
    folder = download(adapters.DownloadExport(pb.DownloadExportRequest(name=made.name)), tmp_path / "bf16")
    assert verify(folder).predicate["measured"]["metrics"]["exact_match"].keys() == {"adapter", "export"}
    assert Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16

    request = pb.DownloadAdapterVersionRequest(name=trained)
    adapter = download(adapters.DownloadAdapterVersion(request), tmp_path / "adapter")

    def pieces() -> Iterator[pb.ImportAdapterVersionRequest]:
        yield pb.ImportAdapterVersionRequest(header=pb.ImportHeader(adapter="adapters/elsewhere", model="models/tiny"))
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            data = (adapter / name).read_bytes()
            yield pb.ImportAdapterVersionRequest(file=pb.FilePiece(path=name, size_bytes=len(data), data=data))

    imported = adapters.ImportAdapterVersion(pieces()).name
    drawn = export(adapters, imported)
    assert drawn.state == job_pb.JOB_STATE_SUCCEEDED, drawn.failure
    whole = download(adapters.DownloadExport(pb.DownloadExportRequest(name=drawn.name)), tmp_path / "drawn")
    measured = verify(whole).predicate["measured"]
    assert (measured["check_data"], measured["metrics"]) == ("drawn", {})
    rounded = export(adapters, imported, dtype=model_pb2.DTYPE_BFLOAT16)
    assert (rounded.state, rounded.failure.reason) == (job_pb.JOB_STATE_FAILED, "METRIC_FELL")
    assert "no data here" in rounded.failure.message
    until(lambda: not os.listdir(cluster.folder / "exporter" / "attempts"))  # what was written is removed


@pytest.mark.e2e_long
@pytest.mark.parametrize(
    ("form", "dtype", "files"),
    [
        (export_pb2.EXPORT_FORMAT_ONNX, model_pb2.DTYPE_FLOAT32, {"decoder.onnx", "decoder.onnx.data"}),
        (export_pb2.EXPORT_FORMAT_ONNX, model_pb2.DTYPE_INT8, {"vision.onnx", "vision.onnx.data"}),
        (export_pb2.EXPORT_FORMAT_OPENVINO, model_pb2.DTYPE_FLOAT32, {"decoder.xml", "decoder.bin"}),
        (export_pb2.EXPORT_FORMAT_OPENVINO, model_pb2.DTYPE_INT8, {"vision.xml", "vision.bin"}),
    ],
)
def test_graphs_are_exported_checked_and_served_alone(
    adapters: AdapterServiceStub, trained: str, tmp_path: Path, form: int, dtype: int, files: set[str]
) -> None:
    made = export(adapters, trained, format=form, dtype=dtype)
    assert made.state == job_pb.JOB_STATE_SUCCEEDED, made.failure
    folder = download(adapters.DownloadExport(pb.DownloadExportRequest(name=made.name)), tmp_path / "graphs")
    certified = verify(folder)
    assert files <= certified.digests.keys()
    assert not any(path.endswith(".safetensors") for path in certified.digests)
    assert certified.predicate["digest"] == made.digest
    measured = certified.predicate["measured"]
    assert measured["metrics"]["exact_match"].keys() == {"adapter", "export"}
    assert measured["greatest_logit_difference"] > 0
    if dtype == model_pb2.DTYPE_FLOAT32:
        assert measured["answers_identical"] + measured["answers_within_tie"] == 3
        assert measured["greatest_logit_difference"] <= 10 * measured["tie_limit"]
    code = "import typer, veneer_inference.cli as cli; typer.run(cli.serve)"
    command = [sys.executable, "-c", code, str(folder), "--bind", "127.0.0.1:0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        _, _, token, address = (process.stdout.readline().split()[-1] for _ in range(4))
        message = conversation_pb2.Message(
            role=conversation_pb2.ROLE_USER,
            parts=[
                conversation_pb2.Part(picture=conversation_pb2.Picture(data=picture(3))),
                conversation_pb2.Part(text="What number?"),
            ],
        )
        request = inference_pb.GenerateRequest(
            model="models/graphs",
            prompt=inference_pb2.Prompt(messages=[message]),
            sampling=inference_pb2.SamplingParams(max_tokens=5, temperature=0.0),
        )
        with grpc.insecure_channel(address) as channel:
            metadata = (("authorization", f"Bearer {token}"),)
            answer = InferenceServiceStub(channel).Generate(request, metadata=metadata, timeout=60)
        process.send_signal(signal.SIGTERM)
    assert answer.served_by.model_digest == made.digest
    assert len(answer.token_ids) >= 1
