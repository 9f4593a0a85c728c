"""What an adapter learns on the demonstration base, with Veneer's own model and processing.

Owns the recipe (rank, targets, rate) that `docs/base.md` recommends. Run as a script, `test_adapters.py sentence 5`, it
prints its scores.
"""

import dataclasses
import hashlib
import json
import random
import re
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from veneer_base import documents
from veneer_base.synth import SPLITS
from veneer_base.unfold import base_directory
from veneer_processing import Conversation, Encoded, Message, Picture, Processor, Text
from veneer_vlm.attention import PackedAttention
from veneer_vlm.cache import CachedAttention, KeyValueCache
from veneer_vlm.config import ModelConfig
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig
from veneer_vlm.loss import token_losses
from veneer_vlm.weights import load

pytestmark = [pytest.mark.e2e_long, pytest.mark.timeout(900)]

TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "attn.qkv", "attn.proj",
    "linear_fc1", "linear_fc2",
)  # fmt: skip
RANK, RATE, WARM_UP = 16, 2e-3, 20
EPOCHS = {"digits": 4, "sentence": 7, "json": 7}
BATCH = {"digits": 32, "sentence": 16, "json": 16}
_ANSWERED_AT_ONCE = 45


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture, a prompt, the expected answer, and the fields that must be in it, in order."""

    picture: np.ndarray
    prompt: str
    answer: str
    fields: tuple[str, ...] = ()

    def conversation(self, *, answered: bool) -> Conversation:
        """The example as a conversation, with its answer or waiting for one."""
        height, width, _ = self.picture.shape
        seen = Picture(hashlib.sha256(self.picture).hexdigest(), width, height, self.picture)
        question = Message("user", (seen, Text(self.prompt)))
        return Conversation((question, Message("assistant", (Text(self.answer),))) if answered else (question,))


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
    """The base with a fresh adapter on every linear of decoder and vision tower."""

    def __init__(self, seed: int = 0) -> None:
        directory = base_directory()
        self.model = load(directory)
        self.processor = Processor.load(directory, "0" * 64)
        self.adapter = Adapter.new(
            ModelConfig.from_directory(directory), AdapterConfig(RANK, 2 * RANK, target_modules=TARGETS), seed
        )

    def train(self, examples: list[Example], *, epochs: int, batch: int) -> float:
        """Trains and returns the seconds it took."""
        weights = [tensor.requires_grad_() for _, tensor in self.adapter.tensors()]
        optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
        steps = epochs * (len(examples) // batch)
        began, step, r = time.monotonic(), 0, random.Random(0)  # noqa: S311  (repeatable, not secret)
        rows = [self.processor.encode(example.conversation(answered=True)) for example in examples]
        for _ in range(epochs):
            order = r.sample(rows, len(rows))
            for start in range(0, len(order) - batch + 1, batch):
                for group in optimizer.param_groups:
                    group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * max(0.02, 1 - step / steps)
                loss = self._loss(order[start : start + batch])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step % 25 == 0:
                    print(f"step {step}/{steps} {time.monotonic() - began:.0f} s loss {loss.item():.4f}", flush=True)
        return time.monotonic() - began

    def _loss(self, rows: list[Encoded]) -> torch.Tensor:
        lengths = [len(row.ids_T) for row in rows]
        hidden_T_D = self._states(rows, PackedAttention(lengths))
        ids_T = torch.from_numpy(np.concatenate([row.ids_T for row in rows]))
        targets = torch.from_numpy(np.concatenate([row.supervised_T for row in rows])).nonzero().squeeze(-1)
        return token_losses(self.model.lm_head, hidden_T_D[targets - 1], ids_T[targets]).mean()

    def _states(self, rows: list[Encoded], attention: object) -> torch.Tensor:
        ids_T = torch.from_numpy(np.concatenate([row.ids_T for row in rows]))
        positions_3_T = torch.from_numpy(np.concatenate([row.positions_3_T for row in rows], 1))
        grids = [tuple(grid) for row in rows for grid in row.grids_n_3.tolist()]
        patches_P_X = torch.from_numpy(np.concatenate([row.patches_N_P for row in rows]))
        visual = self.model.see(patches_P_X, grids, AdapterBatch.uniform(self.adapter, len(patches_P_X)))
        return self.model(ids_T, positions_3_T, attention, visual, AdapterBatch.uniform(self.adapter, len(ids_T)))

    @torch.inference_mode()
    def answers(self, examples: list[Example], longest: int) -> list[str]:
        """The greedy answer to each example."""
        answers: list[str] = []
        for start in range(0, len(examples), _ANSWERED_AT_ONCE):
            some = examples[start : start + _ANSWERED_AT_ONCE]
            rows = [self.processor.encode_prompt(example.conversation(answered=False)) for example in some]
            lengths = [len(row.ids_T) for row in rows]
            cache = KeyValueCache(self.model.config.text, len(rows), max(lengths) + longest, torch.float32, "cpu")
            attention = CachedAttention(cache, list(enumerate(lengths)))
            hidden = self._states(rows, attention)[torch.tensor(lengths).cumsum(0) - 1]
            said: list[list[int]] = [[] for _ in rows]
            positions = [int(row.positions_3_T.max()) for row in rows]
            alive = list(range(len(rows)))
            for _ in range(longest):
                attention.commit()
                tokens = self.model.logits(hidden).argmax(-1).tolist()
                for row, token in zip(alive, tokens, strict=True):
                    said[row].append(token)
                alive = [row for row in alive if said[row][-1] != self.processor.special.im_end]
                if not alive:
                    break
                for row in alive:
                    positions[row] += 1
                attention = CachedAttention(cache, [(row, 1) for row in alive])
                hidden = self.model(
                    torch.tensor([said[row][-1] for row in alive]),
                    torch.tensor([positions[row] for row in alive]).expand(3, -1),
                    attention,
                    lora=AdapterBatch.uniform(self.adapter, len(alive)),
                )
            answers += [self.processor.decode([t for t in ids if t != self.processor.special.im_end]) for ids in said]
        return answers

    def score(self, examples: list[Example], longest: int = 110) -> tuple[float, float]:
        """Share of fields that stand in the answer, and of whole answers."""
        pairs = list(zip(examples, self.answers(examples, longest), strict=True))
        right = sum(_holds(answer, field) for e, answer in pairs for field in e.fields)
        return right / sum(len(e.fields) for e in examples), sum(a == e.answer for e, a in pairs) / len(pairs)


def _holds(answer: str, field: str) -> bool:
    """Whether a field stands in an answer by itself, not as a part of a longer number or word."""
    return (
        re.search(rf"(?<![0-9A-Za-z,.]){re.escape(field)}(?![0-9A-Za-z]|[.,][0-9])", answer, re.IGNORECASE) is not None
    )


@pytest.mark.parametrize("answer", ["sentence", "json"])
def test_documents_with_unseen_values(answer: str) -> None:
    adapting = Adapting()
    adapting.train(document_examples("train", 1000, answer), epochs=EPOCHS[answer], batch=BATCH[answer])
    fields, whole = adapting.score(document_examples("test", 90, answer))
    assert fields >= 0.90
    assert whole >= 0.75
    assert adapting.score(document_examples("test_layout", 90, answer))[0] >= 0.60
    assert adapting.score(document_examples("test_font", 90, answer))[0] >= 0.40


def test_handwritten_digits() -> None:
    learn, held_out = digit_examples()
    adapting = Adapting()
    adapting.train(learn, epochs=EPOCHS["digits"], batch=BATCH["digits"])
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
    seconds = adapting.train(learn, epochs=epochs, batch=BATCH[task])
    scores = {name: adapting.score(some) for name, some in tests.items()}
    print(json.dumps({"task": task, "epochs": epochs, "seconds": round(seconds), "before": before, "after": scores}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
