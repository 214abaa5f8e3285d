"""Integer lowering: from a trained network to the same network computing with integer codes.

Background: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, arXiv 1712.05877. Each `QuantLayer` becomes an `IntegerLayer` (int8 codes, a scale a channel,
int32 bias codes), each quantized stream an `IntegerStream`, BatchNorm and output scale go into scale and bias:

    y_c = s_x s_c (sum_i (q_x - z_x)_i q_w,ci + b_c),        b_c = round(bias_c / (s_x s_c))

The result is still an ordinary PyTorch module that anyone can run and read; an engine computes the same with integers.
Use it through export; the cost is one forward pass. Recipes: every quantized one.

Chosen here, where papers are silent:
- Codes of activations are stored from 0 in uint8 (`code - low`), whatever the sign: engines want one type on both
  sides of a layer, and unsigned activations with signed weights.
- Weights below 8 bits are multiplied by the power of two that just fills ±64 and their scale divided by it. Values are
  the same bit for bit, 16-bit pair sums of older processors cannot saturate, and the bias, which engines round to
  s_x s_c, is up to 64 times finer.
- A negative factor flips the signs of a channel's codes. Where int8 overflows (an actual -128) the BatchNorm stays.
- An encoder's offset is rounded to whole steps of the accumulator before it, where an engine takes it into the bias.
- A channel whose bias exceeds 2^30 steps of its own accumulator (a dead one) is a constant: zero weights, bias kept.
- A layer that no 8-bit integer can express (`obstacle` says why) stays as it was trained, in float.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from galago.deploy.codes import centered, encode, flips_fit
from galago.deploy.integer_layers import TRANSPOSED, IntegerLayer, IntegerStream, StreamInput, StreamOutput, output_axis
from galago.errors import UserError
from galago.layers import Flow, find, flow, swap
from galago.quantize.fold import Scaling, ends_of, following_norm, layer_before, scaling_of, without_norm
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.quantizer import Quantizer, along

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def lower(network: nn.Module, example: Tensor) -> nn.Module:
    """The network computing with integers wherever it was quantized; a copy, on the CPU, in evaluation mode.

    Args:
        network: trained, from normalized input to raw output.
        example: one normalized input, N×C×H×W, which is run once to see what feeds what.

    Raises:
        UserError: a quantizer never saw data, so its range is not set.
    """
    network = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    if not any(isinstance(module, QuantLayer | QuantOutput) for module in network.modules()):
        return network
    check_ranges(network)
    seen = flow(network, example.cpu().float())
    norms: dict[str, str | None] = {}
    for paths in places(network, QuantLayer):
        layer = find(network, paths[0])
        assert isinstance(layer, QuantLayer)
        if obstacle(layer) is None:
            network, norms[paths[0]] = lower_layer(network, layer, paths, seen)
    align_offsets(network, seen, norms)
    for paths in places(network, QuantOutput):
        output = find(network, paths[0])
        assert isinstance(output, QuantOutput)
        if stream_obstacle(output.output_quantizer) is None:
            network = replace(network, paths, StreamOutput(output.layer, IntegerStream(output.output_quantizer)))
    return network


def lower_layer(network: nn.Module, old: QuantLayer, paths: list[str], seen: Flow) -> tuple[nn.Module, str | None]:
    """Puts the integer form of one quantized layer in its place; also the path of the BatchNorm that it took in."""
    layer, scaling = old.layer, own_scaling(old)
    path = following_norm(network, seen, paths[0]) if len(paths) == 1 else None
    if path is not None:
        norm = find(network, path)
        both = scaling_of(norm).after(scaling)
        if old.weight_quantizer is None or flips_fit(layer, old.weight_quantizer, both.factor, output_axis(layer)):
            scaling, network = both, swap(network, path, without_norm(norm))
        else:
            path = None
    has_bias = bias_of(layer) is not None or bool(scaling.shift.any())
    return replace(network, paths, integer_form(old, scaling, has_bias)), path


def align_offsets(network: nn.Module, seen: Flow, norms: Mapping[str, str | None]) -> None:
    """Rounds each encoder's offset to whole accumulator steps of the integer layer that comes just before.

    Engines take it into that layer's bias (`galago.deploy.fuse`); the integer module is to do exactly as they do.
    """
    ends = ends_of(seen, {path: norm for path, norm in norms.items() if len(seen.gave.get(path, ())) == 1})
    for path in norms:
        stream = getattr(find(network, path), "stream", None)
        if stream is None or stream.encoder_offset is None or len(seen.received[path]) != 1:
            continue
        number = seen.received[path][0][0]
        before = layer_before(seen, number, ends)
        layer = None if before is None else find(network, before)
        if isinstance(layer, IntegerLayer) and layer.stream is not None:
            step = layer.stream.scale * layer.scale
            rounded = (stream.encoder_offset / step).round() * step
            channels_last = isinstance(layer.layer, nn.Linear)
            behind = 0 if channels_last else seen.values[number].ndim - 2
            stream.encoder_offset = rounded.view(-1, *[1] * behind)


def own_scaling(old: QuantLayer) -> Scaling:
    """The layer's own bias and output scale, as factor and shift of the accumulated sum."""
    layer, own = old.layer, bias_of(old.layer)
    factor = torch.ones(weight_of(layer).shape[output_axis(layer)], dtype=torch.float64)
    if old.output_scale is not None:
        factor = factor * old.output_scale.detach().double().abs()
    return Scaling(factor, torch.zeros_like(factor) if own is None else own.double() * factor)


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, without its gradient."""
    return layer.get_parameter("weight").detach()


def bias_of(layer: nn.Module) -> Tensor | None:
    """A layer's bias, without its gradient; None if it has none."""
    bias = dict(layer.named_parameters(recurse=False)).get("bias")
    return None if bias is None else bias.detach()


def integer_form(old: QuantLayer, scaling: Scaling, has_bias: bool) -> nn.Module:
    """What stands in the layer's place: factor and shift are taken in."""
    layer, axis = old.layer, output_axis(old.layer)
    weight, bias = weight_of(layer), scaling.shift if has_bias else None
    stream = None if old.input_quantizer is None else IntegerStream(old.input_quantizer)
    if old.weight_quantizer is not None:
        unit = 0.0 if stream is None else stream.scale.item()
        codes = encode(weight, old.weight_quantizer, scaling.factor, axis, bias, unit)
        return IntegerLayer(layer, stream, codes, bias)
    scaled = weight.double() * along(scaling.factor, weight, axis)
    layer.register_parameter("weight", nn.Parameter(scaled.float(), requires_grad=False))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.float(), requires_grad=False))
    return layer if stream is None else StreamInput(layer, stream)


def obstacle(old: QuantLayer) -> str | None:
    """Why a quantized layer cannot become an integer one and stays in float; None if it can."""
    layer, weight, inputs = old.layer, old.weight_quantizer, old.input_quantizer
    if inputs is not None and (reason := stream_obstacle(inputs)):
        return f"its input {reason}"
    if not isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
        return f"{type(layer).__name__} is neither a convolution nor linear"
    if not scales_with_weight(layer):
        return f"{type(layer).__name__} computes another weight from the one it stores"
    if isinstance(layer, TRANSPOSED) and getattr(layer, "groups", 1) > 1:
        return "a grouped transposed convolution has no axis of output channels"
    if weight is None:
        return None
    if weight.grid().axis not in (None, output_axis(layer)):
        return "its weight is scaled along an axis other than the output channels"
    codes = centered(weight_of(layer), weight)
    if codes.min() < -128 or codes.max() > 127:
        return f"its weight's codes reach from {codes.min()} to {codes.max()}, more than 8 bits hold"
    return None


def scales_with_weight(layer: nn.Module) -> bool:
    """Whether twice the weight and bias give twice the output, as after weight standardization they do not."""
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        x = sample_input(layer, weight_of(layer))
        for name, parameter in doubled.named_parameters():
            parameter.mul_(2 if name in ("weight", "bias") else 1)  # a gain that doubled too would hide it
        once, twice = layer(x), doubled(x)
    return torch.allclose(2 * once, twice, rtol=1e-4, atol=1e-6 * float(once.abs().max()))


def sample_input(layer: nn.Module, weight: Tensor) -> Tensor:
    """Something that a convolution or linear layer can take in."""
    if not isinstance(layer, CONVOLUTIONS):
        return torch.linspace(-1, 1, weight.shape[1]).expand(1, -1)
    sides = [2 * size * step + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    shape = (1, layer.in_channels, *sides)
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


def stream_obstacle(quantizer: Quantizer) -> str | None:
    """Why an activation cannot be kept as uint8; None if it can."""
    grid = quantizer.grid()
    if grid.scale.numel() != 1:
        return "has a scale per channel, which no engine computes with"
    if grid.high - grid.low > 255:
        return f"needs {grid.high - grid.low + 1} codes, more than the 256 of 8 bits"
    if not 0 <= grid.zero_point.item() - grid.low <= 255:
        return "has its zero outside the range of 8 bits"
    if grid.zero_point.item() % 1:
        return "has its zero between two codes"
    return None


def obstacles(network: nn.Module) -> dict[str, str]:
    """Every quantized layer or stream that `lower` leaves in float, by path, and why."""
    found: dict[str, str | None] = {}
    for path, module in network.named_modules():
        if isinstance(module, QuantLayer):
            found[path] = obstacle(module)
        elif isinstance(module, QuantOutput) and (reason := stream_obstacle(module.output_quantizer)):
            found[path] = f"its output {reason}"
    return {path: reason for path, reason in found.items() if reason is not None}


def check_ranges(network: nn.Module) -> None:
    """Refuses a network whose quantizers still wait for their first input."""
    for path, module in network.named_modules():
        if isinstance(module, QuantLayer | QuantOutput) and module.observing:
            raise UserError(f"{path}: its quantizer has not seen an input yet; train or calibrate before exporting")


def places(network: nn.Module, kind: type[nn.Module]) -> list[list[str]]:
    """Where each module of a kind stands; several paths for one that is shared."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            paths.setdefault(module, []).append(path)
    return list(paths.values())


def replace(network: nn.Module, paths: list[str], new: nn.Module) -> nn.Module:
    """The network with `new` at each of the paths."""
    for path in paths:
        network = swap(network, path, new)
    return network
