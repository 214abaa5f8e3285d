"""Operator norms: by how much each layer can enlarge its input, and so the rounding errors and attacks in it.

Exact l1 and l∞ norms after Youwei Liang, Dong Huang, "Large Norms of CNN Layers Do Not Hurt Adversarial Robustness",
AAAI 2021 (recalled), arXiv:2009.08435; formulas in `galago.norms`.

Convolutions and linear layers are measured as the network computes when it predicts: with the BatchNorm that follows
folded in, and with quantized weights where they are quantized.

    ‖M‖_1 sum of absolute changes    ‖M‖_∞ largest change    ‖M‖_2 Euclidean length, by the power method, from below

A rounding error of Δ/2 in every input is one of Δ/2 · ‖M‖_∞ in an output at most (ReLU and pooling enlarge nothing), so
the l∞ norm ranks layers by what their inputs' few bits may cost at worst.

When: to look at a network before and after pruning, quantization or norm decay. It costs a pass over the weights and,
for ‖M‖_2, 100 products with each layer: a second for ResNet-20. Small norms are no sign of robustness (the paper's
point): measure that by `galago.probes.adversarial`. A file made from the network knows nothing of layers and gives no
numbers.

Chosen here: means are geometric, as norms multiply along a chain of layers. Products are not given: where branches
meet, as in every residual network, a path's product bounds nothing. Layers that do not run, or pad with anything but
zeros, are left out. Layer by layer: `OperatorNorms().table(deployed, data)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import Wrapper, find, flow
from galago.norms import CONVOLUTIONS, L1, Linf, Operator, operators, spectral_norm
from galago.probe import Deployed, Probe, device_of, evaluating, normalized
from galago.quantize.fold import following_norm, scaling_of
from galago.quantize.layer import QuantLayer
from galago.task import Task


class LayerNorms(NamedTuple):
    """One layer's norms, with the BatchNorm that follows."""

    path: str  # of the layer, or of what wraps it
    type: str
    batch_norm: str | None  # path of what is folded in
    l1: float
    linf: float
    spectral: float | None


class OperatorNorms(Probe):
    """Of `l1_norm`, `linf_norm` and `spectral_norm` the largest layer's (`_max`) and the geometric mean (`_mean`).

    Args:
        steps: of the power method, for the spectral norm; 0 leaves it out.
    """

    def __init__(self, steps: int = 100) -> None:
        if steps < 0:
            raise UserError(f"OperatorNorms: steps is {steps}; give 0 or more, usually 100")
        self.steps = steps

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        rows, numbers = self.table(deployed, data), {}
        for name in ("l1", "linf", "spectral") if rows else ():
            norms = torch.tensor([norm for row in rows if (norm := getattr(row, name)) is not None]).double()
            if len(norms):
                numbers[f"{name}_norm_max"] = float(norms.max())
                numbers[f"{name}_norm_mean"] = float(norms.log().mean().exp())  # 0 where a layer is all zeros
        return numbers

    def table(self, deployed: nn.Module, data: Data) -> list[LayerNorms]:
        """Every layer's norms, in the order of execution; nothing of a file.

        Args:
            deployed: a network in PyTorch; left as it was.
            data: gives an image of the size that it runs on.
        """
        network = deployed.network if isinstance(deployed, Deployed) else deployed
        if not any(True for _ in network.parameters()):
            return []
        image = normalized(data, data.example()[:1], device_of(network))
        found = operators(network, image)
        with evaluating(network), torch.random.fork_rng([image.device] if image.device.type == "cuda" else []):
            seen = flow(network, image)
        rows = []
        for path, operator in found.items():
            home = outermost(network, path)
            rows.append(self._measured(network, path, home, operator, following_norm(network, seen, home)))
        return rows

    @torch.no_grad()
    def _measured(self, network: nn.Module, path: str, home: str, operator: Operator, norm: str | None) -> LayerNorms:
        layer = find(network, path)
        weight = computing(find(network, home)).float()
        if norm is not None:
            weight = scaled(weight, scaling_of(find(network, norm)).factor.to(weight), operator)
        spectral = self._spectral(layer, weight, operator) if self.steps else None
        l1, linf = (float(one(weight, operator)) for one in (L1(), Linf()))
        return LayerNorms(home, type(layer).__name__, norm, l1, linf, spectral)

    def _spectral(self, layer: nn.Module, weight: Tensor, operator: Operator) -> float:
        channels = weight.shape[1] * operator.groups
        start = torch.randn(1, channels, *operator.size, generator=torch.Generator().manual_seed(0))
        return float(spectral_norm(product(layer, weight), (start / start.norm()).to(weight), self.steps))


def outermost(network: nn.Module, path: str) -> str:
    """The path of what wraps a layer, or its own."""
    while path.endswith(".layer") and isinstance(find(network, path.removesuffix(".layer")), Wrapper):
        path = path.removesuffix(".layer")
    return path


def computing(module: nn.Module) -> Tensor:
    """The weight that a layer, wrapped or not, computes with: rounded where it is quantized."""
    while isinstance(module, Wrapper):
        if isinstance(module, QuantLayer) and module.resting is None:
            return module.parameters_used()["weight"]
        module = module.layer
    return module.get_parameter("weight")


def scaled(weight: Tensor, factor: Tensor, operator: Operator) -> Tensor:
    """A weight with each channel that goes out multiplied by a factor.

    >>> scaled(torch.ones(2, 1), torch.tensor([2.0, 3.0]), Operator()).flatten().tolist()
    [2.0, 3.0]
    """
    split = weight.reshape(operator.groups, -1, *weight.shape[1:])  # G×O×C×taps of the convolution
    taps = [1] * (weight.ndim - 2)
    shape = [operator.groups, 1, -1, *taps] if operator.transposed else [operator.groups, -1, 1, *taps]
    return (split * factor.view(shape)).view_as(weight)


def product(layer: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What a layer does to x with another weight and without its bias; of a transposed convolution the transpose."""
    if not isinstance(layer, CONVOLUTIONS):
        return lambda x: nn.functional.linear(x, weight)
    none = [0] * len(layer.kernel_size)

    def convolve(x: Tensor) -> Tensor:
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice)
        return torch.convolution(x, weight, None, layer.stride, none, layer.dilation, False, none, layer.groups)

    return convolve
