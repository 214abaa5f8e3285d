"""Measuring a finished run: its model or the file made from it, with the same probes; speeds side by side.

Everything lands in the run's folder: metrics.json (numbers by model and file), predictions/*.npz (outputs and targets,
so that further figures need no second pass), layers.json (bits, cost and error layer by layer), sensitivity.json (what
each layer's rounding costs, where the recipe lists that probe), attention.npz (a few images and where the network
looked, where it has an attention branch) and latency.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from galago.console import say
from galago.deploy import onnx, runtime
from galago.deploy.inspect import engines_of_layers
from galago.deploy.report import attention
from galago.distill.branches import Parallel
from galago.distill.ensemble import Ensemble
from galago.layers import Wrapper, swap
from galago.models.attention_branch import attended_in, attention_maps
from galago.probe import Deployed, OutputProbe, Outputs, TaskMetrics, collect, spread
from galago.probes.calibration import Calibration
from galago.probes.cost import Cost, cost_table
from galago.probes.latency import Timing, compare
from galago.probes.sensitivity import Sensitivity
from galago.probes.size import Size
from galago.recipe import Parts, parts_of
from galago.regularize.auxiliary import Auxiliary
from galago.run import Run, atomic, load, normalization_of, read_json, write_json

NAMES = {".onnx": "onnx", ".xml": "openvino"}
SECONDS = 1.0  # that each network is timed at each size of batch


def measure_run(
    run: Path, artifact: Path | None = None, data_root: Path | None = None, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Measures a run's model, or the file in its place, on the test images; what was found.

    Args:
        run: folder of a finished run.
        artifact: an .onnx or .xml file made from it.
        data_root: where the images lie, if no longer where the recipe says.
        allow: packages to import from besides galago, torch, torchvision and timm.
    """
    files = Run(run)
    network = load(run, allow)
    parts = parts_of(files, allow, data_root)
    model = Deployed(network, normalization_of(network), parts.task)
    deployed = model if artifact is None else runtime.load(artifact)
    name = "model" if artifact is None else NAMES[artifact.suffix]
    outputs = collect(deployed, parts.data.test())
    numbers = _numbers(outputs, deployed, parts)
    known = read_json(files.metrics) if files.metrics.exists() else {}
    write_json(files.metrics, known | {name: numbers})
    _keep(files, name, outputs, parts.task.reservation(outputs.output.double()))
    if artifact is None:
        write_json(files.folder / "layers.json", layer_rows(network, model, parts, files))
        _look(files, model, parts)
        for probe in parts.probes:
            if isinstance(probe, Sensitivity) and (table := probe.table(model, parts.task, parts.data)):
                write_json(files.folder / "sensitivity.json", table)
    return numbers


def _numbers(outputs: Outputs, deployed: nn.Module, parts: Parts) -> dict[str, float]:
    found: dict[str, float] = {}
    for probe in [TaskMetrics(), *parts.probes, Calibration(), Cost(), Size()]:
        if isinstance(probe, OutputProbe):
            found |= probe.score(outputs, parts.task)
        else:
            found |= probe(deployed, parts.task, parts.data)
    return found


def _keep(files: Run, name: str, outputs: Outputs, reservation: Tensor | None) -> None:
    (files.folder / "predictions").mkdir(exist_ok=True)
    arrays = {"output": outputs.output.numpy(), "target": outputs.target.argmax(1).numpy()}
    if reservation is not None:
        arrays["reservation"] = reservation.numpy()
    with atomic(files.folder / "predictions" / f"{name}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _look(files: Run, deployed: Deployed, parts: Parts) -> None:
    """A few test images with the maps of a network that draws any."""
    if attended_in(deployed) is None:
        return
    batches = spread(parts.data.test(), attention.SHOWN)
    images, target = torch.cat([one.input for one in batches]), torch.cat([one.target for one in batches])
    maps, outputs = attention_maps(deployed, images), collect(deployed, batches)
    assert maps is not None, "there is a branch that draws them"
    arrays = {"image": images, "map": maps.float(), "target": target.argmax(1)}
    arrays["answer"] = parts.task.decisions(outputs.output)
    with atomic(files.folder / attention.FILE) as temporary, temporary.open("wb") as file:
        stored = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
        np.savez(file, allow_pickle=False, **stored, classes=np.array(parts.data.classes))


def layer_rows(network: nn.Module, deployed: Deployed, parts: Parts, files: Run) -> list[dict[str, Any]]:
    """Bits, cost and rounding error of each layer, and how each engine runs it where the files exist."""
    example = deployed.normalize(parts.data.example())
    engines = engines_of_layers(files)
    rows = []
    for cost in cost_table(network, example):
        row = cost._asdict() | {"weight_error_db": _error_db(network.get_submodule(cost.path))}
        rows.append(row | engines.get(cost.path, {"onnxruntime": None, "openvino": None}))
    return rows


def _error_db(layer: nn.Module) -> float | None:
    """Signal to quantization noise of a layer's weights in decibels, after the best common scale; None for float."""
    quantizer = getattr(layer, "weight_quantizer", None)
    if quantizer is None:
        return None
    with torch.no_grad():
        weight = layer.get_parameter("layer.weight").double().flatten()
        rounded = quantizer(layer.get_parameter("layer.weight")).double().flatten()
        fitted = rounded * (weight @ rounded) / (rounded @ rounded).clamp_min(1e-30)
        noise = (weight - fitted).square().sum().clamp_min(1e-30)
        return float(10 * torch.log10(weight.square().sum().clamp_min(1e-30) / noise))


def unwrapped(network: nn.Module) -> nn.Module:
    """The same network without quantizing wrappers: what it was before quantization, with today's weights."""
    for path, module in reversed(list(network.named_modules())):
        if isinstance(module, Wrapper) and not isinstance(module, Parallel | Ensemble | Auxiliary):
            network = swap(network, path, module.layer)
    return network


def measure_latency(
    run: Path, threads: int = 1, data_root: Path | None = None, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Times float fp32, float bf16 and the integer files in both engines, interleaved, at batch 1 and 32.

    The float files are the same network without its quantizers. Written to latency.json.
    """
    files, network = Run(run), load(run, allow)
    parts = parts_of(files, allow, data_root)
    example = parts.data.example()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        plain = Deployed(unwrapped(load(run, allow)), normalization_of(network), parts.task)
        floating = onnx.export(plain, example, Path(folder) / "float.onnx")
        engines = {
            ("onnxruntime", "fp32"): runtime.OnnxRuntime(floating, threads=threads),
            ("openvino", "fp32"): runtime.OpenVINO(floating, threads=threads),
            ("openvino", "bf16"): runtime.OpenVINO(floating, threads=threads, precision="bf16"),
        }
        if files.onnx.exists():
            engines["onnxruntime", "integer"] = runtime.OnnxRuntime(files.onnx, threads=threads)
        if files.openvino.exists():
            engines["openvino", "integer"] = runtime.OpenVINO(files.openvino, threads=threads)
        sizes = {"fp32": floating.stat().st_size, "bf16": floating.stat().st_size}
        for batch in (1, 32):
            image = example.repeat(batch, 1, 1, 1)
            timings = compare({f"{e} {p}": engine for (e, p), engine in engines.items()}, image, seconds=SECONDS)
            rows += [_row(e, p, batch, threads, timings, sizes.get(p) or _size(files, e)) for e, p in engines]
    advice = advise(rows)
    found = {"image": "×".join(map(str, example.shape[1:])), "rows": rows, "advice": advice}
    write_json(files.folder / "latency.json", found)
    say(advice)
    return found


def _row(
    engine: str, precision: str, batch: int, threads: int, timings: dict[str, Timing], size: int
) -> dict[str, Any]:
    timing = timings[f"{engine} {precision}"]
    ratio, low, high = timing.ratio_to(timings[f"{engine} fp32"])
    return {
        "name": f"{precision}, {'ONNX Runtime' if engine == 'onnxruntime' else 'OpenVINO'}",
        "engine": engine,
        "precision": precision,
        "batch": batch,
        "threads": threads,
        "median_ms": timing.median_ms,
        "p10_ms": timing.p10_ms,
        "p90_ms": timing.p90_ms,
        "images_per_second": 1000 * batch / timing.median_ms,
        "file_mb": size / 1e6,
        "ratio": ratio,
        "low": low,
        "high": high,
    }


def _size(files: Run, engine: str) -> int:
    paths = [files.onnx] if engine == "onnxruntime" else [files.openvino, files.openvino.with_suffix(".bin")]
    return sum(path.stat().st_size for path in paths)


def advise(rows: Sequence[dict[str, Any]]) -> str:
    """Which file to use on this machine, for one image at a time."""
    single = [row for row in rows if row["batch"] == 1]
    best = min(single, key=lambda row: float(row["median_ms"]))
    slower = [row for row in single if row["precision"] == "integer" and row["low"] is not None and row["high"] < 1]
    text = f"Fastest here for one image: {best['name']}, {best['median_ms']:.3g} ms."
    if slower:
        text += " Slower than its float file: " + "; ".join(row["name"] for row in slower) + "."
    return text
