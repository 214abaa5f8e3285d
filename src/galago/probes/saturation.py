"""Saturation: what a network loses on processors whose 8-bit products overflow, emulated on any machine.

Before VNNI (Intel until about 2019, AMD until Zen 4) x86 processors multiply unsigned by signed bytes in pairs, and a
pair's sum is cut off at 16 bits:

    sat16(a_1 w_1 + a_2 w_2),   sat16(p) = clip(p, -32768, 32767),   a in 0 … 255, w in -127 … 127

Two large weights of one sign that meet two large inputs are so cut short, silently; only 8-bit weights with 8-bit
inputs can do it. A network may lose nothing or several points by it. `Quantize` with `reduce_range` keeps weights to 7
bits where that could happen, which makes it impossible: 255 (64 + 64) = 32640.

When to use it: before a file goes to machines that you do not know. It costs one more pass over some images, with all
pairs that may saturate worked out one by one. It measures the quantized PyTorch network; files give no number.

Recipe: recipes/quantize/lsq_w8a8_resnet20_cifar10.yaml.

Design choices: pairs are neighbors among the input channels at one place of the kernel, which is how engines lay out
their operands, kernel places following each other where the number of channels is odd. Layers whose groups have one
input channel are exact, as engines compute these in 32 bits. Transposed and three-dimensional convolutions are taken
for exact, too: engines compute them in float or otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.probe import Outputs, Probe, TaskMetrics, device_of, evaluating
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import along
from galago.task import Task

LOWEST, HIGHEST = -(2**15), 2**15 - 1


class Pairs(NamedTuple):
    """The pairs of weights in a layer that may saturate."""

    channel: Tensor  # of the output, one a pair
    place: Tensor  # number of the pair along the layer's flattened input
    weights: Tensor  # M×2 codes


class Saturation(Probe):
    """`saturating_layers`: layers that may saturate; `saturating_…`: each of the task's metrics where they do.

    Args:
        images: how many test images are measured.
    """

    def __init__(self, images: int = 1000) -> None:
        if images < 1:
            raise UserError(f"Saturation: images is {images}; give 1 or more")
        self.images = images

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        layers = [module for module in deployed.modules() if isinstance(module, QuantLayer) and is_integer(module)]
        if not layers:
            return {}
        pairs = {layer: found for layer in layers if len((found := saturable(layer)).channel)}
        with ExitStack() as hooks:
            for layer, found in pairs.items():
                hooks.callback(layer.register_forward_hook(saturating(found)).remove)
            numbers = TaskMetrics().score(some_outputs(deployed, data, self.images), task)
        return {"saturating_layers": float(len(pairs))} | {f"saturating_{name}": n for name, n in numbers.items()}


def some_outputs(deployed: nn.Module, data: Data, images: int) -> Outputs:
    """What the network says about the first test images."""
    device, found, seen = device_of(deployed), [], 0
    with evaluating(deployed), torch.inference_mode():
        for batch in data.test():
            taken = [part[: images - seen] for part in (batch.input, batch.target)]
            found.append((deployed(taken[0].to(device)).float().cpu(), taken[1]))
            if (seen := seen + len(taken[0])) >= images:
                break
    return Outputs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def is_integer(layer: QuantLayer) -> bool:
    """Whether an engine may multiply this layer's bytes in pairs."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    return isinstance(layer.layer, kinds) and layer.weight_quantizer is not None and layer.input_quantizer is not None


@torch.no_grad()
def weight_codes(layer: QuantLayer) -> Tensor:
    """The weight's codes counted from zero, O×K: kernel places slowest, then the input channels."""
    assert layer.weight_quantizer is not None
    weight, grid = layer.layer.get_parameter("weight"), layer.weight_quantizer.grid()
    codes = layer.weight_quantizer.codes(weight) - along(grid.zero_point, weight, grid.axis)
    return codes.flatten(2).transpose(1, 2).flatten(1) if codes.ndim > 2 else codes


def saturable(layer: QuantLayer) -> Pairs:
    """The pairs that saturate for some input.

    >>> from galago.quantize.min_max import MinMax, MinMaxWeight
    >>> layer = QuantLayer(nn.Linear(4, 1), MinMaxWeight(), MinMax())
    >>> _ = layer.layer.weight.data.copy_(torch.tensor([[1.0, 1.0, 1.0, -1.0]]))
    >>> saturable(layer).place  # the second pair's products cancel each other
    tensor([0])
    """
    assert layer.input_quantizer is not None
    grid = layer.input_quantizer.grid()
    if layer.layer.get_parameter("weight").shape[1] == 1:
        none = torch.empty(0, dtype=torch.long)
        return Pairs(none, none, torch.empty(0, 2))
    codes = weight_codes(layer)
    codes = nn.functional.pad(codes, (0, codes.shape[1] % 2)).view(len(codes), -1, 2)
    largest = grid.high - grid.low
    may = (codes.clamp_min(0).sum(2) * largest > HIGHEST) | (codes.clamp_max(0).sum(2) * largest < LOWEST)
    channel, place = may.nonzero(as_tuple=True)
    return Pairs(channel, place, codes[channel, place])


def saturating(pairs: Pairs) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that takes away from a layer's output what saturation does."""

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        assert isinstance(layer, QuantLayer)
        lost = torch.cat([cut_off(layer, image, pairs) for image in inputs[0].split(1)])
        return output + (lost * unit(layer)).view(output.shape).to(output.dtype)

    return hook


def cut_off(layer: QuantLayer, x: Tensor, pairs: Pairs) -> Tensor:
    """What the 16-bit sums lack against exact ones, in steps of the accumulator, N×O×L (N×…×O of a linear layer)."""
    columns, groups = operands(layer, x)
    taken = layer.layer.get_parameter("weight").shape[0] // groups
    wanted = pairs.channel // taken  # the group of each pair
    lost = columns.new_zeros(len(columns), taken * groups, columns.shape[-1])
    for part in torch.split(torch.arange(len(pairs.channel), device=x.device), 512):
        both = columns[:, wanted[part], pairs.place[part]]  # N×M×2×L
        sums = (both * pairs.weights[part].unsqueeze(-1)).sum(2)
        lost.index_add_(1, pairs.channel[part], sums.clamp(LOWEST, HIGHEST) - sums)
    return lost.transpose(1, 2) if isinstance(layer.layer, nn.Linear) else lost


def operands(layer: QuantLayer, x: Tensor) -> tuple[Tensor, int]:
    """The input's bytes in pairs, N×G×P×2×L with G groups, as a convolution's windows see them; and G."""
    quantizer, inner = layer.input_quantizer, layer.layer
    assert quantizer is not None
    grid = quantizer.grid()
    codes = quantizer.codes(x) - grid.low
    if isinstance(inner, nn.Linear):
        columns, groups = codes.reshape(len(codes), -1, codes.shape[-1]).transpose(1, 2).unsqueeze(1), 1
    else:
        columns, groups = windows(inner, codes, float(grid.zero_point - grid.low))
    even = nn.functional.pad(columns, (0, 0, 0, columns.shape[2] % 2))
    return even.view(len(even), groups, -1, 2, even.shape[-1]), groups


def windows(layer: nn.Module, codes: Tensor, zero: float) -> tuple[Tensor, int]:
    """What a convolution's kernel sees, N×G×K×L: kernel places slowest, then the group's channels."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    codes = nn.functional.pad(codes, layer._reversed_padding_repeated_twice, value=zero)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):
        codes, kernel, stride, dilation = codes.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    found = nn.functional.unfold(codes, kernel, dilation, 0, stride)
    places = found.view(len(codes), layer.groups, layer.in_channels // layer.groups, -1, found.shape[-1])
    return places.transpose(2, 3).flatten(2, 3), layer.groups


def unit(layer: QuantLayer) -> Tensor:
    """What one step of the accumulator counts, a number or one an output channel, shaped for N×O×L (or N×L×O)."""
    assert layer.weight_quantizer is not None
    assert layer.input_quantizer is not None
    scale = layer.weight_quantizer.grid().scale * layer.input_quantizer.grid().scale
    scale = scale if layer.output_scale is None else scale * layer.output_scale.abs()
    return scale if scale.ndim == 0 or isinstance(layer.layer, nn.Linear) else scale.view(-1, 1)
