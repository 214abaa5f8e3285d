"""From a deployed network to OpenVINO's own two files, `*.xml` (the graph) and `*.bin` (the weights).

Written from the ONNX model with weights as plain int8: OpenVINO computes convolutions and linear layers on it with
integers, whether the streams between them are integer or float, but would unpack packed weights anew at every
inference. Weights of 8 bits and less take a byte each in the file; what is float stays float32.

Measured with OpenVINO 2026.4: where a convolution's quantized result is added to another and quantized again, the
engine computes all in one kernel and *leaves out the first rounding* (31 % of the sums came out one step off). A
pooling over one pixel behind the first quantizer, which changes nothing, keeps it from that; ResNet-18 took 6 % longer
at most. A convolution of one pixel that leaves out every other one (ResNet's shortcuts) is split by the engine into a
pooling in float, in front of the quantizer, and a float convolution; a pooling of the codes does the same in integers.
A quantizer that reads codes whose scale is almost its own, within a 255th, is left out, also in the branches of a
concatenation before it (3 % of the next layer's codes came out one step off); an average over one pixel prevents that.
Where a convolution makes tokens (patches in ConvNeXt, DeiT, PiT) its bias was moved into the quantizer behind it, and
every channel got that of the first one (75 % of DeiT's codes wrong); that depended on what else was in the graph. A
pooling over one pixel between the two keeps the bias where it is.
Random sources without a seed are taken for one and the same, and a normal one draws both of its uniform numbers from
one, so that noise came out 1.06 as large as asked, with a mean of 0.06, the same in every layer. With a seed each is
its own; the sequence of draws then begins anew whenever the file is loaded.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import openvino
from torch import Tensor

from galago.deploy.onnx import build
from galago.deploy.reading import first_line
from galago.errors import UserError
from galago.probe import Deployed

# What a convolution's kernel may take in, between its result and the codes.
PASSED = ("QuantizeLinear", "Clip", "Relu", "HardSwish", "HardSigmoid", "Sigmoid", "LeakyRelu", "Elu", "PRelu")
# What codes come through with the scale that they have.
MOVES = (
    "Concat",
    "MaxPool",
    "Relu",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Identity",
)
ALMOST = 0.005  # relative difference of two scales; the engine takes anything below 1 / 255 for none


def export(deployed: Deployed, example: Tensor, path: Path, float_image: bool = False) -> list[Path]:
    """Writes the OpenVINO files.

    Args:
        deployed: trained, with or without quantized layers.
        example: one raw image, 1×C×H×W, uint8.
        path: of the graph, `*.xml`; the weights go beside it, `*.bin`.
        float_image: take images as float in 0 … 1 instead of uint8.

    Returns:
        Both files.

    Raises:
        UserError: the network cannot be exported; the layer is named.
    """
    return write(build(deployed, example, float_image), path)


def write(model: onnx.ModelProto, path: Path) -> list[Path]:
    """Writes the OpenVINO files of a model with plain int8 weights, as `galago.deploy.onnx.build` makes it."""
    model = own_seeds(thin_codes(keep_scales(keep_roundings(keep_biases(model)))))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory() as folder:
            onnx.save(model, Path(folder) / "model.onnx")
            converted = openvino.Core().read_model(Path(folder) / "model.onnx")
            for entry in model.metadata_props:
                converted.set_rt_info(entry.value, entry.key.split("."))
            openvino.save_model(converted, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise UserError(f"{path}: OpenVINO cannot take this network: {first_line(error)}") from error
    return [path, path.with_suffix(".bin")]


def rewritten(model: onnx.ModelProto, before: Callable[[onnx.NodeProto], list[onnx.NodeProto]]) -> onnx.ModelProto:
    """A copy in which each node comes behind the new ones that `before` gives for it; it may change the node itself."""
    model = copy.deepcopy(model)
    changed: list[onnx.NodeProto] = []
    for node in model.graph.node:
        changed += [*before(node), node]
    del model.graph.node[:]
    model.graph.node.extend(changed)
    return model


def own_seeds(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every random source has a seed of its own."""
    seeds = itertools.count(1.0)

    def seed(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.op_type.startswith("Random"):
            node.attribute.append(onnx.helper.make_attribute("seed", next(seeds)))
        return []

    return rewritten(model, seed)


def makers_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that makes each value."""
    return {output: node for node in model.graph.node for output in node.output}


def one_pixel_pooling(node: onnx.NodeProto, kind: str, dimensions: int) -> onnx.NodeProto:
    """A pooling over one pixel, which changes nothing, in front of a node's first input."""
    given, pooled = node.input[0], f"{node.name}/kept"
    node.input[0] = pooled
    return onnx.helper.make_node(kind, [given], [pooled], pooled, kernel_shape=[1] * dimensions)


def keep_roundings(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a pooling over one pixel behind the quantizer of each convolution whose result is a summand."""
    makers = makers_of(model)
    added = {name for node in model.graph.node if node.op_type == "Add" for name in node.input}

    def before(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        convolution = quantized_convolution(node, makers) if added.intersection(node.output) else None
        if convolution is None:
            return []
        kernel = next(attribute.ints for attribute in convolution.attribute if attribute.name == "kernel_shape")
        return [one_pixel_pooling(node, "MaxPool", len(kernel))]

    return rewritten(model, before)


def keep_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a pooling over one pixel between a convolution that makes tokens and the quantizer behind it."""
    makers = makers_of(model)
    stored = {array.name for array in model.graph.initializer}
    turned = {  # also by a position embedding
        name
        for node in model.graph.node
        if node.op_type in ("Reshape", "Transpose") or (node.op_type == "Add" and stored.intersection(node.input))
        for name in node.input
    }
    codes = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and turned.intersection(n.output)}

    def before(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        source = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if source is None or source.op_type != "Conv" or len(source.input) < 3:
            return []
        found = {attribute.name: list(attribute.ints) for attribute in source.attribute}
        patches = max(found["kernel_shape"]) > 1 and found["kernel_shape"] == found.get("strides")
        tokens = patches or codes.intersection(node.output)
        return [one_pixel_pooling(node, "MaxPool", len(found["kernel_shape"]))] if tokens else []

    return rewritten(model, before)


def keep_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a pooling over one pixel in front of quantizers whose scale almost is that of what they read."""
    makers = makers_of(model)
    scales = {
        array.name: float(onnx.numpy_helper.to_array(array)) for array in model.graph.initializer if not array.dims
    }
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}

    def read(name: str) -> Iterator[float]:
        """The scales of the codes that a value comes from."""
        node = makers.get(name)
        if node is not None and node.op_type == "DequantizeLinear" and node.input[1] in scales:
            yield scales[node.input[1]]
        elif node is not None and node.op_type in MOVES:
            for given in node.input:
                yield from read(given)

    def before(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.op_type != "QuantizeLinear" or (rank := ranks.get(node.input[0], 0)) < 3:
            return []
        own = scales.get(node.input[1])
        close = own is not None and any(0 < abs(scale / own - 1) < ALMOST for scale in read(node.input[0]))
        return [one_pixel_pooling(node, "AveragePool", rank - 2)] if close else []

    return rewritten(model, before)


def thin_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in which convolutions of one pixel with a stride read codes that a pooling has thinned out."""
    makers = makers_of(model)

    def before(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        source = makers.get(node.input[0]) if node.op_type == "Conv" else None
        strides = list(attributes["strides"].ints) if "strides" in attributes else [1]
        if source is None or source.op_type != "DequantizeLinear" or max(strides) == 1 or not is_one_pixel(node):
            return []
        thinned, values = f"{node.name}/thinned", f"{node.name}/values"
        one = [1] * len(strides)
        pool = onnx.helper.make_node(
            "MaxPool", [source.input[0]], [thinned], thinned, kernel_shape=one, strides=strides
        )
        decoded = onnx.NodeProto()
        decoded.CopyFrom(source)
        decoded.name, decoded.input[0], decoded.output[0] = values, thinned, values
        node.input[0] = values
        attributes["strides"].ints[:] = one
        return [pool, decoded]

    return rewritten(model, before)


def is_one_pixel(convolution: onnx.NodeProto) -> bool:
    """Whether a convolution looks at one pixel at a time, and at none around the image."""
    found = {attribute.name: list(attribute.ints) for attribute in convolution.attribute}
    return set(found.get("kernel_shape", [0])) == {1} and set(found.get("pads", [0])) == {0}


def quantized_convolution(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The convolution whose result, after an activation or none, a DequantizeLinear gives back quantized."""
    if node.op_type != "DequantizeLinear":
        return None
    maker, quantizes = makers.get(node.input[0]), False
    while maker is not None and maker.op_type in PASSED:
        quantizes |= maker.op_type == "QuantizeLinear"
        maker = makers.get(maker.input[0])
    return maker if quantizes and maker is not None and maker.op_type == "Conv" else None
