"""A policy on weights that it was not made for: refused, or laid on them anew by its methods."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from records import policy as golden
from resolved_policies import applied_case, bare_policy, network_of, subject_for, written_case
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from autoprune import cli
from autoprune.apply import apply
from autoprune.core.policy import Policy, UnitDecision
from autoprune.errors import PolicyError
from autoprune.evidence import model_identity
from autoprune.files import read_policy, write_policy
from autoprune.merging import merge_files
from autoprune.progress import Silent
from autoprune.subject import Subject, subject_of
from autoprune.transfer import transfer

runner = CliRunner()


def retrained(name: str) -> Subject:
    """The same architecture with other weights."""
    model = network_of(name).model()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(len(parameter), generator=generator).view(-1, *(1,) * (parameter.ndim - 1)) + 0.1)
    return subject_of(replace(subject_for(name).task, model=model), Silent())


def naive_l2(model: nn.Module, layer: str, keep: int) -> list[int]:
    """The rows of largest norm of a layer that nothing else is coupled with."""
    norms = model.get_submodule(layer).get_parameter("weight").detach().flatten(1).double().norm(dim=1)
    return sorted(norms.argsort(descending=True)[:keep].tolist())


def test_channels_are_chosen_anew_on_the_new_weights(tmp_path: Path) -> None:
    path = written_case("plain", tmp_path / "first")
    subject = retrained("plain")
    with pytest.raises(PolicyError, match=r"other weights.*--transfer"):
        apply(path, subject)
    moved = transfer(path, subject, tmp_path / "second", refit=False, progress=Silent())
    applied = apply(moved, subject)
    before, after = applied_case("plain").plan.units, applied.plan.units
    unit = applied.policy.units["fc1"]
    assert after["fc1"].tolist() == naive_l2(subject.model, "fc1", unit.keep)
    assert before["fc1"].tolist() == naive_l2(subject_for("plain").model, "fc1", unit.keep)
    assert after["fc1"].tolist() != before["fc1"].tolist()
    assert read_policy(moved).units == read_policy(path).units
    assert read_policy(moved).model == model_identity(subject)


def test_evidence_is_another_models_until_verified(tmp_path: Path) -> None:
    subject = retrained("plain")
    draft = bare_policy("plain").model_copy(update={"evidence": golden().evidence, "budget": {"macs": "99%macs"}})
    write_policy(tmp_path / "draft.yaml", draft)
    moved = transfer(tmp_path / "draft.yaml", subject, tmp_path, refit=False, progress=Silent())
    evidence = read_policy(moved).evidence
    assert evidence is not None
    assert not evidence.verified
    assert evidence.pruned == draft.evidence.pruned if draft.evidence else False
    shown = runner.invoke(cli.app, ["show", str(moved)])
    assert "not measured on this model: run `autoprune verify`" in " ".join(shown.output.split())


def test_a_refit_is_kept_only_where_it_helps(tmp_path: Path) -> None:
    """On selection data the refitted model is no further from the dense one than the plain cut."""
    subject = retrained("channels")
    write_policy(tmp_path / "draft.yaml", bare_policy("channels"))
    errors = []
    for refit in (False, True):
        moved = transfer(tmp_path / "draft.yaml", subject, tmp_path / str(refit), refit=refit, progress=Silent())
        model, inputs = apply(moved, subject).model, subject.parts.selection.inputs
        with torch.no_grad():
            dense, found = subject.model(inputs).log_softmax(1), model(inputs).log_softmax(1)
        errors.append(float((dense.exp() * (dense - found)).sum(1).mean()))
    assert errors[1] < errors[0]


def test_exact_channels_stay_where_they_are_for_these_weights(tmp_path: Path) -> None:
    """Those of a merged policy: its side file has no values, and the channels it names are not the method's own."""
    path, subject = written_case("plain", tmp_path), subject_for("plain")
    whole = read_policy(path)
    merge_files([path], tmp_path / "bare.yaml")
    bare = read_policy(tmp_path / "bare.yaml")
    assert all(name.startswith("kept/") for name in load_file(tmp_path / str(bare.weights)))
    random = {name: unit.model_copy(update={"method": "random"}) for name, unit in whole.units.items()}
    write_policy(tmp_path / "bare.yaml", bare.model_copy(update={"units": random}))
    moved = transfer(tmp_path / "bare.yaml", subject, tmp_path / "moved", refit=False, progress=Silent())
    assert kept_of(apply(moved, subject).plan.units) == kept_of(applied_case("plain").plan.units)
    other = retrained("plain")
    elsewhere = transfer(tmp_path / "bare.yaml", other, tmp_path / "other", refit=False, progress=Silent())
    assert kept_of(apply(elsewhere, other).plan.units) != kept_of(applied_case("plain").plan.units)


def kept_of(units: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: indices.tolist() for name, indices in units.items()}


@pytest.mark.parametrize(
    ("units", "told"),
    [
        ({"fc9": UnitDecision(kind="channels", method="l2", keep=3, of=40)}, "no such unit; did you mean 'fc1'"),
        ({"fc1": UnitDecision(kind="channels", method="l2", keep=3, of=41)}, "channels of 41, the model has ffn of 40"),
    ],
)
def test_units_that_the_model_has_not_are_told(tmp_path: Path, units: dict[str, UnitDecision], told: str) -> None:
    write_policy(tmp_path / "policy.yaml", Policy(units=units))
    with pytest.raises(PolicyError, match=told):
        transfer(tmp_path / "policy.yaml", subject_for("plain"), tmp_path / "out", refit=False, progress=Silent())
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_policy(tmp_path / "policy.yaml", bare_policy("plain"))
    with pytest.raises(PolicyError, match="layers have other names or shapes"):
        transfer(tmp_path / "policy.yaml", subject_for("channels"), tmp_path / "out", refit=False, progress=Silent())


def test_on_the_command_line_and_verified_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An imported policy, without a model and without weights: applied, and measured."""
    monkeypatch.chdir(tmp_path)
    draft = Policy(units=bare_policy("plain").units, budget={"macs": "90%macs"})
    write_policy(tmp_path / "draft.yaml", draft)
    network = Path(network_of("plain").__file__ or "")
    flags = ["--model", f"{network}:model", "--data", f"{network}:data"]
    refused = runner.invoke(cli.app, ["apply", "draft.yaml", *flags])
    assert refused.exit_code == 2
    assert "--transfer" in refused.output
    done = runner.invoke(cli.app, ["apply", "draft.yaml", "--transfer", "-o", "out", "--json", *flags])
    assert done.exit_code == 0, done.output
    written = json.loads(done.output.splitlines()[-1])["written"]
    assert {"policy", "onnx", "rebuild script"} <= set(written)
    measured = runner.invoke(cli.app, ["verify", written["policy"], "--json", *flags])
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.output.splitlines()[-1])["verify"]["met"]
