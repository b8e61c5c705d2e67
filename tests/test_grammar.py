"""Networks drawn from a grammar: whatever is cut equals what is masked, in torch and in ONNX Runtime.

The mask is found without what discovery says of who reads what. The layers that make the channels that go make NaN
there, and NaN goes wherever anything looks at it: a layer that mixes channels is shown zeros in the channels that have
any, and a norm over channels sees those that have none. If no NaN is left in the outputs, nothing else has read what
goes; and the cut model must do the same, in double precision, where no error hides in rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import torch
from grammar import Sentence, Word, sentences
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from networks import assert_untouched, snapshot
from torch import Tensor, nn
from torch.nn import functional

from autoprune.bank.build import Bank
from autoprune.bank.stitch import Stitcher, shape_only
from autoprune.core.space import Space, UnitOptions
from autoprune.core.unit import DROP, Option, keep_all
from autoprune.errors import ModelError
from autoprune.model.blocks import Block
from autoprune.model.coupling import CONVOLUTIONS, Group, is_depthwise
from autoprune.model.cut import cut, plan_cut
from autoprune.model.describe import macs_of
from autoprune.model.discover import Anatomy, discover
from autoprune.model.plain import plain_copy
from autoprune.model.recalibrate import Anchor
from autoprune.nest import tensors_of
from autoprune.profile.cost_model import CostModel
from autoprune.runtimes.onnxruntime import export
from autoprune.subject import in_memory

torch.set_num_threads(1)
MIXING = (*CONVOLUTIONS, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d)
SCALING = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Decision:
    """What goes: removal orders and kept numbers of groups, and blocks."""

    orders: Mapping[str, Tensor]
    keep: Mapping[str, int]
    dropped: tuple[Block, ...]

    @property
    def kept(self) -> dict[str, Tensor]:
        return {root: order[len(order) - self.keep[root] :].sort().values for root, order in self.orders.items()}

    @property
    def gone(self) -> set[str]:
        return {layer for block in self.dropped for layer in block.layers}

    def options(self) -> dict[str, Option]:
        narrowed = {root: Option("drawn", keep) for root, keep in self.keep.items()}
        return narrowed | {block.name: DROP for block in self.dropped}


def decided(anatomy: Anatomy, seed: int, *, drops: bool = True) -> Decision:
    """Any number of channels of every unit, never none; every second block on average."""
    generator = torch.Generator().manual_seed(seed)
    orders = {group.root: torch.randperm(group.width, generator=generator) for group in anatomy.groups}
    keep = {root: int(torch.randint(1, len(order) + 1, (), generator=generator)) for root, order in orders.items()}
    chosen = [block for block in anatomy.blocks if drops and torch.rand((), generator=generator) < 0.5]
    return Decision(orders, keep, tuple(chosen))


# ---- the oracle ----------------------------------------------------------------------------------------------------


def channel_dim(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def is_opaque(model: nn.Module, group: Group) -> bool:
    """Whether something reads the channels inside a step that no hook sees: a bare weight, a recurrent layer."""
    return any(slab.reads and not isinstance(model.get_submodule(slab.module), MIXING) for slab in group.slabs)


def blind(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a mixing layer reads, with zeros in channels that are spoilt.

    Vectors that are NaN throughout stay: those are channels that lie across what is mixed (positions, in a mixer).
    """
    if is_depthwise(layer):
        return inputs
    channels = inputs[0].movedim(channel_dim(layer), -1)
    across = channels.isnan().all(-1, keepdim=True)
    spoilt = (channels.isnan() & ~across).flatten(0, -2).any(0) & ~across
    return (channels.masked_fill(spoilt, 0.0).movedim(-1, channel_dim(layer)), *inputs[1:])


def over_the_rest(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """What a norm over channels makes of those that are not spoilt."""
    assert isinstance(layer, SCALING)
    rest = ~inputs[0].isnan().flatten(0, -2).any(0)
    few, weight = inputs[0][..., rest], layer.weight[rest]
    if isinstance(layer, nn.RMSNorm):
        normal = functional.rms_norm(few, (few.shape[-1],), weight, layer.eps)
    else:
        normal = functional.layer_norm(few, (few.shape[-1],), weight, layer.bias[rest], layer.eps)
    changed = torch.full_like(output, float("nan"))
    changed[..., rest] = normal
    return changed


@contextmanager
def blinded(model: nn.Module, groups: Collection[Group], decision: Decision) -> Iterator[None]:
    """For the time of the block: what goes is NaN where it is made, and zero where a mixing layer would see it.

    Opaque groups are shown as zeros where discovery says that they are read. Parameters that are no layer's stay as
    they are made here.
    """
    makes: dict[str, list[int]] = {}
    reads: dict[str, list[int]] = {}
    for group in groups:
        removed = decision.orders[group.root][: group.width - decision.keep[group.root]]
        opaque = is_opaque(model, group)
        for member in group.on("in") if opaque else group.on("out", "both"):
            if member.layer not in decision.gone:
                positions = member.positions[removed].flatten().tolist()
                (reads if opaque else makes).setdefault(member.layer, []).extend(positions)
        for slab in group.slabs:
            if slab.reads == opaque:
                parameter, index = model.get_parameter(slab.parameter).data, slab.positions[removed].flatten()
                parameter.index_fill_(slab.dim, index, 0.0 if opaque else float("nan"))

    def filling(positions: list[int], value: float) -> Callable[[nn.Module, Tensor], Tensor]:
        index = torch.tensor(positions, dtype=torch.int64)
        return lambda layer, tensor: tensor.index_fill(channel_dim(layer), index, value)

    modules = dict(model.named_modules())
    handles = []
    for name, positions in makes.items():
        spoil = filling(positions, float("nan"))
        handles.append(modules[name].register_forward_hook(lambda layer, _, output, spoil=spoil: spoil(layer, output)))
    for name, positions in reads.items():
        hide = filling(positions, 0.0)
        handles.append(modules[name].register_forward_pre_hook(lambda layer, x, hide=hide: (hide(layer, x[0]), *x[1:])))
    for layer in modules.values():
        if isinstance(layer, MIXING):
            handles.append(layer.register_forward_pre_hook(blind))
        if isinstance(layer, SCALING):
            handles.append(layer.register_forward_hook(over_the_rest))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def silenced(model: nn.Module, blocks: Collection[Block]) -> nn.Module:
    """A copy in which all that `blocks` hold is zero: what a block's removal is to be the same as."""
    copied = cut(model, plan_cut({}, (), kept={}, dropped=()))
    for block in blocks:
        module = copied.get_submodule(block.name)
        for parameter in module.parameters():
            parameter.data.zero_()
        for layer in module.modules():
            if isinstance(layer.running_mean if hasattr(layer, "running_mean") else None, Tensor):
                layer.running_mean.zero_()
    return copied


def doubled(model: nn.Module) -> nn.Module:
    return cut(model, plan_cut({}, (), kept={}, dropped=())).double()


def assert_cut_equals_mask(model: nn.Module, anatomy: Anatomy, inputs: Tensor, decision: Decision) -> nn.Module:
    """The really cut model, once it has been found equal to the masked one."""
    plan = plan_cut(anatomy.widths, anatomy.groups, kept=decision.kept, dropped=decision.dropped)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    reference = silenced(doubled(model), decision.dropped)
    with torch.no_grad():
        with blinded(reference, anatomy.groups, decision):
            outputs = tensors_of(reference(inputs))
        found = tensors_of(cut(doubled(model), plan)(inputs))
    assert len(found) == len(outputs)
    for got, wanted in zip(found, outputs, strict=True):
        assert not wanted.isnan().any(), "something else reads what goes"
        scale = float(wanted.abs().max().clamp_min(1e-3))
        assert got.shape == wanted.shape
        assert torch.allclose(got, wanted, rtol=0, atol=1e-8 * scale), float((got - wanted).abs().max()) / scale
    return cut(model, plan)


def assert_stitched_is_cut(model: nn.Module, anatomy: Anatomy, decision: Decision, smaller: nn.Module) -> None:
    """A candidate from a bank of the same orders is the cut model bit for bit; the clock's model has its shapes."""
    bank = Bank({}, {root: {"drawn": order} for root, order in decision.orders.items()}, {}, {})
    options = decision.options()
    built = Stitcher(model, anatomy, bank, anchor=Anchor((), ())).build(options, recalibrate=False).model
    timed = shape_only(model, anatomy, options).state_dict()
    state = smaller.state_dict()
    assert built.state_dict().keys() == timed.keys() == state.keys()
    assert all(tensor.shape == state[name].shape for name, tensor in timed.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in built.state_dict().items())


def assert_macs_are_counted(anatomy: Anatomy, decision: Decision, smaller: nn.Module, inputs: Tensor) -> None:
    """What the cost model says of the decision is what is counted on the cut model."""
    changed = {unit.name: option for unit in anatomy.units if (option := decision.options().get(unit.name))
               and option.keep < unit.width}  # fmt: skip
    both = [dict.fromkeys((keep_all(unit), changed.get(unit.name, keep_all(unit)))) for unit in anatomy.units]
    space = Space(tuple(UnitOptions(unit, tuple(options)) for unit, options in zip(anatomy.units, both, strict=True)))
    predicted = CostModel(anatomy.architecture, space).cost("macs", space.choice_of(changed))
    assert predicted == macs_of(smaller, inputs[:1])


def assert_onnx_equals_torch(model: nn.Module, inputs: Tensor) -> None:
    """All outputs of the exported graph, to 2e-5 of their scale."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(export(model, inputs), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    with torch.no_grad():
        wanted = tensors_of(model(inputs))
    assert len(found) == len(wanted)
    for got, tensor in zip(found, wanted, strict=True):
        scale = float(tensor.abs().max().clamp_min(1e-3))
        error = float(np.abs(got - tensor.numpy()).max()) / scale
        assert error <= 2e-5


def anatomy_of(model: nn.Module, inputs: Tensor, *, hidden: bool = False) -> Anatomy | None:
    """What discovery finds; None where it says that there is nothing."""
    try:
        return discover(model, inputs, hidden=hidden)
    except ModelError as error:
        assert "nothing in this model can be pruned" in str(error)  # noqa: PT017
        return None


def check(sentence: Sentence, seed: int, *, hidden: bool = False, onnx: bool = False) -> None:
    inputs = sentence.example()
    model = plain_copy(sentence.model(), inputs).model
    before = snapshot(model)
    anatomy = anatomy_of(model, inputs, hidden=hidden)
    assert_untouched(model, before)
    if anatomy is None or any(group.norms and is_opaque(model, group) for group in anatomy.groups):
        return
    decision = decided(anatomy, seed)
    smaller = assert_cut_equals_mask(model, anatomy, inputs, decision)
    assert_stitched_is_cut(model, anatomy, decision, smaller)
    runs_vary = hidden and any(word.kind == "mixer" for word in sentence.words)  # once for every channel of a stream
    product_goes = any(word.kind == "odd" for word in sentence.words)  # `einsum` multiplies where one channel is left
    if not runs_vary and not product_goes:
        assert_macs_are_counted(anatomy, decision, smaller, inputs)
    if onnx:
        assert_onnx_equals_torch(smaller, inputs)


# ---- the property --------------------------------------------------------------------------------------------------

chances = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(chances, max_examples=60, derandomize=True)
@example(Sentence("image", (Word("plain", 4, 32),), head="denoise"), 0, False)  # a bare norm in a dropped block
@given(sentences(), st.integers(0, 999), st.booleans())
def test_any_network_of_the_grammar_is_cut_as_it_is_masked(sentence: Sentence, seed: int, hidden: bool) -> None:
    check(sentence, seed, hidden=hidden)


@pytest.mark.slow
@settings(chances, max_examples=3000)
@given(sentences(), st.integers(0, 9999), st.booleans())
def test_thousands_of_networks_are_cut_as_they_are_masked(sentence: Sentence, seed: int, hidden: bool) -> None:
    check(sentence, seed, hidden=hidden)


# ---- word by word --------------------------------------------------------------------------------------------------

UNITS: Mapping[tuple[str, str], tuple[tuple[int, ...], ...]] = {
    # widths of the units that a word alone has, counted by hand, for its variants from 0
    ("image", "plain"): ((8,), (8,), (8,), (2,)),  # the last one's norm has two groups
    ("image", "basic"): ((8,), (8, 8)),
    ("image", "bottleneck"): ((8, 8), (4, 4), (8,)),
    ("image", "separable"): ((8,),),
    ("image", "inverted"): ((8, 4), (8,)),
    ("image", "gate"): ((8,),),
    ("image", "interleaved"): ((4, 2, 4),) * 3,
    ("image", "shuffle"): ((4, 4), (2, 4, 4)),
    ("image", "dense"): ((8, 8), (8, 8)),
    ("image", "branches"): ((4, 4, 4), (4, 4, 4, 4), (4, 4)),
    ("image", "skip"): ((8, 8, 8), (8, 8, 8), (8, 8, 8), (8, 8, 8, 8), (8, 8)),
    ("image", "sliced"): ((4, 4), (4, 4)),
    ("image", "gated"): ((8,), (8,)),
    ("image", "convnext"): ((8,),),
    ("image", "scaled"): ((8,),) * 4,
    ("image", "odd"): (
        (),
        (2, 8),
        (8,),
        (8,),
        (8,),
        (8, 8),
        (8, 8),
        (8,),
        (4, 8),
        (8,),
        (4, 8),
        (8,),
        (8, 8),
        (8, 8),
        (8,),
        (8, 8),
        (8,),
        (8, 8),
        (8, 8),
        (8,),
        (8,),
        (8,),
    ),
    ("image", "seen"): ((), (), (), (8,), ()),
    ("signal", "plain"): ((8,), (8,), (8,), (2,)),
    ("signal", "temporal"): ((8, 8), (8,), (8, 8)),
    ("signal", "recurrent"): ((8,), (8,)),
    ("vectors", "attention"): ((2,),) * 5,
    ("vectors", "grouped"): ((2,), (2,)),
    ("vectors", "feed"): ((8,),) * 4,
    ("vectors", "mixer"): ((8,),) * 4,
    ("tokens", "grouped"): ((2,), (2,)),
    ("tokens", "feed"): ((8,),) * 4,
    ("table", "linear"): ((8,),),
    ("table", "residual"): ((8,),),
}
WORDS = [(family, kind, variant) for (family, kind), units in UNITS.items() for variant in range(len(units))]


def alone(family: str, kind: str, variant: int) -> Sentence:
    """A word, and before it in images a convolution of eight channels."""
    before = (Word("plain"),) if family == "image" else ()
    return Sentence(family, (*before, Word(kind, 8, variant)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "kind", "variant"), WORDS)
def test_every_word_has_its_units_and_its_cut_is_exported(family: str, kind: str, variant: int) -> None:
    sentence = alone(family, kind, variant)
    inputs = sentence.example()
    anatomy = anatomy_of(plain_copy(sentence.model(), inputs).model, inputs)
    found = [] if anatomy is None else [group.width for group in anatomy.groups]
    wanted = [*((8,) if family == "image" and kind != "convnext" else ()), *UNITS[family, kind][variant]]
    assert not Counter(wanted) - Counter(found), (wanted, found)
    check(sentence, variant, onnx=True)


@pytest.mark.parametrize(("family", "kind", "variant"), [word for word in WORDS if word[0] == "image"])
def test_a_layout_in_memory_changes_no_unit(family: str, kind: str, variant: int) -> None:
    sentence = alone(family, kind, variant)
    model, inputs = sentence.model(), sentence.example()
    before = {group.root: group.width for group in discover(model, inputs, blocks=False).groups}
    in_memory(model, torch.channels_last)
    after = {group.root: group.width for group in discover(model, inputs, blocks=False).groups}
    assert after == before


@pytest.mark.parametrize("head", ["detect", "denoise"])
@pytest.mark.parametrize("variant", range(3))
def test_networks_of_several_outputs_and_of_images(head: str, variant: int) -> None:
    check(Sentence("image", (Word("plain"), Word("basic", 8, 1)), head, variant), variant, onnx=True)
