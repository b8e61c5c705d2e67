"""Recurrent networks: their widths as units, cut against masks made by hand, for every kind, layer and direction."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from networks import randomised
from test_plain import kept_of
from torch import Tensor, nn

from autoprune.bank.build import CalibrationData, observe, rank
from autoprune.bank.calibrate import CalibrationSettings
from autoprune.errors import ModelError
from autoprune.model.cut import cut, plan_cut
from autoprune.model.discover import discover
from autoprune.model.plain import plain_copy
from autoprune.progress import Silent
from autoprune.runtimes.onnxruntime import export

torch.set_num_threads(1)
KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
WIDTH = 8
EXAMPLE = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))


class Sequences(nn.Module):
    """Features, a recurrent module, and a head on its outputs or on its last states."""

    def __init__(self, kind: str, *, reads: str = "outputs", start: str = "", **given: object) -> None:
        super().__init__()
        self.stem, self.reads, self.start = nn.Linear(6, 5), reads, start
        self.rnn = KINDS[kind](5, WIDTH, **given)  # type: ignore[arg-type]
        self.directions = 2 if self.rnn.bidirectional else 1
        self.head = nn.Linear(self.directions * WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) if self.rnn.batch_first else self.stem(x).transpose(0, 1)
        given = None
        if self.start == "zeros":
            given = torch.zeros(self.directions * self.rnn.num_layers, x.shape[0 if self.rnn.batch_first else 1], WIDTH)
        outputs, states = self.rnn(x) if given is None else self.rnn(x, given)
        if self.reads == "outputs":
            return self.head(outputs if self.rnn.batch_first else outputs.transpose(0, 1)).mean(1)
        last = states[0] if isinstance(states, tuple) else states
        return self.head(torch.cat(tuple(last[-self.directions :]), 1))


def zeroed(model: nn.Module, gone: dict[str, list[int]]) -> nn.Module:
    """A copy in which nothing reads the channels `gone` of `rnn`, or of its parts by layer and direction."""
    copied = copy.deepcopy(model)
    rnn, head = copied.get_submodule("rnn"), copied.get_submodule("head")
    is_apart = not isinstance(rnn, nn.RNNBase)
    count, directions = rnn.num_layers, copied.directions
    with torch.no_grad():
        for layer in range(count):
            for side, direction in enumerate(("", "_reverse")[:directions]):
                name = f"l{layer}{direction}"
                lost = gone.get(f"rnn.{name}" if is_apart else "rnn", [])
                shifted = [side * WIDTH + place for place in lost]
                own, key = (rnn.get_submodule(name), "l0") if is_apart else (rnn, name)
                getattr(own, f"weight_hh_{key}")[:, lost] = 0
                if layer == count - 1:
                    head.weight[:, shifted] = 0
                    continue
                for above in ("", "_reverse")[:directions]:
                    reader = f"l{layer + 1}{above}"
                    own, key = (rnn.get_submodule(reader), "l0") if is_apart else (rnn, reader)
                    getattr(own, f"weight_ih_{key}")[:, shifted] = 0
    return copied


def assert_cuts_equal_zeros(model: nn.Module, units: dict[str, int]) -> None:
    anatomy = discover(model, EXAMPLE, blocks=False)
    assert {group.root: group.width for group in anatomy.groups} == {"stem": 5, **units}
    for seed in range(3):
        kept = {root: places for root, places in kept_of(anatomy, seed).items() if root != "stem"}
        smaller = cut(model, plan_cut(anatomy.widths, anatomy.groups, kept=kept, dropped=()))
        gone = {root: sorted(set(range(WIDTH)) - set(places.tolist())) for root, places in kept.items()}
        with torch.no_grad():
            found, wanted = smaller(EXAMPLE), zeroed(model, gone)(EXAMPLE)
        assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-5)
    session = onnxruntime.InferenceSession(export(smaller, EXAMPLE), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {session.get_inputs()[0].name: EXAMPLE.numpy()})
    assert np.allclose(made, found.numpy(), atol=1e-5, rtol=1e-5)


FORMS = {
    "one layer": {"batch_first": True},
    "positions first": {"bias": False},
    "two layers": {"batch_first": True, "num_layers": 2},
    "two directions": {"batch_first": True, "num_layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_has_one_width(kind: str, form: str) -> None:
    """As it is: torch has one for all layers and directions."""
    assert_cuts_equal_zeros(randomised(Sequences(kind, **FORMS[form])), {"rnn": WIDTH})


@pytest.mark.parametrize("form", ["one layer", "two directions"])
@pytest.mark.parametrize("kind", KINDS)
def test_last_states_may_be_read(kind: str, form: str) -> None:
    model = randomised(Sequences(kind, reads="states", **FORMS[form]))
    plain = plain_copy(model, EXAMPLE)
    assert plain.kinds == {}
    assert_cuts_equal_zeros(plain.model, {"rnn": WIDTH})


@pytest.mark.parametrize("form", ["two layers", "two directions"])
@pytest.mark.parametrize("kind", KINDS)
def test_apart_each_layer_and_direction_has_its_own(kind: str, form: str) -> None:
    model = randomised(Sequences(kind, **FORMS[form]))
    plain = plain_copy(model, EXAMPLE)
    assert plain.kinds == {"rnn": ("recurrent",)}
    with torch.no_grad():
        assert torch.allclose(plain.model(EXAMPLE), model(EXAMPLE), atol=1e-6)
    directions = ("", "_reverse") if form == "two directions" else ("",)
    assert_cuts_equal_zeros(plain.model, {f"rnn.l{i}{d}": WIDTH for i in range(2) for d in directions})


def test_a_state_that_is_handed_in_keeps_the_width() -> None:
    anatomy = discover(randomised(Sequences("GRU", start="zeros")), EXAMPLE, blocks=False)
    assert {entry.root: entry.reason for entry in anatomy.refused}["rnn"] == (
        "zeros in the model itself makes it of a fixed size"
    )


def test_a_state_that_is_learned_is_cut_along() -> None:
    class Learned(Sequences):
        def __init__(self) -> None:
            super().__init__("GRU", batch_first=True)
            self.first = nn.Parameter(torch.randn(1, 1, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.stem(x), self.first.expand(-1, len(x), -1).contiguous())[0]).mean(1)

    model = randomised(Learned())
    assert_cuts_equal_zeros(model, {"rnn": WIDTH})
    anatomy = discover(model, EXAMPLE, blocks=False)
    assert "first" in {slab.parameter for slab in anatomy.group("rnn").slabs}


def test_projected_states_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LSTM(5, 8, proj_size=3))
    with pytest.raises(ModelError, match=r"1 projects its state \(proj_size\)"):
        discover(model, EXAMPLE, blocks=False)


def test_computed_weights_are_refused_by_name() -> None:
    with torch.no_grad():
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    anatomy = discover(model, EXAMPLE[0], blocks=False)
    assert [group.root for group in anatomy.groups] == ["2"]
    refused = {entry.root: entry.reason for entry in anatomy.refused}
    assert refused["0"] == "its weight is computed in every forward pass from other parameters"


def test_units_are_ranked_by_what_is_known() -> None:
    """A head's statistics for the last layer; where bare parameters alone read, the order of l2, as counted by hand."""
    model = plain_copy(randomised(Sequences("LSTM", batch_first=True, num_layers=2)), EXAMPLE).model
    anatomy = discover(model, EXAMPLE, blocks=False)
    data = CalibrationData((EXAMPLE,), (torch.tensor([0, 1, 2]),))
    settings = CalibrationSettings(gradient_samples=3)
    seen = observe(model, anatomy, data, others=(), settings=settings, progress=Silent())
    methods = ("l2", "obs", "activation", "taylor", "mrmr")
    orders = rank(model, anatomy, seen, norms={}, methods=methods, targets=data.targets[0], seed=0, progress=Silent())
    assert all(set(order) == set(methods) for order in orders.values())
    own = model.get_submodule("rnn.l0")
    by_channel = [own.get_parameter(f"weight_{end}_l0").detach().view(4, WIDTH, -1) for end in ("ih", "hh")]
    norms = [weight.square().sum((0, 2)).sqrt() for weight in by_channel]
    by_hand = sum(norm / norm.mean() for norm in norms).argsort()
    assert all(torch.equal(orders["rnn.l0"][name], by_hand) for name in methods)
    assert not torch.equal(orders["rnn.l1"]["obs"], orders["rnn.l1"]["l2"])
