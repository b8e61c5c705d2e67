"""What each aten operation says about the dimensions it reads and makes: one rule an operation, in one table.

A rule gets the operation and returns the dimensions of its first output (or a list of them, one for each output);
outputs that it leaves out are fixed. It may unify, split, pin and mark on the way. An operation without a rule is not
understood: everything it touches stays as it is. Rules know nothing of modules but the name of the one that runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from autoprune.model.axes import moves
from autoprune.model.axes.expressions import Expr
from autoprune.model.axes.operation import HEAD_WIDTH, HEADS, NORMALISED, SPACE, Dims, Op, Rule


def matmul(op: Op) -> Dims:
    """(batch..., n, k) x (batch..., k, m), with anything added to the result."""
    added = next((op.args[key] for key in ("self", "input") if key in op.args), None)
    names = {"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec"), "addmm": ("mat1", "mat2"),
             "baddbmm": ("batch1", "batch2")}[op.name]  # fmt: skip
    left, right = (op.args[name] for name in names)
    a, b = op.dims_of(left), op.dims_of(right)
    over = op.same(a[-1], b[max(len(b) - 2, 0)])
    op.read(left, over)
    op.read(right, over)
    if not op.is_static(left) and not op.is_static(right):
        op.axes.pin(over, op.why("multiplies two activations over it (the width of a head)"))
    found = [*(op.same(x, y) for x, y in zip(a[:-2], b[:-2], strict=False)), a[-2], *(b[-1:] if len(b) > 1 else ())]
    if op.name in ("bmm", "baddbmm") and not op.is_static(left) and not op.is_static(right):
        _note_heads(op, found[0], found[-1])
    if op.name in ("addmm", "baddbmm") and isinstance(added, Tensor):
        dims = op.dims_of(added)
        for back in range(1, len(dims) + 1):
            op.same(found[-back], dims[-back])
    return found


def _note_heads(op: Op, batch: Expr, width: Expr) -> None:
    """A batch of products of activations that is more than samples is a batch of heads."""
    if not op.axes.is_pinned(batch):
        op.axes.mark(batch, HEADS)
        op.axes.mark(width, HEAD_WIDTH)


def attention(op: Op) -> Dims:
    """Fused attention: query, key and value (batch, heads, positions, width)."""
    query, key, value = op.dims("query"), op.dims("key"), op.dims("value")
    batch, heads = (op.same(query[i], key[i], value[i]) for i in range(2))
    op.axes.pin(op.same(key[2], value[2]), SPACE)
    op.axes.pin(op.same(query[3], key[3]), op.why("multiplies two activations over it (the width of a head)"))
    _note_heads(op, heads, value[3])
    return [batch, heads, query[2], value[3]]


def convolution(op: Op) -> Dims:
    """(n, groups x in, ...) with (groups x out, in, ...). Depthwise, a channel is a group and may go."""
    inputs, weight, groups = op.dims("input"), op.dims("weight"), op.args["groups"]
    for expr in (*inputs[2:], *weight[2:]):
        op.axes.pin(expr, SPACE)
    made, read = (1, 0) if op.args["transposed"] else (0, 1)
    out = weight[made]
    if groups == 1:
        op.read(op.args["weight"], op.same(inputs[1], weight[read]))
    elif groups == op.axes.size(inputs[1]) == op.axes.size(weight[0]) and op.axes.size(weight[1]) == 1:
        out = op.same(inputs[1], weight[0])
    else:
        group = op.fixed(groups, f"{op.module} has {groups} groups")
        whole, part = (read, made) if op.args["transposed"] else (made, read)
        per_group = op.axes.fresh(op.axes.size(weight[whole]) // groups)
        op.same(weight[whole], op.axes.product((group, per_group)))
        joined = op.axes.product((group, weight[part]))
        out = joined if op.args["transposed"] else weight[made]
        op.same(inputs[1], weight[whole] if op.args["transposed"] else joined)
    if op.args["bias"] is not None:
        op.same(out, op.dims("bias")[0])
    return [inputs[0], out, *(op.fixed(size) for size in op.outputs[0].shape[2:])]


def batch_norm(op: Op) -> Dims:
    """Channels (dimension 1) with their statistics and scales, each for itself."""
    dims = op.dims("input")
    names = ("weight", "bias", "running_mean", "running_var")
    given = [op.dims(name)[0] for name in names if op.args.get(name) is not None]
    dims[1] = op.same(dims[1], *given)
    return dims


def layer_norm(op: Op) -> Dims:
    """The last dimensions are scaled by all of their own positions."""
    dims, count = op.dims("input"), len(op.args["normalized_shape"])
    for place in range(-count, 0):
        given = [op.dims(name)[place] for name in ("weight", "bias") if op.args.get(name) is not None]
        op.same(dims[place], *given)
        op.axes.mark(dims[place], NORMALISED + op.module)
    return dims


def group_norm(op: Op) -> Dims:
    """(groups x channels): a group may go, a channel in it changes the others."""
    dims, groups = op.dims("input"), op.args["group"]
    given = [op.dims(name)[0] for name in ("weight", "bias") if op.args.get(name) is not None]
    op.same(dims[1], *given)
    sizes = (groups, op.axes.size(dims[1]) // groups)
    _, inside = op.axes.split(dims[1], sizes, reason=op.why("splits it where something else does not"))
    op.axes.mark(inside, NORMALISED + op.module)
    return dims


def _each(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = {
    **_each(moves.view, "view _unsafe_view reshape"),
    **_each(moves.permute, "permute"),
    **_each(moves.transpose, "t transpose"),
    **_each(moves.squeeze, "squeeze unsqueeze"),
    **_each(moves.as_strided, "as_strided"),
    **_each(moves.expand, "expand"),
    **_each(moves.repeat, "repeat"),
    **_each(moves.select, "select"),
    **_each(moves.unbind, "unbind"),
    **_each(moves.slice_, "slice"),
    **_each(moves.split, "split split_with_sizes unsafe_split unsafe_split_with_sizes"),
    **_each(moves.glu, "glu"),
    **_each(moves.cat, "cat"),
    **_each(moves.stack, "stack"),
    **_each(moves.pad, "constant_pad_nd"),
    **_each(matmul, "mm addmm bmm baddbmm mv"),
    **_each(attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
            "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    **_each(convolution, "convolution"),
    **_each(batch_norm, "native_batch_norm cudnn_batch_norm _native_batch_norm_legit "
            "_native_batch_norm_legit_no_training"),
    **_each(layer_norm, "native_layer_norm _fused_rms_norm"),
    **_each(group_norm, "native_group_norm"),
    **_each(moves.mixed, "_softmax _safe_softmax _log_softmax cumsum cumprod sort topk index_select gather"),
    **_each(moves.reorder, "roll flip"),
    **_each(moves.reduce, "sum mean amax amin max min any all var std var_mean std_mean prod logsumexp argmax argmin "
            "linalg_vector_norm norm"),
    **_each(moves.windows, "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d "
            "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d "
            "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_bilinear2d "
            "upsample_linear1d upsample_bicubic2d upsample_trilinear3d reflection_pad1d reflection_pad2d "
            "replication_pad1d replication_pad2d"),
    **_each(moves.pixel_shuffle, "pixel_shuffle"),
    **_each(moves.pixel_unshuffle, "pixel_unshuffle"),
    **_each(moves.channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **_each(moves.embedding, "embedding"),
    **_each(moves.index, "index"),
    **_each(moves.triangle, "tril triu"),
    **_each(moves.made_here, "new_zeros new_ones new_full new_empty"),
    **_each(moves.broadcast, "_prelu_kernel hardswish hardsigmoid copy softplus elu leaky_relu mish "
            "log_sigmoid_forward"),
    **_each(moves.same_as_first, "clone detach alias lift_fresh _to_copy fill zero native_dropout zeros_like ones_like "
            "empty_like full_like rand_like randn_like bernoulli contiguous dropout"),
}  # fmt: skip
"""The rule of every operation by its aten name, without overload and without the underscore of in-place variants.

Operations that torch itself tags as pointwise follow `broadcast` and are not listed.
"""
