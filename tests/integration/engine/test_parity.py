"""The runner's logits against transformers' Qwen3-VL and PEFT on the demonstration base, in float32."""

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from veneer_base import documents
from veneer_base.unfold import base_directory
from veneer_inference.engine.runner import Item, Runner
from veneer_processing import Conversation, Encoded, Message, Picture, Processor, Text
from veneer_vlm import peft_folder
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.vision import VisualFeatures
from veneer_vlm.weights import load

# peft 0.21 reads an attribute that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LIMIT = 1e-4  # in proportion where logits reach beyond 10
LAST = 12  # positions of each prompt whose logits are compared
BLOCK = 16
CONFIGS = {
    "attention": AdapterConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")),
    "decoder": AdapterConfig(
        r=16, lora_alpha=32,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "tower": AdapterConfig(r=4, lora_alpha=8, target_modules=("q_proj", "attn.qkv", "linear_fc1", "linear_fc2")),
}  # fmt: skip


@dataclass
class Side:
    """Both sides and what is asked of them."""

    processor: Processor
    model: VisionLanguageModel
    peers: dict[str, Any]
    adapters: dict[str, Adapter]
    prompts: dict[str, Encoded]

    def visual(self, prompt: Encoded, worn: str) -> VisualFeatures | None:
        if not len(prompt.grids_n_3):
            return None
        grids = [tuple(map(int, grid)) for grid in prompt.grids_n_3]
        lora = AdapterBatch.uniform(self.adapters.get(worn), len(prompt.patches_N_P))
        return self.model.see(torch.from_numpy(prompt.patches_N_P), grids, lora)

    def right(self, prompt: Encoded, worn: str) -> torch.Tensor:
        """The peer's logits at the last positions."""
        ids = torch.from_numpy(prompt.ids_T)[None]
        pictures = {}
        peer = self.peers[worn]
        if len(prompt.grids_n_3):
            pictures["pixel_values"] = torch.from_numpy(prompt.patches_N_P)
            pictures["image_grid_thw"] = torch.from_numpy(prompt.grids_n_3)
        image = self.peers[""].config.image_token_id
        logits = peer(input_ids=ids, mm_token_type_ids=(ids == image).int(), logits_to_keep=LAST, **pictures).logits
        return logits[0, -LAST:]

    def assert_same(self, found_N_D: torch.Tensor, prompt: Encoded, worn: str) -> None:
        right, found = self.right(prompt, worn), self.model.logits(found_N_D)
        limit = LIMIT * max(1.0, right.abs().max().item() / 10)
        assert (found - right).abs().max().item() <= limit


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Side:
    torch.set_num_threads(1)
    directory = base_directory()
    processor, model = Processor.load(directory, ""), load(directory)
    peer = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    peers, adapters = {"": peer}, {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        adapter = adapters[name] = Adapter.new(model.config, config, seed)
        for pair in adapter.pairs.values():
            pair.b_O_R.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
        folder: Path = tmp_path_factory.mktemp(name) / "adapter"
        peft_folder.write(adapter, folder)
        peers[name] = peft.PeftModel.from_pretrained(copy.deepcopy(peer), folder).eval()
    return Side(processor, model, peers, adapters, prompts(processor))


def prompts(processor: Processor) -> dict[str, Encoded]:
    """Text alone, one picture, several of one size, several sizes and several turns."""
    r = random.Random(5)  # noqa: S311  # draws pages

    def page(kind: str, language: str, shrink: int = 1) -> Picture:
        rgb = documents.draw(r, documents.WRITERS[kind, language](r), "list")[::shrink, ::shrink]
        return Picture(f"{r.getrandbits(256):064x}", rgb.shape[1], rgb.shape[0], np.ascontiguousarray(rgb))

    one, two, small = page("invoice", "zh"), page("leave", "en"), page("receipt", "en", 2)
    asked = {
        "text": [Message("user", (Text("请用一句话介绍北京,再写出三个数字。"),))],
        "one": [Message("user", (one, Text("提取字段。")))],
        "several": [Message("user", (one, Text("And this one?"), two, Text("Which is newer?")))],
        "sizes": [
            Message("user", (small, Text("What document is this?"))),
            Message("assistant", (Text("A receipt."),)),
            Message("user", (two, small, Text("And these two?"))),
        ],
    }
    return {name: processor.encode_prompt(Conversation(tuple(messages))) for name, messages in asked.items()}


class Passes:
    """Prompts on their way through a runner, in whatever pieces."""

    def __init__(self, side: Side, *asked: tuple[str, str]) -> None:
        self.side = side
        self.asked = sorted(asked, key=lambda each: each[1])
        self.runner = Runner(side.model, 256, BLOCK)
        self.visual = [side.visual(side.prompts[name], worn) for name, worn in self.asked]
        self.done = [0] * len(self.asked)
        self.hidden: list[list[torch.Tensor]] = [[] for _ in self.asked]
        free = iter(range(1, 257))
        self.blocks = [
            [next(free) for _ in range(-(-len(side.prompts[name].ids_T) // BLOCK))] for name, _ in self.asked
        ]

    def run(self, *tokens: int) -> None:
        """A pass over so many more tokens of each prompt, or what is left of it."""
        items, wearers = [], []
        for index, ((name, worn), count) in enumerate(zip(self.asked, tokens, strict=True)):
            prompt, start = self.side.prompts[name], self.done[index]
            stop = min(start + count, len(prompt.ids_T))
            if stop == start:
                continue
            image = prompt.ids_T == self.side.model.config.image_token_id
            first, last = int(image[:start].sum()), int(image[:stop].sum())
            visual = self.visual[index]
            wanted = [at - start for at in range(max(start, len(prompt.ids_T) - LAST), stop)]
            items.append(
                Item(
                    prompt.ids_T[start:stop],
                    prompt.positions_3_T[:, start:stop],
                    self.blocks[index],
                    start,
                    wanted,
                    visual[first:last] if visual is not None and last > first else None,
                    self.side.adapters.get(worn),
                )
            )
            wearers.append((index, len(wanted)))
            self.done[index] = stop
        found_N_D = self.runner.run(items)
        for (index, _), rows in zip(wearers, found_N_D.split([count for _, count in wearers]), strict=True):
            self.hidden[index].append(rows)

    def check(self) -> None:
        for (name, worn), pieces in zip(self.asked, self.hidden, strict=True):
            self.side.assert_same(torch.cat(pieces), self.side.prompts[name], worn)


WORN = ("", *CONFIGS)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["text", "one", "several", "sizes"])
def test_a_prompt_alone(side: Side, name: str) -> None:
    for worn in WORN:
        passes = Passes(side, (name, worn))
        passes.run(10_000)
        passes.check()


@torch.inference_mode()
def test_adapters_change_the_logits(side: Side) -> None:
    bare = side.right(side.prompts["one"], "")
    for worn in CONFIGS:
        assert (side.right(side.prompts["one"], worn) - bare).abs().max() > 0.1


@torch.inference_mode()
@pytest.mark.parametrize("pieces", [(10_000,), (37,), (5, 64, 1, 1, 16)])
def test_mixed_lengths_and_adapters_in_one_batch(side: Side, pieces: tuple[int, ...]) -> None:
    """Sixteen prompts of four lengths, each with each adapter and none; whole, and in pieces that differ."""
    passes = Passes(side, *((name, worn) for name in side.prompts for worn in WORN))
    step = 0
    while any(done < len(side.prompts[name].ids_T) for done, (name, _) in zip(passes.done, passes.asked, strict=True)):
        passes.run(*(pieces[(step + index) % len(pieces)] for index in range(len(passes.asked))))
        step += 1
    passes.check()
