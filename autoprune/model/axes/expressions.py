"""Dimensions as sums of products of axes, and which axes are one and the same.

An axis is a class of dimensions, or parts of dimensions, whose indices correspond: removing an index of one means
removing it of all. A dimension is an expression: a sum of terms laid end to end (a concatenation), each term a product
of axes in row-major order (`(heads width)` as einops writes it). Saying that two expressions are the same dimension
refines both until they agree: an axis is *bound* to the expression it turned out to be, everywhere at once. An axis
may be pinned: no index of it may go, and the reason says why; whatever it is later split into is pinned too.

Knows no tensors and no torch: sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

Term = tuple[int, ...]
"""A product of axes, row-major. The empty product is a dimension of one."""

Expr = tuple[Term, ...]
"""A sum of terms, end to end. Never empty."""

ONE: Expr = ((),)
Places = dict[int, list[list[int]]]
"""For each axis, for each of its indices: the positions along a dimension that belong to it, ascending."""


class Axes:
    """All axes of one analysis. Axes are numbers; what is known of them is here, and grows only."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._bound: dict[int, Expr] = {}
        self._pins: dict[int, str] = {}
        self._marks: dict[int, set[str]] = {}

    # ---- making and reading ----------------------------------------------------------------------------------------

    def fresh(self, size: int, *, pin: str | None = None, marks: Iterable[str] = ()) -> Expr:
        """A new dimension of `size`; of one, it has no axis at all."""
        if size == 1:
            return ONE
        self._sizes.append(size)
        axis = len(self._sizes) - 1
        if pin is not None:
            self._pins[axis] = pin
        self._marks[axis] = set(marks)
        return ((axis,),)

    def size(self, expr: Expr) -> int:
        """How many positions a dimension has."""
        return sum(self._term_size(term) for term in expr)

    def width(self, axis: int) -> int:
        """How many indices an axis has."""
        return self._sizes[axis]

    def pin_of(self, axis: int) -> str | None:
        """Why no index of the axis may go, if so."""
        return self._pins.get(axis)

    def marks_of(self, axis: int) -> frozenset[str]:
        """What has been noted of an axis."""
        return frozenset(self._marks[axis])

    def resolve(self, expr: Expr) -> Expr:
        """`expr` in the axes as they are known now: products spliced in, sums spread where they lead a product."""
        return tuple(done for term in expr for done in self._resolve_term(term))

    def leaves(self, expr: Expr) -> frozenset[int]:
        """The axes that a dimension is made of, none of them bound."""
        return frozenset(self._walk(expr))

    def is_pinned(self, expr: Expr) -> bool:
        """Whether nothing of a dimension may go."""
        return all(leaf in self._pins for leaf in self.leaves(expr))

    # ---- learning --------------------------------------------------------------------------------------------------

    def pin(self, expr: Expr, reason: str) -> None:
        """Say that no index of any axis in `expr` may go. The first reason stays."""
        for leaf in self.leaves(expr):
            self._pins.setdefault(leaf, reason)

    def mark(self, expr: Expr, note: str) -> None:
        """Note something of every axis in `expr`."""
        for leaf in self.leaves(expr):
            self._marks[leaf].add(note)

    def product(self, exprs: Sequence[Expr]) -> Expr:
        """Dimensions merged into one, the first slowest."""
        return (tuple(axis for expr in exprs for axis in self._as_term(self.resolve(expr))),)

    def split(self, expr: Expr, sizes: Sequence[int], *, reason: str) -> list[Expr]:
        """A dimension seen as a product of dimensions of `sizes`."""
        if self.is_pinned(expr):
            return [self.fresh(size, pin=self._any_pin(expr, reason)) for size in sizes]
        factors = [self.fresh(size) for size in sizes]
        self.unify(expr, self.product(factors), reason=reason)
        return [self.resolve(factor) for factor in factors]

    def pieces(self, expr: Expr, sizes: Sequence[int], *, reason: str) -> list[Expr]:
        """A dimension cut into parts of `sizes`, end to end. Empty parts are ONE and not to be used."""
        if self.is_pinned(expr):
            return [self.fresh(max(size, 1), pin=self._any_pin(expr, reason)) for size in sizes]
        parts = [self.fresh(max(size, 1)) for size in sizes]
        self.unify(expr, tuple(part[0] for part, size in zip(parts, sizes, strict=True) if size), reason=reason)
        return [self.resolve(part) for part in parts]

    def unify(self, left: Expr, right: Expr, *, reason: str) -> bool:
        """Say that two dimensions are the same. Where that cannot be refined, both are pinned: false."""
        try:
            self._unify(left, right)
        except _Clash:
            self.pin(left, reason)
            self.pin(right, reason)
            return False
        return True

    def places(self, expr: Expr) -> tuple[Places, frozenset[int]]:
        """Where the axes of a dimension lie along it, and those that lie across themselves (twice in one product)."""
        found: Places = {}
        tangled: set[int] = set()
        offset = 0
        for term in self.resolve(expr):
            for axis, places in self._term_places(term, tangled).items():
                lists = found.setdefault(axis, [[] for _ in places])
                for before, more in zip(lists, places, strict=True):
                    before.extend(offset + place for place in more)
            offset += self._term_size(term)
        return found, frozenset(tangled)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _term_size(self, term: Term) -> int:
        return math.prod(self._sizes[axis] for axis in term)

    def _resolve_term(self, term: Term) -> Iterator[Term]:
        flat: list[int] = []
        queue = list(term)
        while queue:
            axis = queue.pop(0)
            bound = self._bound.get(axis)
            if bound is None or (flat and len(bound) > 1):
                flat.append(axis)
            elif len(bound) == 1:
                queue[:0] = bound[0]
            else:  # a sum that leads: (a + b) c = a c + b c
                for part in bound:
                    yield from self._resolve_term((*part, *queue))
                return
        yield tuple(flat)

    def _walk(self, expr: Expr) -> Iterator[int]:
        for term in expr:
            for axis in term:
                bound = self._bound.get(axis)
                if bound is None:
                    yield axis
                else:
                    yield from self._walk(bound)

    def _any_pin(self, expr: Expr, otherwise: str) -> str:
        """The reason of the widest axis, which says most."""
        leaves = sorted(self.leaves(expr), key=lambda leaf: (-self.width(leaf), leaf))
        return next((self._pins[leaf] for leaf in leaves), otherwise)

    def _as_term(self, expr: Expr) -> Term:
        """A sum as one factor of a product: an axis that is bound to it."""
        if len(expr) == 1:
            return expr[0]
        ((axis,),) = self.fresh(self.size(expr))
        self._bound[axis] = expr
        return (axis,)

    def _bind(self, axis: int, expr: Expr) -> None:
        """Axis is `expr` from now on; what is known of it holds for all that it is made of."""
        self._bound[axis] = expr
        if axis in self._pins:
            self.pin(expr, self._pins[axis])
        for note in self._marks[axis]:
            self.mark(expr, note)

    def _unify(self, left: Expr, right: Expr) -> None:
        """Take terms off the front of both, cutting the longer one where the shorter ends."""
        if self.size(left) != self.size(right):
            raise _Clash
        done = 0
        while True:
            left, right = self.resolve(left), self.resolve(right)
            if left == right:
                return
            for one, other in ((left, right), (right, left)):
                if len(one) == 1 and len(one[0]) == 1 and one[0][0] not in self._bound:
                    self._bind(one[0][0], other)
                    return
            first, second = (self._after(side, done) for side in (left, right))
            if not first:
                return
            sizes = self._term_size(first[0]), self._term_size(second[0])
            if sizes[0] == sizes[1]:
                self._unify_terms(first[0], second[0])
                done += sizes[0]
            else:
                self._cut(second[0] if sizes[0] < sizes[1] else first[0], min(sizes))

    def _after(self, expr: Expr, done: int) -> Expr:
        """The terms of a resolved expression from position `done` on, which is where one begins."""
        for index, term in enumerate(expr):
            if done <= 0:
                return expr[index:]
            done -= self._term_size(term)
        return ()

    def _unify_terms(self, left: Term, right: Term) -> None:
        """Two products of one size: factor by factor, splitting the larger of two that differ."""
        while True:
            lefts, rights = self.resolve((left,)), self.resolve((right,))
            if lefts == rights:
                return
            if len(lefts) > 1 or len(rights) > 1:  # a factor became a sum on the way
                self._unify(lefts, rights)
                return
            left, right = lefts[0], rights[0]
            place = next(i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
            self._match(left[place], right[place])

    def _match(self, left: int, right: int) -> None:
        """Two factors that begin at one place of two products of one size: make them equal, or the smaller a factor."""
        small, large = sorted((left, right), key=self.width)
        if self.width(small) == self.width(large):
            if large in self._bound and small in self._bound:
                self._unify(self._bound[small], self._bound[large])
                self._bound[large] = ((small,),)
            elif large in self._bound:
                self._bind(small, ((large,),))
            else:
                self._bind(large, ((small,),))
            return
        if self.width(large) % self.width(small):
            raise _Clash
        rest = self.fresh(self.width(large) // self.width(small))
        split: Expr = ((small, *rest[0]),)
        if large in self._bound:
            self._unify(self._bound[large], split)
            self._bound[large] = split
        else:
            self._bind(large, split)

    def _cut(self, term: Term, at: int) -> None:
        """Make position `at`, inside a resolved product, a boundary between terms."""
        axis, rest = term[0], self._term_size(term[1:])
        before, within = divmod(at, rest)
        sizes = (before, self.width(axis) - before) if not within else (before, 1, self.width(axis) - before - 1)
        parts = [self.fresh(size)[0] for size in sizes if size]
        self._bind(axis, tuple(parts))
        if within and term[1:]:
            for inner in self.resolve((term[1:],)):
                if within < self._term_size(inner):
                    self._cut(inner, within)
                    return
                within -= self._term_size(inner)
                if not within:
                    return

    def _term_places(self, term: Term, tangled: set[int]) -> Places:
        found: Places = {}
        after = self._term_size(term)
        before = 1
        for factor in term:
            width = self.width(factor)
            after //= width
            inner: Places = {factor: [[index] for index in range(width)]}
            if factor in self._bound:
                inner, more = self.places(self._bound[factor])
                tangled |= more
            for axis, places in inner.items():
                if axis in found:
                    tangled.add(axis)
                    continue
                found[axis] = [
                    [(outer * width + place) * after + last
                     for outer in range(before) for place in part for last in range(after)]
                    for part in places
                ]  # fmt: skip
            before *= width
        return found


class _Clash(Exception):  # noqa: N818 (never leaves this file)
    """Two expressions have no common refinement."""
