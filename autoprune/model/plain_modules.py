"""Plain modules that stand in for opaque ones, with the same arithmetic and weights that can be seen and cut.

Needs torch alone and nothing of autoprune: scripts that rebuild a cut model carry the text of this file.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize, remove_weight_norm


class Attention(nn.Module):
    """What `nn.MultiheadAttention` computes, with projections that are linear layers; as many heads as they have.

    `fused`: one projection makes queries, keys and values. `silent`: nobody reads the attention weights that are asked
    for, so none are made. Shapes and masks are those of `nn.MultiheadAttention`.
    """

    in_proj_weight = None  # what nn.TransformerEncoderLayer looks at before it takes its own way past this module
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, other: nn.MultiheadAttention, *, fused: bool, silent: bool) -> None:
        super().__init__()
        self.embed_dim, self.head_width = other.embed_dim, other.head_dim
        self.batch_first, self.dropout = other.batch_first, other.dropout
        self.fused, self.silent = fused, silent
        if other._qkv_same_embed_dim:
            weights = other.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(w.detach() for w in (other.q_proj_weight, other.k_proj_weight, other.v_proj_weight))
        given = other.in_proj_bias
        biases = (None, None, None) if given is None else given.detach().chunk(3)
        if fused:
            self.in_proj = linear(torch.cat(weights), None if given is None else given.detach())
        else:
            self.q_proj, self.k_proj, self.v_proj = map(linear, weights, biases)
        bias = other.out_proj.bias
        self.out_proj = linear(other.out_proj.weight.detach(), None if bias is None else bias.detach())

    @property
    def num_heads(self) -> int:
        """How many heads there are."""
        return int(self.out_proj.in_features // self.head_width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attended values, and the weights where they are asked for, as `nn.MultiheadAttention` returns them."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give that too")
        is_batched = query.dim() == 3
        if not is_batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        width = self.head_width
        hinted = is_causal and key_padding_mask is None and not need_weights
        q, k, v = (x.view(*x.shape[:2], -1, width).transpose(1, 2) for x in self._projected(query, key, value))
        mask = None if hinted else self._mask(attn_mask, key_padding_mask, q)  # q: (n, heads, positions, width)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights and not self.silent:
            scores = (q * width**-0.5) @ k.transpose(-2, -1)
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights[0]
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=hinted)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return self._arranged(output) if is_batched else output[0], weights

    def _arranged(self, x: Tensor) -> Tensor:
        """To (n, positions, features) and back."""
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not self.fused:
            return tuple(
                layer(self._arranged(x))
                for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
            )
        if query is key and key is value:
            return tuple(self.in_proj(self._arranged(query)).chunk(3, -1))
        return tuple(self.in_proj(self._arranged(x)).chunk(3, -1)[i] for i, x in enumerate((query, key, value)))

    @staticmethod
    def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the scores, in shapes that broadcast to (n, heads, positions, keys)."""
        parts = []
        if attn_mask is not None:
            parts.append(attn_mask if attn_mask.dim() == 2 else attn_mask.view(len(like), -1, *attn_mask.shape[1:]))
        if key_padding_mask is not None:
            parts.append(key_padding_mask[:, None, None])
        floats = [
            torch.zeros_like(part, dtype=like.dtype).masked_fill(part, -torch.inf) if part.dtype == torch.bool else part
            for part in parts
        ]
        return sum(floats[1:], floats[0]) if floats else None


class Recurrent(nn.Module):
    """What `nn.LSTM`, `nn.GRU` or `nn.RNN` of several layers or directions computes, by one module for each of them.

    Each has a width of its own. Nobody reads the final states, so none are returned.
    """

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.batch_first, self.dropout, self.num_layers = other.batch_first, other.dropout, other.num_layers
        self.directions = ("", "_reverse") if other.bidirectional else ("",)
        for layer in range(other.num_layers):
            for direction in self.directions:
                held = {key: getattr(other, f"{key}_l{layer}{direction}").detach() for key in self._keys(other)}
                own = type(other)(
                    held["weight_ih"].shape[1], other.hidden_size, bias=other.bias, batch_first=other.batch_first,
                    device=held["weight_ih"].device, dtype=held["weight_ih"].dtype,
                    **({"nonlinearity": other.nonlinearity} if isinstance(other, nn.RNN) else {}),
                )  # fmt: skip
                own.load_state_dict({f"{key}_l0": weight for key, weight in held.items()})
                self.add_module(f"l{layer}{direction}", own)

    @staticmethod
    def _keys(other: Any) -> tuple[str, ...]:
        return ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if other.bias else ()))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Outputs of the last layer, the directions side by side."""
        time = 1 if self.batch_first and x.dim() == 3 else 0
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = functional.dropout(x, self.dropout, self.training)
            parts = []
            for direction in self.directions:
                own = self.get_submodule(f"l{layer}{direction}")
                parts.append(own(x.flip(time))[0].flip(time) if direction else own(x)[0])
            x = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return x, None


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with these weights (outputs, inputs)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def unparametrized(module: Any) -> nn.Module:
    """A module whose weight is a parameter, not computed. The class of `module`, which copies of it share, stays."""
    base = type(module).__bases__[0]
    made: nn.Module = object.__new__(base)
    made.__dict__.update(module.__dict__)
    made._modules = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    made._parameters = {"weight": nn.Parameter(module.weight.detach().clone()), **module._parameters}
    return made


def plain(module: Any, how: tuple[str, ...]) -> nn.Module:
    """What stands in for `module`: its kind first, then how it is used."""
    if how[0] == "attention":
        return Attention(module, fused="fused" in how, silent="silent" in how)
    if how[0] == "recurrent":
        return Recurrent(module)
    if how[0] == "transposed":
        bias = getattr(module, "bias", None)
        return linear(module.weight.detach().T.contiguous(), None if bias is None else bias.detach())
    if parametrize.is_parametrized(module):
        return unparametrized(module)
    made: nn.Module = remove_weight_norm(module)
    return made


def stand_in(model: nn.Module, kinds: dict[str, tuple[str, ...]]) -> None:
    """Put the plain modules in the places of the named ones, in place."""
    for name, how in kinds.items():
        parent, _, child = name.rpartition(".")
        made = plain(model.get_submodule(name), how)
        setattr(model.get_submodule(parent), child, made.train(model.training))
    if any(how[0] == "attention" for how in kinds.values()):
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
