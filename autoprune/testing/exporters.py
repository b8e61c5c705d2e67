"""The contract of exporters, and the small policy that it is tried on."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from autoprune.core.policy import Policy, UnitDecision
from autoprune.core.surgery import Surgery
from autoprune.errors import PolicyError, TargetError
from autoprune.exporters.base import Exported, Exporter, Kept, LayerCut, Resolved, UnitCut

KEPT = (0, 2, 3, 5, 7)
"""Channels that stay of the example's eight."""
_DECISIONS = {
    "first": UnitDecision(kind="channels", method="l2", keep=len(KEPT), of=8),
    "second.weight": UnitDecision(kind="weights", method="magnitude", keep=72, of=144, pattern="50%"),
    "head.weight": UnitDecision(kind="weights", method="dense", keep=60, of=60, bits=8),
}


def example_resolved(*units: str) -> Resolved:
    """A network of two convolutions and a linear layer, laid under a policy of the named units; without names, of all.

    `first` keeps five of eight channels (so that `second` reads five), half of `second.weight` is zero, and
    `head.weight` is stored in 8 bits.
    """
    generator = torch.Generator().manual_seed(0)
    dense = _network(8)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    decisions = {name: decision for name, decision in _DECISIONS.items() if not units or name in units}
    kept = KEPT if "first" in decisions else tuple(range(8))
    model = _network(len(kept))
    model.load_state_dict(_cut(dense, kept, decisions))
    return Resolved(
        Policy(units=decisions, budget={"macs": "50%macs"}), "policy.yaml", _units(decisions),
        _layers(decisions), dense, model, torch.randn(1, 3, 5, 5, generator=generator), _surgery(decisions), (),
        _no_onnx,
    )  # fmt: skip


def _network(width: int) -> nn.Module:
    layers = {
        "first": nn.Conv2d(3, width, 3, padding=1, bias=False), "relu": nn.ReLU(),
        "second": nn.Conv2d(width, 2, 3, padding=1, bias=False), "flat": nn.Flatten(),
        "head": nn.Linear(50, 6, bias=False),
    }  # fmt: skip
    network = nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    return network.eval()


def _cut(dense: nn.Module, kept: tuple[int, ...], decisions: Mapping[str, UnitDecision]) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    state["first.weight"], second = state["first.weight"][list(kept)], state["second.weight"][:, list(kept)]
    if "second.weight" in decisions:
        second = second * (second.abs() > second.abs().median())
    if "head.weight" in decisions:
        scales = state["head.weight"].abs().amax(1, keepdim=True) / 127
        state["head.weight"] = torch.round(state["head.weight"] / scales) * scales
    return {**state, "second.weight": second}


def _units(decisions: Mapping[str, UnitDecision]) -> tuple[UnitCut, ...]:
    gone = tuple(channel for channel in range(8) if channel not in KEPT)
    cuts = {"first": UnitCut("first", _DECISIONS["first"], ("first", "second"), KEPT, {"first": gone})}
    return tuple(
        cuts.get(name, UnitCut(name, decision, (name.removesuffix(".weight"),))) for name, decision in decisions.items()
    )


def _layers(decisions: Mapping[str, UnitDecision]) -> dict[str, LayerCut]:
    cut = Kept(8, KEPT) if "first" in decisions else None
    return {
        "first": LayerCut("first", "Conv2d", (8, 3, 3, 3), 1, None, cut, gone=False),
        "second": LayerCut(
            "second", "Conv2d", (2, 8, 3, 3), 1, cut, None, gone=False, decision=decisions.get("second.weight")
        ),
        "head": LayerCut("head", "Linear", (6, 50), 1, None, None, gone=False, decision=decisions.get("head.weight")),
    }


def _surgery(decisions: Mapping[str, UnitDecision]) -> Surgery:
    return Surgery(slices={"first.weight": ((0, KEPT),), "second.weight": ((1, KEPT),)} if "first" in decisions else {})


def _no_onnx() -> bytes:
    raise TargetError("the example is not written as ONNX")


class ExporterContract:
    """What every exporter must do. A subclass gives `make`, and `example` where it takes other models than images'."""

    def make(self) -> Exporter:
        """A fresh exporter."""
        raise NotImplementedError("give make(), which returns the exporter to test")

    def example(self, *units: str) -> Resolved:
        """What is exported; see `example_resolved`."""
        return example_resolved(*units)

    def exported(self, *units: str) -> Exported | None:
        """What a fresh exporter makes of the example; None where the format has nothing for it."""
        try:
            return self.make().export(self.example(*units))
        except (PolicyError, TargetError):
            return None

    def test_describes_itself(self) -> None:
        """A name, and the packages and versions that it was tested with."""
        exporter = self.make()
        assert isinstance(exporter.name, str), "an exporter's name is a str"
        assert exporter.name, "an exporter's name is not empty"
        assert isinstance(exporter.tested, tuple), "`tested` is a tuple of texts such as 'torch-pruning 1.6.1'"
        assert exporter.tested, "say what it was tested with"
        assert all(" " in each for each in exporter.tested), f"a package and its version: {exporter.tested}"

    def test_writes_files_by_plain_names(self) -> None:
        """At least one file of bytes, for some part of the example; no name leads out of the folder."""
        made = [self.exported(), *(self.exported(unit) for unit in _DECISIONS)]
        found = [each for each in made if each is not None]
        assert found, "it wrote nothing for any unit of the example"
        for each in found:
            assert each.files, "an export has at least one file"
            for name, content in each.files.items():
                assert isinstance(content, bytes), f"{name} is {type(content).__name__}; expected bytes"
                assert name not in ("", ".", ".."), f"{name!r} is no file name"
                assert not set(name) & set("/\\:"), f"{name!r} is not a plain file name"

    def test_grades_every_aspect_once(self) -> None:
        """The report has one remark for each part of the policy, no more."""
        for units in ((), *((unit,) for unit in _DECISIONS)):
            exported = self.exported(*units)
            if exported is not None:
                told = [(remark.unit, remark.aspect) for remark in exported.fidelity.remarks]
                wanted = list(self.example(*units).aspects)
                assert sorted(told) == sorted(wanted), f"graded {sorted(told)}, the policy has {sorted(wanted)}"

    def test_the_same_policy_gives_the_same_bytes(self) -> None:
        """No time, no random number, no order of a set."""
        first, second = self.exported(), self.exported()
        assert first == second, "two exports of one policy differ"

    def test_the_policy_and_its_models_are_untouched(self) -> None:
        """Bit-identical afterwards."""
        given = self.example()
        before = [copy.deepcopy(model.state_dict()) for model in (given.dense, given.model)]
        try:
            self.make().export(given)
        except (PolicyError, TargetError):
            return
        for model, state in zip((given.dense, given.model), before, strict=True):
            same = all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
            assert same, "the exporter wrote to a model"
