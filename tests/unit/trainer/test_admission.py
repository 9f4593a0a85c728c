import dataclasses

import pytest

from veneer_base.unfold import base_directory
from veneer_rpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from veneer_rpc.names import AdapterName, DatasetVersionName, ModelName
from veneer_trainer.adapters.model_directories import ModelDirectories
from veneer_trainer.domain.adapters import AdapterVersion
from veneer_trainer.domain.admission import Admission
from veneer_trainer.domain.jobs import Contract
from veneer_trainer.domain.spec import CoTrain, Lora, OverLength, PlannedEvaluation, TrainingSpec
from veneer_trainer.domain.targets import Linear
from veneer_trainer.domain.workers import Calibration, StepCost, Worker, Workers
from veneer_trainer.ports import BaseModel, SplitFacts, VersionFacts

MODEL, VERSION = ModelName("m"), DatasetVersionName("d", "0" * 64)
SPEC = TrainingSpec(MODEL, VERSION, AdapterName("a"))
BASE = BaseModel(MODEL, "digest", 1024, 10_000, {"l.q_proj": Linear("decoder", 64, 64)})
TRAIN = SplitFacts(100, 900, 500, 100, longest_row=600)


class Catalog:
    def get(self, name: ModelName) -> BaseModel:
        return BASE

    def contract(self, name: ModelName, max_pixels: int) -> Contract:
        numbers = (4, max_pixels, 16, 2, 2)
        return Contract(f"contract-{max_pixels}", "", "", "", *numbers, "bicubic", (), (), "", "")


class Registry:
    def check_adapter(self, tenant: str, spec: TrainingSpec) -> None: ...

    def publish(self, *args: object) -> AdapterVersion:
        raise NotImplementedError


class Datasets:
    def __init__(self, facts: VersionFacts) -> None:
        self.facts = facts

    def version(self, tenant: str, name: DatasetVersionName) -> VersionFacts:
        return self.facts

    def hold(self, tenant: str, name: DatasetVersionName, holder: str) -> None: ...

    def release(self, tenant: str, name: DatasetVersionName, holder: str) -> None: ...


FACTS = VersionFacts(
    VERSION, {"train": TRAIN, "validation": SplitFacts(10), "test": SplitFacts(10)},
    "models/m", "contract-10000", ((0, 90), (256, 10), (512, 20)),
)  # fmt: skip


def admission(facts: VersionFacts = FACTS, workers: Workers | None = None) -> Admission:
    return Admission(Catalog(), Datasets(facts), Registry(), workers or Workers())


def test_rows_that_are_too_long_refuse_the_job_with_their_count_and_what_would_fit() -> None:
    with pytest.raises(FailedPrecondition, match="set max_length=600") as raised:
        admission().admit("acme", SPEC)
    assert raised.value.reason == "ROWS_TOO_LONG"
    # 20 rows of all splits are in buckets above 512; 20 of them could be of the other two splits
    assert raised.value.metadata == {"rows": "1", "longest_row_tokens": "600"}
    for better in ({"max_length": 600}, {"over_length": OverLength.SKIP}):
        admission().admit("acme", dataclasses.replace(SPEC, **better))
    long = dataclasses.replace(FACTS, histogram=((0, 20), (513, 100)))
    assert admission(long).judge("acme", SPEC).estimate.over_length_rows == 80


def test_only_jobs_that_allow_it_share_and_only_with_their_like() -> None:
    def shares(co_train: CoTrain = CoTrain.ALLOWED, targets: tuple[str, ...] = ("q_proj",), pixels: int = 9_000) -> str:
        spec = dataclasses.replace(
            SPEC, max_length=700, co_train=co_train, lora=Lora(target_modules=targets), max_pixels=pixels
        )
        return admission().admit("acme", spec).needs.shares

    assert shares(CoTrain.FORBIDDEN) == ""
    assert shares() == shares()
    assert len({shares(), shares(pixels=8_000), shares(targets=("attention",)), ""}) == 4


def test_counts_by_another_contract_do_not_count() -> None:
    for facts in (dataclasses.replace(FACTS, contract_digest="x"), dataclasses.replace(FACTS, model="models/n")):
        taken = admission(facts).admit("acme", SPEC).estimate
        assert (taken.over_length_rows, taken.total_tokens, taken.steps) == (None, None, 150)


def test_defaults_give_way_to_the_bases_bounds_and_other_values_are_refused() -> None:
    spec = dataclasses.replace(SPEC, max_length=700)
    assert admission().admit("acme", spec).spec.max_pixels == 10_000
    with pytest.raises(InvalidArgument) as raised:
        admission().admit("acme", dataclasses.replace(SPEC, max_length=2000, max_pixels=20_000))
    assert [found.field for found in raised.value.violations] == ["spec.max_length", "spec.max_pixels"]


def test_splits_are_filled_in_and_checked() -> None:
    spec = dataclasses.replace(SPEC, max_length=700, evaluations=(PlannedEvaluation("test"),))
    assert admission().admit("acme", spec).spec.validation_split == "validation"
    wrong = dataclasses.replace(
        SPEC, train_split="trian", validation_split="val", evaluations=(PlannedEvaluation("tset"),)
    )
    with pytest.raises(InvalidArgument) as raised:
        admission().admit("acme", wrong)
    assert [found.field for found in raised.value.violations] == [
        "spec.train_split", "spec.validation_split", "spec.evaluations[0].split",
    ]  # fmt: skip


def test_a_job_that_fits_nowhere_is_refused_with_the_figures() -> None:
    workers = Workers()
    costs = Calibration("digest", "float32", ("l.q_proj",), 8, StepCost(1, 0, 0, 0), StepCost(5000, 0, 0, 0))
    workers.announce(Worker("w", "cpu", "tiny", frozenset({"float32"}), 1000, {"models/m": "digest"}, (costs,)))
    spec = dataclasses.replace(SPEC, max_length=700)
    assert not admission(workers=workers).judge("acme", spec).estimate.fits
    with pytest.raises(ResourceExhausted, match="needs 5000 bytes, worker class tiny offers 1000"):
        admission(workers=workers).admit("acme", spec)


def test_a_worker_unheard_of_for_long_is_forgotten() -> None:
    now = [0.0]
    workers = Workers(memory_s=10, clock=lambda: now[0])
    workers.announce(Worker("w", "cpu", "tiny", frozenset(), 1000, {}))
    now[0] = 10.0
    assert workers.known()
    now[0] = 10.1
    assert not workers.known()


def test_a_real_directory_is_read() -> None:
    catalog = ModelDirectories({MODEL: base_directory()})
    base = catalog.get(MODEL)
    assert {linear.group for linear in base.linears.values()} == {"decoder", "merger", "vision"}
    assert all("norm" not in name and "embed" not in name for name in base.linears)
    assert base.context_length > 0
    assert catalog.contract(MODEL, 2048).digest != catalog.contract(MODEL, 4096).digest


def test_other_data_that_evaluations_are_planned_on_is_looked_at() -> None:
    other = DatasetVersionName("e", "1" * 64)
    spec = dataclasses.replace(SPEC, max_length=700, evaluations=(PlannedEvaluation("test", other),))
    admission().admit("acme", spec)
    wrong = dataclasses.replace(spec, evaluations=(PlannedEvaluation("exam", other),))
    with pytest.raises(InvalidArgument, match="has test, train, validation, not 'exam'"):
        admission().admit("acme", wrong)
