"""What other tools wrote: their own formats read into policies, what cannot be is listed, and damage is told."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import IMAGE, Bottleneck, Joined, data_of, randomised
from resolved_policies import resolved_case, subject_for
from safetensors.torch import load_file
from torch import nn

from autoprune.apply import apply
from autoprune.core.policy import Policy
from autoprune.core.target import Target
from autoprune.data import as_data
from autoprune.errors import ConfigError, PolicyError
from autoprune.evaluators import evaluator
from autoprune.exporters.base import Exporter
from autoprune.exporters.distiller import Distiller
from autoprune.exporters.mmrazor import MMRazor
from autoprune.exporters.nni import NNI, NNI2
from autoprune.exporters.spdy import SPDY
from autoprune.exporters.torch_pruning import TorchPruning
from autoprune.files import read_policy
from autoprune.importers import IMPORTERS, importer
from autoprune.importers.base import Count, Dropped, Exactly, Found, Share, Wanted, Zeros
from autoprune.importers.plain import Plain
from autoprune.importers.tables import UnitTimes, read_times
from autoprune.importing import Import, policy_of, read_import, write_import
from autoprune.mapping import Mapped, mapped
from autoprune.progress import Silent
from autoprune.spaces import SpaceSpec, WeightChoice
from autoprune.subject import Subject, Task, subject_of
from autoprune.transfer import transfer

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden" / "imports"
TOOLS = {
    "spdy_profile.txt": "spdy", "nni3.json": "nni", "nni2.yaml": "nni", "distiller.yaml": "distiller",
    "mmrazor_flat.json": "mmrazor", "mmrazor_mutator.json": "mmrazor", "mmrazor_mutables.yaml": "mmrazor",
    "torch_pruning_history.json": "torch-pruning", "torch_pruning_ratios.json": "torch-pruning",
    "plain.yaml": "plain", "plain.json": "plain", "plain.csv": "plain",
}  # fmt: skip


def residual() -> Subject:
    """Three stages of widths 16, 32 and 48, then linear layers fc1 (64) and fc2 (10)."""
    return subject_for("channels")


@pytest.fixture(scope="module", autouse=True)
def _discovered() -> None:
    """Found once, and not within the time that one example of a property has."""
    residual()


@functools.cache
def small(make: Callable[[], nn.Module]) -> Subject:
    spec = SpaceSpec.model_validate({"methods": ({"method": "l2"},), "weights": (WeightChoice(bits=(8,)),)})
    model = randomised(make())
    data = as_data(*data_of(model, IMAGE))
    return subject_of(Task(model, "small", data, evaluator("top1"), Target(runtime="torch"), spec), Silent())


def grouped() -> Subject:
    """Bottlenecks whose middle convolution has two groups: 8 channels, 4 at a time."""
    return small(functools.partial(Bottleneck, 2))


def imported(file: str) -> tuple[Policy, Mapped]:
    found = read_import(GOLDEN / file, Import(TOOLS[file]))
    return policy_of(found, residual(), method="l2", title=file)


def asked(*wanted: Wanted, subject: Subject | None = None) -> Mapped:
    return mapped(Found(wanted), subject or residual(), method="l2")


def keeps(laid: Mapped) -> dict[str, int]:
    return {name: unit.keep for name, unit in laid.units.items()}


# ---- what each format means ----------------------------------------------------------------------------------------

MEANT: Mapping[str, Mapping[str, int | tuple[int, str]]] = {
    "spdy_profile.txt": {
        "layer1.0.conv1.weight": (2304 - 1386, "60.16%"), "layer2.0.conv1.weight": (4608 - 4562, "99%"),
    },
    "nni3.json": {
        "layer1.0.conv1": 16 - 7, "layer2.0.conv2": 16, "layer3.1.conv1": 36, "fc1.weight": (1536, "4x1 50%"),
        "fc2.weight": (320, "2:4"), "stem.0.weight": (840, "30%"),
    },
    "nni2.yaml": {"layer1.1.conv1": 12, "layer2.0.conv1": 16, "layer2.1.conv1": 8},
    "distiller.yaml": {
        "layer1.0.conv1": 16 - 6, "layer2.0.conv1": 32 - 13, "layer2.0.conv2": 16, "layer1.1.conv1": 12,
        "fc1.weight": (922, "70%"), "fc2.weight": (320, "50%"), "layer3.1.conv2.weight": (20736 - 14515, "1x8 70%"),
    },
    "mmrazor_flat.json": {"stem.0": 10, "layer1.0.conv1": 7},
    "mmrazor_mutator.json": {"layer1.0.conv1": 10, "layer3.1.conv1": 22},
    "mmrazor_mutables.yaml": {"layer3.1.conv1": 22},
    "torch_pruning_ratios.json": {"layer1.0.conv1": 8, "fc1": 48},
    "plain.yaml": {
        "layer1.0.conv1": 9, "layer1.1.conv1": 9, "layer3.1": 0, "layer3.0.conv1.weight": (1382, "90%"), "fc1": 1,
    },
    "plain.json": {"layer1.0.conv1": 9, "fc1": 32},
    "plain.csv": {"layer1.0.conv1": 9, "fc1": 32},
}  # fmt: skip

LISTED: Mapping[str, tuple[str, ...]] = {
    "spdy_profile.txt": ("line 4: layer9.0.conv1: the model has no such layer; did you mean 'layer",),
    "nni3.json": (
        "[7]: chooses layers by op_names_re ['layer3.*']: name them", "[8]: chooses layers by op_types ['Linear']",
        "[9]: gives sparse_threshold", "[10]: its ratio is of a global group", "[11]: is about _output_",
    ),
    "nni2.yaml": ("[3]: total_sparsity is of all its layers together", "[5]: chooses layers by op_types ['Conv2d']"),
    "distiller.yaml": (
        "pruners.levels.levels.*: is for all other weights",
        "pruners.sensitive: 'SensitivityPruner' does not say how much goes",
        "pruners.never: no policy of the schedule runs it",
    ),
    "mmrazor_flat.json": (
        "layer2.1.conv1: the file keeps 28 of 64 outputs, and it has 32", "is about the channels 0 to 24",
    ),
    "mmrazor_mutables.yaml": ("backbone.layers.0.0: is not LAYER_(START, END)_WIDTH", "blocks.0.middle_channels"),
    "torch_pruning_ratios.json": ("fc2: it stays as it is: it makes the model's output",),
    "plain.yaml": (
        "layer2.0.conv2: its layers go together and are asked for different things: layer2.0.conv2: "
        "layer2.0.conv2 wants 16 of 32; layer2.0.shortcut.0: layer2.0.shortcut.0 wants 24 of 32",
        "fc2: it stays as it is", "layer3.0.cnov1: the model has no such layer; did you mean 'layer3.0.conv1'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", MEANT)
def test_a_file_means_these_units_and_lists_the_rest(file: str) -> None:
    policy, laid = imported(file)
    got = {name: (unit.keep, unit.pattern) if unit.pattern else unit.keep for name, unit in policy.units.items()}
    assert got == MEANT[file]
    wanted = LISTED.get(file, ())
    assert len(laid.unmapped) == len(wanted), laid.unmapped
    for text in wanted:
        assert any(text in line for line in laid.unmapped), (text, laid.unmapped)
    assert policy.weights is None
    assert policy.evidence is None
    assert policy.model is not None
    assert policy.model.fingerprint == residual().fingerprint


def test_methods_of_imported_units() -> None:
    found = read_import(GOLDEN / "plain.yaml", Import("plain"))
    policy, _ = policy_of(found, residual(), method="l1", title="plain.yaml")
    methods = {name: unit.method for name, unit in policy.units.items()}
    assert methods["layer1.0.conv1"] == methods["fc1"] == "l1"
    assert methods["layer3.1"] == "drop"
    assert methods["layer3.0.conv1.weight"] == "magnitude"


def test_what_was_taken_for_what_is_told() -> None:
    assert any(
        "an entry without granularity is taken as out_channel" in note for note in imported("nni2.yaml")[1].notes
    )
    assert any("[3]: fc1: passed over: it is a Linear" in note for note in imported("nni3.json")[1].notes)
    notes = imported("plain.yaml")[1].notes
    assert any("fc1: 1 of 64 ffn stay (1 outputs) where 0.064 are asked for" not in note for note in notes)
    assert any("in dropped blocks, and gone with them: layer3.1.conv1" in note for note in notes)
    assert any("leaves whole: stem.0" in note for note in imported("mmrazor_mutator.json")[1].notes)


def test_plain_ratios_of_what_is_kept() -> None:
    found = read_import(GOLDEN / "plain.csv", Import("plain", ratio_is="kept"))
    assert keeps(mapped(found, residual(), method="l2")) == {"layer1.0.conv1": 7, "fc1": 32}
    with pytest.raises(ConfigError, match="--ratio-is kept: spdy says itself"):
        read_import(GOLDEN / "spdy_profile.txt", Import("spdy", ratio_is="kept"))


def test_two_lists_of_our_export_for_nni_2() -> None:
    content = {"l1_norm": [{"op_names": ["fc1"], "sparsity_per_layer": 0.5}],
               "level": [{"op_names": ["fc2"], "sparsity_per_layer": 0.5}]}  # fmt: skip
    found = importer("nni").read(json.dumps(content).encode(), name="config_list.json")
    assert keeps(mapped(found, residual(), method="l2")) == {"fc1": 32, "fc2.weight": 320}


# ---- Torch-Pruning, channel by channel -----------------------------------------------------------------------------


def test_a_history_that_torch_pruning_wrote_is_replayed_exactly() -> None:
    """`torch_pruning_history.json` is `pruning_history()` of three global steps by torch-pruning 1.6.1 on this network;
    `torch_pruning_kept.json` says, by norm (or layer), which of its channels were there afterwards.
    """
    policy, laid = imported("torch_pruning_history.json")
    truth = json.loads((GOLDEN / "torch_pruning_kept.json").read_text(encoding="utf-8"))
    assert not laid.unmapped
    assert set(policy.units) == set(laid.kept)
    seen = set()
    for group in residual().anatomy.groups:
        for member in group.members:
            if member.layer in truth and member.axis != "in":
                seen.add(group.root)
                assert laid.kept[group.root].tolist() == truth[member.layer]
                assert policy.units[group.root].keep == len(truth[member.layer])
    assert seen == set(policy.units)


@pytest.mark.parametrize("case", ["channels", "vit"])
def test_export_and_import_give_the_same_channels(case: str) -> None:
    resolved = resolved_case(case)
    content = TorchPruning().export(resolved).files["pruning.json"]
    found = importer("torch-pruning").read(content, name="pruning.json")
    laid = mapped(found, subject_for(case), method="l2")
    narrowed = {unit.name: unit for unit in resolved.units if unit.narrows}
    assert keeps(laid) == {name: unit.decision.keep for name, unit in narrowed.items()}
    for name, indices in laid.kept.items():
        assert tuple(indices.tolist()) == narrowed[name].kept
    assert laid.kept
    assert laid.unmapped == ()


@pytest.mark.parametrize(
    ("exporter", "file", "case", "lost"),
    [
        (NNI(), "config_list.json", "channels", set()),
        (NNI(), "config_list.json", "vit", set()),
        (NNI(), "config_list.json", "zeros", set()),
        (NNI2(), "config_list.json", "channels", set()),
        (NNI2(), "config_list.json", "zeros", set()),
        (MMRazor(), "fix_subnet.json", "channels", set()),
        (Distiller(), "schedule.yaml", "channels", {"fc1"}),  # it ranks outputs of convolutions alone
        (Distiller(), "schedule.yaml", "zeros", set()),
    ],
)
def test_other_exports_come_back_with_the_same_widths(exporter: Exporter, file: str, case: str, lost: set[str]) -> None:
    resolved = resolved_case(case)
    content = exporter.export(resolved).files[file]
    laid = mapped(importer(exporter.name.removesuffix("2")).read(content, name=file), subject_for(case), method="l2")
    assert laid.unmapped == ()
    assert keeps(laid) == {name: unit.keep for name, unit in resolved.policy.units.items() if name not in lost}


def test_an_export_for_spdy_comes_back_to_four_digits() -> None:
    resolved = resolved_case("zeros")
    found = importer("spdy").read(SPDY().export(resolved).files["profile.txt"], name="profile.txt")
    laid = mapped(found, subject_for("zeros"), method="l2")
    assert set(laid.units) == set(resolved.policy.units)
    for name, unit in resolved.policy.units.items():
        assert laid.units[name].keep / unit.of == pytest.approx(unit.keep / unit.of, abs=1e-4)


def exactly(layer: str, *removed: int, inputs: bool = False) -> Wanted:
    return Wanted(layer, Exactly(removed), "here", "inputs" if inputs else "outputs")


def test_later_steps_count_what_is_left() -> None:
    laid = asked(exactly("layer1.0.conv1", 0, 1), exactly("layer1.0.conv2", 0, inputs=True),
                 exactly("layer1.0.bn1", 12))  # fmt: skip
    assert laid.kept["layer1.0.conv1"].tolist() == [*range(3, 15)]
    assert keeps(laid) == {"layer1.0.conv1": 12}


def test_a_channel_of_a_grouped_convolution_goes_as_a_whole() -> None:
    laid = asked(exactly("blocks.0.spatial", 1, 5), subject=grouped())
    assert laid.kept["blocks.0.spatial"].tolist() == [0, 2, 3]
    laid = asked(exactly("blocks.0.spatial", 1), exactly("blocks.0.spatial", 0, 4), subject=grouped())
    assert laid.units == {}
    assert "a part of what can only go as a whole" in laid.unmapped[0]
    assert "a step before it could not be done" in laid.unmapped[1]


def test_inputs_of_two_units_are_told_apart() -> None:
    laid = asked(exactly("join", 1, 9, 10, inputs=True), subject=small(Joined))
    assert {name: indices.tolist() for name, indices in laid.kept.items()} == {
        "left": [0, 2, 3, 4, 5, 6, 7], "right": [0, 3, 4, 5, 6, 7],
    }  # fmt: skip
    laid = asked(Wanted("join", Share(0.5), "line 1", "inputs"), subject=small(Joined))
    (told,) = laid.unmapped
    assert told == "line 1: join: its inputs belong to several units (left, right), and which is meant is not said"


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([exactly("layer1.0.conv1", 16)], "channel 16 is to go, and 16 are left"),
        ([exactly("layer1.0.conv1", *range(16))], "none of its channels would stay"),
        ([exactly("fc2", 3)], "it stays as it is: it makes the model's output"),
        ([exactly("stem.0", 0, inputs=True)], "no unit narrows its inputs"),
    ],
)
def test_steps_that_cannot_be_done_leave_the_unit_alone(steps: list[Wanted], why: str) -> None:
    laid = asked(*steps)
    assert laid.units == {}
    assert why in laid.unmapped[0]


def test_exact_channels_and_another_width_are_a_conflict() -> None:
    laid = asked(exactly("layer1.0.conv1", 0), Wanted("layer1.0.conv1", Share(0.5), "line 2"))
    assert laid.units == {}
    assert laid.kept == {}
    assert "line 2: layer1.0.conv1 wants 8 of 16; here: layer1.0.conv1 wants 15 of 16" in laid.unmapped[0]


# ---- names and widths ----------------------------------------------------------------------------------------------


def test_prefixes_are_taken_off_where_the_model_has_the_rest() -> None:
    for name in ("module.fc1", "backbone.fc1", "module.model.fc1", "_orig_mod.fc1.weight"):
        assert keeps(asked(Wanted(name, Share(0.5), "here"))) == {"fc1": 32}
    assert "no such layer" in asked(Wanted("encoder.fc1", Share(0.5), "here")).unmapped[0]


def test_a_layer_whose_own_name_begins_like_a_prefix() -> None:
    subject = small(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)))
    assert keeps(asked(Wanted("module.0", Share(0.5), "here"), subject=subject)) == {"0": 4}


def test_outputs_of_grouped_convolutions_round_to_whole_channels() -> None:
    laid = asked(Wanted("blocks.0.spatial", Count(3, 8), "here"), subject=grouped())
    assert keeps(laid) == {"blocks.0.spatial": 2}
    assert laid.notes == ("here: blocks.0.spatial: 2 of 4 channels stay (4 outputs) where 3 are asked for",)


def test_runs_of_outputs_are_heads() -> None:
    entry = {"op_names": ["layers.0.attention.query"], "sparse_ratio": 0.5, "granularity": [8, -1]}
    found = importer("nni").read(json.dumps([entry]).encode(), name="config.json")
    laid = mapped(found, subject_for("vit"), method="l2")
    assert keeps(laid) == {"layers.0.attention.query": 2}


def test_layers_that_agree_make_one_decision() -> None:
    laid = asked(Wanted("stem.0", Share(0.5), "line 1"), Wanted("layer1.0.conv2", Count(8, 16), "line 2"))
    assert keeps(laid) == {"stem.0": 8}
    assert laid.unmapped == ()


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (Wanted("relu", Share(0.5), "here"), "no unit narrows its outputs"),
        (Wanted("fc1.bias", Share(0.5), "here"), "is a tensor, and not a layer's weight"),
        (Wanted("fc1", Dropped(), "here"), "is no block that can be dropped; "),
        (Wanted("layer1.0.bn1", Zeros("50%"), "here"), "zeros inside it are not possible"),
        (Wanted("stem.0", Zeros("50%", parts=100), "here"), "in each of 100 parts is no pattern such as 2:4 here"),
        (Wanted("fc1", Zeros("4x1 50%"), "here", dims=4), "meant for weights of 4 dimensions, and this is a Linear"),
        (Wanted("fc1", Count(10, 20), "here"), "the file keeps 10 of 20 outputs, and it has 64"),
        (Wanted("", Share(0.5), "here"), "no such layer"),
    ],
)
def test_what_fits_nothing_is_listed_with_the_reason(wanted: Wanted, why: str) -> None:
    laid = asked(wanted)
    assert laid.units == {}
    assert why in laid.unmapped[0]


def test_many_unknown_names_take_no_long_time() -> None:
    laid = asked(*(Wanted(f"layer{index}.{'x' * 250}", Share(0.5), f"line {index}") for index in range(5000)))
    assert len(laid.unmapped) == 5000


# ---- files ---------------------------------------------------------------------------------------------------------


def test_the_policy_and_its_side_file(tmp_path: Path) -> None:
    path = GOLDEN / "torch_pruning_history.json"
    found = read_import(path, Import("torch-pruning"))
    output = tmp_path / "policy.yaml"
    record = write_import(found, residual(), Import("torch-pruning"), output=output, title=str(path))
    policy = read_policy(output)
    assert record.units == len(policy.units) == 10
    assert record.written == str(output)
    assert policy.weights == "policy.kept.safetensors"
    side = tmp_path / policy.weights
    assert hashlib.sha256(side.read_bytes()).hexdigest() == policy.weights_sha256
    tensors = load_file(side)
    assert {name.removeprefix("kept/") for name in tensors} == set(policy.units)
    for name, unit in policy.units.items():
        assert tensors[f"kept/{name}"].dtype == torch.int64
        assert len(tensors[f"kept/{name}"]) == unit.keep


def test_a_transferred_import_keeps_the_channels_of_the_file(tmp_path: Path) -> None:
    found = read_import(GOLDEN / "torch_pruning_history.json", Import("torch-pruning"))
    write_import(found, residual(), Import("torch-pruning"), output=tmp_path / "imported.yaml", title="history.json")
    path = transfer(tmp_path / "imported.yaml", residual(), tmp_path / "whole", refit=False, progress=Silent())
    truth = mapped(found, residual(), method="l2").kept
    applied = apply(path, residual())
    assert {name: kept.tolist() for name, kept in applied.plan.units.items()} == {
        name: kept.tolist() for name, kept in truth.items()
    }


def test_no_side_file_where_no_channels_are_named(tmp_path: Path) -> None:
    found = read_import(GOLDEN / "plain.json", Import("plain"))
    write_import(found, residual(), Import("plain"), output=tmp_path / "policy.yaml", title="plain.json")
    assert [path.name for path in tmp_path.iterdir()] == ["policy.yaml"]
    assert read_policy(tmp_path / "policy.yaml").weights is None


def test_nothing_mapped_is_refused_and_nothing_written(tmp_path: Path) -> None:
    found = Plain().read(b"encoder.0: 0.5\nfc2: 0.5\n", name="ratios.yaml")
    with pytest.raises(PolicyError, match=r"ratios.yaml: nothing in it narrows a unit of 'Residual':\n  - encoder.0"):
        write_import(found, residual(), Import("plain"), output=tmp_path / "policy.yaml", title="ratios.yaml")
    with pytest.raises(ConfigError, match="unknown method"):
        write_import(found, residual(), Import("plain", "l3"), output=tmp_path / "policy.yaml", title="ratios.yaml")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PolicyError, match="it asks for nothing"):
        policy_of(Found(()), residual(), method="l2", title="empty.yaml")


def test_unknown_tools_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'mmrazor'"):
        read_import(tmp_path / "a.json", Import("mrazor"))
    with pytest.raises(PolicyError, match=r"a.json: cannot be read: there is no such file"):
        read_import(tmp_path / "a.json", Import("nni"))
    with pytest.raises(PolicyError, match="is a folder"):
        read_import(tmp_path, Import("nni"))


def test_every_importer_says_what_it_reads() -> None:
    for name in IMPORTERS:
        found = importer(name)
        assert found.name == name
        assert found.about


DAMAGE = [
    ("spdy", b"0.5 conv1\nmany words here\n1.5 conv2\n", r"line 2: given 'many words here', .*\n.*line 3: given '1.5'"),
    ("spdy", b"nan conv1\n", "line 1: given 'nan', allowed: a share"),
    ("spdy", b"1_0 conv1\n", "given '1_0'"),
    ("spdy", b"0.5 " + b"x" * 400, "allowed: the name of a layer"),
    ("nni", b"{}", "the file: given a mapping, allowed: a config list"),
    ("nni", b'[{"op_names": "fc1", "sparsity": 0.5}]', r"\[0\].op_names: given 'fc1', allowed: a list"),
    ("nni", b'[{"op_names": ["fc1"], "sparsity": 1e400}]', r"\[0\].sparsity: given inf"),
    ("nni", b'[{"op_names": ["fc1"], "sparsity": 0.5, "total_sparsity": 0.5}]', "allowed: one of them"),
    ("nni", b'[{"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": [1], "internal_metric_block": -1}]', "-1"),
    ("distiller", b"pruners: 3", "pruners: given 3"),
    ("distiller", b"pruners: {a: &x {class: AutomatedGradualPruner}, b: *x}", "aliases"),
    ("distiller", b"pruners: {a: {class: AutomatedGradualPruner, weights: w}}", "final_sparsity: given nothing"),
    ("distiller", b"pruners: {a: {class: !!python/object:os.system ls}}", "tag"),
    ("mmrazor", b'{"a_(0, 16)_16": 17}', "given 17, allowed: a number of channels such as 28, or a share"),
    ("mmrazor", b'{"a_(0, 16)_16": 1.5}', "given 1.5"),
    ("mmrazor", b'{"a_(0, 16)_16": true}', "given True"),
    ("mmrazor", b'{"a_(0, 16)_16": {"choice": 3, "chosen": 4}}', "one `choice` or `chosen`"),
    (
        "torch-pruning",
        b'[["fc1", true, [0, 0]]]',
        r"pruning_history\[0\]\[2\]: given \[0, 0\], allowed: a list of diff",
    ),
    ("torch-pruning", b'[["fc1", 1, [0]]]', r"pruning_history\[0\]: .* allowed: \[module name, whether outputs go"),
    ("torch-pruning", b'[["fc1", true, [-1]]]', "given"),
    ("torch-pruning", b"[[[" * 40_000, "nested deeper than 50 levels"),
    ("torch-pruning", b'[["fc1", true, [' + b"9" * 5000 + b"]]]", "a number of 5000 digits"),
    ("torch-pruning", b'{"pruning_ratio_dict": {"fc1": NaN}}', "NaN is given"),
    ("torch-pruning", b'{"pruning_history": [], "pruning_history": []}', "the key 'pruning_history' is given twice"),
    ("torch-pruning", b'{"pruning_ratio_dict": {"\\ud800": 0.5}}', "lone surrogate"),
    ("torch-pruning", pickle.dumps([("fc1", True, [0])]), "load it with the tool that wrote it and write .* as JSON"),
    ("plain", b"PK\x03\x04rest of a .pth", "torch.save"),
    ("plain", b"a: 42\n", "a: given 42, allowed: a share such as 0.42 or 42%, 0 or more and not above 1"),
    ("plain", b"- a\n- b\n", "the file: .* allowed: a mapping of layers to ratios"),
    ("plain", b"\xff\xfe", "is not UTF-8 text"),
    ("plain", b"a: 0.5\na: 0.6\n", "line 2"),
    ("plain", b'{"\\u001b[2J": 5}', r"'\\x1b\[2J': given 5"),
    ("plain", b"x" * 10_000_001, "is larger than 10 MB"),
]


@pytest.mark.parametrize(("tool", "content", "message"), DAMAGE)
def test_damage_is_told_with_the_file_and_the_place(tool: str, content: bytes, message: str) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        importer(tool).read(content, name="the-file")
    assert str(caught.value).startswith("the-file")
    assert len(str(caught.value)) < 5000


def test_damaged_tables_of_ratios() -> None:
    for content, message in ((b"a,b\nfc1,0.5\n", "line 1: given 'a,b', allowed: a first row"),
                             (b"layer,ratio\nfc1\n", "line 2: given 'fc1'"),
                             (b'layer,ratio\n"fc1"x,0.5\n', "line 2: is not CSV"),
                             (b"", "allowed: a first row"),
                             (b"layer,ratio\n" + b"x" * 200_000 + b",0.5\n", "field larger")):  # fmt: skip
        with pytest.raises(PolicyError, match=message):
            Plain().read(content, name="ratios.csv")


# ---- tables of times -----------------------------------------------------------------------------------------------


def test_times_of_spdy_and_of_tables() -> None:
    times = read_times((GOLDEN / "spdy_timings.txt").read_bytes(), name="timings.txt")
    assert times.base_ms == pytest.approx(160.36389 - 155.93015)
    assert times.times["conv1"] == pytest.approx({0.0: 18.549, 0.4: 17.383})
    assert times.times["layer1.0.conv1"] == pytest.approx({0.0: 5.746, 0.4: 11.302, 0.6753: 6.843})
    table = read_times((GOLDEN / "times.csv").read_bytes(), name="times.csv")
    assert table == UnitTimes(0.42, {"stem.0": {16: 1.83, 8: 1.02}, "layer1.0": {1: 2.5, 0: 0.0}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"unit,keep,ms\nstem.0,16,1\n", "the file: given nothing, allowed: a row `base,,MS`"),
        (b"unit,keep,ms\nbase,,1\n", "allowed: times of at least one unit"),
        (b"unit,keep,ms\nbase,,1\nbase,,2\nstem.0,8,1\n", "line 3: given 'base,,2', allowed: one row"),
        (b"unit,keep,ms\nbase,,1\nstem.0,8,1\nstem.0,8,2\n", "line 4: given 'stem.0 at 8 again'"),
        (b"unit,keep,ms\nbase,,1\nstem.0,0.5,1\n", "line 3: given '0.5', allowed: a whole number"),
        (b"unit,keep,ms\nbase,,1\nstem.0,8,-1\n", "line 3: given '-1', allowed: a time"),
        (b"unit,keep,ms\nbase,,inf\nstem.0,8,5%\n", "line 2: given 'inf', .*\n.*line 3: given '5%'"),
        (b"unit,keep,ms\nstem.0,8\n", "line 2: given 'stem.0,8'"),
        (b"unit,keep\n", "line 1: given 'unit,keep', allowed: a first row"),
        (b"base\n0.1\nprunable\n0.2\nconv1\n0.1 0.0\n", "prunable: given 0.2, allowed: no more than the whole, 0.1"),
        (b"base\n0.1\nconv1\n", "line 3: given 'conv1', allowed: 'prunable'"),
        (b"base\n0.1\nprunable\n0.1\n0.1 0.0\n", "line 5"),
        (b"base\n0.1\nprunable\n0.1\nconv1\n0.1 0.0\n0.2 0.0\n", "line 7: given 'conv1 at 0.0 again'"),
        (b"base\n0.1\nprunable\n0.1\nconv1\n0.1 0.0\nconv1\n", "line 7: given 'conv1', allowed: every layer once"),
    ],
)
def test_damaged_times(content: bytes, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        read_times(content, name="times")


# ---- anything at all -----------------------------------------------------------------------------------------------

WORDS = """
op_names op_types sparse_ratio sparsity total_sparsity granularity target_settings target_names weight exclude fc1
stem.0 config_list pruners policies class group_type weights desired_sparsity final_sparsity levels kwargs block_shape
Filters channel_unit_cfg units choice chosen init_args choice_mode pruning_history pruning_ratio_dict
module.fc1.weight Blocks out_channel internal_metric_block AutomatedGradualPruner SparsityLevelParameterPruner
L1RankedStructureParameterPruner
"""
KEYS = st.sampled_from([*WORDS.split(), "stem.0_(0, 16)_16"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([0, 1, 0.5, 8]) | KEYS | st.text()
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)
EDITS = st.tuples(st.sampled_from(sorted(TOOLS)), st.integers(0, 10_000), st.integers(0, 40), st.binary(max_size=12))


def survives(tool: str, content: bytes, name: str) -> None:
    """Found or PolicyError that names the file, and what is found can be laid over a model."""
    told = name
    try:
        found = importer(tool).read(content, name=name)
        policy_of(found, residual(), method="l2", title=name)
    except PolicyError as error:
        told = str(error)
    assert name in told


@pytest.mark.parametrize("tool", sorted(IMPORTERS))
@given(content=st.binary(max_size=300), name=st.sampled_from(["a.json", "a.yaml", "a.csv", "a"]))
@settings(max_examples=40, deadline=1000)
def test_any_bytes(tool: str, content: bytes, name: str) -> None:
    survives(tool, content, name)


@pytest.mark.parametrize("tool", sorted(IMPORTERS))
@given(tree=TREES)
@settings(max_examples=60, deadline=1000)
def test_any_tree_of_known_words(tool: str, tree: object) -> None:
    survives(tool, json.dumps(tree).encode(), "a.json")


@given(edit=EDITS)
@settings(max_examples=120, deadline=1000)
def test_any_edit_of_a_real_file(edit: tuple[str, int, int, bytes]) -> None:
    file, place, length, new = edit
    content = (GOLDEN / file).read_bytes()
    place %= len(content)
    survives(TOOLS[file], content[:place] + new + content[place + length :], file)


@given(content=st.binary(max_size=200) | st.builds(lambda rest: b"unit,keep,ms\nbase,,1\n" + rest, st.binary())
       | st.builds(lambda rest: b"base\n1\nprunable\n1\n" + rest, st.binary()))  # fmt: skip
@settings(max_examples=100, deadline=1000)
def test_any_table_of_times(content: bytes) -> None:
    told = "times"
    try:
        assert read_times(content, name="times").times
    except PolicyError as error:
        told = str(error)
    assert "times" in told
