"""The dataset service's calls, from four parts that share one App."""

from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceServicer
from veneer_dataset.api.blob_calls import BlobCalls
from veneer_dataset.api.dataset_calls import DatasetCalls
from veneer_dataset.api.example_calls import ExampleCalls
from veneer_dataset.api.version_calls import VersionCalls


class DatasetServicer(DatasetCalls, BlobCalls, VersionCalls, ExampleCalls, DatasetServiceServicer):  # type: ignore[misc]  # ReadExamples yields messages serialised already
    """See the contract; each part is made with the App."""
