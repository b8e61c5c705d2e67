"""Records with plausible numbers, shared by the tests of files, report and command line."""

from autoprune.core.outcome import (
    CoverageRecord,
    KeptRecord,
    OutcomeRecord,
    PredictionCheck,
    TrialRecord,
    UnitRecord,
    UnitsRecord,
    VerifyRecord,
)
from autoprune.core.policy import (
    Evidence,
    LatencyRecord,
    Measured,
    ModelIdentity,
    Policy,
    ScoreRecord,
    TargetRecord,
    UnitDecision,
)


def measured(latency: float = 4.93, score: float = 0.955, divergence: float = 0.125, share: float = 0.5) -> Measured:
    return Measured(
        latency_ms=LatencyRecord(median=latency, p10=4.85, p90=5.02, runs=200),
        ratio=0.503,
        predicted_ms=4.87,
        score=ScoreRecord(value=score, n=540, stderr=0.0089),
        divergence=divergence,
        macs=round(62_700_000 * share),
        params=round(1_004_010 * share),
        size_bytes=round(4_016_040 * share),
        recovery="refit",
    )


def policy() -> Policy:
    dense, pruned, uniform = measured(9.81, 0.974, 0.0, 1.0), measured(), measured(4.9, 0.901, 0.31)
    return Policy(
        units={
            "layer1.0.conv1": UnitDecision(kind="channels", method="obs", keep=10, of=16, compensate="least_squares"),
            "layer2.3": UnitDecision(kind="block", method="drop", keep=0, of=1),
        },
        model=ModelIdentity(
            name="resnet56", fingerprint="sha256:ab12", structure="sha256:cd34", params=855770, example=[[1, 3, 32, 32]]
        ),
        target=TargetRecord(
            runtime="onnxruntime", device="cpu", threads=1, batch=1, where="a laptop: 8 cores, no, # 1"
        ),
        budget={"latency": "5ms"},
        floor={"max_drop": 0.02},
        evidence=Evidence(
            dense=dense, pruned=pruned, baselines={"uniform": uniform}, search={"sampler": "budget", "seed": 0}
        ),
        weights="policy-1.safetensors",
        weights_sha256="00ff",
    )


def outcome(name: str = "resnet56") -> OutcomeRecord:
    trials = [
        TrialRecord(
            number=number,
            origin="budget",
            state="complete",
            divergence=None if number == 3 else 0.5 / (1 + number),
            costs={"latency": 4.9e-3 - 1e-5 * number, "macs": 3e7},
        )
        for number in range(12)
    ]
    units = (
        UnitRecord(
            name=f"{name}.conv", kind="channels", width=16, keep=10, method="obs", macs_share=0.3, latency_share=0.2
        ),
        UnitRecord(name="block", kind="block", width=1, keep=0, method="drop", macs_share=0.1, latency_share=None),
    )
    base = policy().evidence
    assert base is not None
    return OutcomeRecord(
        title=f"{name} at 5ms",
        budget="5ms",
        floor="max drop 2 %",
        metric="top1",
        higher_is_better=True,
        met=True,
        verdict="4.93 ms is 1.4 % under 5 ms",
        beats_baselines=True,
        policy=policy(),
        dense=base.dense,
        chosen=base.pruned,
        finalists=(base.pruned, measured(4.8, 0.95, 0.14)),
        baselines=base.baselines,
        units=units,
        trials=tuple(trials),
        check=PredictionCheck(models=12, median_error=0.009, worst_error=0.038),
        seconds={"search": 21.3},
        notes=("head is protected",),
    )


def units_of(name: str) -> UnitsRecord:
    kept = KeptRecord(
        reason=f"{name} is protected", roots=(name, "head"), macs_share=0.04, held_share=0.1, advice="take it out"
    )
    coverage = CoverageRecord(macs=0.96, params=0.9, weights=0.0, kept=(kept,))
    return UnitsRecord(units=outcome(name).units, coverage=coverage, notes=())


def verified(*, met: bool = True) -> VerifyRecord:
    base = policy().evidence
    assert base is not None
    return VerifyRecord(
        met=met, verdict="4.93 ms against 5 ms", dense=base.dense, pruned=base.pruned, budget="5ms", floor="none"
    )
