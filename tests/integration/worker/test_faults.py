"""Exact resume: a job killed with SIGKILL at named points, and resumed, gives the adapter of the undisturbed run."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from .conftest import LONG, Cluster, Process

pytestmark = pytest.mark.timeout(300)  # a process that loads torch takes long on a machine that is busy

SHORT = ["step.gradients:7", "checkpoint.half:20", "adapter.written:1"]
POINTS = [
    "rows.loaded:1",
    *(f"step.gradients:{nth}" for nth in (1, 2, 13, 23, 40)),
    *(f"step.moved:{nth}" for nth in (1, 5, 17, 31, 39)),
    *(f"checkpoint.half:{nth}" for nth in (1, 2, 19)),
    *(f"checkpoint.made:{nth}" for nth in (1, 3, 39)),
    *(f"validation.done:{nth}" for nth in (1, 3)),
    "adapter.written:1",
]


class Pair:
    """Two workers whose children die once at each of some points; whichever is free resumes."""

    def __init__(self, cluster: Cluster, name: str, points: Sequence[str], counts: Path) -> None:
        places = (point.split(":") for point in points)
        failpoints = ",".join(f"{place}=kill:{nth}" for place, nth in places)
        variables = {"VENEER_FAILPOINTS": failpoints, "VENEER_FAILPOINT_COUNTS": str(counts)}
        self.workers: list[Process] = [cluster.worker(f"{name}-{index}", variables) for index in range(2)]

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()


def killed_at(cluster: Cluster, version: str, points: Sequence[str], counts: Path) -> tuple[str, set[str]]:
    """The digest of a job that was killed once at each point, and the workers that took part."""
    name = "killed-" + points[0].replace(".", "-").replace(":", "-")
    with Pair(cluster, name, points, counts):
        job = cluster.ended(cluster.create(version, name, **LONG))
    assert job.adapter_version, job.failure
    assert [each.failure.reason for each in job.attempts] == [*["PROCESS_DIED"] * len(points), ""]
    (digest,) = cluster.digests(job.name)
    return digest, {attempt.worker for attempt in job.attempts}


def test_a_job_killed_at_three_points_resumes_to_the_byte(
    cluster: Cluster, version: str, undisturbed: str, tmp_path: Path
) -> None:
    digest, workers = killed_at(cluster, version, SHORT, tmp_path)
    assert digest == undisturbed
    assert len(workers) == 2  # resumed on another one, too


@pytest.mark.e2e_long
@pytest.mark.parametrize("point", POINTS)
def test_a_job_killed_at_any_point_resumes_to_the_byte(
    cluster: Cluster, version: str, undisturbed: str, tmp_path: Path, point: str
) -> None:
    digest, _ = killed_at(cluster, version, [point], tmp_path)
    assert digest == undisturbed
