"""Exporters for ModelOpt, NNCF and AIMET: what is written is what the cut model is. The tools run elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from typing import Any

import pytest
import torch
import yaml
from resolved_policies import resolved_case
from torch import nn

from autoprune.errors import PolicyError
from autoprune.exporters import masks
from autoprune.exporters.aimet import Aimet
from autoprune.exporters.base import Exported, Exporter, Resolved
from autoprune.exporters.modelopt import ModelOpt
from autoprune.exporters.nncf import Nncf


def content(exported: Exported, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(exported.files[name])
    return found


def state(exported: Exported) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(io.BytesIO(exported.files["state.pt"]), weights_only=True)
    return found


def levels(exported: Exported, aspect: str) -> dict[str, str]:
    return {each.unit: each.grade.level for each in exported.fidelity.remarks if each.aspect == aspect}


SLOW = pytest.mark.slow
"""Cases that take seconds to make."""


def evenly(keep: int, *, tokens: bool = True) -> Resolved:
    """The transformer of `vit` with the same number of features in both layers, and all heads; as if it read tokens."""
    laid = resolved_case("vit")
    units = [
        dataclasses.replace(unit, decision=unit.decision.model_copy(update={"keep": keep}))
        for unit in laid.units
        if unit.decision.kind == "ffn"
    ]
    dense = copy.deepcopy(laid.dense)
    if tokens:
        dense.add_module("tokens", nn.Embedding(8, 32))
    return dataclasses.replace(laid, units=tuple(units), dense=dense)


@pytest.mark.parametrize("exporter", [ModelOpt(), Nncf(), Aimet()])
@pytest.mark.parametrize("case", ["plain", pytest.param("mixed", marks=SLOW)])
def test_every_aspect_has_a_grade(exporter: Exporter, case: str) -> None:
    laid = resolved_case(case)
    exported = exporter.export(laid)
    assert [(each.unit, each.aspect) for each in exported.fidelity.remarks] == list(laid.aspects)
    about = content(exported, f"{exporter.name}.json")
    assert about["tested_with"] == ", ".join(exporter.tested)
    assert about["policy"] == "policy.yaml"


@pytest.mark.parametrize("case", ["plain", "vit", pytest.param("llm-channels", marks=SLOW)])
def test_modelopt_subnet_has_the_widths_of_the_cut_model(case: str) -> None:
    laid = resolved_case(case)
    written = content(ModelOpt().export(laid), "modelopt.json")
    cut, dense = laid.model.state_dict(), laid.dense.state_dict()
    changed = {name for name in cut if name.endswith(".weight") and cut[name].shape != dense[name].shape}
    rebuilt = set()
    for name in sorted(changed):
        layer, tensor = name.removesuffix(".weight"), dense[name]
        sides = [("out_channels", "out_features", "num_features"), ("in_channels", "in_features")]
        for dim, names in enumerate(sides):
            for side in names:
                if f"{layer}.{side}" in written["subnet"] and tensor.shape[dim] > 1:
                    kept = written["kept"][f"{layer}.{side}"]
                    assert written["subnet"][f"{layer}.{side}"] == len(kept)
                    tensor = tensor.index_select(dim, torch.tensor(kept))
        assert torch.equal(tensor, cut[name]), name
        rebuilt.add(name)
    assert rebuilt == changed


def test_modelopt_sets_the_heads_that_a_forward_reads() -> None:
    written = content(ModelOpt().export(resolved_case("vit")), "modelopt.json")
    assert written["numbers"] == {"layers.0.attention": {"heads": 2}, "layers.1.attention": {"heads": 2}}


@SLOW
def test_modelopt_takes_kernels_and_last_blocks() -> None:
    mixed = ModelOpt().export(resolved_case("mixed"))
    written = content(mixed, "modelopt.json")
    assert written["subnet"]["stem.0.kernel_size"] == [3, 3]
    assert written["fastnas"]["nn.Conv2d"]["stem.0"] == {"channel_divisor": 1, "kernel_size": [3]}
    assert written["subnet"]["layer1.depth"] == 1
    assert levels(mixed, "depth") == {"layer1.1": "exact"}
    assert set(levels(mixed, "rank").values()) == {"dropped"}
    assert "state.pt" not in mixed.files


@SLOW
def test_modelopt_drops_no_block_from_the_middle() -> None:
    laid = resolved_case("mended")
    units = tuple(
        dataclasses.replace(unit, name="layer2.0") if unit.decision.kind == "block" else unit for unit in laid.units
    )
    exported = ModelOpt().export(dataclasses.replace(laid, units=units))
    assert levels(exported, "depth") == {"layer2.0": "dropped"}
    assert "layer2.depth" not in content(exported, "modelopt.json")["subnet"]
    assert levels(exported, "weights") == {"model": "dropped"}


def test_minitron_gets_the_sizes_of_an_even_decoder() -> None:
    text = ModelOpt().export(evenly(48)).files["minitron.yaml"].decode()
    comments, _, rest = text.partition("export_config")
    assert all(line.startswith("# ") for line in comments.splitlines())
    assert yaml.safe_load("export_config" + rest) == {
        "export_config": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48}
    }
    assert "minitron.yaml" not in ModelOpt().export(evenly(48, tokens=False)).files  # no language model
    assert "minitron.yaml" not in ModelOpt().export(resolved_case("vit")).files  # its layers differ


@SLOW
def test_nncf_gets_the_zeros_of_every_layer() -> None:
    laid = resolved_case("zeros")
    exported = Nncf().export(laid)
    written, weights = content(exported, "nncf.json"), state(exported)
    assert written["mode"] == "UNSTRUCTURED_MAGNITUDE_LOCAL"
    assert list(written["sparsity"]) == [unit.layers[0] for unit in laid.units]
    for unit in laid.units:
        mask = laid.mask(unit.layers[0])
        assert written["sparsity"][unit.layers[0]] == pytest.approx(1 - unit.decision.keep / mask.numel())
        assert torch.equal(weights[unit.name] != 0, mask)
    assert written["ratio"] == min(written["sparsity"].values())
    assert set(levels(exported, "mask").values()) == {"exact"}


@pytest.mark.parametrize("case", ["plain", "vit", pytest.param("mended", marks=SLOW)])
def test_nncf_zeros_make_the_dense_model_the_cut_one(case: str) -> None:
    laid = resolved_case(case)
    exported = Nncf().export(laid)
    weights = state(exported)
    for layer, share in content(exported, "nncf.json")["sparsity"].items():
        mask = laid.mask(layer)
        assert share == pytest.approx(1 - int(mask.sum()) / mask.numel())
        assert not (weights[f"{layer}.weight"] * ~mask).any()
    with torch.no_grad():
        wanted = laid.model(laid.example)
        found = torch.func.functional_call(laid.dense, weights, (laid.example,))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert set(levels(exported, "width").values()) == {"approximated"}


@SLOW
def test_aimet_pairs_are_kept_shares_of_inputs() -> None:
    laid = resolved_case("channels")
    exported = Aimet().export(laid)
    cut = laid.model.state_dict()
    pairs = content(exported, "aimet.json")["pairs"]
    assert [pair["module"] for pair in pairs] == [
        f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in (0, 1)
    ]
    for pair in pairs:
        of, inputs = laid.layers[pair["module"]].shape[1], cut[f"{pair['module']}.weight"].shape[1]
        assert max(1, int(of * pair["comp_ratio"])) == inputs == len(pair["kept"])
        kept = laid.layers[pair["module"]].inputs
        assert kept is not None
        assert tuple(pair["kept"]) == kept.positions
    reasons = {each.grade.why for each in exported.fidelity.remarks if each.unit == "stem.0"}
    assert reasons == {"AIMET leaves channels whole that several layers make or read"}
    assert levels(exported, "channels")["layer1.0.conv1"] == "exact"


def test_aimet_goes_through_depthwise_convolutions() -> None:
    laid = resolved_case("plain")
    exported = Aimet().export(laid)
    pairs = content(exported, "aimet.json")["pairs"]
    assert [(pair["module"], pair["rows"] is None) for pair in pairs] == [("conv2", False), ("conv3", True)]
    for pair, unit in zip(pairs, laid.units, strict=False):
        assert tuple(pair["kept"]) == unit.kept
        assert int(unit.decision.of * pair["comp_ratio"]) == unit.decision.keep
    assert levels(exported, "channels") == {"conv1": "exact", "conv2": "exact", "conv3": "dropped", "fc1": "dropped"}


def test_aimet_ratio_survives_its_rounding_down() -> None:
    wrong = [(keep, of) for of in range(1, 400) for keep in range(1, of + 1) if int(of * masks.share(keep, of)) != keep]
    assert not wrong
    assert int(100 * 0.29) == 28  # what a plain share would do


@pytest.mark.parametrize(
    ("exporter", "case", "why"),
    [
        pytest.param(ModelOpt(), "zeros", "no layer is narrowed and no last block goes", marks=SLOW),
        pytest.param(Aimet(), "zeros", "no channels lie between just two convolutions", marks=SLOW),
        (Aimet(), "vit", "no channels lie between just two convolutions"),
    ],
)
def test_what_cannot_be_said_at_all_is_refused(exporter: Exporter, case: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        exporter.export(resolved_case(case))


def test_nncf_refuses_what_has_no_zeros() -> None:
    laid = resolved_case("plain")
    whole = {name: dataclasses.replace(layer, inputs=None, outputs=None) for name, layer in laid.layers.items()}
    untouched = dataclasses.replace(laid, units=(), layers=whole, model=laid.dense, surgery=type(laid.surgery)())
    with pytest.raises(PolicyError, match="no layer has zeros or fewer channels"):
        Nncf().export(untouched)
