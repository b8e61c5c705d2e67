"""Search space files: presets, mistakes, and the options they give every unit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Residual, Transformer, randomised

from autoprune import spaces
from autoprune.core.unit import DROP, Unit, keep_all
from autoprune.errors import ConfigError
from autoprune.methods import METHODS
from autoprune.model.discover import discover
from autoprune.spaces import MethodChoice, SpaceSpec, load_space, presets, resolve

TWO = (MethodChoice(method="obs", compensate="least_squares"), MethodChoice(method="l2"))


def written(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_know_their_methods(name: str, tmp_path: Path) -> None:
    spec = load_space(name, tmp_path)
    assert spec.about
    assert {choice.method for choice in spec.methods} <= set(METHODS)
    assert len(set(spec.methods)) == len(spec.methods)


def test_the_default_preset_is_there() -> None:
    assert "cnn-channels" in presets()
    assert set(presets()) == set(SUITED)


def test_the_loader_finds_presets_in_a_wheel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "autoprune" / "search_spaces"
    packaged.mkdir(parents=True)
    (packaged / "shipped.yaml").write_text("methods: [{method: l2}]\n", encoding="utf-8")
    monkeypatch.setattr(spaces, "files", lambda _package: packaged.parent)
    assert presets() == ("shipped",)
    assert load_space("shipped", tmp_path).methods == (MethodChoice(method="l2"),)


def test_an_unknown_preset_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'cnn-chanels'.*'cnn-channels'"):
        load_space("cnn-chanels", tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml.*cnn-channels"):
        load_space("absent.yaml", tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("methods: [{method: l2}]\nlevel: 4\n", "level: unknown key; did you mean 'levels'"),
        ("methods: [{method: l2, compensat: none}]\n", "compensat: unknown key; did you mean 'compensate'"),
        ("methods: []\n", "methods"),
        ("levels: 4\n", "methods: channels need at least one method"),
        ("methods: [{method: l2}]\nlevels: 1\n", "levels"),
        ("methods: [{method: l2}]\nmin_keep: 0\n", "min_keep"),
        ("methods: [{method: l2, compensate: magic}]\n", "least_squares"),
        ("- l2\n", "mapping"),
        ("", "mapping"),
        ("methods: [{method: l2}, {method: l2}]\n", "methods"),
        ("methods: [{method: l2}]\nhead: true\n", "head: unknown key; did you mean 'heads'"),
        ("methods: [{method: l2}]\nheads: {level: 4}\n", "heads.level: unknown key; did you mean 'levels'"),
        ("methods: [{method: l2}]\nheads: {align: 8}\n", "heads.align: heads have no alignment"),
        ("methods: [{method: l2}]\nffn: 3\n", "ffn: given 3, allowed: true, false, or a mapping"),
        ("methods: [{method: l2}]\nmin_keep: 200%\n", "min_keep: '200%' is no share of the width"),
        ("methods: [{method: l2}]\nalign: 0\n", "align"),
        ("methods: [{method: l2}]\nwidths: [0]\n", "0 is no width; write a number of channels such as 24, or a share"),
        ("methods: [{method: l2}]\nwidths: [50%]\nlevels: 4\n", "give either widths, or levels and min_keep"),
        ("methods: [{method: l2}]\nffn: {widths: [8], min_keep: 10%}\n", "give either widths, or levels and min_keep"),
        ("heads: true\nchannels: false\n", "methods: heads need at least one method (or set heads: false)"),
        ("channels: false\nblocks: false\n", "nothing may be pruned"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, text: str, wanted: str) -> None:
    folder = written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        resolve([Unit("a", "channels", 16, ("a",))], load_space("mine.yaml", folder))
    assert "mine.yaml" in str(raised.value)
    assert wanted in str(raised.value)


def test_options_are_widest_first_and_hold_what_is_asked() -> None:
    units = [Unit("a", "channels", 16, ("a",)), Unit("b", "block", 1, ("a",)), Unit("c", "channels", 2, ("c",))]
    space = resolve(units, SpaceSpec(methods=TWO, levels=4))
    first, block, narrow = space.entries
    assert [option.keep for option in first.options] == [16, 12, 12, 8, 8, 4, 4]
    assert [option.method for option in first.options[1:3]] == ["obs", "l2"]
    assert block.options == (keep_all(units[1]), DROP)
    assert [option.keep for option in narrow.options] == [2, 1, 1]


def test_aligned_widths_are_included_within_bounds() -> None:
    unit = Unit("a", "channels", 20, ("a",))
    space = resolve([unit], SpaceSpec(methods=TWO[:1], levels=2, min_keep=0.2), aligned=lambda _unit: (2, 8, 16, 20))
    assert [option.keep for option in space.entries[0].options] == [20, 16, 10, 8]


def test_switches() -> None:
    units = [Unit("a", "channels", 16, ("a",)), Unit("b", "block", 1, ("a",))]
    assert [len(e.options) for e in resolve(units, SpaceSpec(methods=TWO, channels=False)).entries] == [1, 2]
    assert len(resolve(units, SpaceSpec(methods=TWO, blocks=False)).entries[1].options) == 1


NARROW = [Unit("c", "channels", 32, ("c",)), Unit("h", "heads", 6, ("h",)), Unit("f", "ffn", 64, ("f",))]


def keeps_of(text: str, folder: Path, **more: Any) -> dict[str, list[int]]:
    """The widths below the full one that each unit gets from a file, widest first."""
    spec = load_space("mine.yaml", written(folder, "methods: [{method: l2}]\n" + text))
    return {entry.unit.name: [o.keep for o in entry.options[1:]] for entry in resolve(NARROW, spec, **more).entries}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("levels: 2\n", {"c": [16], "h": [3], "f": [32]}),
        ("levels: 2\nheads: false\n", {"c": [16], "h": [], "f": [32]}),
        ("levels: 2\nchannels: false\n", {"c": [], "h": [], "f": []}),
        ("levels: 2\nchannels: false\nffn: true\n", {"c": [], "h": [], "f": [32]}),
        ("levels: 2\nheads: {levels: 6}\n", {"c": [16], "h": [5, 4, 3, 2, 1], "f": [32]}),
        ("levels: 2\nheads: {levels: 6, min_keep: 50%}\n", {"c": [16], "h": [5, 4, 3], "f": [32]}),
        ("levels: 4\nchannels: {levels: 2}\n", {"c": [16], "h": [3], "f": [32]}),  # the others follow channels
        ("levels: 4\nalign: 16\n", {"c": [16], "h": [4, 3, 2], "f": [48, 32, 16]}),
        ("levels: 4\nchannels: {align: 16}\n", {"c": [16], "h": [4, 3, 2], "f": [48, 32, 16]}),
        ("levels: 4\nmin_keep: 50%\nalign: 24\n", {"c": [24], "h": [4, 3], "f": [48]}),
        ("align: 64\n", {"c": [], "h": [6 - n for n in range(1, 6)], "f": []}),
        ("widths: [75%, 12]\n", {"c": [24, 12], "h": [4], "f": [48, 12]}),
        ("widths: [75%, 12]\nalign: 8\n", {"c": [24, 16], "h": [4], "f": [48, 16]}),
        ("widths: [1%]\n", {"c": [], "h": [], "f": [1]}),
        ("widths: [50%]\nheads: {widths: [1, 2, 9]}\n", {"c": [16], "h": [2, 1], "f": [32]}),
        ("widths: [50%]\nheads: {levels: 3}\n", {"c": [16], "h": [4, 2], "f": [32]}),
    ],
)
def test_kinds_of_units_have_widths_of_their_own(tmp_path: Path, text: str, wanted: dict[str, list[int]]) -> None:
    assert keeps_of("blocks: false\n" + text if "false" not in text else text, tmp_path) == wanted


def test_edges_of_the_runtime_are_beside_even_levels_and_not_beside_widths(tmp_path: Path) -> None:
    def edges(unit: Unit) -> tuple[int, ...]:
        return (5, 24, unit.width)

    assert keeps_of("levels: 2\n", tmp_path, aligned=edges)["c"] == [24, 16, 5]
    assert keeps_of("levels: 2\nalign: 8\n", tmp_path, aligned=edges)["c"] == [24, 16, 8]
    assert keeps_of("widths: [50%]\n", tmp_path, aligned=edges)["c"] == [16]


@given(st.integers(2, 700), st.integers(1, 64), st.integers(2, 32), st.floats(0.001, 1.0))
def test_aligned_widths_are_multiples_or_full(width: int, align: int, levels: int, min_keep: float) -> None:
    spec = SpaceSpec(methods=TWO, levels=levels, min_keep=min_keep, align=align)
    for kind in ("channels", "ffn"):
        keeps = {option.keep for option in resolve([Unit("a", kind, width, ("a",))], spec).entries[0].options}
        assert all(keep % align == 0 for keep in keeps - {width})
        assert all(keep >= width * min_keep - 1e-6 for keep in keeps)


CNN, VIT, GPT = "residual module", "vit", "gpt"
SUITED = {
    "all-methods": {CNN: {"channels", "block"}, VIT: {"channels", "heads", "ffn", "block"}},
    "blocks": {CNN: {"block"}, GPT: {"block"}},
    "cnn-channels": {CNN: {"channels", "block"}},
    "cnn-nas": {CNN: {"channels", "block"}},
    "compress": {CNN: {"channels", "block", "weights"}, GPT: {"heads", "ffn", "block", "weights"}},
    "everything": {
        CNN: {"channels", "block", "weights"},
        VIT: {"channels", "heads", "ffn", "block", "weights"},
        GPT: {"heads", "ffn", "block", "weights"},
    },
    "int8": {CNN: {"channels", "block", "weights"}},
    "llm": {GPT: {"heads", "ffn", "block"}},
    "tiny": {CNN: {"channels", "block", "weights"}},
    "vit": {VIT: {"channels", "heads", "ffn", "block"}},
    "weights-nm": {CNN: {"weights"}, VIT: {"weights"}, GPT: {"weights"}},
}
"""Preset -> network -> kinds of units that get options."""


@pytest.mark.parametrize("name", presets())
def test_presets_give_options_to_each_kind_of_unit_they_are_for(name: str, tmp_path: Path) -> None:
    spec = load_space(name, tmp_path)
    images, tokens = torch.randn(2, 3, 16, 16), torch.randint(20, (2, 8))
    networks = {CNN: (Residual(width=16, blocks=2), images), VIT: (Transformer(seen=True), images),
                GPT: (Transformer(seen=False), tokens)}  # fmt: skip
    for network, wanted in SUITED[name].items():
        model, example = networks[network]
        found = discover(
            randomised(model), example, narrow=spec.narrowed, blocks=spec.blocks, weights=bool(spec.weights)
        )
        entries = resolve(found.units, spec).entries
        assert {entry.unit.kind for entry in entries if len(entry.options) > 1} == wanted, network
        aligned = {"cnn-nas": 8, "tiny": 4}.get(name, 1)
        keeps = [(o.keep, e.unit.width) for e in entries if e.unit.kind == "channels" for o in e.options]
        assert all(keep % aligned == 0 or keep == width for keep, width in keeps)


@given(st.integers(2, 700), st.integers(2, 32), st.floats(0.001, 1.0))
def test_widths_are_in_bounds(width: int, levels: int, min_keep: float) -> None:
    spec = SpaceSpec(methods=TWO, levels=levels, min_keep=min_keep)
    keeps = [option.keep for option in resolve([Unit("a", "channels", width, ("a",))], spec).entries[0].options]
    assert keeps == sorted(keeps, reverse=True)
    assert keeps[0] == width
    assert all(max(1, math.ceil(width * min_keep - 1e-9)) <= keep < width for keep in keeps[1:])
