"""The way of a policy to files and back: applied again, written, rebuilt without autoprune, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from test_low_rank import module_at
from test_weights import logits
from torch import Tensor, nn

from autoprune import api
from autoprune.apply import apply
from autoprune.progress import Silent
from autoprune.ship import write_model
from autoprune.subject import Subject, Task, subject_of


def shipped(
    task: Task, outcome: api.Outcome, inputs: Tensor, *, factory: str, folder: Path
) -> tuple[Subject, dict[str, Path], nn.Module]:
    """The subject that the policy of `outcome` was applied to, the files and the rebuilt model, all of which do what
    the outcome's own model does on `inputs`. `factory` is in a test's own file.
    """
    subject = subject_of(task, Silent())
    applied = apply(outcome.folder / "policy.yaml", subject)
    torch.testing.assert_close(logits(applied.model, inputs), logits(outcome.model, inputs), rtol=0, atol=1e-5)
    written = write_model(
        applied, example=subject.example, factory=factory, source=Path(__file__).parent, folder=folder,
        progress=Silent(),
    )  # fmt: skip
    rebuilt = module_at(written["rebuild script"]).model()
    torch.testing.assert_close(logits(rebuilt, inputs), logits(outcome.model, inputs), rtol=0, atol=1e-5)
    return subject, written, rebuilt


def assert_onnx_runtime_agrees(written: dict[str, Path], outcome: api.Outcome, inputs: Tensor) -> None:
    session = onnxruntime.InferenceSession(written["onnx"])
    (exported,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(exported), logits(outcome.model, inputs), rtol=0, atol=1e-5)
