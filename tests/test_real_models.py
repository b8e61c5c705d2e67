"""Real models with public weights, where they are at hand: `pytest -m slow`. Thresholds leave room for the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import autoprune
from autoprune.goal import Plan

DATA = Path(os.environ.get("AUTOPRUNE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "zoo.py").exists(), reason=f"no models at {DATA}; set AUTOPRUNE_DATA"),
]


@pytest.fixture(scope="module")
def zoo() -> Any:
    sys.path.insert(0, str(DATA))
    import zoo as module  # noqa: PLC0415

    return module


@pytest.mark.parametrize("name", ["resnet20", "plainnet", "mnist_cnn", "fsdd_dscnn", "adult_mlp"])
def test_half_the_macs_is_verified_and_no_worse_than_any_baseline_on_the_selection_data(zoo: Any, name: str) -> None:
    model = getattr(zoo, name)()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outcome = autoprune.search(
        model,
        calibration=zoo.data(name, "train"),
        validation=zoo.data(name, "val"),
        budget="50%macs",
        plan=Plan(trials=30, finalists=3),
    )
    assert outcome.met
    assert outcome.record.chosen.macs <= 0.5 * outcome.record.dense.macs
    divergences = [m.divergence for m in outcome.record.baselines.values() if m.divergence is not None]
    assert outcome.record.chosen.divergence is not None
    assert outcome.record.chosen.divergence <= min(divergences)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_resnet56_at_half_the_macs_keeps_89_percent(zoo: Any) -> None:
    outcome = autoprune.search(
        zoo.resnet56(),
        calibration=zoo.data("resnet56", "train"),
        validation=zoo.data("resnet56", "val"),
        budget="50%macs",
        plan=Plan(trials=30),
    )
    assert outcome.record.chosen.score is not None
    assert outcome.record.chosen.score.value >= 0.89
