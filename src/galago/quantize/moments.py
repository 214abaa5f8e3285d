"""What BatchNorms tell of a network without any image: means and variances of its channels, as far as they go.

BatchNorm gives each channel, over the images it was trained with, the mean beta and the standard deviation |gamma|; as
a normal variable it goes through a ReLU with

    E[max(0, x)] = |gamma| phi(beta / |gamma|) + beta Phi(beta / |gamma|)

phi and Phi being the standard normal's density and distribution. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, arXiv:1906.04721, appendix C.

Design choices: gamma may be negative, so its size counts (the paper assumes it positive). A sum has the sums of means
and variances, as if its parts were independent, and a ReLU behind it takes it for normal again. Means over positions
keep both. The network's input has mean 0 and variance 1, as it is normalized.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from galago.layers import Call, Flow, find
from galago.quantize.fold import FoldedNorm
from galago.quantize.graph import MEANS

SAME = frozenset(("view", "reshape", "_unsafe_view", "flatten", "clone", "alias", "detach"))


class Moments(NamedTuple):
    """Mean and variance of each channel."""

    mean: Tensor
    variance: Tensor


def relu_mean(beta: Tensor, gamma: Tensor) -> Tensor:
    """`E[max(0, x)]` of normal x with mean beta and standard deviation |gamma|; `max(0, beta)` where gamma is 0.

    >>> relu_mean(torch.tensor([0.0, -1.0, 2.0]), torch.tensor([1.0, 0.0, -1e-3]))
    tensor([0.3989, 0.0000, 2.0000])
    """
    density, below = _normal(beta, gamma)
    return torch.where(gamma == 0, beta.clamp_min(0), gamma.abs() * density + beta * below)


def relu_square(beta: Tensor, gamma: Tensor) -> Tensor:
    """`E[max(0, x)^2]`, likewise."""
    density, below = _normal(beta, gamma)
    spread = (beta.square() + gamma.square()) * below + beta * gamma.abs() * density
    return torch.where(gamma == 0, beta.clamp_min(0).square(), spread)


def _normal(beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    ratio = beta / torch.where(gamma == 0, 1.0, gamma.abs())
    return torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5, torch.special.ndtr(ratio)


def rectified(normal: Moments, below: float | None = None) -> Moments:
    """What a ReLU makes of normal variables, or `min(max(0, x), below)`.

    >>> rectified(Moments(torch.tensor([9.0]), torch.tensor([1.0])), below=6.0).mean
    tensor([5.9996])
    """
    beta, gamma = normal.mean, normal.variance.sqrt()
    mean, square = relu_mean(beta, gamma), relu_square(beta, gamma)
    if (
        below is not None
    ):  # as y = max(0, x) - max(0, x - b), and y^2 = max(0, x)^2 - 2b max(0, x - b) - max(0, x - b)^2
        beyond = relu_mean(beta - below, gamma)
        mean, square = mean - beyond, square - 2 * below * beyond - relu_square(beta - below, gamma)
    return Moments(mean, (square - mean.square()).clamp_min(0))


def moments(model: nn.Module, seen: Flow) -> dict[int, Moments]:
    """Mean and variance of each channel of the tensors that BatchNorms tell, by number."""
    image = seen.received[""][0][0]
    channels = seen.values[image].shape[1]
    zeros = torch.zeros(channels, dtype=torch.float64, device=seen.values[image].device)
    known = {image: Moments(zeros, zeros + 1)}
    for call in seen.calls:
        before = [known.get(number) for number in call.inputs]
        found = _normalized(model, call) or _followed(model, seen, call, [each for each in before if each], len(before))
        if found is not None:
            known[call.outputs[0]] = found
    return known


def _normalized(model: nn.Module, call: Call) -> Moments | None:
    """What a BatchNorm gives out, as far as its training tells."""
    norm = find(model, call.module)
    if "batch_norm" not in call.operation or not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return None
    around = find(model, call.module.rpartition(".")[0])
    if isinstance(around, FoldedNorm):
        return Moments(around.mean.double(), around.deviation.double().square())
    zeros = torch.zeros_like(norm.running_mean, dtype=torch.float64)
    mean = zeros if norm.bias is None else norm.bias.detach().double()
    return Moments(mean, zeros + 1 if norm.weight is None else norm.weight.detach().double().square())


def _followed(model: nn.Module, seen: Flow, call: Call, known: list[Moments], inputs: int) -> Moments | None:
    """What an operation makes of channels whose moments are known."""
    made = seen.values[call.outputs[0]] if call.outputs else None
    if made is None or not known:
        return None
    mean, channels = known[0].mean, len(known[0].mean)
    if call.operation == "relu":
        return rectified(known[0])
    if call.operation == "hardtanh" and isinstance(find(model, call.module), nn.ReLU6):
        return rectified(known[0], below=6.0)
    if call.operation == "add" and len(known) == inputs == 2 and len(known[1].mean) == channels:
        return Moments(mean + known[1].mean, known[0].variance + known[1].variance)
    if call.operation == "cat" and len(known) == inputs and made.shape[1] == sum(len(each.mean) for each in known):
        return Moments(torch.cat([each.mean for each in known]), torch.cat([each.variance for each in known]))
    whole = made.numel() == seen.values[call.inputs[0]].numel() and made.ndim in (2, 4)
    kept = call.operation in SAME and whole
    return known[0] if (kept or call.operation in MEANS) and made.ndim > 1 and made.shape[1] == channels else None
