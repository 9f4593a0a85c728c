"""What is made before the project is built or installed: the contract's code, and the libraries of a few lines of C."""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_ROOT = Path(__file__).parent
sys.path[:0] = [str(_ROOT / "protos"), str(_ROOT / "services" / "vlm" / "native")]

from compile import compile_native  # noqa: E402  # from the folders above
from generate import generate  # noqa: E402


class Hook(BuildHookInterface[Any]):
    """Hatchling calls this before it collects the files of a wheel or an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Makes both; a wheel that has the libraries in it is for this platform alone."""
        generate()
        if made := compile_native():
            build_data["artifacts"] += [str(file.relative_to(_ROOT)) for file in made]
            build_data["pure_python"], build_data["infer_tag"] = False, True
