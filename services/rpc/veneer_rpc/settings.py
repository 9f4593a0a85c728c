"""Settings of a process: one frozen dataclass, read once in `__main__`, right or refused as a whole.

Sources, the first that names a setting wins: flags (`--grace-s 5`), environment
(`VENEER_DATASET_GRACE_S=5`), a TOML file (`grace_s = 5`), the default. Names nobody knows are refused in
each, and all problems are told at once. Written on the standard library: pydantic-settings ignores unknown
variables and stops at the first bad source.
"""

import argparse
import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from veneer_rpc import addresses
from veneer_rpc.channel import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S

_S = TypeVar("_S", bound="Settings")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class SettingsError(ValueError):
    """Settings that cannot be used; the message lists every problem, one a line."""


def setting(
    help: str,
    default: Any = dataclasses.MISSING,  # noqa: ANN401  # like dataclasses.field
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:  # noqa: ANN401  # like dataclasses.field
    """Declares one setting: description, default (without one it must be given) and range, ends included."""
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every process's settings; holds nothing but the rule that an instance is valid.

    Raises:
        SettingsError: when made, with every problem.
    """

    def __post_init__(self) -> None:
        found = [*self._out_of_range(), *self.problems()]
        if found:
            raise SettingsError("\n".join(found))

    def problems(self) -> Iterator[str]:
        """Yields what is wrong beyond types and ranges; a subclass adds its own with `yield from super()`."""
        yield from ()

    def _out_of_range(self) -> Iterator[str]:
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["minimum"], field.metadata["maximum"]
            if value is not None and not ((low is None or value >= low) and (high is None or value <= high)):
                yield f"{field.name}: must be {_range(low, high)}, was {value}"


# ruff: noqa: RUF009  # setting() is dataclasses.field with a description
@dataclass(frozen=True, kw_only=True)
class ServerSettings(Settings):
    """What every server process can be told."""

    tokens_file: Path = setting("JSON file with the hashes of accepted tokens; there is no server without them.")
    bind: str = setting("Address to listen on: host:port (port 0 takes a free one) or unix:/path.", "127.0.0.1:0")
    tls_certificate_file: Path | None = setting("PEM certificate chain; with the key, turns TLS on.", None)
    tls_key_file: Path | None = setting("PEM private key of the certificate.", None)
    reflection: bool = setting("Let callers with a token list services and messages.", False)
    log_level: Literal["debug", "info", "warning", "error"] = setting("Least severe line to log.", "info")
    log_format: Literal["json", "console"] = setting("One JSON object a line, or text for people.", "json")
    grace_s: float = setting("Seconds that calls in flight get to finish after SIGTERM.", 30.0, 0, 3600)
    max_concurrent_calls: int = setting("Calls served at once; more get RESOURCE_EXHAUSTED.", 256, 1, 100_000)
    max_concurrent_streams: int = setting(
        "Calls open at once on one connection; a client keeps more waiting on its side.", 1024, 1, 100_000
    )
    unary_deadline_s: float = setting(
        "Longest a call with one request and one response may take.", 300.0, 0.001, 86_400
    )
    stream_deadline_s: float = setting("Longest a call with a stream may take.", 3600.0, 0.001, 604_800)
    keepalive_s: float = setting("Silence on a connection after which a ping is sent.", KEEPALIVE_S, 0.1, 7200)
    keepalive_timeout_s: float = setting(
        "Longest wait for a ping's answer before the connection counts as dead.",
        KEEPALIVE_TIMEOUT_S,
        0.1,
        600,
    )

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls_certificate_file is not None and self.tls_key_file is not None

    def problems(self) -> Iterator[str]:
        """See Settings."""
        wrong = addresses.check(self.bind)
        if wrong:
            yield f"bind: {wrong}"
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            yield "tls_certificate_file, tls_key_file: give both or none"
        if not self.tls and not wrong and not addresses.is_local(self.bind):
            yield f"bind: {self.bind} is open to other machines: give tls_certificate_file and tls_key_file"
        for name in ("tokens_file", "tls_certificate_file", "tls_key_file"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                yield f"{name}: there is no file {path}"


def load(kind: type[_S], prefix: str, argv: Sequence[str], environ: Mapping[str, str]) -> _S:
    """Reads a process's settings from all sources; `--help` prints the help and exits.

    Args:
        kind: the settings class.
        prefix: of its environment variables, such as `VENEER_DATASET_`. `--config` or `<prefix>CONFIG`
            names the file.
        argv: flags, without the program's name.
        environ: the environment.

    Raises:
        SettingsError: with every problem: unknown names, bad values, missing settings.
    """
    problems: list[str] = []
    flags = _read_flags(kind, prefix, argv, problems)
    variables = {name.removeprefix(prefix).lower(): text for name, text in environ.items() if name.startswith(prefix)}
    file_name = flags.pop("config", None) or variables.pop("config", None)
    sources = (
        (flags, lambda name: _flag(name)),
        (variables, lambda name: prefix + name.upper()),
        (_read_file(file_name, problems), lambda name: f"{file_name}: {name}"),
    )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for source, place in sources:
        for name, raw in source.items():
            if name not in fields:
                problems.append(f"{place(name)}: no such setting")
                continue
            try:
                value = _convert(raw, hints[name])
            except ValueError as error:
                problems.append(f"{place(name)}: {error}")
            else:
                values.setdefault(name, value)
                continue
            values.setdefault(name, None)  # told already: not missing too
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            problems.append(f"{name}: must be given ({_flag(name)}, {prefix}{name.upper()} or in the file)")
    if problems:
        raise SettingsError("\n".join(problems))
    return kind(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise SettingsError(message)


def _read_flags(kind: type[Settings], prefix: str, argv: Sequence[str], problems: list[str]) -> dict[str, str]:
    parser = _Parser(
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description=f"Each setting may also come from the environment ({prefix}<NAME>) or a TOML file.",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings.")
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        parser.add_argument(_flag(field.name), dest=field.name, help=_describe(field, hints[field.name]), metavar="X")
    try:
        known, unknown = parser.parse_known_args(argv)
    except SettingsError as error:
        problems.append(str(error))
        return {}
    problems += [f"{text}: no such flag" for text in unknown]
    return vars(known)


def _read_file(name: str | None, problems: list[str]) -> dict[str, Any]:
    if name is None:
        return {}
    try:
        return tomllib.loads(Path(name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{name}: {error}")
        return {}


def _convert(raw: Any, hint: Any) -> Any:  # noqa: ANN401  # any setting's type
    """Turns a text, or a TOML value, into a setting's type."""
    kind, choices = _kind(hint)
    if choices:
        if raw not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, was {raw!r}")
        return raw
    if kind is bool and isinstance(raw, str):
        if raw.lower() not in _TRUTH:
            raise ValueError(f"must be true or false, was {raw!r}")
        return _TRUTH[raw.lower()]
    from_file = not isinstance(raw, str)
    fits = type(raw) is kind or (kind is float and type(raw) is int)
    try:
        if not from_file or fits:
            return kind(raw)
    except ValueError:
        pass
    raise ValueError(f"must be {_WORDS[kind]}, was {raw!r}")


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
}


def _kind(hint: Any) -> tuple[Any, tuple[str, ...]]:  # noqa: ANN401
    """Returns the type behind an optional one, and the choices of a Literal."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    return (str, typing.get_args(hint)) if typing.get_origin(hint) is Literal else (hint, ())


def _describe(field: dataclasses.Field[Any], hint: Any) -> str:  # noqa: ANN401
    kind, choices = _kind(hint)
    facts = [" | ".join(choices) if choices else _WORDS[kind]]
    if field.metadata["minimum"] is not None or field.metadata["maximum"] is not None:
        facts.append(_range(field.metadata["minimum"], field.metadata["maximum"]))
    if field.default is dataclasses.MISSING:
        facts.append("required")
    elif field.default is not None:
        facts.append(f"default {str(field.default).lower() if kind is bool else field.default}")
    return f"{field.metadata['help']} ({'; '.join(facts)})".replace("%", "%%")


def _range(low: float | None, high: float | None) -> str:
    return " to ".join(f"{end:,}".replace(",", "_") for end in (low, high) if end is not None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
