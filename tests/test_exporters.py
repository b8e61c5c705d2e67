"""What exporters have in common: the contract, reports that leave nothing out, lossy exports that must be allowed."""

import json
from pathlib import Path

import pytest
from resolved_policies import resolved_case, written_case
from typer.testing import CliRunner

from autoprune import cli
from autoprune.errors import ConfigError, LossyError, PolicyError
from autoprune.exporters import EXPORTERS, exporter
from autoprune.exporters.base import EXACT, Fidelity, Grade, Remark, Resolved, approximated, dropped, lines_of
from autoprune.exporting import FIDELITY, write_export
from autoprune.testing import ExporterContract, example_resolved

CHECKS = sorted(name for name in vars(ExporterContract) if name.startswith("test_"))
OTHERS = {"evopress": "llm", "onnx": "plain"}
"""Exporters for which the contract's example is no model that they take."""
NO_HEADS = {
    "llm-compressor": "nothing of this policy is zeros or integers",
    "aimet": "no channels lie between just two convolutions",
    "tfmot": "has no zeros inside layers",
    "distiller": "prunes filters and weights",
}
"""Exporters whose formats have nothing for heads and features, and what they say."""
NO_COMMENTS = ("spdy", "mmrazor")
"""Formats that have no place for who wrote a file."""
NETWORKS = Path(__file__).parent / "tools" / "networks"
runner = CliRunner()


@pytest.mark.parametrize("name", EXPORTERS)
@pytest.mark.parametrize("check", CHECKS)
def test_the_contract(name: str, check: str) -> None:
    class Tested(ExporterContract):
        def make(self) -> object:  # type: ignore[override]
            return exporter(name)

        def example(self, *units: str) -> Resolved:
            return resolved_case(OTHERS[name]) if name in OTHERS else example_resolved(*units)

    getattr(Tested(), check)()


@pytest.mark.parametrize("name", EXPORTERS)
@pytest.mark.parametrize("case", ["mixed", "vit"])
def test_every_aspect_is_graded_and_every_file_says_who_wrote_it(name: str, case: str, tmp_path: Path) -> None:
    laid, chosen = resolved_case(case), exporter(name)
    if case == "vit" and name in NO_HEADS:
        with pytest.raises(PolicyError, match=NO_HEADS[name]):
            write_export(laid, chosen, tmp_path, allow_lossy=True)
        return
    record = write_export(laid, chosen, tmp_path, allow_lossy=True)
    told = [(remark.unit, remark.aspect) for remark in record.remarks]
    assert sorted(told) == sorted(laid.aspects)
    report = json.loads((tmp_path / FIDELITY).read_text(encoding="utf-8"))
    assert report["tested_with"] == ", ".join(chosen.tested)
    assert report["lossy"] == any(remark.level != "exact" for remark in record.remarks)
    for path in record.files.values():
        assert Path(path).stat().st_size > 0
    signed = [name for name, path in record.files.items() if b"autoprune" in Path(path).read_bytes()]
    least = 1 if name in NO_COMMENTS else 2
    assert len(signed) >= least, f"the report and a file of the tool's own say who wrote them, not only {signed}"


def test_what_is_lost_must_be_allowed(tmp_path: Path) -> None:
    with pytest.raises(LossyError) as error:
        write_export(resolved_case("mixed"), exporter("torch-pruning"), tmp_path / "out", allow_lossy=False)
    told = str(error.value)
    assert "dropped: that a block is dropped (1 unit: layer1.1)" in told
    assert "--allow-lossy" in told
    assert not (tmp_path / "out").exists()
    whole = write_export(resolved_case("channels"), exporter("torch-pruning"), tmp_path / "out", allow_lossy=False)
    assert not whole.lossy


def test_the_command_writes_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written_case("plain", tmp_path)
    flags = [f"--model={NETWORKS / 'plain.py'}:model", "--example", "1,3,8,8"]
    done = runner.invoke(cli.app, ["export", "policy.yaml", "--to", "torch-pruning", "--json", *flags])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])["export"]
    assert set(told["files"]) == {"pruning.json", "load.py", FIDELITY}
    assert (tmp_path / "exported" / "torch-pruning" / "pruning.json").is_file()
    refused = runner.invoke(cli.app, ["export", "policy.yaml", "--to", "spdi", *flags])
    assert refused.exit_code == 2
    assert "did you mean 'spdy'" in refused.output


def test_unknown_exporters_list_all() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'modelopt'"):
        exporter("modelop")


def test_lines_name_aspect_units_and_reason() -> None:
    remarks = [Remark(f"u{place}", "width", dropped("no reason")) for place in range(5)]
    report = Fidelity((*remarks, Remark("u0", "channels", EXACT), Remark("model", "weights", approximated("near"))))
    assert lines_of(report, levels=("dropped", "approximated", "exact")) == [
        "dropped: how many channels, heads or features stay (5 units: u0, u1, u2, ...): no reason",
        "approximated: the values of the weights that stay, where they were mended: near",
        "exact: which of them stay (1 unit: u0)",
    ]
    assert report.lossy
    for wrong in (("exact", "why"), ("dropped", "")):
        with pytest.raises(ValueError, match="reason"):
            Grade(*wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["plain", "mended", "zeros", "mixed", "llm-channels"])
def test_masks_count_what_the_cut_model_has(case: str) -> None:
    """As many weights count in the dense shape as the cut layer has, or has that are not zero."""
    laid = resolved_case(case)
    there = dict(laid.model.named_parameters())
    checked = 0
    for name, layer in laid.layers.items():
        if layer.gone or layer.weight not in there:
            continue
        weight = there[layer.weight]
        sparse = layer.decision is not None and layer.decision.pattern
        wanted = int((weight != 0).sum()) if sparse else weight.numel()
        assert int(laid.mask(name).sum()) == wanted, name
        checked += 1
    assert checked > 3
