"""Whether a cluster fits into memory, before anything is started."""

from dataclasses import dataclass

from veneer_cluster.base import Base
from veneer_cluster.folder import ClusterError

# What a process takes beside weights, measured on Linux with the CPU build of torch: about 0.45 GB where
# torch is loaded, about 0.08 GB where it is not.
TORCH_PROCESS_BYTES = 450_000_000
PLAIN_PROCESS_BYTES = 80_000_000
TRAINING_SHARE = 0.15  # of the weights: with less memory than it likes a worker computes layers twice
SERVING_SHARE = 0.05
SPARE_SHARE = 0.05  # of the free memory: files that are read lie in it
LEAST_KV_TOKENS, MOST_KV_TOKENS = 2_048, 16_384


@dataclass(frozen=True)
class Need:
    """Memory that a cluster is expected to take, in bytes; `weights_bytes` is what the base takes in a replica."""

    weights_bytes: int
    holders: int
    total_bytes: int


@dataclass(frozen=True)
class Room:
    """What a replica gets: tokens of key-value memory, and whether it holds the base as it is stored."""

    kv_tokens: int
    as_stored: bool


@dataclass(frozen=True)
class Arithmetic:
    """What the CPU computes in: bf16, or float32 with weights of sixteen bits."""

    bf16: bool
    halves: bool


MOST_ROOM = Room(MOST_KV_TOKENS, as_stored=False)


def need(base: Base, workers: int, replicas: int, cpu: Arithmetic, room: Room) -> Need:
    """Estimates a cluster's memory: each worker and each replica holds the base, each replica keys and values too.

    A worker holds it as it is stored where that takes less. So does a replica that multiplies by sixteen bits; it packs
    them, so that a head that is the embedding too is there once more.
    """
    number_bytes = 2 if cpu.bf16 else 4
    computed_bytes = base.parameters * number_bytes
    stored_bytes = min(base.stored_bytes, computed_bytes)
    weights_bytes = stored_bytes if room.as_stored else computed_bytes
    if cpu.bf16 or (cpu.halves and stored_bytes < computed_bytes):
        weights_bytes = min(weights_bytes, stored_bytes) + 2 * base.tied_numbers
    worker_bytes = stored_bytes + round(computed_bytes * TRAINING_SHARE) + TORCH_PROCESS_BYTES
    replica_bytes = weights_bytes + round(computed_bytes * SERVING_SHARE) + TORCH_PROCESS_BYTES
    replica_bytes += room.kv_tokens * base.kv_numbers * number_bytes
    holders = workers + replicas
    # A worker's training child and a replica's engine hold the base; their parents are plain processes.
    plain = 4 + holders
    total_bytes = workers * worker_bytes + replicas * replica_bytes + plain * PLAIN_PROCESS_BYTES
    return Need(weights_bytes, holders, total_bytes)


def room(base: Base, workers: int, replicas: int, cpu: Arithmetic, available_bytes: int) -> Room:
    """Returns what each replica gets: keys and values of one conversation at least, and the base as it computes.

    Only where that does not fit replicas hold the base as it is stored, and may answer more slowly.

    Raises:
        ClusterError: the cluster does not fit even so; with the figures, and what would fit.
    """
    usable_bytes = round(available_bytes * (1 - SPARE_SHARE))
    for as_stored in (False, True):
        rooms = (Room(tokens, as_stored) for tokens in (LEAST_KV_TOKENS, MOST_KV_TOKENS))
        least, most = (need(base, workers, replicas, cpu, each) for each in rooms)
        if least.total_bytes <= usable_bytes:
            share = min(1.0, (usable_bytes - least.total_bytes) / (most.total_bytes - least.total_bytes))
            return Room(LEAST_KV_TOKENS + int(share * (MOST_KV_TOKENS - LEAST_KV_TOKENS)), as_stored)
    raise ClusterError(
        f"the base takes {_gb(least.weights_bytes)} in each of {least.holders} processes that hold it; "
        f"with all else that is {_gb(least.total_bytes)}, and {_gb(available_bytes)} of memory are free. "
        "Take fewer --workers or --replicas, or a smaller --base"
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
