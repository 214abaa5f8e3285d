"""Writing chosen integers into a quantized layer, which post-training methods (AdaRound, GPTQ, …) have in common.

Such a method decides for every weight which of the integers near it is best. The values that these integers stand for
then take the weight's place: rounded again by the layer's own quantizer they give the same integers, so that the
network is an ordinary quantized one, which trains on, is exported and verified like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import Quantizer


def weight_quantized(model: nn.Module) -> dict[str, QuantLayer]:
    """The layers whose weight is quantized, by path.

    Raises:
        UserError: there is none, so that `Quantize` is missing before the method.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantLayer) and module.weight_quantizer is not None
    }
    if not found:
        raise UserError("no layer has a quantized weight; list this method behind Quantize, with a weight quantizer")
    return found


def same_layers(model: nn.Module, known: Sequence[torch.Size], method: str) -> list[QuantLayer]:
    """The layers whose weight is quantized, which are those that were there in `prepare`.

    Args:
        model: as it is now.
        known: the shapes of their weights then.
        method: that keeps numbers for each layer or weight.

    Raises:
        UserError: a method that came later has added layers, or made one larger.
    """
    layers = weight_quantized(model)
    if len(layers) != len(known):
        raise UserError(
            f"{method} knows {len(known)} of {len(layers)} quantized layers; list it behind what adds layers"
        )
    for (path, layer), shape in zip(layers.items(), known, strict=True):
        if layer.layer.get_parameter("weight").shape != shape:
            raise UserError(
                f"{method} keeps a number for each weight, and {path} has another size now; take it out of this recipe"
                " and into a second one, which begins with the finished run (galago.run.load)"
            )
    return list(layers.values())


def weight_quantizer_of(layer: QuantLayer) -> Quantizer:
    """The quantizer of a weight that is quantized."""
    assert layer.weight_quantizer is not None
    return layer.weight_quantizer


@torch.no_grad()
def write_codes(path: str, layer: QuantLayer, codes: Tensor) -> None:
    """Puts what integer codes stand for in the place of a layer's weight.

    Args:
        path: of the layer, for the message.
        layer: with a quantized weight.
        codes: of the weight's shape, integers of the weight quantizer's grid.

    Raises:
        UserError: the weight's quantizer would make other integers of these values; its range follows the weights, or
            it does not round them to the nearest.
    """
    quantizer, weight = weight_quantizer_of(layer), layer.layer.get_parameter("weight")
    before = weight.detach().clone()
    weight.copy_(quantizer.grid().values(codes.float()))
    if not torch.equal(quantizer.codes(weight), codes.to(torch.float32)):
        weight.copy_(before)
        quantizer.codes(weight)  # a range that follows the weights follows them back
        raise UserError(
            f"{path}: {type(quantizer).__name__} does not keep the integers it is given;"
            " use a weight quantizer with a stored range (CalibratedWeight, LSQWeight)"
        )
