"""Pictures decoded and resized by the pool of children, against plain Pillow in one loop on one core.

python tests/benchmarks/dataset_pictures.py [PICTURES]
"""

import io
import os
import statistics
import sys
import time

import numpy as np
from PIL import Image

from veneer_dataset.adapters.pictures.frames import Job
from veneer_dataset.adapters.pictures.pool import PicturePool

RUNS = 5
BOUND = 448 * 448


def main(count: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    files = [out.getvalue()] * count
    pool = PicturePool(os.cpu_count() or 1, 4 << 30, 20, 60)
    job = Job((65_536, BOUND, 16, 2, 2))
    list(pool.map(lambda data: pool.run(job, data), files[:4]))  # so that children are there
    own, plain = [], []
    for _ in range(RUNS):
        start_s = time.perf_counter()
        for outcome, _ in pool.map(lambda data: pool.run(job, data), files):
            size = (outcome.width, outcome.height)
        own.append(count / (time.perf_counter() - start_s))
        start_s = time.perf_counter()
        for data in files:
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.BICUBIC))
        plain.append(count / (time.perf_counter() - start_s))
    pool.close()
    ratio = statistics.median(own) / statistics.median(plain)
    print(f"pool {statistics.median(own):.0f}/s, plain loop {statistics.median(plain):.0f}/s: {ratio:.2f}x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
