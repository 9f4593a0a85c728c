"""What an adapter learns on the demonstration base, with plain transformers and PEFT.

Owns the recipe (rank, targets, rate) that `docs/base.md` recommends. Run as a script, `test_adapters.py sentence 5`, it
prints its scores.
"""

import dataclasses
import importlib.resources
import json
import random
import re
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load
from transformers import Qwen3VLForConditionalGeneration

from veneer_base import documents
from veneer_base.evaluate import Reader
from veneer_base.reading import CELL_PX, PATCH_PX, patches
from veneer_base.shape import configuration
from veneer_base.synth import SPLITS
from veneer_base.vocabulary import CompactVocabulary, qwen_tokenizer

pytestmark = pytest.mark.e2e_long

TARGETS = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|attn\.proj|linear_fc1|linear_fc2)"
RANK = 16


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture, a prompt, the expected answer, and the fields that must be in it, in order."""

    picture: np.ndarray
    prompt: str
    answer: str
    fields: tuple[str, ...] = ()


def document_examples(split: str, count: int, answer: str, seed: int = 0) -> list[Example]:
    """Documents of every kind and language, as `veneer dataset synth` draws them."""
    where = next(s for s in SPLITS if s.name == split)
    r = random.Random(f"adapter/{seed}/{split}")  # noqa: S311  (repeatable, not secret)
    sorts = [(kind, language) for kind in documents.KINDS for language in documents.LANGUAGES]
    examples = []
    for number in range(count):
        kind, language = sorts[number % len(sorts)]
        document = documents.WRITERS[kind, language](r)
        picture = documents.draw(r, document, r.choice(where.layouts), where.wide, where.latin)
        fields = tuple(
            v for v in document.fields.values() if answer == "json" or v.lower() in document.sentence.lower()
        )
        examples.append(Example(picture, documents.PROMPTS[language, answer], document.answer(answer), fields))
    return examples


def digit_examples() -> tuple[list[Example], list[Example]]:
    """scikit-learn's handwritten digits at 96 pixels: 1,437 to learn from, 360 held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    examples = []
    for image, label in zip(data.images, data.target, strict=True):
        small = Image.fromarray((255 - image * 255 / 16).astype(np.uint8))
        picture = np.asarray(small.resize((96, 96), Image.Resampling.BILINEAR).convert("RGB"))
        examples.append(Example(picture, "图中的数字是几?", str(label), (str(label),)))
    random.Random(0).shuffle(examples)  # noqa: S311  (repeatable, not secret)
    return examples[360:], examples[:360]


class Adapting:
    """The base in its compact form with a fresh adapter: no logits for the 150,000 ids that it never says."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        weights = importlib.resources.files("veneer_base") / "weights"
        ids = json.loads((weights / "vocab_ids.json").read_text())
        self.vocabulary = CompactVocabulary(qwen_tokenizer(), ids)
        model = Qwen3VLForConditionalGeneration(configuration(self.vocabulary))
        tensors = {n: t.float() for n, t in load((weights / "model.safetensors").read_bytes()).items()}
        model.load_state_dict(tensors, strict=False)  # the head is the embedding
        self.model: PeftModel = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, lora_dropout=0.0)
        )

    def train(self, examples: list[Example], *, epochs: int, rate: float = 2e-3, batch: int = 16) -> float:
        """Trains and returns the seconds it took; logits of the whole vocabulary, but only where an answer is."""
        base = self.model.get_base_model()
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        steps = epochs * (len(examples) // batch)
        began, step, r = time.monotonic(), 0, random.Random(0)  # noqa: S311  (repeatable, not secret)
        self.model.train()
        for _ in range(epochs):
            order = r.sample(examples, len(examples))
            for i in range(0, len(order) - batch + 1, batch):
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / 20) * max(0.02, 1 - step / steps)
                inputs, labels_B_L = self._inputs(order[i : i + batch])
                states_B_L_D = base.model(**inputs).last_hidden_state[:, :-1]
                wanted = labels_B_L[:, 1:] != -100
                loss = F.cross_entropy(base.lm_head(states_B_L_D[wanted]), labels_B_L[:, 1:][wanted])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step % 25 == 0:
                    print(f"step {step}/{steps} {time.monotonic() - began:.0f} s loss {loss.item():.4f}", flush=True)
        return time.monotonic() - began

    def _inputs(self, examples: list[Example]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        H, W, _ = examples[0].picture.shape
        pads = "<|image_pad|>" * (H * W // CELL_PX**2)
        rows = []
        for e in examples:
            prompt = self.vocabulary.encode(
                f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{e.prompt}<|im_end|>\n<|im_start|>assistant\n"
            )
            rows.append((prompt, self.vocabulary.encode(f"{e.answer}<|im_end|>")))
        longest = max(len(p) + len(a) for p, a in rows)
        ids = torch.full((len(rows), longest), self.vocabulary.compact(151_643))
        labels = torch.full_like(ids, -100)
        attention = torch.zeros_like(ids)
        for i, (p, a) in enumerate(rows):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
            attention[i, : len(p) + len(a)] = 1
        x = patches(np.stack([e.picture for e in examples]))
        moments = x.view(-1, 3, 1, PATCH_PX**2).expand(-1, -1, 2, -1).reshape(-1, 2 * x.shape[-1])
        grid = torch.tensor([[1, H // PATCH_PX, W // PATCH_PX]] * len(rows))
        return {
            "input_ids": ids, "attention_mask": attention, "pixel_values": moments, "image_grid_thw": grid,
            "mm_token_type_ids": (ids == self.vocabulary.compact(151_655)).long(),
        }, labels  # fmt: skip

    def score(self, examples: list[Example], longest: int = 90) -> tuple[float, float]:
        """Share of fields that stand in the answer, and of whole answers."""
        reader = Reader(self.model, self.vocabulary)
        fields = right = whole = 0
        for prompt in sorted({e.prompt for e in examples}):
            some = [e for e in examples if e.prompt == prompt]
            for e, answer in zip(some, reader.read([e.picture for e in some], prompt, longest), strict=True):
                fields += len(e.fields)
                right += sum(_holds(answer, field) for field in e.fields)
                whole += answer == e.answer
        return right / fields, whole / len(examples)


def _holds(answer: str, field: str) -> bool:
    """Whether a field stands in an answer by itself, not as a part of a longer number or word."""
    return (
        re.search(rf"(?<![0-9A-Za-z,.]){re.escape(field)}(?![0-9A-Za-z]|[.,][0-9])", answer, re.IGNORECASE) is not None
    )


@pytest.mark.parametrize("answer", ["sentence", "json"])
def test_documents_with_unseen_values(answer: str) -> None:
    adapting = Adapting()
    adapting.train(document_examples("train", 1000, answer), epochs=5)
    fields, whole = adapting.score(document_examples("test", 90, answer))
    assert fields >= 0.90
    assert whole >= 0.75
    assert adapting.score(document_examples("test_layout", 90, answer))[0] >= 0.60
    assert adapting.score(document_examples("test_font", 90, answer))[0] >= 0.40


def test_handwritten_digits() -> None:
    learn, held_out = digit_examples()
    adapting = Adapting()
    adapting.train(learn, epochs=4, batch=32)
    assert adapting.score(held_out, longest=3)[1] >= 0.94


def main(task: str, epochs: int) -> None:
    """Trains one adapter and prints its scores as JSON."""
    adapting = Adapting()
    if task == "digits":
        learn, held_out = digit_examples()
        tests = {"test": held_out}
    else:
        learn = document_examples("train", 1000, task)
        tests = {name: document_examples(name, 90, task) for name in ("test", "test_layout", "test_font")}
    before = adapting.score(tests["test"])
    seconds = adapting.train(learn, epochs=epochs, batch=32 if task == "digits" else 16)
    scores = {name: adapting.score(some) for name, some in tests.items()}
    print(json.dumps({"task": task, "epochs": epochs, "seconds": round(seconds), "before": before, "after": scores}))


if __name__ == "__main__":
    import sys

    main(sys.argv[1], int(sys.argv[2]))
