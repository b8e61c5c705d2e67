"""Discovery: units are the right ones, a cut equals its mask, and what is not understood is refused with a reason."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import CASES, IMAGE, Case, Joined, Residual, Twice, assert_untouched, masked, randomised, shown, snapshot
from torch import Tensor, nn
from torch.nn import functional

from autoprune.core.budget import Metric
from autoprune.core.space import Space, UnitOptions
from autoprune.core.unit import DROP, Option, keep_all
from autoprune.errors import ConfigError, ModelError
from autoprune.model.cut import cut, plan_cut
from autoprune.model.describe import describe, macs_of
from autoprune.model.discover import Anatomy, discover
from autoprune.profile.cost_model import CostModel
from autoprune.verify import params, size_bytes

torch.set_num_threads(1)

DATA = Path(os.environ.get("AUTOPRUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def kept_at_random(anatomy: Anatomy, seed: int, *, share: float = 0.7) -> dict[str, Tensor]:
    """For about `share` of the groups a random, never empty, set of channels that stay."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in anatomy.groups:
        if torch.rand((), generator=generator) < share:
            count = int(torch.randint(1, group.width + 1, (), generator=generator))
            kept[group.root] = torch.randperm(group.width, generator=generator)[:count].sort().values
    return kept


def cut_model(
    model: nn.Module, anatomy: Anatomy, kept: Mapping[str, Tensor], dropped: tuple[str, ...] = ()
) -> nn.Module:
    blocks = [block for block in anatomy.blocks if block.name in dropped]
    return cut(model, plan_cut(anatomy.widths, anatomy.groups, kept=kept, dropped=blocks))


def assert_cut_equals_mask(
    model: nn.Module, anatomy: Anatomy, example: Tensor, kept: Mapping[str, Tensor], dropped: tuple[str, ...] = ()
) -> None:
    """The really smaller model's outputs are those of the dense one with channels zeroed and branches left out."""
    smaller = cut_model(model, anatomy, kept, dropped)
    reference = cut_model(model, anatomy, {}, dropped)
    with torch.no_grad():
        got = smaller(example)
        with masked(reference, _without(anatomy, dropped), kept):
            wanted = reference(example)
    scale = float(wanted.abs().max().clamp_min(1.0))
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5 * scale), float((got - wanted).abs().max())


def _without(anatomy: Anatomy, dropped: tuple[str, ...]) -> Anatomy:
    """Groups without members in dropped blocks."""
    gone = {layer for block in anatomy.blocks if block.name in dropped for layer in block.layers}
    groups = tuple(type(g)(g.root, g.width, tuple(m for m in g.members if m.layer not in gone)) for g in anatomy.groups)
    return type(anatomy)(anatomy.units, groups, anatomy.blocks, anatomy.refused, anatomy.architecture, anatomy.widths)


@every_case
def test_units_are_those_of_the_pattern(case: Case) -> None:
    anatomy = discover(case.model(), case.example())
    assert shown(anatomy.units) == dict(case.units)


@every_case
def test_what_is_refused_says_why(case: Case) -> None:
    anatomy = discover(case.model(), case.example())
    refused = {entry.root: entry.reason for entry in anatomy.refused}
    assert all(len(reason) > 10 for reason in refused.values())
    assert set(case.refused) <= set(refused)
    assert not set(refused) & {unit.name for unit in anatomy.units}


@every_case
def test_every_layer_of_a_unit_is_there_and_its_name_is_one_of_them(case: Case) -> None:
    model = case.model()
    anatomy = discover(model, case.example())
    modules = dict(model.named_modules())
    for unit in anatomy.units:
        assert set(unit.layers) <= set(modules)
        assert unit.name in (unit.layers if unit.narrows else modules)


@every_case
def test_cut_equals_masked(case: Case) -> None:
    model, example = case.model(), case.example()
    anatomy = discover(model, example)
    for seed in range(6):
        kept = kept_at_random(anatomy, seed)
        assert_cut_equals_mask(model, anatomy, example, kept)


@every_case
def test_one_channel_a_unit_runs(case: Case) -> None:
    model, example = case.model(), case.example()
    anatomy = discover(model, example)
    kept = {group.root: torch.tensor([group.width - 1]) for group in anatomy.groups}
    assert_cut_equals_mask(model, anatomy, example, kept)


@every_case
def test_dropped_blocks_equal_identity(case: Case) -> None:
    model, example = case.model(), case.example()
    anatomy = discover(model, example)
    for block in anatomy.blocks:
        smaller = cut_model(model, anatomy, {}, (block.name,))
        handle = model.get_submodule(block.name).register_forward_hook(lambda _module, inputs, _output: inputs[0])
        # In-place networks write to a block's input only after the shortcut was added: the hook sees it unchanged.
        with torch.no_grad():
            wanted = model(example)
        handle.remove()
        with torch.no_grad():
            assert torch.allclose(smaller(example), wanted, atol=1e-6)


@every_case
def test_cut_and_dropped_together(case: Case) -> None:
    model, example = case.model(), case.example()
    anatomy = discover(model, example)
    names = [block.name for block in anatomy.blocks]
    if not names:
        pytest.skip("no droppable block")
    for dropped in ((names[0],), (names[-1],), tuple(names)):
        assert_cut_equals_mask(model, anatomy, example, kept_at_random(anatomy, 1), dropped)


@every_case
def test_the_original_is_bit_identical(case: Case) -> None:
    model, example = case.model(), case.example()
    before, output = snapshot(model), model(example)
    anatomy = discover(model, example)
    cut_model(model, anatomy, kept_at_random(anatomy, 0), tuple(block.name for block in anatomy.blocks))
    assert_untouched(model, before)
    assert torch.equal(model(example), output)


def test_frozen_parameters_stay_frozen() -> None:
    model = randomised(Residual())
    model.stem.requires_grad_(False)
    discover(model, CASES["residual functional"].example())
    assert [p.requires_grad for p in model.stem.parameters()] == [False] * 3
    assert model.head.weight.requires_grad


@every_case
def test_costs_of_a_choice_are_those_counted_on_the_cut_model(case: Case) -> None:
    model, example = case.model(), case.example()
    anatomy = discover(model, example)
    entries, options = [], {}
    for seed, unit in enumerate(anatomy.units):
        narrow = DROP if unit.kind == "block" else Option("l2", 1 + (seed * 5) % (unit.width - 1))
        entries.append(UnitOptions(unit, (keep_all(unit), narrow)))
        if seed % 3 != 2:
            options[unit.name] = narrow
    space = Space(tuple(entries))
    choice = space.choice_of(options)
    decided = space.options_of(choice)
    kept = {name: torch.arange(option.keep) for name, option in decided.items() if option != DROP}
    smaller = cut_model(model, anatomy, kept, tuple(name for name, option in decided.items() if option == DROP))
    costs = CostModel(anatomy.architecture, space, None)
    counted: dict[Metric, int] = {
        "macs": macs_of(smaller, example[:1]),
        "params": params(smaller),
        "size": size_bytes(smaller),
    }
    for metric, value in counted.items():
        assert costs.cost(metric, choice) == pytest.approx(value, rel=1e-9), metric
    dense: dict[Metric, int] = {"macs": macs_of(model, example[:1]), "params": params(model), "size": size_bytes(model)}
    assert {metric: costs.dense[metric] for metric in dense} == pytest.approx(dense)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("glob", "gone"),
    [
        ("layer1.0", {"layer1.0", "layer1.0.conv1", "stem.0"}),
        ("layer1.0.conv1", {"layer1.0", "layer1.0.conv1", "stem.0"}),
        ("layer?.1.bn1", {"layer1.1", "layer1.1.conv1", "layer2.1", "layer2.1.conv1"}),
        ("stem*", {"stem.0"}),
    ],
)
def test_protected_globs_leave_their_layers_alone(glob: str, gone: set[str]) -> None:
    case = CASES["residual functional"]
    model, example = case.model(), case.example()
    whole = {unit.name for unit in discover(model, example).units}
    anatomy = discover(model, example, protect=[glob])
    assert whole - {unit.name for unit in anatomy.units} == gone
    assert "protected" in {entry.reason for entry in anatomy.refused}


def test_a_glob_that_matches_nothing_gets_a_near_miss() -> None:
    case = CASES["residual functional"]
    with pytest.raises(ConfigError, match=r"'layer1.0.conf1' matches no module.*'layer1\.0\.conv1'"):
        discover(case.model(), case.example(), protect=["layer1.0.conf1"])


def test_nothing_left_to_prune_says_so() -> None:
    case = CASES["mlp"]
    with pytest.raises(ModelError, match="nothing in this model can be pruned.*protected"):  # noqa: RUF043
        discover(case.model(), case.example(), protect=["*"])


def test_a_layer_run_twice_is_refused_or_named_with_a_remedy() -> None:
    model, example = randomised(Twice()), torch.randn(2, *IMAGE)
    try:
        anatomy = discover(model, example)
    except ModelError as error:
        assert "shared" in str(error)  # noqa: PT017
        assert "--protect" in str(error)  # noqa: PT017
        anatomy = discover(model, example, protect=["shared"])
    assert all("shared" not in unit.layers for unit in anatomy.units)
    assert_cut_equals_mask(model, anatomy, example, kept_at_random(anatomy, 0, share=1.0))


# ---- traps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_two_units_in_one_grouped_convolution(seed: int) -> None:
    """Each group of the convolution must keep equally many inputs, whatever is kept of each unit, or be refused."""
    model, example = randomised(Joined(2)), torch.randn(2, *IMAGE)
    anatomy = discover(model, example)
    assert_cut_equals_mask(model, anatomy, example, kept_at_random(anatomy, seed, share=1.0))


class WholeAndHalf(nn.Module):
    """One layer reads all channels of another, a second one half of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.whole, self.part = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        first, _ = x.chunk(2, 1)
        return self.head((self.whole(x) + self.part(first)).mean((2, 3)))


class Shuffled(nn.Module):
    """Channels are interleaved between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.head(functional.relu(self.last(x)).mean((2, 3)))


class Normed(nn.Module):
    """Group norm without parameters: which channels are normed together changes when some go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.group_norm(self.stem(x), 2)
        return self.head(functional.relu(self.last(x)).mean((2, 3)))


class Scaled(nn.Module):
    """A parameter and a buffer of the channels' number outside any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.last(self.stem(x) * self.scale) + self.shift)
        return self.head(x.mean((2, 3)))


class Prelu(nn.Sequential):
    """A slope for each channel, outside of layers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten()
        )


@pytest.mark.parametrize("make", [WholeAndHalf, Shuffled, Normed, Scaled, Prelu])
def test_traps_are_refused_or_cut_rightly(make: type[nn.Module]) -> None:
    model, example = randomised(make()), torch.randn(2, *IMAGE)
    try:
        anatomy = discover(model, example)
    except ModelError as error:
        assert "nothing in this model can be pruned" in str(error)  # noqa: PT017
        return
    for seed in range(6):
        assert_cut_equals_mask(model, anatomy, example, kept_at_random(anatomy, seed, share=1.0))


class Detached(nn.Module):
    """Its forward pass keeps no graph: channels cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


def test_what_cannot_be_traced_still_has_blocks() -> None:
    """The message says `use space: blocks`; then that must work."""
    model, example = randomised(Detached()), torch.randn(2, *IMAGE)
    try:
        anatomy = discover(model, example)
    except ModelError as error:
        pytest.fail(f"the advice in this message does not help: {error}")
    assert {unit.name for unit in anatomy.units if unit.kind == "block"} == {
        "inner.layer1.0",
        "inner.layer1.1",
        "inner.layer2.1",
    }


class Keyword(nn.Module):
    """A block that is called with an option by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 1), _Optional(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x), scale=1.0).mean((2, 3)))


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.conv(x)


def test_a_dropped_block_that_is_called_by_keyword() -> None:
    model, example = randomised(Keyword()), torch.randn(2, *IMAGE)
    anatomy = discover(model, example)
    for block in anatomy.blocks:
        smaller = cut_model(model, anatomy, {}, (block.name,))
        assert smaller(example).shape == (2, 5)


# ---- networks by chance --------------------------------------------------------------------------------------------


class Grown(nn.Module):
    """A stack of random stages: plain, residual, separable, grouped, joined."""

    def __init__(self, stages: list[tuple[str, int]]) -> None:
        super().__init__()
        width, layers = 3, []
        for kind, wanted in stages:
            layers.append(_Stage(kind, width, wanted))
            width = layers[-1].width
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.adaptive_avg_pool2d(self.stages(x), 2).flatten(1))


class _Stage(nn.Module):
    def __init__(self, kind: str, inputs: int, wanted: int) -> None:
        super().__init__()
        self.kind = kind
        self.width = {"residual": inputs, "joined": inputs + wanted}.get(kind, wanted)
        if kind == "residual":
            self.body = nn.Sequential(
                nn.Conv2d(inputs, wanted, 3, padding=1), nn.BatchNorm2d(wanted), nn.ReLU(), nn.Conv2d(wanted, inputs, 1)
            )
        elif kind == "separable":
            self.body = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs),
                nn.ReLU(),
                nn.Conv2d(inputs, wanted, 1),
                nn.ReLU(),
            )
        elif kind == "grouped":
            self.body = nn.Sequential(
                nn.Conv2d(inputs, wanted, 1), nn.ReLU(), nn.Conv2d(wanted, wanted, 3, padding=1, groups=2)
            )
        else:
            self.body = nn.Sequential(nn.Conv2d(inputs, wanted, 3, padding=1), nn.BatchNorm2d(wanted), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.kind == "residual":
            return x + out
        return torch.cat((x, out), 1) if self.kind == "joined" else out


stages = st.lists(
    st.tuples(st.sampled_from(["plain", "residual", "separable", "grouped", "joined"]), st.sampled_from([4, 6, 8])),
    min_size=2,
    max_size=5,
)


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(stages, st.integers(0, 999), st.data())
def test_any_cut_of_any_network_equals_its_mask(grown: list[tuple[str, int]], seed: int, data: st.DataObject) -> None:
    model, example = (
        randomised(Grown(grown), seed),
        torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(seed)),
    )
    before = snapshot(model)
    try:
        anatomy = discover(model, example)
    except ModelError as error:
        assert "nothing in this model can be pruned" in str(error)  # noqa: PT017
        return
    names = [block.name for block in anatomy.blocks]
    dropped = tuple(data.draw(st.lists(st.sampled_from(names), unique=True))) if names else ()
    kept = {
        group.root: torch.tensor(sorted(data.draw(st.sets(st.integers(0, group.width - 1), min_size=1))))
        for group in anatomy.groups
        if data.draw(st.booleans())
    }
    assert_cut_equals_mask(model, anatomy, example, kept, dropped)
    assert_untouched(model, before)


# ---- real networks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    path = DATA / "zoo.py"
    if not path.is_file():
        pytest.skip(f"there is no {path}; set AUTOPRUNE_DATA to the folder with the trained models")
    spec = importlib.util.spec_from_file_location("zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REAL = {
    # name -> shape of a sample, channel units, blocks; None where the data, not a shape, makes valid inputs
    "resnet20": ((3, 32, 32), 10, 7),
    "plainnet": ((3, 32, 32), 10, 0),
    "mnist_cnn": ((1, 28, 28), 3, 0),
    "fsdd_dscnn": ((1, 32, 81), 5, 0),
    "adult_mlp": (None, 11, 0),
    "resnet56": ((3, 32, 32), 28, 25),
    "shufflenetv2_x0_5": ((3, 32, 32), 20, 0),
    "digits_vit": (None, 7, 3),
    "chargpt": (None, 8, 4),
    "stories260k": (None, 10, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_networks(zoo: ModuleType, name: str) -> None:
    shape, channels, blocks = REAL[name]
    model = getattr(zoo, name)()
    example = (
        zoo.data(name)[0][:2] if shape is None else torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    )
    before = snapshot(model)
    anatomy = discover(model, example)
    narrows = [unit.narrows for unit in anatomy.units]
    assert (narrows.count(True), narrows.count(False)) == (channels, blocks)
    for seed in range(2):
        assert_cut_equals_mask(
            model, anatomy, example, kept_at_random(anatomy, seed), tuple(b.name for b in anatomy.blocks[::2])
        )
    assert_untouched(model, before)
    assert describe(model, example, groups=(), blocks=()).layers[0].outputs.terms == ()
