"""What a quantized layer computes, computed independently: int64 in NumPy, and scales at the very end."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor, nn

from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import Quantizer

Whole = NDArray[np.int64]
Real = NDArray[Any]  # float64


def quantized_layer(quant: QuantLayer, x: Tensor) -> Real:
    """The layer's output from integer codes of weight and input, float64. Knows Conv2d and Linear.

    Args:
        quant: with both quantizers.
        x: its float input, N×C×H×W or N×C.
    """
    assert quant.weight_quantizer is not None
    assert quant.input_quantizer is not None
    layer = quant.layer
    total = accumulate(
        layer, whole(quant.input_quantizer, x), whole(quant.weight_quantizer, layer.get_parameter("weight"))
    )
    output: Real = total * across_channels(accumulator_step(quant) / 4, total.ndim)
    bias = dict(layer.named_parameters()).get("bias")
    if bias is not None:
        size = 1.0 if quant.output_scale is None else abs(quant.output_scale.item())
        output = output + size * across_channels(bias.detach().double().numpy(), total.ndim)
    return output


def accumulator_step(quant: QuantLayer) -> Real:
    """What one more in the integer sum is worth in the output; one number, or one per output channel."""
    assert quant.weight_quantizer is not None
    assert quant.input_quantizer is not None
    scales = [q.grid().scale.detach().double().numpy() for q in (quant.input_quantizer, quant.weight_quantizer)]
    step: Real = scales[0] * scales[1]
    return step if quant.output_scale is None else step * abs(quant.output_scale.item())


def whole(quantizer: Quantizer, x: Tensor) -> Whole:
    """Twice the distance of each code from the zero point, which may be half a step."""
    grid = quantizer.grid()
    zero = grid.zero_point.double()
    if zero.ndim and grid.axis is not None:
        zero = zero.view([-1 if axis == grid.axis else 1 for axis in range(x.ndim)])
    twice: Whole = (2 * (quantizer.codes(x.detach()).double() - zero)).round().long().numpy()
    return twice


def across_channels(per_channel: Real, dimensions: int) -> Real:
    """One number per channel, shaped to broadcast against N×C×…; a single number as it is."""
    return per_channel.reshape(1, -1, *[1] * (dimensions - 2)) if per_channel.ndim else per_channel


def accumulate(layer: nn.Module, x: Whole, weight: Whole) -> Whole:
    """The layer's sum of products without scale and bias."""
    if isinstance(layer, nn.Linear):
        return x @ weight.T
    assert isinstance(layer, nn.Conv2d)
    return convolve(x, weight, layer.stride, layer.padding, layer.dilation, layer.groups)


def convolve(x: Whole, weight: Whole, stride: Any, padding: Any, dilation: Any, groups: int) -> Whole:
    """A two-dimensional convolution of whole numbers; stride, padding and dilation by axis."""
    around = [(amount, amount) for amount in padding]
    window = [dilation[axis] * (weight.shape[2 + axis] - 1) + 1 for axis in (0, 1)]
    views = sliding_window_view(np.pad(x, [(0, 0), (0, 0), *around]), window, axis=(2, 3))
    views = views[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    parts = zip(np.split(views, groups, axis=1), np.split(weight, groups, axis=0), strict=True)
    return np.concatenate([np.einsum("nchwij,ocij->nohw", view, part) for view, part in parts], axis=1)
