"""The launcher's table of flags against what each program says of itself."""

import importlib.util
import re
import subprocess
import sys

import pytest

from veneer_cluster.programs import FLAGS


def can_run(module: str) -> bool:
    try:
        found = importlib.util.find_spec(module)
        inside = found is not None and found.submodule_search_locations is not None
        return found is not None and (not inside or importlib.util.find_spec(f"{module}.__main__") is not None)
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("module", FLAGS)
def test_every_flag_is_known_to_its_program(module: str) -> None:
    if not can_run(module):
        pytest.skip(f"{module} is not installed")
    command = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    known = set(re.findall(r"--([a-z][a-z0-9-]*)", shown))
    assert set(FLAGS[module]) <= known
