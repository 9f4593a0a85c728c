"""Every form of an export beside torch with the adapter: size, tokens a second, logits, and memory.

    python tests/benchmarks/exports.py [--base DIR] [--prompts N] [--threads N] [--forms merged-float32,onnx-int8,…]

The adapter is random (q_proj and v_proj, rank 8) on the demonstration base, or on DIR; prompts are drawings. A form is
written and asked in a process of its own, as a worker does.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORMS = "merged-float32,merged-bfloat16,onnx-float32,onnx-int8,openvino-float32,openvino-int8"


def measure(base: Path, form: str, prompts: int, threads: int) -> dict[str, Any]:
    """Writes one form and compares it; runs in a child."""
    import gc

    import torch

    from veneer_processing import PixelBounds, Processor
    from veneer_trainer.worker.exporting import run
    from veneer_trainer.worker.exporting.answering import TorchAnswering
    from veneer_trainer.worker.exporting.comparison import Comparison
    from veneer_trainer.worker.exporting.prompts import drawn
    from veneer_vlm.config import ModelConfig
    from veneer_vlm.lora import Adapter, AdapterConfig
    from veneer_vlm.weights import load

    torch.set_num_threads(threads)
    kind, dtype = form.split("-")
    config, processor = ModelConfig.from_directory(base), Processor.load(base, "")
    adapter = Adapter.new(config, AdapterConfig(), 0)
    for pair in adapter.pairs.values():
        pair.b_O_R.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    contract = processor.contract
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began_s = time.perf_counter()
        bounds = PixelBounds(contract.min_pixels, contract.max_pixels)
        opened = run.write_form(kind, dtype, base, adapter, bounds, folder / "export", threads)
        written_s, written_kb = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        asked = [*drawn(prompts, processor)]
        stop_ids = {processor.special.im_end}
        comparison = Comparison(asked, processor, stop_ids, config.image_token_id, folder, lambda done: None)
        reference = comparison.reference(TorchAnswering(load(base), adapter))
        gc.collect()
        report = comparison.report(reference, comparison.export(opened(), reference))
        size_bytes = sum(path.stat().st_size for path in (folder / "export").rglob("*") if path.is_file())
    return report | {
        "form": form,
        "size_mb": round(size_bytes / 1e6, 1),
        "write_s": round(written_s, 1),
        "write_peak_mb": written_kb // 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forms", default=FORMS)
    options = parser.parse_args()
    base = options.base
    if base is None:
        from veneer_base.unfold import base_directory

        base = base_directory()
    print("| form | MB | written in s | peak MB | equal answers | logits within | tokens/s | torch with adapter |")
    print("|---|---|---|---|---|---|---|---|")
    for form in options.forms.split(","):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (base, form, options.prompts, options.threads))
        rate = found["tokens_per_second"]
        equal = found["answers_identical"] + found["answers_within_tie"]
        print(
            f"| {form} | {found['size_mb']} | {found['write_s']} "
            f"| {found['write_peak_mb']} writing, {found['peak_mb']} "
            f"| {equal} of {found['prompts']} | {found['greatest_logit_difference']:.2g} "
            f"| {rate['export']} | {rate['adapter']} |",
            flush=True,
        )
        print(json.dumps(found), file=sys.stderr)


if __name__ == "__main__":
    main()
