"""The graphs answer as the model does: prompt, then a token at a time, on both runtimes and in eight bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch

from veneer_vlm.errors import WeightsError
from veneer_vlm.graphs import GraphDecoder, GraphVision, is_graphs, open_session
from veneer_vlm.onnx_graph import Precision, write

Toy = Any  # what the conftest makes
LIMITS = {"float32": 1e-4, "int8-blocks": 0.3, "int8-columns": 0.3}  # of logits that reach to about 10


def graphs(toy: Toy, precision: Precision, runtime: str, folder: Path) -> tuple[GraphVision, GraphDecoder]:
    write(toy.config, ((name, slot.clone()) for name, slot in toy.model.slots().items()), precision, folder)
    if runtime == "openvino":
        for stem in ("vision", "decoder"):
            model = openvino.Core().read_model(folder / f"{stem}.onnx")
            openvino.save_model(model, folder / f"{stem}.xml", compress_to_fp16=False)
    return (
        GraphVision(open_session(folder, "vision", 1), toy.config.vision),
        GraphDecoder(open_session(folder, "decoder", 1), toy.config),
    )


@pytest.mark.parametrize(
    ("precision", "runtime"),
    [("float32", "onnx"), ("float32", "openvino"), ("int8-blocks", "onnx"), ("int8-columns", "openvino")],
)
def test_graphs_answer_as_the_model_does(toy: Toy, precision: Precision, runtime: str, tmp_path: Path) -> None:
    assert not is_graphs(tmp_path)
    vision, decoder = graphs(toy, precision, runtime, tmp_path)
    assert is_graphs(tmp_path)
    row = toy.row(3, [5, 4], [(4, 6)])
    (expected_T_V,) = toy.logits([row])
    ids, positions = row.ids_T.numpy()[None], toy.positions(row).numpy()[:, None]
    limit, prompt, text = LIMITS[precision], len(row.ids_T) - 2, toy.config.text
    features = vision.see(row.patches_P_X, row.grids[0])
    keys = values = np.zeros((text.num_hidden_layers, 1, text.num_key_value_heads, 1, text.head_dim), np.float32)
    seen = np.tril(np.ones((prompt, prompt + 1), bool), 1)[None]
    seen[..., 0] = False  # a past that nobody sees
    logits, keys, values = decoder.run(
        ids[:, :prompt], positions[..., :prompt], seen, keys, values, np.arange(prompt), features
    )
    assert (logits - expected_T_V[:prompt]).abs().max() <= limit
    for place in range(prompt, len(row.ids_T)):
        here = slice(place, place + 1)
        logits, key, value = decoder.run(
            ids[:, here], positions[..., here], np.ones((1, 1, place + 1), bool), keys, values, np.arange(1)
        )
        keys, values = np.concatenate([keys, key], 3), np.concatenate([values, value], 3)
        assert (logits[0] - expected_T_V[place]).abs().max() <= limit


def test_sequences_of_several_lengths_go_through_together(toy: Toy, tmp_path: Path) -> None:
    _, decoder = graphs(toy, "float32", "onnx", tmp_path)
    rows = [toy.row(seed, [length]) for seed, length in ((1, 4), (2, 7))]
    expected = toy.logits(rows)
    text, longest = toy.config.text, 7
    ids, seen = np.zeros((2, longest), np.int64), np.zeros((2, longest, longest + 1), bool)
    positions = np.zeros((3, 2, longest), np.int64)
    for number, row in enumerate(rows):
        length = len(row.ids_T)
        ids[number, :length] = row.ids_T
        positions[:, number, :length] = toy.positions(row)
        seen[number, :length, 1 : length + 1] = np.tril(np.ones((length, length), bool))
    past = np.zeros((text.num_hidden_layers, 2, text.num_key_value_heads, 1, text.head_dim), np.float32)
    logits, _, _ = decoder.run(ids, positions, seen, past, past, np.array([3, longest + 6]))
    for found, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, wanted[-1], rtol=0, atol=1e-4)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [_cut, Path.unlink])
@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data"])
def test_a_graph_that_cannot_be_read_is_refused(
    toy: Toy, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    graphs(toy, "float32", "onnx", tmp_path)
    damage(tmp_path / name)
    with pytest.raises(WeightsError, match="decoder cannot be opened"):
        open_session(tmp_path, "decoder", 1)
