"""What is shown while work goes on."""

import io
import json

import pytest
from rich.console import Console

from autoprune.display import Bars, JsonLines, Lines, Quiet, fail, make_display, standing
from autoprune.progress import TrialSeen


def seen(number: int, *, total: int = 100, baseline: float | None = 0.4) -> TrialSeen:
    return TrialSeen(total - number, number + 1, total, "budget", 0.5, 0.3, baseline)


def test_lines_are_few() -> None:
    now = [0.0]
    out = io.StringIO()
    display = Lines(Console(file=out, width=100), clock=lambda: now[0])
    display.phase("search", 100)
    for number in range(100):
        now[0] += 0.5
        display.trial(seen(number))
    display.note("[bold] kept as it is")
    lines = out.getvalue().splitlines()
    assert lines[0] == "search (100 steps)"
    assert lines[1] == "  trial 20/100: best 0.3, best baseline 0.4 (-25.0%), 10 s"
    assert lines[-1] == "note: [bold] kept as it is"
    assert len(lines) == 7


def test_bars_draw_on_a_terminal() -> None:
    out = io.StringIO()
    with Bars(Console(file=out, force_terminal=True, width=140)) as display:
        display.step()
        display.phase("bank", 3)
        display.step(2)
        display.phase("search")
        display.trial(seen(41))
        display.note("the machine drifts")
    for part in ("bank", "search", "best baseline 0.4", "the machine drifts"):
        assert part in out.getvalue()


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = JsonLines()
    display.phase("search", 10)
    display.trial(TrialSeen(3, 1, 10, "uniform", float("nan"), float("inf"), None))
    display.result({"outcomes": []})
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["phase", "trial", "result"]
    assert (events[1]["divergence"], events[1]["best"]) == (None, None)


def test_quiet_shows_nothing_but_errors(capsys: pytest.CaptureFixture[str]) -> None:
    display = Quiet()
    display.phase("search")
    display.show("table")
    display.result({})
    assert capsys.readouterr() == ("", "")
    fail("[red] went wrong", mode="quiet", kind="RunError", exit_code=2)
    assert capsys.readouterr().err == "error: [red] went wrong\n"


def test_the_mode_chooses() -> None:
    assert isinstance(make_display("json"), JsonLines)
    assert isinstance(make_display("quiet"), Quiet)
    assert isinstance(make_display("auto"), Lines | Bars)
    assert standing(seen(0, baseline=None)) == "best 0.3"
    assert standing(seen(0, baseline=0.0)) == "best 0.3, best baseline 0"
