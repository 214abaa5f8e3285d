"""Cost: parameters, multiply-accumulates, bit operations and stored bytes, exact to the integer.

Bit operations: Baskin et al., "UNIQ: Uniform Noise Injection for Non-Uniform Quantization of Neural Networks",
ACM TOCS 2021, arXiv 1804.10969 (here in the simpler form that most later papers use).

One image goes through the network once, and every convolution and matrix product that really ran is counted from the
shapes of its tensors: layers, functional calls and attention alike, a layer that runs twice twice.

    convolution  H_out · W_out · C_out · C_in/groups · k_h · k_w      transposed  H_in · W_in · C_in · C_out/groups · k²
    linear       rows · in · out                                     matrix product  batch · n · k · m
    BOPs = Σ MACs · b_w · b_a,   b = 32 on a side that is float;  b_a belongs to the layer's input
    bytes = Σ rows · ceil(elements a row · b_w / 8) + 4 a scale + 4 a parameter that stayed float

When to use it: to compare networks before any engine is involved. Costs do not tell speed: a depthwise convolution has
few multiply-accumulates and is slow for them, and few engines compute below 8 bits.

Chosen: one multiply-accumulate is one multiplication and its addition (what most papers of this field call a FLOP);
biases, BatchNorm, activations and pooling count nothing. Ranges that quantizers learn are no parameters of the network
(their stored scales appear in the bytes). A file made from the network knows nothing of layers and gives no numbers:
measure the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.layers import Call, Flow, Wrapper, flow
from galago.probe import Deployed, Probe, device_of, evaluating
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import Quantizer
from galago.task import Task

FLOAT = 32
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class LayerCost(NamedTuple):
    """What one layer costs for one image. Bits of None mean float."""

    path: str  # of the layer, or of its QuantLayer
    type: str  # class of the layer that multiplies
    shape: list[int]  # of its weight; empty where two activations are multiplied
    parameters: int
    macs: int
    weight_bits: int | None
    input_bits: int | None
    weight_bytes: int  # packed codes and their scales, and the bias

    @property
    def bops(self) -> int:
        """Multiply-accumulates times bits of both sides."""
        return self.macs * (self.weight_bits or FLOAT) * (self.input_bits or FLOAT)


def packed_bytes(rows: int, elements: int, bits: int) -> int:
    """Bytes of `rows` rows of so many codes each, every row filled up to a whole byte.

    >>> packed_bytes(16, 27, 4)
    224
    """
    return rows * ((elements * bits + 7) // 8)


def cost_table(network: nn.Module, example: Tensor) -> list[LayerCost]:
    """The cost of each layer that multiplies, in order of execution.

    Args:
        network: from normalized input to raw output; left as it was.
        example: normalized input, N×C×H×W; only the first image is used.
    """
    with evaluating(network), _written_out():
        seen = flow(network, example[:1])
    modules = dict(network.named_modules())
    macs: dict[str, int] = {}
    for call in seen.calls:
        if (count := _macs(call, seen, modules[call.module])) and not _inside_quantizer(call.module, modules):
            macs[call.module] = macs.get(call.module, 0) + count
    return [_layer_cost(path, count, modules) for path, count in macs.items()]


@contextmanager
def _written_out() -> Iterator[None]:
    """Attention layers run as the matrix products they are, not as one fused operation that hides them."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _macs(call: Call, seen: Flow, module: nn.Module) -> int:
    """Multiply-accumulates of one tensor operation; 0 for one that multiplies no matrices."""
    tensors = [seen.values[number] for number in call.inputs]
    output = seen.values[call.outputs[0]] if call.outputs else None
    match call.operation:
        case "convolution" | "_convolution" if output is not None:
            image, kernel = tensors[0], tensors[1]
            return (image if isinstance(module, _TRANSPOSED) else output).numel() * kernel[0].numel()
        case "mm" | "addmm" | "bmm" | "baddbmm" if output is not None:
            return output.numel() * tensors[-2].shape[-1]
        case "linear" if output is not None:
            return output.numel() * tensors[1].shape[-1]
        case name if name.startswith("_scaled_dot_product"):
            query, key, value = tensors[:3]
            return query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return 0


def _inside_quantizer(path: str, modules: dict[str, nn.Module]) -> bool:
    return any(isinstance(modules[above], Quantizer) for above in _above(path))


def _above(path: str) -> Iterator[str]:
    """The path itself and everything that contains it, innermost first, without the whole network."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _layer_cost(path: str, macs: int, modules: dict[str, nn.Module]) -> LayerCost:
    layer, home, quant = modules[path], path, None
    while isinstance(wrapper := modules.get(home.rpartition(".")[0]), Wrapper) and home.endswith(".layer"):
        home = home.rpartition(".")[0]
        if isinstance(wrapper, QuantLayer):
            quant = wrapper
            break
    weight_quantizer, input_quantizer = (quant.weight_quantizer, quant.input_quantizer) if quant else (None, None)
    weight = getattr(layer, "weight", None)
    return LayerCost(
        path=path if quant is None else home,
        type=type(layer).__name__,
        shape=list(weight.shape) if isinstance(weight, Tensor) else [],
        parameters=sum(parameter.numel() for parameter in layer.parameters(recurse=False)),
        macs=macs,
        weight_bits=None if weight_quantizer is None else weight_quantizer.bits,
        input_bits=None if input_quantizer is None else input_quantizer.bits,
        weight_bytes=_stored(layer, weight_quantizer),
    )


def _stored(layer: nn.Module, quantizer: Quantizer | None) -> int:
    parameters = dict(layer.named_parameters(recurse=False))
    weight = parameters.pop("weight", None) if quantizer is not None else None
    rest = 4 * sum(parameter.numel() for parameter in parameters.values())
    if weight is None or quantizer is None:
        return rest
    rows = weight.shape[1 if isinstance(layer, _TRANSPOSED) else 0]
    return rest + packed_bytes(rows, weight.numel() // rows, quantizer.bits) + 4 * quantizer.grid().scale.numel()


def parameters_of(network: nn.Module) -> list[nn.Parameter]:
    """Every parameter once, without what quantizers learn."""
    learned = {
        id(parameter)
        for module in network.modules()
        for parameter in (module.parameters() if isinstance(module, Quantizer) else _output_scale(module))
    }
    return [parameter for parameter in network.parameters() if id(parameter) not in learned]


def _output_scale(module: Any) -> list[nn.Parameter]:
    scaled = isinstance(module, QuantLayer) and module.output_scale is not None
    return [module.output_scale] if scaled else []


class Cost(Probe):
    """`parameters`; `macs` and `bops` of one image; `mean_weight_bits` and `weight_bytes` as stored. Not of a file."""

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        if not isinstance(deployed, Deployed):
            return {}
        network = deployed.network
        table = cost_table(network, deployed.normalize(data.example().to(device_of(deployed))))
        own = {row.path: list(_multiplying(network, row.path).parameters(recurse=False)) for row in table}
        tabled = {id(parameter) for parameters in own.values() for parameter in parameters}
        everything = parameters_of(network)
        rest = sum(parameter.numel() for parameter in everything if id(parameter) not in tabled)
        weights = {row.path: sum(p.numel() for p in own[row.path] if p.ndim > 1) for row in table}
        bits = sum(weights[row.path] * (row.weight_bits or FLOAT) for row in table)
        return {
            "parameters": float(sum(parameter.numel() for parameter in everything)),
            "macs": float(sum(row.macs for row in table)),
            "bops": float(sum(row.bops for row in table)),
            "mean_weight_bits": bits / max(1, sum(weights.values())),
            "weight_bytes": float(sum(row.weight_bytes for row in table) + 4 * rest),
        }


def _multiplying(network: nn.Module, path: str) -> nn.Module:
    layer = network.get_submodule(path)
    while isinstance(layer, Wrapper):
        layer = layer.layer
    return layer
