# ruff: noqa: ANN401  # the kit is the conftest's
"""Score gives the log-probabilities that the trainer's own loss is made of: row by row, token by token."""

import io
import random
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

from veneer.dataset.v1.conversation_pb2 import Message, Part, Picture, Role
from veneer.inference.v1 import inference_service_pb2 as pb
from veneer.inference.v1.inference_pb2 import Prompt
from veneer.trainer.v1 import training_job_pb2
from veneer_base import documents
from veneer_inference.engine.client import EngineProcess
from veneer_processing import Conversation, Text, open_picture
from veneer_processing import Message as Said
from veneer_trainer.worker.loop.batches import Batches, Step
from veneer_trainer.worker.loop.features import FrozenFeatures
from veneer_trainer.worker.loop.learner import Learner
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.rows import Row
from veneer_trainer.worker.loop.run import processor_under, write_adapter
from veneer_trainer.worker.loop.state import State
from veneer_vlm.config import ModelConfig
from veneer_vlm.head import Head
from veneer_vlm.loss import token_losses
from veneer_vlm.weights import load

TOLERANCE = 1e-4
LEARNED_ROWS = 8


@dataclass(frozen=True)
class Example:
    """A row as its owner has it."""

    png: bytes
    prompt: str
    answer: str


def examples(count: int, seed: str) -> list[Example]:
    r = random.Random(seed)  # noqa: S311  # draws pages
    made = []
    for number in range(count):
        kind, language = list(documents.WRITERS)[number % len(documents.WRITERS)]
        document, form = documents.WRITERS[kind, language](r), documents.ANSWERS[number % 2]
        file = io.BytesIO()
        Image.fromarray(documents.draw(r, document, r.choice(documents.LAYOUTS))).save(file, "PNG")
        made.append(Example(file.getvalue(), documents.PROMPTS[language, form], document.answer(form)))
    return made


class Training:
    """The trainer's loop on the demonstration base, without its services."""

    def __init__(self, kit: Any, targets: list[str]) -> None:
        spec = training_job_pb2.TrainingSpec(
            model="models/tiny", epochs=1, batch_size=4, gradient_accumulation=1, seed=3, dtype="DTYPE_FLOAT32",
            max_pixels=448 * 448, max_length=512,
            lora={"rank": 8, "alpha": 16.0, "dropout": 0.05, "target_modules": targets},
            optimizer={
                "learning_rate": 5e-3, "warmup_ratio": 0.0, "beta1": 0.9, "beta2": 0.999, "max_gradient_norm": 1.0,
            },
        )  # fmt: skip
        config = ModelConfig.from_directory(kit.base)
        self.plan = Plan.of(spec, config)
        self.processor = processor_under(kit.base, kit.base_digest, spec.max_pixels)
        self.state = State.fresh(config, self.plan)
        model = load(kit.base)
        features = None if self.plan.trains_tower else FrozenFeatures(model, 1 << 30)
        self.learner = Learner(model, self.state, self.plan, features)

    def steps(self, rows: list[Example]) -> list[Step]:
        size = self.plan.rows_per_step
        batches = Batches(self.processor, self.plan, lambda sha256: None)
        return [batches.step([self.row(row) for row in rows[at : at + size]]) for at in range(0, len(rows), size)]

    def row(self, example: Example) -> Row:
        picture = open_picture(example.png)
        said = (Said("user", (picture, Text(example.prompt))), Said("assistant", (Text(example.answer),)))
        conversation = Conversation(said)
        return Row(self.processor.encode(conversation, with_patches=False), tuple(conversation.pictures))

    def learn(self, rows: list[Example]) -> None:
        for step in self.steps(rows):
            self.learner.learn(step, 5e-3)

    def scores(self, rows: list[Example], monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[float], float]:
        """Validation of all rows: its tokens, their negated losses, and the loss that the trainer makes of them."""
        ids: list[int] = []
        logprobs: list[float] = []

        def noted(head: Head, hidden_N_D: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
            losses_N = token_losses(head, hidden_N_D, targets_N)
            ids.extend(targets_N.tolist())
            logprobs.extend((-losses_N).tolist())
            return losses_N

        with monkeypatch.context() as patch:
            patch.setattr("veneer_trainer.worker.loop.learner.token_losses", noted)
            loss = self.learner.loss(self.steps(rows))
        return ids, logprobs, loss


@pytest.mark.parametrize(
    ("rows", "targets"),
    [
        (6, ["attention"]),
        (6, ["decoder+merger+vision"]),
        pytest.param(100, ["attention"], marks=pytest.mark.e2e_long),
        pytest.param(100, ["decoder+merger+vision"], marks=pytest.mark.e2e_long),
    ],
)
async def test_scores_are_the_trainers_losses(
    kit: Any, rows: int, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out rows, an adapter that the loop has trained; it is served as it was published."""
    torch.set_num_threads(1)
    training = Training(kit, targets)
    training.learn(examples(LEARNED_ROWS, "train"))
    held_out = examples(rows, "held out")
    right_ids, right, loss = training.scores(held_out, monkeypatch)

    name, folder = "adapters/documents/versions/1", kit.tmp / "adapter"
    digest = write_adapter(training.state.adapter, training.processor.contract, folder)
    kit.registry.versions["acme", name] = folder
    kit.registry.promote("acme", "documents", production=1)
    await kit.start(start_engine=lambda: EngineProcess.start(kit.base, 1))
    stub = kit.stub()
    ids: list[int] = []
    found: list[float] = []
    for row in held_out:
        asked = [Part(picture=Picture(data=row.png)), Part(text=row.prompt)]
        prompt = Prompt(
            messages=[
                Message(role=Role.ROLE_USER, parts=asked),
                Message(role=Role.ROLE_ASSISTANT, parts=[Part(text=row.answer)]),
            ]
        )
        response = await stub.Score(pb.ScoreRequest(model="adapters/documents", prompt=prompt), timeout=60)
        assert response.served_by.adapter_digest == digest
        (message,) = response.messages
        ids += [token.token_id for token in message.tokens]
        found += [token.logprob for token in message.tokens]
    shutil.rmtree(folder)

    assert ids == right_ids
    assert len(ids) > 10 * rows
    assert max(abs(left - other) for left, other in zip(found, right, strict=True)) <= TOLERANCE
    assert -sum(found) / len(found) == pytest.approx(loss, abs=TOLERANCE)
    print(f"{rows} rows, {len(ids)} tokens: greatest difference {max(map(abs, map(float.__sub__, found, right))):.1e}")
