"""Whether a cluster fits into memory, before anything is started."""

from dataclasses import dataclass

from veneer_cluster.base import Base
from veneer_cluster.folder import ClusterError

# What a process takes beside weights, measured on Linux with the CPU build of torch: about 0.45 GB where
# torch is loaded, about 0.08 GB where it is not.
TORCH_PROCESS_BYTES = 450_000_000
PLAIN_PROCESS_BYTES = 80_000_000
WORKING_SHARE = 0.25
"""Key-value memory, activations and packed copies, as a share of the weights."""


@dataclass(frozen=True)
class Need:
    """Memory that a cluster is expected to take, in bytes."""

    weights_bytes: int
    holders: int
    total_bytes: int


def need(base: Base, workers: int, replicas: int, bf16: bool) -> Need:
    """Estimates a cluster's memory: each worker and each replica holds the base."""
    weights_bytes = base.parameters * (2 if bf16 else 4)
    holders = workers + replicas
    per_holder_bytes = round(weights_bytes * (1 + WORKING_SHARE)) + TORCH_PROCESS_BYTES
    # A worker's training child and a replica's engine hold the base; their parents are plain processes.
    plain = 4 + holders
    return Need(weights_bytes, holders, holders * per_holder_bytes + plain * PLAIN_PROCESS_BYTES)


def check(needed: Need, available_bytes: int) -> None:
    """Refuses a cluster that does not fit.

    Raises:
        ClusterError: with the figures, and what would fit.
    """
    if needed.total_bytes <= available_bytes:
        return
    raise ClusterError(
        f"the base takes {_gb(needed.weights_bytes)} in each of {needed.holders} processes that hold it; "
        f"with all else that is {_gb(needed.total_bytes)}, and {_gb(available_bytes)} of memory are free. "
        "Take fewer --workers or --replicas, or a smaller --base"
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
