"""A tiny Llama with weights as they are drawn; and tokens for it. Needs torch and transformers; downloads nothing."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def model() -> nn.Module:
    """Two layers, four heads on two keys and values."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    network: nn.Module = LlamaForCausalLM(LlamaConfig(**shape, **heads, use_cache=False, max_position_embeddings=64))
    return network.eval()


def data() -> dict[str, object]:
    """Random tokens, each to be foretold by those before it."""
    tokens = torch.randint(0, 64, (96, 17), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return {"calibration": (inputs[:48], targets[:48]), "validation": (inputs[48:], targets[48:])}
