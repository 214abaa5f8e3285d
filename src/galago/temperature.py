"""Temperature scaling: one number that makes a trained network as sure as it should be. It knows no network.

Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
arXiv:1706.04599. The grid is that of Jishnu Mukhoti et al., "Calibrating Deep Neural Networks using Focal Loss",
NeurIPS 2020, arXiv:2002.09437.

Scores are divided by T > 0 before the softmax. T > 1 makes a network less sure, T < 1 more so; the predicted class
stays. T is fitted on validation images that the network was not trained on:

    NLL(T) = mean_i [logsumexp(z_i / T) - Σ_k q_ik z_ik / T]         convex in 1 / T
    dNLL / d(1/T) = mean_i Σ_k (softmax(z_i / T)_k - q_ik) z_ik      grows with 1 / T, so bisection finds its zero

`fit_temperature` is the first; `grid_temperature` takes the T of 0.1, 0.2, …, 10 with the least expected calibration
error, the smallest of several, as reports on training-time calibration do.

When: any classifier, after training and once more after pruning or quantization; `galago.probes.temperature` measures
what it gives. It costs one pass over the validation images, and nothing in use: the last layer's weight and bias can be
divided by T.

Chosen here: T is sought between 0.05 and 20, and is one of these ends where the likelihood grows beyond it (every image
right, or scores that tell nothing). Targets may be class probabilities. Where all scores of each image are equal no T
changes anything, and it is 1.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from galago.errors import UserError
from galago.reliability import answers, reliability, require_finite

LOWEST, HIGHEST = 0.05, 20.0
HALVINGS = 30  # of log T: from a width of 6 to 6e-9


def fit_temperature(output: Tensor, target: Tensor) -> float:
    """The T for which `softmax(output / T)` makes the targets likeliest, from 0.05 to 20.

    Args:
        output: z, class scores N×K, of images that were not trained on.
        target: q, class probabilities N×K, or labels N.

    Raises:
        UserError: scores are not finite, or targets are no class probabilities of these scores.

    >>> import torch
    >>> scores = torch.tensor([[4.0, 0.0]]).repeat(4, 1)
    >>> T = fit_temperature(scores, torch.tensor([0, 0, 0, 1]))
    >>> round(T, 4), (scores / T).softmax(1)[0, 0]
    (3.641, tensor(0.7500))
    """
    q = _distributions(output, target)
    z = output.double()
    z = z - z.amax(1, keepdim=True)
    if not z.any():
        return 1.0
    wanted = (q * z).sum()
    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_sure = ((z / math.exp(middle)).softmax(1) * z).sum() > wanted
        low, high = (middle, high) if too_sure else (low, middle)
    return math.exp((low + high) / 2)


def grid_temperature(output: Tensor, target: Tensor, bins: int = 15) -> float:
    """The T of 0.1, 0.2, …, 10 for which the expected calibration error of `softmax(output / T)` is least.

    Args:
        output: z, class scores N×K, of images that were not trained on.
        target: q, class probabilities N×K (their most likely class counts), or labels N.
        bins: of the reliability diagram.

    Raises:
        UserError: scores are not finite, or targets are no class probabilities of these scores.
    """
    z, label = output.double(), _distributions(output, target).argmax(1)
    errors = {}
    for tenths in range(1, 101):
        confidence, correct = answers((z / (tenths / 10)).softmax(1), label)
        errors[tenths / 10] = reliability(confidence, correct, bins).expected_error()
    return min(errors, key=lambda temperature: errors[temperature])


def _distributions(output: Tensor, target: Tensor) -> Tensor:
    """Targets as class probabilities N×K, float64, on the scores' device."""
    if output.ndim != 2 or len(target) != len(output):
        raise UserError(f"a temperature needs scores N×K and N targets, not {_shape(output)} and {_shape(target)}")
    require_finite(output)
    classes, target = output.shape[1], target.to(output.device)
    if target.ndim == 1 and not target.is_floating_point():
        if target.min() < 0 or target.max() >= classes:
            raise UserError(
                f"labels lie from {target.min()} to {target.max()}, but there are scores of {classes} classes"
            )
        return nn.functional.one_hot(target.long(), classes).double()
    if target.shape != output.shape:
        raise UserError(f"targets are {_shape(target)}, but scores are {_shape(output)}: a temperature needs as many")
    if target.min() < 0 or (target.double().sum(1) - 1).abs().max() > 1e-3:
        raise UserError("targets are no class probabilities: each row has to be 0 or more and add up to 1")
    return target.double()


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a single number"
