"""What can be dropped in depth: found by what it does, and gone without a trace where it is dropped."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import Residual, assert_untouched, randomised, snapshot, workbench_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoprune import api
from autoprune.apply import apply
from autoprune.bank.stitch import Stitcher
from autoprune.core.space import Space, UnitOptions
from autoprune.core.unit import DROP, Option, Unit
from autoprune.files import read_policy
from autoprune.goal import Plan
from autoprune.model.additions import links, stand_in
from autoprune.model.blocks import Block, droppable_blocks, parts_of
from autoprune.model.cut import CutPlan, cut, plan_cut
from autoprune.model.discover import discover
from autoprune.model.flow import norms_after, tails_of
from autoprune.model.observe import calls
from autoprune.profile.draw import draw
from autoprune.profile.widths import WidthMap
from autoprune.progress import Silent
from autoprune.recover.refit import Reference, refit
from autoprune.runtimes.onnxruntime import export
from autoprune.searching.fit import _change
from autoprune.searching.problem import structure_of
from autoprune.ship import write_model
from autoprune.spaces import load_space
from autoprune.subject import Task, subject_of

torch.set_num_threads(1)
DATA = Path(os.environ.get("AUTOPRUNE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
WIDTH = 12


class Attention(nn.Module):
    """Two heads; returns weights besides when asked."""

    def __init__(self, *, weights: bool = False) -> None:
        super().__init__()
        self.qkv, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.heads, self.weights = 2, weights

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2) * (WIDTH / 2) ** -0.5).softmax(-1)
        made = self.output((scores @ value).transpose(1, 2).flatten(2))
        if scale is not None:
            made = made * scale
        return (made, scores) if self.weights else made


class PreNorm(nn.Module):
    """`style`: plain, further inputs, keywords (all inputs and a tuple out), layer scale, sub-blocks in line."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(weights=style == "keywords")
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))
        self.scale = nn.Linear(WIDTH, WIDTH, bias=False) if style == "scaled" else nn.Identity()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> Any:
        if self.style == "keywords":
            x = x + self.attention(x=self.norm1(x), scale=first)[0]
        else:
            x = x + self.dropout(self.scale(self.attention(self.norm1(x), first)))
        out = x + self.mlp(self.norm2(x))
        return (out, None, "said") if self.style == "keywords" else out


class Parallel(nn.Module):
    """Both branches read one norm."""

    def __init__(self, _style: str) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x)
        return self.attention(read) + self.mlp(read) + x


class PostNorm(nn.Module):
    """A norm after each sum; the feed-forward part is no module of its own."""

    def __init__(self, _style: str) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(), nn.LayerNorm(WIDTH)
        self.wide, self.narrow, self.norm2 = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.attention(x) + x)
        return self.norm2(x + self.narrow(functional.gelu(self.wide(x))))


class Stack(nn.Module):
    """Blocks on vectors. (N, T, 5) -> (N, 6)."""

    def __init__(self, make: Callable[[str], nn.Module], style: str, depth: int = 3) -> None:
        super().__init__()
        self.style = style
        self.stem, self.norm, self.head = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)
        self.blocks = nn.ModuleList(make(style) for _ in range(depth))
        self.register_buffer("first", torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.style == "keywords":
                x, nothing, word = block(x=x, second=None, first=self.first)
                assert nothing is None
                assert word == "said"
            else:
                x = block(x, self.first, self.first) if self.style == "further inputs" else block(x)
        return self.head(self.norm(x).mean(1))


def stack(make: Callable[[str], nn.Module], style: str = "plain", depth: int = 3) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomised(Stack(make, style, depth)), torch.randn(4, 7, 5)


class Logits(nn.Module):
    def __init__(self, model: nn.Module, **given: object) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, **self.given).logits


def hugging_face(name: str) -> tuple[nn.Module, Tensor]:
    """Small models with random weights."""
    hub = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (2, 9))
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    }  # fmt: skip
    words, image = sizes | {"vocab_size": 50}, sizes | {"image_size": 16, "patch_size": 4}
    if name == "vit":
        made, tokens = Logits(hub.ViTForImageClassification(hub.ViTConfig(**image))), torch.randn(2, 3, 16, 16)
    elif name == "bert":
        made = Logits(hub.BertForSequenceClassification(hub.BertConfig(**words)))
    elif name == "gpt2":
        config = hub.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=16)
        made = Logits(hub.GPT2LMHeadModel(config), use_cache=False)
    elif name == "neox":
        made = Logits(hub.GPTNeoXForCausalLM(hub.GPTNeoXConfig(**words)), use_cache=False)
    else:
        kind = {"llama": "Llama", "qwen3": "Qwen3"}[name]
        config = getattr(hub, f"{kind}Config")(**words, num_key_value_heads=2)
        made = Logits(getattr(hub, f"{kind}ForCausalLM")(config), use_cache=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5))
    return made.eval(), tokens


def found_in(names: Sequence[str], *parts: str) -> dict[str, str]:
    """`parts` are written `name:rest`; an empty name is the block itself."""
    pairs = [part.split(":") for part in parts]
    return {f"{name}.{part}".rstrip("."): rest for name in names for part, rest in pairs}


BLOCKS = [f"blocks.{index}" for index in range(3)]
BOTH = ("attention:zero", "mlp:zero", ":identity")
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], dict[str, str]]] = {
    "plain": (lambda: stack(PreNorm), found_in(BLOCKS, *BOTH)),
    "further inputs": (lambda: stack(PreNorm, "further inputs"), found_in(BLOCKS, *BOTH)),
    "keywords": (lambda: stack(PreNorm, "keywords"), found_in(BLOCKS, *BOTH)),
    "scaled": (lambda: stack(PreNorm, "scaled"), found_in(BLOCKS, "scale:zero", *BOTH[1:])),
    "parallel": (lambda: stack(Parallel), found_in(BLOCKS, *BOTH)),
    "post-norm": (lambda: stack(PostNorm), found_in(BLOCKS, "attention:zero", "narrow:zero")),
    "llama": (
        lambda: hugging_face("llama"),
        found_in([f"model.model.layers.{i}" for i in range(3)], "self_attn:zero", "mlp:zero", ":identity"),
    ),
    "qwen3": (
        lambda: hugging_face("qwen3"),
        found_in([f"model.model.layers.{i}" for i in range(3)], "self_attn:zero", "mlp:zero", ":identity"),
    ),
    "gpt2": (
        lambda: hugging_face("gpt2"),
        found_in([f"model.transformer.h.{i}" for i in range(3)], "attn:zero", "mlp:zero", ":identity"),
    ),
    "neox": (
        lambda: hugging_face("neox"), found_in([f"model.gpt_neox.layers.{i}" for i in range(3)], *BOTH)
    ),
    "vit": (lambda: hugging_face("vit"), found_in([f"model.vit.layers.{i}" for i in range(3)], *BOTH)),
    "bert": (
        lambda: hugging_face("bert"),
        found_in(
            [f"model.bert.encoder.layer.{i}" for i in range(3)], "attention.output.dense:zero", "output.dense:zero"
        ),
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("name", list(CASES))


def overwritten(model: nn.Module, blocks: Sequence[Block], example: Tensor) -> Tensor:
    """What the dense model makes when each branch's output is multiplied by zero, and each block's by its input."""
    handles = []

    def hook(block: Block) -> Callable[..., object]:
        def after(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], made: Any) -> object:
            first = made[0] if isinstance(made, tuple) else made
            given = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
            new = 0 * first if block.rest == "zero" else given
            return (new, *made[1:]) if isinstance(made, tuple) else new

        return after

    for block in blocks:
        handles.append(model.get_submodule(block.name).register_forward_hook(hook(block), with_kwargs=True))
    with torch.no_grad():
        output: Tensor = model(example)
    for handle in handles:
        handle.remove()
    return output


def without(model: nn.Module, blocks: Sequence[Block]) -> nn.Module:
    return cut(model, plan_cut({}, (), kept={}, dropped=blocks))


@each_case
def test_what_is_found(name: str) -> None:
    make, wanted = CASES[name]
    model, example = make()
    before = snapshot(model)
    assert {block.name: block.rest for block in droppable_blocks(model, example)} == wanted
    assert_untouched(model, before)


@each_case
def test_without_a_part_the_model_makes_what_it_makes_with_it_overwritten(name: str) -> None:
    model, example = CASES[name][0]()
    blocks = droppable_blocks(model, example)
    branches = [block for block in blocks if block.rest == "zero"]
    for dropped in ([block] for block in blocks):
        with torch.no_grad():
            found = without(model, dropped)(example)
        assert torch.allclose(found, overwritten(model, dropped, example), atol=1e-5)
    for several in (branches, branches[::2], [*branches[1:3], blocks[-1]]):
        with torch.no_grad():
            found = without(model, several)(example)
        assert torch.allclose(found, overwritten(model, several, example), atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "keywords",
        "parallel",
        "post-norm",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2", "vit", "bert")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_nothing_of_a_dropped_branch_is_left_in_an_onnx_file(name: str, tmp_path: Path) -> None:
    model, example = CASES[name][0]()
    blocks = droppable_blocks(model, example)
    branches = [block for block in blocks if block.rest == "zero"]
    shorter = without(model, branches)
    graph = export(shorter, example)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: example.numpy()})[0]
    assert np.allclose(found, overwritten(model, branches, example).numpy(), atol=1e-5)
    operations = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert not {"Softmax", "ConstantOfShape", "Erf", "Sigmoid", "Expand"} & operations.keys()
    normalised = sum(operations[kind] for kind in ("LayerNormalization", "RMSNormalization", "ReduceMean"))
    sums = {"bert": 7, "post-norm": 8, "plain": 2, "further inputs": 2, "keywords": 2}  # ReduceMean pools there
    assert normalised <= sums.get(name, 2)


def test_the_norm_before_a_branch_goes_with_it_unless_something_else_reads_it() -> None:
    model, example = stack(PreNorm)
    blocks = {block.name: block for block in droppable_blocks(model, example)}
    left = {name for name, _ in without(model, [blocks["blocks.1.attention"]]).named_parameters()}
    gone = {name for name, _ in model.named_parameters()} - left
    assert {name.rpartition(".")[0] for name in gone} == set(blocks["blocks.1.attention"].layers)
    assert "blocks.1.norm1.weight" in gone
    shared, example = stack(Parallel)
    blocks = {block.name: block for block in droppable_blocks(shared, example)}
    assert "blocks.1.norm" not in blocks["blocks.1.mlp"].layers
    both = without(shared, [blocks["blocks.1.mlp"], blocks["blocks.1.attention"]])
    assert "blocks.1.norm.weight" in dict(both.named_parameters())


def test_a_call_has_all_that_is_needed_to_call_again() -> None:
    model, example = stack(PreNorm, "keywords")
    seen = {call.name: call for call in calls(model, example)}
    for name in ("blocks.1", "blocks.1.attention", "blocks.1.mlp"):
        call = seen[name]
        again = model.get_submodule(name)(*call.args, **call.kwargs)
        assert torch.equal(again[0] if isinstance(again, tuple) else again, call.output)
    assert seen["blocks.1"].inputs is seen["blocks.0"].output


class Sized(nn.Module):
    """A branch of which the model looks at the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.body(x)
        return self.head(x + branch) * branch.shape[1]


class Overwriting(Sized):
    """The stream is added to the branch in place."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.body(x)
        branch += x
        return self.head(branch)


@pytest.mark.parametrize("make", [Sized, Overwriting])
def test_a_branch_whose_stand_in_would_not_do_is_refused(make: type[nn.Module]) -> None:
    assert droppable_blocks(randomised(make()), torch.randn(2, 5)) == ()


class Doubled(nn.Module):
    """A block that is nothing but its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.net = nn.LayerNorm(5), nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(self.norm(x))


def test_a_branch_that_is_all_of_its_block_is_not_named_twice() -> None:
    model = randomised(nn.Sequential(Doubled(), Doubled(), nn.Linear(5, 3)))
    assert [(b.name, b.rest) for b in droppable_blocks(model, torch.randn(2, 5))] == [
        ("0", "identity"),
        ("1", "identity"),
    ]


@pytest.mark.skipif(not (DATA / "zoo.py").exists(), reason=f"no models at {DATA}; set AUTOPRUNE_DATA")
def test_residual_networks_have_their_blocks_and_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DATA))
    import zoo  # noqa: PLC0415

    names = [block.name for block in droppable_blocks(zoo.resnet20(), torch.randn(2, 3, 32, 32))]
    assert names == ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]


# ---- blocks in blocks ------------------------------------------------------------------------------------------------


def test_units_lie_in_branches_and_these_in_blocks() -> None:
    model, example = stack(PreNorm)
    anatomy = discover(model, example, weights=True)
    parents = {unit.name: unit.parent for unit in anatomy.units}
    assert parents["blocks.0"] is None
    assert parents["blocks.0.attention"] == parents["blocks.0.mlp"] == "blocks.0"
    assert parents["blocks.0.attention.qkv"] == parents["blocks.0.attention.output.weight"] == "blocks.0.attention"
    assert parents["blocks.0.mlp.0"] == "blocks.0.mlp"
    layers = {layer.name: layer.block for layer in anatomy.architecture.layers}
    assert layers["blocks.0.mlp.2"] == "blocks.0.mlp"
    assert parts_of(anatomy.blocks)["blocks.0"] == ("blocks.0.attention", "blocks.0.mlp")


def nested() -> Space:
    def block(name: str, parent: str | None = None) -> UnitOptions:
        return UnitOptions(Unit(name, "block", 1, (), parent), (Option("keep", 1), DROP))

    def heads(name: str, parent: str | None) -> UnitOptions:
        return UnitOptions(
            Unit(name, "heads", 4, (), parent), tuple(Option("keep" if k == 4 else "l2", k) for k in (4, 2))
        )

    inside = (heads("b.a.q", "b.a"), block("b.a", "b"), block("b.m", "b"), heads("b.m.f", "b.m"))
    return Space((block("b"), *inside, heads("alone", None)))


def test_all_agree_on_what_is_moot() -> None:
    space = nested()
    choices = np.array(list(np.ndindex(*space.sizes)), dtype=np.int64)
    model = discover(*stack(PreNorm, depth=1)).architecture
    widths = WidthMap.of(replace(model, layers=()), space)
    wanted = np.array([space.normal(tuple(int(c) for c in choice)) for choice in choices])
    assert np.array_equal(widths.normal(choices), wanted)
    assert np.array_equal(structure_of(space).normal(choices), wanted)
    assert tuple(space.normal((1, 1, 1, 0, 1, 1))) == (1, 0, 0, 0, 0, 1)


class _Harms:
    """As much of a problem as a sum over active units needs."""

    def __init__(self, space: Space) -> None:
        self.structure = structure_of(space)


def test_a_change_of_the_sum_is_exact_for_blocks_in_blocks() -> None:
    space, rng = nested(), np.random.default_rng(0)
    problem: Any = _Harms(space)
    table = problem.structure.padded([rng.random(size) for size in space.sizes], 0.0)

    def total(row: Any) -> float:
        return float(table[np.arange(len(row)), row][~problem.structure.moot(row[None])[0]].sum())

    for row in problem.structure.normal(np.array(list(np.ndindex(*space.sizes)), dtype=np.int64)):
        change, moot = _change(problem, table, row), problem.structure.moot(row[None])[0]
        dropped = row == problem.structure.drop_index
        for unit in np.flatnonzero(~moot & ~dropped):  # what putting a block back brings is not known yet
            for option in range(space.sizes[unit]):
                other = row.copy()
                other[unit] = option
                assert change[unit, option] == pytest.approx(total(other) - total(row))


def test_draws_show_every_branch_dropped_in_a_block_that_stays() -> None:
    drawn = draw(nested(), 8, np.random.default_rng(0))
    assert all(any(choice[unit] == 1 for choice in drawn) for unit in (0, 2, 3))


@pytest.mark.parametrize("name", ["plain", "post-norm"])
def test_widths_and_parts_together_cost_what_is_predicted(name: str, tmp_path: Path) -> None:
    """MACs, on models that are really cut: everything alone, and some of everything."""
    bench = workbench_of(CASES[name][0]()[0], (7, 5), tmp_path)
    rng = np.random.default_rng(0)
    for choice in draw(bench.space, 12, rng):
        candidate = bench.stitcher.build(bench.space.options_of(choice), recalibrate=False)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
            candidate.model(bench.subject.example[:1])
        really = counter.get_total_flops() // 2
        assert bench.costs.cost("macs", choice) == really


# ---- what is done for what is dropped --------------------------------------------------------------------------------


def test_each_sum_is_followed_by_the_next_branch() -> None:
    model, example = stack(PreNorm)
    tails = tails_of(model, norms_after(model, example), example)
    found = links(model, example, layers=tails, blocks=droppable_blocks(model, example))
    order = [f"blocks.{index}.{part}" for index in range(3) for part in ("attention", "mlp")]
    last = {"attention": "output", "mlp": "2"}
    assert [link.block if link else None for link in found.values()] == [*order[1:], None]
    assert list(found) == [f"{name}.{last[name.rpartition('.')[2]]}" for name in order]
    assert stand_in(found, "blocks.0.mlp.2", ["blocks.1.attention", "blocks.1.mlp"]) == "blocks.1.mlp.2"
    assert stand_in(found, "blocks.0.mlp.2", ["blocks.1.mlp"]) == "blocks.0.mlp.2"


@pytest.mark.parametrize("make", [PostNorm, Parallel])
def test_a_sum_that_is_not_the_stream_stands_for_nothing(make: Callable[[str], nn.Module]) -> None:
    model, example = stack(make)
    tails = tails_of(model, norms_after(model, example), example)
    assert not any(links(model, example, layers=tails, blocks=droppable_blocks(model, example)).values())


@pytest.mark.parametrize(
    "dropped", [["blocks.1.mlp"], ["blocks.1"], ["blocks.1.attention", "blocks.1.mlp"],
                ["blocks.0.mlp", "blocks.1.attention"]], ids=", ".join,
)  # fmt: skip
def test_what_stands_before_a_dropped_branch_makes_up_for_it(dropped: list[str], tmp_path: Path) -> None:
    bench = workbench_of(stack(PreNorm)[0], (7, 5), tmp_path, calibration=256)
    own = snapshot(bench.subject.model)
    batches = torch.split(bench.subject.task.data.calibration_inputs, 128)

    def stream(model: nn.Module) -> Tensor:
        return next(call.inputs for call in calls(model, torch.cat(batches)) if call.name == "norm")

    def error(model: nn.Module) -> float:
        return float((stream(model) - stream(bench.subject.model)).square().mean())

    options = dict.fromkeys(dropped, DROP)
    bare = Stitcher(
        bench.subject.model, bench.subject.anatomy, replace(bench.bank, runs={}), anchor=bench.stitcher.anchor
    )
    alone, candidate = error(bare.build(options).model), bench.stitcher.build(options)
    assert error(candidate.model) < 0.95 * alone
    refit(Reference.of(bench.subject.model, batches, blocks=bench.subject.anatomy.blocks), candidate)
    assert error(candidate.model) < 0.5 * alone
    assert_untouched(bench.subject.model, own)


@pytest.mark.parametrize("name", ["post-norm", "parallel"])
def test_where_nothing_stands_in_dropping_works_all_the_same(name: str, tmp_path: Path) -> None:
    bench = workbench_of(CASES[name][0]()[0], (7, 5), tmp_path)
    batches = (bench.subject.task.data.calibration_inputs,)
    reference = Reference.of(bench.subject.model, batches, blocks=bench.subject.anatomy.blocks)
    for block in bench.subject.anatomy.blocks:
        candidate = bench.stitcher.build({block.name: DROP})
        refit(reference, candidate)
        with torch.no_grad():
            assert torch.isfinite(candidate.model(batches[0])).all()


# ---- doors -----------------------------------------------------------------------------------------------------------


SOURCE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, use_cache=False).logits


def make():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
    return Logits(LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4))).eval()
"""


def module_at(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_search_apply_and_rebuild_without_branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "net.py").write_text(SOURCE, encoding="utf-8")
    model = module_at(tmp_path / "net.py", monkeypatch).make()
    tokens = torch.randint(0, 50, (96, 9), generator=torch.Generator().manual_seed(0))
    parts = (tokens[:48], tokens[:48].roll(-1, 1)), (tokens[48:], tokens[48:].roll(-1, 1))
    outcome = api.search(
        model, calibration=parts[0], validation=parts[1], budget="60%macs", metric="perplexity", space="blocks",
        plan=Plan(trials=6, finalists=1), target=api.Target("torch"), run=tmp_path / "run",
    )  # fmt: skip
    assert outcome.met
    names = [name.rpartition(".")[2] for name in read_policy(outcome.folder / "policy.yaml").units]
    assert names
    assert all(name in ("self_attn", "mlp", "0", "1", "2") for name in names)
    task = Task(model, "net", api.as_data(*parts), api.evaluator("perplexity"), api.Target("torch"),
                load_space("blocks", tmp_path))  # fmt: skip
    subject = subject_of(task, Silent())
    applied = apply(outcome.folder / "policy.yaml", subject)
    written = write_model(
        applied, example=subject.example, factory="net.py:make", source=tmp_path, folder=tmp_path / "out",
        progress=Silent(),
    )  # fmt: skip
    rebuilt = module_at(written["rebuild script"], monkeypatch).model()
    session = onnxruntime.InferenceSession(str(written["onnx"]), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = outcome.model(tokens[:1])
        assert torch.allclose(applied.model(tokens[:1]), wanted, atol=1e-5)
        assert torch.allclose(rebuilt(tokens[:1]), wanted, atol=1e-5)
    found = session.run(None, {session.get_inputs()[0].name: tokens[:1].numpy()})[0]
    assert np.allclose(found, wanted.numpy(), atol=1e-4)


def test_a_cache_of_keys_and_values_has_gaps_where_blocks_were() -> None:
    """Generation counts positions itself; only by hand is the first layer's cache asked how long it is."""
    wrapped, tokens = hugging_face("llama")
    blocks = {block.name: block for block in droppable_blocks(wrapped, tokens)}
    for name in ("model.model.layers.0.self_attn", "model.model.layers.1"):
        model: Any = cut(wrapped, CutPlan({}, (blocks[name],))).get_submodule("model")
        made = [
            model.generate(
                tokens, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0, eos_token_id=None,
                output_logits=True, return_dict_in_generate=True,
            ).logits
            for cached in (True, False)
        ]  # fmt: skip
        assert torch.allclose(torch.stack(made[0]), torch.stack(made[1]), atol=1e-5)


def test_convolutional_blocks_are_as_they_were() -> None:
    model = randomised(Residual(blocks=3))
    found = droppable_blocks(model, torch.randn(2, 3, 8, 8))
    assert [(b.name, b.rest, b.idle) for b in found] == [
        (f"layer{stage}.{index}", "identity", ()) for stage, index in ((1, 0), (1, 1), (1, 2), (2, 1), (2, 2))
    ]
