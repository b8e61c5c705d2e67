"""Train the embedded demo network, and write the two files that the package ships.

    python examples/train_demo.py

Takes the digits from scikit-learn, splits them 60 : 40 with the classes in proportion, trains on the 60 % (the
calibration part), and writes `digits.safetensors` and `weights.safetensors` into `autoprune/demo`. The last epoch's
weights are kept: the validation part is looked at once, after training, and selects nothing.

Most epochs see small images, as they are several times cheaper, and the last ones the size that is shipped. Takes
minutes on one core with bfloat16 instructions; elsewhere `--float32` may be the faster way.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional

from autoprune.demo.data import DIGITS_PATH, IMAGE_SIZE, data, digits, normalise, upsample
from autoprune.demo.network import WEIGHTS_PATH, DemoNet, model

CALIBRATION_SHARE = 0.6
BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Phase:
    """Some epochs at one image size."""

    epochs: int
    image_size: int


PHASES = (Phase(epochs=20, image_size=IMAGE_SIZE // 2), Phase(epochs=8, image_size=IMAGE_SIZE))


def write_digits(path: Path) -> None:
    """Write scikit-learn's digits and their split (always seed 0, so that the parts never change) to `path`."""
    images, labels = load_digits(return_X_y=True)
    calibration, validation = train_test_split(
        torch.arange(len(labels)).numpy(), train_size=CALIBRATION_SHARE, stratify=labels, shuffle=True, random_state=0
    )
    tensors = {
        "images": torch.from_numpy(images).reshape(-1, 8, 8).to(torch.uint8),
        "labels": torch.from_numpy(labels).to(torch.uint8),
        "calibration_indices": torch.from_numpy(calibration).to(torch.int16),
        "validation_indices": torch.from_numpy(validation).to(torch.int16),
    }
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def _uniform(count: int, bound: float, generator: torch.Generator) -> Tensor:
    """Draw `count` numbers between -bound and bound."""
    return (torch.rand(count, generator=generator) * 2 - 1) * bound


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate (by up to 12 degrees), scale (12 %) and shift (7 % of the width) images (N, 1, H, W), and add noise."""
    count = len(images)
    angle = _uniform(count, math.radians(12), generator)
    scale = 1 + _uniform(count, 0.12, generator)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    shift_x, shift_y = _uniform(count, 0.14, generator), _uniform(count, 0.14, generator)  # the width is 2
    rows = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).reshape(count, 2, 3)
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved + 0.05 * torch.randn(moved.shape, generator=generator)


def _batches(size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of augmented batches; the remainder, a small batch, is left out for batch norm's sake."""
    images, labels = digits("calibration")
    upsampled = upsample(images, size=size)
    order = torch.randperm(len(labels), generator=generator)
    for indices in torch.split(order, BATCH_SIZE)[: len(labels) // BATCH_SIZE]:
        yield normalise(augment(upsampled[indices], generator)), labels[indices]


def train(*, seed: int, bfloat16: bool) -> nn.Module:
    """Train a fresh network through `PHASES` under one learning-rate cycle."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DemoNet()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = sum(phase.epochs for phase in PHASES) * (len(digits("calibration")[1]) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, pct_start=0.2)
    sizes = [phase.image_size for phase in PHASES for _ in range(phase.epochs)]
    for epoch, size in enumerate(sizes, start=1):
        losses = []
        for inputs, labels in _batches(size, generator):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = network(inputs.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch:2d} of {len(sizes)}  size {size}  loss {sum(losses) / len(losses):.4f}", flush=True)
    return network.eval()


def write_weights(network: nn.Module, path: Path) -> None:
    """Write the state of `network` to `path`, floating-point tensors in half precision."""
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    save_file(state, path)
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def accuracy(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Return the share of `inputs` whose largest logit is their label's."""
    with torch.inference_mode():
        predicted = torch.cat([network(batch).argmax(dim=1) for batch in torch.split(inputs, 16)])
    return (predicted == labels).double().mean().item()


def count_macs(network: nn.Module, inputs: Tensor) -> int:
    """Return the multiply-accumulates of the convolutions and linear layers for `inputs`."""
    counts: list[int] = []

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        counts.append(output.numel() * layer.get_parameter("weight")[0].numel())

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        network(inputs)
    for handle in handles:
        handle.remove()
    return sum(counts)


def main() -> None:
    """Write both files and print what was reached."""
    parser = argparse.ArgumentParser(description="Train the embedded demo network and write the packaged files.")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, order and augmentation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="train without bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write_digits(DIGITS_PATH)
    start_s = time.perf_counter()
    write_weights(train(seed=arguments.seed, bfloat16=not arguments.float32), WEIGHTS_PATH)
    print(f"trained in {time.perf_counter() - start_s:.0f} s")
    shipped = model()
    for part, (inputs, labels) in data().items():
        print(f"{part}: accuracy {accuracy(shipped, inputs, labels):.4f} of {len(labels)} images")
    macs = count_macs(shipped, data()["validation"][0][:1])
    print(f"parameters {sum(value.numel() for value in shipped.parameters()):,}  MACs {macs:,}")
    print(f"weights {WEIGHTS_PATH.stat().st_size:,} bytes  digits {DIGITS_PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
