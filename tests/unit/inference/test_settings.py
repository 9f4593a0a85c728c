"""Settings: the launcher's flags, and everything that is wrong at once."""

from pathlib import Path

import pytest

from veneer_inference.settings import InferenceSettings
from veneer_rpc.settings import SettingsError, load


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, str]:
    """What the launcher gives."""
    for name in ("tokens.json", "replica.token", "public.pem"):
        (tmp_path / name).write_text("{}")
    return {
        "bind": "127.0.0.1:0",
        "tokens-file": str(tmp_path / "tokens.json"),
        "data": str(tmp_path / "data"),
        "replica": "replica-1",
        "models": f"tiny={tmp_path}",
        "trainer": "127.0.0.1:1",
        "trainer-token-file": str(tmp_path / "replica.token"),
        "dataset": "127.0.0.1:2",
        "delegation-public-key-file": str(tmp_path / "public.pem"),
        "threads": "2",
        "die-with-parent": "true",
    }


def read(flags: dict[str, str]) -> InferenceSettings:
    argv = [text for flag, value in flags.items() for text in (f"--{flag}", value)]
    return load(InferenceSettings, "VENEER_INFERENCE_", argv, {})


def test_the_launchers_flags(flags: dict[str, str], tmp_path: Path) -> None:
    settings = read(flags)
    assert str(settings.model_name) == "models/tiny"
    assert settings.model_directory == tmp_path
    assert (settings.threads, settings.dtype, settings.die_with_parent) == (2, "float32", True)


@pytest.mark.parametrize(
    ("flag", "value", "problem"),
    [
        ("models", "tiny", "models: must be NAME=DIRECTORY"),
        ("models", "Tiny=/", "models: must be NAME=DIRECTORY"),
        ("models", "tiny=/nowhere/at/all", "models: must be NAME=DIRECTORY"),
        ("replica", "", "replica: must be 1 to 63"),
        ("replica", "r" * 64, "replica: must be 1 to 63"),
        ("trainer", "10.0.0.1:1", "trainer_root_certificates_file: must be given"),
        ("dataset", "10.0.0.1:1", "dataset_root_certificates_file: must be given"),
        ("trainer-token-file", "/nowhere", "trainer_token_file: there is no file"),
        ("delegation-public-key-file", "/nowhere", "delegation_public_key_file: there is no file"),
        ("dtype", "float64", "dtype: must be one of float32, bfloat16"),
        ("kv-tokens", "1", "kv_tokens: must be"),
    ],
)
def test_what_is_wrong_is_named(flags: dict[str, str], flag: str, value: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(flags | {flag: value})
    assert problem in str(caught.value).replace("--dtype", "dtype")


def test_all_that_is_wrong_is_told_at_once(flags: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as caught:
        read(flags | {"models": "x", "replica": "", "trainer": "10.0.0.1:1"})
    assert len(str(caught.value).splitlines()) == 3


def test_vllm_has_no_eight_bits_of_ours(flags: dict[str, str]) -> None:
    assert read(flags | {"engine": "vllm", "dtype": "bfloat16"}).engine == "vllm"
    with pytest.raises(SettingsError, match="float32 or bfloat16 with the engine vllm, was int8"):
        read(flags | {"engine": "vllm", "dtype": "int8"})
