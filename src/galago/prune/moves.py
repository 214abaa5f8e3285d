"""Following channels through operations without weights: what moves values, and what brings tensors together.

An operation that only moves values (a view, a permutation, a mean over places) is done again on numbers of channels in
the place of values, so that they are known under any shape. Element by element, channels that meet are tied: a residual
sum, the factor of a squeeze-and-excitation. A concatenation has the channels of its parts. Channels that an operation
picks out by number (a slice, a split, a shuffle) are held, since the number stands in the network's code.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from galago.layers import Asked, Call, find, innermost
from galago.prune.ties import Ids, Record
from galago.sizes import Narrows

MOVES = frozenset((
    "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "amax", "amin", "contiguous", "detach", "expand", "flatten",
    "flip", "mean", "narrow", "permute", "reshape", "roll", "select", "slice", "squeeze", "t", "transpose", "unsqueeze",
    "view",
))  # fmt: skip
POOLS = frozenset((
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "upsample_bicubic2d",
    "upsample_bilinear2d", "upsample_nearest1d", "upsample_nearest2d",
))  # fmt: skip


def meet(record: Record, call: Call, asked: Asked) -> None:
    """Tensors that are brought together element by element, or one that is changed so."""
    made, parts = record.values[call.outputs[0]], {n: record.known[n] for n in call.inputs if n in record.known}
    if not parts:
        return
    behind = {record.values[number].ndim - part.axis for number, part in parts.items()}  # axes, counted from the last
    back = behind.pop()
    ids = next(iter(parts.values())).ids
    others = [record.values[number] for number in call.inputs if number not in parts]
    fixed = any(other.ndim >= back and other.shape[-back] != 1 for other in others)
    if fixed or behind or any(len(part.ids) != len(ids) for part in parts.values()):
        record.give_up(call)
        return
    for part in parts.values():
        record.ties.tie(ids, part.ids)
    zeros = record.again(call, asked, {number: torch.zeros_like(record.values[number]) for number in parts})
    silent = [part.silent for part in parts.values()]
    quiet = any(silent) if call.operation == "mul" else all(silent) and not bool(zeros.any())
    record.gives(call, made.ndim - back, ids, quiet)


def join(record: Record, call: Call, asked: Asked) -> None:
    """A concatenation."""
    given = asked.args[1] if len(asked.args) > 1 else asked.kwargs.get("dim", 0)
    axis, parts = given % record.values[call.outputs[0]].ndim, [record.known.get(number) for number in call.inputs]
    if any(part is not None and part.axis != axis for part in parts):
        record.give_up(call)
    elif any(part is not None for part in parts):
        ids: Ids = ()
        for number, part in zip(call.inputs, parts, strict=True):
            size, reason = record.values[number].shape[axis], "they are joined with channels that are not known"
            ids += record.ties.held(size, reason) if part is None else part.ids
        record.gives(call, axis, ids, silent=all(part is not None and part.silent for part in parts))


def pad(record: Record, call: Call, asked: Asked) -> None:
    """Zeros around an image, or channels of zeros, whose number only a layer that `Narrows` can change."""
    given, amounts = record.known.get(call.inputs[0]), list(asked.args[1])
    if given is None:
        return
    place = 2 * (record.values[call.inputs[0]].ndim - 1 - given.axis)  # amounts come from the last axis on, by twos
    before, behind = amounts[place : place + 2] or (0, 0)
    if before < 0 or behind < 0:
        record.give_up(call)
        return
    first, last = record.ties.new(before), record.ties.new(behind)
    if not isinstance(innermost(find(record.model, call.module)), Narrows):
        record.ties.hold((*first, *last), f"{call.module or 'the network'} adds a fixed number of channels")
    zero = len(asked.args) < 3 or asked.args[2] == 0
    record.gives(call, given.axis, (*first, *given.ids, *last), given.silent and zero)


def pool(record: Record, call: Call, asked: Asked) -> None:
    """What is computed of places, for each channel by itself."""
    given = record.known.get(call.inputs[0])
    if given is None:
        return
    if given.axis != 1 or record.values[call.outputs[0]].shape[1] != len(given.ids):
        record.give_up(call)
        return
    record.gives(call, 1, given.ids, given.silent)


def move(record: Record, call: Call, asked: Asked) -> None:
    """The same values in another order or shape: done again with channels in the place of values."""
    read = call.inputs[0]
    if call.operation == "t" and read in record.places:
        record.transposed[call.outputs[0]] = read
    given = record.known.get(read)
    if given is None:
        return
    shape = record.values[read].shape
    line = torch.tensor(given.ids, dtype=torch.float64)
    labels = line.view([-1 if axis == given.axis else 1 for axis in range(len(shape))]).expand(shape).clone()
    found = along_one_axis(tree_leaves(record.again(call, asked, {read: labels}))[0])
    # the same channels in the same order, each once or several times in a row
    if found is None or [k for k, _ in groupby(found[1])] != [k for k, _ in groupby(given.ids)]:
        record.give_up(call)
        return
    record.gives(call, *found, given.silent)


def along_one_axis(labels: Tensor) -> tuple[int, Ids] | None:
    """The axis along which alone numbers differ, and the numbers; None where there is no such axis.

    >>> along_one_axis(torch.tensor([[3, 4], [3, 4]])), along_one_axis(torch.tensor([[3, 4], [4, 3]]))
    ((1, (3, 4)), None)
    """
    for axis in range(labels.ndim):
        line = labels[tuple(slice(None) if each == axis else slice(0, 1) for each in range(labels.ndim))]
        if bool((line != line.flatten()[0]).any()) and bool((labels == line).all()):
            return axis, tuple(line.flatten().long().tolist())
    return None
