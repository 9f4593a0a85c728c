"""I2: eight adapters on eight streams against the base alone, against read bandwidth and packed GEMM.

python tests/benchmarks/inference_adapters.py BASE [--dtype bfloat16] [--runs 5] [--peer]

Base and adapters take turns every few seconds: two prompts read, then two; a quarter of the answer, then a quarter.
A cost is the median over those pairs, for the pace of shared machines swings by more than what adapters cost. The
machine's limits are measured run by run. `--peer` adds PEFT's mixed batch on transformers, in this process.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from inference_limits import DEVICE, Limits, floats, spread
from inference_load import Setting, arguments, streams, tokens_per_s

STREAMS = 8
_READ_AT_ONCE = 2  # prompts: their passes hold one adapter and two
_PIECES = 4  # of an answer


async def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    setting, fresh = Setting.of(options.base), itertools.count()
    limits = Limits(floats(options.dtype))
    with tempfile.TemporaryDirectory() as name:
        setting.make_adapters(STREAMS, Path(name))
        modes = {"base": [""] * STREAMS, "adapters": [digest for digest, _ in setting.adapters]}
        prefill: dict[str, list[float]] = {mode: [] for mode in modes}
        decode: dict[str, list[float]] = {mode: [] for mode in modes}
        async with setting.engine(options, kv_tokens=2 * STREAMS * (options.context + options.answer)) as engine:
            for run in range(-1, options.runs):  # the first warms up
                limits.measure()
                prompts = {
                    mode: [setting.text_prompt(options.context, next(fresh)) for _ in range(STREAMS)] for mode in modes
                }
                for first in range(0, STREAMS, _READ_AT_ONCE):
                    here = slice(first, first + _READ_AT_ONCE)
                    for mode, worn in modes.items():
                        started_s = time.perf_counter()
                        await streams(engine, worn[here], prompts[mode][here], 1)
                        rate = _READ_AT_ONCE * options.context / (time.perf_counter() - started_s)
                        prefill[mode] += [rate] * (run >= 0)
                for _ in range(_PIECES):
                    for mode, worn in modes.items():  # what was read already
                        rate = tokens_per_s(await streams(engine, worn, prompts[mode], options.answer // _PIECES))
                        decode[mode] += [rate] * (run >= 0)
        print(limits)
        step_s = STREAMS / statistics.median(decode["base"])
        floor_s = setting.decode_bytes(options.dtype) / limits.read
        print(f"{options.dtype}, {STREAMS} streams of {options.context} tokens, rank 16 on all decoder linears")
        for mode in modes:
            print(f"{mode:<9} decode {spread(decode[mode], 1)} tok/s, prefill {spread(prefill[mode])} tok/s")
        print(f"cost of the adapters: decode {_cost(decode)}, prefill {_cost(prefill)}")
        print(f"base decode: {floor_s / step_s:.0%} of read bandwidth (a step {step_s * 1000:.0f} ms)")
        gemm_rate = limits.gemm / setting.prefill_flop()
        print(f"base prefill: {statistics.median(prefill['base']) / gemm_rate:.0%} of packed GEMM")
        if options.peer:
            rate = _peft_decode(setting, options)
            ratio = statistics.median(decode["adapters"]) / rate
            print(f"PEFT mixed batch: decode {rate:.1f} tok/s, ours {ratio:.1f}x")


def _cost(rates: dict[str, list[float]]) -> str:
    """What adapters cost, from neighbours in time: median, and the least and greatest."""
    costs = [base / worn - 1 for base, worn in zip(rates["base"], rates["adapters"], strict=True)]
    return f"{statistics.median(costs):.1%} ({min(costs):.1%} to {max(costs):.1%})"


def _peft_decode(setting: Setting, options: argparse.Namespace) -> float:
    """Tokens a second of transformers' `generate` with PEFT's `adapter_names`, less its prefill."""
    from peft import PeftModel
    from transformers import Qwen3VLForConditionalGeneration

    dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
    model = Qwen3VLForConditionalGeneration.from_pretrained(setting.base, dtype=dtype).to(DEVICE)
    names = [f"a{number}" for number in range(STREAMS)]
    peft = PeftModel.from_pretrained(model, setting.adapters[0][1], adapter_name=names[0])
    for name, (_, directory) in zip(names[1:], setting.adapters[1:], strict=True):
        peft.load_adapter(directory, adapter_name=name)
    prompts = (torch.from_numpy(setting.text_prompt(options.context, seed).ids_T) for seed in range(STREAMS))
    ids = torch.stack(list(prompts)).to(DEVICE)
    took_s, answer = [], options.answer // 4
    for tokens in (1, 1 + answer):
        started_s = time.perf_counter()
        peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, do_sample=False,
            min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip
        took_s.append(time.perf_counter() - started_s)
    return STREAMS * answer / (took_s[1] - took_s[0])


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--context", type=int, default=337,
        help="tokens of each prompt; whole blocks and one, so that all streams of a prompt that was read begin at once",
    )  # fmt: skip
    parser.add_argument("--answer", type=int, default=32, help="tokens that each stream decodes")
    parser.add_argument("--peer", action="store_true", help="PEFT's mixed batch too; twice the memory")
    asyncio.run(main(parser.parse_args()))
