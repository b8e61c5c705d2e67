"""The bank: for every unit and method the order in which channels go, for every option its additive harm.

Edited weights are not stored: they are a pure function of the moments and the kept inputs (`mend`), which is exact also
where several units share a consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.bank.calibrate import CalibrationSettings, LayerStatistics, calibrate, in_memory
from autoprune.bank.depth import Run
from autoprune.bank.mend import solve
from autoprune.bank.sparse import Editor
from autoprune.bank.views import centred, energies, input_matrix, unit_view
from autoprune.core.space import Space, UnitOptions
from autoprune.core.unit import Option, Unit
from autoprune.engines.base import Each, EachTensor, one_by_one
from autoprune.methods import method
from autoprune.methods.base import Consumer, Method, Need, UnitView, order_by
from autoprune.methods.compensate import gone_alone, nested_errors
from autoprune.methods.l2 import l2_scores
from autoprune.model.coupling import CONVOLUTIONS, Group
from autoprune.model.cut import Kept
from autoprune.model.discover import Anatomy
from autoprune.model.flow import norm_scale
from autoprune.progress import Progress
from autoprune.rebuilding import cropped

Harms = list[NDArray[np.float64]]
"""One array for each unit of a space, (options,): additive harm, zero for the option that keeps everything."""


@dataclass(frozen=True, slots=True)
class Bank:
    """What calibration gave. `orders[unit][method]` is (width,): the first goes first."""

    statistics: Mapping[str, LayerStatistics]
    orders: Mapping[str, Mapping[str, Tensor]]
    norms: Mapping[str, str]
    runs: Mapping[str, Sequence[Run]]
    """For layers that enter an addition: the runs of dropped blocks they can stand in for, shortest first."""

    def kept(self, unit: str, option: Option) -> Tensor:
        """The channels that stay, ascending."""
        order = self.orders[unit][option.method]
        return order[len(order) - option.keep :].sort().values


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """Batches of inputs and of classes (labels, or the dense model's answers), samples first."""

    batches: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]


def observe(
    model: nn.Module, anatomy: Anatomy, data: CalibrationData, *, others: Collection[str],
    settings: CalibrationSettings, progress: Progress, keep: Callable[[str, Tensor], Tensor] = in_memory,
) -> dict[str, LayerStatistics]:  # fmt: skip
    """The calibration pass: statistics of every layer that reads a unit or is one, and of `others`. `keep` as there."""
    readers = [member.layer for group in anatomy.groups for member in group.on("in")]
    alone = [unit.layers[0] for unit in anatomy.units if unit.kind in ("weights", "kernel")]
    layers = dict.fromkeys((*readers, *alone, *others))
    return calibrate(
        model,
        tuple(layers),
        batches=data.batches,
        targets=data.targets,
        settings=settings,
        progress=progress,
        keep=keep,
    )


def rank(  # noqa: PLR0913 (all that methods may look at, and who does the work)
    model: nn.Module, anatomy: Anatomy, statistics: Mapping[str, LayerStatistics], *, norms: Mapping[str, str],
    methods: Sequence[str], targets: Tensor, seed: int, progress: Progress, each: EachTensor = one_by_one,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Removal orders of every channel unit by every method; every pair of them is a piece of work of its own."""
    criteria = {name: method(name) for name in methods}
    ranker = Ranker(model, anatomy.groups, statistics, norms, criteria, targets, seed)
    pairs = [(index, name) for index in range(len(anatomy.groups)) for name in methods]
    progress.phase("bank", len(pairs))
    orders: dict[str, dict[str, Tensor]] = {group.root: {} for group in anatomy.groups}
    for (index, name), order in zip(pairs, each(Ranker.order, ranker, pairs), strict=True):
        if len(order):
            orders[anatomy.groups[index].root][name] = order
        progress.step()
    return orders


@dataclass(slots=True)
class Ranker:
    """Ranks one unit by one method at a time; remembers how it saw the unit last."""

    model: nn.Module
    groups: Sequence[Group]
    statistics: Mapping[str, LayerStatistics]
    norms: Mapping[str, str]
    criteria: Mapping[str, Method]
    targets: Tensor
    seed: int
    _last: tuple[int, UnitView] | None = None

    def order(self, pair: tuple[int, str]) -> Tensor:
        """The removal order of the unit at an index by the method of a name, (width,); (0,) where its layers are too
        wide for what the method needs.
        """
        index, name = pair
        view, criterion = self._view(index), self.criteria[name]
        generator = torch.Generator().manual_seed(self.seed * 104729 + index)
        if not self.groups[index].on("in"):
            return _unwatched(view, criterion, generator)
        if "moments" in criterion.needs and any(consumer.moments is None for consumer in view.consumers):
            return torch.empty(0, dtype=torch.int64)
        return criterion.removal_order(_without_moments(view, criterion), generator)

    def _view(self, index: int) -> UnitView:
        if self._last is None or self._last[0] != index:
            needs: set[Need] = {need for criterion in self.criteria.values() for need in criterion.needs}
            group = self.groups[index]
            view = unit_view(group, self.model, self.statistics, norms=self.norms, needs=needs, targets=self.targets)
            self._last = (index, view)
        return self._last[1]


def _unwatched(view: UnitView, criterion: Method, generator: torch.Generator) -> Tensor:
    """The order of a unit that bare parameters alone read (the inner width of a recurrent network): methods that need
    to see the channels at work fall back to the order of `l2`.
    """
    return order_by(l2_scores(view)) if criterion.needs else criterion.removal_order(view, generator)


def _without_moments(view: UnitView, criterion: Method) -> UnitView:
    """A method sees what it asked for and no more, so that its `needs` are honest."""
    consumers = view.consumers
    if "moments" not in criterion.needs:
        consumers = tuple(Consumer(c.name, c.weight, None, c.scale) for c in consumers)
    return UnitView(
        view.name, view.width, view.producers, view.norm_scales, consumers,
        view.activity if "activity" in criterion.needs else None,
        view.taylor if "gradients" in criterion.needs else None,
    )  # fmt: skip


def local_harms(
    space: Space, bank: Bank, model: nn.Module, *, anatomy: Anatomy, editor: Editor,
    resized: Mapping[int, float] | None = None, each: Each = one_by_one,
) -> dict[str, Harms]:  # fmt: skip
    """Two priors from calibration alone, for every option of `space`. `resized` is the relative squared error of the
    model's outputs for each smaller height of its input: what no layer's own inputs say. Every unit is a piece of work.

    `reconstruction`: squared error of the consumers' outputs over their dense energy, summed over consumers (a dropped
    block loses all of its last layer's output: 1; with branches inside it, all that these lose). `second_order`: the
    same error weighted by the Fisher information of each output (the second-order Taylor term of the loss with a
    diagonal Hessian).
    """
    estimator = LocalHarm(space, bank, model, anatomy, editor, resized or {})
    found = list(each(LocalHarm.of, estimator, range(len(space.entries))))
    return {name: [np.array(row[at]) for row in found] for at, name in enumerate(("reconstruction", "second_order"))}


@dataclass(frozen=True, slots=True)
class LocalHarm:
    """What each option of a unit does to the layers around it."""

    space: Space
    bank: Bank
    model: nn.Module
    anatomy: Anatomy
    editor: Editor
    resized: Mapping[int, float]

    def of(self, index: int) -> NDArray[np.float64]:
        """Relative and Fisher-weighted harm of the options of the unit at `index`: (2, options)."""
        entry = self.space.entries[index]
        local = np.zeros((2, len(entry.options)))
        if len(entry.options) > 1:
            local[:, 1:] = self._changed(entry)
        return local

    def _changed(self, entry: UnitOptions) -> NDArray[np.float64]:
        bank, model, unit, options = self.bank, self.model, entry.unit, entry.options[1:]
        if unit.narrows:
            return self._when_narrowed(unit, options)
        if unit.kind == "resolution":
            last = _last_layer([layer.name for layer in self.anatomy.architecture.layers], bank)
            shares = np.asarray([self.resized[option.keep] for option in options])
            return np.outer([1.0, _whole(last, bank, model) if last else 1.0], shares)
        if unit.kind == "kernel":
            errors = [_kernel_errors(bank, model, layer=unit.layers[0], option=option) for option in options]
            return np.asarray(errors).T
        if unit.kind == "weights":
            return _edit_errors(self.editor, bank, model, layer=unit.layers[0], options=options)
        inside = [other for other in self.space.units if other.kind == "block" and other.parent == unit.name]
        ends = [_last_layer(part.layers, bank) for part in inside or (unit,)]
        harm = sum(_whole(last, bank, model) if last else 1.0 for last in ends)
        return np.array([[float(len(ends))], [harm]])

    def _when_narrowed(self, unit: Unit, options: Sequence[Option]) -> NDArray[np.float64]:
        bank = self.bank
        view = unit_view(
            self.anatomy.group(unit.name), self.model, bank.statistics, norms=bank.norms, needs={"moments"},
            targets=torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip
        seen = [bank.statistics.get(consumer.name) for consumer in view.consumers]
        fishers = [None if each is None else each.output_fisher for each in seen]
        means = [1.0 if each is None else _mean_square(each) for each in seen]
        return _narrowed(view, bank.orders[unit.name], fishers, options, fallback=means)


def _kernel_errors(bank: Bank, model: nn.Module, *, layer: str, option: Option) -> tuple[float, float]:
    """Relative and Fisher-weighted squared error of a convolution's outputs when the middle of its kernel is left.

    Where its moments were too large to keep, inputs are taken as independent.
    """
    module, statistics, kept = model.get_submodule(layer), bank.statistics[layer], Kept(kernel=option.keep)
    norm = model.get_submodule(bank.norms[layer]) if layer in bank.norms else None
    assert isinstance(module, CONVOLUTIONS)
    weight = module.weight
    new = cropped(weight.detach(), option.keep)
    if option.compensate != "none":
        new = solve(module, statistics, kept=kept, norm=norm).mended.weight
    difference = weight.detach().clone()
    cropped(difference, option.keep).sub_(new)
    moments = centred(statistics, shifts=norm is not None or module.bias is not None)
    parts = [matrix.double().flatten(1) for matrix in (difference, weight.detach())]
    if moments is None:
        power = statistics.diagonal.view(module.groups, -1).repeat_interleave(len(weight) // module.groups, 0)
        lost, whole = ((matrix.square() * power).sum(1) for matrix in parts)
    else:
        lost, whole = (energies(matrix, moments) for matrix in parts)
    scale = norm_scale(norm).square() if norm is not None else torch.ones(len(weight), dtype=torch.float64)
    share = float((lost * scale).sum() / (whole * scale).sum().clamp_min(1e-30))
    return share, float((lost * statistics.output_fisher).sum())


def _edit_errors(
    editor: Editor, bank: Bank, model: nn.Module, *, layer: str, options: Sequence[Option]
) -> NDArray[np.float64]:
    """Relative and Fisher-weighted squared error of a layer's outputs for each of `options`: (2, options)."""
    module = model.get_submodule(layer)
    reading, matrix = editor.reading(layer, module, Kept()), input_matrix(module)
    moments, power = reading.moments, reading.scale**2
    energy = (((matrix @ moments) * matrix).sum(1) * power).sum().clamp_min(1e-30)
    fisher = bank.statistics[layer].output_fisher
    columns = []
    for edit in editor.edits(layer, module, options, kept=Kept()):
        difference = edit.weight.double().flatten(1) - matrix
        error = ((difference @ moments) * difference).sum(1).clamp_min(0.0)
        columns.append((float((error * power).sum() / energy), float((error * fisher).sum())))
    return np.asarray(columns).T


def _mean_square(statistics: LayerStatistics) -> float:
    return float(statistics.diagonal.mean())


def _narrowed(
    view: UnitView, orders: Mapping[str, Tensor], fishers: Sequence[Tensor | None], options: Sequence[Option], *,
    fallback: Sequence[float],
) -> NDArray[np.float64]:  # fmt: skip
    """Relative and Fisher-weighted squared error of all consumers for each of `options`: (2, options)."""
    ways = {(option.method, option.compensate != "none") for option in options}
    errors = {
        (method, solved): _as_channels_go(view, orders[method], fishers, solved=solved, fallback=fallback)
        for method, solved in ways
    }
    columns = [errors[option.method, option.compensate != "none"][:, view.width - option.keep] for option in options]
    return np.stack(columns, axis=1) if columns else np.zeros((2, 0))


def _as_channels_go(
    view: UnitView, order: Tensor, fishers: Sequence[Tensor | None], *, solved: bool, fallback: Sequence[float]
) -> NDArray[np.float64]:
    """The same as channels go in `order`, for each number of those gone: (2, width + 1). Where nothing is known of a
    consumer's inputs and outputs, the relative error stands for both.
    """
    found = np.zeros((2, view.width + 1))
    for consumer, fisher, mean_square in zip(view.consumers, fishers, fallback, strict=True):
        outputs, width, each = consumer.weight.shape
        matrix = consumer.weight.reshape(outputs, width * each)
        columns = (order[:, None] * each + torch.arange(each)).flatten()
        if consumer.moments is None:  # too wide for moments: inputs taken as independent and alike
            error, energy = gone_alone(matrix, columns) * mean_square, matrix.square().sum(1) * mean_square
        else:
            error = nested_errors(matrix, consumer.moments, columns, solved=solved)
            energy = ((matrix @ consumer.moments) * matrix).sum(1)
        error, energy = error[:, ::each], energy * consumer.scale**2  # (outputs, width + 1)
        share = (error * consumer.scale[:, None] ** 2).sum(0) / energy.sum().clamp_min(1e-30)
        found[0] += share.numpy()
        found[1] += (share if fisher is None else (error * fisher[:, None]).sum(0)).numpy()
    return found


def _last_layer(layers: Sequence[str], bank: Bank) -> str | None:
    """The last layer of a block whose inputs calibration saw."""
    return next((layer for layer in reversed(layers) if layer in bank.statistics), None)


def _whole(layer: str, bank: Bank, model: nn.Module) -> float:
    """Second-order harm of losing a layer's whole output."""
    statistics = bank.statistics[layer]
    if statistics.second is None:
        return 1.0
    from_weights = model.get_submodule(layer).weight
    assert isinstance(from_weights, Tensor)
    energy = energies(from_weights.detach().double().flatten(1), statistics.second)
    return float((energy * statistics.output_fisher).sum())
