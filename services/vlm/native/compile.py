"""Compiles the C of this folder into the package, where it is of use and a compiler is at hand; torch does without."""

import logging
import platform
import shutil
import subprocess
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("attention.c", "low_rank.c", "pointwise.c", "product.c")]
LIBRARY = Path(__file__).parents[1] / "veneer_vlm" / "native_avx512.so"
# Of AVX2 the compiler makes nothing that is faster than torch. What is not a number must stay so: no -ffast-math.
_FLAGS = [
    *(
        "-std=gnu11",
        "-O3",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fopenmp",
        "-shared",
        "-fPIC",
    ),
    *("-Wall", "-Wextra", "-Wno-psabi", "-march=x86-64-v4", "-mprefer-vector-width=512"),
]


def compile_native() -> bool:
    """Makes the library anew; whether there is one. Without a compiler that takes the flags there is none."""
    LIBRARY.unlink(missing_ok=True)
    compiler = shutil.which("gcc")
    if compiler is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    command = [compiler, *_FLAGS, *map(str, SOURCES), "-lm", "-o", str(LIBRARY)]
    made = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  # nothing of it comes from outside
    if made.returncode != 0:
        logging.warning("%s is not compiled, CPUs will be slower: %s", LIBRARY.name, made.stderr.strip())
    return made.returncode == 0
