"""Reading model files that may come from a stranger, and putting engines' complaints into a line.

A file is data. Before an engine sees it, it is refused if it asks for operators that are neither standard nor defined
in the file out of such ones, as these would need somebody's library, or for weights stored outside its own folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import torch

from galago.errors import UserError

STANDARD = ("", "ai.onnx")
IMAGE, OUTPUT, DECODED = "image", "output", "decoded"


class Interface(tuple[int | None, ...]):
    """The shape of the images a file takes; None where any size will do."""

    def __str__(self) -> str:
        return "×".join("N" if size is None else str(size) for size in self)


def check(path: Path) -> None:
    """Refuses a file that is missing, broken, or asks for what is not standard.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `galago export` writes it")
    if path.suffix == ".onnx":
        check_onnx(path)
    elif path.suffix != ".xml":
        raise UserError(f"{path}: neither an ONNX file (*.onnx) nor an OpenVINO file (*.xml)")
    elif not path.with_suffix(".bin").is_file():
        raise UserError(f"{path}: its weights, {path.with_suffix('.bin').name}, are not beside it")


def check_onnx(path: Path) -> None:
    """Refuses what `check` does, of an ONNX file."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise UserError(f"{path}: not an ONNX file, or a damaged one; export it again") from error
    own = {(function.domain, function.name) for function in model.functions}  # defined in the file
    for node in (node for part in (model.graph, *model.functions) for node in nodes_of(part)):
        if node.domain not in STANDARD and (node.domain, node.op_type) not in own:
            raise UserError(f"{path}: refused: {node.op_type} of {node.domain!r} is not a standard operator")
    folder = path.parent.resolve()
    for tensor in (tensor for part in (model.graph, *model.functions) for tensor in tensors_of(part)):
        for entry in tensor.external_data:
            if entry.key == "location" and not (folder / entry.value).resolve().is_relative_to(folder):
                raise UserError(f"{path}: refused: weights of {tensor.name} lie outside its folder, at {entry.value}")


def nodes_of(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Every node, also of the graphs inside of branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_of(inner)


def tensors_of(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor."""
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from tensors_of(inner)


def check_interface(path: Path, inputs: Mapping[str, object], outputs: Sequence[str]) -> None:
    """Refuses a file that does not take and give what Galago's own do.

    Raises:
        UserError: naming what is missing.
    """
    missing = [name for name in (OUTPUT, DECODED) if name not in outputs]
    if list(inputs) != [IMAGE] or missing:
        raise UserError(
            f"{path}: not a file that `galago export` wrote: it takes {', '.join(inputs) or 'nothing'} and gives "
            f"{', '.join(outputs) or 'nothing'}, but should take {IMAGE} and give {OUTPUT} and {DECODED}"
        )


def as_type(image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Images as the file takes them: uint8 in 0 … 255, or float in 0 … 1."""
    if image.dtype == dtype:
        return image
    if dtype == torch.uint8:
        raise UserError(f"this file takes raw uint8 images, but was given {str(image.dtype).removeprefix('torch.')}")
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line; where in OpenVINO's source it was raised is left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Exception from ")] or lines
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
