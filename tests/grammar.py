"""A grammar of small networks: sentences of words, strategies that draw them, and the network of each.

A sentence is a value: what failed can be copied from the message and built again. Words are in `grammar_words`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import grammar_words as words
import torch
from hypothesis import strategies as st
from networks import randomised
from torch import Tensor, nn

Family = Literal["image", "signal", "vectors", "tokens", "table"]
SIDE, STEPS, WIDTH, VOCABULARY = 8, 6, 8, 11
MOST_CHANNELS = 40


@dataclass(frozen=True)
class Word:
    """One pattern: `width` is that of what it makes, or of what lies inside where the pattern keeps its width."""

    kind: str
    width: int = 8
    variant: int = 0


@dataclass(frozen=True)
class Sentence:
    """A network: what it reads, its words in order, what it ends with, and the seed of its weights."""

    family: Family
    words: tuple[Word, ...]
    head: str = "classes"
    variant: int = 0
    seed: int = 0

    def model(self) -> nn.Module:
        """The network in evaluation mode, random weights and statistics."""
        torch.manual_seed(self.seed)  # for what `randomised` leaves alone: attention, recurrent layers, slopes
        return randomised(_Network(self), self.seed)

    def example(self, samples: int = 2) -> Tensor:
        """A batch that it reads."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        if self.family == "tokens":
            return torch.randint(0, VOCABULARY, (samples, STEPS), generator=generator)
        shapes = {"image": (3, SIDE, SIDE), "signal": (4, 16), "vectors": (STEPS, WIDTH), "table": (7,)}
        return torch.randn(samples, *shapes[self.family], generator=generator)


class _Network(nn.Module):
    """The words one after the other, and the head."""

    def __init__(self, sentence: Sentence) -> None:
        super().__init__()
        begin: dict[Family, Callable[[Sentence], nn.Module]] = {
            "image": _image, "signal": _signal, "vectors": _vectors, "tokens": _tokens, "table": _table,
        }  # fmt: skip
        self.body = begin[sentence.family](sentence)

    def forward(self, x: Tensor) -> object:
        return self.body(x)


# ---- images --------------------------------------------------------------------------------------------------------

Made = tuple[nn.Module, int]
"""A module and how many channels it makes."""

IMAGE_WORDS: Mapping[str, Callable[[int, int, int], Made]] = {
    "plain": lambda i, w, v: (words.Plain(i, w, v), w),
    "basic": lambda i, w, v: (words.Basic(i, w, v), w),
    "bottleneck": lambda i, w, v: (words.bottleneck(i, w, v), i),
    "separable": lambda i, w, v: (words.separable(i, w, v), w),
    "inverted": lambda i, w, v: (words.inverted(i, w, v), i),
    "gate": lambda i, w, v: (words.Gate(i, w, v), i),
    "interleaved": lambda i, w, v: (words.Interleaved(i, w, v), w),
    "shuffle": lambda i, w, v: (words.Shuffle(i, w, v), w),
    "dense": lambda i, w, v: (words.Dense(i, w, v), i + 2 * w),
    "branches": lambda i, w, v: (words.Branches(i, w, v), w + (4 if v % 3 == 1 else 0)),
    "skip": lambda i, w, v: (words.Skip(i, w, v), i),
    "sliced": lambda i, w, v: (words.Sliced(i, w, v), w + (w // 2 if v % 2 == 0 else 0)),
    "gated": lambda i, w, v: (words.Gated(i, w, v), w),
    "convnext": lambda i, w, _: (words.ConvNext(i, w), i),
    "scaled": lambda i, w, v: (words.Scaled(i, w, v), 2 * w if v % 4 == 3 else w),
    "odd": lambda i, w, v: (words.Odd(i, w, v), w),
    "seen": lambda i, w, v: (words.Seen(i, w, v), w),
}


def _image(sentence: Sentence) -> nn.Module:
    layers, width, side = nn.Sequential(), 3, SIDE
    if sentence.words and sentence.words[0].kind not in ("plain", "gated", "scaled"):
        layers, width = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), 8  # a stem, for patterns that keep their width
    for word in sentence.words:
        if word.kind == "pool":
            if side < SIDE or sentence.head == "denoise":
                continue
            layers.append(words.Pooled(width, word.variant))
            side //= 2
            continue
        layer, made = IMAGE_WORDS[word.kind](width, word.width, word.variant)
        if made <= MOST_CHANNELS:
            layers.append(layer)
            width = made
    if sentence.head == "denoise":
        return words.Denoiser(layers, width, sentence.variant)
    if sentence.head == "detect":
        return nn.Sequential(layers, words.Detector(width, 8, sentence.variant))
    return nn.Sequential(layers, words.Classes(width, side, sentence.variant))


# ---- signals, vectors, tokens, tables ------------------------------------------------------------------------------


def _signal(sentence: Sentence) -> nn.Module:
    layers, width = nn.Sequential(), 4
    for word in sentence.words:
        kinds: Mapping[str, Callable[[], nn.Module]] = {
            "plain": lambda word=word, width=width: words.Plain(width, word.width, word.variant, space=1),
            "temporal": lambda word=word, width=width: words.Temporal(width, word.width, word.variant),
            "recurrent": lambda word=word, width=width: words.Recurrent(width, word.width, word.variant),
        }
        layers.append(kinds[word.kind]())
        width = word.width
    if sentence.head == "flatten":
        return nn.Sequential(layers, nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8 * width, 5))
    return nn.Sequential(layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 5))


def _mixing(word: Word) -> nn.Module:
    """A residual part on vectors (N, T, WIDTH)."""
    kinds: Mapping[str, Callable[[], nn.Module]] = {
        "attention": lambda: words.Attention(WIDTH, max(word.width // 4, 1), word.variant),
        "grouped": lambda: words.Grouped(WIDTH, max(word.width // 4, 1), word.variant),
        "feed": lambda: words.Feed(WIDTH, word.width, word.variant),
        "mixer": lambda: words.Mixer(STEPS, word.width, word.variant),
    }
    return words.Normed(kinds[word.kind](), WIDTH, word.variant // 4)


class _Pooled(nn.Module):
    """(N, T, D): the mean of the positions, or the first of them."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.first = variant % 2 == 1

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.first else x.mean(1)


def _vectors(sentence: Sentence) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), *(_mixing(word) for word in sentence.words), nn.LayerNorm(WIDTH),
        _Pooled(sentence.variant), nn.Linear(WIDTH, 5),
    )  # fmt: skip


class _Decoder(nn.Module):
    """Tokens to logits; the head may share the table's weights."""

    def __init__(self, parts: Sequence[nn.Module], *, tied: bool) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(STEPS, WIDTH)
        self.parts, self.norm = nn.Sequential(*parts), nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.parts(self.table(tokens) + places)))


def _tokens(sentence: Sentence) -> nn.Module:
    return _Decoder([_mixing(word) for word in sentence.words], tied=sentence.variant % 2 == 0)


def _table(sentence: Sentence) -> nn.Module:
    layers, width = nn.Sequential(), 7
    for word in sentence.words:
        active = words.pick(word.variant, words.ACTIVATIONS)()
        if word.kind == "residual":
            body = nn.Sequential(nn.Linear(width, word.width), active, nn.Linear(word.width, width))
            layers.append(words.Around(body))
            continue
        layers.extend([nn.Linear(width, word.width), nn.BatchNorm1d(word.width), active, nn.Dropout()])
        width = word.width
    return nn.Sequential(layers, nn.Linear(width, 5))


# ---- strategies ----------------------------------------------------------------------------------------------------

KINDS: Mapping[Family, tuple[str, ...]] = {
    "image": (*IMAGE_WORDS, "pool"),
    "signal": ("plain", "temporal", "recurrent"),
    "vectors": ("attention", "feed", "mixer", "grouped"),
    "tokens": ("grouped", "feed", "attention"),
    "table": ("linear", "residual"),
}
HEADS: Mapping[Family, tuple[str, ...]] = {
    "image": ("classes", "detect", "denoise"),
    "signal": ("classes", "flatten"),
}


@st.composite
def sentences(draw: st.DrawFn) -> Sentence:
    """Any network of the grammar; more images than others, for they have most words."""
    family: Family = draw(st.sampled_from(("image", "image", "image", "image", "signal", "vectors", "tokens", "table")))
    word = st.builds(Word, st.sampled_from(KINDS[family]), st.sampled_from((4, 8, 12)), st.integers(0, 59))
    spoken = draw(st.lists(word, min_size=1, max_size=4))
    head = draw(st.sampled_from(HEADS.get(family, ("classes",))))
    return Sentence(family, tuple(spoken), head, draw(st.integers(0, 59)), draw(st.integers(0, 999)))
