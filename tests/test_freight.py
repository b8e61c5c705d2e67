"""Values on their way to other processes: the same, and their tensors where they lay."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoprune.engines import freight


def there_and_back(value):
    return freight.unpack(freight.pack(value))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(
        [
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int8,
            torch.bool,
            torch.complex64,
        ]
    ),
    how=st.sampled_from(["plain", "transposed", "every second", "expanded"]),
)
def test_tensors_come_back_as_they_were(shape, dtype, how):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    if how == "transposed" and tensor.ndim > 1:
        tensor = tensor.transpose(0, -1)
    if how == "every second" and tensor.ndim:
        tensor = tensor[::2]
    if how == "expanded" and tensor.ndim and len(tensor):
        tensor = tensor[:1].expand(3, *tensor.shape[1:])
    back = there_and_back([tensor])[0]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


def test_what_was_shared_is_shared():
    whole = torch.arange(1000.0)
    packed = freight.pack({"whole": whole, "rows": whole.view(10, 100)[3:5], "again": [whole]})
    assert packed.size_bytes < 4 * 1000 + 4000, "the memory of views is there once"
    back = freight.unpack(packed)
    assert back["again"][0] is back["whole"]
    assert back["rows"].data_ptr() == back["whole"].data_ptr() + 4 * 300


def test_tied_parameters_stay_one_and_know_what_they_are():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("frozen", torch.ones(2))
            self.norm = nn.BatchNorm2d(3).requires_grad_(False)

    model = Tied().eval()
    back = there_and_back(model)
    assert back.head.weight is back.embedding.weight
    assert isinstance(back.head.weight, nn.Parameter)
    assert back.head.weight.requires_grad
    assert not back.norm.weight.requires_grad
    assert not back.training
    assert {k: v.tolist() for k, v in back.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }


def test_nothing_is_copied_on_the_way(tmp_path):
    tensor = torch.zeros(100_000)
    packed = freight.pack({"tensor": tensor, "array": np.ones(50_000)})
    assert len(packed.head) < 3000
    assert packed.buffers[0].ctypes.data == tensor.data_ptr(), "packed where it lies"
    path = tmp_path / "cargo"
    freight.write(packed, path)
    read = freight.read(path)
    back = freight.unpack(read)
    assert back["tensor"].data_ptr() == read.buffers[0].ctypes.data, "unpacked where it is mapped"
    assert all(buffer.ctypes.data % freight.ALIGNMENT == 0 for buffer in read.buffers)
    assert torch.equal(back["tensor"], tensor)
    assert back["array"].sum() == 50_000


def test_written_tensors_do_not_change_the_file(tmp_path):
    path = tmp_path / "cargo"
    freight.write(freight.pack(torch.zeros(10)), path)
    back = freight.unpack(freight.read(path))
    with pytest.raises(ValueError, match="read-only"):
        freight.read(path).buffers[0][:] = 1
    assert torch.equal(back, torch.zeros(10))


def test_classes_of_a_persons_own_file_are_known_elsewhere(tmp_path: Path):
    """As a model that was read from `model.py`: the process that unpacks it has never seen that file."""
    own = tmp_path / "own_network.py"
    own.write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        SCALE = 3.0
        def scaled(x):
            return SCALE * x
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(2, 2)
            def forward(self, x):
                return scaled(self.layer(x))
        """)
    )
    cargo = tmp_path / "cargo"
    pack = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch, own_network
from pathlib import Path
from autoprune.engines import freight
torch.manual_seed(0)
model = own_network.Own().eval()
freight.write(freight.pack(model), Path({str(cargo)!r}))
print(model(torch.ones(1, 2)).tolist())
"""
    unpack = f"""
import torch
from pathlib import Path
from autoprune.engines import freight
print(freight.unpack(freight.read(Path({str(cargo)!r})))(torch.ones(1, 2)).tolist())
"""
    outputs = []
    for code in (pack, unpack):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
        own.unlink(missing_ok=True)
    assert outputs[0] == outputs[1]
