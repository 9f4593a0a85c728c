"""The dataset service's memory hardly grows with a version's rows; the benchmark does the same with a million."""

import runpy
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e_long, pytest.mark.timeout(600)]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "dataset_memory.py"
ROWS = 100_000
BYTES_A_ROW = 400  # so that a million rows stay within 500 MB


def test_a_version_of_many_rows_takes_few_bytes_for_each() -> None:
    measure = runpy.run_path(str(BENCHMARK))["measure"]
    less, more = measure(ROWS // 2, 1), measure(ROWS, 2)
    for name in ("made_bytes", "read_bytes"):
        taken = [getattr(peaks, name) - peaks.idle_bytes for peaks in (less, more)]  # an idle process differs too
        grown = taken[1] - taken[0]
        assert grown < (ROWS - ROWS // 2) * BYTES_A_ROW, f"{name}: {less} {more}"
