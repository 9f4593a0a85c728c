"""A scene of the demonstration, played on a cluster that speaks the contract."""

# ruff: noqa: ANN401  # the fake's types stay in conftest

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from veneer_client import Client, VeneerError
from veneer_cluster.demo import full, play, scenes
from veneer_cluster.folder import Folder


def rows() -> dict[str, list[scenes.Row]]:
    pictures = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(4)]
    return {"train": [(pictures[0], "Which?", "0")], "test": [(each, "Which?", "1") for each in pictures[1:]]}


def test_a_scene_goes_the_whole_way(
    client: Client, cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = dataclasses.replace(scenes.HANDWRITING, rows=rows)
    result = play.play(client, Folder(tmp_path / "cluster"), scene, tmp_path / "digits", published=None)
    out = capsys.readouterr().out
    order = cluster.requests["CreateTrainingJob"][0].training_job.spec
    assert (order.epochs, order.gradient_accumulation, order.lora.rank) == (4, 1, 16)
    subjects = [request.spec.subject for request in cluster.requests["CreateEvaluation"]]
    assert subjects == ["models/tiny", "adapters/digits/versions/1"]
    assert (result.base, result.adapter, result.images) == (0.75, 0.75, 3)
    assert len(result.missed) == 2
    assert out.count("models/tiny saw 1") == out.count("adapters/digits saw 1") == 3
    assert "digits@1 was swapped in" in out


def test_an_answer_of_another_version_fails_the_scene(client: Client, cluster: Any, tmp_path: Path) -> None:
    scene = dataclasses.replace(scenes.HANDWRITING, rows=rows)
    play.play(client, Folder(tmp_path / "cluster"), scene, tmp_path / "first", published=None)
    with pytest.raises(VeneerError, match="versions/1 answered, not adapters/digits/versions/2"):
        play.play(client, Folder(tmp_path / "cluster"), scene, tmp_path / "second", published=None)


def test_the_owner_s_own_job(client: Client, cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = full.play(client, Folder(tmp_path / "cluster"), tmp_path / "office", shape_is_published=False)
    out = capsys.readouterr().out
    order = cluster.requests["CreateTrainingJob"][0].training_job.spec
    assert list(order.lora.target_modules) == ["q_proj", "v_proj"]
    assert (order.epochs, order.gradient_accumulation, order.max_pixels) == (3, 2, 448 * 448)
    assert out.count("PATH_RESOLVED") == 3
    assert "office: adapters/office saw 1" in out
    assert figures["peak_memory_bytes"] == 0
    with pytest.raises(VeneerError, match="this shape has 1,605,632"):
        full.play(client, Folder(tmp_path / "cluster"), tmp_path / "again", shape_is_published=True)
