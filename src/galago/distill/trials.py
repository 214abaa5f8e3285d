"""Trying channels: a short training of nothing else, and what they are worth on images that were held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD

from galago.batch import Batch
from galago.data import Data
from galago.distill.distill import Distill
from galago.distill.teacher import scores
from galago.distill.widen import Junction, Plant, widen
from galago.probe import device_of, evaluating, normalized
from galago.schedule import Cosine

MOMENTUM = 0.9


class Trial(NamedTuple):
    """Channels that were trained at one place and taken out again."""

    plant: Plant
    loss: float  # on the validation images, with them


@dataclass(frozen=True)
class Trials:
    """How candidates are trained and compared, all in the same way.

    Args:
        distill: the teacher and its lessons, which do not learn meanwhile.
        data: gives training and validation batches.
        epoch: of the training batches; those of the following epochs come where there are too few.
        batches: that each candidate is trained for.
        rate: learning rate, which falls to 0 in half a cosine.
        progress: of the whole training, for weights that follow a schedule.
    """

    distill: Distill
    data: Data
    epoch: int
    batches: int
    rate: float
    progress: float

    def of(self, model: nn.Module, place: Junction, filters: Tensor) -> Trial:
        """Plants at one place, trains, measures, and takes out what was planted; no tensor of the model has changed."""
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # ranges may follow what they see
        plant = widen(model, place, filters)
        self.train(model, plant)
        loss = self.validation_loss(model)
        plant.take_out()
        for buffer, value in buffers:
            buffer.copy_(value)
        return Trial(plant, loss)

    def train(self, model: nn.Module, plant: Plant) -> None:
        """A short training of the plant; nothing else gets a gradient."""
        own, device, cosine = [part.new for part in plant.learned], device_of(model), Cosine()
        optimizer = SGD(own, self.rate, MOMENTUM)
        model.train()
        for number, batch in enumerate(islice(self.training(), self.batches)):
            optimizer.param_groups[0]["lr"] = self.rate * cosine(number / self.batches)
            with plant.normalizing(model):
                loss = self.loss(model, self.seen(batch, device))
            for tensor, gradient in zip(own, torch.autograd.grad(loss, own, allow_unused=True), strict=True):
                tensor.grad = gradient
            with plant.held():
                optimizer.step()
        optimizer.zero_grad()

    def training(self) -> Iterator[Batch]:
        """Training batches of this epoch and, where they do not suffice, of those behind it."""
        for later in range(self.batches):
            yield from self.data.train(self.epoch + later)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy and the lessons' losses, as `Distill` weighs them."""
        said = scores(model(batch.input))
        labels = nn.functional.cross_entropy(said, batch.target)
        taught = self.distill.taught(model, said, batch, self.progress).values()
        return torch.stack([self.distill.task_weight * labels, *taught]).sum()

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        """The mean over all validation images, in evaluation mode."""
        losses, images, device = [], 0, device_of(model)
        with evaluating(model):
            for batch in self.data.validation():
                losses.append(self.loss(model, self.seen(batch, device)) * len(batch.input))
                images += len(batch.input)
        return float(torch.stack(losses).sum() / images)

    def seen(self, batch: Batch, device: torch.device) -> Batch:
        """A batch as the model sees it."""
        extra = {name: tensor.to(device) for name, tensor in batch.extra.items()}
        return Batch(normalized(self.data, batch.input, device), batch.target.to(device), extra)
