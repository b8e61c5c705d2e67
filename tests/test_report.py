"""The report: parses, is self-contained, holds the numbers, escapes names."""

import math
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from records import measured, outcome, policy, units_of, verified

from autoprune.core.outcome import OutcomeRecord
from autoprune.core.policy import Measured
from autoprune.report import html, numbers, plots, text
from autoprune.report.svg import Bar, Plot, axis_over, bars

VOID = {"meta", "br", "img", "link", "hr", "input"}
NASTY = "<b>&\"'[red]"


class Checker(HTMLParser):
    """Balanced tags, no scripts, nothing from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "img", "b")
        assert not {"src", "href", "onclick"} & {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def checked(record: OutcomeRecord) -> str:
    page = html.render(record)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "http" not in page
    assert "url(" not in page
    assert "nan" not in " ".join(checker.words).lower().split()
    return " ".join(checker.words)


def test_report_parses_and_holds_the_numbers() -> None:
    words = checked(outcome())
    for number in (
        "95.50 ± 0.89 %",
        "97.40",
        "4.93 ms",
        "4.85–5.02",
        "50.3 %",
        "10 of 16",
        "dropped",
        "3.8 %",
        "uniform",
    ):
        assert number in words
    assert html.render(outcome()).count("<svg") == 4


def test_names_are_escaped_everywhere() -> None:
    record = outcome(NASTY).model_copy(update={"verdict": NASTY, "notes": (NASTY,), "baselines": {NASTY: measured()}})
    assert NASTY in checked(record)
    for view in (text.outcome_view(record), text.units_view(units_of(NASTY))):
        assert NASTY in text.plain(view)


def test_a_budget_that_costs_nothing_is_told() -> None:
    good = measured(4.9, 0.97, 0.01)  # the dense model has 0.974 +- 0.009
    record = outcome().model_copy(update={"beats_baselines": False, "baselines": {"uniform": good}})
    assert "within one standard error of the dense model" in checked(record)
    worse = measured(4.9, 0.96, 0.01)
    record = outcome().model_copy(update={"beats_baselines": False, "baselines": {"uniform": worse}})
    assert "see its row, and mind" in checked(record)


def test_a_poor_outcome_is_drawn_too() -> None:
    bare = measured().model_copy(update={"latency_ms": None, "predicted_ms": None, "divergence": None, "score": None})
    record = outcome().model_copy(
        update={
            "met": False,
            "beats_baselines": False,
            "trials": (),
            "finalists": (),
            "units": (),
            "baselines": {"uniform": bare},
            "chosen": bare,
            "dense": bare,
            "check": None,
            "policy": policy().model_copy(update={"model": None, "target": None, "evidence": None}),
        }
    )
    words = checked(record)
    assert "A baseline scored better on the held-out data" in words
    assert "<svg" not in html.render(record)


def test_one_trial_and_zero_divergence() -> None:
    record = outcome()
    zero = record.trials[0].model_copy(update={"divergence": 0.0})
    for trials in ((record.trials[0],), (zero,), (zero, record.trials[1])):
        checked(record.model_copy(update={"trials": trials}))


def test_plots_are_xml_within_their_box() -> None:
    record = outcome()
    for picture in (plots.progress(record), plots.trade_off(record), plots.prediction(record), plots.widths(record)):
        root = ElementTree.fromstring(picture)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        circles = [item for item in root.iter() if item.tag == "circle"]
        assert all(0 <= float(item.attrib["cx"]) <= width for item in circles)
        assert all(0 <= float(item.attrib["cy"]) <= height for item in circles)
    assert plots.progress(record).count("<circle") == 11


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("values", [[1.0], [0.02, 900.0], [4.9, 5.0], [1e-7, 3e-7], [], [0.0, 2.0], [math.nan, 1.0]])
def test_axes_hold_their_values_and_have_ticks(scale: str, values: list[float]) -> None:
    axis = axis_over(values, "x", scale=scale)  # type: ignore[arg-type]
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 9
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    usable = [value for value in values if math.isfinite(value) and (value > 0 or scale == "linear")]
    assert all(0 <= axis.place(value) <= 1 for value in usable)


def test_pareto_front_is_complete_and_minimal() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0), (5.0, 2.0)]
    assert plots.pareto_front(points) == [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]


def test_marks_outside_are_left_out() -> None:
    plot = Plot(axis_over([1, 2], "x"), axis_over([1, 2], "y"), "t")
    plot.points([(9.0, 1.0), (1.0, math.nan), (1.5, 1.5)], css="trial")
    assert plot.text.count("<circle") == 1


def test_long_names_are_cut_in_bars_but_whole_in_their_tip() -> None:
    picture = bars([Bar("x" * 60, 1, 2, "1 of 2")], "t")
    assert f"<title>{'x' * 60}: 1 of 2</title>" in picture
    assert f">…{'x' * 37}</text>" in picture


def test_tables_for_the_terminal() -> None:
    shown = text.plain(text.policy_view(policy()), width=140)
    for part in (
        "resnet56 (855,770 parameters)",
        "10 of 16",
        "dropped",
        "obs + least squares",
        "95.50 ± 0.89 %",
        "5ms",
    ):
        assert part in shown
    assert "█" * 15 + "░" * 9 in shown
    assert "missed: 4.93 ms against 5 ms" in text.plain(text.verify_view(verified(met=False), metric="top1"))
    alone = policy().model_copy(update={"evidence": None, "model": None, "target": None, "budget": {}, "floor": {}})
    assert "10 of 16" in text.plain(text.policy_view(alone))


def test_the_result_fits_80_characters() -> None:
    record = outcome()
    record = record.model_copy(update={"baselines": {"uniform": measured(4.9), "global_magnitude": measured(5.0)}})
    shown = text.plain(text.outcome_view(record), width=80)
    assert "…" not in shown
    lines = [line for line in shown.splitlines() if line]
    assert lines[1].split() == ["dense", "chosen", "uniform", "global", "magnitude"]
    assert lines[3].split() == ["latency", "9.81", "ms", "4.93", "ms", "4.90", "ms", "5.00", "ms"]
    assert len(lines) == 10
    assert max(len(line) for line in lines) <= 80


def test_numbers() -> None:
    assert numbers.digits(4.9) == "4.90"
    assert numbers.digits(0.0123) == "0.0123"
    assert numbers.digits(1234.5) == "1234"
    assert numbers.digits(0) == "0"
    assert numbers.value(0.934, "top1") == "93.40 %"
    assert numbers.value(0.0123456, "mse") == "0.01235"
    assert numbers.cost("latency", 4.93e-3) == "4.93 ms"


def test_many_models_have_a_row_each() -> None:
    model = Measured(macs=1000, params=100, size_bytes=400)
    few = text.plain(text.measured_table({str(number): model for number in range(6)}, metric="top1"), width=80)
    many = text.plain(
        text.measured_table({f"uniform method {number}": model for number in range(7)}, metric="top1"), width=80
    )
    assert len([line for line in few.splitlines() if "kMACs" in line]) == 1
    assert len([line for line in many.splitlines() if "kMACs" in line and "uniform method" in line]) == 7
