"""The whole training of the base from nothing, as `make base` runs it.

Owns the processes: they hold equal weights, and each takes its share of every batch.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from veneer_base.batches import Composer
from veneer_base.loop import Run
from veneer_base.shape import fresh_model
from veneer_base.stages import STAGES
from veneer_base.vocabulary import CompactVocabulary, choose_ids, qwen_tokenizer
from veneer_rpc.parent import die_with_parent


def train(folder: Path, *, seed: int = 0, processes: int = 2) -> None:
    """Trains in `folder`, from its checkpoint where it has one, in so many processes of one thread each."""
    os.environ |= {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as meeting:
        spawn(_train_share, (folder, seed, processes, Path(meeting) / "store"), nprocs=processes)  # type: ignore[no-untyped-call]


def _train_share(share: int, folder: Path, seed: int, processes: int, store: Path) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=share, world_size=processes)
    tokenizer = qwen_tokenizer()
    vocabulary = CompactVocabulary(tokenizer, choose_ids(tokenizer))
    run = Run(fresh_model(vocabulary, seed), Composer(vocabulary, seed), STAGES, folder)
    checkpoint = folder / "checkpoint.safetensors"
    if checkpoint.exists():
        run.load(checkpoint)
    run.train()
    dist.destroy_process_group()
