"""SWA, stochastic weight averaging: the mean of the weights at the ends of the last epochs.

Pavel Izmailov, Dmitrii Podoprikhin, Timur Garipov, Dmitry Vetrov, Andrew Gordon Wilson, "Averaging Weights Leads to
Wider Optima and Better Generalization", UAI 2018, arXiv:1803.05407 (recalled).

While the learning rate stays high the weights wander around a wide valley; their mean lies in its middle and does
better than any of them. BatchNorm's statistics belong to none of the networks averaged and are measured anew.

    w̄ ← (n w̄ + w) / (n + 1)   at the start of averaging and at the end of each epoch after it
    mean, var of each BatchNorm ← over training batches, with weights w̄

When: nearly always worth its price, the memory of one more network and a pass over the training images, once. It wants
a learning rate that does not fall to zero meanwhile (`galago.schedule.Cosine` with a `floor`). The moving average of
each step, `average: 0.999` in a recipe, is the other way and combined with any schedule; use one of them. List it last:
it has to find the weights under the names that they have in the end. Behind `Quantize` ranges are averaged too.

Usual setting: from three quarters of the training on, at a constant rate of a twentieth to a half of the first.
Recipe: recipes/regularize/swa_resnet20_cifar10.yaml.

Chosen here: buffers (ranges that follow what they see) are the last epoch's. What is measured after each epoch is the
network in training; the average is measured when training is over, and it is what ships. With `restore_best` it is the
average up to the best epoch. A network that changes its shape (pruning) is averaged anew from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.batch_norms import measure_norms, norms_of
from galago.console import say
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method


def joined(mean: Tensor, weight: Tensor, count: int) -> Tensor:
    """`(n w̄ + w) / (n + 1)`, of any shape.

    >>> joined(torch.tensor([1.0]), torch.tensor([4.0]), 2)
    tensor([2.])
    """
    return mean + (weight - mean) / (count + 1)


class WeightAveraging(Method):
    """Ships the mean of the weights of the last epochs; list it last.

    Args:
        start: the share of the training that goes by before averaging begins.
        batches: of training images that BatchNorm is measured on; none: all of them.
    """

    def __init__(self, start: float = 0.75, batches: int | None = None) -> None:
        super().__init__()
        if not 0 <= start < 1:
            raise UserError(f"WeightAveraging: start is {start:g}; give a share from 0 to less than 1, usually 0.75")
        if batches is not None and batches < 1:
            raise UserError(f"WeightAveraging: batches is {batches}; give 1 or more, or leave it out for all")
        self.start, self.batches = start, batches
        self._count, self._mean = 0, dict[str, Tensor]()
        self._due, self._progress = False, 0.0
        self._names: list[str] | None = None
        self._data: Data | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """How many networks were averaged, and their mean."""
        return {"count": self._count, "mean": self._mean}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._count, self._mean = state["count"], dict(state["mean"])

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing."""
        self._data, self._names = data, list(weights_of(model))
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        """Weights that the last epoch left are to be averaged, if it is time.

        Raises:
            UserError: a method behind this one has given weights other names.
        """
        if self._names is not None and self._names != list(weights_of(model)):
            raise UserError("WeightAveraging: a method behind it changes the network; list WeightAveraging last")
        self._names, self._due = None, True  # the next step knows how far training is
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        self._progress = inner.progress
        return inner(batch)

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        if self._due and self._progress >= self.start:
            self.take(model)
        self._due = False
        apply()

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Averages the weights in, as they are; alone where the network was another one before."""
        weights = weights_of(model)
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in self._mean.items()}:
            self._count, self._mean = 0, {name: weight.clone() for name, weight in weights.items()}
        old = {name: mean.to(weights[name].device) for name, mean in self._mean.items()}
        self._mean = {name: joined(old[name], weight, self._count) for name, weight in weights.items()}
        self._count += 1

    @torch.no_grad()
    def finish(self, model: nn.Module) -> nn.Module:
        """The network with the mean weights, and statistics of its own."""
        if self._data is None or not self._count:
            say(f"WeightAveraging: no epoch began after {self.start:g} of the training; the last weights ship")
            return model
        self.take(model)
        for name, weight in weights_of(model).items():
            weight.copy_(self._mean[name])
        if norms_of(model):
            measure_norms(model, self._data, len(self._data.train()) if self.batches is None else self.batches)
        return model


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is averaged, by name: all parameters, frozen ones too."""
    return dict(model.named_parameters())
