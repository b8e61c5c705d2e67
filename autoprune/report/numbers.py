"""Numbers for people: scores, latencies, costs and shares as short texts. Knows no tables and no HTML."""

from __future__ import annotations

from autoprune.core.budget import shown
from autoprune.core.floor import SHARES
from autoprune.core.outcome import OutcomeRecord
from autoprune.core.policy import LatencyRecord, Measured, Policy, ScoreRecord

NOTHING = "–"


def value(number: float, metric: str) -> str:
    """A metric's value: `93.4 %` for accuracies, four significant digits otherwise."""
    return f"{number * 100:.2f} %" if metric in SHARES else f"{number:.4g}"


def score(record: ScoreRecord | None, metric: str) -> str:
    """A metric with its standard error: `93.40 ± 0.25 %`."""
    if record is None:
        return NOTHING
    if metric in SHARES:
        return f"{record.value * 100:.2f} ± {record.stderr * 100:.2f} %"
    return f"{record.value:.4g} ± {record.stderr:.2g}"


def milliseconds(number: float | None) -> str:
    """`4.93 ms`, three significant digits."""
    return NOTHING if number is None else f"{digits(number)} ms"


def digits(number: float) -> str:
    """Three significant digits without an exponent in the usual range: `0.0123`, `4.90`, `1230`."""
    size = abs(number)
    if size == 0 or size >= 1e6 or size < 1e-4:
        return f"{number:.3g}"
    for places, least in ((0, 100.0), (1, 10.0), (2, 1.0), (3, 0.1), (4, 0.01)):
        if size >= least:
            return f"{number:.{places}f}"
    return f"{number:.3g}"


def spread(record: LatencyRecord | None) -> str:
    """p10 to p90 in milliseconds: `4.85–5.02`. What was not measured has none."""
    return NOTHING if record is None or not record.runs else f"{digits(record.p10)}–{digits(record.p90)}"


def median(record: LatencyRecord | None) -> str:
    """Median latency: `4.93 ms`."""
    return milliseconds(None if record is None else record.median)


def share(number: float | None) -> str:
    """A share in percent: `51.3 %`."""
    return NOTHING if number is None else f"{number * 100:.1f} %"


def counted(model: Measured) -> tuple[str, str, str]:
    """MACs, parameters and bytes: `62.7 MMACs`, `0.43 Mparams`, `1.7 MB`."""
    return cost("macs", model.macs), cost("params", model.params), cost("size", model.size_bytes)


def memory(model: Measured) -> str:
    """Peak memory: `12.3 MB`."""
    return NOTHING if model.memory_bytes is None else cost("size", model.memory_bytes)


def cost(metric: str, number: float) -> str:
    """A cost in its own unit (seconds, MACs, parameters, bytes)."""
    return f"{digits(number * 1e3)} ms" if metric == "latency" else shown(metric, number)


def against_baselines(outcome: OutcomeRecord) -> str | None:
    """One sentence where a baseline is as good as what was chosen: why that may be. None where none is."""
    if not outcome.baselines or outcome.beats_baselines:
        return None
    dense, sign = outcome.dense.score, 1.0 if outcome.higher_is_better else -1.0
    scores = [model.score for model in outcome.baselines.values() if model.score is not None]
    best = max((sign * score.value for score in scores), default=float("-inf"))
    if dense is not None and best >= sign * dense.value - dense.stderr:
        return (
            "A baseline scored better on the held-out data, for this budget costs it nothing: it is within one "
            "standard error of the dense model, and no search can be much above. A tighter one would tell them apart."
        )
    return "A baseline scored better on the held-out data; see its row, and mind ±."


def unverified(policy: Policy) -> str | None:
    """One sentence where a policy's numbers were not measured: what they are, and what to do. None where they were."""
    evidence = policy.evidence
    if evidence is None or evidence.verified:
        return None
    latency = evidence.pruned.latency_ms
    if latency is None or latency.runs or policy.target is None:
        return "These numbers are not measured on this model: run `autoprune verify`."
    table = policy.target.where.partition(";")[0]
    return f"Latency is by the {table}, not measured: run `autoprune verify` where that device is."


def label(name: str) -> str:
    """`global_magnitude` as `global magnitude`."""
    return name.replace("_", " ")
