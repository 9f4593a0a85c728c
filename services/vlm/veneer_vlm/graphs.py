"""The model as graphs that ONNX Runtime or OpenVINO runs; `onnx_graph` writes them, docs/export.md describes them.

Owns sessions, and what the graphs take beside pixels and ids. Who keeps keys and values is the caller's matter.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_vlm.config import ModelConfig, VisionConfig
from veneer_vlm.errors import WeightsError
from veneer_vlm.vision import Grid, VisualFeatures

Array = NDArray[Any]
MASKED = np.float32(-1e30)
"""What is added to the score of a token that is not seen: finite, so that a row of nothing else stays a number."""


class Session(Protocol):
    """A graph that is ready to run."""

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Its outputs by name."""
        ...


def is_graphs(directory: Path) -> bool:
    """Whether a directory holds graphs rather than safetensors."""
    return any((directory / f"decoder.{suffix}").is_file() for suffix in ("onnx", "xml"))


def open_session(directory: Path, stem: str, threads: int) -> Session:
    """Opens `decoder` or `vision` of a directory with the runtime that its form is for.

    Raises:
        WeightsError: the graph cannot be read, or its runtime is not installed.
    """
    onnx_path, xml_path = directory / f"{stem}.onnx", directory / f"{stem}.xml"
    try:
        return _OpenVino(xml_path, threads) if xml_path.is_file() else _OnnxRuntime(onnx_path, threads)
    except ModuleNotFoundError as error:
        raise WeightsError(str(directory), [f"{error.name} is not installed: pip install 'veneer[graphs]'"]) from error
    except Exception as error:  # each runtime has errors of its own
        raise WeightsError(str(directory), [f"{stem} cannot be opened: {error}"]) from error


class _OnnxRuntime:
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [each.name for each in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See Session."""
        return dict(zip(self._names, self._session.run(self._names, dict(inputs)), strict=True))


class _OpenVino:
    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        compiled = openvino.Core().compile_model(
            path, "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        )
        self._outputs = {name: output for output in compiled.outputs for name in output.names}
        self._request = compiled.create_infer_request()

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See Session."""
        self._request.infer(dict(inputs))
        return {name: np.array(self._request.get_tensor(output).data) for name, output in self._outputs.items()}


@dataclasses.dataclass(frozen=True)
class GraphVision:
    """The tower as a graph, a picture at a time."""

    session: Session
    config: VisionConfig

    def see(self, patches_P_X: torch.Tensor, grid: Grid) -> VisualFeatures:
        """The features of one picture."""
        corners, shares, axes = _placed(grid, self.config)
        found = self.session(
            {"patches": patches_P_X.numpy(), "corners": corners, "corner_shares": shares, "row_and_column": axes}
        )
        levels = range(len(self.config.deepstack_visual_indexes))
        return VisualFeatures(
            torch.from_numpy(found["tokens"]), tuple(torch.from_numpy(found[f"deepstack_{level}"]) for level in levels)
        )


@dataclasses.dataclass(frozen=True)
class GraphDecoder:
    """The decoder as a graph, over B sequences with T new tokens each after a past of at most S."""

    session: Session
    config: ModelConfig

    def run(
        self,
        ids_B_T: Array,
        positions_3_B_T: Array,
        seen_B_T_C: Array,
        past_keys: Array,
        past_values: Array,
        wanted_N: Array,
        visual: VisualFeatures | None = None,
    ) -> tuple[torch.Tensor, Array, Array]:
        """Logits (N, V), and the new tokens' keys and values, (L, B, G, T, K) each.

        Args:
            ids_B_T: token ids.
            positions_3_B_T: rotary positions.
            seen_B_T_C: which of the S past and T new tokens each new one sees.
            past_keys: (L, B, G, S, K).
            past_values: likewise.
            wanted_N: tokens whose logits are wanted, in offsets of B x T.
            visual: features of the image tokens, in their order.
        """
        is_visual = ids_B_T == self.config.image_token_id
        width = self.config.text.hidden_size
        levels = len(self.config.vision.deepstack_visual_indexes)
        features = np.zeros((1 + levels, *ids_B_T.shape, width), np.float32)
        if visual is not None:
            for number, level in enumerate((visual.tokens_M_D, *visual.deepstack_M_D)):
                features[number][is_visual] = level.numpy()
        found = self.session(
            {
                "ids": ids_B_T,
                "positions": positions_3_B_T,
                "is_visual": is_visual[..., None],
                "visual": features,
                "mask": np.where(seen_B_T_C, np.float32(0), MASKED)[:, None, None],
                "past_keys": past_keys,
                "past_values": past_values,
                "wanted": wanted_N,
            }
        )
        return torch.from_numpy(found["logits"]), found["keys"], found["values"]


def _placed(grid: Grid, config: VisionConfig) -> tuple[Array, Array, Array]:
    """Where a picture's patches stand: four learned embeddings and their shares, and row and column, by patch."""
    _, rows, columns = grid
    merge, side = config.spatial_merge_size, round(config.num_position_embeddings**0.5)
    index: Array = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
    index = index.transpose(0, 2, 1, 3).ravel()
    row, column = index // columns, index % columns
    top, bottom, down = _stretched(rows, side)
    left, right, across = _stretched(columns, side)
    corners = np.stack([a[row] * side + b[column] for a in (top, bottom) for b in (left, right)])
    vertical, horizontal = (1 - down[row], down[row]), (1 - across[column], across[column])
    shares = np.stack([a * b for a in vertical for b in horizontal])
    return corners.astype(np.int64), shares.astype(np.float32), np.stack([row, column]).astype(np.float32)


def _stretched(size: int, side: int) -> tuple[Array, Array, Array]:
    """The two of `side` points around each of `size` evenly spaced ones, and the share of the second."""
    place = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    below = place.astype(np.int64)
    return below, np.minimum(below + 1, side - 1), place - below
