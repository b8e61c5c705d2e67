"""The models of the page: where each comes from, how it is made, and what it reads. Nothing is downloaded.

Libraries are imported when one of their models is made, so that the list is there without them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import page_networks as own
import torch
from torch import Tensor, nn

SAMPLES = 2


@dataclass(frozen=True)
class Entry:
    """One model. `library` is what must be importable; `trained` says that its weights are public ones."""

    name: str
    source: str
    family: str
    make: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    library: str = "torch"
    trained: bool = False


def pictures(side: int, channels: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, channels, side, side, generator=torch.Generator().manual_seed(0))


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0))


def tokens(length: int = 32, vocabulary: int = 100) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, vocabulary, (SAMPLES, length), generator=torch.Generator().manual_seed(0))


def entries(folder: Path | None) -> list[Entry]:
    """All of them. `folder` holds the trained models and data of `zoo.py`."""
    return [*_own(), *_zoo(folder), *_torchvision(), *_timm(), *_transformers()]


def _own() -> list[Entry]:
    made: list[tuple[str, str, Callable[[], nn.Module], Callable[[], Tensor]]] = [
        ("U-Net, transposed convolutions", "U-Net", lambda: own.UNet(transposed=True), pictures(32)),
        ("U-Net, upsampling", "U-Net", lambda: own.UNet(transposed=False), pictures(32)),
        ("ESPNet", "ESPNet", own.EspNet, pictures(64)),
        ("pyramid detector", "detector, six outputs", own.Detector, pictures(64)),
        ("DnCNN", "denoiser", own.DnCnn, pictures(32, 1)),
        ("M5", "1-d keyword spotting", own.Keyword, numbers(1, 4000)),
        ("TransformerEncoder", "nn.MultiheadAttention", own.Encoder, numbers(16, 20)),
        ("LSTM classifier", "LSTM", lambda: own.Recurrent(nn.LSTM), numbers(20, 32)),
        ("GRU classifier", "GRU", lambda: own.Recurrent(nn.GRU), numbers(20, 32)),
    ]
    return [Entry(name, "own", family, make, example) for name, family, make, example in made]


ZOO = {
    "resnet20": "ResNet basic", "resnet56": "ResNet basic", "shufflenetv2_x0_5": "ShuffleNetV2", "plainnet": "VGG",
    "mnist_cnn": "LeNet", "fsdd_dscnn": "DS-CNN keyword spotting", "digits_vit": "ViT", "adult_mlp": "MLP on a table",
    "chargpt": "GPT-2", "stories260k": "LLaMA, grouped queries",
}  # fmt: skip


def _zoo(folder: Path | None) -> list[Entry]:
    def zoo() -> Any:
        if folder is None or not (folder / "zoo.py").is_file():
            raise ImportError("needs --folder with zoo.py, its weights and its data")
        sys.path.insert(0, str(folder))
        return import_module("zoo")

    return [
        Entry(name, "zoo", family, lambda name=name: getattr(zoo(), name)(),
              lambda name=name: zoo().data(name)[0][:SAMPLES], trained=True)
        for name, family in ZOO.items()
    ]  # fmt: skip


TORCHVISION = {
    "vgg11_bn": "VGG", "resnet18": "ResNet basic", "resnet50": "ResNet bottleneck", "resnext50_32x4d": "ResNeXt",
    "mobilenet_v2": "MobileNetV2", "mobilenet_v3_small": "MobileNetV3", "shufflenet_v2_x1_0": "ShuffleNetV2",
    "densenet121": "DenseNet", "squeezenet1_1": "SqueezeNet", "googlenet": "Inception",
    "efficientnet_b0": "EfficientNet", "regnet_y_400mf": "RegNet", "mnasnet0_5": "MnasNet", "convnext_tiny": "ConvNeXt",
    "segmentation.lraspp_mobilenet_v3_large": "segmentation", "video.r3d_18": "ResNet, 3-d",
}  # fmt: skip


def _torchvision() -> list[Entry]:
    def made(name: str) -> nn.Module:
        path, _, function = name.rpartition(".")
        options = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
        if path == "segmentation":
            options = {"weights_backbone": None, "num_classes": 5}
        build = getattr(import_module(".".join(filter(None, ("torchvision.models", path)))), function)
        model: nn.Module = build(weights=None, **options)
        if name.startswith("vgg"):  # 120 M of its parameters are for 1,000 classes of large images
            pool, head = nn.AdaptiveAvgPool2d(2), (nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 10))
            model.avgpool, model.classifier = pool, nn.Sequential(*head)
        return model

    def vit() -> nn.Module:
        build = import_module("torchvision.models").VisionTransformer
        model: nn.Module = build(image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=256)
        return model

    def swin() -> nn.Module:
        build = import_module("torchvision.models").SwinTransformer
        model: nn.Module = build([4, 4], 32, [2, 2], [2, 4], [4, 4])
        return model

    sides = {"squeezenet1_1": 96}
    found = [
        Entry(name, "torchvision", family, lambda name=name: made(name),
              numbers(3, 8, 32, 32) if name.startswith("video") else pictures(sides.get(name, 64)), "torchvision")
        for name, family in TORCHVISION.items()
    ]  # fmt: skip
    found.append(Entry("VisionTransformer, 3 layers", "torchvision", "ViT", vit, pictures(32), "torchvision"))
    found.append(Entry("SwinTransformer, 4 layers", "torchvision", "Swin", swin, pictures(64), "torchvision"))
    return found


TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet26": ("ResNet bottleneck", 64, {}),
    "mobilenetv3_small_100": ("MobileNetV3", 64, {}),
    "mobilenetv4_conv_small": ("MobileNetV4", 64, {}),
    "ghostnet_100": ("GhostNet", 64, {}),
    "repvgg_a0": ("RepVGG", 64, {}),
    "fasternet_t0": ("FasterNet", 64, {}),
    "hrnet_w18_small": ("HRNet", 64, {}),
    "convnext_atto": ("ConvNeXt", 64, {}),
    "vit_tiny_patch16_224": ("ViT", 64, {"img_size": 64, "depth": 4}),
    "deit_tiny_distilled_patch16_224": ("DeiT", 64, {"img_size": 64, "depth": 4}),
    "mixer_s32_224": ("MLP-Mixer", 64, {"img_size": 64}),
    "cspresnet50": ("CSP", 64, {}),
}


def _timm() -> list[Entry]:
    def made(name: str) -> nn.Module:
        model: nn.Module = import_module("timm").create_model(name, pretrained=False, **TIMM[name][2])
        return model

    return [
        Entry(name, "timm", family, lambda name=name: made(name), pictures(side), "timm")
        for name, (family, side, _) in TIMM.items()
    ]


TEXT = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = TEXT | {"num_key_value_heads": 2, "intermediate_size": 160, "use_cache": False}
TRANSFORMERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "BERT": ("BERT", "BertConfig", "BertForSequenceClassification", TEXT | {"intermediate_size": 128}),
    "RoBERTa": ("BERT", "RobertaConfig", "RobertaForSequenceClassification",
                TEXT | {"intermediate_size": 128, "pad_token_id": 0, "max_position_embeddings": 64}),
    "DistilBERT": ("BERT", "DistilBertConfig", "DistilBertForSequenceClassification",
                   {"vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}),
    "GPT-2": ("GPT-2", "GPT2Config", "GPT2LMHeadModel",
              {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False}),
    "LLaMA": ("LLaMA, grouped queries", "LlamaConfig", "LlamaForCausalLM", DECODER),
    "Mistral": ("LLaMA, grouped queries", "MistralConfig", "MistralForCausalLM", DECODER),
    "Qwen2": ("Qwen", "Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "Qwen3": ("Qwen", "Qwen3Config", "Qwen3ForCausalLM", DECODER | {"head_dim": 16}),
    "OPT": ("OPT", "OPTConfig", "OPTForCausalLM",
            TEXT | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64, "use_cache": False}),
    "ViT": ("ViT", "ViTConfig", "ViTForImageClassification",
            {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
             "image_size": 32, "patch_size": 8}),
}  # fmt: skip


def _transformers() -> list[Entry]:
    def made(name: str) -> nn.Module:
        library = import_module("transformers")
        _, config, model, options = TRANSFORMERS[name]
        return own.First(getattr(library, model)(getattr(library, config)(**options)))

    return [
        Entry(name, "transformers", family, lambda name=name: made(name),
              pictures(32) if name == "ViT" else tokens(), "transformers")
        for name, (family, *_) in TRANSFORMERS.items()
    ]  # fmt: skip
