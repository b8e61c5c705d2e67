"""From a decision to a candidate: cut, mended and recalibrated, ready to be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from autoprune.bank.build import Bank
from autoprune.bank.depth import Run
from autoprune.bank.mend import Mender, Solution
from autoprune.bank.sparse import Edit, Editor, apply_edit
from autoprune.core.unit import DROP, Option
from autoprune.model.blocks import parts_of
from autoprune.model.coupling import is_matrix
from autoprune.model.cut import CutPlan, Kept, cut
from autoprune.model.discover import Anatomy
from autoprune.model.factor import factor_layer
from autoprune.model.integers import Arithmetic, compute_in_integers, deployed
from autoprune.model.recalibrate import Anchor


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy applied: the model, the plan it was cut by, and what was done to the weights inside layers."""

    model: nn.Module
    plan: CutPlan
    edits: Mapping[str, Edit] = field(default_factory=dict)
    """By layer."""


class Stitcher:
    """Builds candidates of one model from its bank. The model itself is never written."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, bank: Bank, *, anchor: Anchor,
        arithmetic: Mapping[str, Arithmetic] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.anatomy = anatomy
        self.anchor = anchor
        self.norms = bank.norms
        self.bank = bank
        self.arithmetic = arithmetic or {}
        self._mender = Mender(model, bank.statistics, norms=bank.norms)
        self.editor = Editor(model, bank.statistics, norms=bank.norms)
        self._parts = parts_of(anatomy.blocks)
        self._weights = {unit.name: unit.layers[0] for unit in anatomy.units if unit.kind == "weights"}
        self._groups = {group.root for group in anatomy.groups}

    def plan(self, options: Mapping[str, Option]) -> CutPlan:
        """What `options` (unit name -> option, kept units left out) mean for each layer."""
        kept = {name: self.bank.kept(name, option) for name, option in options.items() if name in self._groups}
        return self.anatomy.plan(options, kept)

    def build(self, options: Mapping[str, Option], *, recalibrate: bool = True) -> Candidate:
        """The really cut model of a decision."""
        plan = self.plan(options)
        solutions = self._solutions(options, plan)
        model = cut(self.model, plan, {name: solution.mended for name, solution in solutions.items()})
        edits = self._edit(model, options, plan)
        if recalibrate:
            expected = {
                self.bank.norms[name]: solution.expected
                for name, solution in solutions.items()
                if solution.expected is not None and name in self.bank.norms
            }
            self.anchor.mend(model, plan.layers, expected)
        return Candidate(model, plan, edits)

    def edited_layers(self, options: Mapping[str, Option]) -> dict[str, Option]:
        """Layer to what `options` do to its weights."""
        return {self._weights[name]: option for name, option in options.items() if name in self._weights}

    def _edit(self, model: nn.Module, options: Mapping[str, Option], plan: CutPlan) -> dict[str, Edit]:
        """Do to the weights inside layers of our own cut copy what `options` say; in place."""
        gone = {layer for block in plan.dropped for layer in block.layers}
        edits: dict[str, Edit] = {}
        for name, option in self.edited_layers(options).items():
            if name not in gone:
                layer = model.get_submodule(name)
                edits[name] = self.editor.edits(name, layer, [option], kept=plan.layers.get(name, Kept()))[0]
                apply_edit(model, name, edits[name])
                if option.form == "integer":
                    compute_in_integers(model, name, self.arithmetic[name])
        return edits

    def _solutions(self, options: Mapping[str, Option], plan: CutPlan) -> dict[str, Solution]:
        """New weights of every layer that reads a unit whose option compensates, or whose kernel's does, or that stands
        in for dropped blocks.
        """
        mending = {
            member.layer
            for group in self.anatomy.groups
            if group.root in options and options[group.root].compensate != "none"
            for member in group.on("in")
        }
        kernels = self.anatomy.kernels(options)
        mending |= {layer for layer, option in kernels.items() if option.compensate != "none"}
        dropped = {part for block in plan.dropped for part in self._parts[block.name]}
        gone = {layer for block in plan.dropped for layer in block.layers}
        runs = {layer: _longest(known, dropped) for layer, known in self.bank.runs.items()} if dropped else {}
        solutions: dict[str, Solution] = {}
        for name in mending | {layer for layer, run in runs.items() if run is not None}:
            if name in gone:
                continue
            kept, run = plan.layers.get(name, Kept()), runs.get(name)
            if kept.reads_all and run is None:
                continue
            solution = self._mender.mend(name, kept, run)
            if solution is not None:
                solutions[name] = solution
        return solutions


def _longest(runs: Sequence[Run], dropped: Set[str]) -> Run | None:
    """The longest run of blocks that are all dropped."""
    return next((run for run in reversed(runs) if dropped >= set(run.blocks)), None)


def deployable(candidate: Candidate, norms: Mapping[str, str]) -> nn.Module:
    """A candidate as runtimes get it. `norms` (layer -> norm that reads it) are the dense model's."""
    scales = {layer: edit.codes.scales for layer, edit in candidate.edits.items() if edit.codes is not None}
    return deployed(candidate.model, norms, scales)


def shape_only(
    model: nn.Module, anatomy: Anatomy, options: Mapping[str, Option], *, norms: Mapping[str, str] | None = None,
    arithmetic: Mapping[str, Arithmetic] | None = None,
) -> nn.Module:  # fmt: skip
    """A model of the same shapes as a decision's, as runtimes get it, weights as they fall: for the clock alone.

    Layers that compute in integers do so by `arithmetic`; `norms` are then needed, too.
    """
    first = {g.root: torch.arange(options[g.root].keep) for g in anatomy.groups if g.root in options}
    shaped = cut(model, anatomy.plan(options, first))
    gone = {layer for block in anatomy.blocks if options.get(block.name) == DROP for layer in block.layers}
    for unit in anatomy.units:
        option = options.get(unit.name)
        if unit.kind != "weights" or option is None or unit.layers[0] in gone:
            continue
        if option.rank:
            factor_layer(shaped, unit.layers[0], option.rank)
        if option.form == "2:4":
            _keep_two_of_four(shaped.get_submodule(unit.layers[0]))
        if option.form == "integer":
            compute_in_integers(shaped, unit.layers[0], (arithmetic or {})[unit.layers[0]])
    return deployed(shaped, norms or {})


def _keep_two_of_four(layer: nn.Module) -> None:
    """Zeros wherever such a pattern has them, weights as they fall: for kernels that look for it."""
    assert is_matrix(layer)
    columns = layer.weight.shape[1]
    gone = (torch.arange(columns) % 4 >= 2).view(-1, *(1,) * (layer.weight.ndim - 2))
    layer.weight.data = layer.weight.data.masked_fill(gone, 0.0)
