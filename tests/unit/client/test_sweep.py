"""Sweeps: which jobs an order with several values becomes, and how they are set side by side."""

import pytest
import typer

from veneer.trainer.v1.training_job_pb2 import JobState, TrainingJob
from veneer_client import compared
from veneer_client._sweep import combinations
from veneer_client.commands.train import _axes


def job(
    name: str, rank: int, rate: float, loss: float, validation: float | None, state: str = "SUCCEEDED"
) -> TrainingJob:
    made = TrainingJob(name=f"trainingJobs/{name}", state=JobState.Value(f"JOB_STATE_{state}"))
    made.spec.lora.rank, made.spec.optimizer.learning_rate, made.spec.epochs = rank, rate, 3
    made.progress.step, made.progress.loss = 6, loss
    if validation is not None:
        made.progress.validation_loss = validation
    return made


def test_every_combination_is_a_job_with_whole_numbers_where_they_belong() -> None:
    assert combinations({"rank": [8, 16.0], "learning_rate": [1e-4, 2e-4]}) == [
        {"rank": 8, "learning_rate": 1e-4},
        {"rank": 8, "learning_rate": 2e-4},
        {"rank": 16, "learning_rate": 1e-4},
        {"rank": 16, "learning_rate": 2e-4},
    ]
    assert isinstance(combinations({"rank": [8.0]})[0]["rank"], int)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"colour": [1]}, "colour cannot be swept; there are rank,"),
        ({"rank": []}, "rank has no values"),
        ({"rank": [8, 8]}, "rank has a value twice"),
        ({"rank": [8.5]}, "rank takes whole numbers"),
        ({"rank": range(1, 10), "seed": range(10)}, "these are 90 jobs; a sweep has at most 64"),
    ],
)
def test_what_is_no_sweep_is_refused(axes: dict[str, list[float]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        combinations(axes)


def test_a_comparison_shows_what_differs_and_the_best_by_validation() -> None:
    jobs = [
        job("a", 8, 1e-4, loss=0.1, validation=0.9),
        job("b", 16, 1e-4, loss=0.3, validation=0.5),
        job("c", 16, 1e-4, loss=0.01, validation=0.01, state="FAILED"),
    ]
    trials = compared(jobs)
    assert [trial.settings for trial in trials] == [{"rank": "8"}, {"rank": "16"}, {"rank": "16"}]
    assert [trial.is_best for trial in trials] == [False, True, False]


def test_without_validation_everywhere_the_training_loss_decides() -> None:
    trials = compared([job("a", 8, 1e-4, 0.1, validation=0.9), job("b", 8, 2e-4, 0.3, validation=None)])
    assert [trial.is_best for trial in trials] == [True, False]
    assert [trial.settings for trial in trials] == [{"learning rate": "0.0001"}, {"learning rate": "0.0002"}]
    assert not any(trial.is_best for trial in compared([job("a", 8, 1e-4, 0.1, None)]))  # of one there is no best
    assert compared([]) == []


def test_axes_are_written_as_people_write_them() -> None:
    assert _axes(["rank=8,16", "lr=1e-4,2e-4"]) == {"rank": [8, 16], "learning_rate": [1e-4, 2e-4]}
    assert _axes(["rank=8,16 batch-size=2"]) == {"rank": [8, 16], "batch_size": [2]}
    for wrong in ("rank", "rank=", "rank=a", "rank=8,"):
        with pytest.raises(typer.BadParameter, match="is no axis: write it like rank=8,16"):
            _axes([wrong])
    with pytest.raises(typer.BadParameter, match="learning_rate is swept twice"):
        _axes(["lr=1", "learning-rate=2"])
