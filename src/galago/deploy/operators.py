"""`galago::quantize` and `galago::dequantize`: two operators that PyTorch runs and the exporter recognizes.

They are what ONNX calls QuantizeLinear and DequantizeLinear. Being operators of their own, they pass through
`torch.export` whole, so that the file says exactly what is meant instead of a dozen float operations.

>>> zero = torch.tensor(2, dtype=torch.uint8)
>>> quantize(torch.tensor([-9.0, 0.0, 0.6, 9.0]), torch.tensor(0.5), None, zero, 0, 15)
tensor([ 0,  2,  3, 15], dtype=torch.uint8)
>>> dequantize(torch.tensor([0, 2, 3], dtype=torch.uint8), torch.tensor(0.5), zero, None)
tensor([-1.0000,  0.0000,  0.5000])
"""

from __future__ import annotations

import torch
from torch import Tensor

from galago.quantize.quantizer import along


@torch.library.custom_op("galago::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Real values to codes: `clip(round((x - offset) / scale) + zero_point, low, high)`, half to even.

    Args:
        x: any shape, float.
        scale: one positive number.
        offset: one number, or one per channel shaped to broadcast; None for zero.
        zero_point: one code, uint8.
        low: smallest code.
        high: largest code.

    Returns:
        Codes, uint8, shape of `x`.
    """
    shifted = x if offset is None else x - offset
    return ((shifted / scale).round() + zero_point).clamp(low, high).to(torch.uint8)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor, low: int, high: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("galago::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    """Codes to real values: `(codes - zero_point) * scale`.

    Args:
        codes: integers of any shape.
        scale: one number, or one per slice along `axis`.
        zero_point: of the codes' type, shape of `scale`; None for zero.
        axis: None for a single scale.

    Returns:
        Of the type of `scale`, shape of `codes`.
    """
    # Subtracting integers first keeps 32-bit biases exact where float32 could not hold them.
    centered = codes.to(torch.int32)
    if zero_point is not None:
        centered = centered - along(zero_point, codes, axis).to(torch.int32)
    return centered.to(scale.dtype) * along(scale, codes, axis)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)
