"""Settings of the inference service's process."""

# ruff: noqa: RUF009  # setting() is dataclasses.field with a description

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veneer_rpc import addresses
from veneer_rpc.names import ModelName, is_id
from veneer_rpc.settings import ServerSettings, setting

_MAX_REPLICA_CHARS = 63


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(ServerSettings):
    """What the process can be told; environment prefix VENEER_INFERENCE_."""

    data: Path = setting("Folder of adapters and of what the registry last said; one process at a time.")
    replica: str = setting("This replica's own name, stable over restarts.")
    models: str = setting("The base, NAME=DIRECTORY.")
    trainer: str | None = setting("Address of the trainer, which has the registry of adapters.", None)
    trainer_token_file: Path | None = setting("File with a token of the role `replica` to show the trainer.", None)
    trainer_root_certificates_file: Path | None = setting("PEM certificates that sign the trainer's.", None)
    dataset: str | None = setting("Address of the dataset service, which has pictures named by digest.", None)
    dataset_root_certificates_file: Path | None = setting("PEM certificates that sign the dataset service's.", None)
    delegation_public_key_file: Path | None = setting("PEM public key of delegations that the trainer signs.", None)
    alone: bool = setting("Serve the model without trainer and dataset, with all of its own pixel bounds.", False)
    advertise: str | None = setting(
        "Address by which clients reach this replica; default: the one it listens on.", None
    )
    die_with_parent: bool = setting("End when the process that started this one ends.", False)

    engine: Literal["torch", "vllm"] = setting("What computes: our own on torch, or vLLM on a GPU.", "torch")
    threads: int = setting("Threads that the engine computes with; 0: as many as cores.", 0, 0, 1024)
    dtype: Literal["float32", "bfloat16", "int8", "auto"] = setting(
        "How the base's numbers are held; auto: in eight bits where a held-out check allows it, else as is fastest.",
        "float32",
    )
    as_stored: bool = setting(
        "Keep large weights in the bits that they are stored in: half of what float32 takes, and slower answers "
        "where the CPU does not compute with them so anyway (x86 with AVX2 does).",
        False,
    )
    kv_tokens: int = setting("Tokens of key-value memory over all requests.", 16_384, 64, 1 << 40)
    step_tokens: int = setting("Tokens of a step at most; a longer prompt goes in pieces.", 512, 1, 1 << 20)
    prefix_cache: bool = setting("Compute equal beginnings of a tenant's prompts to one adapter once.", True)
    speculation: bool = setting("Guess ahead by what was said before; changes no answer.", True)
    adapter_slots: int = setting("Adapters that are ready for a step at once.", 16, 1, 4096)
    max_rank: int = setting("Greatest rank of an adapter.", 64, 1, 4096)
    max_waiting: int = setting("Requests that wait for the engine; more get RESOURCE_EXHAUSTED.", 256, 1, 100_000)

    prompt_threads: int = setting("Threads that decode, resize and tokenise.", 2, 1, 256)
    max_prompts_waiting: int = setting(
        "Prompts that wait for such a thread; more get RESOURCE_EXHAUSTED.", 64, 1, 100_000
    )
    max_picture_bytes: int = setting("Most bytes of a picture that is named by digest.", 64 << 20, 1, 1 << 32)
    adapter_memory_bytes: int = setting(
        "Host memory for adapters; beyond it those longest unused are dropped.", 2 << 30, 1
    )
    adapter_disk_bytes: int = setting("Disk for adapters; beyond it those longest unused are deleted.", 16 << 30, 1)
    max_adapter_bytes: int = setting("Most bytes of one adapter's folder.", 4 << 30, 1)
    metrics_port: int | None = setting(
        "Port on loopback where Prometheus reads /metrics; 0 takes a free one. Without it there is no such page.",
        None, 0, 65_535,
    )  # fmt: skip
    report_s: float = setting("How often the registry hears what this replica serves.", 5.0, 0.05, 3600)
    registry_wait_s: float = setting(
        "How long a request may wait for the registry about a name that is not known here.", 2.0, 0.01, 60
    )
    recheck_s: float = setting("How long a version without an alias is taken to exist without asking.", 10.0, 0, 86_400)

    @property
    def model_name(self) -> ModelName:
        """The base's name."""
        return ModelName(self.models.partition("=")[0])

    @property
    def model_directory(self) -> Path:
        """The base's directory."""
        return Path(self.models.partition("=")[2])

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        name, _, directory = self.models.partition("=")
        if not is_id(name) or not directory or not Path(directory).is_dir():
            yield f"models: must be NAME=DIRECTORY with a directory that is there, was {self.models!r}"
        if self.engine == "vllm" and self.dtype not in ("float32", "bfloat16"):
            yield f"dtype: must be float32 or bfloat16 with the engine vllm, was {self.dtype}"
        if not 1 <= len(self.replica) <= _MAX_REPLICA_CHARS:
            yield f"replica: must be 1 to {_MAX_REPLICA_CHARS} characters, was {self.replica!r}"
        for service in ("trainer", "dataset"):
            certificates, address = f"{service}_root_certificates_file", getattr(self, service)
            if (address is None) != self.alone:
                yield f"{service}: must {'not be given with' if self.alone else 'be given without'} alone"
            elif address and getattr(self, certificates) is None and not addresses.is_local(address):
                yield f"{certificates}: must be given with a {service} on another machine"
        if self.trainer is not None and self.trainer_token_file is None:
            yield "trainer_token_file: must be given with a trainer"
        for file in (
            "trainer_token_file",
            "trainer_root_certificates_file",
            "dataset_root_certificates_file",
            "delegation_public_key_file",
        ):
            path = getattr(self, file)
            if path is not None and not path.is_file():
                yield f"{file}: there is no file {path}"
