"""The folder for versions in the making: what a process that died left there is of no use to the next."""

import shutil
from pathlib import Path


def emptied(folder: Path) -> Path:
    """Makes the folder, or empties it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
