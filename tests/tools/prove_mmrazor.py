"""MMRazor builds the static subnet of the dense model: every tensor of a narrowed unit has our cut model's shape."""

import abc
import importlib
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch.ao.quantization.backend_config.utils
from common import Case, tell


class Missing(abc.ABCMeta):
    """A class of an optional part that this torch has not, for those that inherit from it or read from it."""

    def __getattr__(cls, name: str) -> MagicMock:
        if name.startswith("_"):
            raise AttributeError(name)
        return MagicMock()

    def __call__(cls, *args: object, **options: object) -> object:
        return MagicMock() if cls.__name__ == "Absent" else super().__call__(*args, **options)


def absent(_name: str) -> Missing:
    return Missing("Absent", (), {})


placeholder = types.ModuleType("mmrazor.utils.placeholder")
placeholder.__dict__.update(get_placeholder=absent, get_package_placeholder=lambda _name: MagicMock())
sys.modules[placeholder.__name__] = placeholder  # its own fails on what is looked up and not used

BaseModel = importlib.import_module("mmengine.model").BaseModel
deploy = importlib.import_module("mmrazor.implementations.pruning.group_fisher.prune_deploy_sub_model")

case, export = Case(sys.argv[1]), Path(sys.argv[2])


class Architecture(BaseModel):
    """The case's model with the signature of OpenMMLab's."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        for name, module in network.named_children():
            self.add_module(name, module)
        for name, parameter in network.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.run = type(network).forward

    def forward(self, inputs: torch.Tensor, data_samples: object = None, mode: str = "tensor") -> torch.Tensor:
        return self.run(self, inputs)


said = json.loads((export / "fix_subnet.json").read_text(encoding="utf-8"))
tracer = {"_scope_": "mmrazor", "type": "ChannelAnalyzer", "demo_input": (1, *case.inputs.shape[1:]),
          "tracer_type": "FxTracer"}  # fmt: skip
subnet = deploy.GroupFisherDeploySubModel(
    Architecture(case.dense()), fix_subnet=str(export / "fix_subnet.json"), divisor=1, parse_cfg=tracer
)
with torch.no_grad():
    assert subnet(case.inputs).shape == case.logits.shape
shapes = {name: tuple(tensor.shape) for name, tensor in subnet.state_dict().items()}
for key, keep in said.items():
    assert shapes[f"{key.partition('_(')[0]}.weight"][0] == keep, key
alike = [name for name, shape in case.shapes.items() if shapes.get(name) == shape]
report = json.loads((export / "fidelity.json").read_text(encoding="utf-8"))["remarks"]
lost = {each["aspect"] for each in report if each["level"] != "exact"} - {"channels", "weights"}
assert lost or len(alike) == len(case.shapes)
tell(("mmrazor", "mmengine", "mmcv-lite", "torch"), units=f"{len(said)} of {len(said)}",
     shapes=f"{len(alike)} of {len(case.shapes)} tensors")  # fmt: skip
