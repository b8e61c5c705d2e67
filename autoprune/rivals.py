"""What a search must beat at the same budget, for one workbench: the baselines that its space has options for."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from autoprune.core.space import Choice
from autoprune.core.unit import LOW_RANK, Compensate
from autoprune.searching.baselines import (
    global_magnitude,
    global_sparsity,
    uniform,
    uniform_ranks,
    uniform_sparsity,
)
from autoprune.searching.problem import Problem
from autoprune.workbench import Workbench


def baseline_choices(bench: Workbench, problem: Problem) -> dict[str, Choice]:
    """What the search must beat: uniform l2, uniform by each method's best form, the same with all layers in integers
    where they can be, global magnitude.
    """
    choices: dict[str, Choice | None] = {}
    pairs = [(choice.method, choice.compensate) for choice in bench.subject.task.spec.methods]
    plain: Compensate = "none"
    if pairs:
        first = ("l2", plain) if ("l2", plain) in pairs else (pairs[0][0], pairs[0][1])
        best = ("obs", "least_squares")
        for name, compensate in dict.fromkeys([first, *(pair for pair in pairs if pair == best)]):
            mended = f" + {compensate.replace('_', ' ')}" if compensate != "none" else ""
            choices[f"uniform {name}{mended}"] = uniform(problem, method=name, compensate=compensate)
            if any(option.form == "integer" for entry in problem.space.entries for option in entry.options):
                choices[f"uniform {name}{mended}, all int8"] = uniform(
                    problem, method=name, compensate=compensate, integers=True
                )
    if ("l2", plain) in pairs:
        choices["global magnitude"] = global_magnitude(problem, _magnitudes(bench))
    for found in bench.subject.task.spec.weights:
        if found.method == LOW_RANK:
            choices["uniform low rank"] = uniform_ranks(problem)
            continue
        for bits in found.bits if found.method != "dense" else ():
            stored = f" + int{bits}" if bits < 32 else ""
            choices[f"uniform {found.method}{stored}"] = uniform_sparsity(problem, method=found.method, bits=bits)
            if found.method == "magnitude":
                choices[f"global magnitude{stored} inside layers"] = global_sparsity(
                    problem, _absolute_weights(bench), bits=bits
                )
    return {name: choice for name, choice in choices.items() if choice is not None}


def _absolute_weights(bench: Workbench) -> dict[str, NDArray[np.float64]]:
    """The absolute values of the weights of every layer that has a unit for them."""
    state = bench.subject.model.state_dict()
    names = [unit.name for unit in bench.space.units if unit.kind == "weights"]
    return {name: state[name].double().abs().flatten().numpy() for name in names}


def _magnitudes(bench: Workbench) -> dict[str, list[float]]:
    """The l2 norm of every channel's producers, by unit."""
    modules = dict(bench.subject.model.named_modules())
    scores: dict[str, list[float]] = {}
    for group in bench.subject.anatomy.groups:
        total = torch.zeros(group.width, dtype=torch.float64)
        for member in group.on("out"):
            weight = modules[member.layer].weight
            assert isinstance(weight, torch.Tensor)
            total += weight.detach().double().flatten(1).square().sum(1)[member.positions].sum(1)
        for slab in group.slabs:
            if not slab.reads:
                bare = bench.subject.model.get_parameter(slab.parameter).detach().double().movedim(slab.dim, 0)
                total += bare.flatten(1).square().sum(1)[slab.positions].sum(1) if bare.ndim > 1 else 0
        scores[group.root] = total.sqrt().tolist()
    return scores
