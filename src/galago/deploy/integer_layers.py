"""The parts of an integer network: readable PyTorch modules that compute exactly what an engine will.

`IntegerStream` turns an activation into uint8 codes and back, `IntegerLayer` holds int8 weight codes and int32 bias
codes, `StreamInput` and `StreamOutput` put a stream before or behind any other module. Made by `galago.deploy.integer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from galago.deploy.codes import WeightCodes, encode_bias
from galago.deploy.operators import dequantize, quantize
from galago.layers import Wrapper
from galago.quantize.quantizer import Quantizer

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def output_axis(layer: nn.Module) -> int:
    """Which axis of a layer's weight counts its output channels."""
    return 1 if isinstance(layer, TRANSPOSED) else 0


class IntegerStream(nn.Module):
    """Codes of an activation and back to values: what an engine keeps as uint8 between layers.

    Args:
        quantizer: trained; its grid must pass `stream_obstacle`.
    """

    scale: Tensor
    zero_point: Tensor
    encoder_scale: Tensor
    encoder_offset: Tensor | None

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        grid, encoder = quantizer.grid(), quantizer.encoder()
        self.bits, self.lowest, self.high = quantizer.bits, grid.low, grid.high - grid.low
        affine = grid.step == 1 and quantizer.rounds
        self.quantizer = None if affine else quantizer
        self.register_buffer("scale", grid.scale.detach().float().reshape(()).clone())
        self.register_buffer("zero_point", (grid.zero_point.reshape(()) - grid.low).to(torch.uint8))
        self.register_buffer("encoder_scale", encoder.scale.detach().float().reshape(()).clone())
        offset = encoder.offset.detach().float().reshape(()).clone()
        self.register_buffer("encoder_offset", offset if offset.item() else None)

    def codes(self, x: Tensor) -> Tensor:
        """uint8, counted from 0; the quantizer's own codes are these plus `lowest`."""
        if self.quantizer is not None:  # an encoder of its own kind, such as thresholds
            return (self.quantizer.codes(x) - self.lowest).to(torch.uint8)
        codes: Tensor = quantize(x, self.encoder_scale, self.encoder_offset, self.zero_point, 0, self.high)
        return codes

    def places(self, x: Tensor) -> Tensor | None:
        """Where values lie between codes, in steps, before rounding; None for an encoder that does not round."""
        if self.quantizer is not None:
            return None
        return (x if self.encoder_offset is None else x - self.encoder_offset) / self.encoder_scale

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = dequantize(self.codes(x), self.scale, self.zero_point, None)
        return values

    def extra_repr(self) -> str:
        return f"{self.bits} bits, codes 0 to {self.high}, scale {self.scale.item():.6g}"


class StreamInput(Wrapper):
    """A layer in float whose input is integer codes: only its input was quantized.

    Args:
        layer: with a float weight.
        stream: what encodes the input.
    """

    def __init__(self, layer: nn.Module, stream: IntegerStream) -> None:
        super().__init__(layer)
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(self.stream(x))
        return output


class StreamOutput(Wrapper):
    """A module whose output is integer codes: a residual stream.

    Args:
        layer: any module that gives one tensor.
        stream: what encodes its output.
    """

    def __init__(self, layer: nn.Module, stream: IntegerStream) -> None:
        super().__init__(layer)
        self.stream = stream

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        output: Tensor = self.stream(self.layer(*args, **kwargs))
        return output


class IntegerLayer(Wrapper):
    """A convolution or linear layer whose weight is int8 codes and whose bias int32 codes.

    Args:
        layer: a plain layer; its own weight and bias are taken away.
        stream: what encodes the input; None for float input, and then the bias stays float.
        weight: codes of the weight.
        bias: float64, one per output channel, or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias_codes: Tensor | None
    bias_scale: Tensor | None
    float_bias: Tensor | None

    def __init__(
        self, layer: nn.Module, stream: IntegerStream | None, weight: WeightCodes, bias: Tensor | None
    ) -> None:
        super().__init__(layer)
        take_parameters(layer)
        self.stream, self.axis = stream, output_axis(layer)
        self.bits, self.step, self.base = weight.bits, weight.step, weight.base
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        # Zeros, written out: ONNX Runtime makes a QGemm only of a weight whose zero points are there.
        self.register_buffer("zero_point", torch.zeros(len(weight.scale), dtype=torch.int8))
        # The scale of an integer bias is exactly this float32 product: engines take it for granted.
        scale = None if stream is None or bias is None else stream.scale * weight.scale
        self.register_buffer("bias_scale", scale)
        self.register_buffer("bias_codes", None if scale is None or bias is None else encode_bias(bias, scale))
        self.register_buffer("float_bias", None if scale is not None or bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:
        inputs = x if self.stream is None else self.stream(x)
        weight = dequantize(self.codes, self.scale, self.zero_point, self.axis)
        bias = self.float_bias if self.bias_codes is None else dequantize(self.bias_codes, self.bias_scale, None, 0)
        values: dict[str, Any] = {"weight": weight, "bias": bias}
        output: Tensor = functional_call(self.layer, values, (inputs,))
        return output

    def extra_repr(self) -> str:
        return f"{self.bits}-bit weight"


def take_parameters(layer: nn.Module) -> None:
    """Leaves a layer without weight and bias of its own, so that they are neither stored nor exported."""
    for name in ("weight", "bias"):
        layer.register_parameter(name, None)
