"""Models that no function of the user's returns: texts, .pt2 archives, Hugging Face folders, and what is refused."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import Residual, Vgg, randomised
from torch import Tensor, nn
from typer.testing import CliRunner

from autoprune.cli import app
from autoprune.config import Config
from autoprune.errors import ModelError
from autoprune.loading import load_model
from autoprune.model.cut import cut, plan_cut
from autoprune.model.discover import Anatomy, discover
from autoprune.origin import copy_origin
from autoprune.source import Source, anchored, parse_source
from autoprune.sources.exported import from_program
from autoprune.sources.refusal import RefusedError
from autoprune.sources.reshape import REST, SAME, flexible

FREE = ({0: torch.export.Dim.AUTO},)


class Attention(nn.Module):
    """Patches, one fused projection whose heads are numbers in the code, a feed-forward layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.first.expand(y.shape[0], -1, -1), y], 1)
        q, k, v = self.qkv(self.norm(y)).view(y.shape[0], y.shape[1], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = y + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((y + self.down(nn.functional.gelu(self.up(y)))).mean(1))


class Words(nn.Module):
    """An embedding whose weights make the output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        return self.out(x + self.down(torch.relu(self.up(x))))


def exported(model: nn.Module, example: Tensor, path: Path, *, free: bool = True, aten: bool = False) -> Path:
    program = torch.export.export(model, (example,), dynamic_shapes=FREE if free else None)
    torch.export.save(program.run_decompositions() if aten else program, path)
    return path


def images(count: int = 2, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def halved(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    """Every second channel of every group gone."""
    kept = {group.root: torch.arange(0, group.width, 2) for group in anatomy.groups}
    return cut(model, plan_cut(anatomy.widths, anatomy.groups, kept=kept, dropped=()))


def test_texts() -> None:
    assert parse_source("timm:resnet18.a1_in1k") == Source("timm", "resnet18.a1_in1k")
    wanted = (("num_classes", 10), ("drop_rate", 0.5), ("pretrained", False), ("act_layer", "gelu"))
    text = "torchvision:vit_b_16?num_classes=10&drop_rate=0.5&pretrained=false&act_layer=gelu"
    assert parse_source(text) == Source("torchvision", "vit_b_16", wanted)
    assert parse_source("hf:some/folder") == Source("hf", "some/folder")
    assert parse_source("a/b.onnx").kind == "onnx"
    assert parse_source("a/b.pt2").kind == "export"
    assert parse_source("net.py:model").kind == parse_source("package.net:model").kind == "function"


@pytest.mark.parametrize("text", ["timm:", "hf:", "resnet18", "model.pt", "timm:a?b", "timm:a?b=1&b=2", "timm:a b"])
def test_texts_that_name_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: "):
        parse_source(text)


def test_paths_are_anchored() -> None:
    for text in ("hf:folder", "net.onnx", "net.pt2", "net.py:model"):
        assert str(Path("/here")) in anchored(text, Path("/here"))
        assert parse_source(anchored(text, Path("/here"))).kind == parse_source(text).kind
    assert anchored("timm:resnet18", Path("/here")) == "timm:resnet18"


def test_reshapes_keep_as_few_numbers_as_can_be() -> None:
    assert flexible(["s0", 4, 6], ["s0", 24]) == [SAME, REST]
    assert flexible([2, 17, 96], [2, 17, 3, 4, 8]) == [SAME, SAME, 3, 4, 8]
    assert flexible(["s0", 6], ["2*s0", 3]) == [REST, 3]
    assert flexible(["s0", "s1"], ["s1", "s0"]) is None


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "residual": (Residual, images()),
    "vgg": (Vgg, images()),
    "attention": (Attention, images()),
}


@pytest.mark.parametrize("aten", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_program_is_the_model_that_was_exported(tmp_path: Path, name: str, aten: bool) -> None:
    make, example = MODELS[name]
    torch.manual_seed(0)
    model = randomised(make())
    read = from_program(exported(model, example, tmp_path / "model.pt2", aten=aten))
    more = images(5)
    assert torch.allclose(read(more), model(more), atol=1e-5)
    shapes = [{key: tensor.shape for key, tensor in each.state_dict().items()} for each in (read, model)]
    assert aten or shapes[0] == shapes[1]
    before, after = discover(model, example), discover(read, example)
    units = {(unit.name, unit.kind, unit.width) for unit in before.units}
    found = {(unit.name, unit.kind, unit.width) for unit in after.units}
    assert aten or units <= found
    same = {group.root for group in before.groups} & {group.root for group in after.groups}
    both = [
        Anatomy(a.units, tuple(g for g in a.groups if g.root in same), a.blocks, (), a.architecture, a.widths)
        for a in (before, after)
    ]
    assert same or aten  # decomposed, a layer on three dimensions has its product's name
    assert torch.allclose(halved(read, both[1])(more), halved(model, both[0])(more), atol=1e-5)


def test_heads_that_are_numbers_in_the_code_can_be_cut(tmp_path: Path) -> None:
    model = randomised(Attention())
    read = from_program(exported(model, images(), tmp_path / "model.pt2"))
    unit = next(unit for unit in discover(read, images()).units if unit.name == "qkv")
    assert unit.width == 4


def test_shared_weights_stay_shared(tmp_path: Path) -> None:
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    read = from_program(exported(Words().eval(), tokens, tmp_path / "words.pt2"))
    assert read.get_parameter("words.weight") is read.get_parameter("out.weight")
    assert [unit.name for unit in discover(read, tokens).units] == ["up", "down"]


def test_a_program_of_one_batch_is_refused(tmp_path: Path) -> None:
    path = exported(Attention().eval(), images(), tmp_path / "model.pt2", free=False)
    with pytest.raises(RefusedError, match=r"a batch of 2 alone; .*dynamic_shapes"):
        from_program(path)


def test_a_program_in_training_is_refused(tmp_path: Path) -> None:
    path = exported(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5)).train(), images(), tmp_path / "m.pt2"
    )
    with pytest.raises(RefusedError, match="training mode"):
        from_program(path)


def test_no_archive(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(RefusedError, match=r"is no torch\.export archive"):
        from_program(tmp_path / "model.pt2")
    config = Config.model_validate({"model": "absent.pt2", "data": "net.py:data"})
    with pytest.raises(ModelError, match=r"model: there is no file .*absent\.pt2"):
        load_model(config, folder=tmp_path)


class Touch:
    """Unpickling one writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def changed(path: Path, change: Callable[[str, bytes], bytes], *, more: dict[str, bytes] | None = None) -> Path:
    """A copy of an archive whose members went through `change`."""
    copy = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in (more or {}).items():
            new.writestr(f"{old.namelist()[0].partition('/')[0]}/{name}", content)
    return copy


def test_pickles_of_an_archive_are_not_run(tmp_path: Path) -> None:
    path = exported(randomised(Vgg()), images(), tmp_path / "model.pt2")
    trap = tmp_path / "trap"
    buffer = io.BytesIO()
    torch.save((Touch(trap),), buffer)

    def sample(name: str, content: bytes) -> bytes:
        return buffer.getvalue() if "sample_inputs" in name else content

    def weight(name: str, content: bytes) -> bytes:
        return content.replace(b'"use_pickle": false', b'"use_pickle": true') if "weights_config" in name else content

    with pytest.raises(RefusedError):
        from_program(changed(path, sample))
    with pytest.raises(RefusedError, match="a pickled object"):
        from_program(changed(path, weight))
    with pytest.raises(RefusedError, match="code, or an object"):
        from_program(changed(path, lambda _, c: c, more={"data/constants/custom_obj_0": pickle.dumps(Touch(trap))}))
    assert not trap.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("old", "new"),
    [("expr_str", "__import__('os').system('true')"), ("expr_str", "eval(1)"), ("target", "torch.load")],
)
def test_texts_of_an_archive_are_not_evaluated(tmp_path: Path, old: str, new: str) -> None:
    path = exported(randomised(Vgg()), images(), tmp_path / "model.pt2")

    def replaced(content: object) -> object:
        if isinstance(content, list):
            return [replaced(item) for item in content]
        if isinstance(content, dict):
            return {
                key: new if key == old and isinstance(item, str) else replaced(item) for key, item in content.items()
            }
        return content

    def change(name: str, content: bytes) -> bytes:
        return json.dumps(replaced(json.loads(content))).encode() if name.endswith("models/model.json") else content

    with pytest.raises(RefusedError, match="more than tensors and operations"):
        from_program(changed(path, change))


def rebuilt(folder: Path, factory: str, weights: nn.Module, inputs: Tensor) -> Tensor:
    """What the copied files make of `inputs` in a process that cannot import autoprune."""
    torch.save({"inputs": inputs, "state": weights.state_dict()}, folder / "given.pt")
    code = (
        "import sys; sys.modules['autoprune'] = None\nimport torch\n"
        f"from {factory.partition('.py')[0]} import model\n"
        "given = torch.load('given.pt'); network = model(); network.load_state_dict(given['state'])\n"
        "torch.save(network(given['inputs']).detach(), 'made.pt')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, check=True)
    made: Tensor = torch.load(folder / "made.pt")
    return made


def test_a_program_is_made_again_without_autoprune(tmp_path: Path) -> None:
    exported(randomised(Residual()), images(), tmp_path / "net.pt2")
    read = from_program(tmp_path / "net.pt2")
    factory = copy_origin("net.pt2", tmp_path, tmp_path / "out")
    assert torch.allclose(rebuilt(tmp_path / "out", factory, read, images()), read(images()), atol=1e-6)


def bert(folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model: nn.Module = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    model = bert(tmp_path / "bert")
    config = Config.model_validate({"model": "hf:bert", "data": "net.py:data"})
    read = load_model(config, folder=tmp_path)
    tokens = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(tokens), model(tokens).logits)
    names = {unit.name for unit in discover(read, tokens).units}
    assert "network.bert.encoder.layer.1.intermediate.dense" in names
    factory = copy_origin("hf:bert", tmp_path, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "dense_hf").iterdir()} == {"config.json"}
    assert torch.allclose(rebuilt(tmp_path / "out", factory, read, tokens), read(tokens), atol=1e-6)


def test_folders_that_are_none(tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    path = tmp_path / "bert" / "config.json"

    def refused(text: str = "hf:bert") -> str:
        with pytest.raises(ModelError) as error:
            load_model(Config.model_validate({"model": text, "data": "net.py:data"}), folder=tmp_path)
        return str(error.value)

    assert "are not downloaded" in refused("hf:google/bert")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused("hf:empty")
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "bert" / "model.bin")
    assert "no .safetensors" in refused()
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("NoSuchModel", "AutoModel", "logging"):
        path.write_text(json.dumps({**content, "architectures": [name]}), encoding="utf-8")
        assert "must name a model class" in refused()
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    path.write_text(json.dumps(t5), encoding="utf-8")
    assert "reads more than one tensor" in refused()


def test_units_without_data(tmp_path: Path) -> None:
    path = exported(randomised(Vgg()), images(), tmp_path / "net.pt2")
    runner = CliRunner()
    found = runner.invoke(app, ["units", "--json", "--model", str(path), "--example", "1,3,8,8"])
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout.splitlines()[-1])
    assert {unit["name"] for unit in record["units"]} == {"0", "2", "6", "9"}
    assert "random inputs" in record["notes"][0]
    missing = runner.invoke(app, ["units", "--model", str(path)])
    assert missing.exit_code == 2
    assert "data: is missing" in missing.output + missing.stderr
    wanted = runner.invoke(app, ["search", "--model", str(path), "--example", "1,3,8,8", "--budget", "50%macs"])
    assert "data: is missing" in wanted.output + wanted.stderr
