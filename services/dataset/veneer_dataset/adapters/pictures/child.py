"""The decoding child: `python -m veneer_dataset.adapters.pictures.child MEMORY_BYTES CPU_S`.

Reads jobs from its standard input and writes outcomes to its standard output until that ends. Memory is bound
once, CPU time anew for each picture; the kernel ends a child that exceeds it. It opens nothing, not even a module:
what Pillow imports only when a file asks for it is imported before. (It reads EXIF by its TIFF plugin. Without that
it would refuse a turned JPEG, and not turn a PNG.)
"""

import importlib
import resource
import sys
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from veneer_dataset.adapters.pictures.frames import Job, Outcome, receive, send
from veneer_processing import PictureError, PictureTooLargeError, PixelBounds, decode_image
from veneer_processing.pixels import PixelSettings
from veneer_rpc.parent import die_with_parent

_HASH_SIZE = (9, 8)
_ON_DEMAND = ("PIL.ImageOps", "PIL.ImagePalette", "PIL.MpoImagePlugin", "PIL.TiffImagePlugin")


def main(memory_bytes: int, cpu_s: int, jobs: IO[bytes], outcomes: IO[bytes]) -> None:
    """Works until there are no more jobs."""
    die_with_parent()
    prepare()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    while True:
        try:
            job, data = receive(jobs, Job)
        except EOFError:
            return
        usage = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + cpu_s, resource.RLIM_INFINITY))
        outcome, rgb = _work(job, data)
        send(outcomes, outcome, b"" if rgb is None else rgb.tobytes())


def prepare() -> None:
    """Imports all that decoding may need."""
    for module in _ON_DEMAND:
        importlib.import_module(module)


def _work(job: Job, data: bytes) -> tuple[Outcome, NDArray[np.uint8] | None]:
    try:
        image = decode_image(data)
        if job.pixels is None:
            return Outcome(image.width, image.height, _perceptual_hash(image)), None
        rgb = _settings(job.pixels).resize_image(image)
        return Outcome(rgb.shape[1], rgb.shape[0]), rgb
    except PictureTooLargeError as error:
        return Outcome(code="PICTURE_OVER_LIMIT", found=str(error)), None
    except PictureError as error:
        # Within limits a decoder that asks for more memory than there is has met a picture that lies.
        return Outcome(code="PICTURE_BROKEN", found=str(error)), None
    except MemoryError:
        return Outcome(code="PICTURE_OVER_LIMIT", found="more memory than a decoder may take"), None


def _settings(pixels: tuple[int, int, int, int, int]) -> PixelSettings:
    least, most, patch, merge, temporal = pixels
    # Normalisation comes after the resize, which does not look at it.
    return PixelSettings(PixelBounds(least, most), patch, merge, temporal, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _perceptual_hash(image: Image.Image) -> int:
    """See PictureFacts."""
    grey = image.convert("L").resize(_HASH_SIZE, Image.Resampling.BOX)
    samples_8_9 = np.asarray(grey)
    bits = np.packbits(samples_8_9[:, 1:] > samples_8_9[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
