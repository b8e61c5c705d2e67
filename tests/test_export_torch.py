"""What is written for torch's own pruning and for TensorFlow's, against the masks and the cut model."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from resolved_policies import resolved_case, subject_for
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

from autoprune.core.pattern import parse_pattern
from autoprune.errors import PolicyError
from autoprune.exporters.base import Exported, Exporter, Resolved
from autoprune.exporters.tfmot import TFMOT
from autoprune.exporters.torch_ao import TorchAO
from autoprune.exporters.torch_prune import TorchPrune
from autoprune.nest import first_tensor
from autoprune.testing.exporters import ExporterContract, example_resolved

torch.set_num_threads(1)

CASES = ["plain", "channels", "mended", "zeros", "mixed", "vit", "llm", "llm-channels"]


class TestTorchPruneContract(ExporterContract):
    def make(self) -> Exporter:
        return TorchPrune()


class TestTorchAOContract(ExporterContract):
    def make(self) -> Exporter:
        return TorchAO()


class TestTFMOTContract(ExporterContract):
    def make(self) -> Exporter:
        return TFMOT()


def tensors(exported: Exported, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(io.BytesIO(exported.files[name]), weights_only=True)
    return found


def loaded(exported: Exported, folder: Path) -> ModuleType:
    """The script of an export, beside its files."""
    for name, content in exported.files.items():
        (folder / name).write_bytes(content)
    spec = importlib.util.spec_from_file_location(f"load_{folder.name}", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def assert_does_what_the_cut_model_does(model: nn.Module, case: str) -> None:
    resolved, inputs = resolved_case(case), subject_for(case).task.data.validation_inputs[:4]
    with torch.no_grad():
        found, wanted = first_tensor(model(inputs)), first_tensor(resolved.model(inputs))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def dense(resolved: Resolved) -> nn.Module:
    return copy.deepcopy(resolved.dense).eval()


def weight_masks(resolved: Resolved) -> dict[str, Tensor]:
    """Of layers that have weights, what counts, where that is not all."""
    masks = {cut.weight: resolved.mask(cut.name) for cut in resolved.layers.values() if len(cut.shape) > 1}
    return {name: mask for name, mask in masks.items() if not mask.all()}


@pytest.mark.parametrize("case", CASES)
def test_masks_are_ours(case: str) -> None:
    resolved = resolved_case(case)
    masks = tensors(TorchPrune().export(resolved), "masks.pt")
    assert all(torch.equal(masks[name], mask) for name, mask in weight_masks(resolved).items())
    assert all(mask.dtype == torch.bool and not mask.all() for mask in masks.values())
    parameters = dict(resolved.dense.named_parameters())
    assert all(mask.shape == parameters[name].shape for name, mask in masks.items())


@pytest.mark.parametrize("case", ["plain", "channels", "mended", "zeros", "vit", "llm", "llm-channels"])
def test_the_masked_model_does_what_the_cut_one_does(case: str, tmp_path: Path) -> None:
    resolved = resolved_case(case)
    model = loaded(TorchPrune().export(resolved), tmp_path).prune_model(dense(resolved))
    assert_does_what_the_cut_model_does(model, case)


def test_masks_can_be_made_permanent(tmp_path: Path) -> None:
    resolved = resolved_case("channels")
    model = loaded(TorchPrune().export(resolved), tmp_path).prune_model(dense(resolved), permanent=True)
    assert set(model.state_dict()) == set(resolved.dense.state_dict())
    assert_does_what_the_cut_model_does(model, "channels")


@pytest.mark.parametrize("case", ["plain", "zeros", "mixed"])
def test_a_call_makes_its_mask(case: str) -> None:
    resolved = resolved_case(case)
    exported, model = TorchPrune().export(resolved), dense(resolved)
    masks, methods = tensors(exported, "masks.pt"), set()
    for call in yaml.safe_load(exported.files["prune.yaml"]):
        module, name, method = model.get_submodule(call["module"]), call["name"], call.pop("method")
        methods.add(method)
        wanted = masks[f"{call['module']}.{name}"]
        if method == "custom":
            assert call["amount"] == int((~wanted).sum())
            continue
        module.weight.data = module.weight.data.contiguous()
        options = {key: value for key, value in call.items() if key not in ("module", "name")}
        getattr(prune, method)(module, name, **options)
        assert torch.equal(module.get_buffer(f"{name}_mask").bool(), wanted)
    assert methods > {"custom"}


@pytest.mark.parametrize("case", ["plain", "channels", "zeros", "vit", "llm", "llm-channels"])
def test_the_sparsifier_is_prepared_with_our_masks(case: str, tmp_path: Path) -> None:
    resolved = resolved_case(case)
    model = dense(resolved)
    sparsifier = loaded(TorchAO().export(resolved), tmp_path).prepare(model)
    for name, mask in weight_masks(resolved).items():
        made = model.get_submodule(name.removesuffix(".weight")).parametrizations["weight"][0].mask
        assert torch.equal(made, mask)
    assert_does_what_the_cut_model_does(model, case)
    sparsifier.squash_mask()
    assert set(model.state_dict()) == set(resolved.dense.state_dict())
    assert_does_what_the_cut_model_does(model, case)


@pytest.mark.parametrize(("pattern", "rows", "columns"), [("4x1 50%", 4, 1), ("2x3 50%", 2, 3), ("1x4 50%", 1, 4)])
def test_a_step_of_the_sparsifier_makes_our_blocks(pattern: str, rows: int, columns: int) -> None:
    entry = entry_of(pattern)
    assert entry["sparse_block_shape"] == [rows, columns]
    mask = step(entry)
    blocks = mask.reshape(12 // rows, rows, 24 // columns, columns)
    assert torch.equal(blocks.amax((1, 3)), blocks.amin((1, 3)))
    assert float(mask.float().mean()) == 0.5


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 2), ("1:4", 1), ("3:4", 3)])
def test_a_step_of_the_sparsifier_keeps_n_of_m_inputs(pattern: str, kept: int) -> None:
    mask = step(entry_of(pattern))
    assert torch.equal(mask.reshape(12, 6, 4).sum(2), torch.full((12, 6), kept))


def entry_of(pattern: str) -> dict[str, Any]:
    """What is written for a linear layer of 12 outputs and 24 inputs, half of which is zero."""
    resolved = example_resolved("second.weight")
    decision = resolved.layers["second"].decision
    assert decision is not None
    linear = nn.Linear(24, 12, bias=False)
    with torch.no_grad():
        linear.weight[::2] = 0
    model = nn.Sequential()
    model.add_module("second", linear)
    changed = decision.model_copy(update={"pattern": parse_pattern(pattern).text})
    cut = linear_of(resolved, model, changed)
    (entry,) = json.loads(TorchAO().export(cut).files["sparsity.json"])["config"]
    found: dict[str, Any] = entry
    return found


def step(entry: dict[str, Any]) -> Tensor:
    """The mask that the sparsifier makes itself."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("second", nn.Linear(24, 12, bias=False))
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model, [entry])
    sparsifier.step()
    mask: Tensor = model.get_submodule("second").parametrizations["weight"][0].mask.bool()
    return mask


def linear_of(resolved: Resolved, model: nn.Module, decision: Any) -> Resolved:
    cut = dataclasses.replace(resolved.layers["second"], kind="Linear", shape=(12, 24), inputs=None, decision=decision)
    units = (dataclasses.replace(resolved.units[0], decision=decision),)
    return dataclasses.replace(resolved, dense=model, model=model, layers={"second": cut}, units=units)


def test_tfmot_is_told_the_sparsity_of_each_layer() -> None:
    resolved = resolved_case("zeros")
    said = json.loads(TFMOT().export(resolved).files["sparsity.json"])["layers"]
    assert set(said) == {unit.layers[0] for unit in resolved.units}
    for layer, arguments in said.items():
        mask = resolved.mask(layer)
        assert arguments["sparsity"] == pytest.approx(int((~mask).sum()) / mask.numel(), abs=1e-12)
    halves = {unit.layers[0] for unit in resolved.units if unit.decision.pattern == "2:4"}
    assert {layer for layer, arguments in said.items() if "sparsity_m_by_n" in arguments} == halves
    assert all(said[layer]["sparsity_m_by_n"] == [2, 4] for layer in halves)


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("1:4", {"sparsity": 0.75, "sparsity_m_by_n": [3, 4]}),
        ("4x1 50%", {"sparsity": 0.5, "block_size": [1, 4]}),
        ("2x3 50%", {"sparsity": 0.5, "block_size": [3, 2]}),
    ],
)
def test_tfmot_has_inputs_before_outputs_and_counts_zeros(pattern: str, arguments: dict[str, object]) -> None:
    resolved = example_resolved("second.weight")
    decision = resolved.units[0].decision.model_copy(update={"pattern": pattern})
    model = nn.Sequential()
    model.add_module("second", nn.Linear(24, 12, bias=False))
    laid = linear_of(resolved, model, decision)
    assert json.loads(TFMOT().export(laid).files["sparsity.json"])["layers"]["second"] == arguments


@pytest.mark.parametrize("exporter", [TorchPrune(), TorchAO(), TFMOT()], ids=lambda each: each.name)
@pytest.mark.parametrize("case", CASES)
def test_every_aspect_has_a_grade(exporter: Exporter, case: str) -> None:
    resolved = resolved_case(case)
    if exporter.name == "tfmot" and not any(unit.decision.pattern for unit in resolved.units):
        with pytest.raises(PolicyError, match=r"policy\.yaml: has no zeros inside layers"):
            exporter.export(resolved)
        return
    exported = exporter.export(resolved)
    assert tuple((remark.unit, remark.aspect) for remark in exported.fidelity.remarks) == resolved.aspects


@pytest.mark.parametrize("exporter", [TorchPrune(), TorchAO(), TFMOT()], ids=lambda each: each.name)
def test_bits_alone_are_refused(exporter: Exporter) -> None:
    with pytest.raises(PolicyError, match=r"policy\.yaml: "):
        exporter.export(example_resolved("head.weight"))
