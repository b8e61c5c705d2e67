"""What is done with a policy: applied, exported, imported, merged, verified. Composes; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from autoprune.apply import apply
from autoprune.asked import any_policy, task_of
from autoprune.config import Config
from autoprune.core.budget import parse_budgets
from autoprune.core.exchange import ExportRecord, ImportRecord
from autoprune.core.floor import recorded
from autoprune.core.outcome import PackedItem, PackedRecord, VerifyRecord
from autoprune.core.policy import Measured, Policy
from autoprune.evidence import judge
from autoprune.exporters import exporter
from autoprune.exporting import write_export
from autoprune.files import open_file, read_policy, write_bytes
from autoprune.importing import Import, read_import, write_import
from autoprune.merging import merge_files
from autoprune.model.describe import macs_of
from autoprune.model.flow import norms_after
from autoprune.model.integers import deployed
from autoprune.packing.archive import inspected
from autoprune.progress import Progress
from autoprune.resolved import resolved
from autoprune.runtimes import runtime
from autoprune.runtimes.resident import resident
from autoprune.ship import write_model
from autoprune.storage import FLOATS, FileFormat
from autoprune.subject import subject_of
from autoprune.transfer import transfer
from autoprune.verify import Stopwatch, latency_record, params, score


def apply_policy(
    policy_path: Path, config: Config, *, folder: Path, output: Path, anew: bool = False, progress: Progress
) -> dict[str, Path]:
    """Write the cut model of a policy into `output`; kind -> file. With `anew` (a transfer) the policy's methods choose
    what goes on this model's weights, and the policy that comes of it is written, too.
    """
    read_policy(policy_path)  # a damaged one is told at once
    subject = subject_of(any_policy(task_of(config, folder)), progress)
    written: dict[str, Path] = {}
    if anew:
        policy_path = transfer(policy_path, subject, output, refit=config.search.refit, progress=progress)
        written["policy"] = policy_path
    applied = apply(policy_path, subject)
    return written | write_model(
        applied, example=subject.example, factory=config.model, source=folder, folder=output,
        progress=progress,
    )  # fmt: skip


def export_policy(
    policy_path: Path, config: Config, *, folder: Path, tool: str, output: Path, allow_lossy: bool, progress: Progress
) -> ExportRecord:
    """Write a policy as `tool` reads it into `output`. Raises LossyError where that loses something and may not."""
    read_policy(policy_path)  # a damaged one is told at once
    chosen = exporter(tool)
    subject = subject_of(any_policy(task_of(config, folder)), progress)
    laid = resolved(apply(policy_path, subject), subject, title=policy_path.name)
    return write_export(laid, chosen, output, allow_lossy=allow_lossy)


def import_policy(
    path: Path, config: Config, *, folder: Path, asked: Import, output: Path, progress: Progress
) -> ImportRecord:
    """Write the policy that another tool's file means for the model to `output`. Raises PolicyError where nothing of it
    fits, with all that was asked.
    """
    found = read_import(path, asked)  # a damaged one is told at once
    subject = subject_of(any_policy(task_of(config, folder)), progress)
    return write_import(found, subject, asked, output=output, title=str(path))


def merge_policies(paths: Sequence[Path], output: Path) -> Policy:
    """Join the policies in `paths` into one at `output`. Raises PolicyError where they conflict."""
    return merge_files(paths, output)


def unpack_file(path: Path, output: Path) -> PackedRecord:
    """Write the tensors of a packed model as safetensors, bit for bit. Raises ModelError for a damaged file."""
    with open_file(path) as file:
        unpacked, known = inspected(file.read(), name=str(path))
    tensors = unpacked.tensors
    write_bytes(output, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    items = [
        PackedItem(name=i.name, kind=i.kind, shape=i.shape, stored_bytes=i.stored_bytes, shannon_bytes=i.shannon_bytes)
        for i in known.items
    ]
    plain = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return PackedRecord(
        items=tuple(items), overhead_bytes=known.overhead_bytes, size_bytes=known.size_bytes, plain_bytes=plain,
        written=str(output),
    )  # fmt: skip


def verify_policy(policy_path: Path, config: Config, *, folder: Path, progress: Progress) -> VerifyRecord:
    """Measure a policy again on this machine, beside the dense model, and judge it by its own budget and floor.

    A budget or a floor in `config` takes the place of the policy's own.
    """
    read_policy(policy_path)  # a damaged one is told at once
    task = any_policy(task_of(config, folder))
    subject = subject_of(task, progress)
    applied = apply(policy_path, subject)
    progress.phase("verify")
    watch = Stopwatch.of(subject.model, runtime(task.target.runtime), task.target, example=subject.example)
    norms = norms_after(subject.model, task.data.validation_inputs[:2])
    files = FileFormat(applied.policy.size, subject.example, norms)
    ready = deployed(applied.model, norms, applied.scales)
    first, (timing,) = watch.compare([ready])
    texts = list(config.budget or ()) or list(applied.policy.budget.values())
    budget = parse_budgets(texts)[0]
    peaks: list[int | None] = [None, None]
    if any(limit.metric == "memory" for limit in budget.limits):
        peaks = [
            resident(model, subject.example, runtime=runtime(task.target.runtime), target=task.target).model_bytes
            for model in (subject.model, ready)
        ]
    part = subject.parts.held_out
    counted = [
        Measured(
            latency_ms=latency_record(times), ratio=times.ratio,
            score=score(model, task.evaluator, part, batch=subject.batch),
            macs=macs_of(model, task.data.validation_inputs[:1]), params=params(model),
            size_bytes=files.size(model, weights), memory_bytes=memory,
        )
        for model, times, weights, memory in (
            (subject.model, first, FLOATS, peaks[0]), (applied.model, timing, applied.weights, peaks[1])
        )
    ]  # fmt: skip
    dense, pruned = counted
    floor = config.floor
    if not floor.text:
        sense = task.evaluator.higher_is_better
        floor = recorded(applied.policy.floor, task.evaluator.name, higher_is_better=sense)
    base = {"latency": first.median, "macs": dense.macs, "params": dense.params, "size": dense.size_bytes}
    base["memory"] = dense.memory_bytes or 0
    met, verdict = judge(pruned, budget.resolve(base), floor, dense=dense, metric=task.evaluator.name)
    return VerifyRecord(met=met, verdict=verdict, dense=dense, pruned=pruned, budget=budget.text, floor=floor.text)
