"""What stands in the place of trainer and dataset where a replica serves a model alone."""

from veneer_inference.adapters.adapter_folders import AdapterFolder
from veneer_inference.adapters.adapter_source import AdapterSource
from veneer_inference.adapters.blobs import Blobs
from veneer_inference.admission import Admission
from veneer_inference.domain.registry import AdapterRef, Release
from veneer_rpc.errors import FailedPrecondition, NotFound


class NoRegistry(Admission):
    """Knows no adapter."""

    def __init__(self) -> None:
        pass

    async def pin(self, tenant: str, name: AdapterRef, routing_key: str) -> Release:
        """Raises NotFound: NO_ADAPTERS."""
        raise _no_adapters(str(name))


class NoSource(AdapterSource):
    """Has no adapter."""

    def __init__(self) -> None:
        pass

    async def folder(self, release: Release) -> AdapterFolder:
        """Raises NotFound: NO_ADAPTERS."""
        raise _no_adapters(str(release.version))


class NoBlobs(Blobs):
    """Has no picture."""

    def __init__(self) -> None:
        pass

    async def read(self, digest: str, authorization: str, place: str) -> bytes:
        """Raises FailedPrecondition: NO_DATASET."""
        raise FailedPrecondition(
            "NO_DATASET", f"{place}: this replica serves a model alone, without a dataset: send the picture's bytes"
        )


def _no_adapters(name: str) -> NotFound:
    return NotFound("NO_ADAPTERS", f"this replica serves a model alone, without adapters: there is no {name}")
