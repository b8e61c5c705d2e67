"""Prunes channels with AIMET as aimet.json says. Needs torch, torchvision and aimet-torch.

from load import prune
model = prune(model, example_inputs)

AIMET keeps the inputs of a convolution whose weights are largest: those that go are zero beforehand, so that ours stay.
It then fits the weights anew; here they are put back, and with them the mended ones, where there is a state.pt.
"""

import json
from pathlib import Path

import torch
from aimet_torch.common.defs import CompressionScheme, CostMetric
from aimet_torch.compress import ModelCompressor
from aimet_torch.defs import ChannelPruningParameters, ModuleCompRatioPair
from aimet_torch.model_preparer import prepare_model
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).resolve().parent


def prune(model: torch.nn.Module, example_inputs: torch.Tensor) -> torch.nn.Module:
    """A pruned copy of `model`, as AIMET traces it: a torch.fx graph with the same names of tensors."""
    content = json.loads((HERE / "aimet.json").read_text(encoding="utf-8"))
    model = prepare_model(model.eval())  # every function a module, every module used once
    convolutions = {pair["module"]: model.get_submodule(pair["module"]) for pair in content["pairs"]}
    for pair in content["pairs"]:
        weight = convolutions[pair["module"]].weight
        goes = [each for each in range(weight.shape[1]) if each not in set(pair["kept"])]
        weight.data[:, goes] = 0.0
    data = TensorDataset(example_inputs, torch.zeros(len(example_inputs)))
    pairs = [ModuleCompRatioPair(convolutions[pair["module"]], pair["comp_ratio"]) for pair in content["pairs"]]
    pruned, _ = ModelCompressor.compress_model(
        model,
        eval_callback=lambda *_args, **_named: 0.0,
        eval_iterations=1,
        input_shape=tuple(example_inputs[:1].shape),
        compress_scheme=CompressionScheme.channel_pruning,
        cost_metric=CostMetric.mac,
        parameters=ChannelPruningParameters(
            data_loader=DataLoader(data, batch_size=len(example_inputs)),
            num_reconstruction_samples=10 * len(example_inputs),
            allow_custom_downsample_ops=False,
            mode=ChannelPruningParameters.Mode.manual,
            params=ChannelPruningParameters.ManualModeParams(pairs),
        ),
    )
    for pair in content["pairs"]:
        put_back(pruned.get_submodule(pair["module"]), convolutions[pair["module"]], pair)
    if (HERE / "state.pt").exists():
        pruned.load_state_dict(torch.load(HERE / "state.pt", weights_only=True))
    return pruned


def put_back(layer: torch.nn.Module, dense: torch.nn.Module, pair: dict) -> None:
    """Give a pruned layer the values that it had. Raises RuntimeError where AIMET left it another size."""
    rows = torch.arange(dense.out_channels) if pair["rows"] is None else torch.tensor(pair["rows"])
    weight = dense.weight.data[rows][:, pair["kept"]]
    if layer.weight.shape != weight.shape:
        raise RuntimeError(f"{pair['module']}: AIMET made {tuple(layer.weight.shape)} of it, not {tuple(weight.shape)}")
    layer.weight.data = weight
    if layer.bias is not None:
        layer.bias.data = dense.bias.data[rows]
