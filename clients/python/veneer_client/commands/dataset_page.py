"""One self-contained page about some rows of a dataset: nothing is fetched when it is opened, no script runs."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from veneer.dataset.v1.conversation_pb2 import Message, Role
from veneer.dataset.v1.dataset_pb2 import DatasetVersion, Finding, Severity
from veneer.dataset.v1.dataset_service_pb2 import Example
from veneer_client.commands.pictures import image

_CLASSES_SHOWN = 20
_LENGTHS = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 5000)  # least characters of an answer, by bucket

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 small { font-weight: normal; opacity: .6 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
td, th { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #4a7fd4; height: .8rem; min-width: 1px; border-radius: 2px }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
.row { border: 1px solid #8886; border-radius: 8px; padding: .8rem; overflow-wrap: anywhere }
.row img { max-width: 100%; max-height: 14rem; image-rendering: auto; border-radius: 4px }
.role { opacity: .6; font-size: .8rem } p { margin: .1rem 0 .5rem; white-space: pre-wrap }
.ROLE_ASSISTANT p { font-weight: 600 } .unsupervised { opacity: .5 }
.ERROR { color: #c33 } .WARNING { color: #a70 }
"""


def page(version: DatasetVersion, rows: Sequence[Example], findings: Sequence[Finding]) -> str:
    """The page.

    Args:
        version: with its report.
        rows: some of its rows, pictures as files or as resized pixels.
        findings: some of its findings.
    """
    report = version.report
    parts = [
        f"<h1>{escape(version.name.split('/')[1])} <small>{version.digest[:12]}</small></h1>",
        f"<p>{report.submitted_rows:,} rows = {report.accepted_rows:,} accepted + {report.refused_rows:,} refused; "
        f"{version.picture_count:,} pictures</p>",
        "<h2>Splits</h2>",
        _bars((each.split, each.row_count) for each in version.splits),
    ]
    if report.length_histogram:
        parts.append(f"<h2>Tokens of a row</h2><p>{report.train_tokens_per_epoch:,} an epoch</p>")
        parts.append(_bars((f"from {each.at_least_tokens:,}", each.row_count) for each in report.length_histogram))
    answers = [_text(message) for row in rows for message in row.messages if message.role == Role.ROLE_ASSISTANT]
    parts += ["<h2>Characters of an answer, among these rows</h2>", _bars(_lengths(answers))]
    classes = Counter(answers)
    if len(classes) <= max(_CLASSES_SHOWN, len(answers) // 4):
        parts += ["<h2>Answers, among these rows</h2>", _bars(classes.most_common(_CLASSES_SHOWN))]
    parts += ["<h2>Findings</h2>", _findings(version, findings)]
    parts += [f"<h2>{len(rows)} rows</h2>", '<div class="rows">', *map(_row, rows), "</div>"]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(version.name.split('/')[1])}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _bars(counts: Iterable[tuple[str, int]]) -> str:
    pairs = list(counts)
    most = max((count for _, count in pairs), default=1)
    lines = (
        f'<tr><td>{escape(name[:80])}</td><td class="n">{count:,}</td>'
        f'<td style="width:24rem"><div class="bar" style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for name, count in pairs
    )
    return f"<table>{''.join(lines)}</table>"


def _lengths(answers: Sequence[str]) -> Iterator[tuple[str, int]]:
    counts = Counter(max(least for least in _LENGTHS if least <= max(1, len(answer))) for answer in answers)
    for least in _LENGTHS:
        if counts[least]:
            yield f"from {least:,}", counts[least]


def _findings(version: DatasetVersion, findings: Sequence[Finding]) -> str:
    if not findings:
        return "<p>none</p>"
    counts = [(each.code, each.count) for each in version.report.finding_counts]
    lines = []
    for each in findings:
        name = Severity.Name(each.severity).removeprefix("SEVERITY_")
        place = f"{each.path}:{each.line}" if each.line else each.path
        lines.append(
            f'<tr><td class="{name}">{name.lower()}</td><td>{escape(place)} {escape(each.json_path)}</td>'
            f"<td>{escape(each.code)}</td><td>{escape(each.found)}. {escape(each.remedy)}</td></tr>"
        )
    total = sum(count for _, count in counts)
    more = f"<p>and {total - len(findings):,} more: veneer dataset show</p>" if total > len(findings) else ""
    return f"{_bars(counts)}<table>{''.join(lines)}</table>{more}"


def _row(row: Example) -> str:
    said = []
    for message in row.messages:
        role = Role.Name(message.role)
        pieces = "".join(
            image(part.picture) if part.HasField("picture") else f"<p>{escape(part.text)}</p>" for part in message.parts
        )
        weight = " unsupervised" if message.unsupervised else ""
        said.append(
            f'<div class="{role}{weight}"><span class="role">{role.removeprefix("ROLE_").lower()}</span>{pieces}</div>'
        )
    return f'<div class="row" title="row {row.index}, {row.row_digest[:12]}">{"".join(said)}</div>'


def _text(message: Message) -> str:
    return "".join(part.text for part in message.parts)
