"""Rules for operations that move, split, join and repeat dimensions, or look along them."""

from __future__ import annotations

import math

from autoprune.model.axes.expressions import ONE
from autoprune.model.axes.operation import NORMALISED, PARTS, SPACE, Dims, Op


def broadcast(op: Op) -> Dims:
    """Element by element: dimensions aligned from the right are the same, where they are not of one."""
    shape = op.outputs[0].shape
    found: Dims = []
    operands = [op.dims_of(tensor) for tensor in op.tensors]
    for back in range(len(shape), 0, -1):
        found.append(op.same(*(dims[-back] for dims in operands if len(dims) >= back)))
    return found


def same_as_first(op: Op) -> Dims:
    """The output has the dimensions of the first tensor, and nothing is mixed."""
    return list(op.dims_of(op.tensors[0]))


def view(op: Op) -> Dims:
    """Dimensions merged and split: the smallest blocks of both shapes that hold equally many elements."""
    shape = op.outputs[0].shape
    dims = [expr for expr in op.dims("self") if op.axes.size(expr) > 1]
    places = [place for place, size in enumerate(shape) if size > 1]
    found: Dims = [ONE] * len(shape)
    while dims:
        block, targets = [dims.pop(0)], [places.pop(0)]
        while (held := math.prod(map(op.axes.size, block))) != (wanted := math.prod(shape[t] for t in targets)):
            if held < wanted:
                block.append(dims.pop(0))
            else:
                targets.append(places.pop(0))
        whole = block[0] if len(block) == 1 else op.axes.product(block)
        parts = [whole]
        if len(targets) > 1:
            reason = op.why("splits it where something else does not")
            parts = op.axes.split(whole, [shape[t] for t in targets], reason=reason)
        for target, part in zip(targets, parts, strict=True):
            found[target] = part
    return found


def permute(op: Op) -> Dims:
    """Dimensions in a new order."""
    dims = op.dims("self")
    return [dims[place] for place in op.args["dims"]]


def transpose(op: Op) -> Dims:
    """Two dimensions change places; all two of a matrix."""
    dims = op.dims("self")
    if "dim0" not in op.args:
        return dims[::-1]
    first, second = op.place(dims, "dim0"), op.place(dims, "dim1")
    dims[first], dims[second] = dims[second], dims[first]
    return dims


def squeeze(op: Op) -> Dims:
    """Dimensions of one come and go; the others keep their order."""
    wide = [expr for expr in op.dims("self") if op.axes.size(expr) > 1]
    return [ONE if size == 1 else wide.pop(0) for size in op.outputs[0].shape]


def as_strided(op: Op) -> Dims:
    """The same elements in the same order, laid out anew where a dimension is one: pools to one position do that."""
    dims, shape, strides = op.dims("self"), op.args["size"], op.args["stride"]
    sizes = [size for size in shape if size > 1]
    dense = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    steps = [stride for size, stride in zip(shape, strides, strict=True) if size > 1]
    if steps != dense or [op.axes.size(expr) for expr in dims] != list(shape):
        raise ValueError("another view of the elements than their own")
    return dims


def expand(op: Op) -> Dims:
    """A dimension that is repeated is a new axis."""
    shape, dims = op.outputs[0].shape, op.dims("self")
    dims = [ONE] * (len(shape) - len(dims)) + dims
    return [expr if op.axes.size(expr) == size else op.axes.fresh(size)
            for expr, size in zip(dims, shape, strict=True)]  # fmt: skip


def repeat(op: Op) -> Dims:
    """Whole copies end to end: a new axis, slowest."""
    dims = op.dims("self")
    dims = [ONE] * (len(op.args["repeats"]) - len(dims)) + dims
    return [op.axes.product((op.axes.fresh(times), expr))
            for times, expr in zip(op.args["repeats"], dims, strict=True)]  # fmt: skip


def select(op: Op) -> Dims:
    """One index by number: all of them stay."""
    dims = op.dims("self")
    op.axes.pin(dims.pop(op.place(dims)), op.why("picks one of it by number"))
    return dims


def unbind(op: Op) -> list[Dims]:
    """Every index by number: all of them stay."""
    dims = op.dims("self")
    op.axes.pin(dims.pop(op.place(dims)), op.why("takes it apart"))
    return [dims] * len(op.outputs)


def slice_(op: Op) -> Dims:
    """A piece of a dimension, or every n-th position of it."""
    dims, place = op.dims("self"), op.place(op.dims("self"))
    size, taken, step = op.axes.size(dims[place]), op.outputs[0].shape[place], op.args["step"]
    start = op.args["start"] or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if taken == size:
        return dims
    if step == 1:
        reason = op.why("takes a piece of it that does not fit the others")
        dims[place] = op.axes.pieces(dims[place], (start, taken, size - start - taken), reason=reason)[1]
    elif start < step and taken * step == size and not op.axes.is_pinned(dims[place]):
        every, among = op.axes.split(dims[place], (taken, step), reason=op.why("takes every few of it"))
        op.axes.pin(among, op.why("takes every few of it"))
        dims[place] = every
    else:
        op.axes.pin(dims[place], op.why("takes every few of it"))
        dims[place] = op.fixed(taken, op.why("takes every few of it"))
    return dims


def split(op: Op) -> list[Dims]:
    """Equal parts go together, as `chunk` will make them equal again; others are pieces of their own."""
    dims, place = op.dims("self"), op.place(op.dims("self"))
    sizes = [tensor.shape[place] for tensor in op.outputs]
    reason = op.why("splits it where something else does not")
    if "split_sizes" not in op.args and len(set(sizes)) == 1:
        count, part = op.axes.split(dims[place], (len(sizes), sizes[0]), reason=reason)
        op.axes.pin(count, op.why(PARTS))
        parts = [part] * len(sizes)
    else:
        parts = op.axes.pieces(dims[place], sizes, reason=reason)
    return [[*dims[:place], part, *dims[place + 1 :]] for part in parts]


def glu(op: Op) -> Dims:
    """Two halves that go together, the first gated by the second."""
    dims, place = op.dims("self"), op.place(op.dims("self"))
    sizes = (2, op.outputs[0].shape[place])
    two, dims[place] = op.axes.split(dims[place], sizes, reason=op.why("halves it"))
    op.axes.pin(two, op.why("halves it"))
    return dims


def cat(op: Op) -> Dims:
    """Parts laid end to end along one dimension; the same along the others."""
    parts = [op.dims_of(tensor) for tensor in op.args["tensors"] if tensor.numel()]
    place = op.place(list(parts[0]))
    found = [ONE if i == place else op.same(*(dims[i] for dims in parts)) for i in range(len(parts[0]))]
    found[place] = tuple(term for dims in parts for term in op.axes.resolve(dims[place]))
    return found


def stack(op: Op) -> Dims:
    """Parts along a new dimension, as many as the forward pass says."""
    parts = [op.dims_of(tensor) for tensor in op.args["tensors"]]
    found = [op.same(*(dims[i] for dims in parts)) for i in range(len(parts[0]))]
    found.insert(int(op.args["dim"]) % (len(found) + 1), op.fixed(len(parts), op.why("stacks a fixed number of parts")))
    return found


def pad(op: Op) -> Dims:
    """Constants before and after: pieces of their own, as many as the forward pass says."""
    dims, amounts = op.dims("self"), list(op.args["pad"])
    for index in range(len(amounts) // 2):
        place, (before, after) = len(dims) - 1 - index, amounts[2 * index : 2 * index + 2]
        if (before or after) and (before < 0 or after < 0 or op.axes.is_pinned(dims[place])):
            op.axes.pin(dims[place], op.why("crops it"))
            dims[place] = op.fixed(op.outputs[0].shape[place], op.why("pads it by a fixed number"))
            continue
        ends = [op.fixed(size, op.why("pads it by a fixed number")) if size else () for size in (before, after)]
        dims[place] = (*ends[0], *op.axes.resolve(dims[place]), *ends[1])
    return dims


def mixed(op: Op) -> Dims:
    """Along one dimension all positions see each other, or their number matters."""
    dims = op.dims_of(op.tensors[0])
    op.axes.pin(dims[op.place(dims)], op.why("mixes it"))
    return list(dims) if op.outputs[0].shape == op.tensors[0].shape else [
        expr if op.axes.size(expr) == size else op.fixed(size, op.why("mixes it"))
        for expr, size in zip(dims, op.outputs[0].shape, strict=True)
    ]  # fmt: skip


def reorder(op: Op) -> Dims:
    """Some dimensions turned round or shifted: their positions are not told apart by number any more."""
    dims = op.dims("self")
    for place in op.args["dims"] or range(len(dims)):
        op.axes.pin(dims[place], op.why("puts it in another order"))
    return dims


def reduce(op: Op) -> list[Dims]:
    """Dimensions that are summed or averaged over: fewer of them are not the same as zeros among them."""
    dims, given = op.dims_of(op.tensors[0]), op.args.get("dim")
    places = {given} if isinstance(given, int) else set(given or range(len(dims)))
    places = {place % len(dims) for place in places}
    for place in places:
        if op.in_norm:
            op.axes.mark(dims[place], NORMALISED + op.module)
        else:
            op.axes.pin(dims[place], op.why("reduces over it"))
    keeps = op.outputs[0].ndim == len(dims)
    found = [ONE if i in places else expr for i, expr in enumerate(dims) if keeps or i not in places]
    return [found] * len(op.outputs)


def windows(op: Op) -> list[Dims]:
    """Pools, resizing and padding by reflection: the last one, two or three dimensions are space."""
    dims = op.dims_of(op.tensors[0])
    count = next(n for n in (1, 2, 3) if f"{n}d" in op.name)
    for expr in dims[-count:]:
        op.axes.pin(expr, SPACE)
    return [[*dims[:-count], *(op.fixed(size) for size in tensor.shape[-count:])] for tensor in op.outputs]


def pixel_shuffle(op: Op) -> Dims:
    """(channels x r x r, h, w) to (channels, h r, w r)."""
    dims, (*_, channels, height, width) = op.dims("self"), op.outputs[0].shape
    area = op.args["upscale_factor"] ** 2
    kept, square = op.axes.split(dims[-3], (channels, area), reason=op.why("splits it"))
    op.axes.pin(square, op.why("lays it out in space"))
    return [*dims[:-3], kept, op.fixed(height), op.fixed(width)]


def pixel_unshuffle(op: Op) -> Dims:
    """(channels, h r, w r) to (channels x r x r, h, w)."""
    dims, (*_, height, width) = op.dims("self"), op.outputs[0].shape
    square = op.fixed(op.args["downscale_factor"] ** 2, op.why("lays space out in it"))
    return [*dims[:-3], op.axes.product((dims[-3], square)), op.fixed(height), op.fixed(width)]


def channel_shuffle(op: Op) -> Dims:
    """(groups x channels) to (channels x groups)."""
    dims, groups = op.dims_of(op.tensors[0]), op.args["groups"]
    sizes = (groups, op.axes.size(dims[1]) // groups)
    group, inside = op.axes.split(dims[1], sizes, reason=op.why("splits it"))
    op.axes.pin(group, op.why("interleaves its groups"))
    return [dims[0], op.axes.product((inside, group)), *dims[2:]]


def embedding(op: Op) -> Dims:
    """Rows of a table by number."""
    weight = op.dims("weight")
    op.axes.pin(weight[0], op.why("looks it up by number"))
    return [*op.dims("indices"), weight[1]]


def index(op: Op) -> Dims:
    """Some dimensions looked up by number; the others stay, where the shapes say so."""
    dims, given = op.dims("self"), list(op.args["indices"])
    places = [place for place, entry in enumerate(given) if entry is not None]
    for place in places:
        op.axes.pin(dims[place], op.why("looks it up by number"))
    rest = [expr for place, expr in enumerate(dims) if place not in places]
    new = op.outputs[0].ndim - len(rest)
    adjacent = places == list(range(places[0], places[-1] + 1))
    start = places[0] if adjacent else 0
    made = [op.fixed(size, op.why("looks it up by number")) for size in op.outputs[0].shape[start : start + new]]
    return [*rest[:start], *made, *rest[start:]]


def triangle(op: Op) -> Dims:
    """The order of the last two dimensions matters."""
    dims = op.dims("self")
    for expr in dims[-2:]:
        op.axes.pin(expr, op.why("sees its order"))
    return dims


def made_here(op: Op) -> Dims:
    """A tensor whose size the forward pass sets."""
    return [op.fixed(size, op.why("makes it of a fixed size")) for size in op.outputs[0].shape]
