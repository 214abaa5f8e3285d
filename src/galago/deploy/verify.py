"""Proof that a file equals what was trained, layer by layer and decision by decision.

Two comparisons, on real test images: the trained model against the integer module (`galago.deploy.integer`; both are
PyTorch, so this shows that lowering changed nothing), and the integer module against each engine's file, whose integer
streams are read out. Each asks two questions:

1. *Layer by layer, on equal inputs.* The integer module is run with the other's codes put in at every stream, so that
   each layer is compared on the very input that the other had. Where a value lies halfway between two codes, within a
   thousandth of a step, one may round it up and the other down (engines multiply by a reciprocal where PyTorch
   divides): such a difference is a tie and no disagreement. Of the other codes of a layer at least 99 % must be equal
   (biases are rounded to 32 bits), and of all at least 99.99 % within one step of the grid (design choices; typical
   files have 99.99 % equal and nothing beyond one step). Ties are rare unless scales are in simple proportions, as
   in a network fresh from its initialization, whose branches are zero.
2. *From image to decision*, each on its own, and the file as a user runs it (engines take shortcuts where no codes are
   read out: ONNX Runtime makes one of two 8-bit quantizers in a row): every metric of the task within 0.1 point, and
   the same decision on at least 99.9 % of the images between trained model and integer module, on at least 99.5 %
   between integer module and engine (design choice: a tie that an engine breaks the other way may grow into another
   decision in a network of few bits; measured 99.8 % at 4 bits with 99.98 % of the codes equal). Of fewer than 1,000
   images, one may differ.

Both PyTorch forms are computed in float64, from weights rounded in float32. In float32 the order of a sum moves one
code in ten thousand, so that a trained model already differs from itself on another machine.

The first layer that breaks its bound is named: on equal inputs it is the culprit, not a victim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from galago.console import console
from galago.deploy import runtime
from galago.deploy.integer import lower
from galago.deploy.look import Codes, look_into_integer, look_into_trained
from galago.errors import UserError
from galago.probe import Deployed, Outputs, TaskMetrics
from galago.quantize.layer import QuantLayer
from galago.recipe import Parts, parts_of
from galago.run import Run, load, normalization_of, write_json
from galago.task import Task, scores_of

EQUAL, WITHIN_ONE = 0.99, 0.9999  # shares of a layer's codes
AGREEMENT, ENGINE = 0.999, 0.995  # shares of equal decisions: with the trained model; of an engine
METRIC = 0.001  # largest difference of a metric: 0.1 point

Look = Callable[[Tensor], tuple[Tensor, Codes]]  # raw images to raw output and codes


class LayerParity(NamedTuple):
    """How far the codes of one integer stream agree."""

    layer: str
    equal: float
    tied: float  # not equal, but one step apart where the value lies halfway
    within_one: float
    largest_steps: int


class Counts:
    """Running comparison of the integer module with another form of the same network.

    Args:
        integer: the module.
        task: says what the decisions are.
    """

    def __init__(self, integer: Deployed, task: Task) -> None:
        self.integer, self.task = integer, task
        self.layers: dict[str, list[int]] = {}  # codes, equal ones, ties, those within a step, largest difference
        self.missing: list[str] = []
        self.outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.targets: list[Tensor] = []

    def add(self, image: Tensor, reference: Tensor, found: tuple[Tensor, Codes], target: Tensor) -> None:
        """Takes in one batch: the integer module's output, the other's output and codes."""
        for kept, output in zip(self.outputs, (reference, found[0]), strict=True):
            kept.append(output.float())
        self.targets.append(target)
        halfway: Codes = {}
        own = look_into_integer(self.integer, image, instead=found[1], halfway=halfway)[1]
        self.missing = [name for name in own if name not in found[1]]
        for name in own.keys() & found[1].keys():
            steps = (own[name].int() - found[1][name].int()).abs()
            count = self.layers.setdefault(name, [0, 0, 0, 0, 0])
            count[0] += steps.numel()
            count[1] += int((steps == 0).sum())
            count[2] += int(((steps == 1) & halfway[name]).sum()) if name in halfway else 0
            count[3] += int((steps <= 1).sum())
            count[4] = max(count[4], int(steps.max()))

    def verdict(self, order: Sequence[str], agreeing: float) -> dict[str, Any]:
        """Everything compared, as plain data, with whether it passed."""
        first, second = (torch.cat(outputs) for outputs in self.outputs)
        target = torch.cat(self.targets)
        agreement = float((self.task.decisions(first) == self.task.decisions(second)).float().mean())
        metrics = [TaskMetrics().score(Outputs(output, target), self.task) for output in (first, second)]
        difference = max(abs(metrics[0][name] - metrics[1][name]) for name in metrics[0])
        known = [(name, self.layers[name]) for name in order if name in self.layers]
        layers = [LayerParity(name, c[1] / c[0], c[2] / c[0], c[3] / c[0], c[4]) for name, c in known]
        broken = [row.layer for row in layers if row.equal + row.tied < EQUAL or row.within_one < WITHIN_ONE]
        broken += self.missing
        one = 1 / len(target)  # of few images, one may differ: a smaller share cannot be told from none
        agrees = 1 - agreement <= max(1 - agreeing, one) + 1e-6 and difference <= max(METRIC, one) + 1e-6
        return {
            "passed": agrees and not broken,
            "agreement": agreement,
            "metric_difference": difference,
            "metrics": metrics[1],
            "largest_difference": float((first - second).abs().max()),
            "first_diverging": broken[0] if broken else None,
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
    trained = Deployed(network, normalization_of(network), parts.task).eval()
    outcome = compare(trained, artifacts, parts, images)
    write_json(files.verification, outcome)
    return outcome


def compare(trained: Deployed, artifacts: dict[str, Path], parts: Parts, images: int) -> dict[str, Any]:
    """The verdict on the integer module and on each file, as plain data."""
    require_one_answer(trained, parts.data.example())
    normalized = trained.normalize(parts.data.example())
    integer = Deployed(lower(trained.network, normalized), trained.normalize, parts.task).eval().double()
    trained = in_float64(trained)
    looks: dict[str, Look] = {"integer": lambda image: look_into_trained(trained, image)}
    looks |= {name: as_it_runs(runtime.load(path)) for name, path in artifacts.items()}
    counts = {name: Counts(integer, parts.task) for name in looks}
    order: list[str] = []
    seen = 0
    with torch.inference_mode():
        for batch in parts.data.test():
            image, target = batch.input[: images - seen], batch.target[: images - seen]
            reference, codes = look_into_integer(integer, image)
            order = order or list(codes)
            for name, look in looks.items():
                counts[name].add(image, reference, look(image), target)
            if (seen := seen + len(image)) >= images:
                break
    bounds = {name: AGREEMENT if name == "integer" else ENGINE for name in counts}
    verdicts = {name: count.verdict(order, bounds[name]) for name, count in counts.items()}
    return {"passed": all(verdict["passed"] for verdict in verdicts.values()), "images": seen, **verdicts}


@torch.no_grad()
def require_one_answer(trained: Deployed, image: Tensor) -> None:
    """Sees to it that there is something to compare.

    Raises:
        UserError: the network answers otherwise when it is asked again.
    """
    first, second = (scores_of(trained(image)) for _ in range(2))
    if not torch.allclose(first, second, rtol=0, atol=0, equal_nan=True):
        raise UserError(
            "the network draws random numbers when it predicts and gives another answer each time, so that no file can"
            " be compared with it; ship it without its noise (`draws: 0`) to verify it"
        )


def as_it_runs(artifact: runtime.Artifact) -> Look:
    """The output of the file as a user runs it, and its codes; reading these out may keep an engine from shortcuts."""
    return lambda image: (artifact(image), artifact.look(image)[1])


def in_float64(trained: Deployed) -> Deployed:
    """A copy that computes in float64, with the weights that it has in float32.

    A weight that lies halfway between two codes to the last digit of float32 would otherwise be rounded the other way.
    """
    trained = copy.deepcopy(trained)
    rounded = [
        (module.weight_quantizer, module.weight_quantizer(module.layer.get_parameter("weight")).double())
        for module in trained.modules()
        if isinstance(module, QuantLayer) and module.weight_quantizer is not None
    ]
    for quantizer, values in rounded:
        quantizer.register_forward_hook(lambda module, args, output, values=values: values)
    return trained.double()


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
            f"{np.floor(1e4 * equal) / 1e2:.2f}% equal" if layers else "no integer layer",
            str(steps),
            verdict,
        )
    console.print(table)
