"""Compiles the C of this folder into the package, where it is of use and a compiler is at hand; torch does without."""

import logging
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_PACKAGE = _HERE.parent / "veneer_vlm"
# What is not a number must stay so: no -ffast-math.
_FLAGS = [
    *("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared"),
    *("-fPIC", "-Wall", "-Wextra", "-Wno-psabi"),
]


@dataclass(frozen=True)
class Library:
    """What is compiled for one kind of CPU; the package loads the one that its own can run.

    Attributes:
        file: in the package.
        flags: of the compiler.
        products: the sources of products with the base's weights, of which each kind has its own.
    """

    file: Path
    flags: tuple[str, ...]
    products: str

    @property
    def sources(self) -> list[Path]:
        """Of C, all of them."""
        return [_HERE / name for name in ("attention.c", "low_rank.c", "pointwise.c", self.products)]


LIBRARIES = (
    Library(_PACKAGE / "native_avx512.so", ("-march=x86-64-v4", "-mprefer-vector-width=512"), "product.c"),
    Library(_PACKAGE / "native_avx2.so", ("-march=x86-64-v3",), "product_float.c"),
)


def compile_native() -> list[Path]:
    """Makes the libraries anew; returns their files. Without a compiler that takes the flags there are none."""
    for library in LIBRARIES:
        library.file.unlink(missing_ok=True)
    compiler = shutil.which("gcc")
    if compiler is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return []
    return [library.file for library in LIBRARIES if _compiled(compiler, library)]


def _compiled(compiler: str, library: Library) -> bool:
    command = [compiler, *_FLAGS, *library.flags, *map(str, library.sources), "-lm", "-o", str(library.file)]
    made = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  # nothing of it comes from outside
    if made.returncode != 0:
        logging.warning("%s is not compiled, CPUs will be slower: %s", library.file.name, made.stderr.strip())
    return made.returncode == 0
