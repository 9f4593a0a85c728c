"""What the jobs of one process share: the base, features of pictures, and rows."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakValueDictionary

import torch

from veneer.dataset.v1 import dataset_pb2
from veneer.trainer.v1 import training_job_pb2
from veneer_processing import ProcessingContract, Processor
from veneer_trainer.worker.loop.base import load_base
from veneer_trainer.worker.loop.dataset import Dataset
from veneer_trainer.worker.loop.feature_files import FeatureFiles, depends_on
from veneer_trainer.worker.loop.features import FrozenFeatures
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.ranks import ALONE, Ranks
from veneer_trainer.worker.loop.rows import LengthRule, Split
from veneer_trainer.worker.messages import Task
from veneer_trainer.worker.refusal import Refused
from veneer_vlm.model import VisionLanguageModel


class Common:
    """Made for the first job; the others are of the same tenant, base, targets and pixel bound.

    Args:
        task: the first job's.
        ranks: who trains them together.
    """

    def __init__(self, task: Task, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self._task = task
        self._model: VisionLanguageModel | None = None
        self._features: FrozenFeatures | None = None
        self._splits: WeakValueDictionary[tuple[str, str, LengthRule], Split] = WeakValueDictionary()

    def model(self, dtype: torch.dtype) -> VisionLanguageModel:
        """Returns the base.

        Raises:
            Refused: it is there in another dtype.
            VeneerError, RefusedError: it cannot be read.
        """
        if self._model is None:
            self._model = load_base(Path(self._task.model_directory), dtype, self._task.device)
        if self._model.dtype is not dtype:
            text = f"the jobs that are trained here are in {self._model.dtype}, this one goes on in {dtype}"
            raise Refused("DTYPE_DIFFERS", text, transient=True)
        return self._model

    def features(self, plan: Plan, contract: ProcessingContract) -> FrozenFeatures | None:
        """Returns the pictures' features; None where the tower is trained."""
        if plan.trains_tower:
            return None
        if self._features is None:
            task, model = self._task, self.model(plan.dtype)
            about = depends_on(model.visual, task.tenant, contract.digest, plan.numerics(task.threads))
            folder = Path(task.feature_folder)  # which one process uses at a time
            files = FeatureFiles(
                folder if self.ranks.leads else folder / f"rank-{self.ranks.rank}", task.feature_disk_bytes
            )
            self._features = FrozenFeatures(model, task.cache_bytes, files, about)
        return self._features

    def split(
        self,
        dataset: Dataset,
        processor: Processor,
        facts: dataset_pb2.DatasetVersion,
        spec: training_job_pb2.TrainingSpec,
        name: str,
    ) -> Split:
        """Returns a split loaded under the spec's rule for long rows; raises Refused."""
        rows = {each.split: each for each in facts.splits}
        if name not in rows:
            raise Refused("SPLIT_UNKNOWN", f"{spec.dataset_version} has {', '.join(sorted(rows))}, not {name!r}")
        counted = rows[name].HasField("tokens") and facts.report.contract_digest == processor.contract.digest
        rule = LengthRule(spec.max_length, spec.over_length == training_job_pb2.OVER_LENGTH_SKIP)
        key = (spec.dataset_version, name, rule)
        split = self._splits.get(key)
        if split is None:
            room_bytes = self._task.cache_bytes - sum(each.size_bytes for each in self._splits.values())
            split = Split(dataset, processor, name, rows[name].row_count, rule, max(room_bytes, 0))
            split.load(lengths_known=counted and rows[name].tokens.longest_row <= spec.max_length)
            self._splits[key] = split
        return split
