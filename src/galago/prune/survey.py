"""Finding the channel groups of any network, and trying them before anything relies on them.

One image runs through the network; the operations that really ran are followed channel by channel. Then the groups are
tried: in one copy of the network half of them is cut out, in another only silenced, and both have to give the same
answers. Where they do not, because sizes stand in the network's code, each part of the network is tried alone, and what
fails is left whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from galago.layers import Asked, Call, flow
from galago.probe import evaluating
from galago.prune.cost import Parameters, costs_of
from galago.prune.groups import ALWAYS, Groups, grouped
from galago.prune.moves import MOVES, POOLS, join, meet, move, pad, pool
from galago.prune.products import convolve, multiply, normalize
from galago.prune.surgery import narrow, silence
from galago.prune.ties import Channels, Record, Ties

Rule = Callable[[Record, Call, Asked], None]
RULES: dict[str, Rule] = {
    "convolution": convolve,
    **dict.fromkeys(("addmm", "mm", "linear"), multiply),
    "cat": join,
    "constant_pad_nd": pad,
    **dict.fromkeys(POOLS, pool),
    **dict.fromkeys(MOVES, move),
    **dict.fromkeys(("_prelu_kernel", "gelu", "hardswish", "mish"), meet),  # of which ATen does not say so itself
}
TOLERANCE = 1e-4  # of the largest answer: sums in another order


def survey(model: nn.Module, example: Tensor) -> Groups:
    """The groups of a network that can be cut out, all else being left whole.

    Args:
        model: from normalized input to raw output; left as it was.
        example: normalized input, N×C×H×W; only the first image is used.
    """
    image = example[:1]
    with evaluating(model), torch.no_grad():
        # in the usual layout, as others bring operations that only rearrange memory
        record = follow(copy.deepcopy(model).to(memory_format=torch.contiguous_format), image)
        groups, channels = grouped(record)
        if not trouble(model, image, groups, range(groups.count)):
            return groups
        for part in parts(groups):
            if reason := trouble(model, image, groups, part):
                record.ties.hold([channels[group] for group in part], reason)
        groups, channels = grouped(record)
        if reason := trouble(model, image, groups, range(groups.count)):
            record.ties.hold(channels, reason)
        return grouped(record)[0]


def follow(model: nn.Module, image: Tensor) -> Record:
    """What becomes of every channel in one run of a network in evaluation mode."""
    seen = flow(model, image)
    record = Record(model, seen)
    for number in chain(*seen.received[""]):
        if record.values[number].ndim > 1:
            ids = record.ties.held(record.values[number].shape[1], "it is the network's input")
            record.known[number] = Channels(1, ids, silent=False)
    for call, asked in zip(seen.calls, seen.asked, strict=True):
        if call.outputs:
            rule_for(record, call, asked)(record, call, asked)
    record.hold(chain(*seen.gave[""]), "it gives the network's answer")
    return record


def rule_for(record: Record, call: Call, asked: Asked) -> Rule:
    """What to do about an operation."""
    if "batch_norm" in call.operation:
        return normalize
    if asked.function._schema.is_mutable and is_seen_otherwise(record, call.outputs[0]):
        return give_up
    if call.operation in RULES:
        return RULES[call.operation]
    return meet if torch.Tag.pointwise in asked.function.tags else give_up


def give_up(record: Record, call: Call, asked: Asked) -> None:
    """An operation of which nothing is known."""
    record.give_up(call)


def is_seen_otherwise(record: Record, written: int) -> bool:
    """Whether what an operation overwrites is (part of) an earlier tensor too, whose channels are known by its own."""
    values, new = record.values, record.values[written]
    where = new.untyped_storage().data_ptr()
    earlier = (values[number] for number in range(written))
    return any(value is not new and value.untyped_storage().data_ptr() == where for value in earlier)


def parts(groups: Groups) -> list[list[int]]:
    """Groups by what they lie in together: those of one part share the axis of a weight with each other."""
    ties = Ties()
    ties.new(groups.count)
    sides = [cut.groups for cut in groups.cuts] + [torch.cat(each[1:]) for each in groups.adapting]
    for side in sides:
        together = sorted({*side.tolist()} - {ALWAYS})
        ties.tie(together[:-1], together[1:])
    found: dict[int, list[int]] = {}
    for group in range(groups.count):
        found.setdefault(ties.root(group), []).append(group)
    return list(found.values())


def trouble(model: nn.Module, image: Tensor, groups: Groups, part: Sequence[int]) -> str:
    """Why some groups cannot be cut out of a network, of which a half is tried; empty if they can."""
    if not part:
        return ""
    strengths = torch.ones(groups.count, dtype=torch.float64)
    strengths[list(part)] = torch.rand(len(part), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = costs_of(groups, Parameters()).alive(strengths, 0.5).bool()
    cut, silent = copy.deepcopy(model), copy.deepcopy(model)
    narrow(cut, groups, kept)
    silence(silent, groups, kept)
    expected = tree_leaves(silent(image.clone()))
    try:
        found = tree_leaves(cut(image.clone()))
    except Exception as error:  # a network's own code may raise anything when its sizes do not fit any more
        return f"the network's code fixes its size ({str(error).partition(chr(10))[0][:80]})"
    same = all(
        one.shape == other.shape and bool((one - other).abs().max() <= TOLERANCE * one.abs().max() + 1e-12)
        for one, other in zip(expected, found, strict=True)
    )
    return "" if same else "without them the network gives other answers"
