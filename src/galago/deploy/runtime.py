"""Exported files as modules: raw images in, raw output out, computed by ONNX Runtime or OpenVINO.

`load(path)` chooses by the file's ending. What is not integer is computed in float32 unless asked otherwise: OpenVINO's
own choice on processors with AMX is bf16, which is faster and differs in the third digit. A file may come from a
stranger: see `galago.deploy.reading`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import onnx
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from onnx.inliner import inline_local_functions
from torch import Tensor, nn

from galago.deploy.label import CODES, STREAMS
from galago.deploy.reading import DECODED, IMAGE, OUTPUT, Interface, as_type, check, check_interface, first_line
from galago.errors import UserError

TYPES = {
    "tensor(uint8)": torch.uint8,
    "tensor(float)": torch.float32,
    "<Type: 'uint8_t'>": torch.uint8,
    "<Type: 'float32'>": torch.float32,
}
QUIET = 4  # ONNX Runtime's level "fatal": errors are raised as exceptions anyway


class Answer(NamedTuple):
    """Everything a file says about a batch of images."""

    output: Tensor  # raw, N×…, float32
    decoded: Tensor  # what a user sees


class Operation(NamedTuple):
    """One kernel that an engine runs."""

    name: str  # begins with the path of the layer it came from
    kind: str  # ONNX Runtime: the operator, `QLinearConv`; OpenVINO: the type of layer, `Convolution`
    kernel: str = ""  # OpenVINO: `brgconv_avx512_amx_I8`


class Artifact(nn.Module, ABC):
    """A file and the engine that runs it. Called like the model it was exported from.

    Args:
        path: of the file.
        threads: how many the engine may use; none: as many as it likes.
    """

    takes: Interface
    dtype: torch.dtype  # of the images it takes

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__()
        self.path, self.threads = Path(path), threads
        check(self.path)

    @abstractmethod
    def compute(self, image: NDArray[Any]) -> Sequence[NDArray[Any]]:
        """Output and decoded."""

    @abstractmethod
    def look(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The raw output, and the codes of every integer stream by its path in the integer network, uint8.

        They are read out by a second session, made on first use.
        """

    @abstractmethod
    def operations(self) -> list[Operation]:
        """What the engine really runs after its own rewriting, in order."""

    def forward(self, image: Tensor) -> Tensor:
        """Raw images N×C×H×W, uint8 (or float in 0 … 1), to the raw output."""
        return self.run(image).output

    def run(self, image: Tensor) -> Answer:
        """Raw images to both outputs."""
        return Answer(*(torch.from_numpy(array) for array in self.compute(self.fitting(image))))

    def fitting(self, image: Tensor) -> NDArray[Any]:
        """The images as the engine takes them.

        Raises:
            UserError: the file was made for another shape or type.
        """
        sizes = image.shape
        if len(sizes) != len(self.takes) or any(
            size not in (None, given) for size, given in zip(self.takes, sizes, strict=True)
        ):
            raise UserError(f"{self.path} takes images {self.takes}, but was given {Interface(sizes)}")
        array: NDArray[Any] = as_type(image.detach().cpu(), self.dtype).contiguous().numpy()
        return array

    def extra_repr(self) -> str:
        return f"{self.path}, {self.takes}"


class OnnxRuntime(Artifact):
    """An ONNX file on ONNX Runtime's CPU engine.

    Args:
        path: of the `*.onnx` file.
        threads: how many the engine may use; none: one a core.

    Raises:
        UserError: the file is missing, broken, foreign, or asks for what is not standard.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__(path, threads)
        self.session = self.started(str(self.path))
        inputs = {entry.name: entry for entry in self.session.get_inputs()}
        check_interface(self.path, inputs, [entry.name for entry in self.session.get_outputs()])
        self.takes = Interface(size if isinstance(size, int) else None for size in inputs[IMAGE].shape)
        self.dtype = TYPES[inputs[IMAGE].type]
        self.looking: tuple[onnxruntime.InferenceSession, dict[str, str]] | None = None

    def started(self, model: str | bytes, optimized: Path | None = None) -> onnxruntime.InferenceSession:
        """A session; the graph that it really runs is written to `optimized`."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = QUIET
        options.intra_op_num_threads = self.threads or 0
        # Numbers below the normal range, as dead channels give, take 20 times as long; OpenVINO does the same.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        try:
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UserError(f"{self.path}: ONNX Runtime cannot run it: {first_line(error)}") from error

    def compute(self, image: NDArray[Any]) -> Sequence[NDArray[Any]]:
        found: list[NDArray[Any]] = self.session.run([OUTPUT, DECODED], {IMAGE: image})
        return found

    def look(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.looking is None:
            model = onnx.load(self.path)
            known = {name for node in model.graph.node for name in node.output}
            notes = {entry.key: entry.value for entry in model.metadata_props}
            streams = values_of_streams(self.path, notes.get(STREAMS, "{}"), known)
            names = sorted(set(streams.values()))
            kinds = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in names]
            model.graph.output.extend(kinds)
            self.looking = self.started(model.SerializeToString()), streams
        session, streams = self.looking
        names = sorted(set(streams.values()))
        output, *codes = session.run([OUTPUT, *names], {IMAGE: self.fitting(image)})
        return torch.from_numpy(output), by_stream(streams, dict(zip(names, codes, strict=True)))

    def operations(self) -> list[Operation]:
        with TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            self.started(str(self.path), optimized)
            nodes = onnx.load(optimized, load_external_data=False).graph.node
        return [Operation(node.name, node.op_type) for node in nodes]


class OpenVINO(Artifact):
    """An OpenVINO or ONNX file on OpenVINO's CPU engine.

    Args:
        path: of the `*.xml` file, whose `*.bin` lies beside it, or of an `*.onnx` file (packed weights run slowly).
        threads: how many the engine may use; none: as many as it likes.
        precision: of what is not integer: `f32`, or `bf16`, faster where the processor has it.

    Raises:
        UserError: the file is missing, broken or foreign.
    """

    def __init__(self, path: Path, threads: int | None = None, precision: str = "f32") -> None:
        super().__init__(path, threads)
        if precision not in ("f32", "bf16"):
            raise UserError(f"precision: {precision!r} is not one of f32 and bf16")
        self.precision, self.engine = precision, openvino.Core()
        model = self.read()
        inputs = {name: port for port in model.inputs for name in sorted(port.names)}
        check_interface(self.path, inputs, [name for port in model.outputs for name in port.names])
        sizes = inputs[IMAGE].partial_shape
        self.takes = Interface(size.get_length() if size.is_static else None for size in sizes)
        self.dtype = TYPES[str(inputs[IMAGE].element_type)]
        self.compiled = self.compile(model)
        self.request = self.compiled.create_infer_request()
        self.looking: tuple[Any, dict[str, str]] | None = None

    def read(self) -> Any:
        """The graph as it is in the file, but with functions written out, whose shapes OpenVINO does not follow."""
        try:
            if self.path.suffix == ".onnx" and (model := onnx.load(self.path)).functions:
                return self.engine.read_model(inline_local_functions(model).SerializeToString())
            return self.engine.read_model(self.path)
        except Exception as error:
            raise UserError(f"{self.path}: OpenVINO cannot read it: {first_line(error)}") from error

    def compile(self, model: Any) -> Any:
        """The graph made ready to run."""
        wanted: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self.precision, "PERFORMANCE_HINT": "LATENCY"}
        if self.threads:
            wanted["INFERENCE_NUM_THREADS"] = self.threads
        try:
            return self.engine.compile_model(model, "CPU", wanted)
        except Exception as error:
            raise UserError(f"{self.path}: OpenVINO cannot run it: {first_line(error)}") from error

    def compute(self, image: NDArray[Any]) -> Sequence[NDArray[Any]]:
        found = self.request.infer([image])  # copies in and out; calling the compiled model would share memory
        return [found[OUTPUT], found[DECODED]]

    def look(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.looking is None:
            model = self.read()
            known = {name for node in model.get_ordered_ops() for port in node.outputs() for name in port.names}
            keys = STREAMS.split(".")
            notes = str(model.get_rt_info(keys).astype(str)) if model.has_rt_info(keys) else "{}"
            streams = values_of_streams(self.path, notes, known)
            model.add_outputs(sorted(set(streams.values())))
            self.looking = self.compile(model).create_infer_request(), streams
        request, streams = self.looking
        found = request.infer([self.fitting(image)])
        return torch.from_numpy(found[OUTPUT]), by_stream(streams, {name: found[name] for name in streams.values()})

    def operations(self) -> list[Operation]:
        found = []
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            facts = {
                key: str(value.astype(str)) for key, value in node.get_rt_info().items() if hasattr(value, "astype")
            }
            name = facts.get("originalLayersNames") or node.get_friendly_name()
            found.append(Operation(name, facts.get("layerType", ""), facts.get("primitiveType", "")))
        return found


def load(path: Path, threads: int | None = None) -> Artifact:
    """An exported file on its engine: `*.onnx` on ONNX Runtime, `*.xml` on OpenVINO.

    Raises:
        UserError: the file is missing, broken, foreign, or asks for what is not standard.
    """
    return OpenVINO(path, threads) if Path(path).suffix == ".xml" else OnnxRuntime(path, threads)


def values_of_streams(path: Path, noted: str, known: set[str]) -> dict[str, str]:
    """Which value of the graph holds each stream's codes: the one with its name, or another that the file notes.

    Raises:
        UserError: the note is damaged.
    """
    try:
        found = json.loads(noted)
        if known.issuperset(found.values()):
            return {name.removesuffix(CODES): name for name in known if name.endswith(CODES)} | dict(found)
    except (ValueError, AttributeError, TypeError):
        pass
    raise UserError(f"{path}: its list of integer streams is damaged; export it again")


def by_stream(streams: Mapping[str, str], codes: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Codes by the path of their stream."""
    return {path: torch.from_numpy(codes[value]) for path, value in streams.items()}
