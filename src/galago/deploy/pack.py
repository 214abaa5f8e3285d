"""Weights stored in as many bits as they have, and unpacked by standard operators when a session is made.

A 4-bit weight in an int8 tensor wastes half the file. Here its levels k in 0 … 2^b - 1 lie densely in bytes, first in
the lowest bits (the order of ONNX's own 4- and 2-bit types), and the graph says how they become int8 codes:

    bytes -> BitShift(right, 0, b, 2b, …) -> BitwiseAnd(2^b - 1) -> Cast(int32) -> Reshape -> Mul(step) -> Add(base)
          -> Cast(int8) -> DequantizeLinear

All of it is constant, so ONNX Runtime computes it once, when the session is made, and runs the same kernels at the same
speed as from int8. `step` and `base` (a number, or one per output channel) make grids without a zero (odd codes),
channels whose signs a BatchNorm flipped, and codes widened for a finer bias out of the same levels. 3 bits are stored
as 2 + 1, 5 as 4 + 1, 6 as 4 + 2, 7 as 4 + 2 + 1: the file is proportional to the bits. OpenVINO does not fold this
form (measured: 12 times slower), so its own file is written from plain int8 (`galago.deploy.openvino`).

Design choice: standard operators rather than ONNX's INT2 and INT4 tensors, which engines do not all read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from galago.deploy.integer_layers import IntegerLayer

BITS = "galago.bits"


def pack_bits(levels: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Numbers of 1, 2, 4 or 8 bits, densely in bytes: the first in the lowest bits, zeros at the end.

    >>> [hex(byte) for byte in pack_bits(np.array([1, 2, 15]), 4)]
    ['0x21', '0xf']
    """
    each = 8 // bits
    masked = levels.reshape(-1).astype(np.int64) & (2**bits - 1)
    padded = np.pad(masked, (0, -len(masked) % each)).reshape(-1, each)
    packed: NDArray[np.uint8] = (padded << (np.arange(each) * bits)).sum(1).astype(np.uint8)
    return packed


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` numbers of what `pack_bits` made, unsigned.

    >>> unpack_bits(np.array([0x21, 0x0F], np.uint8), 4, 3).tolist()
    [1, 2, 15]
    """
    shifts = (np.arange(8 // bits) * bits).astype(np.uint8)
    return ((packed[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1)[:count]


def parts(bits: int) -> list[tuple[int, int]]:
    """Powers of two that make up a width, largest first, each with its place: 3 -> (2, at 0), (1, at 2)."""
    found, place = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, place))
            place += width
    return found


def pack(model: onnx.ModelProto, layers: Mapping[str, IntegerLayer]) -> onnx.ModelProto:
    """A copy of a model whose weights below 8 bits are packed.

    Args:
        model: with weights as int8 initializers called `<path>.codes`.
        layers: the integer layers by path, which know how their codes came about.
    """
    packed = onnx.ModelProto()
    packed.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in packed.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for path, layer in layers.items():
        name = f"{path}.codes" if path else "codes"
        if layer.bits < 8 and name in weights:
            packer = Packer(name, layer)
            nodes += packer.nodes
            packed.graph.initializer.remove(weights[name])
            store(packed.graph, packer.constants)
    kept = list(packed.graph.node)
    del packed.graph.node[:]
    packed.graph.node.extend([*nodes, *kept])
    return packed


class Packer:
    """One weight, packed.

    Args:
        name: what the int8 codes are called.
        layer: whose weight it is.

    Attributes:
        constants: new initializers by name; those that several weights may share have common names.
        nodes: what computes the codes from them, in order.
    """

    def __init__(self, name: str, layer: IntegerLayer) -> None:
        self.name, self.constants = name, dict[str, NDArray[np.generic]]()
        self.nodes: list[onnx.NodeProto] = []
        levels = levels_of(layer)
        flat = self.sum_of_parts(levels, layer.bits)
        shaped = self.add("Reshape", flat, self.constant(f"shape_{'x'.join(map(str, levels.shape))}", levels.shape))
        scaled = self.add("Mul", shaped, self.per_channel("step", layer.step.numpy(), levels.ndim, layer.axis))
        moved = self.add("Add", scaled, self.per_channel("base", layer.base.numpy(), levels.ndim, layer.axis))
        self.nodes.append(helper.make_node("Cast", [moved], [name], f"{name}/Unpacked", to=onnx.TensorProto.INT8))
        for node in self.nodes:
            node.metadata_props.add(key=BITS, value=str(layer.bits))

    def sum_of_parts(self, levels: NDArray[np.integer], bits: int) -> str:
        """Unpacks each part of a width and puts them together, flat, int32."""
        total = ""
        for width, place in parts(bits):
            part = self.unpacked(levels >> place, width)
            if place:
                part = self.add("Mul", part, self.constant(f"int_{2**place}", np.int32(2**place)))
            total = self.add("Add", total, part) if total else part
        return total

    def unpacked(self, levels: NDArray[np.integer], width: int) -> str:
        """One part: stored in bytes, taken apart by shifts."""
        stored = self.constant(f"{self.name}.{width}bit", pack_bits(levels, width)[:, None])
        shifts = self.constant(f"shifts_{width}", np.arange(0, 8, width, dtype=np.uint8))
        mask = self.constant(f"mask_{width}", np.uint8(2**width - 1))
        found = self.add("BitwiseAnd", self.add("BitShift", stored, shifts, direction="RIGHT"), mask)
        flat = self.add("Reshape", self.add("Cast", found, to=onnx.TensorProto.INT32), self.constant("flat", [-1]))
        if levels.size % (8 // width) == 0:
            return flat
        return self.add(
            "Slice", flat, self.constant("start", [0]), self.constant(f"count_{levels.size}", [levels.size])
        )

    def per_channel(self, kind: str, values: NDArray[np.int32], dimensions: int, axis: int) -> str:
        """A number for all channels where one is enough, or one for each."""
        if (values == values[0]).all():
            return self.constant(f"int_{values[0]}", np.int32(values[0]))
        shape = [-1 if dimension == axis else 1 for dimension in range(dimensions)]
        return self.constant(f"{self.name}.{kind}", values.reshape(shape))

    def constant(self, name: str, value: object) -> str:
        """Makes a constant and gives its name; numbers without a type are int64, as shapes are."""
        self.constants[name] = np.asarray(value)
        return name

    def add(self, operation: str, *inputs: str, **attributes: Any) -> str:
        """Adds an operation and gives the name of its output."""
        output = f"{self.name}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, inputs, [output], output, **attributes))
        return output


def levels_of(layer: IntegerLayer) -> NDArray[np.integer]:
    """k in 0 … 2^bits - 1 with `codes = step * k + base`; 0 where a dead channel has no step."""
    codes = layer.codes.numpy().astype(np.int64)
    shape = [-1 if dimension == layer.axis else 1 for dimension in range(codes.ndim)]
    step, base = (values.numpy().astype(np.int64).reshape(shape) for values in (layer.step, layer.base))
    levels: NDArray[np.integer] = (codes - base) // np.where(step == 0, 1, step) * (step != 0)
    return levels


def store(graph: onnx.GraphProto, constants: Mapping[str, NDArray[np.generic]]) -> None:
    """Adds constants to a graph, those of a common name once."""
    there = {tensor.name for tensor in graph.initializer}
    for name, array in constants.items():
        if name not in there:
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
