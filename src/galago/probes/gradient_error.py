"""Gradient error: how far quantized gradients are from the true ones, for all of them and for the large ones.

The analysis of Kim et al., "Toward INT4 Fixed-Point Training via Exploring Quantization Error for Gradients", ECCV
2024, arXiv:2407.12637: training suffers from the error of the few large gradients, not from that of all.

    E(G) = mean |G_hat - G| / max|G|,   E(G_L): the same mean over the share alpha of the largest |G|

Both are means over the network's gradient quantizers (`galago.quantize.quantize_gradient`). They are found in one
forward and backward pass on the first training batch, in training mode, with the task's own loss.

When to use it: while training with quantized gradients; list it under `probes` and the log has its numbers after each
epoch. It costs one training step an epoch. A finished network has no gradient quantizers left, nor has a file: there it
gives nothing.

Design choice: errors are divided by the layer's largest gradient, so that layers and epochs compare; the rounding draws
from a generator of its own, so that a measurement repeats itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from galago.data import Data
from galago.errors import UserError
from galago.probe import Probe, device_of
from galago.quantize.gradient_quantizer import OFF, arriving_gradients, gradient_quantizers, quantized_gradient
from galago.task import Task


def gradient_errors(gradient: Tensor, quantized: Tensor, alpha: float) -> tuple[float, float]:
    """`E(G)` and `E(G_L)`, in units of the gradient.

    Args:
        gradient: any shape.
        quantized: the same shape.
        alpha: the share of the largest elements that count as large; at least one does.

    >>> gradient_errors(torch.tensor([4.0, 0.5, 0.5, 0.5]), torch.tensor([3.0, 1.0, 0.0, 0.5]), 0.25)
    (0.5, 1.0)
    """
    size, error = gradient.abs().flatten(), (quantized - gradient).abs().flatten()
    large = size.topk(max(1, round(alpha * size.numel()))).indices
    return float(error.mean()), float(error[large].mean())


class GradientError(Probe):
    """`gradient_error` and `gradient_error_large`, relative to the largest gradient; `gradient_interval`, mean gamma.

    Args:
        alpha: the share of all gradients that count as large.
    """

    def __init__(self, alpha: float = 1e-3) -> None:
        if not 0 < alpha <= 1:
            raise UserError(f"GradientError: alpha is {alpha}; give a share above 0 and at most 1, usually 0.001")
        self.alpha = alpha

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        active = {path: one for path, one in gradient_quantizers(deployed).items() if one.bits != OFF}
        if not active:
            return {}
        device = device_of(deployed)
        batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), next(iter(data.train())))

        def loss() -> Tensor:
            return torch.stack(list(task.losses(deployed(batch.input), batch).values())).sum()

        found: list[tuple[float, float]] = []
        with training(deployed):
            gradients = arriving_gradients(deployed, [], loss)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(0)
            for path, quantizer in active.items():
                gradient = gradients[path]
                largest = gradient.abs().max().clamp_min(torch.finfo(gradient.dtype).tiny)
                rounded, _, _ = quantized_gradient(gradient, quantizer.gamma, quantizer.bits)
                found.append(gradient_errors(gradient / largest, rounded / largest, self.alpha))
        every, large = (sum(numbers) / len(found) for numbers in zip(*found, strict=True))
        interval = sum(float(one.gamma) for one in active.values()) / len(active)
        return {"gradient_error": every, "gradient_error_large": large, "gradient_interval": interval}


@contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Training mode as long as the `with` lasts; afterwards each part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
