"""One run of a model with an expression for every dimension of every tensor.

Knows how to see the operations below the modules and which module runs them; the rules say what each means. Nothing
of the model is changed: hooks go, flags come back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from autoprune.model.axes.expressions import Axes, Expr
from autoprune.model.axes.moves import broadcast
from autoprune.model.axes.operation import NORMALISED, Dims, Op, Rule
from autoprune.model.axes.products import Product, products_of
from autoprune.model.axes.rules import RULES

STATISTICS = (nn.modules.batchnorm._BatchNorm,)
"""Modules whose buffers are cut with their parameters."""
RECURRENT = (nn.RNNBase,)
"""Modules that make tensors of the width that their parameters have, whatever that is."""


@dataclass(slots=True)
class Traced:
    """What a run showed: the dimensions of every parameter and buffer by name, and which modules shape which axes."""

    axes: Axes
    dims: dict[str, Dims]
    runs: Counter[str]
    """How often each module ran, in the order in which they first ended."""
    shaped: list[tuple[str, Dims]] = field(default_factory=list)
    """For every reshape, split or expansion: the module that ran it, and what came of it."""
    products: list[Product] = field(default_factory=list)
    """Every product, in execution order."""
    reads: set[tuple[frozenset[str], Expr]] = field(default_factory=set)
    """For every product: the parameters on one side of it, and the dimension that it sums over."""

    def read_by(self, parameter: str, dim: int) -> frozenset[int]:
        """The axes whose channels a parameter multiplies and sums over along one of its dimensions: what it reads.

        An axis that lies along two of them (the state of a recurrent layer) is read along the one that is summed over.
        """
        exprs = [expr for names, expr in self.reads if parameter in names]
        summed = {self.axes.resolve(expr) for expr in exprs}
        leaves = [self.axes.leaves(expr) for expr in self.dims[parameter]]
        elsewhere = {axis for place, others in enumerate(leaves) if place != dim for axis in others}
        is_summed = self.axes.resolve(self.dims[parameter][dim]) in summed
        read = frozenset(axis for expr in exprs for axis in self.axes.leaves(expr)) & leaves[dim]
        return frozenset(axis for axis in read if is_summed or axis not in elsewhere)

    def normalised(self, axis: int) -> frozenset[str]:
        """The modules that scale the channels of an axis by all of them."""
        marks = self.axes.marks_of(axis)
        return frozenset(note.removeprefix(NORMALISED) for note in marks if note.startswith(NORMALISED))

    def shapers(self, axis: int) -> tuple[str, ...]:
        """The modules that reshape an axis, in execution order."""
        return tuple(dict.fromkeys(m for m, dims in self.shaped if any(axis in self.axes.leaves(e) for e in dims)))


def trace(model: nn.Module, example: Tensor) -> Traced:
    """Run `model` on `example` and learn what its dimensions are. Raises whatever the model raises."""
    axes = Axes()
    traced = Traced(axes, {}, Counter())
    mode = _Watch(traced)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, shared in names.items():
        mode.know(parameter, [axes.fresh(size) for size in parameter.shape], static=True, origins=frozenset(shared))
        traced.dims |= {name: mode.dims_of(parameter) for name in shared}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        pin = None if isinstance(owner, STATISTICS) else f"the buffer {name} is of its size"
        mode.know(buffer, [axes.fresh(size, pin=pin) for size in buffer.shape], static=True)
        traced.dims[name] = mode.dims_of(buffer)
    mode.know(example, [axes.fresh(size, pin="it is the model's input") for size in example.shape], static=False)
    with torch.no_grad(), _evaluating(model), _following(model, mode), sdpa_kernel([SDPBackend.MATH]), mode:
        output = model(example)
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor):
            for expr in mode.dims_of(tensor):
                axes.pin(expr, "it makes the model's output")
    return traced


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, after the composite ones have come apart."""

    def __init__(self, traced: Traced) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traced = traced
        self.stack: list[tuple[str, nn.Module]] = []
        self._dims: Any = WeakTensorKeyDictionary()  # tensor -> (dims, static, parameters that it is made of)

    def know(self, tensor: Tensor, dims: Dims, *, static: bool, origins: frozenset[str] = frozenset()) -> None:
        self._dims[tensor] = (dims, static, origins)

    def dims_of(self, tensor: Tensor) -> Dims:
        """The dimensions of a tensor; of one that was never seen, fixed ones."""
        if tensor not in self._dims:
            pin = f"a constant in {self.module or 'the model itself'} is of its size"
            self.know(tensor, [self.traced.axes.fresh(size, pin=pin) for size in tensor.shape], static=True)
        dims: Dims = self._dims[tensor][0]
        return dims

    def is_static(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of parameters and constants alone."""
        return tensor not in self._dims or bool(self._dims[tensor][1])

    def origins(self, tensor: Tensor) -> frozenset[str]:
        """The parameters that a static tensor is made of."""
        found: frozenset[str] = self._dims[tensor][2] if tensor in self._dims else frozenset()
        return found

    def note_read(self, tensor: Tensor, expr: Expr) -> None:
        """Remember that a product sums over a dimension of `tensor`."""
        self.traced.reads.add((self.origins(tensor), expr))

    @property
    def module(self) -> str:
        return self.stack[-1][0] if self.stack else ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs:
            self._learn(func, _by_name(func, args, kwargs), tensors, outputs)
        return result

    def _learn(self, func: Any, args: Mapping[str, Any], tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        name = func.overloadpacket.__name__
        plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        in_norm = bool(self.stack) and "norm" in type(self.stack[-1][1]).__name__.lower()
        op = Op(
            plain, self.traced.axes, args, tensors, outputs, self.dims_of, self.is_static, self.module, in_norm,
            self.note_read,
        )  # fmt: skip
        static = all(self.is_static(tensor) for tensor in tensors)
        found = self._found(op, pointwise=torch.Tag.pointwise in func.tags)
        self.traced.products += products_of(op)
        origins = frozenset(name for tensor in tensors for name in self.origins(tensor)) if static else frozenset()
        for tensor, dims in zip(outputs, found, strict=True):
            self.know(tensor, dims, static=static, origins=origins)
        if plain in ("view", "_unsafe_view", "split", "split_with_sizes", "slice", "expand", "native_group_norm"):
            before = [expr for tensor in tensors for expr in self.dims_of(tensor)]
            self.traced.shaped.append((self.module, [*before, *(expr for dims in found for expr in dims)]))

    def _found(self, op: Op, *, pointwise: bool) -> list[Dims]:
        """The dimensions of all outputs, by the rule if there is one and it fits."""
        rule = RULES.get(op.name, broadcast if pointwise else None)
        given: Sequence[Dims] = ()
        if rule is not None and op.tensors and op.outputs[0].numel():
            given = _answer(rule, op)
        if not given or [op.axes.size(expr) for expr in given[0]] != list(op.outputs[0].shape):
            reason = op.why("is not understood") if op.tensors else op.why("makes it of a fixed size")
            for tensor in op.tensors:
                for expr in self.dims_of(tensor):
                    op.axes.pin(expr, reason)
            is_own = not op.tensors and bool(self.stack) and isinstance(self.stack[-1][1], RECURRENT)
            made = op.axes.fresh if is_own else (lambda size: op.fixed(size, reason))
            given = [[made(size) for size in tensor.shape] for tensor in op.outputs]
        spare = [[op.fixed(size, op.why("makes it")) for size in t.shape] for t in op.outputs[len(given) :]]
        return [*given[: len(op.outputs)], *spare]


def _answer(rule: Rule, op: Op) -> Sequence[Dims]:
    """What a rule says, for each output; nothing where the operation is not of the form that the rule knows."""
    try:
        answer: Any = rule(op)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return ()
    first_only = all(isinstance(entry, tuple) for entry in answer)
    given: Sequence[Dims] = [answer] if first_only else answer
    return given


def _by_name(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by the names of the operation's schema, defaults filled in."""
    named = {}
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args) and not argument.kwarg_only:
            named[argument.name] = args[place]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and modules that run step by step as they are written, for the time of the block."""
    training = [module for module in model.modules() if module.training]
    fused, fast = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    try:
        for module in training:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, RECURRENT) for module in model.modules()):
            torch._C._set_mkldnn_enabled(False)  # its kernel for them is one operation; convolutions want theirs
        yield
    finally:
        torch._C._set_mkldnn_enabled(fast)
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in training:
            module.training = True


@contextmanager
def _following(model: nn.Module, mode: _Watch) -> Iterator[None]:
    """Keep the stack of modules that are running, for the time of the block."""
    handles = []

    def follow(name: str, module: nn.Module) -> None:
        def leave(*_: object) -> None:
            mode.traced.runs[name] += 1
            mode.stack.pop()

        handles.append(module.register_forward_pre_hook(lambda *_: mode.stack.append((name, module))))
        handles.append(module.register_forward_hook(leave))

    try:
        for name, module in model.named_modules():
            follow(name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
