"""Proof that a file equals what was trained, layer by layer and decision by decision.

Two comparisons, on real test images:

1. The integer module (`galago.deploy.integer`) against the trained model. Both are PyTorch, so this shows that lowering
   changed nothing: equal codes but for rounding ties, the same decisions on at least 99.9 % of the images, every metric
   within 0.1 point.
2. Each engine's file against the integer module. Every integer stream of the file is read out. Engines multiply by a
   reciprocal where PyTorch divides, so that a value exactly between two codes may fall on the other side: at least 99 %
   of the codes of each layer must be equal and at least 99.9 % within one step of the grid (design choices; typical
   files have 99.99 % equal). Decisions and metrics as above.

The first layer that breaks its bound is named. What differs there is the cause; what differs behind it follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from galago.deploy import runtime
from galago.deploy.integer import lower
from galago.deploy.integer_layers import IntegerStream
from galago.errors import UserError
from galago.probe import Deployed, Outputs, TaskMetrics
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.recipe import Parts, parts_of
from galago.run import Run, load, write_json

EQUAL, WITHIN_ONE = 0.99, 0.999  # shares of a layer's codes
AGREEMENT, METRIC = 0.999, 0.001  # share of equal decisions; largest difference of a metric (0.1 point)

Codes = dict[str, Tensor]  # by path of the integer stream, in order of execution
Look = Callable[[Tensor], tuple[Tensor, Codes]]  # raw images to raw output and codes


class LayerParity(NamedTuple):
    """How far the codes of one integer stream agree."""

    layer: str
    equal: float
    within_one: float
    largest_steps: int


class Counts:
    """Running comparison of two networks' codes, outputs and decisions."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.layers: dict[str, list[int]] = {}
        self.outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.targets: list[Tensor] = []

    def add(self, expected: tuple[Tensor, Codes], found: tuple[Tensor, Codes], target: Tensor) -> None:
        """Takes in one batch."""
        for kept, (output, _) in zip(self.outputs, (expected, found), strict=True):
            kept.append(output.float())
        self.targets.append(target)
        for name in expected[1].keys() & found[1].keys():
            steps = (expected[1][name].int() - found[1][name].int()).abs()
            count = self.layers.setdefault(name, [0, 0, 0, 0])
            count[0] += steps.numel()
            count[1] += int((steps == 0).sum())
            count[2] += int((steps <= 1).sum())
            count[3] = max(count[3], int(steps.max()))

    def parity(self, order: Sequence[str]) -> list[LayerParity]:
        """Layer by layer, in the order of execution."""
        known = [(name, self.layers[name]) for name in order if name in self.layers]
        return [LayerParity(name, c[1] / c[0], c[2] / c[0], c[3]) for name, c in known]

    def verdict(self, order: Sequence[str]) -> dict[str, Any]:
        """Everything compared, as plain data, with whether it passed."""
        first, second = (torch.cat(outputs) for outputs in self.outputs)
        agreement = float((self.task.decisions(first) == self.task.decisions(second)).float().mean())
        target = torch.cat(self.targets)
        metrics = [TaskMetrics().score(Outputs(output, target), self.task) for output in (first, second)]
        difference = max(abs(metrics[0][name] - metrics[1][name]) for name in metrics[0])
        layers = self.parity(order)
        missing = [name for name in order if name not in self.layers]
        broken = [row.layer for row in layers if row.equal < EQUAL or row.within_one < WITHIN_ONE]
        passed = agreement >= AGREEMENT and difference <= METRIC and not broken and not missing
        return {
            "passed": passed,
            "agreement": agreement,
            "metric_difference": difference,
            "metrics": metrics[1],
            "largest_difference": float((first - second).abs().max()),
            "first_diverging": broken[0] if broken else missing[0] if missing else None,
            "layers": [row._asdict() for row in layers],
        }


def verify_run(
    run: Path, images: int = 1000, data_root: Path | None = None, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Compares a run's trained model, its integer module and its files; writes verify.json.

    Args:
        run: folder of a run whose model has been exported.
        images: how many test images are compared.
        data_root: where the images lie, if no longer where the recipe says.
        allow: packages to import from besides galago, torch, torchvision and timm.

    Raises:
        UserError: nothing has been exported.
    """
    files = Run(run)
    network = load(run, allow)
    parts = parts_of(files, allow, data_root)
    artifacts = {
        name: path for name, path in (("onnxruntime", files.onnx), ("openvino", files.openvino)) if path.exists()
    }
    if not artifacts:
        raise UserError(f"{run} has no model.onnx or model.xml; write them with `galago export --run {run}`")
    trained = Deployed(network, network.normalization, parts.task).eval()
    outcome = compare(trained, artifacts, parts, images)
    write_json(files.verification, outcome)
    return outcome


def compare(trained: Deployed, artifacts: dict[str, Path], parts: Parts, images: int) -> dict[str, Any]:
    """The verdict on the integer module and on each file, as plain data."""
    normalized = trained.normalize(parts.data.example())
    integer = Deployed(lower(trained.network, normalized), trained.normalize, parts.task).eval()
    looks: dict[str, Look] = {"integer": lambda image: look_into_integer(integer, image)}
    looks |= {name: runtime.load(path).look for name, path in artifacts.items()}
    counts = {name: Counts(parts.task) for name in looks}
    order: list[str] = []
    seen = 0
    with torch.inference_mode():
        for batch in parts.data.test():
            image, target = batch.input[: images - seen], batch.target[: images - seen]
            reference = looks["integer"](image)
            order = order or list(reference[1])
            counts["integer"].add(look_into_trained(trained, image), reference, target)
            for name in artifacts:
                counts[name].add(reference, looks[name](image), target)
            if (seen := seen + len(image)) >= images:
                break
    verdicts = {name: count.verdict(order) for name, count in counts.items()}
    return {"passed": all(verdict["passed"] for verdict in verdicts.values()), "images": seen, **verdicts}


def look_into_integer(integer: Deployed, image: Tensor) -> tuple[Tensor, Codes]:
    """Output and codes of the integer module."""
    streams = {path: m for path, m in integer.network.named_modules() if isinstance(m, IntegerStream)}
    return _watched(integer, image, {path: (stream, stream.codes) for path, stream in streams.items()})


def look_into_trained(trained: Deployed, image: Tensor) -> tuple[Tensor, Codes]:
    """Output of the trained model, and the codes that its quantizers stand for, counted from 0."""
    watched = {}
    for path, module in trained.network.named_modules():
        quantizer = (
            module.input_quantizer
            if isinstance(module, QuantLayer)
            else module.output_quantizer
            if isinstance(module, QuantOutput)
            else None
        )
        if quantizer is not None:
            low = quantizer.grid().low
            name = f"{path}.stream" if path else "stream"
            watched[name] = (quantizer, lambda x, q=quantizer, low=low: (q.codes(x) - low).to(torch.uint8))
    return _watched(trained, image, watched)


def _watched(
    deployed: nn.Module, image: Tensor, watched: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]
) -> tuple[Tensor, Codes]:
    codes: Codes = {}
    with _hooks(watched, codes):
        output: Tensor = deployed(image)
    return output, codes


@contextmanager
def _hooks(watched: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]], codes: Codes) -> Iterator[None]:
    def keep(name: str, encode: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        return lambda module, inputs: codes.__setitem__(name, encode(inputs[0]))

    handles = [m.register_forward_pre_hook(keep(name, encode)) for name, (m, encode) in watched.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def show(outcome: dict[str, Any]) -> None:
    """A table for a person, on standard error; the first diverging layer is named."""
    table = Table(
        "compared", "equal decisions", "metric differs by", "codes equal", "largest step", "verdict", box=None
    )
    names = {
        "integer": "integer module and trained model",
        "onnxruntime": "ONNX Runtime and integer module",
        "openvino": "OpenVINO and integer module",
    }
    for name, title in names.items():
        if (found := outcome.get(name)) is None:
            continue
        layers = found["layers"]
        equal = min((row["equal"] for row in layers), default=1.0)
        steps = max((row["largest_steps"] for row in layers), default=0)
        verdict = "equal" if found["passed"] else f"DIFFERS, first at {found['first_diverging'] or 'the output'}"
        table.add_row(
            title,
            f"{found['agreement']:.2%}",
            f"{100 * found['metric_difference']:.2f} points",
            f"≥ {np.floor(1e4 * equal) / 1e2:.2f} % a layer" if layers else "no integer layer",
            str(steps),
            verdict,
        )
    Console(stderr=True).print(table)
