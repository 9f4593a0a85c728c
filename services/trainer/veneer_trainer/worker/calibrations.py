"""What this worker has measured: each shape of job once on each base, in idle time, kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from veneer.trainer.v1 import model_pb2, training_job_pb2, worker_service_pb2
from veneer_rpc.names import ModelName
from veneer_trainer.worker.child_process import ChildProcess
from veneer_trainer.worker.device import Device
from veneer_trainer.worker.messages import Measure, Measured
from veneer_trainer.worker.settings import WorkerSettings

_MOST_SHAPES = 64
_DROPOUT = 0.05  # jobs have some, and it takes time
# Of others a job costs about what the nearest does.
_DEFAULT_SHAPES = (("attention", 8), ("decoder", 16), ("decoder+merger+vision", 8))
_log = structlog.get_logger(__name__)


class Calibrations:
    """Measures shapes of jobs.

    Args:
        settings: the process's.
        digests: of the bases that it holds.
        device: to measure on.
        about: what figures depend on beside shape, base and device, such as the version of the code.
    """

    def __init__(self, settings: WorkerSettings, digests: Mapping[ModelName, str], device: Device, about: str) -> None:
        self._settings = settings
        self._digests = digests
        self._device = device
        self._about = f"{about}/{device.worker_class}/{settings.threads}/{settings.cache_bytes}"
        self._folder = settings.data / "calibrations"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, worker_service_pb2.Calibration] = {}
        self._wanted: dict[str, Measure] = {}
        for model in digests:
            for preset, rank in _DEFAULT_SHAPES:
                self._want(model, rank, [preset], model_pb2.DTYPE_AUTO)

    @property
    def known(self) -> list[worker_service_pb2.Calibration]:
        """What has been measured."""
        return list(self._known.values())

    @property
    def missing(self) -> bool:
        """Whether there is something to measure."""
        return bool(self._wanted)

    def want(self, spec: training_job_pb2.TrainingSpec) -> None:
        """Has the shape of a job measured too: more of its kind may come."""
        self._want(ModelName.parse(spec.model), spec.lora.rank, sorted(spec.lora.target_modules), spec.dtype)

    async def measure_next(self) -> None:
        """Measures one shape in a child; when it is cancelled the child ends, and the shape waits on."""
        key, task = next(iter(self._wanted.items()))
        child = await ChildProcess.start(task, self._settings.log_level)
        try:
            answer = await child.receive()
        finally:
            child.kill()
            await child.ended()
        del self._wanted[key]
        if not isinstance(answer, Measured):  # the machine is too small for the shape: its jobs have no estimate
            _log.warning("shape not measured", model=task.model_directory, answer=str(answer))
            return
        self._known[key] = worker_service_pb2.Calibration.FromString(answer.calibration)
        self._path(key).write_bytes(answer.calibration)
        _log.info("shape measured", model=task.model_directory, rank=self._known[key].rank)

    def _want(self, model: ModelName, rank: int, targets: Sequence[str], dtype: model_pb2.Dtype.ValueType) -> None:
        lora = training_job_pb2.LoraSpec(rank=rank, alpha=2.0 * rank, dropout=_DROPOUT, target_modules=targets)
        spec = training_job_pb2.TrainingSpec(
            model=str(model), lora=lora, dtype=dtype, epochs=1, batch_size=1, gradient_accumulation=1
        )
        key = hashlib.sha256(
            f"{self._about}/{self._digests[model]}/".encode() + spec.SerializeToString(deterministic=True)
        ).hexdigest()
        if key in self._known or len(self._known) + len(self._wanted) >= _MOST_SHAPES:
            return
        with contextlib.suppress(OSError, DecodeError):
            self._known[key] = worker_service_pb2.Calibration.FromString(self._path(key).read_bytes())
            return
        self._wanted[key] = Measure(
            spec=spec.SerializeToString(),
            model_directory=str(self._settings.model_directories[model]),
            model_digest=self._digests[model],
            device=self._device.kind,
            threads=self._settings.threads,
            cache_bytes=self._settings.cache_bytes // self._settings.ranks,
        )

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.calibration"
