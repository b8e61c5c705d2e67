"""Strict readers of the text formats, written from the tools' sources and nothing of ours: any other line raises."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

TOKENS = ("none", "attn", "mlp", "attn+mlp")


def _matched(pattern: str, line: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, line)
    assert found is not None, f"{line!r} is not of the form {pattern}"
    return found.groups()


def _lines(text: str) -> list[str]:
    assert text.endswith("\n"), "the last line has no end; readers that cut one character off it cut its name"
    return text[:-1].split("\n")


def spdy_profile(text: str) -> dict[str, float]:
    """Layer -> sparsity. SPDY splits at the one space and cuts off the line's end."""
    pairs = [_matched(r"(0\.\d{4}) (\S+)", line) for line in _lines(text)]
    assert len({name for _, name in pairs}) == len(pairs), "a layer is named twice"
    return {name: float(share) for share, name in pairs}


def spdy_timings(text: str) -> tuple[float, float, dict[str, dict[str, float]]]:
    """Time of the model, of what can be pruned, and of each layer by sparsity."""
    base, whole, prunable, part, *rest = _lines(text)
    assert (base, prunable) == ("base", "prunable")
    times: dict[str, dict[str, float]] = {}
    name = ""
    for line in rest:
        if " " not in line:
            name = line
            times[name] = {}
        else:
            time, share = _matched(r"(\d+\.\d+) (0\.\d{4})", line)
            times[name][share] = float(time)
    return float(whole), float(part), times


def evopress_levels(text: str) -> dict[str, int]:
    """Layer -> level. EvoPress splits at the one colon."""
    pairs = [_matched(r"([^:\s]+): (-?\d+)", line) for line in _lines(text)]
    return {name: int(level) for name, level in pairs}


def evopress_depth(text: str) -> list[str]:
    """What goes, block by block."""
    assert set(_lines(text)) <= set(TOKENS)
    return _lines(text)


def mmrazor(text: str) -> dict[str, tuple[int, int]]:
    """Layer that names a unit -> channels that stay, of how many."""
    found = {}
    for key, keep in json.loads(text).items():
        name, end, of = _matched(r"(\S+)_\(0, (\d+)\)_(\d+)", key)
        assert end == of
        assert type(keep) is int, "a float would be a share"
        assert 0 < keep <= int(of)
        found[name] = (keep, int(of))
    return found


@dataclass(frozen=True)
class Schedule:
    """What Distiller does before the first epoch."""

    filters: dict[str, float]
    levels: dict[str, float]
    blocks: dict[str, tuple[float, tuple[int, int]]]
    leaders: dict[str, str]


def distiller(text: str) -> Schedule:
    """By weight without `module.` and `.weight`: the shares of filters, of weights and of blocks that go."""
    content = yaml.safe_load(text)
    assert set(content) == {"version", "pruners", "policies"}
    run = [each["pruner"]["instance_name"] for each in content["policies"]]
    assert run == list(content["pruners"]), "each pruner is run once, in its order"
    assert all(each["epochs"] == [0] and set(each) == {"pruner", "epochs"} for each in content["policies"])
    found = Schedule({}, {}, {}, {})
    for pruner in content["pruners"].values():
        _pruner(dict(pruner), found)
    return found


def _pruner(pruner: dict[str, Any], found: Schedule) -> None:
    kind = pruner.pop("class")
    if kind == "SparsityLevelParameterPruner":
        found.levels.update({_layer(name): share for name, share in pruner.pop("levels").items()})
        assert not pruner
        return
    assert kind in ("L1RankedStructureParameterPruner", "L2RankedStructureParameterPruner")
    group, share, names = pruner.pop("group_type"), pruner.pop("desired_sparsity"), pruner.pop("weights")
    layers = [_layer(name) for name in names]
    if group == "Filters":
        found.filters.update(dict.fromkeys(layers, share))
        assert pruner == ({"group_dependency": "Leader"} if len(layers) > 1 else {})
        found.leaders.update(dict.fromkeys(layers[1:], layers[0]))
        return
    assert group == "Blocks"
    rows, columns, *kernel = pruner.pop("kwargs")["block_shape"]
    assert kernel == [1, 1]
    assert not pruner
    found.blocks.update(dict.fromkeys(layers, (share, (rows, columns))))


def _layer(weight: str) -> str:
    return _matched(r"module\.(\S+)\.weight", weight)[0]


@dataclass(frozen=True)
class Prune:
    """What AMCT does to each layer."""

    ratios: dict[str, float]
    halved: tuple[str, ...]
    skipped: tuple[str, ...]


def amct(text: str) -> Prune:
    """Fields of `AMCTRetrainConfig`, as far as pruning goes."""
    content = _prototxt(text)
    assert set(content) <= {"prune_config", "regular_prune_skip_layers", "override_layer_configs"}
    (default,) = content["prune_config"]
    assert _strategy(default) in (0.3, "M4N2"), "an unknown default"
    ratios, halved = {}, []
    for override in content.get("override_layer_configs", []):
        (name,), (config,) = override["layer_name"], override["prune_config"]
        strategy = _strategy(config)
        if strategy == "M4N2":
            halved.append(name)
        else:
            ratios[name] = float(strategy)
    skipped = tuple(content.get("regular_prune_skip_layers", []))
    told = [*ratios, *halved, *skipped]
    assert len(set(told)) == len(told), "a layer is named twice"
    return Prune(ratios, tuple(halved), skipped)


def _strategy(config: dict[str, Any]) -> float | str:
    ((kind, (inner,)),) = config.items()
    if kind == "n_out_of_m_pruner":
        assert inner == {"l1_selective_prune": [{"n_out_of_m_type": ["M4N2"]}]}
        return "M4N2"
    assert kind == "filter_pruner"
    (algorithm,) = inner.pop("balanced_l2_norm_filter_prune")
    assert not inner
    assert algorithm.pop("ascend_optimized") == [False], "AMCT would round up to 16"
    (ratio,) = algorithm.pop("prune_ratio")
    assert not algorithm
    assert 0 < ratio < 1
    return float(ratio)


def _prototxt(text: str) -> dict[str, Any]:
    """Messages as mappings of a field to all its values."""
    stack: list[dict[str, Any]] = [{}]
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if stripped == "}":
            stack.pop()
        elif stripped.endswith("{"):
            inner: dict[str, Any] = {}
            stack[-1].setdefault(_matched(r"(\w+) \{", stripped)[0], []).append(inner)
            stack.append(inner)
        else:
            name, value = _matched(r'(\w+): ("[^"]+"|[\w.]+)', stripped)
            stack[-1].setdefault(name, []).append(_value(value))
    (content,) = stack
    return content


def _value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith('"'):
        return text[1:-1]
    return float(text) if text[0].isdigit() else text
