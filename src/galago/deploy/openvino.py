"""From a deployed network to OpenVINO's own two files, `*.xml` (the graph) and `*.bin` (the weights).

Written from the ONNX model with weights as plain int8: OpenVINO computes convolutions and linear layers on it with
integers, whether the streams between them are integer or float, but would unpack packed weights anew at every
inference. Weights of 8 bits and less take a byte each in the file; what is float stays float32.

Measured with OpenVINO 2026.4: where a convolution's quantized result is added to another and quantized again, the
engine computes all in one kernel and *leaves out the first rounding* (31 % of the sums came out one step off). A
pooling over one pixel behind the first quantizer, which changes nothing, keeps it from that; ResNet-18 took 6 % longer
at most. A convolution of one pixel that leaves out every other one (ResNet's shortcuts) is split by the engine into a
pooling in float, in front of the quantizer, and a float convolution; a pooling of the codes does the same in integers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
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
    model = thin_codes(keep_roundings(model))
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


def keep_roundings(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a pooling over one pixel behind the quantizer of each convolution whose result is a summand."""
    model = copy.deepcopy(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    changed: list[onnx.NodeProto] = []
    added = {name for node in model.graph.node if node.op_type == "Add" for name in node.input}
    for node in model.graph.node:
        convolution = quantized_convolution(node, makers) if added.intersection(node.output) else None
        if convolution is not None:
            codes, pooled = node.input[0], f"{node.input[0]}/kept"
            pixel = [1] * len(next(a.ints for a in convolution.attribute if a.name == "kernel_shape"))
            changed.append(onnx.helper.make_node("MaxPool", [codes], [pooled], pooled, kernel_shape=pixel))
            node.input[0] = pooled
        changed.append(node)
    del model.graph.node[:]
    model.graph.node.extend(changed)
    return model


def thin_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in which convolutions of one pixel with a stride read codes that a pooling has thinned out."""
    model = copy.deepcopy(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    changed: list[onnx.NodeProto] = []
    for node in model.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        source = makers.get(node.input[0]) if node.op_type == "Conv" else None
        strides = list(attributes["strides"].ints) if "strides" in attributes else [1]
        if source is not None and source.op_type == "DequantizeLinear" and max(strides) > 1 and is_one_pixel(node):
            thinned, values = f"{node.name}/thinned", f"{node.name}/values"
            one = [1] * len(strides)
            pool = onnx.helper.make_node(
                "MaxPool", [source.input[0]], [thinned], thinned, kernel_shape=one, strides=strides
            )
            decoded = onnx.NodeProto()
            decoded.CopyFrom(source)
            decoded.name, decoded.input[0], decoded.output[0] = values, thinned, values
            changed += [pool, decoded]
            node.input[0] = values
            attributes["strides"].ints[:] = one
        changed.append(node)
    del model.graph.node[:]
    model.graph.node.extend(changed)
    return model


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
