"""How much of a model a space reaches, against really cut models; reasons add up to the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import CASES
from torch import nn

from autoprune.core.outcome import CoverageRecord
from autoprune.coverage import coverage
from autoprune.errors import ConfigError, ModelError
from autoprune.model.cut import cut, plan_cut
from autoprune.model.describe import describe
from autoprune.model.discover import Anatomy, discover
from autoprune.profile.cost_model import CostModel
from autoprune.report.text import coverage_view, plain
from autoprune.spaces import MethodChoice, SpaceSpec, WeightChoice, load_space, resolve

SPEC = SpaceSpec(methods=(MethodChoice(method="l2"),))


def covered(case: str, spec: SpaceSpec = SPEC) -> tuple[Anatomy, CoverageRecord]:
    model, example = CASES[case].model(), CASES[case].example()
    found = discover(
        model, example, only=spec.only, protect=spec.protect, narrow=spec.narrowed, blocks=spec.blocks,
        weights=bool(spec.weights),
    )  # fmt: skip
    costs = CostModel(found.architecture, resolve(found.units, spec))
    return found, coverage(costs, found.refused, narrowed=bool(spec.narrowed))


def macs_by_layer(model: nn.Module, example: torch.Tensor) -> dict[str, float]:
    layers = describe(model, example, groups=(), blocks=()).layers
    return {
        layer.name: layer.positions * layer.kernel * layer.outputs.fixed
        * (1 if layer.kind == "depthwise" else layer.inputs.fixed / layer.groups)
        for layer in layers if layer.kind != "norm"
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_reached_is_what_a_cut_makes_cheaper(case: str) -> None:
    model, example = CASES[case].model(), CASES[case].example()
    found, record = covered(case)
    kept = {group.root: torch.arange(1) for group in found.groups}
    blocks = [block.name for block in found.blocks]
    inside = {layer for block in found.blocks for layer in block.layers}
    narrow = cut(model, plan_cut(found.widths, found.groups, kept=kept, dropped=()))
    dense, least = macs_by_layer(model, example), macs_by_layer(narrow, example)
    cheaper = [name for name, macs in dense.items() if least[name] < macs or (blocks and name in inside)]
    assert record.macs == pytest.approx(sum(dense[name] for name in cheaper) / sum(dense.values()))
    assert record.macs + sum(entry.macs_share for entry in record.kept) == pytest.approx(1)


@pytest.mark.parametrize(("case", "only"), [("vgg", "0"), ("residual module", "layer1.1.conv1"), ("unet", "down1")])
def test_what_the_space_leaves_is_told_with_its_share(case: str, only: str) -> None:
    protected = SPEC.model_copy(update={"protect": ("*",)})
    with pytest.raises(ModelError, match="protected"):
        covered(case, protected)
    _, record = covered(case, SPEC.model_copy(update={"only": (only,)}))
    kept = next(entry for entry in record.kept if "only" in entry.reason)
    assert kept.advice == "name it in only"
    assert 0 < kept.macs_share == pytest.approx(1 - record.macs - sum(e.macs_share for e in record.kept if e != kept))


def test_blocks_alone_reach_what_lies_in_them() -> None:
    spec = SpaceSpec(channels=False)
    found, record = covered("residual module", spec)
    macs = macs_by_layer(CASES["residual module"].model(), CASES["residual module"].example())
    inside = sum(macs[name] for name in {layer for block in found.blocks for layer in block.layers} & set(macs))
    assert record.macs == pytest.approx(inside / sum(macs.values()))
    (kept,) = record.kept
    assert "leaves channels, heads and ffn" in kept.reason
    assert kept.macs_share == pytest.approx(1 - record.macs)


def test_weights_inside_are_counted_beside() -> None:
    spec = SpaceSpec(channels=False, blocks=False, weights=(WeightChoice(bits=(8,)),))
    _, record = covered("vgg", spec)
    assert record.macs == record.params == 0
    assert 0.9 < record.weights < 1  # all but the norm's scale and shift
    assert record.kept[0].macs_share == pytest.approx(1)
    assert record.kept[0].advice == "its weights change inside"


def test_reasons_of_one_kind_are_one_row_and_the_largest_is_first() -> None:
    _, record = covered("vgg", SPEC.model_copy(update={"protect": ("2", "6")}))
    shares = [entry.macs_share for entry in record.kept]
    assert shares == sorted(shares, reverse=True)
    row = next(entry for entry in record.kept if entry.reason.startswith("protected"))
    assert len(row.roots) > 1
    assert row.reason == f"protected (and {len(row.roots) - 1} more like it)"
    shown = "".join(plain(part) for part in coverage_view(record))
    assert "take it out of protect" in shown or row.macs_share == 0


@pytest.mark.parametrize(("key", "glob"), [("only", "stam*"), ("protect", "layer1.1.conv3")])
def test_an_unknown_module_names_the_nearest(key: str, glob: str) -> None:
    with pytest.raises(ConfigError, match=rf"space\.{key}: .* matches no module of the model; did you mean "):
        covered("residual module", SPEC.model_copy(update={key: (glob,)}))


def test_only_narrows_what_is_made_there() -> None:
    found, _ = covered("residual module", SPEC.model_copy(update={"only": ("layer1.0", "layer2.0.conv1")}))
    assert {unit.name for unit in found.units} == {"layer1.0", "layer1.0.conv1", "layer2.0.conv1"}


def test_kinds_that_are_off_are_no_units() -> None:
    found, record = covered("vgg", SpaceSpec(methods=SPEC.methods, ffn=False))
    assert {unit.kind for unit in found.units} == {"channels"}
    assert any("leaves ffn" in entry.reason for entry in record.kept)
    assert load_space("llm", Path()).narrowed == ("heads", "ffn")
