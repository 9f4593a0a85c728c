from pathlib import Path

import pytest

from veneer_rpc.names import ModelName
from veneer_rpc.settings import SettingsError, load
from veneer_trainer.settings import TrainerSettings


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, str]:
    for name in ("tokens.json", "key.pem"):
        (tmp_path / name).touch()
    return {
        "--tokens-file": str(tmp_path / "tokens.json"), "--data": str(tmp_path / "data"),
        "--models": f"tiny={tmp_path}", "--dataset": "127.0.0.1:1", "--delegation-key-file": str(tmp_path / "key.pem"),
    }  # fmt: skip


def read(flags: dict[str, str]) -> TrainerSettings:
    return load(TrainerSettings, "VENEER_TRAINER_", [text for pair in flags.items() for text in pair], {})


def test_what_the_operator_gives_is_read(flags: dict[str, str], tmp_path: Path) -> None:
    settings = read(flags | {"--tenant-weights": "acme=2,other=0.5"})
    assert settings.model_directories == {ModelName("tiny"): tmp_path}
    assert settings.weights == {"acme": 2.0, "other": 0.5}
    assert (settings.lease_s, settings.heartbeat_s) == (30, 5)


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--models", "Tiny=/", "models: must be NAME=DIRECTORY"),
        ("--models", "tiny=/none", "models: must be NAME=DIRECTORY"),
        ("--tenant-weights", "acme=0", "tenant_weights: must be TENANT=WEIGHT"),
        ("--tenant-weights", "acme=x", "tenant_weights: must be TENANT=WEIGHT"),
        ("--heartbeat-s", "16", r"heartbeat_s: must be at most half of lease_s \(30.0\), was 16.0"),
        ("--dataset", "10.0.0.1:1", "dataset: 10.0.0.1:1 is another machine"),
        ("--delegation-key-file", "/none", "delegation_key_file: there is no file /none"),
    ],
)
def test_what_cannot_be_used_is_told(flags: dict[str, str], flag: str, value: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        read(flags | {flag: value})
