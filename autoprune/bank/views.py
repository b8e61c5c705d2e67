"""From statistics to what a method may see: one view a unit, in float64, with weights laid out by channel."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from autoprune.bank.calibrate import LayerStatistics
from autoprune.methods.base import Activity, Consumer, Need, UnitView
from autoprune.model.coupling import CONVOLUTIONS, NORMS, Group, Member, Slab, is_depthwise
from autoprune.model.flow import norm_scale


def input_matrix(layer: nn.Module) -> Tensor:
    """A layer's weight as (outputs, inputs * kernel area), channel-major, float64; zeros across groups."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().double().flatten(2) if weight.ndim > 2 else weight.detach().double()[:, :, None]
    if not isinstance(layer, CONVOLUTIONS) or layer.groups == 1:
        return weight.flatten(1)
    outputs, inputs, area = weight.shape
    full = torch.zeros(outputs, layer.groups, inputs, area, dtype=torch.float64)
    rows = torch.arange(outputs)
    full[rows, rows // (outputs // layer.groups)] = weight
    return full.flatten(1)


def centred(statistics: LayerStatistics, *, shifts: bool) -> Tensor | None:
    """Second moments of the inputs, about their mean where the layer (or a norm after it) can absorb a shift."""
    if statistics.second is None:
        return None
    return statistics.second - torch.outer(statistics.mean, statistics.mean) if shifts else statistics.second


def matrix_columns(member: Member, area: int) -> Tensor:
    """Columns of a consumer's matrix that read each channel of the unit, (width, columns)."""
    return (member.positions[:, :, None] * area + torch.arange(area)).flatten(1)


def unit_view(
    group: Group, model: nn.Module, statistics: Mapping[str, LayerStatistics], *, norms: Mapping[str, str],
    needs: Collection[Need], targets: Tensor,
) -> UnitView:  # fmt: skip
    """What methods with `needs` may see of one group. `norms` maps a layer to the norm that follows it."""
    modules = dict(model.named_modules())
    producers = [_rows(modules[m.layer], m) for m in group.on("out") if not is_depthwise(modules[m.layer])]
    producers += [rows for slab in group.slabs if (rows := _slab_rows(model, slab)) is not None and not slab.reads]
    scales = [_gammas(modules[m.layer], m) for m in group.on("norm")]
    consumers = [
        consumer_view(m, model, statistics[m.layer], norm=norms.get(m.layer), moments="moments" in needs)
        for m in group.on("in")
    ]
    if not consumers:  # read by bare parameters alone, whose inputs nobody watches
        consumers = [_slab_consumer(model, slab) for slab in group.slabs if slab.reads]
    taylor = sum((statistics[m.layer].taylor[m.positions].sum(1) for m in group.on("in")), torch.zeros(group.width))
    return UnitView(
        name=group.root,
        width=group.width,
        producers=tuple(rows for rows in producers if rows.shape[1]),
        norm_scales=tuple(scale for scale in scales if scale is not None),
        consumers=tuple(consumers),
        activity=_activity(group, statistics, targets) if "activity" in needs and group.on("in") else None,
        taylor=taylor.double() if "gradients" in needs and group.on("in") else None,
    )


def _activity(group: Group, statistics: Mapping[str, LayerStatistics], targets: Tensor) -> Activity:
    """What the channels did, as the first layer that reads them saw it."""
    first = group.on("in")[0]
    seen = statistics[first.layer]
    places = first.positions
    each = len(seen.diagonal) // len(seen.mean_abs)
    return Activity(
        mean_abs=seen.mean_abs[places].mean(1),
        mean_square=seen.diagonal.view(-1, each)[places].mean((1, 2)),
        zero_share=seen.zero_share[places].mean(1),
        per_sample=seen.per_sample[:, places].mean(2).double(),
        targets=targets,
    )


def _by_position(model: nn.Module, slab: Slab) -> Tensor:
    """A parameter as (positions of the slab's dimension, the rest), float64."""
    return model.get_parameter(slab.parameter).detach().double().movedim(slab.dim, 0).flatten(1)


def _slab_rows(model: nn.Module, slab: Slab) -> Tensor | None:
    """The weights of a bare parameter that make each channel, (width, fan-in * positions); none of a vector's."""
    if model.get_parameter(slab.parameter).ndim == 1:
        return None
    return _by_position(model, slab)[slab.positions].flatten(1)


def _slab_consumer(model: nn.Module, slab: Slab) -> Consumer:
    """A bare parameter that reads the channels; nothing is known of its inputs."""
    weight = _by_position(model, slab)[slab.positions].permute(2, 0, 1)  # (outputs, width, columns)
    return Consumer(slab.parameter, weight, None, torch.ones(len(weight), dtype=torch.float64))


def consumer_view(
    member: Member, model: nn.Module, statistics: LayerStatistics, *, norm: str | None, moments: bool
) -> Consumer:
    """One consumer's weights and moments, restricted to the columns that read the unit."""
    layer = model.get_submodule(member.layer)
    matrix = input_matrix(layer)
    area = matrix.shape[1] // _inputs(layer)
    columns = matrix_columns(member, area)  # (width, columns each)
    second = centred(statistics, shifts=norm is not None or layer.bias is not None) if moments else None
    flat = columns.flatten()
    scale = norm_scale(model.get_submodule(norm)).abs() if norm else torch.ones(len(matrix), dtype=torch.float64)
    return Consumer(
        name=member.layer,
        weight=matrix[:, columns],
        moments=second[flat][:, flat] if second is not None else None,
        scale=scale,
    )


def _inputs(layer: nn.Module) -> int:
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def _rows(layer: nn.Module, member: Member) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().double().flatten(1)[member.positions].flatten(1)  # (width, fan-in * positions)


def _gammas(norm: nn.Module, member: Member) -> Tensor | None:
    if not isinstance(norm, NORMS) or not norm.affine:
        return None
    return norm.weight.detach().double().abs()[member.positions].mean(1)
