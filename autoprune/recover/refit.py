"""Refit: every layer that lost inputs is solved again, one after the other, on what really reaches it.

Compensation in the bank assumes that everything before a layer is dense. Here the inputs come from the pruned network
as it is, and the target is what the dense network has at the same place: for a branch that is added to a shortcut it
is the sum (which makes up for errors of the shortcut, and for blocks dropped right after), else the layer's own output.
Least squares with a ridge towards the weights at hand; no gradients, no labels. All images go through the candidate
together, once: a layer is solved when it is reached, and the pass goes on with its new weights.
Layer-wise reconstruction with accumulated error: arXiv:1707.06168, section 3.2.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.bank.patches import is_solvable, positions_of, sampled_outputs, sampled_patches
from autoprune.bank.sparse import Edit, Reading, edited
from autoprune.bank.stitch import Candidate
from autoprune.core.unit import Option
from autoprune.model.additions import Link, links, stand_in, watching_additions
from autoprune.model.blocks import Block
from autoprune.model.coupling import CONVOLUTIONS, NORMS
from autoprune.model.cut import CutPlan, Kept
from autoprune.model.flow import norm_scale, norms_after, tails_of
from autoprune.model.observe import calls, largest_activation, watching

MOST_ACTIVATION_BYTES = 2**29
"""The largest activation of all images together; a refit needs about five times that. Beyond, fewer images are used."""


@dataclass(frozen=True, slots=True)
class RefitSettings:
    """How much data a layer is solved on, and how firmly it holds on to its weights."""

    patches: int = 49152
    ridge: float = 1e-3
    max_columns: int = 4608


@dataclass(frozen=True, slots=True)
class Site:
    """One layer to solve: what makes its output (`tail`: the layer or its norm) and where the target is read.

    `target` is the dense model's layer whose output, or whose sum when `added`, is aimed at.
    """

    layer: str
    norm: str | None
    target: str
    added: bool

    @property
    def tail(self) -> str:
        """The module whose output is fitted."""
        return self.norm or self.layer


@dataclass(slots=True)
class _Normal:
    """Normal equations of one layer, float64: inputs and a last column of ones (or zeros) against targets."""

    constant: bool
    """Whether there is somewhere to put a constant: a norm, or a bias."""
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    count: int = 0

    def see(self, inputs: Tensor, targets: Tensor) -> None:
        """Add rows: inputs (rows, columns), targets (rows, outputs)."""
        wide = torch.cat((inputs, torch.full((len(inputs), 1), float(self.constant))), 1)
        self.gram = self.gram + (wide.T @ wide).double()
        self.cross = self.cross + (wide.T @ targets).double()
        self.count += len(inputs)

    def reading(self, scale: Tensor) -> Reading:
        """What the layer reads, in a form that its weights can be edited by."""
        gram = torch.as_tensor(self.gram) / self.count
        mean = gram[:-1, -1]  # zeros without a constant
        return Reading(gram[:-1, :-1] - torch.outer(mean, mean), mean, scale)

    def solve(self, before: Tensor, ridge: float) -> Tensor:
        """Rows (columns + 1, outputs) nearest to the targets, `before` being what the ridge pulls to."""
        gram, cross = torch.as_tensor(self.gram) / self.count, torch.as_tensor(self.cross) / self.count
        pull = torch.full((len(gram),), ridge * float(gram.diagonal()[:-1].mean()), dtype=torch.float64)
        pull[-1] = 1e-9
        solved: Tensor = torch.linalg.solve(gram + torch.diag(pull), cross + pull[:, None] * before)
        return solved


@dataclass(frozen=True, slots=True)
class Reference:
    """What refits of one model share: the dense model and calibration batches."""

    model: nn.Module
    batches: tuple[Tensor, ...]
    norms: dict[str, str]
    links: dict[str, Link | None]
    settings: RefitSettings = field(default_factory=RefitSettings)

    @classmethod
    def of(
        cls, model: nn.Module, batches: Sequence[Tensor], *, blocks: Sequence[Block],
        settings: RefitSettings | None = None,
    ) -> Reference:  # fmt: skip
        """Prepare refits of candidates of `model`, of which `blocks` can be dropped. It may use fewer images."""
        norms = norms_after(model, batches[0][:2])
        tails = tails_of(model, norms, batches[0][:2])
        found = links(model, batches[0][:2], layers=tails, blocks={block.name: block.layers for block in blocks})
        return cls(model, _within_memory(model, batches), norms, found, settings or RefitSettings())


@dataclass(frozen=True, slots=True)
class Refitted:
    """How many layers were solved, and what was done again to the weights inside them, by layer."""

    layers: int
    edits: dict[str, Edit]


def refit(reference: Reference, candidate: Candidate, *, edits: Mapping[str, Option] | None = None) -> Refitted:
    """Solve the layers of `candidate` (our own cut copy) in place, in execution order.

    `edits` says what is to be done to the weights inside layers (zeros, integers): each is solved and then edited on
    what really reaches it.
    """
    wanted = edits or {}
    sites = _sites(reference, candidate.plan, candidate.model, edited=wanted)
    with torch.no_grad():
        targets = _dense_targets(reference, sites, candidate.plan)
        done = _solve_in_passing(reference, candidate.model, sites, targets, wanted)
    return Refitted(len(sites), done)


def _within_memory(model: nn.Module, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As many images as `MOST_ACTIVATION_BYTES` allow, one at least."""
    left = max(1, MOST_ACTIVATION_BYTES // largest_activation(model, batches[0]))
    kept = []
    for batch in batches:
        if left > 0:
            kept.append(batch[:left])
            left -= len(batch)
    return tuple(kept)


def _sites(reference: Reference, plan: CutPlan, model: nn.Module, *, edited: Collection[str]) -> list[Site]:
    """Layers to solve, in execution order: those with cut inputs or edits, and every branch added to a shortcut; none
    that shares its weights.
    """
    tails = {norm: layer for layer, norm in reference.norms.items()}
    modules = dict(model.named_modules())
    run = dict.fromkeys(call.name for call in calls(model, reference.batches[0][:2]))  # in execution order
    shared = {id(parameter) for parameter, times in _uses(model).items() if times > 1}
    layers = [
        name
        for name in run
        if is_solvable(modules[name], reference.settings.max_columns) and id(modules[name].weight) not in shared
    ]
    dropped = [block.name for block in plan.dropped]
    added = {tails.get(tail, tail): tail for tail in reference.links}
    sites = []
    for name in layers:
        norm, tail = reference.norms.get(name), added.get(name)
        kept = plan.layers.get(name)
        if tail is not None and plan.layers.get(tail, Kept()).outputs is None:
            sites.append(Site(name, norm, stand_in(reference.links, tail, dropped), added=True))
        elif name in edited or (kept is not None and kept.inputs is not None):
            sites.append(Site(name, norm, norm or name, added=False))
    return sites


def _uses(model: nn.Module) -> Counter[nn.Parameter]:
    """How many names each parameter has: a solution for one would be written to all."""
    return Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))


def _chosen(site: str, batch: int, positions: int, each: int) -> Tensor:
    """The sampled output positions of one batch: the same for the dense model and every candidate."""
    generator = torch.Generator().manual_seed(zlib.crc32(site.encode()) + batch)
    return torch.randperm(positions, generator=generator)[:each]


def _each(reference: Reference) -> int:
    return max(1, -(-reference.settings.patches // sum(len(batch) for batch in reference.batches)))


def _dense_targets(reference: Reference, sites: Sequence[Site], plan: CutPlan) -> dict[str, list[Tensor]]:
    """For every site the dense model's values at the sampled positions, one tensor a batch."""
    modules = dict(reference.model.named_modules())
    each = _each(reference)
    targets: dict[str, list[Tensor]] = {site.layer: [] for site in sites}
    sums = {site.target: site for site in sites if site.added}
    own = {site.target: site for site in sites if not site.added}
    batch_index = 0

    def take(site: Site, values: Tensor) -> None:
        layer = modules[site.layer]
        chosen = _chosen(site.layer, batch_index, positions_of(layer, values), each)
        picked = sampled_outputs(layer, values, chosen)
        kept = plan.layers.get(site.tail)
        targets[site.layer].append(picked if kept is None or kept.outputs is None else picked[:, kept.outputs])

    def summed(name: str, _branch: Tensor, total: Tensor) -> None:
        if name in sums:
            take(sums[name], total)

    hooks = {name: (lambda _x, y, site=site: take(site, y)) for name, site in own.items()}
    with watching(reference.model, hooks), watching_additions(reference.model, dict.fromkeys(sums, 0), summed):
        for batch_index, batch in enumerate(reference.batches):  # noqa: B007 (read by `take`)
            reference.model(batch)
    return targets


def _solve_in_passing(
    reference: Reference, model: nn.Module, sites: Sequence[Site], targets: Mapping[str, Sequence[Tensor]],
    wanted: Mapping[str, Option],
) -> dict[str, Edit]:  # fmt: skip
    """Refit every site of the candidate, in one forward pass of all images. What was done inside layers, by layer."""
    done: dict[str, Edit] = {}
    branches: dict[str, _Branch] = {}
    by_tail = {site.tail: site for site in sites if site.added}
    each = _each(reference)
    ends = np.cumsum([len(batch) for batch in reference.batches]).tolist()
    chunks = [slice(end - len(batch), end) for end, batch in zip(ends, reference.batches, strict=True)]

    def solve(site: Site, patches: Sequence[Tensor], aim: Sequence[Tensor]) -> None:
        edit = _solve(model, site, patches, aim, ridge=reference.settings.ridge, option=wanted.get(site.layer))
        if edit is not None:
            done[site.layer] = edit

    def entered(site: Site, inputs: Tensor, output: Tensor) -> Tensor | None:
        layer = model.get_submodule(site.layer)
        positions = positions_of(layer, output)
        chosen = [_chosen(site.layer, index, positions, each) for index in range(len(chunks))]
        patches = [sampled_patches(layer, inputs[chunk], at) for chunk, at in zip(chunks, chosen, strict=True)]
        if site.added:
            branches[site.tail] = _Branch(inputs.clone(), patches, chosen)
            return None
        solve(site, patches, targets[site.layer])
        return _rerun(layer, inputs)

    def added(tail: str, branch: Tensor, total: Tensor) -> None:
        site, known = by_tail[tail], branches.pop(tail, None)
        if known is None:  # it entered another addition before
            return
        layer = model.get_submodule(site.layer)
        rest = total - branch
        aim = [
            target - sampled_outputs(layer, rest[chunk], at)
            for target, chunk, at in zip(targets[site.layer], chunks, known.chosen, strict=True)
        ]
        solve(site, known.patches, aim)
        solved = _rerun(layer, known.inputs)
        total.copy_(rest + (_rerun(model.get_submodule(site.norm), solved) if site.norm else solved))

    hooks = {site.layer: partial(entered, site) for site in sites}
    with watching(model, hooks), watching_additions(model, dict.fromkeys(by_tail, 0), added):
        model(torch.cat(reference.batches))
    return done


@dataclass(frozen=True, slots=True)
class _Branch:
    """A layer on its way to an addition: all its inputs, and what was sampled of them, chunk by chunk."""

    inputs: Tensor
    patches: list[Tensor]
    chosen: list[Tensor]


def _rerun(module: nn.Module, inputs: Tensor) -> Tensor:
    """What the module gives now, past its hooks."""
    output: Tensor = module.forward(inputs)
    return output


def _solve(
    model: nn.Module, site: Site, patches: Sequence[Tensor], targets: Sequence[Tensor], *, ridge: float,
    option: Option | None,
) -> Edit | None:  # fmt: skip
    layer = model.get_submodule(site.layer)
    norm = model.get_submodule(site.norm) if site.norm else None
    normal = _Normal(constant=norm is not None or layer.bias is not None)
    for inputs, wanted in zip(patches, targets, strict=True):
        normal.see(inputs, wanted)
    return _write(layer, norm, normal, ridge, option)


def _write(
    layer: nn.Module, norm: nn.Module | None, normal: _Normal, ridge: float, option: Option | None
) -> Edit | None:
    """Put the solution into the layer and, for the constant, into its norm's shift or its own bias."""
    assert isinstance(layer, (*CONVOLUTIONS, nn.Linear))
    weight = layer.weight.detach()
    scale = norm_scale(norm) if norm is not None else torch.ones(len(weight), dtype=torch.float64)
    scale = torch.where(scale.abs() < 1e-6, 1e-6, scale)
    constant = layer.bias.detach().double() if layer.bias is not None else torch.zeros(len(weight), dtype=torch.float64)
    if isinstance(norm, NORMS):
        assert norm.running_mean is not None
        shift = norm.bias.detach().double() if norm.affine else torch.zeros_like(scale)
        constant = shift + scale * (constant - norm.running_mean.double())
    before = torch.cat((weight.double().flatten(1) * scale[:, None], constant[:, None]), 1).T
    solved = normal.solve(before, ridge)
    if not bool(torch.isfinite(solved).all()):
        return None
    layer.weight.data = (solved[:-1].T / scale[:, None]).reshape(weight.shape).to(weight.dtype)
    edit = None
    if option is not None:
        # No fine-tune was seen here: where scores of one are wanted, what stayed stays.
        reading = replace(normal.reading(scale), movement=(weight != 0).double().flatten(1))
        edit = edited(layer.weight.detach(), reading, [option], seed=0)[0]
        layer.weight.data = edit.weight.clone()
        solved[-1] += scale * edit.shift if normal.constant else 0.0
    difference = solved[-1] - constant
    if isinstance(norm, NORMS):
        assert norm.running_mean is not None
        norm.running_mean = (norm.running_mean.double() - difference / scale).to(norm.running_mean.dtype)
    elif layer.bias is not None:
        layer.bias.data = solved[-1].to(weight.dtype)
    return edit
