"""One outcome as one HTML file: verdict, tables, plots. Self-contained: no network, no scripts.

Knows records and texts; the plots' geometry is svg.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from autoprune.core.outcome import OutcomeRecord, UnitRecord
from autoprune.core.policy import Measured
from autoprune.report import numbers, plots
from autoprune.report.style import STYLE


def render(outcome: OutcomeRecord) -> str:
    """The report as HTML text."""
    sections = [
        _head(outcome),
        _section("Result", _measured({"dense": outcome.dense, "chosen": outcome.chosen, **outcome.baselines}, outcome)),
        _figures(outcome),
        _section("Widths", _legend(plots.WIDTHS_LEGEND) + plots.widths(outcome)),
        _section("Finalists", _finalists(outcome)),
        _section("Units", _units(outcome.units)),
        _section("How this was measured", _method(outcome)),
    ]
    title = escape(f"{outcome.title} — autoprune")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _head(outcome: OutcomeRecord) -> str:
    named = (("budget", outcome.budget), ("floor", outcome.floor))
    goals = " · ".join(escape(f"{name} {text}") for name, text in named if text)
    state = "met" if outcome.met else "missed"
    parts = [
        f'<header><p class="eyebrow">autoprune report</p><h1>{escape(outcome.title)}</h1><p class="goal">{goals}</p>',
        f'<p class="verdict {state}"><span class="badge">{state}</span> {escape(outcome.verdict)}</p>',
    ]
    told = (numbers.unverified(outcome.policy), numbers.against_baselines(outcome))
    parts += [f'<p class="verdict missed">{escape(sentence)}</p>' for sentence in told if sentence is not None]
    return "".join([*parts, "</header>"])


def _figures(outcome: OutcomeRecord) -> str:
    figures = (
        ("Search", plots.PROGRESS_LEGEND, plots.progress(outcome), "Divergence from the dense model, lower is better."),
        (
            "Trade-off",
            plots.TRADE_OFF_LEGEND,
            plots.trade_off(outcome),
            "Every candidate; the front is the best for its cost.",
        ),
        ("Prediction", plots.PREDICTION_LEGEND, plots.prediction(outcome), _check(outcome)),
    )
    drawn = [
        f"<figure><h2>{title}</h2>{_legend(legend)}{picture}<figcaption>{escape(caption)}</figcaption></figure>"
        for title, legend, picture, caption in figures
        if picture
    ]
    return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""


def _legend(entries: Mapping[str, str]) -> str:
    items = "".join(f'<li><i class="key {css}"></i>{escape(text)}</li>' for css, text in entries.items())
    return f'<ul class="legend">{items}</ul>'


def _check(outcome: OutcomeRecord) -> str:
    check = outcome.check
    if check is None:
        return "Latency was not part of the budget."
    return (
        f"On {check.models} models that the cost table was not built from, its median error is "
        f"{numbers.share(check.median_error)}, its worst {numbers.share(check.worst_error)}."
    )


def _measured(rows: Mapping[str, Measured], outcome: OutcomeRecord) -> str:
    remembered = any(model.memory_bytes is not None for model in rows.values())
    columns = (
        "model",
        outcome.metric,
        "latency",
        "p10–p90 ms",
        "of dense",
        "predicted",
        "MACs",
        "params",
        "size",
        *(["memory"] if remembered else []),
        "divergence",
    )
    lines = [
        (
            numbers.label(name),
            numbers.score(model.score, outcome.metric),
            numbers.median(model.latency_ms),
            numbers.spread(model.latency_ms),
            numbers.share(model.ratio),
            numbers.milliseconds(model.predicted_ms),
            *numbers.counted(model),
            *([numbers.memory(model)] if remembered else []),
            numbers.NOTHING if model.divergence is None else numbers.digits(model.divergence),
        )
        for name, model in rows.items()
    ]
    return _table(columns, lines, text_columns=1, strong="chosen")


def _finalists(outcome: OutcomeRecord) -> str:
    rows = {f"{index + 1}": model for index, model in enumerate(outcome.finalists)}
    chosen = next((name for name, model in rows.items() if model == outcome.chosen), None)
    if chosen is not None:
        rows = {("chosen" if name == chosen else name): model for name, model in rows.items()}
    return _measured(rows, outcome) if rows else ""


def _units(units: Sequence[UnitRecord]) -> str:
    columns = ("unit", "kind", "method", "kept", "of", "MACs share", "latency share")
    lines = [
        (
            unit.name,
            unit.kind,
            "dropped" if unit.keep == 0 else unit.method if unit.method != "keep" else "",
            str(unit.keep),
            str(unit.width),
            numbers.share(unit.macs_share),
            numbers.share(unit.latency_share),
        )
        for unit in units
    ]
    return _table(columns, lines, text_columns=3)


def _method(outcome: OutcomeRecord) -> str:
    target, model = outcome.policy.target, outcome.policy.model
    facts: list[tuple[str, str]] = []
    if model is not None:
        facts.append(("model", f"{model.name}, {model.params:,} parameters, {model.fingerprint}"))
    if target is not None:
        threads = f"{target.threads} thread{'s' * (target.threads > 1)}"
        facts.append(
            ("target", f"{target.runtime} {target.device}, {threads}, batch {target.batch}. {target.where}".strip())
        )
    facts.append(("trials", str(len(outcome.trials))))
    if outcome.seconds:
        facts.append(("seconds", ", ".join(f"{name} {seconds:.1f}" for name, seconds in outcome.seconds.items())))
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    notes = "".join(f"<li>{escape(note)}</li>" for note in outcome.notes)
    return f"<dl>{rows}</dl>" + (f"<ul>{notes}</ul>" if notes else "")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _table(
    columns: Sequence[str], lines: Iterable[Sequence[str]], *, text_columns: int, strong: str | None = None
) -> str:
    def cell(tag: str, index: int, text: str) -> str:
        css = "" if index < text_columns else ' class="number"'
        return f"<{tag}{css}>{escape(text)}</{tag}>"

    head = "".join(cell("th", index, name) for index, name in enumerate(columns))
    body = "".join(
        ('<tr class="strong">' if line[0] == strong else "<tr>")
        + "".join(cell("td", index, text) for index, text in enumerate(line))
        + "</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
