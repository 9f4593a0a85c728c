"""Answers held to a JSON schema, on the demonstration base's own vocabulary. The engine's core alone."""

import json
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from veneer_base.unfold import END_OF_TURN_ID, base_directory
from veneer_inference.engine import messages
from veneer_inference.engine.core import EngineCore
from veneer_inference.engine.grammar import Grammars
from veneer_inference.engine.scheduler import Limits
from veneer_inference.ports import EngineError, EnginePrompt, Sampling
from veneer_processing import Conversation, Message, Processor, Text
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.weights import load

VOCABULARY = 151_936
STOP = (END_OF_TURN_ID,)
INVOICE = json.dumps(
    {
        "type": "object",
        "properties": {
            "号码": {"type": "string", "pattern": "^[0-9]{8}$"},
            "currency": {"enum": ["CNY", "EUR"]},
            "total": {"type": "number", "minimum": 0, "maximum": 99999},
            "paid": {"type": "boolean"},
            "lines": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        },
        "required": ["号码", "currency", "total", "paid", "lines"],
        "additionalProperties": False,
    }
)


def check(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["号码", "currency", "total", "paid", "lines"]
    assert len(found["号码"]) == 8
    assert found["号码"].isdigit()
    assert found["currency"] in ("CNY", "EUR")
    assert 0 <= found["total"] <= 99999
    assert isinstance(found["paid"], bool)
    assert len(found["lines"]) <= 2
    assert all(len(line) <= 4 for line in found["lines"])


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(base_directory(), VOCABULARY)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(base_directory(), "")


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    torch.set_num_threads(1)
    return load(base_directory())


def test_any_walk_through_a_schema_is_json_of_it(grammars: Grammars, processor: Processor) -> None:
    r = random.Random(1)  # noqa: S311  # draws tokens
    texts = set()
    for _ in range(12):
        grammar = grammars.grammar(INVOICE, STOP)
        ids: list[int] = []
        while not grammar.complete:
            allowed = np.flatnonzero(grammar.allowed())
            assert len(allowed)
            token = int(r.choice(allowed))
            grammar.take(token)
            ids.append(token)
        text = processor.decode([token for token in ids if token not in STOP])
        check(text)
        texts.add(text)
    assert len(texts) > 8


def test_a_token_that_is_not_allowed_is_no_answer(grammars: Grammars) -> None:
    grammar = grammars.grammar(INVOICE, STOP)
    refused = int(np.flatnonzero(~grammar.allowed())[0])
    with pytest.raises(EngineError) as caught:
        grammar.take(refused)
    assert caught.value.reason == "SCHEMA_UNSUPPORTED"


@pytest.mark.parametrize(
    "schema",
    [
        "{",
        "[1]",
        '"object"',
        '{"type": "objekt"}',
        '{"type": "string", "pattern": "("}',
        '{"$ref": "#/nowhere"}',
        '{"$ref": "https://example.org/other.json"}',
        '{"type": "object", "unevaluatedProperties": false, "x-guidance": {"lenient": true}}',
        "{" + '"not": {' * 200 + "}" * 201,
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused(grammars: Grammars, schema: str) -> None:
    with pytest.raises(EngineError) as caught:
        grammars.grammar(schema, STOP)
    assert caught.value.reason == "SCHEMA_UNSUPPORTED"
    assert str(caught.value)


def test_a_schema_that_would_take_for_ever_is_refused_and_nobody_waits_for_it(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer_inference.engine.schema_check._CPU_S", 1)
    endless = json.dumps({"allOf": [{"type": "string", "pattern": f"a{number}.*b"} for number in range(40)]})
    refusals: list[EngineError] = []

    def compile_it() -> None:
        with pytest.raises(EngineError) as caught:
            grammars.grammar(endless, STOP)
        refusals.append(caught.value)

    grammars.grammar(INVOICE, STOP)
    compiling = threading.Thread(target=compile_it)
    compiling.start()
    time.sleep(0.1)
    grammars.grammar(INVOICE, STOP)
    assert compiling.is_alive()
    compiling.join(12)  # a second of processor time; the bound on memory would take longer to be reached
    assert not compiling.is_alive()
    monkeypatch.setattr("veneer_inference.engine.grammar.problems_of", None)
    compile_it()  # a refusal is remembered
    assert [each.problems for each in refusals] == [("it takes more time or memory than a schema may",)] * 2


def test_any_stop_id_ends_an_answer_and_only_where_it_may(grammars: Grammars) -> None:
    other = VOCABULARY - 1
    grammar = grammars.grammar('{"type": "boolean"}', (END_OF_TURN_ID, other))
    assert not grammar.allowed()[[END_OF_TURN_ID, other]].any()
    while not (allowed := grammar.allowed())[other]:
        grammar.take(int(np.flatnonzero(allowed)[0]))
    assert np.flatnonzero(allowed).tolist() == [END_OF_TURN_ID, other]
    grammar.take(other)
    assert grammar.complete


def ask(core: EngineCore, key: int, text: str, processor: Processor, sampling: Sampling) -> None:
    encoded = processor.encode_prompt(Conversation((Message("user", (Text(text),)),)))
    prompt = EnginePrompt(
        encoded.ids_T, encoded.positions_3_T, encoded.rope_delta, encoded.grids_n_3, encoded.patches_N_P
    )
    core.handle(messages.Generate(key, "t", "", messages.Prompt.of(prompt), sampling))


def run(core: EngineCore) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Each request's tokens, and how it ended."""
    ids: dict[int, list[int]] = {}
    ends: dict[int, str] = {}
    while True:
        report = core.step()
        for each in report.progress:
            ids.setdefault(each.key, []).extend(each.step.token_ids)
            ends[each.key] = each.step.finish
        ends |= {failure.key: failure.reason for failure in report.failures}
        if core.idle:
            return ids, ends


def make_core(model: VisionLanguageModel, grammars: Grammars | None) -> EngineCore:
    return EngineCore(model, Limits(1024, 256), 2, 1 << 20, 1 << 20, lambda *_: None, grammars=grammars)


def test_answers_are_held_to_their_schema_and_their_neighbours_are_not(
    model: VisionLanguageModel, grammars: Grammars, processor: Processor
) -> None:
    free = Sampling(20, stop_ids=STOP)
    alone = make_core(model, grammars)
    ask(alone, 1, "What document is this?", processor, free)
    right = run(alone)[0][1]
    core = make_core(model, grammars)
    ask(core, 1, "What document is this?", processor, free)
    for key, temperature in ((2, 0.0), (3, 1.0), (4, 2.0)):
        sampling = Sampling(400, temperature, seed=key, stop_ids=STOP, json_schema=INVOICE, logprobs=2)
        ask(core, key, "Extract the fields as JSON.", processor, sampling)
    ask(core, 5, "Extract", processor, Sampling(5, stop_ids=STOP, json_schema="{"))
    ask(core, 6, "Extract", processor, Sampling(3, stop_ids=STOP, json_schema=INVOICE))
    ids, ends = run(core)
    assert ids[1] == right
    assert ends[5] == "SCHEMA_UNSUPPORTED"
    assert (ends[6], len(ids[6])) == ("length", 3)
    for key in (2, 3, 4):
        assert ends[key] == "stop"
        check(processor.decode([token for token in ids[key] if token not in STOP]))


def test_an_engine_without_a_tokenizer_says_so(model: VisionLanguageModel, processor: Processor) -> None:
    core = make_core(model, None)
    ask(core, 1, "Extract", processor, Sampling(5, json_schema=INVOICE))
    assert run(core)[1] == {1: "SCHEMA_UNSUPPORTED"}


def test_a_grammar_that_fails_on_its_way_ends_its_own_request_alone(
    model: VisionLanguageModel, grammars: Grammars, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(model, grammars)
    ask(core, 1, "What document is this?", processor, Sampling(4))
    ask(core, 2, "Extract", processor, Sampling(50, stop_ids=STOP, json_schema=INVOICE))
    core.step()
    grammar: Any = core._requests[2].grammar

    def broken() -> None:
        raise EngineError("SCHEMA_UNSUPPORTED", ["too many states"])

    monkeypatch.setattr(grammar, "allowed", broken)
    ids, ends = run(core)
    assert ends == {1: "length", 2: "SCHEMA_UNSUPPORTED"}
    assert len(ids[1]) == 3
    assert core.step().stats.kv_tokens_in_use == 0
