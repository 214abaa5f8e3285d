"""One idea from one paper, as it acts on training; and how several of them combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.task import Task


class Method(nn.Module):
    """Override any of these five; each does nothing by default.

    Extra networks (teachers, peers, critics) are ordinary submodules: they follow the device,
    enter the checkpoint, and train with the model unless frozen.
    """

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Once, before the optimizer exists: change the structure, build extra networks.

        On resume it runs again after this method's buffers are restored, and must rebuild the same structure.
        """
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        """At the start of every epoch: schedules, pruning, growing. The optimizer follows new parameters."""
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        """Around the forward pass: change the batch, add losses, or call `inner` more than once."""
        return inner(batch)

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        """Around the optimizer's step: gradients are ready before `apply()`, weights are new after it."""
        apply()

    def finish(self, model: nn.Module) -> nn.Module:
        """Once, after training: take away whatever deployment does not need."""
        return model

    def summary(self) -> object | None:
        """What `prepare` changed, for a person to read before training: a text or anything rich can print."""
        return None


@dataclass(frozen=True)
class Forward:
    """Runs a batch through the methods still to come, then the model, then the task's losses.

    `progress` runs from 0 to 1 over the whole training, for schedules.
    """

    model: nn.Module
    task: Task
    methods: Sequence[Method] = ()
    progress: float = 0.0

    def __call__(self, batch: Batch) -> Step:
        if not self.methods:
            output = self.model(batch.input)
            return Step(batch, output, self.task.losses(output, batch))
        first, *rest = self.methods
        return first.step(batch, replace(self, methods=rest))

    def of(self, model: nn.Module) -> Forward:
        """The same, with another network in the model's place: a peer, a teacher."""
        return replace(self, model=model)
