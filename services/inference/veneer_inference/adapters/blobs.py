"""Pictures that are named by digest, from the dataset service under the caller's own credential."""

import hashlib
from typing import TYPE_CHECKING

import grpc

from veneer.dataset.v1.dataset_service_pb2 import DownloadBlobsRequest
from veneer_rpc.errors import (
    DataLoss,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from veneer_rpc.status import from_rpc_error

if TYPE_CHECKING:
    from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceAsyncStub

_RETRY_S = 2.0


class Blobs:
    """Reads blobs; the dataset service checks whose they are.

    Args:
        stub: of the dataset service, on a channel without a credential.
        most_bytes: of one blob.
    """

    def __init__(self, stub: "DatasetServiceAsyncStub", most_bytes: int) -> None:
        self._stub = stub
        self._most_bytes = most_bytes

    async def read(self, digest: str, authorization: str, place: str) -> bytes:
        """One blob.

        Args:
            digest: its SHA-256.
            authorization: the caller's own.
            place: the field that names it, for errors.

        Raises:
            NotFound: the caller's tenant has no such blob.
            ResourceExhausted: it is larger than a picture may be.
            FailedPrecondition: the dataset service does not know the caller.
            DataLoss, Unavailable: it sends other bytes, or does not answer.
        """
        data = bytearray()
        call = self._stub.DownloadBlobs(
            DownloadBlobsRequest(digests=[digest]), metadata=(("authorization", authorization),)
        )
        try:
            async for piece in call:
                if piece.size_bytes > self._most_bytes:
                    raise ResourceExhausted(
                        "PICTURE_TOO_LARGE",
                        f"{place}: the blob has {piece.size_bytes} bytes, the limit is {self._most_bytes}",
                    )
                data += piece.data
        except grpc.aio.AioRpcError as error:
            problem = from_rpc_error(error)
            if isinstance(problem, NotFound):
                raise NotFound("BLOB_NOT_FOUND", f"{place}: there is no blob {digest}") from None
            if isinstance(problem, Unauthenticated | PermissionDenied):
                raise FailedPrecondition(
                    "DATASET_REFUSED", f"{place}: the dataset service refuses the caller ({problem.reason})"
                ) from None
            raise Unavailable(
                "DATASET_UNAVAILABLE",
                f"{place}: the dataset service does not answer ({problem.reason})",
                retry_after_s=_RETRY_S,
            ) from None
        finally:
            call.cancel()
        if hashlib.sha256(data).hexdigest() != digest:
            raise DataLoss("BLOB_DAMAGED", f"{place}: the dataset service sent other bytes than {digest}")
        return bytes(data)
