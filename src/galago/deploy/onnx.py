"""From a deployed network to one ONNX file: raw image in, raw output and what a user sees out.

Input `image` is N×C×H×W, uint8 as a camera or file gives it (or float in 0 … 1), with any batch size N; normalization,
network and `decode` are inside; outputs are `output` (raw, what trust probes read) and `decoded`. Integer parts become
what engines recognize and run as integers:

    QuantizeLinear (uint8, saturating) -> Clip (uint8, below 8 bits) -> DequantizeLinear      activations
    int8 codes -> DequantizeLinear (axis of output channels)                                  weights
    int32 codes -> DequantizeLinear (scale s_x s_c)                                           biases

Background: ONNX operator specification, QuantizeLinear and DequantizeLinear, opset 21. Every node knows its layer:
it is called `<module path>/<operator>`; the codes that a layer's stream gives are the value `<module path>/codes`.
Nothing of the machine that wrote the file (source paths, stack traces) goes into it. A network without quantizers
exports as well: that is the float file to compare with.

>>> from galago.data import Normalize
>>> from galago.tasks.classify import Classify
>>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
>>> model = build(Deployed(network, Normalize([0.5] * 3, [0.2] * 3), Classify(3)), torch.zeros(1, 3, 2, 2))
>>> [output.name for output in model.graph.output]
['output', 'decoded']
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21 as op
from torch import Tensor, nn

from galago.deploy import operators  # noqa: F401 - registers the operators
from galago.deploy.compact import compact
from galago.deploy.fuse import fuse
from galago.deploy.integer import lower
from galago.deploy.integer_layers import IntegerLayer, IntegerStream
from galago.deploy.label import label
from galago.deploy.look import look_into_integer
from galago.deploy.pack import pack
from galago.deploy.reading import DECODED, IMAGE, OUTPUT, first_line
from galago.errors import UserError
from galago.layers import removing
from galago.probe import Deployed

OPSET = 21


class Artifact(nn.Module):
    """What the file computes: both outputs of a deployed network.

    Args:
        deployed: from raw images to raw output, and from there to what a user sees.
    """

    def __init__(self, deployed: Deployed) -> None:
        super().__init__()
        self.deployed = deployed

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        output = self.deployed(image)
        raw: Tensor = output["main"] if isinstance(output, dict) else output
        decoded: Tensor = self.deployed.decode(output)
        return raw, decoded


def export(
    deployed: Deployed,
    example: Tensor,
    path: Path,
    float_image: bool = False,
    packed: bool = True,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Writes the ONNX file.

    Args:
        deployed: trained, with or without quantized layers; those become integer (`galago.deploy.integer.lower`).
        example: one raw image, 1×C×H×W, uint8.
        path: of the file, `*.onnx`.
        float_image: take images as float in 0 … 1 instead of uint8.
        packed: store weights below 8 bits in as many bits as they have (`galago.deploy.pack`).
        about: further facts to store as the model's metadata, such as class names.

    Raises:
        UserError: the network cannot be exported; the layer is named.
    """
    deployed = lowered(deployed, example)
    return write(build(deployed, example, float_image), deployed, path, packed, about)


def write(
    model: onnx.ModelProto,
    deployed: Deployed,
    path: Path,
    packed: bool = True,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Writes the ONNX file of a model that `build` made of a lowered network; changes the model. Arguments as above."""
    if packed:
        model = compact(pack(model, integer_layers(deployed)))
    for key, value in (about or {}).items():
        model.metadata_props.add(key=key, value=value)
    path.parent.mkdir(parents=True, exist_ok=True)
    del model.graph.value_info[:]  # shapes between the layers, which every engine works out for itself
    onnx.save(model, path)
    return path


def build(deployed: Deployed, example: Tensor, float_image: bool = False) -> onnx.ModelProto:
    """The model with weights as plain int8, in memory: the form OpenVINO reads. Arguments as of `export`."""
    deployed = lowered(deployed, example)
    image = example[:1].expand(2, *example.shape[1:]).contiguous()  # of 1 image, export would make a constant
    image = image.float() / 255 if float_image and not image.is_floating_point() else image
    program = traced(Artifact(deployed).cpu().eval(), image)
    model = fuse(converted(program).model)
    streams = [path for path, part in deployed.network.named_modules() if isinstance(part, IntegerStream)]
    label(model, streams, lambda: twins(deployed, image))
    model.producer_name, model.producer_version, model.graph.name = "galago", None, "galago"
    return ir.to_proto(model)


def lowered(deployed: Deployed, example: Tensor) -> Deployed:
    """The same with an integer network; what is integer or float already stays as it is."""
    normalize = copy.deepcopy(deployed.normalize).cpu()
    network = lower(deployed.network, normalize(example[:1].cpu()))
    return Deployed(network, normalize, copy.deepcopy(deployed.task).cpu()).eval()


def traced(artifact: Artifact, image: Tensor) -> torch.export.ExportedProgram:
    """The network as a graph; what cannot be one is reported with the layer it happened in."""
    batch = torch.export.Dim("batch")
    with running(artifact) as path:
        try:
            return torch.export.export(artifact, (image,), dynamic_shapes=({0: batch},), strict=False)
        except Exception as error:
            where = path[-1].removeprefix("deployed.network").lstrip(".") or "the network's own forward"
            reason = first_line(error)
            raise UserError(
                f"{where}: cannot be exported: {reason}; make its forward independent of tensor values and batch size"
            ) from error


def converted(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    """The graph in ONNX operators."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.galago.quantize.default: quantize_linear,
        torch.ops.galago.dequantize.default: dequantize_linear,
    }
    with warnings.catch_warnings(), quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        try:
            found = torch.onnx.export(
                program,
                input_names=[IMAGE],
                output_names=[OUTPUT, DECODED],
                custom_translation_table=table,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            root = error.__cause__ or error
            raise UserError(f"an operation has no form in ONNX opset {OPSET}: {first_line(root)}") from error
    assert found is not None
    return found


def quantize_linear(x: Any, scale: Any, offset: Any, zero_point: Any, low: int, high: int) -> Any:
    """`galago::quantize` in ONNX; the limits below 8 bits are applied to the codes, so that engines still fuse."""
    codes = op.QuantizeLinear(x if offset is None else op.Sub(x, offset), scale, zero_point)
    if (low, high) == (0, 255):
        return codes
    return op.Clip(codes, byte(low), byte(high))


def dequantize_linear(codes: Any, scale: Any, zero_point: Any = None, axis: int | None = None) -> Any:
    """`galago::dequantize` in ONNX."""
    if axis is None:
        return op.DequantizeLinear(codes, scale, zero_point)
    return op.DequantizeLinear(codes, scale, zero_point, axis=axis)


def byte(value: int) -> Any:
    """A uint8 constant."""
    return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, np.uint8)))


def integer_layers(deployed: nn.Module) -> dict[str, IntegerLayer]:
    """Every integer layer by its path in the network."""
    network = deployed.get_submodule("network")
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, IntegerLayer)}


@torch.no_grad()
def twins(deployed: Deployed, image: Tensor) -> dict[str, list[str]]:
    """For each integer stream the paths of those that give the very same codes, itself left out."""
    codes = look_into_integer(deployed, image)[1]
    return {
        path: [other for other in codes if other != path and torch.equal(codes[other], codes[path])] for path in codes
    }


@contextmanager
def running(module: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules now running, outermost first; after an error, of those it happened in."""
    stack = [""]
    handles = []

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: stack.append(path)

    def leave(*_: Any) -> None:
        stack.pop()

    for path, part in module.named_modules():
        handles += [part.register_forward_pre_hook(enter(path)), part.register_forward_hook(leave)]
    with removing(handles):
        yield stack


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Silences a chatty library for as long as the `with` lasts; errors still come through."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)
