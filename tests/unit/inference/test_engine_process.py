"""The threads of the engine's process, run here without it."""

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from veneer_inference.engine import messages, process
from veneer_inference.engine.options import EngineOptions
from veneer_inference.engine.process import EngineProcess
from veneer_inference.engine.runner import Runner
from veneer_inference.ports import EnginePrompt, Sampling
from veneer_vlm.config import ModelConfig
from veneer_vlm.weights import random_model

CONFIG = {
    "model_type": "qwen3_vl",
    "image_token_id": 60,
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 16,
        "rope_scaling": {"mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 1,
        "out_hidden_size": 16,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [],
    },
}
EVENTS: list[str] = []


class SlowGrammars:
    """Takes as long over a schema as it is told to."""

    def __init__(self, *_: object) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def prepare(self) -> None:
        EVENTS.append("prepared")

    def grammar(self, *_: object) -> None:
        self.begun.set()
        self.go_on.wait(10)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, EngineProcess]]:
    """The service's end of the socket, and the engine's process at the other."""
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda _: ended.set())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, EngineProcess(theirs, EngineOptions(model="", threads=1))
        ours.close()
        assert ended.wait(10)  # the reading thread, at the end of its socket


def question(key: int, schema: str = "") -> bytes:
    prompt = EnginePrompt(
        np.arange(3), np.tile(np.arange(3), (3, 1)), 0, np.zeros((0, 3), np.int64), np.zeros((0, 0), np.float32)
    )
    return messages.frame(messages.Generate(key, "t", "", messages.Prompt.of(prompt), Sampling(3, json_schema=schema)))


def test_nobody_waits_for_anothers_schema_and_a_cancelled_request_never_begins(
    service: tuple[socket.socket, EngineProcess],
) -> None:
    ours, engine = service
    grammars: Any = SlowGrammars()
    for work in (engine._read_commands, lambda: engine._compile_schemas(grammars)):
        threading.Thread(target=work, daemon=True).start()
    for sent in (question(1, "{}"), question(2, "{}"), question(3)):
        ours.sendall(sent)
    assert engine._commands.get(timeout=10).key == 3  # type: ignore[union-attr]
    assert grammars.begun.wait(10)
    ours.sendall(messages.frame(messages.Cancel(1)))
    assert isinstance(engine._commands.get(timeout=10), messages.Cancel)
    grammars.go_on.set()
    assert engine._commands.get(timeout=10).key == 2  # type: ignore[union-attr]
    assert engine._commands.empty()


def test_schemas_beyond_the_bound_are_refused_and_nobody_waits_for_room(
    service: tuple[socket.socket, EngineProcess],
) -> None:
    ours, engine = service
    threading.Thread(target=engine._read_commands, daemon=True).start()
    for key in range(engine._schemas.maxsize + 1):
        ours.sendall(question(key, "{}"))
    refused: Any = engine._commands.get(timeout=10)
    assert (refused.key, refused.error.reason) == (engine._schemas.maxsize, "QUEUE_FULL")
    assert refused.error.retry_s > 0


def test_the_tokenizer_is_read_once_the_service_knows_and_before_the_first_step(
    service: tuple[socket.socket, EngineProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llguidance holds Python's lock over it for a second: nobody's stream may stand still for that."""
    ours, engine = service
    model = random_model(ModelConfig.from_dict(CONFIG), seed=1)
    EVENTS.clear()
    monkeypatch.setattr(process, "_opened", lambda *_: ("ab" * 32, model, "float32", Runner))
    monkeypatch.setattr(process, "Grammars", SlowGrammars)
    monkeypatch.setattr(EngineProcess, "_serve", lambda *_: EVENTS.append("serves"))
    monkeypatch.setattr(SlowGrammars, "prepare", lambda _: EVENTS.append(f"told {len(ours.recv(1 << 16)) > 0}"))
    engine.run()
    assert EVENTS == ["told True", "serves"]
