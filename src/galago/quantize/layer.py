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
    """

    def __init__(
        self, layer: nn.Module, weight_quantizer: Quantizer | None = None, input_quantizer: Quantizer | None = None
    ) -> None:
        super().__init__(layer)
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer
        self.observing = False
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
            self.input_quantizer.initialize(x.float())
        if self.output_scale is not None:
            self.output_scale.fill_(1.0)
            quantized = self(x).float().abs().mean()
            self.output_scale.copy_(self.layer(x).float().abs().mean() / quantized.clamp_min(1e-12))

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
    """

    def __init__(self, layer: nn.Module, output_quantizer: Quantizer) -> None:
        super().__init__(layer)
        self.output_quantizer = output_quantizer
        self.observing = False

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        output: Tensor = self.layer(*args, **kwargs)
        if self.resting is not None:
            return output
        if self.observing:
            self.observing = False
            with torch.no_grad():
                self.output_quantizer.initialize(output.float())
        quantized: Tensor = self.output_quantizer(output)
        return quantized
