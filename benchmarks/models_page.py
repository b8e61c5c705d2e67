"""The page of models: what of each is found, and whether its cut is right. Rows where they run, merged into one page.

    python benchmarks/models_page.py --folder PATH_OF_THE_DATA --rows text.json     # an environment with transformers
    python benchmarks/models_page.py --rows vision.json                             # one with torchvision and timm
    python benchmarks/models_page.py --write docs/models.md text.json vision.json   # the page, in any

Without files, `--write` makes the page of what runs here. Every model of `page_models` has a row: of the first
environment that could run it, or with the reason why none could. `--only 'timm *'` takes the rows whose `source name`
matches a glob; `--latency` also times the cut model beside the dense one on ONNX Runtime.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from page_models import Entry, entries
from page_text import MOST_ERROR, SHARE, Row, page, short
from torch import Tensor, nn

from autoprune.bank.build import Bank, CalibrationData, observe, rank
from autoprune.bank.calibrate import CalibrationSettings
from autoprune.bank.stitch import Stitcher
from autoprune.core.space import Choice, Space
from autoprune.core.target import Target
from autoprune.core.unit import NARROWED
from autoprune.errors import AutopruneError
from autoprune.model.cut import cut, plan_cut
from autoprune.model.describe import macs_of
from autoprune.model.discover import Anatomy, discover
from autoprune.model.flow import norms_after
from autoprune.model.plain import plain_copy
from autoprune.model.recalibrate import Anchor
from autoprune.nest import first_tensor, tensors_of
from autoprune.profile.clock import interleave
from autoprune.profile.cost_model import CostModel
from autoprune.progress import Silent
from autoprune.runtimes.onnxruntime import OnnxRuntime, export
from autoprune.searching.baselines import uniform
from autoprune.searching.problem import Problem
from autoprune.spaces import MethodChoice, SpaceSpec, resolve
from autoprune.verify import params

SPACE = SpaceSpec(methods=(MethodChoice(method="l2"),), levels=64, min_keep=1 / 64)
SETTINGS = CalibrationSettings(patches=256, max_columns=256, gradient_samples=2)
NAMES = (
    (r"^(\w+) in (the model itself|\S+) ", r"\1 "), (r"normalised by \S+( and \d+ more)?", "normalised"),
    (r"^(.+) \((\w+)\) has", r"\2 has"), (r"those of \S+", "those of another"), (r"^\S+ is run", "a layer is run"),
    (r"^\S+ is not run itself", "a layer is not run itself"),
    (r"^\S+ and \S+ share", "layers share"), (r"^\S+ has its channels", "a layer has its channels"),
    (r"constant in (the model itself|\S+) is", "constant is"),
)  # fmt: skip
OBVIOUS = ("it makes the model's output", "it is the model's input")


# ---- one model -----------------------------------------------------------------------------------------------------


def measured(entry: Entry, *, latency: bool) -> Row:
    """The row of one model; what goes wrong is in it."""
    row = Row(entry.name, entry.source, entry.family, entry.trained, environment=environment())
    start = time.perf_counter()
    try:
        import_module(entry.library)
        torch.manual_seed(0)
        model, example = entry.make().eval(), entry.example()
    except Exception as error:  # noqa: BLE001 (whatever a library raises where it does not fit its environment)
        row.failed = f"not here: {type(error).__name__}: {short(str(error))}"
        return row
    if not entry.trained:
        _randomise(model)
    row.params = params(model)
    try:
        plain = plain_copy(model, example).model.requires_grad_(True)
        row.macs = macs_of(plain, example[:1])
        _measure(row, plain, example, latency=latency)
    except AutopruneError as error:
        row.failed = f"refused: {short(str(error))}"
    except Exception as error:  # noqa: BLE001 (a row says what went wrong; the others go on)
        row.failed = f"wrong: {type(error).__name__}: {short(str(error))}"
    row.seconds = time.perf_counter() - start
    return row


def _measure(row: Row, model: nn.Module, example: Tensor, *, latency: bool) -> None:
    anatomy = discover(model, example)
    row.units = dict(Counter(unit.kind for unit in anatomy.units))
    row.refused = _reasons(anatomy)
    if not anatomy.groups:
        row.failed = f"blocks alone: {'; '.join(row.refused)}"
        return
    space = resolve(anatomy.units, SPACE)
    costs = CostModel(anatomy.architecture, space)
    least = _narrowest(space)
    row.prunable = 1 - costs.cost("macs", least) / costs.dense["macs"]
    limit = {"macs": SHARE * costs.dense["macs"]}
    choice = uniform(Problem(space, costs, limit, {}), method="l2") or least
    options = space.options_of(choice)
    narrowed = [(entry, index) for entry, index in zip(space.entries, choice, strict=True) if entry.unit.narrows]
    row.kept = float(np.mean([entry.options[index].keep / entry.unit.width for entry, index in narrowed]))
    bank = _bank(model, anatomy, example)
    kept = {name: bank.kept(name, option) for name, option in options.items()}
    smaller = cut(model, plan_cut(anatomy.widths, anatomy.groups, kept=kept, dropped=())).eval()
    counted = macs_of(smaller, example[:1])
    row.reached = counted / row.macs
    if counted != round(costs.cost("macs", choice)):
        row.failed = f"wrong: {counted} MACs counted, {costs.cost('macs', choice):.0f} predicted"
    built = Stitcher(model, anatomy, bank, anchor=Anchor((), ())).build(options, recalibrate=False).model
    with torch.no_grad():
        dense, found = tensors_of(model(example)), tensors_of(smaller(example))
        scale = _scale(dense)
        if _difference(found, dense) <= MOST_ERROR * scale:
            row.failed = "wrong: the cut changes nothing, so that nothing is compared"
        row.stitch_error = _difference(found, tensors_of(built(example))) / scale
        with _masked(model, anatomy, kept) as masked:
            row.mask_error = _difference(found, tensors_of(masked(example))) / scale
    try:
        row.onnx_error = _onnx_difference(smaller, example, found) / _scale(found)
        if latency:
            row.latency = _latency(model, smaller, example)
    except Exception as error:  # noqa: BLE001 (exporters and runtimes raise anything: it stands in the row)
        row.onnx_failed = f"{type(error).__name__}: {short(str(error))}"


def _randomise(model: nn.Module) -> None:
    """Norms that do something, so that a wrong one shows; scales and weights that do not begin at nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if 0 < float(parameter.detach().abs().max()) <= 1e-4:
            parameter.data.fill_(0.5)
        elif parameter.ndim > 1 and not parameter.detach().any():
            parameter.data.normal_(0, 0.05, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.7, 1.3, generator=generator)
                module.bias.data.normal_(0, 0.1, generator=generator)


def _bank(model: nn.Module, anatomy: Anatomy, example: Tensor) -> Bank:
    """Calibrated on the example, orders by l2."""
    with torch.no_grad():
        targets = (first_tensor(model(example)).detach(),)
    data = CalibrationData((example,), targets)
    norms = norms_after(model, example)
    statistics = observe(model, anatomy, data, others=(), settings=SETTINGS, progress=Silent())
    orders = rank(
        model, anatomy, statistics, norms=norms, methods=("l2",), targets=targets[0], seed=0, progress=Silent()
    )
    return Bank(statistics, orders, norms, {})


def _narrowest(space: Space) -> Choice:
    """Every unit at its least, blocks kept."""
    return tuple(len(entry.options) - 1 if entry.unit.kind in NARROWED else 0 for entry in space.entries)


@contextmanager
def _masked(model: nn.Module, anatomy: Anatomy, kept: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """A copy whose layers see zeros in what goes, and whose other parameters are zero where they would read it."""
    copied, gone = copy.deepcopy(model), dict[str, list[int]]()
    for group in anatomy.groups:
        removed = torch.ones(group.width, dtype=torch.bool)
        removed[kept.get(group.root, torch.arange(group.width))] = False
        for member in group.on("in"):
            gone.setdefault(member.layer, []).extend(member.positions[removed].flatten().tolist())
        for slab in (slab for slab in group.slabs if slab.reads):
            copied.get_parameter(slab.parameter).data.index_fill_(slab.dim, slab.positions[removed].flatten(), 0.0)

    def blind(positions: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            dim = -1 if isinstance(layer, nn.Linear) else 1
            return (inputs[0].index_fill(dim, torch.tensor(positions), 0.0), *inputs[1:])

        return before

    readers = {copied.get_submodule(name): positions for name, positions in gone.items() if positions}
    handles = [layer.register_forward_pre_hook(blind(positions)) for layer, positions in readers.items()]
    try:
        yield copied
    finally:
        for handle in handles:
            handle.remove()


def _onnx_difference(model: nn.Module, example: Tensor, wanted: Sequence[Tensor]) -> float:
    """Largest difference of any output between ONNX Runtime and torch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(export(model, example), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    return _difference([torch.from_numpy(np.asarray(array)) for array in found], wanted)


def _latency(model: nn.Module, smaller: nn.Module, example: Tensor) -> float:
    """The cut model's time over the dense one's, batch 1, one thread."""
    sessions = [OnnxRuntime().load(each, example[:1], Target()) for each in (model, smaller)]
    return interleave(sessions, rounds=15, seconds_budget=4.0)[1].ratio


def _difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = list(zip(left, right, strict=True))
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


def _scale(tensors: Collection[Tensor]) -> float:
    return max(1e-12, *(float(tensor.abs().max()) for tensor in tensors if tensor.numel()))


def _reasons(anatomy: Anatomy) -> list[str]:
    """Why things stay, the most frequent first; inputs and outputs aside, for they always do."""
    texts = [entry.reason for entry in anatomy.refused if entry.reason not in OBVIOUS]
    return [f"{text} ({times})" for text, times in Counter(_unnamed(text) for text in texts).most_common()]


def _unnamed(reason: str) -> str:
    """The first half of a reason, without the names of its modules."""
    reason = reason.partition(":")[0]
    for pattern, plain in NAMES:
        reason = re.sub(pattern, plain, reason)
    return reason


def environment() -> str:
    """What ran a row."""
    found = [f"Python {platform.python_version()}", f"ONNX Runtime {onnxruntime.__version__}"]
    for name in ("torch", "torchvision", "timm", "transformers"):
        try:
            found.append(f"{name} {import_module(name).__version__}")
        except Exception:  # noqa: BLE001 (not installed, or not for this torch: its rows say so)
            continue
    return ", ".join(found)


def run(asked: argparse.Namespace) -> list[Row]:
    """The rows of this environment, each printed as soon as it is there."""
    rows = []
    for entry in entries(asked.folder):
        if fnmatch.fnmatch(f"{entry.source} {entry.name}", asked.only):
            rows.append(measured(entry, latency=asked.latency))
            print(json.dumps(asdict(rows[-1])), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="rows that were written before, the first go first")
    parser.add_argument("--folder", type=Path, help="folder with zoo.py, its weights and data")
    parser.add_argument("--only", default="*", help="glob of `source name`")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--rows", type=Path, help="write the rows here")
    parser.add_argument("--write", type=Path, help="write the page here")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [Row(**row) for path in asked.files for row in json.loads(path.read_text())] or run(asked)
    if asked.rows:
        asked.rows.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if asked.write:
        asked.write.write_text(page(rows))


if __name__ == "__main__":
    main()
