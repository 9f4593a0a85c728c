"""I5: 200 adapters, 16 slots, asked for by Zipf's law, against as many slots as adapters.

python tests/benchmarks/inference_slots.py BASE [--adapters 200] [--slots 16] [--requests 200]
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from inference_limits import spread
from inference_load import Setting, Stream, arguments, stream

from veneer_inference.engine.client import EngineProcess

AT_ONCE, CONTEXT, ANSWER = 8, 64, 16
TARGETS = ("q_proj", "v_proj")


async def main(options: argparse.Namespace) -> None:
    setting = Setting.of(options.base)
    weights = 1 / np.arange(1, options.adapters + 1)
    chosen = np.random.default_rng(0).choice(options.adapters, options.requests, p=weights / weights.sum())
    results: dict[int, list[tuple[float, float]]] = {options.slots: [], options.adapters: []}
    swaps_s: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        setting.make_adapters(options.adapters, Path(name), TARGETS)
        for run in range(options.runs):
            for slots, found in results.items():
                async with setting.engine(options, slots=slots, adapter_bytes=1 << 34) as engine:
                    found.append(await _serve(engine, setting, chosen, run))
                    if slots == options.slots:
                        swaps_s.append(await _swap_s(engine, setting, slots))
    few, all_resident = results[options.slots], results[options.adapters]
    rates = [one[0] / other[0] for one, other in zip(few, all_resident, strict=True)]
    tails = [one[1] / other[1] for one, other in zip(few, all_resident, strict=True)]
    print(f"{options.adapters} adapters, {options.slots} slots, {AT_ONCE} at once, {options.requests} requests")
    print(f"throughput of all resident: {spread([100 * each for each in rates])} %, p99 {spread(tails, 2)}x")
    print(f"a warm swap adds {spread([1000 * each for each in swaps_s], 1)} ms to a first token")


async def _serve(engine: EngineProcess, setting: Setting, chosen: np.ndarray, run: int) -> tuple[float, float]:
    """Requests a second, and the 99th percentile of their time."""
    left = iter(enumerate(chosen))
    took_s: list[float] = []

    async def ask_on() -> None:
        for index, adapter in left:
            prompt = setting.text_prompt(CONTEXT, 1000 * run + index)
            found: Stream = await stream(engine, setting.adapters[adapter][0], prompt, ANSWER)
            took_s.append(found.tokens_s[-1] - found.asked_s)

    started_s = time.perf_counter()
    await asyncio.gather(*(ask_on() for _ in range(AT_ONCE)))
    return len(chosen) / (time.perf_counter() - started_s), float(np.percentile(took_s, 99))


async def _swap_s(engine: EngineProcess, setting: Setting, slots: int) -> float:
    """What a first token takes longer when its adapter must enter a slot."""
    resident, swapped = [], []
    for index in range(12):
        adapter = setting.adapters[index % (2 * slots)][0]
        for times in (swapped, resident):  # the second time it is in its slot
            times.append((await stream(engine, adapter, setting.text_prompt(CONTEXT, 5000 + index), 1)).first_s)
        for other, _ in setting.adapters[slots : 2 * slots]:
            await stream(engine, other, setting.text_prompt(1, 1), 1)  # takes its slot away
    return statistics.median(swapped) - statistics.median(resident)


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    asyncio.run(main(parser.parse_args()))
