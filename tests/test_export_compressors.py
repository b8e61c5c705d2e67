"""What is written for llm-compressor, Neural Compressor and NNI, against the masks and the cut model."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
import torch
import yaml
from resolved_policies import resolved_case
from torch import Tensor

from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Exported, Exporter, Resolved
from autoprune.exporters.llm_compressor import LLMCompressor
from autoprune.exporters.masks import share
from autoprune.exporters.neural_compressor import NeuralCompressor
from autoprune.exporters.nni import NNI, NNI2

EXPORTERS = (LLMCompressor(), NeuralCompressor(), NNI(), NNI2())


def content(exported: Exported, name: str) -> Any:
    return json.loads(exported.files[name])


def tensors(exported: Exported, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(io.BytesIO(exported.files[name]), weights_only=True)
    return found


def width_of(resolved: Resolved, layer: str) -> int:
    return len(resolved.model.state_dict()[f"{layer}.weight"])


@pytest.mark.parametrize("exporter", EXPORTERS, ids=lambda each: each.name)
@pytest.mark.parametrize("case", ["zeros", "mixed"])
def test_every_aspect_has_a_grade_and_every_file_its_origin(exporter: Exporter, case: str) -> None:
    resolved = resolved_case(case)
    exported = exporter.export(resolved)
    assert tuple((remark.unit, remark.aspect) for remark in exported.fidelity.remarks) == resolved.aspects
    assert not any("the format has nothing" in remark.grade.why for remark in exported.fidelity.remarks) or (
        exporter.name == "llm-compressor"
    )
    texts = [data.decode() for name, data in exported.files.items() if name.endswith((".json", ".yaml"))]
    assert all("autoprune" in text and exporter.tested[0] in text for text in texts)


def test_a_share_gives_back_how_many_it_stands_for() -> None:
    assert all(int(share(removed, of) * of) == removed for of in (3, 16, 49, 1200, 20736) for removed in range(of))


def test_nni_groups_have_the_cut_models_widths() -> None:
    resolved = resolved_case("channels")
    exported = NNI().export(resolved)
    written = content(exported, "config_list.json")
    assert written["cut"]
    groups = [entry for entry in written["config_list"] if entry["granularity"] == "out_channel"]
    assert len({entry["dependency_group_id"] for entry in groups}) == len(groups) == 10
    for entry in groups:
        for name in entry["op_names"]:
            of = resolved.layers[name].shape[0]
            assert of - int(entry["sparse_ratio"] * of) == width_of(resolved, name), name
    assert ["stem.0", "layer1.0.conv2", "layer1.1.conv2"] in [entry["op_names"] for entry in groups]
    assert {remark.grade for remark in exported.fidelity.remarks} == {EXACT}


@pytest.mark.parametrize("exporter", [NeuralCompressor(), NNI(), NNI2()], ids=lambda each: each.name)
def test_masks_are_the_policys_own(exporter: Exporter) -> None:
    resolved = resolved_case("mixed")
    found = tensors(exporter.export(resolved), "masks.pt")
    for name, layer in resolved.layers.items():
        wanted = resolved.mask(name)
        if len(layer.shape) > 1 and not wanted.all() and not layer.gone:
            assert torch.equal(found.pop(f"{name}.weight"), wanted), name
    assert all(not mask.any() for name, mask in found.items() if name.startswith("layer1.1."))
    assert any(name.startswith("layer1.1.") for name in found) == (exporter.name == "nni")


def test_nni_says_blocks_and_n_of_m_where_it_can() -> None:
    resolved = resolved_case("llm")
    entries = {
        entry["op_names"][0]: entry for entry in content(NNI().export(resolved), "config_list.json")["config_list"]
    }
    gate = entries["model.layers.0.mlp.gate_proj"]  # 2:4
    assert (gate["sparse_ratio"], gate["internal_metric_block"] * 4) == (0.5, 128 * 64)
    zeros = {
        entry["op_names"][0]: entry
        for entry in content(NNI().export(resolved_case("zeros")), "config_list.json")["config_list"]
    }
    assert zeros["layer1.0.conv2"]["granularity"] == [4, 1, 1, 1]
    assert "internal_metric_block" not in zeros["layer1.0.conv1"]  # 2:4 of a 3x3 kernel: inputs do not lie in a row
    assert zeros["layer1.0.conv1"]["sparse_ratio"] == 0.5


def test_nni_2_leaves_depthwise_layers_to_its_speedup() -> None:
    written = content(NNI2().export(resolved_case("plain")), "config_list.json")
    names = [name for entry in written["l1_norm"] for name in entry["op_names"]]
    assert "conv1" in names
    assert "depthwise" not in names


def test_neural_compressors_patterns_remove_what_ours_do() -> None:
    resolved = resolved_case("zeros")
    entries = {
        re.sub(r"\\", "", entry["op_names"][0][1:-1]): entry
        for entry in content(NeuralCompressor().export(resolved), "pruning.json")["pruning_configs"]
    }
    assert {name: entry["pattern"] for name, entry in entries.items() if name.startswith("layer1")} == {
        "layer1.0.conv1": "2:4", "layer1.0.conv2": "4x1", "layer1.1.conv1": "1x1", "layer1.1.conv2": "1x1",
    }  # fmt: skip
    for name, entry in entries.items():
        sparsity = 1 - resolved.mask(name).float().mean().item()
        assert entry["target_sparsity"] == pytest.approx(sparsity, abs=1e-6)
        assert entry["target_sparsity"] <= entry["max_sparsity_ratio_per_op"] < 1
        assert entry["pruning_scope"] == "local"
    assert re.search(entries["fc1"]["op_names"][0], "fc1")
    assert not re.search(entries["fc1"]["op_names"][0], "afc12")


def test_neural_compressors_outputs_are_blocks_of_one_row() -> None:
    resolved = resolved_case("channels")
    for entry in content(NeuralCompressor().export(resolved), "pruning.json")["pruning_configs"]:
        for pattern in entry["op_names"]:
            name = pattern[1:-1].replace("\\", "")
            shape = resolved.layers[name].shape
            assert entry["pattern"] == f"1x{torch.Size(shape).numel() // shape[0]}"
            assert shape[0] - int(entry["target_sparsity"] * shape[0]) == width_of(resolved, name)


def test_the_recipe_has_one_sparsity_a_layer_in_the_models_order() -> None:
    resolved = resolved_case("llm")
    text = LLMCompressor().export(resolved).files["recipe.yaml"].decode()
    groups = yaml.safe_load(text)["autoprune_stage"]
    order = list(resolved.layers)
    seen = []
    for group in groups.values():
        ((modifier, written),) = group.items()
        targets, sparsity = written["targets"], written["sparsity"]
        assert targets == sorted(targets, key=order.index)
        shares = sparsity if isinstance(sparsity, list) else [sparsity] * len(targets)
        assert len(shares) == len(targets)
        for name, asked in zip(targets, shares, strict=True):
            decision = resolved.policy.units[f"{name}.weight"]
            assert modifier == {"wanda": "WandaPruningModifier", "sparsegpt": "SparseGPTModifier"}[decision.method]
            assert written["mask_structure"] == ("2:4" if decision.pattern == "2:4" else "0:0")
            rows, columns = resolved.layers[name].shape
            zeros = int((~resolved.mask(name)).sum())
            more = 1 if decision.method == "sparsegpt" else 0  # it takes one more than it is asked for
            if decision.pattern == "2:4":
                assert asked == 0.5
            elif more:
                assert int(asked * rows * columns) + 1 == zeros
            else:
                assert int(asked * columns) * rows == zeros
        seen += targets
    assert sorted(seen) == sorted(name.removesuffix(".weight") for name in resolved.policy.units)


def test_the_recipe_stores_integers_by_channel() -> None:
    text = LLMCompressor().export(resolved_case("mixed")).files["recipe.yaml"].decode()
    groups = yaml.safe_load(text)["autoprune_stage"]["quantise_modifiers"]["QuantizationModifier"]["config_groups"]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    assert groups == {"int4": {"targets": ["fc1"], "weights": weights}}


def test_a_policy_that_cannot_be_said_is_refused() -> None:
    with pytest.raises(PolicyError, match="zeros or integers in linear layers"):
        LLMCompressor().export(resolved_case("llm-channels"))


def test_a_recipe_is_written_so() -> None:
    text = LLMCompressor().export(resolved_case("mixed")).files["recipe.yaml"].decode()
    assert re.sub("autoprune [0-9.a-z]+", "autoprune X", text) == GOLDEN


GOLDEN = """\
# written by: autoprune X
# policy: policy.yaml
# tested with: llmcompressor 0.14.0.1
autoprune_stage:
  wanda_2_4_modifiers:
    WandaPruningModifier:
      sparsity: 0.5
      mask_structure: '2:4'
      targets: [fc1]
  sparsegpt_any_modifiers:
    SparseGPTModifier:
      sparsity: [0.4984375]
      mask_structure: 0:0
      targets: [fc2]
  quantise_modifiers:
    QuantizationModifier:
      config_groups:
        int4:
          targets: [fc1]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: channel}
"""
