"""Policies of every kind on small models, laid over them: what exporters are tested with.

A case is a network of `tools/networks` and what its policy does to each unit; the policy comes to its weights the way
an imported one does.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from autoprune.apply import Applied, apply
from autoprune.core.policy import Policy
from autoprune.core.target import Target
from autoprune.core.unit import DROP, LOW_RANK, Option, Unit, keep_all
from autoprune.data import as_data
from autoprune.evaluators import evaluator
from autoprune.evidence import decisions, model_identity
from autoprune.exporters.base import Resolved
from autoprune.files import write_policy
from autoprune.progress import Silent
from autoprune.resolved import resolved
from autoprune.spaces import SpaceSpec, WeightChoice
from autoprune.subject import Subject, Task, subject_of
from autoprune.transfer import transfer

NETWORKS = Path(__file__).parent / "tools" / "networks"
os.environ.setdefault("AUTOPRUNE_DATA", str(Path(__file__).parents[2] / "shared" / "data"))

Choose = Callable[[int, Unit], Option | None]
"""What is done to a unit, given its place among those of its kind; None: it stays."""


@dataclass(frozen=True, slots=True)
class CaseSpec:
    network: str
    choose: Choose
    refit: bool = False
    metric: str = "top1"


def narrowed(place: int, unit: Unit, *, method: str = "l2", mended: bool = False) -> Option:
    """A different share of each unit, and never a round one."""
    keep = max(1, round(unit.width * (0.45 + 0.1 * (place % 5))))
    return Option(method, min(keep, unit.width - 1), "least_squares" if mended else "none")


def channels(place: int, unit: Unit) -> Option | None:
    return narrowed(place, unit) if unit.narrows else None


def mended(place: int, unit: Unit) -> Option | None:
    if unit.kind == "block":
        return DROP if unit.name.endswith("layer2.1") else None
    return narrowed(place, unit, method="obs", mended=True) if unit.narrows else None


def halved(_place: int, unit: Unit) -> Option | None:
    return Option("obs", unit.width // 2, "least_squares") if unit.narrows else None


PATTERNS = ("50%", "2:4", "4x1 50%", "70%")


def sparse(place: int, unit: Unit, *, method: str = "magnitude", patterns: tuple[str, ...] = PATTERNS) -> Option | None:
    if unit.kind != "weights":
        return None
    pattern = patterns[place % len(patterns)]
    share = 0.7 if pattern == "70%" else 0.5
    return Option(method, unit.width - round(share * unit.width), pattern=pattern)


def mixed(place: int, unit: Unit) -> Option | None:
    if unit.narrows:
        return narrowed(place, unit) if place % 2 else None
    if unit.kind == "kernel":
        return Option("center", 3, "none")
    if unit.kind == "block":
        return DROP if unit.name.endswith("layer1.1") else None
    if unit.kind == "weights":
        ways = (
            Option("sparsegpt", unit.width - round(0.5 * unit.width), pattern="50%"),
            Option("dense", unit.width, bits=8),
            Option(LOW_RANK, 4 * (unit.outputs + unit.width // unit.outputs), rank=4),
            Option("wanda", unit.width - round(0.5 * unit.width), pattern="2:4", bits=4),
        )
        way = ways[place % len(ways)]
        return way if way.keep < unit.width or way.bits < 32 else None
    return None


def decoder(place: int, unit: Unit) -> Option | None:
    if unit.kind == "weights" and not unit.name.startswith("lm_head"):
        return sparse(place, unit, method="sparsegpt" if place % 2 else "wanda", patterns=("50%", "2:4", "70%"))
    return None


def stored(place: int, unit: Unit) -> Option | None:
    """Integers of every width, alone and beside zeros."""
    if unit.kind != "weights" or unit.name.startswith("lm_head"):
        return None
    half = unit.width - round(0.5 * unit.width)
    ways = (
        Option("dense", unit.width, bits=8),
        Option("wanda", half, pattern="2:4", bits=4),
        Option("sparsegpt", half, pattern="50%", bits=8),
        Option("dense", unit.width, bits=3),
        Option("dense", unit.width, bits=6),
        Option("magnitude", half, pattern="4x1 50%"),
        Option("dense", unit.width, bits=5),
    )
    return ways[place % len(ways)]


def even(_place: int, unit: Unit) -> Option | None:
    """Every feed-forward part alike."""
    return Option("l2", unit.width * 3 // 4) if unit.kind == "ffn" else None


CASES = {
    "plain": CaseSpec("plain", channels),
    "channels": CaseSpec("residual", channels),
    "resnet20": CaseSpec("resnet20", halved, refit=True),
    "mended": CaseSpec("residual", mended, refit=True),
    "zeros": CaseSpec("residual", sparse),
    "mixed": CaseSpec("residual", mixed, refit=True),
    "vit": CaseSpec("vit", channels),
    "llm": CaseSpec("llm", decoder, metric="perplexity"),
    "llm-bits": CaseSpec("llm", stored, metric="perplexity"),
    "llm-even": CaseSpec("llm", even, metric="perplexity"),
    "llm-channels": CaseSpec("llm", channels, metric="perplexity"),
}


def is_there(name: str) -> bool:
    """Whether the model of a case is on this machine; trained ones need the folder of real models."""
    return CASES[name].network != "resnet20" or (Path(os.environ["AUTOPRUNE_DATA"]) / "zoo.py").exists()


def network_of(name: str) -> ModuleType:
    path = NETWORKS / f"{CASES[name].network}.py"
    spec = importlib.util.spec_from_file_location(f"network_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def subject_for(name: str) -> Subject:
    network, case = network_of(name), CASES[name]
    everything = {"kernels": (3,), "resolutions": (0.5,)} if case.network == "residual" else {}
    methods = ({"method": "l2"},)
    spec = SpaceSpec.model_validate({"methods": methods, "weights": (WeightChoice(bits=(8,)),), **everything})
    model = network.model()
    task = Task(model, type(model).__name__, as_data(**network.data()), evaluator(case.metric), Target(), spec)
    return subject_of(task, Silent())


def bare_policy(name: str) -> Policy:
    """What the case decides, without weights."""
    subject = subject_for(name)
    places: dict[str, int] = {}
    options = {}
    for unit in subject.anatomy.units:
        option = CASES[name].choose(places.setdefault(unit.kind, 0), unit)
        places[unit.kind] += 1
        if option is not None and option != keep_all(unit):
            options[unit.name] = option
    gone = {name for name, option in options.items() if option == DROP}
    parents = {unit.name: unit.parent for unit in subject.anatomy.units}
    options = {name: option for name, option in options.items() if parents[name] not in gone}
    units = {unit.name: unit for unit in subject.anatomy.units}
    return Policy(units=decisions(units, options), model=model_identity(subject), budget={"macs": "50%macs"})


@functools.cache
def applied_case(name: str) -> Applied:
    """The policy of a case, applied; complete with its weights."""
    folder = Path(tempfile.mkdtemp(prefix=f"case-{name}-"))
    return apply(written_case(name, folder), subject_for(name))


def written_case(name: str, folder: Path) -> Path:
    """The policy of a case, with its side file, in `folder`."""
    draft = folder / "draft.yaml"
    write_policy(draft, bare_policy(name))
    path = transfer(draft, subject_for(name), folder, refit=CASES[name].refit, progress=Silent())
    draft.unlink()
    return path


@functools.cache
def resolved_case(name: str) -> Resolved:
    """What an exporter gets of a case."""
    return resolved(applied_case(name), subject_for(name), title="policy.yaml")
