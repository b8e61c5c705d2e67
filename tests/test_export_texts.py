"""What is written for SPDY, EvoPress, Distiller, MMRazor and AMCT, read back by strict readers of their formats."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from resolved_policies import resolved_case
from torch import Tensor

from autoprune.core.policy import UnitDecision
from autoprune.errors import PolicyError
from autoprune.exporters.amct import AMCT
from autoprune.exporters.base import EXACT, Aspect, Exported, Exporter, Grade, Resolved, UnitCut
from autoprune.exporters.distiller import Distiller
from autoprune.exporters.evopress import EvoPress
from autoprune.exporters.mmrazor import MMRazor
from autoprune.exporters.spdy import SPDY
from autoprune.testing.exporters import ExporterContract, example_resolved

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import strict_texts

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden" / "exports"
DROP = UnitDecision(kind="block", method="drop", keep=0, of=1)


def text(exported: Exported, name: str) -> str:
    return exported.files[name].decode()


def golden(name: str) -> str:
    return (GOLDEN / name).read_text(encoding="utf-8")


def without_version(written: str) -> str:
    return re.sub(r"autoprune \S+", "autoprune", written)


def zeros(resolved: Resolved, layer: str) -> int:
    return int((~resolved.mask(layer)).sum())


def grades(exported: Exported, aspect: Aspect) -> dict[str, Grade]:
    return {remark.unit: remark.grade for remark in exported.fidelity.remarks if remark.aspect == aspect}


def with_blocks(*names: str) -> Resolved:
    """A Llama of two blocks, of which these parts are dropped and no weight is zero."""
    resolved = resolved_case("llm-channels")
    layers = {name: dataclasses.replace(cut, inputs=None, outputs=None) for name, cut in resolved.layers.items()}
    return dataclasses.replace(resolved, units=tuple(UnitCut(name, DROP, ()) for name in names), layers=layers)


class TestSPDYContract(ExporterContract):
    def make(self) -> Exporter:
        return SPDY()


class TestEvoPressContract(ExporterContract):
    def make(self) -> Exporter:
        return EvoPress()


class TestDistillerContract(ExporterContract):
    def make(self) -> Exporter:
        return Distiller()


class TestMMRazorContract(ExporterContract):
    def make(self) -> Exporter:
        return MMRazor()


class TestAMCTContract(ExporterContract):
    def make(self) -> Exporter:
        return AMCT()


@pytest.mark.parametrize(
    ("exporter", "case", "file", "name"),
    [
        (SPDY(), "zeros", "profile.txt", "spdy-profile.txt"),
        (EvoPress(), "llm", "levels.txt", "evopress-levels.txt"),
        (Distiller(), "channels", "schedule.yaml", "distiller.yaml"),
        (Distiller(), "zeros", "schedule.yaml", "distiller-levels.yaml"),
        (MMRazor(), "channels", "fix_subnet.json", "mmrazor.json"),
        (AMCT(), "channels", "prune.cfg", "amct.prototxt"),
        (AMCT(), "zeros", "prune.cfg", "amct-2-4.prototxt"),
    ],
)
def test_the_text_is_the_golden_one(exporter: Exporter, case: str, file: str, name: str) -> None:
    assert without_version(text(exporter.export(resolved_case(case)), file)) == without_version(golden(name))


def test_the_golden_timings_are_read_as_spdy_reads_them() -> None:
    base, prunable, times = strict_texts.spdy_timings(golden("spdy-timings.txt"))
    assert (base, prunable) == (0.1603, 0.1559)
    assert times["layer1.0.conv1"] == {"0.0000": 0.0102, "0.4000": 0.0094, "0.6016": 0.0071, "0.8054": 0.0043}


def test_a_profile_has_each_layers_share_of_zeros() -> None:
    resolved = resolved_case("mixed")
    exported = SPDY().export(resolved)
    profile = strict_texts.spdy_profile(text(exported, "profile.txt"))
    assert set(profile) == {cut.name for cut in resolved.layers.values() if len(cut.shape) > 1 and not cut.gone}
    assert profile == {layer: round(zeros(resolved, layer) / resolved.mask(layer).numel(), 4) for layer in profile}
    sparsity = grades(exported, "sparsity")
    assert sparsity["fc2.weight"] == EXACT
    assert "no" not in sparsity["layer2.0.shortcut.0.weight"].why.split()
    assert "cut off" in sparsity["stem.0.weight"].why


def test_levels_mean_the_zeros_that_there_are() -> None:
    resolved = resolved_case("llm")
    exported = EvoPress().export(resolved)
    levels = strict_texts.evopress_levels(text(exported, "levels.txt"))
    weights: dict[str, Tensor] = torch.load(io.BytesIO(exported.files["weights.pt"]), weights_only=True)
    step = math.gcd(*(zeros(resolved, layer) for layer in levels))
    assert levels == {layer: zeros(resolved, layer) // step for layer in levels}
    assert set(levels) == {unit.layers[0] for unit in resolved.units} == set(weights)
    state = resolved.model.state_dict()
    assert all(torch.equal(weights[layer], state[f"{layer}.weight"]) for layer in levels)
    assert set(grades(exported, "weights").values()) == {EXACT}


def test_heads_and_features_are_zeros_of_the_dense_shape() -> None:
    resolved = resolved_case("llm-channels")
    exported = EvoPress().export(resolved)
    weights: dict[str, Tensor] = torch.load(io.BytesIO(exported.files["weights.pt"]), weights_only=True)
    dense = resolved.dense.state_dict()
    for layer, weight in weights.items():
        assert torch.equal(weight, dense[f"{layer}.weight"] * resolved.mask(layer))
    assert {grade.level for grade in grades(exported, "width").values()} == {"approximated"}


@pytest.mark.parametrize(
    ("parts", "tokens"),
    [
        (("model.layers.1",), ["none", "attn+mlp"]),
        (("model.layers.0.mlp", "model.layers.1.self_attn"), ["mlp", "attn"]),
        (("model.layers.0.self_attn", "model.layers.0.mlp"), ["attn+mlp", "none"]),
    ],
)
def test_dropped_parts_are_told_block_by_block(parts: tuple[str, ...], tokens: list[str]) -> None:
    exported = EvoPress().export(with_blocks(*parts))
    assert set(exported.files) == {"depth.txt"}
    assert strict_texts.evopress_depth(text(exported, "depth.txt")) == tokens
    assert set(grades(exported, "depth").values()) == {EXACT}


def test_the_golden_depth_has_every_token() -> None:
    assert set(strict_texts.evopress_depth(golden("evopress-depth.txt"))) == set(strict_texts.TOKENS)


def test_a_block_of_another_network_is_not_told() -> None:
    exported = EvoPress().export(resolved_case("mended"))
    assert "depth.txt" not in exported.files
    assert {grade.level for grade in grades(exported, "depth").values()} == {"dropped"}


@pytest.mark.parametrize("case", ["plain", "channels", "mended", "mixed"])
def test_distillers_filters_leave_the_cut_models_widths(case: str) -> None:
    resolved = resolved_case(case)
    schedule = strict_texts.distiller(text(Distiller().export(resolved), "schedule.yaml"))
    assert schedule.filters
    for layer, share in schedule.filters.items():
        of = resolved.layers[layer].shape[0]
        if not resolved.layers[layer].gone:
            assert of - math.floor(share * of) == len(_kept_outputs(resolved, layer))
    for follower, leader in schedule.leaders.items():
        assert _kept_outputs(resolved, follower) == _kept_outputs(resolved, leader) or resolved.layers[follower].gone


def test_distillers_levels_and_blocks_leave_as_many_weights() -> None:
    resolved = resolved_case("zeros")
    schedule = strict_texts.distiller(text(Distiller().export(resolved), "schedule.yaml"))
    assert set(schedule.levels) | set(schedule.blocks) == {unit.layers[0] for unit in resolved.units}
    for layer, share in schedule.levels.items():
        assert int(share * resolved.mask(layer).numel()) == zeros(resolved, layer)
    for layer, (share, (rows, columns)) in schedule.blocks.items():
        blocks = resolved.mask(layer).numel() // (rows * columns)
        assert int(share * blocks) * rows * columns == zeros(resolved, layer)


def test_distiller_prunes_a_weight_once() -> None:
    resolved = resolved_case("mixed")
    exported = Distiller().export(resolved)
    schedule = strict_texts.distiller(text(exported, "schedule.yaml"))
    assert not set(schedule.filters) & (set(schedule.levels) | set(schedule.blocks))
    assert grades(exported, "sparsity")["layer3.0.conv2.weight"].level == "dropped"


def test_mmrazors_units_have_the_cut_models_widths() -> None:
    resolved = resolved_case("channels")
    units = strict_texts.mmrazor(text(MMRazor().export(resolved), "fix_subnet.json"))
    assert set(units) == {unit.name for unit in resolved.units}
    state = resolved.model.state_dict()
    assert all(len(state[f"{name}.weight"]) == keep for name, (keep, _) in units.items())


@pytest.mark.parametrize("exporter", [MMRazor(), AMCT()])
def test_heads_are_left_out(exporter: Exporter) -> None:
    exported = exporter.export(resolved_case("vit"))
    heads = {unit.name for unit in resolved_case("vit").units if unit.decision.kind == "heads"}
    assert heads
    assert {name for name, grade in grades(exported, "width").items() if grade.level == "dropped"} == heads
    assert not any(name in content.decode() for name in heads for content in exported.files.values()
                   if b"layer_name" not in content)  # fmt: skip


def test_amcts_ratios_leave_the_cut_models_widths() -> None:
    resolved = resolved_case("mixed")
    said = strict_texts.amct(text(AMCT().export(resolved), "prune.cfg"))
    assert said.ratios
    for layer, ratio in said.ratios.items():
        of = resolved.layers[layer].shape[0]
        assert resolved.layers[layer].gone or of - round(of * ratio) == len(_kept_outputs(resolved, layer))
    weighty = {cut.name for cut in resolved.layers.values() if len(cut.shape) > 1}
    assert {*said.ratios, *said.halved, *said.skipped} == weighty
    halves = {unit.layers[0] for unit in resolved.units if unit.decision.pattern == "2:4"}
    assert set(said.halved) == halves - set(said.ratios)


def test_amct_leaves_a_depthwise_convolution_to_its_graph() -> None:
    said = strict_texts.amct(text(AMCT().export(resolved_case("plain")), "prune.cfg"))
    assert "depthwise" not in {*said.ratios, *said.halved, *said.skipped}
    assert "conv1" in said.ratios


CASES = ["plain", "channels", "mended", "zeros", "mixed", "vit", "llm", "llm-channels"]
WITHOUT = {"distiller": {"vit", "llm-channels"}, "mmrazor": {"zeros", "llm"}}
"""Cases of which nothing can be said."""


@pytest.mark.parametrize("exporter", [SPDY(), EvoPress(), Distiller(), MMRazor(), AMCT()], ids=lambda each: each.name)
@pytest.mark.parametrize("case", CASES)
def test_every_aspect_has_a_grade(exporter: Exporter, case: str) -> None:
    resolved = resolved_case(case)
    if case in WITHOUT.get(exporter.name, ()):
        with pytest.raises(PolicyError, match=r"policy\.yaml: "):
            exporter.export(resolved)
        return
    exported = exporter.export(resolved)
    assert tuple((remark.unit, remark.aspect) for remark in exported.fidelity.remarks) == resolved.aspects


@pytest.mark.parametrize("exporter", [SPDY(), EvoPress(), Distiller(), MMRazor(), AMCT()], ids=lambda each: each.name)
def test_bits_alone_are_refused(exporter: Exporter) -> None:
    with pytest.raises(PolicyError, match=r"policy\.yaml: .*"):
        exporter.export(example_resolved("head.weight"))


def _kept_outputs(resolved: Resolved, layer: str) -> list[int]:
    rows = resolved.mask(layer).flatten(1).any(1)
    return [int(row) for row in rows.nonzero().flatten()]
