"""T1: one LoRA job's steps, ours against a tuned loop on transformers and PEFT; interleaved in one run.

    veneer base random --shape qwen3-vl-2b --out DIR
    python tests/benchmarks/training.py DIR [--dtype bfloat16|float32] [--device cpu|cuda] [--rows 4]

Same weights, rank and targets (r = 16 on all linears of the decoder), pictures, rows, precision, optimiser and threads.
The peer is tuned: its vision features are its own business, so it computes them each step, but without a graph; no
gradient checkpointing, SDPA, rows of one length in one batch without padding, logits of every position as it makes
them. A step is `--rows` rows. Ours runs with cold features in the first epoch and with kept ones in the others; the
figure of a job of three epochs is the mean over them. Each side's peak memory is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from veneer.trainer.v1 import training_job_pb2
from veneer_processing import Conversation, Message, Picture, Text
from veneer_trainer.worker.loop.base import load_base
from veneer_trainer.worker.loop.batches import Batches
from veneer_trainer.worker.loop.features import FrozenFeatures
from veneer_trainer.worker.loop.gauges import peak_memory_bytes, reset_peak_memory
from veneer_trainer.worker.loop.learner import Learner
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.rows import Row
from veneer_trainer.worker.loop.run import processor_under
from veneer_trainer.worker.loop.state import State
from veneer_vlm.config import ModelConfig

SIDE = 448  # pixels: 196 visual tokens
PROMPT_WORDS, ANSWER_WORDS = 50, 72
EPOCHS = 3
RATE = 1e-4
PIXELS = SIDE * SIDE


def spec(rows: int, dtype: str) -> training_job_pb2.TrainingSpec:
    return training_job_pb2.TrainingSpec(
        model="models/bench", epochs=EPOCHS, batch_size=rows, gradient_accumulation=1, max_length=1024,
        max_pixels=PIXELS, dtype=f"DTYPE_{dtype.upper()}",
        lora={"rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": ["decoder"]},
        optimizer={"learning_rate": RATE, "beta1": 0.9, "beta2": 0.999, "max_gradient_norm": 1.0},
    )  # fmt: skip


def encoded_rows(directory: Path, count: int) -> list[Row]:
    processor = processor_under(directory, "0" * 64, PIXELS)
    rows = []
    for number in range(count):
        rgb = np.random.default_rng(number).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
        picture = Picture.resized(hashlib.sha256(rgb.tobytes()).hexdigest(), rgb)
        prompt, answer = " word" * PROMPT_WORDS, " word" * ANSWER_WORDS
        conversation = Conversation((Message("user", (picture, Text(prompt))), Message("assistant", (Text(answer),))))
        rows.append(Row(processor.encode(conversation, with_patches=False), (picture,)))
    return rows


class Ours:
    """The worker's own step."""

    def __init__(self, directory: Path, dtype: str, device: str, rows: int) -> None:
        config = ModelConfig.from_directory(directory)
        self.plan = Plan.of(spec(rows, dtype), config, device=device)
        self.model = load_base(directory, self.plan.dtype, device)
        self.state = State.fresh(config, self.plan)
        self.processor = processor_under(directory, "0" * 64, PIXELS)
        self.rows = encoded_rows(directory, rows)
        self.warm = FrozenFeatures(self.model, 1 << 30)
        self.learner = Learner(self.model, self.state, self.plan, self.warm)

    def step(self, features: FrozenFeatures) -> float:
        batch = Batches(self.processor, self.plan, features.known).step(self.rows)
        self.learner.features = features
        began_s = time.perf_counter()
        self.learner.learn(batch, RATE)
        settle(self.plan.device)
        return time.perf_counter() - began_s

    def run(self) -> dict[str, float]:
        cold_s = self.step(FrozenFeatures(self.model, 0))
        first = self.state.figures.loss
        if not self.warm.known(self.rows[0].pictures[0].sha256):
            self.step(self.warm)
        warm_s = self.step(self.warm)
        return {"seconds": (cold_s + (EPOCHS - 1) * warm_s) / EPOCHS, "cold": cold_s, "warm": warm_s, "loss": first}


class Peer:
    """transformers and PEFT."""

    def __init__(self, directory: Path, dtype: str, device: str, rows: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen3VLForConditionalGeneration

        base = Qwen3VLForConditionalGeneration.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).to(device)
        names = Plan.of(spec(rows, dtype), ModelConfig.from_directory(directory)).target_modules
        base.model.visual.requires_grad_(False)
        self.model: Any = get_peft_model(
            base, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(names), bias="none")
        )
        self.model.train()
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.weights = weights
        self.optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0, fused=True)
        encoded = encoded_rows(directory, rows)
        processor = processor_under(directory, "0" * 64, PIXELS)
        ids = torch.from_numpy(np.stack([row.encoded.ids_T for row in encoded]))
        supervised = torch.from_numpy(np.stack([row.encoded.supervised_T for row in encoded]))
        self.device = device
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == base.config.image_token_id).int(),
            "pixel_values": torch.from_numpy(
                np.concatenate([processor.patches(picture) for row in encoded for picture in row.pictures])
            ).to(getattr(torch, dtype)),
            "image_grid_thw": torch.from_numpy(np.concatenate([row.encoded.grids_n_3 for row in encoded])),
            "labels": torch.where(supervised, ids, -100),
        }
        self.batch = {name: values.to(device) for name, values in batch.items()}

    def run(self) -> dict[str, float]:
        began_s = time.perf_counter()
        loss = self.model(**self.batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        settle(self.device)
        return {"seconds": time.perf_counter() - began_s, "loss": loss.item()}


def settle(device: str) -> None:
    """Waits for a device that works on after it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def serve(side: str, directory: Path, dtype: str, device: str, rows: int, threads: int, connection: Connection) -> None:
    """A side's process: makes a step whenever it is asked."""
    torch.set_num_threads(threads)
    kind = Ours if side == "ours" else Peer
    trained = kind(directory, dtype, device, rows)
    reset_peak_memory(device)
    connection.send(None)
    while connection.recv():
        connection.send(trained.run() | {"peak_bytes": float(peak_memory_bytes(device))})


class Side:
    """A side's process, from this end."""

    def __init__(self, name: str, told: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        arguments = (name, told.directory, told.dtype, told.device, told.rows, told.threads, there)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        there.close()  # so that a side that cannot begin is heard
        self._connection.recv()

    def run(self) -> dict[str, float]:
        self._connection.send(True)
        figures: dict[str, float] = self._connection.recv()
        return figures

    def stop(self) -> None:
        self._connection.send(False)
        self._process.join()


def measured(told: argparse.Namespace, tokens: int) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    """Figures of each side's runs, in turns, after one that warms up and has its first loss; and the GEMM's rates."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", "peer")}
    rates = []
    if told.apart:
        for _ in range(told.runs):
            rates.append(gemm_rate(told.directory, told.dtype, told.device, tokens))
            for name, figures in found.items():
                side = Side(name, told)
                first = side.run()
                figures.append(side.run() | {"loss": first["loss"]})
                side.stop()
        return found, rates
    sides = {name: Side(name, told) for name in found}
    first_losses = {name: side.run()["loss"] for name, side in sides.items()}
    for _ in range(told.runs):
        rates.append(gemm_rate(told.directory, told.dtype, told.device, tokens))
        for name, side in sides.items():
            found[name].append(side.run() | {"loss": first_losses[name]})
    for side in sides.values():
        side.stop()
    return found, rates


def gemm_rate(directory: Path, dtype: str, device: str, tokens: int) -> float:
    """FLOP/s of the decoder's forward products at this many tokens, weights packed once where oneDNN packs them."""
    text = ModelConfig.from_directory(directory).text
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    shapes = [
        (text.hidden_size, queries + 2 * keys), (queries, text.hidden_size),
        (text.hidden_size, 2 * text.intermediate_size), (text.intermediate_size, text.hidden_size),
    ]  # fmt: skip
    products: list[Callable[[], object]] = []
    kind = getattr(torch, dtype)
    for inputs, outputs in shapes:
        x, weight = (torch.randn(rows, inputs, device=device).to(kind) for rows in (tokens, outputs))
        if device != "cpu":
            products.append(lambda x=x, weight=weight: F.linear(x, weight))  # type: ignore[misc]
            continue
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
        products.append(
            lambda x=x, packed=packed: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")  # type: ignore[misc]
        )
    seconds = []
    for _ in range(3):
        began_s = time.perf_counter()
        for product in products:
            product()
        settle(device)
        seconds.append(time.perf_counter() - began_s)
    return float(2 * tokens * sum(inputs * outputs for inputs, outputs in shapes) / min(seconds))


def flops_of_a_step(directory: Path, tokens: int) -> float:
    """Forward and backward through the decoder's frozen linears, with no gradient of a weight."""
    text = ModelConfig.from_directory(directory).text
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    weights = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size) * text.num_hidden_layers
    return 4.0 * weights * tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--apart", action="store_true", help="one side in memory at a time, loaded for each run")
    parser.add_argument("--json", action="store_true")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    tokens = told.rows * len(encoded_rows(told.directory, 1)[0].encoded.ids_T)
    found, rates = measured(told, tokens)
    ours, peer = found["ours"], found["peer"]
    ratios = [theirs["seconds"] / own["seconds"] for own, theirs in zip(ours, peer, strict=True)]
    rate = statistics.median(rates)
    used = [flops_of_a_step(told.directory, tokens) / own["warm"] / at for own, at in zip(ours, rates, strict=True)]
    figures = {
        "tokens_per_step": tokens,
        "ours_s": statistics.median(own["seconds"] for own in ours),
        "ours_cold_s": statistics.median(own["cold"] for own in ours),
        "ours_warm_s": statistics.median(own["warm"] for own in ours),
        "peer_s": statistics.median(theirs["seconds"] for theirs in peer),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_greatest": max(ratios),
        "gemm_gflops": rate / 1e9,
        "share_of_gemm": statistics.median(used),
        "ours_peak_gb": max(own["peak_bytes"] for own in ours) / 1e9,
        "peer_peak_gb": max(theirs["peak_bytes"] for theirs in peer) / 1e9,
        "first_loss_ours": ours[0]["loss"],
        "first_loss_peer": peer[0]["loss"],
    }
    if told.json:
        print(json.dumps(figures))
        return
    for name, figure in figures.items():
        print(f"{name:18} {figure:,.3f}")


if __name__ == "__main__":
    main()
