"""An `Ensemble`: branches of one network, or several networks, and the module that makes one answer of all of them.

It takes the network's place in training and gives what the network alone would give, scores N×K, so that tasks, probes
and other methods see nothing unusual. Whoever trains the branches asks it afterwards for what each of them said. In
evaluation mode it computes what will ship: the first branch alone, or, `together`, the joint answer, so that what is
measured after each epoch is what the file will contain. As a module it is compiled, averaged and stored with the
network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from galago.distill.branches import Parallel, apart
from galago.layers import Wrapper, find
from galago.taps import Held, Passed, Taps, unwatch
from galago.task import scores_of


class Heads(NamedTuple):
    """What everyone said of a batch, N×K each."""

    branches: list[Tensor]
    joint: Tensor


class Joint(nn.Module, ABC):
    """Makes one answer of several branches'.

    Attributes:
        title: what its answer is called in losses and tables.
    """

    title: str

    @abstractmethod
    def forward(self, branches: list[Tensor], passed: list[Passed]) -> Tensor:
        """Scores N×K.

        Args:
            branches: scores N×K of each.
            passed: what went through the layers that the ensemble watches for it.
        """


class Ensemble(Wrapper):
    """Several branches or networks and their joint answer, in the place of one network.

    Args:
        layer: the network, whose branches, if it has any, are `Parallel`s.
        joint: makes one answer.
        count: how many branches, or networks, there are.
        watched: paths of layers that `joint` looks at, from here: `layer.layer3`, `peers.0.last`.
        peers: further networks.
        together: give the joint answer, in training and afterwards; else the first branch's.
    """

    def __init__(
        self,
        layer: nn.Module,
        joint: Joint,
        count: int,
        watched: Sequence[str],
        peers: Sequence[nn.Module] = (),
        together: bool = False,
    ) -> None:
        super().__init__(layer)
        self.joint, self.count, self.watched, self.together = joint, count, list(watched), together
        self.peers = nn.ModuleList(peers)
        self._passed, self._said = [Held() for _ in watched], Held()
        for path, held in zip(watched, self._passed, strict=True):
            find(self, path).register_forward_hook(held.keep)

    def forward(self, x: Tensor) -> Any:
        output = self.layer(x)
        if not (self.training or self.together):
            self._look()
            return output
        heads = self._heard(x, output)
        if self.training and not Taps.resting:
            self._said.value = heads
        return heads.joint if self.together else tree_map(lambda part: part[: len(x)], output)

    def heads(self, x: Tensor) -> Heads:
        """What everyone says of a batch, in whatever mode."""
        with all_running(self):
            return self._heard(x, self.layer(x))

    def said(self) -> Heads:
        """What everyone said in the last training pass that was not `unnoticed`; it is forgotten then."""
        heads: Heads = self._said.take()
        return heads

    def unwatch(self, network: nn.Module) -> None:
        """Takes this ensemble's hooks out of what is left of it."""
        unwatch(network, self._passed)

    def _heard(self, x: Tensor, output: Any) -> Heads:
        branches = each_branch([scores_of(output), *(scores_of(peer(x)) for peer in self.peers)], self.count)
        return Heads(branches, self.joint(branches, self._look()))

    def _look(self) -> list[Passed]:
        return [held.take() for held in self._passed]


def each_branch(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """One tensor for each branch: as they are, or cut from the one that holds all of them one behind another."""
    return list(tensors) if len(tensors) == count else apart(tensors[0], count)


@contextmanager
def all_running(ensemble: Ensemble) -> Iterator[None]:
    """Every branch runs in evaluation mode, too, as long as the `with` lasts."""
    parts = [part for part in ensemble.modules() if isinstance(part, Parallel)]
    before = [part.together for part in parts]
    try:
        for part in parts:
            part.together = True
        yield
    finally:
        for part, together in zip(parts, before, strict=True):
            part.together = together


def ensemble_in(model: nn.Module) -> Ensemble | None:
    """The ensemble that a model is, or is wrapped around."""
    return next((part for part in model.modules() if isinstance(part, Ensemble)), None)
