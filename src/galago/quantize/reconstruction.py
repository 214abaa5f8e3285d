"""Reconstruction: a quantized network is mended one unit after another, each against what it gives in float.

What a unit (`galago.quantize.units`) takes in and what it gives are tensors of the whole network, so it can be run
alone, again and again, on what it took in for the calibration images. Post-training methods differ in what they change
in it (roundings, ranges, weights) and in the loss. Here is what they share: what goes in and should come out, with the
units before it mended already, the distance between two results, and the loop.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from galago.console import watched
from galago.layers import removing
from galago.probe import device_of, evaluating
from galago.quantize.rest import rest
from galago.quantize.units import Unit, resting

PASS = 64  # images in a pass without gradients


class Features(NamedTuple):
    """What goes into a unit and should come out of it, for all calibration images."""

    plain: Tensor  # what goes in where everything is float
    given: Tensor  # what goes in when all that comes before is quantized
    target: Tensor  # what the float unit makes of `plain`


def float_copy(model: nn.Module) -> nn.Module:
    """A frozen copy that computes in float, to learn from while the weights of the model itself change."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    rest(teacher)
    return teacher


def walk(
    model: nn.Module, teacher: nn.Module, sequence: Sequence[Unit], images: Tensor
) -> Iterator[tuple[Unit, Features]]:
    """Each unit with what goes in and should come out; what was done to the units before it is seen by the next.

    Args:
        model: the quantized network, in evaluation mode.
        teacher: the same in float.
        sequence: of units, in the order of execution.
        images: normalized calibration images.
    """
    before: tuple[Unit, Features] | None = None
    for unit in sequence:
        if before is not None and before[0].gives == unit.takes:
            plain = before[1].target
            given = plain if model is teacher else outputs(model, before[0], before[1].given)
        else:
            plain = inputs(teacher, unit, images)
            given = plain if model is teacher else inputs(model, unit, images)
        before = unit, Features(plain, given, outputs(teacher, unit, plain))
        yield before


@torch.no_grad()
def inputs(model: nn.Module, unit: Unit, images: Tensor) -> Tensor:
    """What goes into a unit, for all images."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any) -> None:
        caught.append(args[0].clone())
        raise _ReachedError

    with removing([model.get_submodule(unit.name).register_forward_pre_hook(catch)]):
        for part in torch.split(images, PASS):
            with suppress(_ReachedError):
                model(part)
    return torch.cat(caught)


class _ReachedError(Exception):
    """The forward pass has come as far as it is needed."""


@torch.no_grad()
def outputs(model: nn.Module, unit: Unit, given: Tensor) -> Tensor:
    """What a unit makes of all that goes in; `given` stays as it is, whatever works in place."""
    parts = unit.parts(model)
    return torch.cat([parts(part.clone()) for part in torch.split(given, PASS)])


def distance(found: Tensor, target: Tensor, power: float = 2.0, importance: Tensor | None = None) -> Tensor:
    """Mean over images and places of the sum over channels of `(importance |found - target|) ^ power`, power 2 or more.

    >>> distance(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 4.0], [3.0, 4.0]]))
    tensor(2.)
    """
    difference = (found.float() - target.float()).abs()
    channels = -1 if difference.ndim == 3 else 1  # tokens have their channels last
    return (difference if importance is None else difference * importance).pow(power).sum(channels).mean()


def error(
    model: nn.Module, unit: Unit, features: Features, power: float = 2.0, importance: Tensor | None = None
) -> float:
    """How far a unit is from what it should give, over all calibration images."""
    return float(distance(outputs(model, unit, features.given), features.target, power, importance))


def scores(output: Any) -> Tensor:
    """A network's main output in float32; it may be a dict with auxiliary ones."""
    main: Tensor = output["main"] if isinstance(output, dict) else output
    return main.float()


class Learned(NamedTuple):
    """What is optimized together."""

    parameters: Sequence[nn.Parameter]
    rate: float  # Adam's
    cosine: bool = False  # the rate falls to 0, along a cosine; otherwise it stays


def minimize(
    loss: Callable[[Tensor, int], Tensor],
    learned: Sequence[Learned],
    images: int,
    size: int,
    iterations: int,
    what: str,
) -> None:
    """Adam on a loss of random calibration images.

    Args:
        loss: from the positions of the images and the number of the iteration, counted from 1, to a scalar.
        learned: parameters; groups without any are left out.
        images: how many there are.
        size: how many an iteration sees.
        iterations: steps.
        what: is done, for the person watching.
    """
    groups = [group for group in learned if group.parameters]
    optimizer = torch.optim.Adam([{"params": list(group.parameters), "lr": group.rate} for group in groups])
    for iteration in watched(range(1, iterations + 1), what):
        for group, of in zip(optimizer.param_groups, groups, strict=True):
            fall = (1 + math.cos(math.pi * (iteration - 1) / iterations)) / 2
            group["lr"] = of.rate * (fall if of.cosine else 1.0)
        optimizer.zero_grad()
        torch.autograd.backward(loss(torch.randperm(images)[:size], iteration))
        optimizer.step()


class Errors(NamedTuple):
    """On the calibration images, before something was learned and after."""

    before: float
    after: float


def kept_if_better(
    parameters: Sequence[nn.Parameter], measure: Callable[[], float], learn: Callable[[], None]
) -> Errors:
    """Learns; takes it back where that made what is measured larger.

    Args:
        parameters: that may change.
        measure: what should become smaller.
        learn: changes the parameters.
    """
    values, first = [parameter.detach().clone() for parameter in parameters], measure()
    learn()
    if (found := measure()) <= first:
        return Errors(first, found)
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    return Errors(first, first)


@contextmanager
def mending(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode, quantizers at work, nothing learning, random numbers of its own; all as before afterwards."""
    device = device_of(model)
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model), resting(model, False):
        torch.manual_seed(seed)
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, before in learns:
                parameter.requires_grad_(before)
                parameter.grad = None


@contextmanager
def learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters learn, as long as the `with` lasts."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
