"""Cutting channels out of a network, for good or for a look: `narrow` and `silence` give the same answers.

A channel goes with everything that is stored for it: its filters, bias, BatchNorm, and the slices of all weights that
read it. Modules stay the same objects, so that hooks, wrappers and notes on them live on; their tensors are new ones.
Nothing but the list of groups that are left is needed to do the same again to a copy of the network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from galago.layers import find, innermost
from galago.prune.groups import Groups
from galago.sizes import Narrows, store


@torch.no_grad()
def narrow(model: nn.Module, groups: Groups, kept: Tensor) -> None:
    """Cuts out all channels of groups that are not kept.

    Args:
        model: changed in place.
        groups: of this network, before anything was cut.
        kept: a boolean for each group.
    """
    for cut in groups.cuts:
        module, left = innermost(find(model, cut.module)), left_of(cut.groups, kept)
        if left.all():
            continue
        tensor: Tensor = getattr(module, cut.name)
        slices = tensor.index_select(cut.axis, left.nonzero().flatten().to(tensor.device))
        layout = torch.channels_last if is_channels_last(tensor) else torch.contiguous_format
        store(module, cut.name, slices.contiguous(memory_format=layout))
        for size in cut.sizes:
            if hasattr(module, size):
                setattr(module, size, int(left.sum()))
    for path, taken, given in groups.adapting:
        module = innermost(find(model, path))
        assert isinstance(module, Narrows)  # else it would not be among these
        module.keep_channels(left_of(taken, kept), left_of(given, kept))


@torch.no_grad()
def silence(model: nn.Module, groups: Groups, kept: Tensor) -> None:
    """Stores zeros for all channels of groups that are not kept, which are then zero wherever a layer reads them.

    Args:
        model: changed in place.
        groups: of this network.
        kept: a boolean for each group.
    """
    for cut in groups.cuts:
        if cut.made:
            tensor: Tensor = getattr(innermost(find(model, cut.module)), cut.name)
            dead = (~left_of(cut.groups, kept)).nonzero().flatten()
            tensor.index_fill_(cut.axis, dead.to(tensor.device), 0.0)


def left_of(groups: Tensor, kept: Tensor) -> Tensor:
    """Which of some channels, given by their groups, are left: booleans. Those of no group (-1) always are.

    >>> left_of(torch.tensor([1, -1, 0]), torch.tensor([True, False])).tolist()
    [False, True, True]
    """
    return torch.cat([kept.cpu(), torch.ones(1, dtype=torch.bool)])[groups]


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a weight lies in memory with its input channels innermost, and not also the other way."""
    fits = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return fits and not tensor.is_contiguous()
