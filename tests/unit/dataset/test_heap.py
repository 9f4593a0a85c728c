"""Memory that is used again and again comes from the kernel once."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from veneer_dataset.adapters.heap import keep_freed_memory

keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        kept = [b"".join([bytes([1]) * 50_000 for _ in range(20)]) for _ in range(3)]
        del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_mib_that_was_freed_is_not_asked_for_again() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True)
    assert int(run.stdout) < 300  # without it tens of thousands
