"""I2: eight adapters on eight streams against the base alone, against read bandwidth and packed GEMM.

python tests/benchmarks/inference_adapters.py BASE [--dtype bfloat16] [--runs 5] [--peer]

Base, adapters and the machine's limits take turns, run by run. `--peer` adds PEFT's mixed batch on
transformers, in this process.
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


async def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    setting, fresh = Setting.of(options.base), itertools.count()
    limits = Limits(floats(options.dtype))
    with tempfile.TemporaryDirectory() as name:
        setting.make_adapters(STREAMS, Path(name))
        modes = {"base": [""] * STREAMS, "adapters": [digest for digest, _ in setting.adapters]}
        prefill_s: dict[str, list[float]] = {mode: [] for mode in modes}
        decode: dict[str, list[float]] = {mode: [] for mode in modes}
        async with setting.engine(options, kv_tokens=2 * STREAMS * (options.context + options.answer)) as engine:
            for run in range(-1, options.runs):  # the first warms up
                limits.measure()
                for mode, worn in modes.items():
                    prompts = [setting.text_prompt(options.context, next(fresh)) for _ in range(STREAMS)]
                    started_s = time.perf_counter()
                    await streams(engine, worn, prompts, 1)
                    took_s = time.perf_counter() - started_s
                    rate = tokens_per_s(await streams(engine, worn, prompts, options.answer))  # read already
                    if run >= 0:
                        prefill_s[mode].append(took_s)
                        decode[mode].append(rate)
        print(limits)
        step_s = STREAMS / statistics.median(decode["base"])
        floor_s = setting.decode_bytes(options.dtype) / limits.read
        flop = setting.prefill_flop() * STREAMS * options.context
        prefill = {mode: [STREAMS * options.context / each for each in found] for mode, found in prefill_s.items()}
        print(f"{options.dtype}, {STREAMS} streams of {options.context} tokens, rank 16 on all decoder linears")
        for mode in modes:
            print(f"{mode:<9} decode {spread(decode[mode], 1)} tok/s, prefill {spread(prefill[mode])} tok/s")
        costs = [base / worn - 1 for base, worn in zip(decode["base"], decode["adapters"], strict=True)]
        prefill_costs = [base / worn - 1 for base, worn in zip(prefill["base"], prefill["adapters"], strict=True)]
        print(f"cost of the adapters: decode {_percent(costs)}, prefill {_percent(prefill_costs)}")
        print(f"base decode: {floor_s / step_s:.0%} of read bandwidth (a step {step_s * 1000:.0f} ms)")
        gemm_s = flop / limits.gemm
        print(f"base prefill: {gemm_s / statistics.median(prefill_s['base']):.0%} of packed GEMM")
        if options.peer:
            rate = _peft_decode(setting, options)
            ratio = statistics.median(decode["adapters"]) / rate
            print(f"PEFT mixed batch: decode {rate:.1f} tok/s, ours {ratio:.1f}x")


def _percent(costs: list[float]) -> str:
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
    parser.add_argument("--context", type=int, default=350, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=32, help="tokens that each stream decodes")
    parser.add_argument("--peer", action="store_true", help="PEFT's mixed batch too; twice the memory")
    asyncio.run(main(parser.parse_args()))
