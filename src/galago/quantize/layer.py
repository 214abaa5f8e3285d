"""`QuantLayer`: any layer with a weight, computing in quantized values; `QuantOutput`: a quantized stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from galago.quantize.quantizer import OwnRates, Quantizer
from galago.quantize.rest import Restable


class QuantLayer(Restable):
    """A layer in whose place stands itself with quantized weights and inputs. Parameters stay the same objects.

    The bias is added inside, in float, and quantized only on export (to 32 bits).

    Args:
        layer: a convolution of any kind, or a linear layer.
        weight_quantizer: for the layer's weight; None leaves it float.
        input_quantizer: for what comes in; None leaves it float.

    Attributes:
        cut_off: the share of the first values that are negative where the input's quantizer holds no negative one.
    """

    def __init__(
        self, layer: nn.Module, weight_quantizer: Quantizer | None = None, input_quantizer: Quantizer | None = None
    ) -> None:
        super().__init__(layer)
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer
        self.observing, self.cut_off = False, 0.0
        if weight_quantizer is not None:
            weight_quantizer.initialize(layer.get_parameter("weight").detach())
        normalized = any(q is not None and q.normalized for q in (weight_quantizer, input_quantizer))
        self.output_scale = nn.Parameter(torch.ones(())) if normalized else None

    def forward(self, x: Tensor) -> Tensor:
        if self.resting is not None:
            plain: Tensor = self.layer(x)
            return plain
        if self.observing:
            self.observe(x)
        inputs = x if self.input_quantizer is None else self.input_quantizer(x)
        output: Tensor = functional_call(self.layer, self.parameters_used(), (inputs,))
        return output

    def parameters_used(self) -> dict[str, Tensor]:
        """What the layer computes with: its weight quantized, weight and bias times the learned output scale.

        Scaling the layer's few parameters is scaling its output, without two more feature maps in memory.
        """
        used: dict[str, Tensor] = {"weight": self.layer.get_parameter("weight")}
        if self.weight_quantizer is not None:
            used["weight"] = self.weight_quantizer(used["weight"])
        if self.output_scale is None:
            return used
        if self.layer.bias is not None:
            used["bias"] = self.layer.get_parameter("bias")
        return {name: tensor * self.output_scale.abs() for name, tensor in used.items()}

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Sets the input's range, and the output scale so that the mean size of the output is as in float."""
        self.observing = False
        if self.input_quantizer is not None:
            self.input_quantizer.initialize(with_spread(x.float()))
            self.cut_off = share_cut_off(self.input_quantizer, x)
        if self.output_scale is not None:
            self.output_scale.fill_(1.0)
            wanted, quantized = (y.float().abs().mean() for y in (self.layer(x), self(x)))
            told = (wanted > 0) & (quantized > 0)  # else nothing comes through, and no factor would mend that
            self.output_scale.copy_(torch.where(told, wanted / quantized.clamp_min(1e-12), 1.0))

    def own_rates(self) -> OwnRates:
        """The output scale learns as the ranges do: a fraction of the weights' rate, no decay."""
        quantizer = self.weight_quantizer or self.input_quantizer
        return quantizer.own_rates() if quantizer is not None else OwnRates()

    def extra_repr(self) -> str:
        return "" if self.output_scale is None else "learned output scale"


class QuantOutput(Restable):
    """A module whose output is quantized: a residual stream, so that an engine may carry it as integers.

    Args:
        layer: any module that gives one tensor.
        output_quantizer: for what it gives.

    Attributes:
        cut_off: as a `QuantLayer`'s.
    """

    def __init__(self, layer: nn.Module, output_quantizer: Quantizer) -> None:
        super().__init__(layer)
        self.output_quantizer = output_quantizer
        self.observing, self.cut_off = False, 0.0

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        output: Tensor = self.layer(*args, **kwargs)
        if self.resting is not None:
            return output
        if self.observing:
            self.observing = False
            with torch.no_grad():
                self.output_quantizer.initialize(with_spread(output.float()))
                self.cut_off = share_cut_off(self.output_quantizer, output)
        quantized: Tensor = self.output_quantizer(output)
        return quantized


def with_spread(x: Tensor) -> Tensor:
    """What a range can be read off: `x` itself, or values from 0 to its own where it has but one; to 1 where that is 0.

    A first batch without any spread says nothing of the batches to come, which a range of no width would cut off.

    >>> with_spread(torch.zeros(3))
    tensor([1.0000, 0.5000, 0.0000])
    """
    low, high = x.aminmax()
    if low != high:
        return x
    return torch.linspace(float(low) or 1.0, 0.0, x.numel(), device=x.device).view_as(x)


def share_cut_off(quantizer: Quantizer, x: Tensor) -> float:
    """The share of values that are negative, where a quantizer holds no negative value; else 0."""
    grid, encoder = quantizer.grid(), quantizer.encoder()
    lowest = encoder.offset + (grid.low - grid.zero_point) * encoder.scale
    return float((x < 0).float().mean()) if bool((lowest >= 0).all()) else 0.0
