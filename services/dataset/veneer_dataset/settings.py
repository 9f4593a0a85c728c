"""Settings of the dataset service's process."""

# ruff: noqa: RUF009  # setting() is dataclasses.field with a description

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer_rpc import addresses
from veneer_rpc.settings import ServerSettings, setting


@dataclass(frozen=True, kw_only=True)
class DatasetSettings(ServerSettings):
    """What the process can be told."""

    data: Path = setting("Folder for all that the service keeps; one process at a time.")
    database: str | None = setting("URL of the metadata's database; default: SQLite in the data folder.", None)
    blobs: str | None = setting("URL of an object store, such as s3://bucket/prefix; default: the data folder.", None)
    trainer: str | None = setting("Address of the trainer, whose models count tokens and resize.", None)
    trainer_token_file: Path | None = setting("File with the token to show the trainer.", None)
    trainer_root_certificates_file: Path | None = setting("PEM certificates that sign the trainer's.", None)
    delegation_public_key_file: Path | None = setting("PEM public key of delegations that the trainer signs.", None)
    die_with_parent: bool = setting("End when the process that started this one ends.", False)
    decoders: int = setting("Processes that decode pictures; 0: as many as cores.", 0, 0, 1024)
    picture_memory_bytes: int = setting("Memory that a decoder may take.", 4 << 30, 1 << 28, 1 << 40)
    picture_cpu_s: int = setting("CPU seconds that one picture may take.", 20, 1, 600)
    picture_wall_s: float = setting("Seconds that one picture may take.", 60.0, 0.1, 3600)
    pixel_cache_bytes: int = setting("Disk for resized pictures.", 10 << 30, 0, 1 << 50)
    pack_cache_bytes: int = setting("Disk for rows made ready to be sent.", 10 << 30, 0, 1 << 50)
    quota_bytes: int = setting("Bytes of blobs that a tenant may store.", 1 << 40, 0, 1 << 60)
    upload_stall_s: float = setting("Silence after which an upload is ended.", 60.0, 0.01, 3600)
    versions_at_once: int = setting("Versions that are made at once.", 2, 1, 64)
    max_versions_waiting: int = setting("Versions that are made or wait; more get RESOURCE_EXHAUSTED.", 32, 1, 1024)
    grace_of_blobs_s: float = setting("Seconds that a blob nobody names is kept.", 86_400.0, 0.0, 1e9)
    collect_every_s: float = setting("Seconds between two collections of such blobs.", 3600.0, 0.05, 1e7)

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        for name in ("trainer_token_file", "trainer_root_certificates_file", "delegation_public_key_file"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                yield f"{name}: there is no file {path}"
        if self.trainer is not None:
            if self.trainer_token_file is None:
                yield "trainer_token_file: must be given with trainer"
            if self.trainer_root_certificates_file is None and not addresses.is_local(self.trainer):
                yield "trainer_root_certificates_file: must be given with a trainer on another machine"

    @property
    def database_url(self) -> str:
        """The database's URL."""
        return self.database or f"sqlite:///{self.data.resolve() / 'metadata.sqlite'}"
