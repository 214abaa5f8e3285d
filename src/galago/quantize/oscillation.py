"""Oscillations: weights that jump between two integers to the end of training are drawn to one, or frozen there.

Nagel, Fournarakis, Bondarenko and Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
arXiv:2203.11086. Formulas and settings are recalled, not compared with the paper or its code.

A weight whose best value lies between two levels never comes to rest under the straight-through estimator: above the
border between them the gradient pushes it down, below it up. Its integer is then chance, and BatchNorm's statistics are
those of another network. Two cures, each a method of its own:

    DampenOscillations   L = lambda sum (clip(w) - w_hat)^2,  w_hat constant,  lambda from 0 to its maximum
    FreezeOscillations   o = 1 where the integer changed, in the direction opposite to its change before
                         f <- m o + (1 - m) f,   a <- m w_int + (1 - m) a,   frozen at round(a) once f > threshold

lambda and the threshold follow half a cosine over the training; the threshold falls.

When to use it: 3 and 4 bits, most of all in depth-wise layers. List it behind `Quantize`. Dampening costs a pass over
the weights a step, freezing a few and five numbers a weight; nothing of either is left when training ends.
`galago.quantize.reestimate_norm.ReestimateNorm` repairs BatchNorm's statistics after training.

Recipes: recipes/quantize/lsq_w3a3_dampened_resnet20_cifar10.yaml,
recipes/quantize/lsq_w3a3_frozen_resnet20_cifar10.yaml.

Design choices: weights are frozen as integers, so that a scale that goes on learning moves them along. Frozen values
are put back behind the optimizer's step, whatever momentum and decay have done to them. Both work on the place of a
weight among the codes, so with every quantizer that rounds affinely; for one whose range follows the weights
(`MinMaxWeight`) a frozen weight keeps its integer as long as the range does not move by much. The average begins at the
first integer. While a network rests in float (`StatAssist`) nothing is counted or frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import Quantizer, along
from galago.quantize.rounding import same_layers, weight_quantized, weight_quantizer_of


def rising(progress: float) -> float:
    """Half a cosine from 0 to 1.

    >>> [round(rising(progress), 3) for progress in (0.0, 0.5, 1.0)]
    [0.0, 0.5, 1.0]
    """
    return 0.5 * (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def distance_to_levels(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """`clip(w) - w_hat`, differentiable in the weight alone: 0 on a level, and without a gradient beyond the last."""
    codes = quantizer.codes(weight.detach())
    grid, encoder = quantizer.grid(), quantizer.encoder()
    scale, offset = along(encoder.scale, weight, grid.axis), along(encoder.offset, weight, grid.axis)
    place = (weight.detach() - offset) / scale + along(grid.zero_point, weight, grid.axis)
    inside = (place >= grid.low) & (place <= grid.high)
    return torch.where(inside, weight - latent(codes, quantizer), 0.0)


def latent(codes: Tensor, quantizer: Quantizer) -> Tensor:
    """The weights in the middle of what is rounded to these codes; those that the codes stand for, as a rule."""
    grid, encoder = quantizer.grid(), quantizer.encoder()
    counted = codes - along(grid.zero_point, codes, grid.axis)
    return counted * along(encoder.scale, codes, grid.axis) + along(encoder.offset, codes, grid.axis)


def awake(model: nn.Module) -> dict[str, QuantLayer]:
    """The layers whose weight is quantized at the moment, by path."""
    return {path: layer for path, layer in weight_quantized(model).items() if layer.resting is None}


class DampenOscillations(Method):
    """Draws weights towards the levels they are rounded to, ever more; list it behind `Quantize`.

    Args:
        weight: of the squared distances' sum at the end of training, lambda's maximum.
    """

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__()
        if weight < 0:
            raise UserError(f"DampenOscillations: weight is {weight:g}; give 0 or more")
        self.weight = weight

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        weight_quantized(model)  # there must be some
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        # Before the forward pass: a range that follows the weights is set anew whenever it is asked for codes.
        distances = [
            distance_to_levels(layer.layer.get_parameter("weight"), weight_quantizer_of(layer)).square().sum()
            for layer in awake(inner.model).values()
        ]
        step = inner(batch)
        if not distances:
            return step
        return step.add(oscillation=self.weight * rising(inner.progress) * torch.stack(distances).sum())


class Tracked(nn.Module):
    """What is known of each weight of a layer, in buffers of the weight's shape.

    Args:
        codes: the weights' integers now.
    """

    codes: Tensor  # at the last step
    direction: Tensor  # of the last change, -1 or 1; 0 before the first
    frequency: Tensor  # of oscillations, a moving average
    average: Tensor  # of the integers, likewise
    frozen: Tensor  # whether it stays where it is

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.clone())
        self.register_buffer("direction", torch.zeros_like(codes))
        self.register_buffer("frequency", torch.zeros_like(codes))
        self.register_buffer("average", codes.clone())
        self.register_buffer("frozen", torch.zeros_like(codes, dtype=torch.bool))

    def follow(self, codes: Tensor, momentum: float, threshold: float, step: int = 1) -> None:
        """Takes in the integers after an optimizer's step, and freezes weights that oscillate too often.

        Args:
            codes: of the weight's shape; those of frozen weights do not count.
            momentum: what the newest step counts in the averages, m.
            threshold: the frequency above which a weight is frozen.
            step: distance of neighboring codes.
        """
        codes = torch.where(self.frozen, self.codes, codes)
        change = (codes - self.codes).sign()
        oscillates = change * self.direction < 0
        self.frequency.lerp_(oscillates.to(codes.dtype), momentum)
        self.average.lerp_(codes, momentum)
        self.direction.copy_(torch.where(change == 0, self.direction, change))
        fresh = (self.frequency > threshold) & ~self.frozen
        nearest = codes + ((self.average - codes) / step).round() * step
        self.codes.copy_(torch.where(fresh, nearest, codes))
        self.frozen |= fresh


class FreezeOscillations(Method):
    """Freezes weights whose integer jumps to and fro more often than a falling threshold; list it behind `Quantize`.

    Args:
        first_threshold: oscillations a step at which a weight is frozen, at the beginning.
        last_threshold: the same at the end of training.
        momentum: what the newest step counts in the moving averages.
    """

    def __init__(self, first_threshold: float = 0.04, last_threshold: float = 0.01, momentum: float = 0.01) -> None:
        super().__init__()
        for name, share in (("first_threshold", first_threshold), ("last_threshold", last_threshold)):
            if share <= 0:
                raise UserError(f"FreezeOscillations: {name} is {share:g}; give a share above 0, usually 0.01 to 0.04")
        if not 0 < momentum <= 1:
            raise UserError(f"FreezeOscillations: momentum is {momentum:g}; give a share above 0, usually 0.01")
        self.first_threshold, self.last_threshold, self.momentum = first_threshold, last_threshold, momentum
        self.tracked = nn.ModuleList()
        self.progress = 0.0

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Begins to count; on resume the checkpoint brings what was counted."""
        self.tracked = nn.ModuleList(
            Tracked(weight_quantizer_of(layer).codes(layer.layer.get_parameter("weight").detach()))
            for layer in weight_quantized(model).values()
        )
        return model

    @property
    def threshold(self) -> float:
        """The frequency above which weights are frozen now."""
        return self.first_threshold + (self.last_threshold - self.first_threshold) * rising(self.progress)

    def step(self, batch: Batch, inner: Forward) -> Step:
        self.progress = inner.progress
        return inner(batch)

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        """Behind the optimizer's step: frozen weights go back, then the others are counted.

        Raises:
            UserError: a method that came later has added layers, or made one larger.
        """
        apply()
        known = [tracked for tracked in self.tracked if isinstance(tracked, Tracked)]
        layers = same_layers(model, [tracked.codes.shape for tracked in known], "FreezeOscillations")
        for layer, tracked in zip(layers, known, strict=True):
            if layer.resting is None:
                weight, quantizer = layer.layer.get_parameter("weight").data, weight_quantizer_of(layer)
                self.hold(weight, tracked, quantizer)
                tracked.follow(quantizer.codes(weight), self.momentum, self.threshold, quantizer.grid().step)
                self.hold(weight, tracked, quantizer)

    def hold(self, weight: Tensor, tracked: Tracked, quantizer: Quantizer) -> None:
        """Puts frozen weights on their levels, where the scale has them now."""
        weight.copy_(torch.where(tracked.frozen, latent(tracked.codes, quantizer).to(weight.dtype), weight))

    def frozen_share(self) -> float:
        """How many of all weights are frozen."""
        frozen = [tracked.frozen for tracked in self.tracked if isinstance(tracked, Tracked)]
        return sum(int(one.sum()) for one in frozen) / max(1, sum(one.numel() for one in frozen))
