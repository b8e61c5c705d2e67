"""Models of transformers from small random configurations: their units, cuts, caches and scripts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import randomised
from test_plain import assert_cuts_equal_masks, kept_of
from torch import Tensor, nn

from autoprune.model.cut import cut, plan_cut
from autoprune.model.discover import discover
from autoprune.model.plain import plain_copy

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**SIZES, **TEXT, "num_key_value_heads": 2}
GPT2 = {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 4}


class Logits(nn.Module):
    def __init__(self, inner: nn.Module, **given: object) -> None:
        super().__init__()
        self.inner, self.given = inner, given

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, **self.given).logits


def each(layer: str, **widths: int) -> dict[str, int]:
    return {f"inner.{layer.format(i)}.{name.replace('__', '.')}": width
            for i in range(2) for name, width in widths.items()}  # fmt: skip


LLAMA = each("model.layers.{}", self_attn__q_proj=2, mlp__gate_proj=40)
MODELS: dict[str, tuple[str, dict[str, object], dict[str, int]]] = {
    "llama": ("Llama", GROUPED, LLAMA),
    "qwen2": ("Qwen2", GROUPED, LLAMA),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}, LLAMA),
    "gpt2": ("GPT2", GPT2, each("transformer.h.{}", attn__c_attn=4, mlp__c_fc=128)),
    "bert": ("Bert", {**SIZES, **TEXT}, each("bert.encoder.layer.{}", attention__self__query=4, intermediate__dense=40)
             | {"inner.bert.pooler.dense": 32}),
    "vit": ("ViT", IMAGES, each("vit.layers.{}", attention__q_proj=4, mlp__fc1=40)),
}  # fmt: skip
HEADS = {"bert": "ForSequenceClassification", "vit": "ForImageClassification", "gpt2": "LMHeadModel"}


def made(name: str, attention: str) -> nn.Module:
    family, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation=attention)
    inner = getattr(transformers, family + HEADS.get(name, "ForCausalLM"))(config)
    return randomised(Logits(inner, **({} if name in ("bert", "vit") else {"use_cache": False})))


def example_of(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 16, 16, generator=generator) if name == "vit" else (
        torch.randint(3, 50, (2, 9), generator=generator))  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_heads_and_feed_forward_widths(name: str, attention: str) -> None:
    example = example_of(name)
    plain = plain_copy(made(name, attention), example)
    assert not plain.refused
    assert_cuts_equal_masks(plain.model, example, MODELS[name][2])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cut_model_generates_with_its_cache(name: str) -> None:
    """A head that goes takes its part of the cache along."""
    example = example_of(name)
    model = plain_copy(made(name, "sdpa"), example).model
    anatomy = discover(model, example, blocks=False)
    kept = kept_of(anatomy, 3)
    smaller = cut(model, plan_cut(anatomy.widths, anatomy.groups, kept=kept, dropped=())).get_submodule("inner")
    generate: Callable[..., Tensor] = smaller.generate  # type: ignore[assignment]
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(example)}
    with torch.no_grad():
        cached, plain = (generate(example, use_cache=use, **settings) for use in (True, False))
        cache = smaller(example, use_cache=True).past_key_values
    assert torch.equal(cached, plain)
    roots = [group.root for group in anatomy.groups if group.heads]
    assert [layer.keys.shape[1] for layer in cache.layers] == [len(kept[root]) for root in roots]
