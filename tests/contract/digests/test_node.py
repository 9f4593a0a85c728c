"""Python and Node give the same digests, or both refuse."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer_digests.vectors import evaluate

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "clients" / "node" / "digests.mjs"
CASES = json.loads((ROOT / "protos" / "digest_vectors.json").read_text("ascii"))["cases"]

Ask = Callable[[str, object], dict[str, Any]]


def _node() -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on PATH")
    return node


@pytest.fixture(scope="module")
def ask_node() -> Iterator[Ask]:
    command = [_node(), str(PROGRAM)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def ask(kind: str, value: object) -> dict[str, Any]:
            requests.write(json.dumps({"kind": kind, "input": value}) + "\n")
            requests.flush()
            answer: dict[str, Any] = json.loads(answers.readline())
            return {"refused": True} if "refused" in answer else answer

        yield ask
        requests.close()
        assert process.wait(timeout=10) == 0


# Every character, lone surrogates among them, and often those that JSON or UTF-16 treats in their own way.
TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from('"\\/\b\t\x7f\u2028\ufb33\U0001f600\ud800'))
NUMBER = st.integers(-(2**54), 2**54) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=15,
)
DIGEST = st.binary(min_size=32, max_size=32).map(bytes.hex)
LOOSE_DIGEST = DIGEST | st.sampled_from(["", "AB" * 32, "ab" * 32 + "\n", "ab" * 31])
U64 = st.integers(0, 2**64 - 1).map(str) | st.sampled_from(["-1", str(2**64)])


def _row_of(text: st.SearchStrategy[str], digest: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Rows that are canonical where `text` is not empty and well-formed and `digest` is one."""
    texts = st.fixed_dictionaries({"type": st.just("text"), "text": text})
    images = st.fixed_dictionaries({"type": st.just("image"), "digest": digest})
    content = st.lists(images, max_size=2) | st.lists(texts, max_size=1) | st.tuples(texts, images, texts)
    message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": content})
    answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": content}, optional={"weight": st.just(0)})
    return st.fixed_dictionaries({"messages": st.lists(message | answer, min_size=1, max_size=3)})


PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "video"])}, optional={"text": TEXT, "digest": LOOSE_DIGEST}
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": st.lists(PART, max_size=3) | st.sampled_from(["", None]),
    },
    optional={"weight": st.sampled_from([0, 1, None, False, "0"])},
)
LOOSE_ROW = st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=2)}, optional={"id": st.integers(0, 9)})
ROW = _row_of(st.text(min_size=1), DIGEST) | _row_of(TEXT, LOOSE_DIGEST) | LOOSE_ROW | JSON

BITS = {
    "BOOL": 8,
    "BF16": 16,
    "F32": 32,
    "I64": 64,
    "F8_E4M3": 8,
    "F6_E2M3": 6,
    "F4": 4,
    "X": 8,
    "toString": 8,
}


def _tensor(name: str, dtype: str, shape: list[int], filler: int, excess_bytes: int) -> dict[str, Any]:
    bits = BITS[dtype]
    for dimension in shape:
        bits *= dimension
    data = bytes([filler]) * (bits // 8 + excess_bytes)
    return {"name": name, "dtype": dtype, "shape": shape, "base64": base64.b64encode(data).decode()}


TENSORS = st.lists(
    st.builds(
        _tensor,
        TEXT,
        st.sampled_from(list(BITS)),
        st.lists(st.integers(0, 4), max_size=3),
        st.integers(0, 255),
        st.sampled_from([0] * 9 + [1]),
    ),
    max_size=4,
)
MODULES = st.lists(st.sampled_from(["q_proj", "v_proj", "\ufb33", "\U0001f600"]), max_size=4) | TEXT | st.none()
PEFT = st.builds(
    dict.__or__,
    st.dictionaries(TEXT, JSON, max_size=3),
    st.fixed_dictionaries(
        {"r": st.integers(1, 64), "lora_alpha": st.integers(1, 64) | st.floats(0.5, 64) | st.booleans()},
        optional={
            "target_modules": MODULES | st.lists(JSON, max_size=2),
            "exclude_modules": MODULES,
            "modules_to_save": MODULES,
            "bias": st.sampled_from(["none", "all", None, False]),
            "init_lora_weights": st.sampled_from([True, False, "gaussian", "eva", "orthogonal", "pissa", 1, []]),
            "use_qalora": st.booleans() | st.sampled_from([1, "true"]),
            "qalora_group_size": st.integers(0, 16),
            "lora_dropout": st.floats(0, 1),
            "rank_pattern": st.dictionaries(TEXT, st.integers(1, 8), max_size=2),
            "use_dora": st.booleans(),
        },
    ),
)
MODEL_NAME = st.sampled_from(["dtype", "use_cache", "architectures", "rms_norm_eps", "__proto__"]) | TEXT
MODEL_PART = st.dictionaries(MODEL_NAME, JSON, max_size=4)
MODEL = st.builds(
    dict.__or__,
    MODEL_PART,
    st.fixed_dictionaries({}, optional={"text_config": MODEL_PART | JSON, "vision_config": MODEL_PART}),
)

SPLIT = st.sampled_from("abcd")
SHARES = st.lists(st.tuples(SPLIT, st.integers(-1, 2**53)), max_size=4) | st.dictionaries(
    SPLIT, st.integers(0, 2**50), min_size=1
).map(lambda shares: list(shares.items()))

INPUTS: dict[str, st.SearchStrategy[Any]] = {
    "canonical_json": JSON,
    "blob": st.binary().map(lambda data: {"base64": base64.b64encode(data).decode()}),
    "row": ROW,
    "dataset_version": st.fixed_dictionaries({"rows": st.lists(st.tuples(TEXT, LOOSE_DIGEST), max_size=5)})
    | st.fixed_dictionaries({"rows": st.lists(st.tuples(st.text(min_size=1), DIGEST), max_size=5)}),
    "contract": st.dictionaries(TEXT, JSON, max_size=4),
    "adapter": st.fixed_dictionaries({"tensors": TENSORS, "config": PEFT, "contract": DIGEST}),
    "model": st.fixed_dictionaries({"tensors": TENSORS, "config": MODEL}),
    "epoch_order": st.fixed_dictionaries({"seed": U64, "epoch": U64, "rows": st.lists(DIGEST, max_size=8)}),
    "split": st.fixed_dictionaries({"group_key": TEXT, "shares": SHARES, "seed": U64}),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}: {case['name']}")
def test_node_gives_the_vectors(ask_node: Ask, case: dict[str, Any]) -> None:
    expected = {name: case[name] for name in ("output", "refused") if name in case}
    assert ask_node(case["kind"], case["input"]) == expected


@pytest.mark.parametrize("kind", INPUTS)
@settings(max_examples=300)
@given(data=st.data())
def test_node_and_python_are_equal(ask_node: Ask, kind: str, data: st.DataObject) -> None:
    drawn = data.draw(INPUTS[kind])
    value = json.loads(json.dumps(drawn))  # both see what JSON can carry: two lone surrogates may join there
    assert ask_node(kind, value) == evaluate(kind, value)


def test_the_programs_own_tests_pass() -> None:
    tests = PROGRAM.with_suffix(".test.mjs")
    done = subprocess.run([_node(), "--test", str(tests)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
