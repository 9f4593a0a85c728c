"""Which device a worker trains on, and what it says of it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from veneer_trainer.worker import device
from veneer_trainer.worker.device import Device, DeviceError, find
from veneer_trainer.worker.machine import memory_bytes


def answering(monkeypatch: pytest.MonkeyPatch, stdout: str, returncode: int = 0) -> list[Any]:
    """Has torch's process answer so; returns the questions."""
    asked: list[Any] = []

    def run(command: Any, **_: object) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
        asked.append(command)
        return subprocess.CompletedProcess(command, returncode, stdout, "no driver")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_without_a_driver_it_is_the_cpu_and_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, '["NVIDIA H100 80GB HBM3", 85017493504, 2]')
    monkeypatch.setattr(device, "_DRIVERS", ("/nowhere",))
    assert find("auto", 4) == Device("cpu", "cpu-4x", memory_bytes())
    assert find("auto", 4, ranks=2) == Device("cpu", "cpu-4x-2-ranks", memory_bytes() // 2)
    assert not asked


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_an_accelerator_is_announced_with_its_name_and_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str
) -> None:
    answering(monkeypatch, '["NVIDIA H100 80GB HBM3", 85017493504, 2]')
    monkeypatch.setattr(device, "_DRIVERS", (str(tmp_path),))
    assert find(wanted, 4) == Device("cuda", "cuda-nvidia-h100-80gb-hbm3", 85017493504)
    assert find(wanted, 4, ranks=2) == Device("cuda", "cuda-nvidia-h100-80gb-hbm3-2-ranks", 85017493504)
    with pytest.raises(DeviceError, match="3 were asked for, torch finds 2"):
        find(wanted, 4, ranks=3)
    assert find("cpu", 4).kind == "cpu"


@pytest.mark.parametrize(("stdout", "returncode"), [("null", 0), ("", 1)])
def test_a_driver_that_torch_cannot_use_leaves_the_cpu_unless_cuda_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stdout: str, returncode: int
) -> None:
    answering(monkeypatch, stdout, returncode)
    monkeypatch.setattr(device, "_DRIVERS", (str(tmp_path),))
    assert find("auto", 2).kind == "cpu"
    with pytest.raises(DeviceError, match="no CUDA device here; no driver"):
        find("cuda", 2)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_driver_that_does_not_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str
) -> None:
    monkeypatch.setattr(device, "_DRIVERS", (str(tmp_path),))
    monkeypatch.setattr(device, "_QUESTION", "import time; time.sleep(60)")
    monkeypatch.setattr(device, "_ASK_S", 0.2)
    with pytest.raises(DeviceError, match=r"not said in 0.2 s .* cpu does without"):
        find(wanted, 2)
