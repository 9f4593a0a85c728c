"""I1, I3 and I4: one stream against `generate`, one picture then questions, a large picture among streams.

python tests/benchmarks/inference_pictures.py BASE [--dtype bfloat16] [--runs 5] [--peer]
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import torch
from inference_limits import DEVICE, spread
from inference_load import Setting, Stream, arguments, stream, tokens_per_s

from veneer_inference.engine.client import EngineProcess

PICTURE, QUESTION, ANSWER = (32, 32), 60, 64  # patches: 256 visual tokens
MEGAPIXEL = (64, 64)  # patches of 16 pixels
STREAMS, CONTEXT, LONG_ANSWER = 8, 350, 256


async def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    setting = Setting.of(options.base)
    with tempfile.TemporaryDirectory() as name:
        setting.make_adapters(STREAMS, Path(name))
        async with setting.engine(options) as engine:
            digest = setting.adapters[0][0]
            await stream(engine, digest, setting.picture_prompt(QUESTION, 0, [PICTURE]), 2)  # warm up
            cold: list[Stream] = []
            warm: list[Stream] = []
            for run in range(1, options.runs + 1):
                seed = 1000 * run
                prompt = setting.picture_prompt(QUESTION, seed, [PICTURE], run)
                cold.append(await stream(engine, digest, prompt, ANSWER))
                again = setting.picture_prompt(QUESTION, seed + 1, [PICTURE], run)  # another question
                warm.append(await stream(engine, digest, again, 2))
            first, decode = [each.first_s for each in cold], [tokens_per_s([each]) for each in cold]
            print(f"I1 {options.dtype}: cold first token {spread(first, 2)} s, decode {spread(decode, 1)} tok/s")
            ratios = [one.first_s / other.first_s for one, other in zip(warm, cold, strict=True)]
            share = f"1/{1 / statistics.median(ratios):.1f} of cold"
            print(f"I3 warm first token {spread([each.first_s for each in warm], 2)} s = {share}")
            gaps = [await _gaps(engine, setting, run) for run in range(options.runs)]
            alone, beside = ([each[which] for each in gaps] for which in (0, 1))
            print(f"I4 longest gap of {STREAMS} streams {spread(alone, 2)} s, beside a megapixel {spread(beside, 2)} s")
        if options.peer:
            first_s, rate = _generate(setting, options)
            print(f"I1 generate: first token {first_s:.2f} s (ours {first_s / statistics.median(first):.2f}x), "
                  f"decode {rate:.1f} tok/s (ours {statistics.median(decode) / rate:.2f}x)")  # fmt: skip


async def _gaps(engine: EngineProcess, setting: Setting, run: int) -> tuple[float, float]:
    """Longest gap in streams that decode, before a large picture arrives and while it is read."""
    found = [Stream() for _ in range(STREAMS)]
    tasks = [
        asyncio.create_task(
            stream(engine, digest, setting.text_prompt(CONTEXT, 100 * run + index), LONG_ANSWER, found[index])
        )
        for index, (digest, _) in enumerate(setting.adapters)
    ]
    while min(len(each.tokens_s) for each in found) < 8:  # noqa: ASYNC110  # another process brings it about
        await asyncio.sleep(0.05)
    shown_s = time.perf_counter()
    await stream(engine, "", setting.picture_prompt(QUESTION, run, [MEGAPIXEL], 10_000 + run), 1)
    seen_s = time.perf_counter()
    await asyncio.gather(*tasks)
    began_s = max(each.tokens_s[0] for each in found)
    alone_s = max(each.longest_gap_s(began_s, shown_s) for each in found)
    return alone_s, max(each.longest_gap_s(shown_s, seen_s) for each in found)


def _generate(setting: Setting, options: argparse.Namespace) -> tuple[float, float]:
    """Time to first token and tokens a second of transformers' `generate` with one adapter of PEFT's."""
    from peft import PeftModel
    from transformers import Qwen3VLForConditionalGeneration

    dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
    model = Qwen3VLForConditionalGeneration.from_pretrained(setting.base, dtype=dtype).to(DEVICE)
    peft = PeftModel.from_pretrained(model, setting.adapters[0][1])
    prompt = setting.picture_prompt(QUESTION, 1, [PICTURE], 1)
    ids = torch.from_numpy(prompt.ids_T)[None].to(DEVICE)
    took_s = []
    for tokens in (1, 1, ANSWER):  # the first warms up
        started_s = time.perf_counter()
        peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == setting.config.image_token_id).int(),
            pixel_values=torch.from_numpy(prompt.patches_N_P).to(DEVICE, dtype),
            image_grid_thw=torch.from_numpy(prompt.grids_n_3).to(DEVICE), do_sample=False, min_new_tokens=tokens,
            max_new_tokens=tokens,
        )  # fmt: skip
        took_s.append(time.perf_counter() - started_s)
    return took_s[1], (ANSWER - 1) / (took_s[2] - took_s[1])


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--peer", action="store_true", help="transformers and PEFT too; twice the memory")
    asyncio.run(main(parser.parse_args()))
