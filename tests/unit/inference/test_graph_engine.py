"""Graphs under the engine: the same tokens and scores as torch's, whoever is in a batch."""

import json

import numpy as np
import openvino
import pytest

from veneer_base.random_weights import SHAPES
from veneer_inference.engine import messages
from veneer_inference.engine.core import EngineCore
from veneer_inference.engine.graphs import GraphModel, GraphRunner
from veneer_inference.engine.runner import Item, Runner
from veneer_inference.engine.scheduler import Limits
from veneer_inference.ports import EnginePrompt, Sampling
from veneer_vlm.config import ModelConfig
from veneer_vlm.lora import Adapter, AdapterConfig
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.onnx_graph import write
from veneer_vlm.weights import random_model

IMAGE, VOCABULARY = 300, 512
LIMITS = Limits(
    context_length=256, blocks=16, block_tokens=16, step_tokens=7, running=8, waiting=16, waiting_bytes=1 << 20
)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    text = SHAPES["tiny"]["text_config"] | {"vocab_size": VOCABULARY}
    config = ModelConfig.from_dict(
        {"model_type": "qwen3_vl", "image_token_id": IMAGE, "tie_word_embeddings": True, **SHAPES["tiny"]}
        | {"text_config": text}
    )
    made = random_model(config, 0)
    for slot in made.slots().values():
        if slot.ndim > 1:
            slot.mul_(4)  # answers that differ from one another
    return made


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def graphs(
    request: pytest.FixtureRequest, model: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> GraphModel:
    folder = tmp_path_factory.mktemp("graphs")
    write(model.config, ((name, slot.clone()) for name, slot in model.slots().items()), "float32", folder)
    if request.param == "openvino":
        for stem in ("vision", "decoder"):
            read = openvino.Core().read_model(folder / f"{stem}.onnx")
            openvino.save_model(read, folder / f"{stem}.xml", compress_to_fp16=False)
    text, vision = SHAPES["tiny"]["text_config"] | {"vocab_size": VOCABULARY}, SHAPES["tiny"]["vision_config"]
    config = {"model_type": "qwen3_vl", "image_token_id": IMAGE, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config | {"text_config": text, "vision_config": vision}))
    return GraphModel(folder, 1)


def prompt(seed: int, length: int, picture: bool, config: ModelConfig) -> EnginePrompt:
    chance = np.random.default_rng(seed)
    ids = chance.integers(0, IMAGE, length)
    positions = np.tile(np.arange(length), (3, 1))
    grids, patches = np.zeros((0, 3), np.int64), np.zeros((0, config.vision.patch_values), np.float32)
    if picture:
        ids[2:8] = IMAGE
        grids = np.array([[1, 4, 6]])
        patches = chance.standard_normal((24, config.vision.patch_values), np.float32)
    return EnginePrompt(ids, positions, 0, grids, patches, ())


def answers(model: VisionLanguageModel, runner: type[Runner]) -> tuple[dict[int, list[int]], list[float]]:
    """Tokens of four requests that run together, and the scores of a fifth."""
    core = EngineCore(model, LIMITS, 2, 1 << 20, 1 << 20, lambda name, directory: None, runner)
    for key, (length, picture) in enumerate([(3, False), (20, True), (12, True), (9, False)]):
        asked = messages.Prompt.of(prompt(key, length, picture, model.config))
        core.handle(messages.Generate(key, "acme", "", asked, Sampling(max_tokens=6 + key)))
    scored = prompt(9, 15, True, model.config)
    supervised = np.zeros(15, bool)
    supervised[9:] = True
    scored = EnginePrompt(scored.ids_T, scored.positions_3_T, 0, scored.grids_n_3, scored.patches_N_P, (), supervised)
    core.handle(messages.Score(9, "acme", "", messages.Prompt.of(scored), 0))
    tokens: dict[int, list[int]] = {}
    scores: list[float] = []
    while not core.idle:
        report = core.step()
        assert not report.failures
        for progress in report.progress:
            tokens.setdefault(progress.key, []).extend(progress.step.token_ids)
        for done in report.done:
            scores = [score.logprob for score in done.scores]
    return tokens, scores


def test_graphs_answer_and_score_as_torch_does(model: VisionLanguageModel, graphs: GraphModel) -> None:
    expected, expected_scores = answers(model, Runner)
    tokens, scores = answers(graphs, GraphRunner)
    assert tokens == expected
    assert [len(tokens[key]) for key in sorted(tokens)] == [6, 7, 8, 9]
    assert len({tuple(each[:6]) for each in tokens.values()}) == 4
    assert scores == pytest.approx(expected_scores, abs=1e-4)


def test_graphs_wear_no_adapter(graphs: GraphModel, model: VisionLanguageModel) -> None:
    runner = GraphRunner(graphs, 2, 16)
    adapter = Adapter.new(model.config, AdapterConfig(), 0)
    ids, positions = np.array([1]), np.zeros((3, 1), np.int64)
    with pytest.raises(ValueError, match="wears no adapter"):
        runner.run([Item(ids, positions, [1], 0, [0], None, adapter)])
