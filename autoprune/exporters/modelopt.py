"""NVIDIA ModelOpt: the subnet that FastNAS selects, and Minitron's export_config for a decoder that is cut evenly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, final

from torch import nn

from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, LayerCut, Resolved, UnitCut, dropped, final_weights
from autoprune.exporters.loaders import loader
from autoprune.exporters.texts import about, comment, json_bytes, state_bytes, yaml_bytes

CONVOLUTIONS: Final = tuple(f"nn.{name}{n}d" for name in ("Conv", "ConvTranspose") for n in (1, 2, 3))
OTHERS: Final = (
    "nn.Linear", "nn.LayerNorm", "nn.SyncBatchNorm", *(f"nn.{name}{n}d" for name in ("BatchNorm", "InstanceNorm")
                                                      for n in (1, 2, 3)),
)  # fmt: skip
INSIDE: Final = dropped("a subnet holds sizes of layers, and nothing of their weights")


@final
class ModelOpt:
    """`modelopt.json`: FastNAS's config without its divisor of 32, the `subnet` for `select`, and which channels stay.

    Which channels a FastNAS subnet keeps is the order of its hyperparameters, by default that of the consumers' norms;
    `load.py` sets the order, so that ours stay. Minitron's `export_config` for Megatron models has no such place.
    """

    __slots__ = ()

    name: str = "modelopt"
    tested: tuple[str, ...] = ("nvidia-modelopt 0.47.0",)

    def export(self, resolved: Resolved) -> Exported:
        """Widths, channels and kernels exactly, blocks at the end of a Sequential; nothing inside layers."""
        out, depths = _left_out(resolved), _depths(resolved)
        kept = {name: where for name, where in _kept(resolved, out) if not _goes(resolved, name, depths)}
        kernels = {layer.name: layer.kernel for layer in resolved.layers.values() if layer.kernel and not layer.gone}
        subnet: dict[str, object] = {name: len(positions) for name, positions in kept.items()}
        subnet |= {f"{name}.kernel_size": _taps(resolved.layers[name]) for name in kernels}
        subnet |= {f"{name}.depth": depth for name, depth in depths.items()}
        if not subnet:
            raise PolicyError(f"{resolved.title}: no layer is narrowed and no last block goes; ModelOpt selects sizes")
        fits = resolved.says_only("width", "channels", "kernel", "depth", "weights")
        own = {unit.name: _own(resolved, unit, out, depths) for unit in resolved.units}
        whole = fits and not any(grade.level == "dropped" for grades in own.values() for grade in grades.values())
        content = {
            **about(resolved, self.tested), "fastnas": _config(resolved, kernels), "subnet": subnet, "kept": kept,
            "numbers": _numbers(resolved, out),
        }  # fmt: skip
        files = {"modelopt.json": json_bytes(content), "load.py": loader("modelopt")}
        if whole and resolved.mended:
            files["state.pt"] = state_bytes(resolved.model.state_dict())
        if sizes := export_config(resolved):
            head = comment(resolved, self.tested) + MINITRON
            files["minitron.yaml"] = yaml_bytes({"export_config": sizes}, head=head)
        grades: dict[Aspect, Grade] = {
            "width": EXACT, "channels": EXACT, "kernel": EXACT, "weights": final_weights(whole=whole),
            "sparsity": INSIDE, "mask": INSIDE, "bits": INSIDE, "arithmetic": INSIDE, "rank": INSIDE,
        }  # fmt: skip
        return Exported(files, resolved.graded(grades, units=own))


def _config(resolved: Resolved, kernels: Mapping[str, int]) -> dict[str, object]:
    """What `mtn.convert` is told: any number of channels, and the kernels that are wanted."""
    free: dict[str, object] = {kind: {"channel_divisor": 1} for kind in (*CONVOLUTIONS, "nn.GroupNorm")}
    free |= {kind: {"feature_divisor": 1} for kind in OTHERS}
    for kind in {resolved.layers[name].kind for name in kernels}:
        each = {name: side for name, side in kernels.items() if resolved.layers[name].kind == kind}
        chosen = {name: {"channel_divisor": 1, "kernel_size": [side]} for name, side in each.items()}
        free[f"nn.{kind}"] = {"*": {"channel_divisor": 1}, **chosen}
    return {**free, "nn.Sequential": {"min_depth": 0}}


def _numbers(resolved: Resolved, out: set[str]) -> dict[str, dict[str, int]]:
    """Integers that a module's forward reads, such as how many heads it has: of what is narrowed."""
    left = [unit for unit in resolved.units if unit.name in out]
    return {
        name: dict(numbers)
        for name, numbers in resolved.surgery.numbers.items()
        if not any(_touches(unit, name) for unit in left)
    }


def _taps(layer: LayerCut) -> list[int]:
    return [layer.kernel or 1] * len(layer.shape[2:])


def _sides(layer: LayerCut) -> tuple[str, str]:
    """What ModelOpt calls a layer's inputs and outputs."""
    if len(layer.shape) == 1:
        return "num_features", "num_features"
    return ("in_features", "out_features") if layer.kind == "Linear" else ("in_channels", "out_channels")


def _owners(resolved: Resolved, layer: LayerCut) -> tuple[list[UnitCut], list[UnitCut]]:
    """The units that a layer's inputs and outputs are narrowed with."""
    touching = [unit for unit in resolved.units if unit.narrows and layer.name in unit.layers]
    if len(layer.shape) == 1 or layer.is_depthwise:
        return touching, touching
    made = [unit for unit in touching if layer.name in (unit.producers or {})]
    read = [unit for unit in touching if unit not in made]
    return read or (made if layer.inputs is not None else []), made


def _left_out(resolved: Resolved) -> set[str]:
    """Narrowed units that ModelOpt's layers cannot follow, and those that share a side of a layer with such a unit."""
    grouped = {layer.name for layer in resolved.layers.values() if layer.groups > 1 and not layer.is_depthwise}
    opaque = [*resolved.surgery.plain, *(name.rpartition(".")[0] for name in resolved.surgery.slices)]
    opaque = [name for name in opaque if name not in resolved.layers]
    out = {
        unit.name
        for unit in resolved.units
        if unit.narrows and (grouped & set(unit.layers) or any(_within(each, opaque) for each in unit.layers))
    }
    sides = [{unit.name for unit in side} for layer in resolved.layers.values() for side in _owners(resolved, layer)]
    modules = resolved.surgery.numbers  # whose numbers hold for all that is in them, or for none
    sides += [{unit.name for unit in resolved.units if unit.narrows and _touches(unit, name)} for name in modules]
    while more := {name for side in sides if side & out for name in side} - out:
        out |= more
    return out


def _touches(unit: UnitCut, module: str) -> bool:
    return any(_within(layer, [module]) for layer in unit.layers)


def _within(layer: str, modules: list[str]) -> bool:
    return any(not name or layer == name or layer.startswith(f"{name}.") for name in modules)


def _kept(resolved: Resolved, out: set[str]) -> Iterator[tuple[str, list[int]]]:
    """What stays of each side of each layer, as ModelOpt calls it, without what belongs to the units `out`."""
    for layer in resolved.layers.values():
        cuts = (layer.outputs if layer.is_depthwise else layer.inputs, layer.outputs)
        for name, cut, units in zip(_sides(layer), cuts, _owners(resolved, layer), strict=True):
            if not units or out & {unit.name for unit in units}:
                continue
            if cut is not None:
                yield f"{layer.name}.{name}", list(cut.positions)
            elif layer.gone:  # of a block that ModelOpt does not drop: it stays, but in a narrower stream
                yield f"{layer.name}.{name}", list(units[0].kept)


def _depths(resolved: Resolved) -> dict[str, int]:
    """How many children stay of each Sequential that loses blocks off its end, and nothing but their sum goes with it.

    ModelOpt's depth drops the last children alone. What it leaves out is the whole block, so that a block ending in an
    activation is only taken off behind one of its own class, which ends in the same.
    """
    gone = {unit.name for unit in resolved.units if unit.decision.kind == "block"}
    found: dict[str, int] = {}
    for name, module in resolved.dense.named_modules():
        if (
            not name
            or type(module) is not nn.Sequential
            or not all(key.isdigit() for key, _ in module.named_children())
        ):
            continue
        children = list(module.named_children())
        depth = len(children)
        while depth > 1 and f"{name}.{children[depth - 1][0]}" in gone:
            depth -= 1
        ends = [resolved.surgery.dropped.get(f"{name}.{child}", ("", None)) for child, _ in children[depth:]]
        alike = all(type(child) is type(children[depth - 1][1]) for _, child in children[depth:])
        if ends and all(end == ("identity", None) or (end == ("relu", None) and alike) for end in ends):
            found[name] = depth
    return found


def _goes(resolved: Resolved, name: str, depths: Mapping[str, int]) -> bool:
    """Whether a block, or what is in it, is among the last children of a Sequential that are taken off."""
    for parent, depth in depths.items():
        children = [child for child, _ in resolved.dense.get_submodule(parent).named_children()]
        if _within(name, [f"{parent}.{child}" for child in children[depth:]]):
            return True
    return False


def _own(resolved: Resolved, unit: UnitCut, out: set[str], depths: Mapping[str, int]) -> dict[Aspect, Grade]:
    """Grades that a unit has for itself."""
    if unit.name in out:
        why = dropped("ModelOpt has no layers for it: a grouped convolution, or attention that is one module")
        return {"width": why, "channels": why}
    if unit.decision.kind == "block":
        why = dropped("ModelOpt's depth takes blocks off the end of a Sequential alone")
        return {"depth": EXACT if _goes(resolved, unit.name, depths) else why}
    return {}


MINITRON: Final = """# constraints of mtp.prune(model, mode="mcore_minitron", ...) for this decoder in Megatron core;
# which features and heads stay is Minitron's own choice, by activations
"""


def export_config(resolved: Resolved) -> dict[str, int]:
    """Minitron's `export_config` of a language model whose decoder layers are all narrowed to the same; else empty."""
    modules = list(resolved.dense.named_modules())
    if not any(isinstance(module, nn.Embedding) for _, module in modules):
        return {}
    for name, module in modules:
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            layers = [f"{name}.{child}" for child, _ in module.named_children()]
            if sizes := _even(resolved, layers):
                return sizes
    return {}


def _even(resolved: Resolved, layers: list[str]) -> dict[str, int]:
    narrowed = [unit for unit in resolved.units if unit.narrows and any(_within(unit.name, [each]) for each in layers)]
    if any(unit.decision.kind == "block" for unit in resolved.units):
        return {}
    sizes: dict[str, int] = {}
    for kind, key in (("ffn", "ffn_hidden_size"), ("heads", "num_attention_heads")):
        units = [unit for unit in narrowed if unit.decision.kind == kind]
        decisions: set[tuple[int, int]] = {(unit.decision.keep, unit.decision.of) for unit in units}
        once = all(len([unit for unit in units if _within(unit.name, [each])]) == 1 for each in layers)
        if units and not (once and len(decisions) == 1 and all(_alike(resolved, unit) for unit in units)):
            return {}
        if units:
            sizes[key] = units[0].decision.keep
            hidden = {resolved.layers[name].shape[1] for name in (units[0].producers or {})}
            sizes["hidden_size"] = max(hidden)
    return {"num_layers": len(layers), **dict(sorted(sizes.items(), reverse=True))} if sizes else {}


def _alike(resolved: Resolved, unit: UnitCut) -> bool:
    """Whether all producers have as many outputs: not so where queries share keys and values, which Minitron keeps."""
    return len({resolved.layers[name].shape[0] for name in (unit.producers or {})}) == 1
