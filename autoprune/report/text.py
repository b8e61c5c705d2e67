"""Records as tables for the terminal. Knows rich's renderables, not how or where they are printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoprune.core.comparison import PolicyDifference
from autoprune.core.exchange import ExportRecord, ImportRecord
from autoprune.core.outcome import CoverageRecord, OutcomeRecord, PackedRecord, UnitsRecord, VerifyRecord
from autoprune.core.policy import Measured, Policy, UnitDecision
from autoprune.report import numbers

BAR_WIDTH = 24
MOST_COLUMNS = 6
MOST_LINES = 40


def units_view(record: UnitsRecord) -> RenderableType:
    """What can be pruned: name, kind, width, shares of MACs and latency; how much that is, and why the rest stays."""
    table = _table("unit", "kind", numeric=("width", "MACs", "latency"))
    for unit in record.units:
        shares = numbers.share(unit.macs_share), numbers.share(unit.latency_share)
        table.add_row(Text(unit.name), unit.kind, str(unit.width), *shares)
    kinds = Counter(unit.kind for unit in record.units)
    many = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    count = Text(f"{len(record.units)} units ({many})", style="bold")
    return Group(count, table, Text(""), *coverage_view(record.coverage))


def coverage_view(coverage: CoverageRecord) -> list[RenderableType]:
    """How much of the model units reach, and a table of what stays whole, what costs most first."""
    reached = f"reached: {numbers.share(coverage.macs)} of the MACs, {numbers.share(coverage.params)} of the parameters"
    inside = f"; weights inside layers: {numbers.share(coverage.weights)} of the parameters" if coverage.weights else ""
    parts: list[RenderableType] = [Text(reached + inside, style="bold")]
    if coverage.kept:
        table = _table("kept whole", "why", numeric=("unreached", "touches"))
        table.add_column("what to do", overflow="fold")
        for kept in coverage.kept:
            more = f" and {len(kept.roots) - 1} more" if len(kept.roots) > 1 else ""
            shares = numbers.share(kept.macs_share), numbers.share(kept.held_share)
            table.add_row(Text(kept.roots[0] + more), Text(kept.reason), *shares, Text(kept.advice or "-"))
        parts.append(table)
    return parts


def policy_view(policy: Policy) -> RenderableType:
    """A policy: header, widths as bars, evidence."""
    parts: list[RenderableType] = [_header(policy), _widths(policy.units)]
    evidence = policy.evidence
    if evidence is not None:
        rows = {"dense": evidence.dense, "pruned": evidence.pruned}
        parts.append(measured_table({**rows, **evidence.baselines}, metric=evidence.metric))
    warning = numbers.unverified(policy)
    if warning is not None:
        parts.append(Text(warning, style="yellow"))
    return Group(*_spaced(parts))


def difference_view(found: PolicyDifference, *, names: tuple[str, str]) -> RenderableType:
    """Two policies: each unit that differs with both widths as bars, then what was measured of both."""
    parts: list[RenderableType] = [Text(f"before: {names[0]}\nafter:  {names[1]}", style="dim")]
    parts.append(Text(f"{len(found.units)} units differ, {found.same} are the same", style="bold"))
    if found.units:
        table = _table("unit", numeric=())
        for side in ("before", "after"):
            table.add_column(side, no_wrap=True, min_width=BAR_WIDTH // 2)
            table.add_column("", overflow="fold")
        for each in found.units:
            cells = [cell for unit in (each.before, each.after) for cell in _side(unit)]
            table.add_row(Text(each.unit), *cells)
        parts.append(table)
    rows = {side: model for side, model in (("before", found.before), ("after", found.after)) if model is not None}
    if rows:
        parts.append(measured_table(rows, metric=found.metric))
    return Group(*_spaced([*parts, *(Text(note, style="yellow") for note in found.notes)]))


def _side(unit: UnitDecision | None) -> tuple[Text, Text]:
    """A unit's bar, and what is done to it in words."""
    if unit is None:
        return Text("█" * (BAR_WIDTH // 2), style="dim"), Text("kept", style="dim")
    return _bar(unit, BAR_WIDTH // 2), Text(f"{_kept(unit)}, {_how(unit)}")


def outcome_view(outcome: OutcomeRecord) -> RenderableType:
    """The result of one budget: verdict, dense against chosen against baselines."""
    rows = {"dense": outcome.dense, "chosen": outcome.chosen, **outcome.baselines}
    parts: list[RenderableType] = [
        _verdict(outcome.verdict, met=outcome.met),
        measured_table(rows, metric=outcome.metric),
    ]
    told = (numbers.unverified(outcome.policy), numbers.against_baselines(outcome))
    parts += [Text(sentence, style="yellow") for sentence in told if sentence is not None]
    return Group(*parts)


def packed_view(record: PackedRecord) -> RenderableType:
    """A packed model: every tensor's bytes beside the Shannon bound, and the whole file."""
    table = _table("tensor", "stored as", "shape", numeric=("bytes", "bound", "above"))
    for item in record.items:
        above = item.stored_bytes / item.shannon_bytes - 1 if item.shannon_bytes else 0.0
        bound = f"{item.shannon_bytes:,.0f}"
        shape = "x".join(map(str, item.shape)) or "one"
        table.add_row(Text(item.name), item.kind, shape, f"{item.stored_bytes:,}", bound, f"{100 * above:.1f} %")
    whole = f"{record.size_bytes:,} bytes, {record.overhead_bytes:,} of them header; {record.plain_bytes:,} as tensors"
    return Group(table, Text(whole, style="bold"), Text(f"written: {record.written}"))


def export_view(record: ExportRecord) -> RenderableType:
    """An export: its files, and what each aspect of the policy became."""
    styles = {"exact": "green", "approximated": "yellow", "dropped": "red"}
    remarks = [Text(line, style=styles[line.partition(":")[0]]) for line in record.lines]
    files = [Text(f"{name}: {path}") for name, path in record.files.items()]
    return Group(Text(f"{record.tool} (tested with {', '.join(record.tested)})", style="bold"), *remarks, *files)


def import_view(record: ImportRecord) -> RenderableType:
    """An import: what was written, and what could not be mapped, as far as that fits a screen."""
    told = [
        *(Text(f"not mapped: {line}", style="yellow") for line in record.unmapped),
        *(Text(f"note: {line}", style="dim") for line in record.notes),
    ]
    more = [Text(f"and {len(told) - MOST_LINES} more (--json lists all)")] if len(told) > MOST_LINES else []
    many = f"wrote {record.written}: {record.units} units; next: autoprune apply {record.written} --transfer"
    return Group(Text(many, style="bold"), *told[:MOST_LINES], *more)


def verify_view(record: VerifyRecord, *, metric: str) -> RenderableType:
    """What a verification measured."""
    table = measured_table({"dense": record.dense, "pruned": record.pruned}, metric=metric)
    return Group(_verdict(record.verdict, met=record.met), table)


def measured_table(rows: Mapping[str, Measured], *, metric: str) -> Table:
    """One column a model, so that it fits 80 characters: metric, latency with spread, ratio, prediction, counts.

    Many models have a row each, and fewer columns.
    """
    if len(rows) > MOST_COLUMNS:
        return _by_row(rows, metric)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("", style="dim")
    for name in rows:
        style = "bold" if name in ("chosen", "pruned") else ""
        table.add_column(Text(numbers.label(name)), justify="right", style=style, overflow="fold")
    cells = [_cells(model, metric) for model in rows.values()]
    names = (metric, "latency", "p10–p90 ms", "of dense", "predicted", "MACs", "params", "size", "memory")
    for index, name in enumerate(names):
        if any(column[index] != numbers.NOTHING for column in cells):
            table.add_row(Text(name), *(column[index] for column in cells))
    return table


def _by_row(rows: Mapping[str, Measured], metric: str) -> Table:
    table = _table("", numeric=(metric, "latency", "MACs", "params", "size"))
    for name, model in rows.items():
        style = "bold" if name in ("chosen", "pruned") else ""
        cells = (numbers.score(model.score, metric), numbers.median(model.latency_ms), *numbers.counted(model))
        table.add_row(Text(numbers.label(name)), *cells, style=style)
    return table


def _cells(model: Measured, metric: str) -> tuple[str, ...]:
    return (
        numbers.score(model.score, metric),
        numbers.median(model.latency_ms),
        numbers.spread(model.latency_ms),
        numbers.share(model.ratio),
        numbers.milliseconds(model.predicted_ms),
        *numbers.counted(model),
        numbers.memory(model),
    )


def line(sentence: str) -> RenderableType:
    """A sentence as it is, whatever brackets it holds."""
    return Text(sentence)


def plain(view: RenderableType, *, width: int = 120) -> str:
    """`view` as text without colours."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def _table(*text_columns: str, numeric: Iterable[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in text_columns:
        table.add_column(name, overflow="fold")
    for name in numeric:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _header(policy: Policy) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    if policy.model is not None:
        grid.add_row("model", Text(f"{policy.model.name} ({policy.model.params:,} parameters)"))
    if policy.target is not None:
        where = f" — {policy.target.where}" if policy.target.where else ""
        parts = f"{policy.target.runtime} {policy.target.device}, {policy.target.threads} thread(s)"
        grid.add_row("target", Text(f"{parts}, batch {policy.target.batch}{where}"))
    limits = [*policy.budget.values(), *(f"{numbers.label(key)} {limit:g}" for key, limit in policy.floor.items())]
    if limits:
        grid.add_row("budget", Text(", ".join(limits)))
    grid.add_row("units", f"{len(policy.units)} changed, all others kept")
    return grid


def _widths(units: Mapping[str, UnitDecision]) -> Table:
    table = _table("unit", numeric=())
    table.add_column("kept", no_wrap=True, min_width=BAR_WIDTH)
    table.add_column("width", justify="right", no_wrap=True)
    table.add_column("method", overflow="fold")
    for name, unit in units.items():
        table.add_row(Text(name), _bar(unit), _kept(unit), Text(_how(unit)))
    return table


def _kept(unit: UnitDecision) -> str:
    return "dropped" if unit.keep == 0 else f"{unit.keep} of {unit.of}"


def _how(unit: UnitDecision) -> str:
    mended = f" + {numbers.label(unit.compensate)}" if unit.compensate != "none" else ""
    return unit.option.label if unit.kind == "weights" else f"{unit.method}{mended}"


def _bar(unit: UnitDecision, width: int = BAR_WIDTH) -> Text:
    filled = round(width * unit.keep / unit.of)
    return Text("█" * filled, style="cyan") + Text("░" * (width - filled), style="dim")


def _verdict(sentence: str, *, met: bool) -> Text:
    return Text(f"{'met' if met else 'missed'}: {sentence}", style="bold green" if met else "bold red")


def _spaced(parts: Sequence[RenderableType]) -> list[RenderableType]:
    return [item for part in parts for item in (part, Text(""))][:-1]
