"""From a decision to a candidate: cut, mended and recalibrated, ready to be scored."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.bank.build import Bank
from autoprune.bank.mend import Mender
from autoprune.core.unit import DROP, Option
from autoprune.model.blocks import Block
from autoprune.model.coupling import Group
from autoprune.model.cut import CutPlan, Mended, cut, plan_cut
from autoprune.model.discover import Anatomy
from autoprune.model.recalibrate import Anchor


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy applied: the model, and the plan it was cut by."""

    model: nn.Module
    plan: CutPlan


class Stitcher:
    """Builds candidates of one model from its bank. The model itself is never written."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, bank: Bank, *, anchor: Anchor) -> None:
        self.model = model
        self.anatomy = anatomy
        self.anchor = anchor
        self._bank = bank
        self._mender = Mender(model, bank.statistics, norms=bank.norms)

    def plan(self, options: Mapping[str, Option]) -> CutPlan:
        """What `options` (unit name -> option, kept units left out) mean for each layer."""
        dropped = [block for block in self.anatomy.blocks if options.get(block.name) == DROP]
        kept = {name: self._bank.kept(name, option) for name, option in options.items() if option != DROP}
        return plan_cut(self.anatomy.widths, self.anatomy.groups, kept=kept, dropped=dropped)

    def build(self, options: Mapping[str, Option], *, recalibrate: bool = True) -> Candidate:
        """The really cut model of a decision."""
        plan = self.plan(options)
        mended = self._mended(options, plan)
        model = cut(self.model, plan, mended)
        if recalibrate:
            self.anchor.mend(model, plan.layers)
        return Candidate(model, plan)

    def _mended(self, options: Mapping[str, Option], plan: CutPlan) -> dict[str, Mended]:
        """New weights of every layer that reads a unit whose option compensates."""
        mended: dict[str, Mended] = {}
        for group in self.anatomy.groups:
            option = options.get(group.root)
            if option is None or option.compensate == "none":
                continue
            for member in group.on("in"):
                kept = plan.layers.get(member.layer)
                if kept is None or kept.inputs is None or member.layer in mended:
                    continue
                solved = self._mender.mend(member.layer, kept.inputs)
                if solved is not None:
                    mended[member.layer] = solved
        return mended


def shape_only(model: nn.Module, anatomy: Anatomy, options: Mapping[str, Option]) -> nn.Module:
    """A model of the same shapes as a decision's, weights as they fall: for the clock alone."""
    return cut(model, _first_channels(anatomy.groups, anatomy.blocks, options, anatomy.widths))


def _first_channels(
    groups: Collection[Group], blocks: Sequence[Block], options: Mapping[str, Option], widths: Mapping[str, int]
) -> CutPlan:
    dropped = [block for block in blocks if options.get(block.name) == DROP]
    kept: dict[str, Tensor] = {
        group.root: torch.arange(options[group.root].keep) for group in groups if group.root in options
    }
    return plan_cut(widths, groups, kept=kept, dropped=dropped)
