"""Weights stored in as many bits as they have, and unpacked by standard operators when a session is made.

A 4-bit weight in an int8 tensor wastes half the file. Here its levels k in 0 … 2^b - 1 lie densely in bytes, first in
the lowest bits (the order of ONNX's own 4- and 2-bit types), and a function in the file says how they become codes:

    bytes -> BitShift(right, 0, b, 2b, …) -> BitwiseAnd(2^b - 1) -> Reshape -> Slice -> Mul(step) -> Add(base) -> int8

It is written down once for each width, in standard operators. All of its inputs are constant, so ONNX Runtime computes
it once, when the session is made, and runs the same kernels at the same speed as from int8. `step` and `base` (a
number, or one per output channel) make grids without a zero (odd codes) and codes widened for a finer bias out of the
same levels; where a BatchNorm flipped a channel's signs, its levels count from the other end. 3 bits are stored as
2 + 1, 5 as 4 + 1, 6 as 4 + 2, 7 as 4 + 2 + 1: the file is proportional to the bits. OpenVINO does not fold this form
(measured: 12 times slower) and reads it only with the functions written out (`onnx.inliner`), so its own file is made
from plain int8 (`galago.deploy.openvino`).

Design choice: standard operators rather than ONNX's INT2 and INT4 tensors, which engines do not all read.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from galago.deploy.integer_layers import IntegerLayer

DOMAIN = "galago"  # of the functions in the file
OPSET = 21


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
    functions: dict[int, onnx.FunctionProto] = {}
    for path, layer in layers.items():
        name = f"{path}.codes" if path else "codes"
        if layer.bits < 8 and name in weights:
            constants = stored(name, layer)
            unpack = called(layer.bits)
            nodes.append(helper.make_node(unpack, [*constants], [name], f"{path}/{unpack}", domain=DOMAIN))
            functions[layer.bits] = unpacker(layer.bits)
            packed.graph.initializer.remove(weights[name])
            store(packed.graph, constants)
    kept = list(packed.graph.node)
    del packed.graph.node[:]
    packed.graph.node.extend([*nodes, *kept])
    packed.functions.extend(functions.values())
    if functions:
        packed.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return packed


def stored(name: str, layer: IntegerLayer) -> dict[str, NDArray[np.generic]]:
    """What a weight is kept as, by name, in the order that its function takes: bytes of each part, shape, step, base.

    Constants that several weights may share have common names.
    """
    levels, step, base = levels_of(layer)
    constants: dict[str, NDArray[np.generic]] = {
        f"{name}.{width}bit": pack_bits(levels >> place, width)[:, None] for width, place in parts(layer.bits)
    }
    constants["x".join(map(str, levels.shape))] = np.array(levels.shape)
    for kind, values in (("step", step), ("base", base)):
        same = (values == values.flat[0]).all()
        narrow = np.int8 if abs(values).max() < 128 else np.int16
        constants[f"{kind}_{values.flat[0]}" if same else f"{name}.{kind}"] = np.asarray(
            values.flat[0] if same else values, narrow
        )
    return constants


def called(bits: int) -> str:
    """The name of a width's function."""
    return f"Unpack{bits}"


def unpacker(bits: int) -> onnx.FunctionProto:
    """From bytes, shape, step and base to int8 codes, as a function in standard operators.

    >>> unpacker(3).name, list(unpacker(3).input)
    ('Unpack3', ['bytes2', 'bytes1', 'shape', 'step', 'base'])
    """
    total, lines = "", []
    for width, place in parts(bits):
        shifts = ", ".join(map(str, range(0, 8, width)))
        lines += [
            f"shifts{width} = Constant <value = uint8[{8 // width}] {{{shifts}}}> ()",
            f"mask{width} = Constant <value = uint8 {{{2**width - 1}}}> ()",
            f'shifted{width} = BitShift <direction = "RIGHT"> (bytes{width}, shifts{width})',
            f"kept{width} = BitwiseAnd (shifted{width}, mask{width})",
            f"part{width} = Cast <to = {onnx.TensorProto.INT32}> (kept{width})",
            f"worth{width} = Constant <value = int32 {{{2**place}}}> ()",
            f"placed{width} = Mul (part{width}, worth{width})",
            f"flat{width} = Reshape (placed{width}, flat)",  # cut to one length each: what fills up a byte differs
            f"cut{width} = Slice (flat{width}, start, count)",
        ]
        if total:
            lines.append(f"sum{width} = Add ({total}, cut{width})")
        total = f"sum{width}" if total else f"cut{width}"
    inputs = ", ".join([*(f"bytes{width}" for width, _ in parts(bits)), "shape", "step", "base"])
    body = "\n".join(
        [
            "flat = Constant <value = int64[1] {-1}> ()",
            "start = Constant <value = int64[1] {0}> ()",
            "count = ReduceProd <keepdims = 1> (shape)",
            *lines,
            f"levels = Reshape ({total}, shape)",
            f"wide_step = Cast <to = {onnx.TensorProto.INT32}> (step)",
            f"wide_base = Cast <to = {onnx.TensorProto.INT32}> (base)",
            "scaled = Mul (levels, wide_step)",
            "moved = Add (scaled, wide_base)",
            f"codes = Cast <to = {onnx.TensorProto.INT8}> (moved)",
        ]
    )
    head = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n{called(bits)} ({inputs}) => (codes)'
    return onnx.parser.parse_function(f"{head} {{\n{body}\n}}")


def levels_of(layer: IntegerLayer) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.integer]]:
    """k in 0 … 2^bits - 1, step and base with `codes = step * k + base`; the latter two broadcast, and no step is
    negative. k is 0 where a dead channel has no step.
    """
    codes = layer.codes.numpy().astype(np.int64)
    shape = [-1 if dimension == layer.axis else 1 for dimension in range(codes.ndim)]
    step, base = (values.numpy().astype(np.int64).reshape(shape) for values in (layer.step, layer.base))
    base = np.where(step < 0, base + step * (2**layer.bits - 1), base)
    step = abs(step)
    return (codes - base) // np.where(step == 0, 1, step) * (step != 0), step, base


def store(graph: onnx.GraphProto, constants: Mapping[str, NDArray[np.generic]]) -> None:
    """Adds constants to a graph, those of a common name once."""
    there = {tensor.name for tensor in graph.initializer}
    for name, array in constants.items():
        if name not in there:
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
