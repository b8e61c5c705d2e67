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
from autoprune.core.space import Space
from autoprune.core.unit import Option
from autoprune.methods import method
from autoprune.methods.base import Consumer, Method, Need, UnitView, order_by
from autoprune.methods.compensate import gone_alone, nested_errors
from autoprune.methods.l2 import l2_scores
from autoprune.model.coupling import CONVOLUTIONS
from autoprune.model.cut import Kept
from autoprune.model.discover import Anatomy
from autoprune.model.flow import norm_scale
from autoprune.model.kernels import cropped
from autoprune.progress import Progress

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


def rank(
    model: nn.Module, anatomy: Anatomy, statistics: Mapping[str, LayerStatistics], *, norms: Mapping[str, str],
    methods: Sequence[str], targets: Tensor, seed: int, progress: Progress,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Removal orders of every channel unit by every method."""
    criteria: dict[str, Method] = {name: method(name) for name in methods}
    needs: set[Need] = {need for criterion in criteria.values() for need in criterion.needs}
    progress.phase("bank", len(anatomy.groups))
    orders: dict[str, dict[str, Tensor]] = {}
    for index, group in enumerate(anatomy.groups):
        view = unit_view(group, model, statistics, norms=norms, needs=needs, targets=targets)
        generator = torch.Generator().manual_seed(seed * 104729 + index)
        if not group.on("in"):
            orders[group.root] = _unwatched(view, criteria, generator)
        else:
            orders[group.root] = {
                name: criterion.removal_order(_without_moments(view, criterion), generator)
                for name, criterion in criteria.items()
                if "moments" not in criterion.needs or all(c.moments is not None for c in view.consumers)
            }
        progress.step()
    return orders


def _unwatched(view: UnitView, criteria: Mapping[str, Method], generator: torch.Generator) -> dict[str, Tensor]:
    """Orders of a unit that bare parameters alone read (the inner width of a recurrent network): methods that need to
    see the channels at work fall back to the order of `l2`.
    """
    return {
        name: order_by(l2_scores(view)) if criterion.needs else criterion.removal_order(view, generator)
        for name, criterion in criteria.items()
    }


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
    resized: Mapping[int, float] | None = None,
) -> dict[str, Harms]:  # fmt: skip
    """Two priors from calibration alone, for every option of `space`. `resized` is the relative squared error of the
    model's outputs for each smaller height of its input: what no layer's own inputs say.

    `reconstruction`: squared error of the consumers' outputs over their dense energy, summed over consumers (a dropped
    block loses all of its last layer's output: 1; with branches inside it, all that these lose). `second_order`: the
    same error weighted by the Fisher information of each output (the second-order Taylor term of the loss with a
    diagonal Hessian).
    """
    empty = torch.zeros(1, dtype=torch.int64)
    harms: dict[str, Harms] = {"reconstruction": [], "second_order": []}
    for entry in space.entries:
        local = np.zeros((2, len(entry.options)))
        if entry.unit.narrows:
            view = unit_view(
                anatomy.group(entry.unit.name),
                model,
                bank.statistics,
                norms=bank.norms,
                needs={"moments"},
                targets=empty,
            )
            seen = [bank.statistics.get(consumer.name) for consumer in view.consumers]
            fishers = [None if each is None else each.output_fisher for each in seen]
            means = [1.0 if each is None else _mean_square(each) for each in seen]
            local[:, 1:] = _narrowed(view, bank.orders[entry.unit.name], fishers, entry.options[1:], fallback=means)
        elif entry.unit.kind == "resolution":
            last = _last_layer([layer.name for layer in anatomy.architecture.layers], bank)
            shares = np.asarray([(resized or {})[option.keep] for option in entry.options[1:]])
            local[:, 1:] = np.outer([1.0, _whole(last, bank, model) if last else 1.0], shares)
        elif entry.unit.kind == "kernel":
            for index, option in enumerate(entry.options[1:], start=1):
                local[:, index] = _kernel_errors(bank, model, layer=entry.unit.layers[0], option=option)
        elif entry.unit.kind == "weights":
            if len(entry.options) > 1:
                local[:, 1:] = _edit_errors(editor, bank, model, layer=entry.unit.layers[0], options=entry.options[1:])
        else:
            inside = [u for u in space.units if u.kind == "block" and u.parent == entry.unit.name]
            ends = [_last_layer(unit.layers, bank) for unit in inside or (entry.unit,)]
            harm = sum(_whole(last, bank, model) if last else 1.0 for last in ends)
            local[:, 1:] = np.array([[float(len(ends))], [harm]])
        harms["reconstruction"].append(local[0])
        harms["second_order"].append(local[1])
    return harms


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
