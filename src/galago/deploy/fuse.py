"""Small rewrites of an ONNX graph after which engines run as integers what would otherwise stay in float.

Each leaves the same codes. What engines do was measured with ONNX Runtime 1.31 and OpenVINO 2026.4 on x86-64.

- Mean over height and width becomes GlobalAveragePool: only that has an integer kernel.
- An activation that clips (ReLU, ReLU6) in front of a quantizer becomes limits on the codes, since rounding is
  monotone: `Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b))`. In float it stands between a convolution and its quantizer
  and keeps the convolution in float, unless the quantizer's range happens to imply it.
- An encoder with an offset (EWGS, LSQ+) subtracts it in front of the quantizer, with the same effect. Where a
  convolution or linear layer comes just before, the offset goes into its bias, which is rounded to s_x s_c either way.
- Values that come from codes and are quantized again with the same scale are those codes: the second quantizer goes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

LAYERS = ("Conv", "Gemm")
LARGEST = 2**30  # of a bias code; leaves as much again for the accumulator


class Chain(NamedTuple):
    """What stands between a producer and a quantizer: `codes = clip(Q(x - offset), low, high)`."""

    source: ir.Value  # x
    offset: NDArray[np.float32]  # one number, or one per channel
    low: int
    high: int


def fuse(model: ir.Model) -> ir.Model:
    """Applies every rewrite; the model is changed in place and given back."""
    for node in list(model.graph):
        if node.op_type == "ReduceMean":
            pool_globally(model, node)
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            shorten(model, node)
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            reuse(model, node)
    return model


def pool_globally(model: ir.Model, mean: ir.Node) -> None:
    """ReduceMean over the last two of four axes becomes GlobalAveragePool."""
    values = mean.inputs[0]
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if axes is None or values is None or values.shape is None or len(values.shape) != 4:
        return
    if sorted(int(axis) % 4 for axis in axes.reshape(-1)) != [2, 3]:
        return
    keeps = "keepdims" not in mean.attributes or mean.attributes["keepdims"].as_int() == 1
    pool = ir.node("GlobalAveragePool", [values])
    new = [pool] if keeps else [pool, ir.node("Flatten", [pool.outputs[0]], {"axis": 1})]
    substitute(model, mean, new)


def shorten(model: ir.Model, quantize: ir.Node) -> None:
    """Takes clips and offset in front of a quantizer into its limits and into the bias before."""
    codes = limits_of(quantize)
    if codes is None:
        return
    chain, passed = follow(quantize, codes)
    if not passed or (chain.offset.any() and not take_from_bias(model, chain)):
        return
    quantize.replace_input_with(0, chain.source)
    limit(model, quantize, chain.low, chain.high)
    for node in passed:
        model.graph.remove(node, safe=True)


def reuse(model: ir.Model, quantize: ir.Node) -> None:
    """Gives a quantizer's reader the codes that the quantizer's input comes from, where they are the same."""
    decode = None if quantize.inputs[0] is None else quantize.inputs[0].producer()
    codes = decode.inputs[0] if decode is not None and decode.op_type == "DequantizeLinear" else None
    if decode is None or codes is None or len(decode.inputs) < 3 or limits_of(quantize) != (0, 255):
        return
    pairs = [(constant(quantize.inputs[index]), constant(decode.inputs[index])) for index in (1, 2)]
    if all(own is not None and read is not None and np.array_equal(own, read) for own, read in pairs):
        quantize.outputs[0].replace_all_uses_with(codes)
        model.graph.remove(quantize, safe=True)


def limits_of(quantize: ir.Node) -> tuple[int, int] | None:
    """Between which codes a quantizer's result is clipped; None if it is not a plain uint8 one."""
    scale, zero = (constant(quantize.inputs[index]) for index in (1, 2))
    if scale is None or scale.size != 1 or zero is None or zero.dtype != np.uint8 or reads_more(quantize.outputs[0]):
        return None
    reader = next(iter(quantize.outputs[0].consumers()))
    if reader.op_type != "Clip":
        return 0, 255
    low, high = constant(reader.inputs[1]), constant(reader.inputs[2])
    return None if low is None or high is None else (int(low), int(high))


def follow(quantize: ir.Node, codes: tuple[int, int]) -> tuple[Chain, list[ir.Node]]:
    """Walks up from a quantizer over clips and subtractions that nothing else reads; gives those passed, last first."""
    source, passed = quantize.inputs[0], []
    assert source is not None
    chain = Chain(source, np.zeros(1, np.float32), *codes)
    while (node := chain.source.producer()) is not None and not reads_more(chain.source):
        longer = beyond(quantize, node, chain)
        if longer is None:
            break
        chain = longer
        passed.append(node)
    return chain, passed


def beyond(quantize: ir.Node, node: ir.Node, chain: Chain) -> Chain | None:
    """The chain with one more operation in it; None for what is neither a clip nor the subtraction of an offset."""
    before = node.inputs[0] if node.inputs else None
    if before is None:
        return None
    if node.op_type == "Sub":
        taken = constant(node.inputs[1])
        alone = taken is not None and taken.size == max(taken.shape, default=1) and not chain.offset.any()
        return chain._replace(source=before, offset=taken.reshape(-1)) if taken is not None and alone else None
    if node.op_type not in ("Relu", "Clip") or any(value and constant(value) is None for value in node.inputs[1:]):
        return None
    bounds = [constant(value) for value in node.inputs[1:]] + [None, None]
    low = code(quantize, np.float32(0) if node.op_type == "Relu" else bounds[0], chain.offset, 0)
    high = code(quantize, bounds[1], chain.offset, 255)
    if low is None or high is None or max(chain.low, low) > min(chain.high, high):
        return None
    return Chain(before, chain.offset, max(chain.low, low), min(chain.high, high))


def code(quantize: ir.Node, value: NDArray[Any] | np.float32 | None, offset: NDArray[Any], without: int) -> int | None:
    """What a quantizer makes of a limit, less the offset; `without` if there is none, None if channels differ."""
    if value is None:
        return without
    scale, zero = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    assert scale is not None
    assert zero is not None
    steps = np.rint((np.float32(value) - offset.astype(np.float32)) / np.float32(scale.item()))
    codes = np.unique(np.clip(steps + int(zero.item()), 0, 255))
    return int(codes[0]) if codes.size == 1 else None


def limit(model: ir.Model, quantize: ir.Node, low: int, high: int) -> None:
    """Sets between which codes a quantizer's result is clipped."""
    reader = next(iter(quantize.outputs[0].consumers()))
    if reader.op_type == "Clip":
        reader.replace_input_with(1, byte(model, low))
        reader.replace_input_with(2, byte(model, high))
    elif (low, high) != (0, 255):
        clip = ir.node("Clip", [quantize.outputs[0], byte(model, low), byte(model, high)])
        clip.metadata_props.update(quantize.metadata_props)
        model.graph.insert_after(quantize, clip)
        reader.replace_input_with(0, clip.outputs[0])


def take_from_bias(model: ir.Model, chain: Chain) -> bool:
    """Subtracts an offset in the integer bias of the layer that makes the chain's source; False where it cannot."""
    layer = chain.source.producer()
    if layer is None or layer.op_type not in LAYERS or reads_more(chain.source):
        return False
    inputs = [scale_of(value) for value in layer.inputs[:2]]
    if any(scale is None for scale in inputs):
        return False
    scale = np.float32(inputs[0]) * np.asarray(inputs[1], np.float32)
    bias = layer.inputs[2].producer() if len(layer.inputs) > 2 and layer.inputs[2] is not None else None
    if bias is None and len(layer.inputs) > 2 and layer.inputs[2] is not None:
        return False
    old = np.zeros(scale.shape, np.int64) if bias is None else constant(bias.inputs[0])
    if old is None or scale.ndim != 1 or chain.offset.size not in (1, scale.size):
        return False
    new = old - np.rint(chain.offset.astype(np.float64) / scale.astype(np.float64))
    fits = bool(np.abs(new).max() <= LARGEST)
    if fits:
        set_bias(model, layer, new.astype(np.int32), scale)
    return fits


def set_bias(model: ir.Model, layer: ir.Node, codes: NDArray[np.int32], scale: NDArray[np.float32]) -> None:
    """Gives a layer an integer bias of its own."""
    name = layer.outputs[0].name
    values = [stored(model, array, f"{name}.{kind}") for kind, array in (("bias_codes", codes), ("bias_scale", scale))]
    dequantize = ir.node("DequantizeLinear", values, {"axis": 0})
    dequantize.metadata_props.update(layer.metadata_props)
    model.graph.insert_before(layer, dequantize)
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    layer.replace_input_with(2, dequantize.outputs[0])


def scale_of(value: ir.Value | None) -> NDArray[Any] | None:
    """The scale of codes that a DequantizeLinear turns into this value."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    return constant(producer.inputs[1])


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array a value always is; None for one that is computed from the input."""
    found = None if value is None else ir.convenience.get_const_tensor(value)
    return None if found is None else found.numpy()


def reads_more(value: ir.Value) -> bool:
    """Whether a value goes anywhere but into a single operation."""
    return value.is_graph_output() or len(value.uses()) != 1


def byte(model: ir.Model, number: int) -> ir.Value:
    """A uint8 constant of the model, shared by all that use it."""
    name = f"byte_{number}"
    return model.graph.initializers.get(name) or stored(model, np.array(number, np.uint8), name)


def stored(model: ir.Model, array: NDArray[Any], name: str) -> ir.Value:
    """A new constant of the model."""
    value = ir.Value(name=name, const_value=ir.tensor(array), shape=ir.Shape(array.shape))
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model.graph.register_initializer(value)
    return value


def substitute(model: ir.Model, old: ir.Node, new: list[ir.Node]) -> None:
    """Puts operations in the place of one."""
    for node in new:
        node.metadata_props.update(old.metadata_props)
    given = new[-1].outputs[0]
    given.shape, given.type, given.name = old.outputs[0].shape, old.outputs[0].type, old.outputs[0].name
    old.outputs[0].name = None
    model.graph.insert_after(old, new)
    old.outputs[0].replace_all_uses_with(given, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
