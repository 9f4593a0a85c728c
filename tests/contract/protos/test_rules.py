"""Rules of the contract that `buf lint` does not know, read from the generated descriptors."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FileDescriptor, MethodDescriptor, ServiceDescriptor

from veneer.dataset.v1 import dataset_service_pb2
from veneer.inference.v1 import inference_service_pb2
from veneer.trainer.v1 import (
    adapter_service_pb2,
    evaluation_service_pb2,
    model_service_pb2,
    training_service_pb2,
    worker_service_pb2,
)

FILES: list[FileDescriptor] = [
    module.DESCRIPTOR
    for module in (
        dataset_service_pb2,
        inference_service_pb2,
        adapter_service_pb2,
        evaluation_service_pb2,
        model_service_pb2,
        training_service_pb2,
        worker_service_pb2,
    )
]
PROTOS = Path(__file__).parents[3] / "protos"


def services() -> Iterator[ServiceDescriptor]:
    for file in FILES:
        yield from file.services_by_name.values()


def methods(prefix: str) -> list[MethodDescriptor]:
    return [method for service in services() for method in service.methods if method.name.startswith(prefix)]


def fields(message: Descriptor) -> set[str]:
    return {field.name for field in message.fields}


def test_the_contract_has_every_service_of_the_design() -> None:
    assert {service.full_name for service in services()} == {
        "veneer.dataset.v1.DatasetService",
        "veneer.inference.v1.InferenceService",
        "veneer.trainer.v1.AdapterService",
        "veneer.trainer.v1.EvaluationService",
        "veneer.trainer.v1.ModelService",
        "veneer.trainer.v1.TrainerService",
        "veneer.trainer.v1.WorkerService",
    }


def test_folders_are_packages() -> None:
    for path in PROTOS.rglob("*.proto"):
        package = ".".join(path.parent.relative_to(PROTOS).parts)
        assert f"\npackage {package};\n" in path.read_text(encoding="utf-8"), path


def test_every_list_is_paginated() -> None:
    listed = methods("List")
    assert len(listed) >= 12
    for method in listed:
        assert {"page_size", "page_token"} <= fields(method.input_type), method.full_name
        assert "next_page_token" in fields(method.output_type), method.full_name


# A create whose result is named by its content needs no request id; the same content is the same thing.
@pytest.mark.parametrize("prefix", ["Create", "Update", "Promote", "Rollback", "Pause", "Resume", "Retry"])
def test_mutations_can_be_repeated_safely(prefix: str) -> None:
    found = methods(prefix)
    assert found
    for method in found:
        assert "request_id" in fields(method.input_type), method.full_name


def test_every_write_of_a_worker_names_its_attempt() -> None:
    (worker,) = (service for service in services() if service.name == "WorkerService")
    for method in worker.methods:
        if method.name == "AcquireLease":
            continue
        request = method.input_type
        header = request.fields_by_name.get("header")
        assert "attempt" in fields(header.message_type if header else request), method.full_name


def test_an_old_generator_can_compile_the_core() -> None:
    for path in PROTOS.rglob("*.proto"):
        text = path.read_text(encoding="utf-8")
        assert 'syntax = "proto3";' in text
        outside = [name for name in re.findall(r'import "([^"]+)"', text) if not name.startswith("veneer/")]
        assert all(name.startswith("google/protobuf/") for name in outside), (path, outside)


def test_every_field_says_how_it_behaves() -> None:
    """Required, Optional, Output only or Identifier: the words of AIP-203, first in the comment."""
    behaviour = re.compile(r"(Required|Optional|Output only|Identifier)\b")
    # Values passed on whole (a contract, the pieces of a oneof) take their behaviour from where they stand.
    passed_on = {"ProcessingContract"}
    for path in (PROTOS / "veneer").rglob("*.proto"):
        message, in_oneof, comment = "", False, ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if found := re.match(r"message (\w+)", line):
                message = found[1]
            elif re.match(r"\s+oneof \w+ \{", line):
                assert behaviour.search(comment), (path.name, message, line)
                in_oneof = True
            elif in_oneof and line.strip() == "}":
                in_oneof = False
            elif re.match(r"\s+.*= \d+;", line) and message and not line.lstrip().startswith("//"):
                is_field = re.match(r"\s+(optional |repeated )?[\w.<>, ]+ \w+ = \d+;", line)
                if is_field and not in_oneof and message not in passed_on:
                    assert behaviour.match(comment), (path.name, message, line, comment)
            found = re.match(r"\s*// (.*)", line)
            comment = f"{comment} {found[1]}".strip() if found else ""
