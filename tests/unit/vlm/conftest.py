"""A toy Qwen3-VL in both implementations, with weights large enough that a slip shows in the logits."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from veneer_vlm.attention import PackedAttention
from veneer_vlm.config import ModelConfig
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.weights import load

IMAGE, VISION_START, VISION_END = 120, 118, 119
PATCH, MERGE = 4, 2
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": 64,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
}


@dataclasses.dataclass
class Row:
    """One sequence, with its pictures."""

    ids_T: Tensor
    grids: list[tuple[int, int, int]]
    patches_P_X: Tensor


class Toy:
    """The peer, our model with the same weights, and ways to run both on the same rows."""

    def __init__(self, peer: Qwen3VLForConditionalGeneration, model: VisionLanguageModel) -> None:
        self.peer = peer
        self.model = model
        self.config: ModelConfig = model.config

    def row(self, seed: int, text: Sequence[int], grids: Sequence[tuple[int, int]] = ()) -> Row:
        """Pieces of text of these lengths, a picture of (rows, columns) patches between each two."""
        generator = torch.Generator().manual_seed(seed)
        pieces = [torch.randint(0, VISION_START, (text[0],), generator=generator)]
        for length, (rows, columns) in zip(text[1:], grids, strict=True):
            pads = [IMAGE] * (rows * columns // MERGE**2)
            pieces.append(torch.tensor([VISION_START, *pads, VISION_END]))
            pieces.append(torch.randint(0, VISION_START, (length,), generator=generator))
        patches = sum(rows * columns for rows, columns in grids)
        return Row(
            torch.cat(pieces),
            [(1, rows, columns) for rows, columns in grids],
            torch.randn(patches, 3 * 2 * PATCH * PATCH, generator=generator),
        )

    def positions(self, row: Row) -> Tensor:
        """The peer's positions, (3, T)."""
        positions, _ = self.peer.model.get_rope_index(
            row.ids_T[None],
            mm_token_type_ids=(row.ids_T[None] == IMAGE).int(),
            image_grid_thw=torch.tensor(row.grids) if row.grids else None,
        )
        return positions[:, 0]

    def peer_arguments(self, row: Row) -> dict[str, Tensor]:
        """One row as the peer takes it."""
        arguments = {"input_ids": row.ids_T[None], "mm_token_type_ids": (row.ids_T[None] == IMAGE).int()}
        if row.grids:
            arguments |= {"pixel_values": row.patches_P_X, "image_grid_thw": torch.tensor(row.grids)}
        return arguments

    def peer_logits(self, row: Row, peer: torch.nn.Module | None = None) -> Tensor:
        """(T, V)."""
        with torch.no_grad():
            return (peer or self.peer)(**self.peer_arguments(row)).logits[0]

    def hidden(self, rows: Sequence[Row], lora=None, vision_lora=None, model=None) -> Tensor:  # noqa: ANN001
        """Our last hidden states of all rows in one packed pass."""
        model = model or self.model
        grids = [grid for row in rows for grid in row.grids]
        visual = model.see(torch.cat([row.patches_P_X for row in rows]), grids, vision_lora) if grids else None
        return model(
            torch.cat([row.ids_T for row in rows]),
            torch.cat([self.positions(row) for row in rows], dim=1),
            PackedAttention([len(row.ids_T) for row in rows]),
            visual,
            lora,
        )

    def logits(self, rows: Sequence[Row], lora=None, vision_lora=None, model=None) -> list[Tensor]:  # noqa: ANN001
        """Our logits of every row, from one packed pass."""
        with torch.no_grad():
            hidden_T_D = self.hidden(rows, lora, vision_lora, model)
            return list(self.model.logits(hidden_T_D).split([len(row.ids_T) for row in rows]))


def make_peer(tied: bool) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(1)
    config = Qwen3VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=IMAGE,
        video_token_id=121,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    peer = Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in peer.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.ndim == 1:
            parameter.normal_(0, 0.3)
        else:
            parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
    peer.get_input_embeddings().weight.normal_(0, 0.5)
    return peer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    make_peer(tied=False).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def toy(toy_directory: Path) -> Toy:
    return Toy(make_peer(tied=False), load(toy_directory))


@pytest.fixture(scope="session")
def tied_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    directory = tmp_path_factory.mktemp("tied")
    peer = make_peer(tied=True)
    peer.save_pretrained(directory)
    return Toy(peer, load(directory))


@pytest.fixture(scope="session")
def rows(toy: Toy) -> list[Row]:
    """Text alone, one picture, several of different sizes, one token; lengths differ."""
    return [
        toy.row(1, [11]),
        toy.row(2, [3, 5], [(4, 6)]),
        toy.row(3, [2, 4, 7], [(8, 2), (2, 12)]),
        toy.row(4, [1]),
        toy.row(5, [1, 1, 0], [(6, 6), (2, 2)]),
    ]
