"""`veneer chat`."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from veneer.dataset.v1.conversation_pb2 import Message
from veneer.inference.v1.inference_pb2 import SamplingParams
from veneer.inference.v1.inference_service_pb2 import StreamGenerateResponse
from veneer_client import Client, InvalidArgument, VeneerError, message
from veneer_client._names import short
from veneer_client.commands import screen
from veneer_client.commands.options import Directory, Json, connect

_Ask: TypeAlias = Callable[[Client, Sequence[Message]], tuple[str, StreamGenerateResponse]]
_Check: TypeAlias = Callable[[Sequence[Message]], object]


def chat(
    question: Annotated[str | None, typer.Argument(help="What to ask. Default: a conversation.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Who answers: digits, digits@3. Default: the base.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, where no adapter is named.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to ask about; may be repeated.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 takes the likeliest words.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws.")] = None,
    schema: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File with a JSON Schema: every answer is JSON of it."),
    ] = None,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Asks the base or an adapter and shows the answer as it comes. Without a question it is a conversation.

    Example:
        veneer chat --adapter digits --image seven.png "Which digit is this?"
        veneer chat --adapter invoices --image 17.png --schema invoice.schema.json "Extract number, date and total."
    """
    sampling = SamplingParams(json_schema=schema.read_text("utf-8")) if schema else None

    def ask(client: Client, messages: Sequence[Message]) -> tuple[str, StreamGenerateResponse]:
        last, text = StreamGenerateResponse(), ""
        for piece in client.stream(
            messages,
            adapter=adapter,
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            sampling=sampling,
        ):
            if json:
                screen.print_json(screen.as_json(piece))
            else:
                print(piece.text, end="", flush=True)
            text += piece.text
            last = piece
        if not json:
            print()
        return text, last

    pictures = image or []
    with connect(directory) as client:
        if question is not None:
            _, last = ask(client, [message("user", *pictures, question)])
            if not json and sys.stderr.isatty():
                print(_who(last), file=sys.stderr)
            return
        if json:
            raise typer.BadParameter("a conversation prints no JSON: give a question")
        _converse(client, ask, pictures, lambda each: client.count_tokens(each, adapter=adapter, model=model))


def _converse(client: Client, ask: _Ask, pictures: Sequence[Path], check: _Check) -> None:
    print("Ask; an empty line or Ctrl-D ends. `/image PATH` adds a picture to the next question.")
    messages: list[Message] = []
    waiting: list[Path] = []

    def add(picture: Path) -> None:
        try:
            check([message("user", picture)])  # decoded where it will be read: a broken one spoils no question
        except VeneerError as error:
            print(f"veneer: {picture} is left out: {error}", file=sys.stderr)
        else:
            waiting.append(picture)

    for picture in pictures:
        add(picture)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if not line:
            return
        if line.startswith("/image "):
            add(Path(line.removeprefix("/image ").strip()))
            continue
        try:
            turn = [*messages, message("user", *waiting, line)]
            answer, _ = ask(client, turn)
        except VeneerError as error:  # one bad question does not end a conversation
            print(f"veneer: {error}", file=sys.stderr)
            if waiting and isinstance(error, InvalidArgument):  # such as too many: the next question would fail too
                print("veneer: its pictures are left out", file=sys.stderr)
                waiting.clear()
            continue
        messages = [*turn, message("assistant", answer)]
        waiting.clear()


def _who(last: StreamGenerateResponse) -> str:
    who = short(last.served_by.adapter_version or last.served_by.model)
    took_s = screen.seconds(last.timings.total)
    return f"({who}, {last.usage.answer_tokens} tokens in {took_s:.2f} s)"
