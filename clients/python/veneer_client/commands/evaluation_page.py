"""One self-contained page about an evaluation: nothing is fetched when it is opened, no script runs."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from veneer.trainer.v1.evaluation_pb2 import Evaluation, Metric, Sample
from veneer_client._comparison import Comparison, Difference
from veneer_client._names import short

Pictures = Mapping[int, Sequence[str]]
"""By a sample's index, its pictures as HTML elements."""

_BINS = 20
_WIDTH, _HEIGHT = 360, 120  # of a plot, in CSS pixels

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 small { font-weight: normal; opacity: .6 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
td, th { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.interval { position: relative; width: 18rem; height: .8rem; background: #8883; border-radius: 2px }
.interval i { position: absolute; height: 100%; background: #4a7fd4; opacity: .5; border-radius: 2px }
.interval b { position: absolute; width: 2px; height: 100%; background: currentColor }
.plots { display: flex; flex-wrap: wrap; gap: 2rem } figure { margin: 0 } svg { overflow: visible }
svg rect { fill: #4a7fd4 } svg text { font-size: 11px; fill: currentColor }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }
.sample { border: 1px solid #8886; border-left: 4px solid #c33; border-radius: 8px; padding: .8rem }
.sample.hit { border-left-color: #2a2 } .sample { overflow-wrap: anywhere }
.sample img { max-width: 100%; max-height: 12rem; border-radius: 4px }
.role { opacity: .6; font-size: .8rem } p { margin: .1rem 0 .5rem; white-space: pre-wrap }
.better { color: #2a2 } .worse, .failure { color: #c33 }
"""


def page(
    evaluation: Evaluation,
    samples: Sequence[Sample],
    shown: Sequence[Sample],
    pictures: Pictures,
    comparison: Comparison | None = None,
) -> str:
    """The page.

    Args:
        evaluation: with its figures.
        samples: all of them, for the plots.
        shown: those to show one by one.
        pictures: of those.
        comparison: with an earlier evaluation, whose answers stand beside.
    """
    spec = evaluation.spec
    title = f"{short(spec.subject)} on {spec.split} of {short(spec.dataset_version)}"
    failures = sum(sample.HasField("failure") for sample in samples)
    parts = [
        f"<h1>{escape(title)} <small>{escape(short(evaluation.name))}</small></h1>",
        f"<p>{len(samples):,} of {evaluation.total_samples:,} rows answered, {failures:,} without an answer; "
        f"digest of who answered {evaluation.answered_by_digest[:12]}</p>",
        "<h2>Figures</h2>",
        _figures(evaluation.metrics),
    ]
    earlier: dict[int, Sample] = {}
    if comparison is not None:
        earlier = {new.index: old for old, new in comparison.pairs}
        parts += [f"<h2>Against {escape(short(comparison.before.spec.subject))}</h2>", _differences(comparison)]
    parts += ["<h2>Over the samples</h2>", '<div class="plots">', *_plots(samples), "</div>"]
    parts += [f"<h2>{len(shown):,} samples</h2>", '<div class="samples">']
    parts += [_sample(each, pictures.get(each.index, ()), earlier.get(each.index)) for each in shown]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</div></body></html>\n"
    )


def _figures(metrics: Iterable[Metric]) -> str:
    lines = []
    for each in metrics:
        ends = [100 * min(max(end, 0.0), 1.0) for end in (each.low, each.value, each.high)]
        bar = (
            f'<div class="interval"><i style="left:{ends[0]:.2f}%;width:{ends[2] - ends[0]:.2f}%"></i>'
            f'<b style="left:{ends[1]:.2f}%"></b></div>'
        )
        lines.append(
            f'<tr><td>{escape(each.metric)}</td><td class="n">{100 * each.value:.1f} %</td>'
            f'<td class="n">{100 * each.low:.1f}-{100 * each.high:.1f}</td><td class="n">{each.count:,}</td>'
            f"<td>{bar}</td></tr>"
        )
    head = '<tr><th>metric</th><th class="n">value</th><th class="n">95 % interval</th><th class="n">over</th></tr>'
    return f"<table>{head}{''.join(lines)}</table>"


def _differences(comparison: Comparison) -> str:
    head = "".join(
        f'<th class="n">{name}</th>'
        for name in ("before", "after", "difference", "95 % interval", "rows up / down", "p")
    )
    lines = "".join(map(_difference, comparison.differences))
    return f"<p>{len(comparison.pairs):,} rows of both</p><table><tr><th>metric</th>{head}<th></th></tr>{lines}</table>"


def _difference(each: Difference) -> str:
    kind = each.verdict if each.larger_than_chance else ""
    cells = (
        f"{100 * each.before:.1f} %", f"{100 * each.after:.1f} %", f"{100 * each.difference:+.1f}",
        f"{100 * each.low:+.1f} to {100 * each.high:+.1f}", f"{each.only_after} / {each.only_before}",
        f"{each.p_value:.3g} ({each.test})",
    )  # fmt: skip
    figures = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f'<tr><td>{escape(each.metric)}</td>{figures}<td class="{kind}">{each.verdict}</td></tr>'


def _plots(samples: Sequence[Sample]) -> Iterable[str]:
    """A histogram of each metric that is more than right or wrong, and of latency."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample.metrics:
            values.setdefault(metric.metric, []).append(metric.value)
    for name, found in values.items():
        if set(found) - {0.0, 1.0}:
            yield _histogram(name, found)
    answered = [sample.latency_ms for sample in samples if sample.latency_ms]
    if answered:
        yield _histogram("latency in ms", answered)


def _histogram(name: str, values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    width = (high - low) / _BINS or 1.0
    counts = [0] * _BINS
    for value in values:
        counts[min(int((value - low) / width), _BINS - 1)] += 1
    most, step = max(counts), _WIDTH / _BINS
    bars = "".join(
        f'<rect x="{index * step:.1f}" y="{_HEIGHT * (1 - count / most):.1f}" width="{step - 1:.1f}" '
        f'height="{_HEIGHT * count / most:.1f}"><title>{low + index * width:.4g}: {count}</title></rect>'
        for index, count in enumerate(counts)
    )
    return (
        f'<figure><figcaption>{escape(name)}</figcaption><svg width="{_WIDTH}" height="{_HEIGHT + 18}">{bars}'
        f'<text y="{_HEIGHT + 14}">{low:.4g}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 14}" text-anchor="end">{high:.4g}</text></svg></figure>'
    )


def _sample(sample: Sample, pictures: Sequence[str], earlier: Sample | None) -> str:
    hit = not sample.HasField("failure") and sample.answer == sample.expected
    said = [("asked", escape(sample.prompt)), ("expected", escape(sample.expected))]
    if earlier is not None:
        said.append(("before", _answer(earlier)))
    said.append(("got", _answer(sample)))
    texts = "".join(f'<span class="role">{role}</span><p>{text}</p>' for role, text in said)
    figures = [f"{each.metric} {100 * each.value:.0f} %" for each in sample.metrics]
    facts = " · ".join(itertools.chain([f"row {sample.index}", sample.row_digest[:12]], figures))
    return (
        f'<div class="sample{" hit" if hit else ""}">{"".join(pictures)}{texts}'
        f'<span class="role">{escape(facts)}</span></div>'
    )


def _answer(sample: Sample) -> str:
    if sample.HasField("failure"):
        return f'<span class="failure">{escape(sample.failure.message)}</span>'
    return escape(sample.answer)
