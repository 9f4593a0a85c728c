"""Generates `veneer.*` (messages, gRPC stubs, type stubs) from `protos/` into `build/generated`.

Runs whenever the project is built or installed (`hatch_build.py`), and by hand as `make proto`.
Generated code is never committed: the contract is the `.proto` text.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
GENERATED = PROTOS.parent / "build" / "generated"


def plugin(name: str) -> str:
    """Finds a protoc plugin beside this interpreter, else on PATH (pip's build environment puts it there).

    Raises:
        FileNotFoundError: mypy-protobuf is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; it comes with mypy-protobuf")
    return found


def generate() -> None:
    """Compiles every `.proto` below `protos/`; replaces what was generated before.

    Raises:
        RuntimeError: protoc refused a file; its own message is on stderr.
    """
    from importlib.resources import files

    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "veneer").rglob("*.proto"))
    shutil.rmtree(GENERATED, ignore_errors=True)
    GENERATED.mkdir(parents=True)
    out = str(GENERATED)
    arguments = [
        "protoc",
        f"--proto_path={PROTOS}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out={out}",
        f"--mypy_grpc_out={out}",
        *(f"--plugin={name}={plugin(name)}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc refused one of {sources}")
    for folder in {GENERATED / "veneer", *(path.parent for path in GENERATED.rglob("*_pb2.py"))}:
        for package in (folder, *folder.parents):
            if package == GENERATED:
                break
            (package / "__init__.py").touch()
    (GENERATED / "veneer" / "py.typed").touch()


if __name__ == "__main__":
    generate()
