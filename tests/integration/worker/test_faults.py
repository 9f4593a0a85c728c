"""Exact resume: a job killed with SIGKILL at named points, and resumed, gives the adapter of the undisturbed run."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from .conftest import LONG, Cluster

pytestmark = pytest.mark.timeout(300)  # a process that loads torch takes long on a machine that is busy

SHORT = ["step.gradients:4", "checkpoint.half:10", "adapter.written:1"]
# Twenty in all; a job in which the third child in a row died without a checkpoint would be buried.
CAMPAIGN = [
    ["rows.loaded:1", "step.gradients:7", "checkpoint.made:13", "adapter.written:1"],
    ["step.gradients:1", "checkpoint.half:5", "validation.done:1", "step.moved:19"],
    ["step.moved:1", "checkpoint.made:3", "step.gradients:12", "validation.done:3"],
    ["checkpoint.half:1", "step.moved:4", "checkpoint.half:10", "step.gradients:20"],
    ["checkpoint.made:1", "step.gradients:2", "step.moved:9", "checkpoint.made:19"],
]


def killed_at(cluster: Cluster, version: str, points: Sequence[str], counts: Path) -> tuple[str, set[str]]:
    """Kills a job's child once at each point; whichever of two workers is free resumes.

    Returns the digest of what was published, and the workers that took part.
    """
    name = "killed-" + points[0].replace(".", "-").replace(":", "-")
    failpoints = ",".join("=kill:".join(point.split(":")) for point in points)
    variables = {"VENEER_FAILPOINTS": failpoints, "VENEER_FAILPOINT_COUNTS": str(counts)}
    workers = [cluster.worker(f"{name}-{index}", variables) for index in range(2)]
    try:
        job = cluster.ended(cluster.create(version, name, **LONG), 280)
    finally:
        for worker in workers:
            worker.close()
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
@pytest.mark.parametrize("points", CAMPAIGN, ids=lambda points: points[0])
def test_a_job_killed_at_any_of_twenty_points_resumes_to_the_byte(
    cluster: Cluster, version: str, undisturbed: str, tmp_path: Path, points: list[str]
) -> None:
    digest, _ = killed_at(cluster, version, points, tmp_path)
    assert digest == undisturbed
