"""Channel planting: a small network grows where it gains most, and a teacher trains what is new.

Kakeru Mitsuno, Yuichiro Nomura, Takio Kurita, "Channel Planting for Deep Neural Networks using Knowledge Distillation",
ICPR 2020, arXiv:2011.02390.

Instead of cutting a large network down, a few channels at a time are added to a small one. Each layer that could have
them is tried: the new weights alone are trained with the teacher's help, everything learned before stays as it is; the
layer that lowers the loss on held-out images most keeps its channels, the others give them back.

    L = (1 - α) CE + α T² KL(p_T(teacher) ‖ p_T(model)),   the loss of `distill`, in training and in comparing
    plant in layer l:   W_l[new] ~ Normal(0, sqrt(2 / (c_{l-1} k²))),   W_{l+1}[:, new] = 0,   BatchNorm 1, 0, 0, 1
    score_l = (L_validation before - L_validation after) / price,   price: 1, added parameters or multiply-accumulates

The best layer keeps its channels if the loss is lower with them; planting ends with the budget, or after `patience`
rounds in a row that lower it by less than `least`. The input weights of the next layer begin at zero, so that the
network answers as before at the moment of planting; only they have a gradient in the first step, the new filters follow
from the second on.

When: the size that is needed is not known, or accuracy for every size up to a budget is wanted from one training; the
epochs' lines of the log are that curve if `galago.probes.cost.Cost` is among the probes (`benchmarks/planting.py` sets
it beside others). A round costs, for each layer that can grow, `trial` training steps and a pass over the validation
images. Widths that are known beforehand are trained faster from the start.

Usual setting: `channels` 4, `every` 3, `task_weight` 0.3 in `distill` with `SoftTargets(4.0, weight=0.7)`; a network an
eighth as wide as the teacher. Recipe: recipes/distill/planting_cifar10.yaml.

Only the abstract of the paper could be had, and no code is public. It fixes what the second paragraph says; all else is
chosen here, formulas and defaults included:

- A trial is short: SGD with momentum 0.9, half a cosine from `rate` to 0, training batches as the data give them, the
  cross-entropy for the task's loss. The recipe's epochs train the winner on from there, with everything in the recipe.
- Held-out images are the data's validation images: set `hold_out`, or layers are chosen on the test set.
- The first `first` epochs train the small network as usual. From the first plant on no BatchNorm but the new entries
  learns statistics, and the network is not compiled. Where no layer gains, what trained before trains on.
- A layer grows where it alone feeds one other layer: inside residual blocks all but the last. What lessons compare
  keeps its shape. `restore_best` picks among the epochs behind the last planting.
- List it behind `Quantize` and whatever else changes layers. Quantizers of weights need a zero (`EWGSWeight` has none)
  and a range that new weights leave alone. Methods that keep a number for each weight (`FreezeOscillations`,
  `SignFlips`) or run layers twice (`NoiseInjection`, `ParametricNoise`) belong in a second recipe, which begins with
  `galago.run.load`, as does a last training of all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from enum import Enum
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.checkpoint import keep_random_state
from galago.console import say, watched
from galago.data import Data
from galago.distill.distill import Distill
from galago.distill.junctions import added_macs, added_parameters, allowed, junctions, table
from galago.distill.lesson import Lesson
from galago.distill.trials import Trial, Trials
from galago.distill.widen import Junction, Plant, first_filters, widen
from galago.errors import UserError
from galago.layers import find, innermost
from galago.method import Forward, Method
from galago.probe import device_of, evaluating, normalized, shared


class Price(Enum):
    """What the decrease of the loss is divided by before layers are compared."""

    nothing = "nothing"  # the largest decrease wins
    parameters = "parameters"  # the largest for each parameter added
    macs = "macs"  # the largest for each multiply-accumulate added


class Planting(Method):
    """Adds channels while the network trains, where they lower the loss most; only what is added last is trained.

    Args:
        distill: teacher and lessons, in training as in comparing layers.
        channels: how many are planted at once, n.
        first: epochs of usual training before the first round.
        every: epochs between two rounds, in which what was planted trains.
        trial: batches that each candidate is trained for before they are compared.
        rate: learning rate of the trials.
        layers: patterns of paths of the convolutions that may grow (`layer3.*`); none: all that can.
        price: what a layer's gain is divided by: nothing, parameters or macs (multiply-accumulates).
        budget: parameters that the network never has more of; null for no limit.
        least: decrease of the loss below which a round counts as idle.
        patience: idle rounds in a row after which nothing is planted any more.
    """

    _data: Data

    def __init__(
        self,
        distill: Distill,
        channels: int = 4,
        first: int = 10,
        every: int = 3,
        trial: int = 100,
        rate: float = 0.05,
        layers: Sequence[str] = (),
        price: Price = Price.nothing,
        budget: int | None = None,
        least: float = 1e-3,
        patience: int = 2,
    ) -> None:
        super().__init__()
        for name, number in (("channels", channels), ("every", every), ("trial", trial), ("patience", patience)):
            if number < 1:
                raise UserError(f"Planting: {name} is {number}; give 1 or more")
        if first < 0 or rate <= 0:
            raise UserError(f"Planting: first is {first} and rate {rate:g}; give 0 or more and a number above 0")
        self.distill, self.channels, self.first, self.every = distill, channels, first, every
        self.trial, self.rate, self.layers, self.price = trial, rate, list(layers), Price(price)
        self.budget, self.least, self.patience = budget, least, patience
        self.planted: list[tuple[Junction, int]] = []  # where and how many, in order: followed again on resume
        self.idle, self.progress = 0, 0.0
        self._plant: Plant | None = None
        self._places: list[Junction] = []
        self._known: set[str] = set()
        self._table: Table | None = None

    def get_extra_state(self) -> dict[str, Any]:
        planted = [[*place, channels] for place, channels in self.planted]
        places = [list(place) for place in self._places]
        return {"planted": planted, "places": places, "idle": self.idle, "progress": self.progress}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.planted = [(Junction(*place), channels) for *place, channels in state["planted"]]
        self._places = [Junction(*place) for place in state["places"]]
        self.idle, self.progress = state["idle"], state["progress"]

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Finds where the network can grow; on resume it grows as it did before.

        Raises:
            UserError: nothing can grow, a pattern means nothing that can, or the teacher cannot teach this model.
        """
        self._data = data
        model = self.distill.prepare(model, data)
        reasons = {} if self._places else self._find(model)
        self._table = self._described(model, reasons)
        for place, channels in self.planted:
            self._plant = widen(model, place, self._filters(model, place, channels))
        if self._plant is not None:
            self._plant.learn_alone(model)
        self._known = {name for name, _ in model.named_parameters()}
        return model

    def _find(self, model: nn.Module) -> dict[str, str]:
        """Sets the places that may grow; why others cannot, by path."""
        image = normalized(self._data, self._data.example()[:1], device_of(model))
        compared = [path for part in self.distill.modules() if isinstance(part, Lesson) for path in part.paths]
        found, reasons = junctions(model, image, self.channels, compared)
        self._places = allowed(found, reasons, self.layers)
        return reasons

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        """A round, where one is due: every layer is tried, and the best keeps its channels.

        Raises:
            UserError: a method listed behind this one has changed the network's layers.
        """
        if self._known != {name for name, _ in model.named_parameters()}:
            raise UserError("Planting: a method behind it changes the network; list Planting behind Quantize and such")
        if epoch >= self.first and (epoch - self.first) % self.every == 0 and self.idle < self.patience:
            with keep_random_state(), torch.compiler.set_stance("force_eager"), evaluating(self.distill):
                self._round(model, epoch)
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        self.progress = inner.progress
        with nullcontext() if self._plant is None else self._plant.normalizing(inner.model):
            return self.distill.step(batch, inner)

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        """What was learned before the last planting stays, whatever the optimizer does."""
        with nullcontext() if self._plant is None else self._plant.held():
            apply()

    def finish(self, model: nn.Module) -> nn.Module:
        """The grown network is an ordinary one; the hooks of the lessons go."""
        return self.distill.finish(model)

    def summary(self) -> Group:
        """Where channels can be planted and what they cost, and why not elsewhere; then what the lessons compare."""
        parts = (self._table, self.distill.summary())
        return Group(*(part for part in parts if part is not None))

    def score(self, model: nn.Module, place: Junction, gain: float) -> float:
        """By what layers are compared: the decrease of the loss, divided by its price."""
        price = {Price.parameters: added_parameters, Price.macs: added_macs}.get(self.price)
        return gain if price is None else gain / price(model, place, self.channels)

    def _round(self, model: nn.Module, epoch: int) -> None:
        """Tries every place that the budget allows and keeps the best, if the loss is lower with it."""
        places = [place for place in self._places if self._within_budget(model, place)]
        if not places:
            self.idle = self.patience
            say(f"planting ends at {size(model):,} parameters: the budget of {self.budget:,} allows no more")
            return
        before, trials = self._tried(model, places, epoch)
        gains = shared([before - trial.loss for trial in trials])
        scores = [self.score(model, place, gain) for place, gain in zip(places, gains, strict=True)]
        best = max(range(len(scores)), key=scores.__getitem__)
        if gains[best] > 0:
            self._keep(model, places[best], trials[best].plant)
        say(self._told(model, places[best], before, gains[best]))
        self.idle = 0 if gains[best] >= self.least else self.idle + 1
        if self.idle == self.patience:
            say(f"planting ends: {self.patience} rounds in a row gained less than {self.least:g}")

    def _tried(self, model: nn.Module, places: Sequence[Junction], epoch: int) -> tuple[float, list[Trial]]:
        """The loss as it is, and a trial of each place. The network is as before."""
        trials = Trials(self.distill, self._data, epoch, self.trial, self.rate, self.progress)
        before = trials.validation_loss(model)
        filters = (self._filters(model, place, self.channels) for place in places)
        made = zip(watched(places, "planting", len(places)), filters, strict=True)
        return before, [trials.of(model, place, first) for place, first in made]

    def _keep(self, model: nn.Module, place: Junction, plant: Plant) -> None:
        plant.put()
        plant.learn_alone(model)
        self._plant = plant
        self.planted.append((place, self.channels))

    def _filters(self, model: nn.Module, place: Junction, channels: int) -> Tensor:
        """The same in every process, and whatever was drawn before."""
        generator = torch.Generator().manual_seed(1000 * self._data.seed + len(self.planted))
        return first_filters(innermost(find(model, place.layer)).weight, channels, generator)

    def _within_budget(self, model: nn.Module, place: Junction) -> bool:
        return self.budget is None or size(model) + added_parameters(model, place, self.channels) <= self.budget

    def _described(self, model: nn.Module, reasons: dict[str, str]) -> Table:
        made = table(model, self._places, reasons, self.channels)
        limit = "" if self.budget is None else f", {self.budget:,} at most"
        made.title = f"Planting: {size(model):,} parameters now{limit}"
        ours, last = (next(iter(loader)).input for loader in (self._data.validation(), self._data.test()))
        if torch.equal(ours, last):
            made.caption = "layers are chosen on the images that the result is measured on: give data a hold_out"
        return made

    def _told(self, model: nn.Module, place: Junction, before: float, gain: float) -> str:
        if gain <= 0:
            return f"planting: the loss on the validation images stays at {before:.4f}, no layer gains from channels"
        width = innermost(find(model, place.layer)).out_channels
        return (
            f"planting: {place.layer} {width - self.channels} → {width} channels, loss on the validation images"
            f" {before:.4f} → {before - gain:.4f}, {size(model):,} parameters"
        )


def size(model: nn.Module) -> int:
    """How many parameters a network has."""
    return sum(parameter.numel() for parameter in model.parameters())
