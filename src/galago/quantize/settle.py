"""Settling biases: when training ends, every bias moves to the nearest one that an integer engine can hold.

An engine adds the bias to its 32-bit accumulator, so it holds biases in steps of that accumulator,

    s_x s_w,c |f_c| / 2^k,        f_c = gamma_c / sqrt(var_c + eps),

with the input's scale s_x, the weight's s_w,c, the BatchNorm behind the layer folded in, and k the number of times that
small codes can be doubled (`quantizer.doublings`). What the next layer's encoder subtracts is taken into the bias too,
so it is the difference that is settled. At few bits a step is not negligible: left to the export, the rounding would
move one code in a hundred and now and then a decision. Done here it is part of the trained model: what is measured
after training is what the file computes.

Design choice; the methods' papers keep BatchNorm and biases in float.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from galago.layers import Flow, find, flow
from galago.quantize.columns import transposed
from galago.quantize.fold import ends_of, following_norm, layer_before, scaling_of
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import doublings

LARGEST = 2**30  # steps; beyond it a channel is a constant to the exporter, and any bias will do


@torch.no_grad()
def settle_biases(network: nn.Module, example: Tensor) -> None:
    """Moves the biases of a trained network, in place, by half a step at most.

    Args:
        network: in evaluation mode.
        example: a normalized input; run once to see which BatchNorm follows which layer.
    """
    seen = flow(network, example)
    layers = {
        path: layer
        for path, layer in network.named_modules()
        if isinstance(layer, QuantLayer) and scaled_by_output(layer) and layer.input_quantizer is not None
    }
    norms = {path: following_norm(network, seen, path) for path in layers if len(seen.gave.get(path, ())) == 1}
    offsets = offsets_behind(layers, norms, seen)
    for path, layer in layers.items():
        norm = norms.get(path)
        offset = offsets.get(path, torch.zeros(()))
        if norm is None:
            settle_layer(layer, accumulator_step(layer), offset)
        else:
            found = find(network, norm)
            assert isinstance(found, _BatchNorm)
            settle_norm(found, layer, accumulator_step(layer), offset)


def offsets_behind(layers: Mapping[str, QuantLayer], norms: Mapping[str, str | None], seen: Flow) -> dict[str, Tensor]:
    """What the next layer's encoder subtracts from each layer's result: engines take it into the bias as well."""
    ends, found = ends_of(seen, norms), {}
    for path in norms:
        quantizer = layers[path].input_quantizer
        before = layer_before(seen, seen.received[path][0][0], ends)
        if quantizer is not None and before is not None:
            found[before] = quantizer.encoder().offset.detach()
    return found


def scaled_by_output(layer: QuantLayer) -> bool:
    """Whether an accumulator has one step: a transposed convolution with a scale per input channel has no such thing.

    Its weight's first axis is that of its inputs; engines compute such a layer in float.
    """
    if layer.weight_quantizer is None:
        return False
    return layer.weight_quantizer.grid().axis in (None, 1 if transposed(layer.layer) else 0)


def accumulator_step(layer: QuantLayer) -> Tensor:
    """What one count of the accumulator stands for in the layer's output, one per channel or one for all, float64."""
    assert layer.weight_quantizer is not None
    assert layer.input_quantizer is not None
    weight, inputs = layer.weight_quantizer.grid(), layer.input_quantizer.grid()
    step = weight.scale.double() * inputs.scale.double() * 0.5 ** doublings(weight)
    return step if layer.output_scale is None else step * layer.output_scale.detach().double().abs()


def settle_layer(layer: QuantLayer, step: Tensor, offset: Tensor) -> None:
    """A layer without BatchNorm behind it: its own bias is what the accumulator starts from."""
    bias = layer.layer._parameters.get("bias")
    if bias is None:
        return
    factor = torch.ones_like(step) if layer.output_scale is None else layer.output_scale.detach().double().abs()
    bias.copy_(settled(bias.double() * factor, step, offset) / factor.clamp_min(1e-300))


def settle_norm(norm: _BatchNorm, layer: QuantLayer, step: Tensor, offset: Tensor) -> None:
    """A layer with a BatchNorm: what both add together is settled by moving the BatchNorm's own bias or mean."""
    scaling = scaling_of(norm)
    own = layer.layer._parameters.get("bias")
    output_scale = 1.0 if layer.output_scale is None else layer.output_scale.detach().double().abs()
    before = scaling.shift if own is None else scaling.shift + own.double() * output_scale * scaling.factor
    moved = settled(before, step * scaling.factor.abs(), offset) - before
    if norm._parameters.get("bias") is not None:
        norm.get_parameter("bias").copy_(norm.get_parameter("bias").double() + moved)
    else:
        factor = torch.where(scaling.factor == 0, 1.0, scaling.factor)
        norm.get_buffer("running_mean").sub_((moved / factor).float())


def settled(bias: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """The nearest bias that lies whole steps from the offset; unchanged where a step is nothing or far too small.

    >>> settled(torch.tensor([0.8, 3.0]), torch.tensor([0.5, 0.0]), torch.tensor(0.2))
    tensor([0.7000, 3.0000])
    """
    step, rest = step.expand_as(bias), bias - offset
    sensible = (step > 0) & (rest.abs() <= LARGEST * step)
    return torch.where(sensible, (rest / torch.where(sensible, step, 1.0)).round() * step + offset, bias)
