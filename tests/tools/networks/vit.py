"""A small vision transformer with attention written out; and data for it. Needs torch alone."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Query, key and value by layers of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, _ = x.shape
        parts = [
            layer(x).view(count, tokens, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*parts)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(count, tokens, -1))
        return out


class Layer(nn.Module):
    """Attention and a feed-forward part, both added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.gelu, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(self.gelu(self.up(self.norm2(x))))
        return out


class ViT(nn.Module):
    """Two layers over 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, 32) * 0.1)
        self.layers = nn.ModuleList(Layer(32, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x.mean(1)))
        return logits


def model() -> nn.Module:
    """With weights as they are drawn."""
    torch.manual_seed(0)
    return ViT().eval()


def data() -> dict[str, object]:
    """Random images, and classes that the model itself sees in them."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(384, 3, 16, 16, generator=generator)
    with torch.no_grad():
        targets = model()(inputs).argmax(1)
    return {"calibration": (inputs[:256], targets[:256]), "validation": (inputs[256:], targets[256:])}
