"""The bank on disk: what is kept where, and that it comes back the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import Residual, randomised
from test_weights import bench_of

from autoprune.bank.store import Moments
from autoprune.config import Config
from autoprune.costing import Stages, measured_costs
from autoprune.engines.local import Local
from autoprune.progress import Silent
from autoprune.run import Run
from autoprune.subject import subject_of
from autoprune.workbench import Workbench, prepare

torch.set_num_threads(1)


class Notes(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        """Remember."""
        self.told.append(text)


def again(bench: Workbench, folder: Path, memory: int) -> tuple[Workbench, list[str]]:
    notes = Notes()
    subject = subject_of(replace(bench.subject.task, bank_memory=memory), Silent())
    run = Run(folder, Local())
    space, costs, table = measured_costs(subject, run, latency=False, stages=Stages(), progress=Silent())
    return prepare(subject, space, costs, table, run=run, stages=Stages(), progress=notes), notes.told


def same(one: Workbench, other: Workbench) -> None:
    for layer, statistics in one.bank.statistics.items():
        assert torch.equal(statistics.second, other.bank.statistics[layer].second), layer  # type: ignore[arg-type]
    for name, harms in one.priors.items():
        for mine, theirs in zip(harms, other.priors[name], strict=True):
            assert mine.tolist() == pytest.approx(theirs.tolist())


def test_a_bank_beyond_memory_is_spilled_and_says_so(tmp_path: Path) -> None:
    model = randomised(Residual())
    whole = bench_of(model, tmp_path / "whole")
    spilled, told = again(whole, tmp_path / "small", 100_000)
    same(whole, spilled)
    assert [note for note in told if "--bank-memory" in note and "100 kB" in note and str(tmp_path / "small") in note]
    reused, told = again(whole, tmp_path / "small", 100_000)
    assert any("reused the bank" in note for note in told)
    same(whole, reused)


def test_a_bank_with_a_lost_file_is_made_anew(tmp_path: Path) -> None:
    bench = bench_of(randomised(Residual()), tmp_path)
    _, told = again(bench, tmp_path, 10**9)
    used = next(note for note in told if "reused the bank" in note).partition("(")[2].partition(".")[0]
    lost = next((tmp_path / "bank" / f"{used}.moments").glob("*.safetensors"))
    lost.unlink()
    remade, told = again(bench, tmp_path, 10**9)
    assert not any("reused" in note for note in told)
    assert lost.exists()
    same(bench, remade)


def test_moments_in_memory_are_bounded(tmp_path: Path) -> None:
    moments = Moments(tmp_path, "k" * 32, memory_bytes=2 * 8 * 100, progress=Silent())
    given = [torch.randn(10, 10, dtype=torch.float64) for _ in range(3)]
    kept = [moments.keep(f"layer.{index}", second) for index, second in enumerate(given)]
    assert [second is mine for second, mine in zip(given, kept, strict=True)] == [True, True, False]
    assert all(torch.equal(second, mine) for second, mine in zip(given, kept, strict=True))


@pytest.mark.parametrize(("text", "size"), [("4GB", 4_000_000_000), ("1.5MiB", 1_572_864), (1000, 1000)])
def test_memory_is_read_with_its_unit(text: object, size: int) -> None:
    config = Config.model_validate({"model": "a.py:m", "data": "a.py:d", "search": {"bank_memory": text}})
    assert config.search.bank_memory == size


@pytest.mark.parametrize("text", ["much", "50%", "4ms", -1, True])
def test_memory_without_sense_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="4GB or 500MB"):
        Config.model_validate({"model": "a.py:m", "data": "a.py:d", "search": {"bank_memory": text}})
