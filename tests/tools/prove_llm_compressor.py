"""llm-compressor: its own parser takes the recipe, and a run of it reaches our sparsities, patterns and bits."""

import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import Case, tell
from llmcompressor.recipe import Recipe
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")


def bits_asked(recipe: Recipe) -> dict[str, int]:
    """By layer."""
    groups = [
        group for modifier in recipe.modifiers for group in (getattr(modifier, "config_groups", None) or {}).values()
    ]
    return {target: group.weights.num_bits for group in groups for target in group.targets}


recipe = Recipe.create_instance(str(export / "recipe.yaml"))
bits = bits_asked(recipe)
sparse = [modifier for modifier in recipe.modifiers if modifier.__class__.__name__ != "QuantizationModifier"]
words = Tokenizer(models.WordLevel({str(word): word for word in range(64)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0")
with tempfile.TemporaryDirectory() as folder:
    case.dense().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(2))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(8)]
    loader.prune(model, batches, tokenizer)
    pruned = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    model.save_pretrained(f"{folder}/stored", save_compressed=True)
    stored = {
        key: value for file in Path(folder, "stored").glob("*.safetensors") for key, value in load_file(file).items()
    }

off, count = 0.0, 0
for modifier in sparse:
    gone, of = map(int, modifier.mask_structure.split(":"))
    for name in modifier.targets:
        zero, wanted = pruned[name] == 0, 1 - case.masks[name].float().mean().item()
        if bits.get(name, 32) < 32:  # ours counts what rounds to zero, too
            assert zero.float().mean().item() <= wanted + 1e-6, f"{name}: more zeros"
        elif case.cut[f"{name}.weight"].shape == zero.shape:
            off = max(off, abs(zero.float().mean().item() - wanted))
        if of:
            assert bool((zero.view(len(zero), -1, of).sum(-1) == gone).all()), f"{name}: not {modifier.mask_structure}"
        count += 1
assert off < 1e-3, f"{case.name}: reaches another sparsity, by {off}"
for name, number in bits.items():
    outputs, inputs = pruned[name].shape
    assert stored[f"{name}.weight_scale"].shape == (outputs, 1), f"{name}: not one scale an output"
    packed = stored.get(f"{name}.weight_packed", stored.get(f"{name}.weight"))
    held = packed.element_size() * 8 * packed.shape[1] / inputs
    assert not packed.is_floating_point(), f"{name}: floats are stored"
    assert held == number, f"{name}: {held} bits a weight, not {number}"
tell(
    ("llmcompressor", "compressed-tensors", "transformers", "torch"),
    modifiers=[type(modifier).__name__ for modifier in recipe.modifiers],
    sparsity={"layers": count, "off": off},
    stored_bits={"layers": len(bits), "bits": sorted(set(bits.values()))},
)
