"""Writes a run's folder with every file a report reads, as a 4-bit ResNet-20 of CIFAR-10 would leave it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

IMAGES, CLASSES = 1000, 10
Write = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> Write:
    """`write_run("student", bits=4)` gives the folder of a finished run; bits=None is a float one."""

    def write(name: str, bits: int | None = 4, layers: int = 20) -> Path:
        return fill(tmp_path / name, bits, layers)

    return write


def fill(folder: Path, bits: int | None = 4, layers: int = 20) -> Path:
    """Every file of a run; a float one as `galago train` and `measure` leave it, without files of its own."""
    folder.mkdir(parents=True)
    (folder / "predictions").mkdir()
    recipe = {
        "model": {"class_path": "galago.models.resnet.resnet20", "init_args": {"classes": 10}},
        "task": {"class_path": "galago.tasks.classify.Classify"},
        "data": {"class_path": "galago.datasets.cifar.CIFAR10", "init_args": {"root": "data/cifar10"}},
        "methods": [{"class_path": "galago.quantize.quantize.Quantize", "init_args": {"weight_bits": bits}}],
        "epochs": 60,
        "seed": 0,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    put(folder, "run.json", provenance(folder))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log(bits)))
    for form in ("model", "onnx", "openvino") if bits else ("model",):
        output, target = answers(bits, form)
        np.savez(folder / "predictions" / f"{form}.npz", output=output, target=target)
    put(folder, "metrics.json", metrics(bits))
    put(folder, "layers.json", layer_rows(bits, layers))
    if bits:
        put(folder, "trust.json", trust())
        put(folder, "latency.json", {"image": "3×32×32", "rows": timings(), "advice": ADVICE})
        put(folder, "verify.json", verification(layers))
        put(folder, "sensitivity.json", sensitivity(layers))
    return folder


def trust() -> dict[str, Any]:
    """As `galago trust --against` writes it."""
    numbers = {
        "accuracy": 0.91,
        "ece": 0.03,
        "corruption_error": 0.3,
        "auroc_energy_mean": 0.9,
        "nll": 0.31,
        "mce": 0.4,
    }
    numbers |= {"corruption_error_fog": 0.2, "corruption_error_glass_blur": 0.5, "linf_0.0314_pgd_accuracy": 0.02}
    forms = {"before": 1.0, "model": 0.98, "onnx": 0.98, "openvino": 0.98}
    rows = [
        {"form": form, "metric": metric, "value": factor * value, "low": 0.9 * value, "high": 1.1 * value}
        for form, factor in forms.items()
        for metric, value in numbers.items()
    ]
    change = {"from": "before", "to": "model", "value": -0.018, "low": -0.03, "high": -0.01}
    chance = {"from": "before", "to": "model", "value": -0.0006, "low": -0.01, "high": 0.01}
    return {
        "before": "runs/teacher",
        "images": 1000,
        "severities": [1, 3, 5],
        "rounds": 200,
        "rows": rows,
        "changes": [change | {"metric": "accuracy"}, chance | {"metric": "ece"}],
        "alerts": ["Worse: error on corrupted images moved by +3.0 points."],
        "remarks": ["A remark."],
    }


ADVICE = "Fastest here for one image: integer, OpenVINO, 0.214 ms."


def put(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def provenance(folder: Path) -> dict[str, Any]:
    return {
        "command": f"galago ship --config recipes/quantize/ewgs_resnet20.yaml --run {folder.name}",
        "seed": 0,
        "started": "2026-03-02 10:11:12",
        "python": "3.11.9",
        "platform": "Linux-6.1-x86_64",
        "threads": 2,
        "device": "x86_64",
        "versions": {"galago": "0.1.0", "torch": "2.15.0", "onnxruntime": "1.31.0", "openvino": "2026.4.0"},
    }


def log(bits: int | None) -> list[dict[str, Any]]:
    draws, lines = np.random.default_rng(1), []
    for step in range(20, 18001, 20):
        label = 1.6 * math.exp(-step / 3000) + 0.12 + 0.05 * draws.random()
        losses = {"label": label} | ({"distill": 0.6 * label + 0.05 * draws.random()} if bits else {})
        rate = 0.05 * (1 + math.cos(math.pi * step / 18000))
        epoch = (step - 1) // 300
        lines.append({"kind": "step", "epoch": epoch, "step": step, "loss": sum(losses.values()), **losses})
        lines[-1]["learning_rate"] = rate
        if step % 300 == 0:
            accuracy = 0.915 - 0.5 * math.exp(-epoch / 9) + 0.006 * draws.standard_normal()
            ece = 0.03 + 0.05 * math.exp(-epoch / 9)
            lines.append({"kind": "epoch", "epoch": epoch, "step": step, "accuracy": accuracy, "ece": ece})
    return lines


def answers(bits: int | None, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Class scores that are right nine times in ten; those of the quantized network are sharper."""
    draws = np.random.default_rng(7)
    target = draws.integers(0, CLASSES, IMAGES)
    output = 1.9 * draws.standard_normal((IMAGES, CLASSES))
    output[np.arange(IMAGES), target] += 5.6
    if bits:
        output += 0.35 * np.random.default_rng(8).standard_normal(output.shape)
    output *= 2.2 if bits else 1.5
    if form == "openvino":
        output += 0.002 * np.random.default_rng(9).standard_normal(output.shape)
    return output.astype(np.float32), target


def metrics(bits: int | None) -> dict[str, dict[str, float]]:
    if bits is None:
        return {"model": scores(answers(None, "model")) | COST | {"bops": 41_000_000.0 * 1024, "file_mb": 1.11}}
    cost = COST | {"bops": 41_000_000.0 * 17, "mean_weight_bits": 4.1, "file_mb": 1.12}
    return {
        "model": scores(answers(bits, "model")) | cost,
        "onnx": scores(answers(bits, "onnx")) | {"file_mb": 0.187},
        "openvino": scores(answers(bits, "openvino")) | {"file_mb": 0.224},
    }


COST = {"parameters": 269_722.0, "macs": 40_813_184.0}


def scores(given: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Accuracy, ECE, NLL and Brier score, written out plainly."""
    output, target = given[0].astype(np.float64), given[1]
    probability = np.exp(output) / np.exp(output).sum(1, keepdims=True)
    confidence, correct = probability.max(1), probability.argmax(1) == target
    edges = np.arange(16) / 15
    inside = [(confidence > low) & (confidence <= high) for low, high in pairwise(edges)]
    gaps = [
        abs(correct[chosen].mean() - confidence[chosen].mean()) * chosen.mean() for chosen in inside if chosen.any()
    ]
    truth = np.eye(CLASSES)[target]
    return {
        "accuracy": float(correct.mean()),
        "ece": float(sum(gaps)),
        "nll": float(-np.log(probability[truth == 1]).mean()),
        "brier": float(((probability - truth) ** 2).sum(1).mean()),
    }


def timings() -> list[dict[str, Any]]:
    known = [
        ("onnxruntime", "fp32", 1.21, 1.10),
        ("openvino", "fp32", 0.52, 1.10),
        ("openvino", "bf16", 0.49, 1.10),
        ("onnxruntime", "integer", 0.63, 0.187),
        ("openvino", "integer", 0.214, 0.224),
    ]
    floats = {engine: median for engine, precision, median, _ in known if precision == "fp32"}
    return [timing(*row, batch, floats[row[0]]) for batch in (1, 32) for row in known]


def timing(engine: str, precision: str, median: float, size: float, batch: int, whole: float) -> dict[str, Any]:
    title, long = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[engine], 0.8 * batch if batch > 1 else 1
    return {
        "name": f"{precision}, {title}",
        "engine": engine,
        "precision": precision,
        "batch": batch,
        "threads": 1,
        "median_ms": median * long,
        "p10_ms": 0.94 * median * long,
        "p90_ms": 1.14 * median * long,
        "images_per_second": 1000 * batch / (median * long),
        "file_mb": size,
        "ratio": whole / median,
        "low": 0.97 * whole / median,
        "high": 1.02 * whole / median,
    }


def layer_rows(bits: int | None, layers: int) -> list[dict[str, Any]]:
    return [layer_row(place, bits, layers) for place in range(layers)]


def layer_row(place: int, bits: int | None, layers: int) -> dict[str, Any]:
    ends, last = place in (0, layers - 1), place == layers - 1
    width = 16 * 2 ** min(2, 3 * place // layers)
    here = None if bits is None else 8 if ends else bits
    return {
        "path": "fc"
        if last
        else "conv1"
        if place == 0
        else f"layer{1 + 3 * place // layers}.{place}.conv{1 + place % 2}",
        "type": "Linear" if last else "Conv2d",
        "shape": [10, width] if last else [width, 3 if place == 0 else width, 3, 3],
        "weight_bits": here,
        "input_bits": here,
        "macs": 640 if last else 2_359_296,
        "weight_error_db": None if here is None else 6.02 * here - 6 + 2 * math.sin(place),
        "onnxruntime": None if here is None else "QLinearConv" if not last else "MatMulInteger",
        "openvino": None if here is None else "jit_avx512_core_amx_I8",
        "note": "" if here else "float: no method quantizes it",
    }


def sensitivity(layers: int) -> dict[str, Any]:
    """The seventh layer suffers most alone, and the streams, which come last, little."""

    def numbers(kl: float) -> dict[str, float]:
        return {"accuracy": 0.9 - kl / 2, "kl": kl, "mse": 40 * kl, "db": 12.0}

    costs = [0.012 if place == 6 else 0.002 + 0.0005 * (place % 5) for place in range(layers)]
    rows = [
        {"path": layer_row(place, 4, layers)["path"], "snr_db": 20.0, "alone": numbers(cost)}
        | {"all_but": numbers(0.1 - cost)}
        for place, cost in enumerate(costs)
    ]
    streams = {"path": "streams", "snr_db": None, "alone": numbers(0.001), "all_but": numbers(0.0995)}
    return {"images": 256, "float": numbers(0.0), "all": numbers(0.1), "layers": [*rows, streams]}


def verification(layers: int) -> dict[str, Any]:
    paths = [layer_row(place, 4, layers)["path"] + ".stream" for place in range(layers)]
    rows = [{"layer": path, "equal": 0.99987, "within_one": 1.0, "largest_steps": 1} for path in paths]
    return {
        "passed": True,
        "images": IMAGES,
        "integer": verdict(1.0, 0.0, rows),
        "onnxruntime": verdict(1.0, 0.0, rows),
        "openvino": verdict(0.999, 0.0003, rows),
    }


def verdict(agreement: float, difference: float, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "passed": True,
        "agreement": agreement,
        "metric_difference": difference,
        "largest_difference": 0.0312,
        "first_diverging": None,
        "layers": list(rows),
    }
