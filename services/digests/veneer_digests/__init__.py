"""Digests: the identity of blobs, rows, dataset versions, contracts, adapters and models.

protos/DIGESTS.md fixes the bytes. Every digest is 64 lower-case hex digits; every error a `DigestError`:

    DigestError (a ValueError)
    ├── NotCanonicalError    a text, JSON value, row or config without the one form
    └── SafetensorsError     a malformed safetensors file
"""

from veneer_digests.blob import blob_digest
from veneer_digests.dataset_version import CANONICALISER_VERSION, DatasetVersionHasher
from veneer_digests.errors import DigestError, NotCanonicalError, SafetensorsError
from veneer_digests.jcs import canonical_json, parse_json
from veneer_digests.preimage import digest_bytes
from veneer_digests.row import canonical_row, row_digest
from veneer_digests.safetensors_file import SafetensorsHeader, TensorSlot, read_safetensors_header, read_slot
from veneer_digests.sampling import epoch_order, epoch_order_of_packed, split_of
from veneer_digests.weights import (
    TensorDigest,
    adapter_digest,
    contract_digest,
    graphs_digest,
    model_digest,
    model_digest_of,
    tensor_digest,
    tensor_digests,
)

__all__ = [
    "CANONICALISER_VERSION",
    "DatasetVersionHasher",
    "DigestError",
    "NotCanonicalError",
    "SafetensorsError",
    "SafetensorsHeader",
    "TensorDigest",
    "TensorSlot",
    "adapter_digest",
    "blob_digest",
    "canonical_json",
    "canonical_row",
    "contract_digest",
    "digest_bytes",
    "epoch_order",
    "epoch_order_of_packed",
    "graphs_digest",
    "model_digest",
    "model_digest_of",
    "parse_json",
    "read_safetensors_header",
    "read_slot",
    "row_digest",
    "split_of",
    "tensor_digest",
    "tensor_digests",
]
