"""What each engine really runs of a file: which layers as integers, which in float, and why.

ONNX Runtime's answer is the graph it saves after its own optimization (`QLinearConv` against `Conv`); OpenVINO's is the
kernel its runtime model names (`…_I8` against `…_f32`). Both are asked for on this machine, as kernels depend on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from galago.deploy import runtime
from galago.errors import UserError
from galago.run import Run

# ONNX Runtime's integer operators, and the float ones that do the same work.
INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearGlobalAveragePool"}
INTEGER |= {
    "QLinearAveragePool",
    "QLinearConcat",
    "QLinearSigmoid",
    "QLinearLeakyRelu",
    "QLinearSoftmax",
    "QLinearReduceMean",
}
INTEGER |= {"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
FLOAT = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Mul", "Concat"}
FLOAT |= {"GlobalAveragePool", "AveragePool", "ReduceMean", "HardSwish", "HardSigmoid", "Sigmoid", "LayerNormalization"}
FLOAT |= {"Softmax", "Gelu", "QuickGelu", "BatchNormalization", "PRelu", "Elu", "Relu"}
WORK = {"Convolution", "GroupConvolution", "ConvolutionBackpropData", "FullyConnected", "MatMul", "Eltwise", "Add"}
WORK |= {"Pooling", "AvgPool", "ReduceMean", "Subgraph", "Deconvolution", "MVN", "Softmax", "Concatenation"}
SIDES = ("normalize", "decode", "task", "image", "output", "decoded")  # what stands around the network


class Found(NamedTuple):
    """How one operation of a file runs in one engine."""

    layer: str
    engine: str
    operation: str
    integer: bool
    why: str


def inspect_file(path: Path) -> list[Found]:
    """Every computing operation of a file in each engine that reads it, in the order of execution.

    Args:
        path: an .onnx file (both engines) or an .xml file (OpenVINO).

    Raises:
        UserError: the file is none of the two, missing or broken.
    """
    if path.suffix == ".onnx":
        return [*_onnxruntime(path), *_openvino(path)]
    if path.suffix == ".xml":
        return _openvino(path)
    raise UserError(f"{path}: inspect reads .onnx and .xml files")


def _onnxruntime(path: Path) -> list[Found]:
    found = []
    for operation in runtime.OnnxRuntime(path, threads=1).operations():
        integer = operation.kind in INTEGER
        if integer or operation.kind in FLOAT:
            why = "" if integer else _why_float(operation.kind)
            found.append(Found(_layer(operation.name), "onnxruntime", operation.kind, integer, why))
    return found


def _why_float(kind: str) -> str:
    if kind in ("HardSwish", "HardSigmoid", "ReduceMean", "PRelu", "ConvTranspose"):
        return f"ONNX Runtime has no integer {kind}"
    if kind in ("Conv", "FusedConv"):
        return "its input, weight or result is not quantized (a residual stream without quantizer?)"
    return "an input or its result is float"


def _openvino(path: Path) -> list[Found]:
    found = []
    packed = "OpenVINO does not unpack weights ahead; use the .xml file" if path.suffix == ".onnx" else ""
    for operation in runtime.OpenVINO(path, threads=1).operations():
        if operation.kind not in WORK:
            continue
        integer = operation.kernel.upper().endswith(("_I8", "_U8"))
        why = "" if integer else packed or "an input is not quantized"
        found.append(Found(_layer(operation.name), "openvino", f"{operation.kind} {operation.kernel}", integer, why))
    return found


def _layer(name: str) -> str:
    """The path of the layer that an operation came from; the file writes it into the name."""
    path = name.partition("/")[0]
    return path.removesuffix(".layer") or path  # the wrapper's own path is the one a user knows


def engines_of_layers(files: Run) -> dict[str, dict[str, Any]]:
    """For a run: the operation that does each layer's work in each engine, where the files are there."""
    engines: dict[str, dict[str, Any]] = {}
    rows = (_onnxruntime(files.onnx) if files.onnx.exists() else []) + (
        _openvino(files.openvino) if files.openvino.exists() else []
    )
    for row in rows:
        if _multiplies(row.operation):
            engines.setdefault(row.layer, {"onnxruntime": None, "openvino": None})[row.engine] = row.operation
    return engines


def _multiplies(operation: str) -> bool:
    return any(word in operation for word in ("Conv", "Gemm", "MatMul", "FullyConnected", "Deconvolution"))


def show(found: list[Found]) -> None:
    """A table a person can read, and a line of totals for each engine."""
    table = Table("layer", "engine", "runs as", "", "why", box=None, pad_edge=False)
    for row in found:
        if row.layer.partition(".")[0] not in SIDES:
            table.add_row(row.layer, row.engine, row.operation, "integer" if row.integer else "float", row.why)
    console = Console()
    console.print(table)
    for engine in dict.fromkeys(row.engine for row in found):
        work = [row for row in found if row.engine == engine and _multiplies(row.operation)]
        console.print(f"{engine}: {sum(row.integer for row in work)} of {len(work)} multiplying layers run as integers")
