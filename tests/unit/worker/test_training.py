"""What is said of a training process that died."""

import pytest

from veneer_trainer.worker.training import _death


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (-9, "ended by SIGKILL after step 3: it was killed, perhaps because memory ran out"),
        (137, "ended by SIGKILL after step 3: it was killed, perhaps because memory ran out"),
        (-11, "ended by SIGSEGV after step 3"),
        (1, "ended with status 1 after step 3"),
        (255, "ended with status 255 after step 3"),
    ],
)
def test_a_death_is_told_by_its_signal_or_its_status(status: int, said: str) -> None:
    assert _death(status, 3) == f"the training process {said}"
