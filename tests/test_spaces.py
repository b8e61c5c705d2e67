"""Search space files: presets, mistakes, and the options they give every unit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune import spaces
from autoprune.core.unit import DROP, Unit, keep_all
from autoprune.errors import ConfigError
from autoprune.methods import METHODS
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
    assert {"cnn-channels", "blocks", "all-methods", "compress", "int8"} <= set(presets())


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


@given(st.integers(2, 700), st.integers(2, 32), st.floats(0.001, 1.0))
def test_widths_are_in_bounds(width: int, levels: int, min_keep: float) -> None:
    spec = SpaceSpec(methods=TWO, levels=levels, min_keep=min_keep)
    keeps = [option.keep for option in resolve([Unit("a", "channels", width, ("a",))], spec).entries[0].options]
    assert keeps == sorted(keeps, reverse=True)
    assert keeps[0] == width
    assert all(max(1, math.ceil(width * min_keep - 1e-9)) <= keep < width for keep in keeps[1:])
