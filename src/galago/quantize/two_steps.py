"""AdamBNN / ReActNet, training in two steps: a network begins where a run of its easier form ended.

Liu, Shen, Li, Helwegen, Huang and Cheng, "How Do Adam and Training Strategies Help BNNs Optimization?", ICML 2021,
arXiv:2106.11309, and the ReActNet that they train (ECCV 2020, arXiv:2003.03488).

Binary weights trained from nothing settle badly. The first step is therefore a training of its own with binary inputs
and real weights; the second begins with everything it learned (weights, thresholds, ranges, BatchNorm statistics), now
takes the signs of the weights, and starts optimizer and schedule afresh. `StartFrom` is the beginning of the second
run: it copies what is called and shaped alike, whether a layer is quantized in one of the two runs or in both.

    step 1: Adam, decay 5e-6, inputs binary     step 2: Adam, no decay, inputs and weights binary
    both:   learning rate falling in a line to 0 (`galago.schedule.LinearDecay`)

When to use it: list it in front of `Quantize` in the second recipe, and name the first recipe under `needs`. Also for
other sequences, such as 4 bits before 2; then with `ranges: false`, since such ranges mean something else. It costs
nothing.

Recipe: recipes/quantize/reactnet_w1a1_cifar10.yaml.

Design choices: the network itself has to be the same, weight by weight; only what belongs to quantizers may be missing
on either side. Weights come over before `Quantize` sets its ranges, so that those which the first run lacks are set on
the network that it left; those which it has come over when the first epoch begins. `LinearDecay` falls with each step,
not with each epoch, and reaches 0 at the very end (the public code steps its schedule before each epoch, so that its
last epoch has a rate of 0 and learns nothing).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import Wrapper
from galago.method import Method
from galago.run import load

SHOWN = 3


class Named(NamedTuple):
    """A tensor of a network, called as if nothing were wrapped."""

    name: str
    tensor: Tensor
    added: bool  # by a wrapper: part of a quantizer, not of the network


class StartFrom(Method):
    """Begins with the weights, and the quantizers' thresholds and ranges, of a finished run.

    Args:
        run: its folder.
        ranges: whether what belongs to quantizers comes over too, where both networks have it.
        allow: packages that the run's architecture may be imported from, besides galago, torch, torchvision and timm.
    """

    done: Tensor

    def __init__(self, run: Path | str, ranges: bool = True, allow: Sequence[str] = ()) -> None:
        super().__init__()
        self.run, self.ranges, self.allow = Path(run), ranges, list(allow)
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))
        self._given: list[Named] = []

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Copies the weights; on resume the checkpoint has them.

        Raises:
            UserError: the run is not finished, or its network is another one.
        """
        if not self.done:
            self._given = list(named_tensors(load(self.run, self.allow)))
            require_same_network(self.run, self._given, list(named_tensors(model)))
            copy_matching([one for one in self._given if not one.added], model)
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        """Copies the quantizers' state before the first step, now that all of them are there."""
        if not self.done and self.ranges:
            copy_matching([one for one in self._given if one.added], model)
        self._given = []
        self.done.fill_(True)
        return model


def named_tensors(network: nn.Module, prefix: str = "", added: bool = False) -> Iterator[Named]:
    """Every tensor that a network would save, with wrappers looked through.

    >>> [(one.name, one.added) for one in named_tensors(nn.Sequential(Wrapper(nn.Linear(2, 3, bias=False))))]
    [('0.weight', False)]
    """
    wraps = isinstance(network, Wrapper)
    unsaved = network._non_persistent_buffers_set
    buffers = ((name, tensor) for name, tensor in network.named_buffers(recurse=False) if name not in unsaved)
    for name, tensor in chain(network.named_parameters(recurse=False), buffers):
        yield Named(f"{prefix}{name}", tensor, added or wraps)
    for name, child in network.named_children():
        inner = wraps and name == "layer"
        yield from named_tensors(child, prefix if inner else f"{prefix}{name}.", added or (wraps and not inner))


def require_same_network(run: Path, given: Sequence[Named], own: Sequence[Named]) -> None:
    """Compares names and shapes of what is no quantizer's.

    Raises:
        UserError: naming the first that differ.
    """
    theirs, ours = ({one.name: tuple(one.tensor.shape) for one in side if not one.added} for side in (given, own))
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(
            f"StartFrom: {run} holds another network than this recipe's model: {', '.join(names[:SHOWN])}{more}"
            " differ; give both recipes the same model"
        )


@torch.no_grad()
def copy_matching(given: Sequence[Named], model: nn.Module) -> None:
    """Copies every tensor that has one of its name and shape in the model."""
    theirs = {one.name: one.tensor for one in given}
    for own in named_tensors(model):
        found = theirs.get(own.name)
        if found is not None and found.shape == own.tensor.shape:
            own.tensor.copy_(found)
