"""Veneer's client: fine-tune a vision-language model on your own pictures, and ask what comes out.

    import veneer_client as veneer

    with veneer.Client() as client:  # finds the cluster by the environment
        client.datasets.push("pictures", "digits")
        job = client.jobs.train("digits", adapter="digits", epochs=5, rank=16)
        for job in client.jobs.watch(job.name):
            print(job.progress.step, job.progress.loss)
        for piece in client.stream("Which digit is this?", image="seven.png", adapter="digits"):
            print(piece.text, end="")

`AsyncClient` is the same on an event loop. Resources come back as the contract's own messages
(`veneer.trainer.v1.TrainingJob` and so on): copies of them would be a second contract to keep in step.
"""

from veneer_client._adapter_diff import AdapterDiff, Change
from veneer_client._address import Cluster
from veneer_client._batch import Batch
from veneer_client._client import AsyncClient, Client
from veneer_client._comparison import Comparison, Difference
from veneer_client._conversation import Image, ImageError, Question, message
from veneer_client._datasets import Push, PushProgress
from veneer_client._diff import DatasetDiff, DiffRow
from veneer_client._errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    ClusterNotFound,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    FolderError,
    Internal,
    InvalidArgument,
    NotComparable,
    NotFound,
    OtherAnswers,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    RowsRefused,
    StatusError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    VeneerError,
    Violation,
    WorkFailed,
)
from veneer_client._sweep import Trial, compared
from veneer_client._work import state_name, succeeded

__all__ = [
    "Aborted",
    "AdapterDiff",
    "AlreadyExists",
    "AsyncClient",
    "Batch",
    "Cancelled",
    "Change",
    "Client",
    "Cluster",
    "ClusterNotFound",
    "Comparison",
    "DataLoss",
    "DatasetDiff",
    "DeadlineExceeded",
    "DiffRow",
    "Difference",
    "FailedPrecondition",
    "FolderError",
    "Image",
    "ImageError",
    "Internal",
    "InvalidArgument",
    "NotComparable",
    "NotFound",
    "OtherAnswers",
    "OutOfRange",
    "PermissionDenied",
    "Push",
    "PushProgress",
    "Question",
    "ResourceExhausted",
    "RowsRefused",
    "StatusError",
    "Trial",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "VeneerError",
    "Violation",
    "WorkFailed",
    "compared",
    "message",
    "state_name",
    "succeeded",
]
