"""What training jobs, evaluations and exports have in common: states, an end, and a success or a failure."""

from collections.abc import AsyncIterator
from typing import TypeVar

from veneer.trainer.v1.evaluation_pb2 import Evaluation
from veneer.trainer.v1.export_pb2 import Export
from veneer.trainer.v1.training_job_pb2 import JobState, TrainingJob
from veneer_client._errors import Internal, WorkFailed

_W = TypeVar("_W", TrainingJob, Evaluation, Export)


def state_name(state: JobState.ValueType) -> str:
    """What people call a state: `running`, `dead lettered`."""
    return JobState.Name(state).removeprefix("JOB_STATE_").replace("_", " ").lower()


def succeeded(work: _W) -> _W:
    """Returns work that succeeded.

    Raises:
        WorkFailed: it ended in another way, or has not ended.
    """
    if work.state != JobState.JOB_STATE_SUCCEEDED:
        why = f": {work.failure.message} ({work.failure.reason})" if work.HasField("failure") else ""
        raise WorkFailed(work, f"{work.name} is {state_name(work.state)}{why}")
    return work


async def last(snapshots: AsyncIterator[_W]) -> _W:
    """Returns the last snapshot of something watched."""
    final = None
    async for snapshot in snapshots:
        final = snapshot
    if final is None:
        raise Internal("NO_SNAPSHOT", "the service ended the watch without a snapshot")
    return final
