"""Looking into a network while it runs: its output, and the codes of every integer stream on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from galago.deploy.integer_layers import IntegerStream
from galago.deploy.operators import dequantize
from galago.layers import removing
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.quantizer import Quantizer

TIE = 1e-3  # steps from halfway between two codes

Codes = dict[str, Tensor]  # by path of the integer stream, in order of execution


def look_into_integer(
    integer: Deployed, image: Tensor, instead: Codes | None = None, halfway: Codes | None = None
) -> tuple[Tensor, Codes]:
    """Output of the integer module and the codes of its streams.

    Args:
        integer: the module.
        image: raw images.
        instead: codes to go on with behind each stream in place of the module's own, which are returned all the same.
        halfway: is filled with which values of each stream lie between two codes, where its encoder rounds.
    """
    codes: Codes = {}

    def keep(path: str) -> Callable[..., Tensor | None]:
        def hook(stream: IntegerStream, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            codes[path] = stream.codes(inputs[0])
            if halfway is not None and (places := stream.places(inputs[0])) is not None:
                halfway[path] = ((places - places.floor()) - 0.5).abs() < TIE
            if instead is None or path not in instead:
                return None
            values: Tensor = dequantize(instead[path], stream.scale, stream.zero_point, None)
            return values

        return hook

    streams = [(path, m) for path, m in integer.network.named_modules() if isinstance(m, IntegerStream)]
    handles = [stream.register_forward_hook(keep(path)) for path, stream in streams]
    with removing(handles):
        output: Tensor = integer(image)
    return output, codes


def look_into_trained(trained: Deployed, image: Tensor) -> tuple[Tensor, Codes]:
    """Output of the trained model, and the codes that its quantizers stand for, counted from 0."""
    codes: Codes = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(quantizer: Quantizer, inputs: tuple[Tensor]) -> None:
            codes[path] = (quantizer.codes(inputs[0]) - quantizer.grid().low).to(torch.uint8)

        return hook

    handles = []
    for path, module in trained.network.named_modules():
        quantizer = module.input_quantizer if isinstance(module, QuantLayer) else None
        quantizer = module.output_quantizer if isinstance(module, QuantOutput) else quantizer
        if quantizer is not None:
            handles.append(quantizer.register_forward_pre_hook(keep(f"{path}.stream" if path else "stream")))
    with removing(handles):
        output: Tensor = trained(image)
    return output, codes
