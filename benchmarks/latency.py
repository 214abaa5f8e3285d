"""How fast integer files are against float files of the same network, in both engines, in one run.

    python benchmarks/latency.py                                   ResNet-18, MobileNetV2 at 224 pixels, ResNet-20 at 32
    python benchmarks/latency.py --model timm:resnet50 --size 224
    python benchmarks/latency.py --model timm:resnet18 --bits 8 4 2 1

Each network (random weights, ranges set on noise: speed and size do not depend on them) is quantized to W8A8 and W4A4
with 8-bit first and last layers and 8-bit residual streams, exported, and timed in turns with its float file: float32
and bf16 in OpenVINO, float32 in ONNX Runtime. A ratio above 1 means faster than the same engine's float32 file; the
interval is a 95 % bootstrap.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from galago.batch import Batch
from galago.data import Data, Loader, Normalize
from galago.deploy import onnx, openvino
from galago.deploy.integer import lower
from galago.deploy.runtime import Artifact, OnnxRuntime, OpenVINO
from galago.models.by_name import timm_model, torchvision_model
from galago.models.resnet import resnet20
from galago.probe import Deployed
from galago.probes.latency import compare
from galago.probes.size import bytes_on_disk
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.tasks.classify import Classify

DEFAULT = [("timm:resnet18", 224), ("timm:mobilenetv2_100", 224), ("galago:resnet20", 32)]


class Noise(Data):
    """Images of nothing, to set ranges on."""

    def __init__(self, size: int, classes: int) -> None:
        self.size, self.batch_size = size, 4
        self.classes = tuple(map(str, range(classes)))
        self.normalize = Normalize([0.5] * 3, [0.25] * 3)

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (4, 3, self.size, self.size), dtype=torch.uint8, generator=generator)
        return [Batch(images, torch.full((4, len(self.classes)), 1 / len(self.classes)))]

    def validation(self) -> Loader:
        return self.train()

    def example(self) -> Tensor:
        return next(iter(self.train())).input[:1]


def network(name: str) -> nn.Module:
    """A network by `timm:`, `torchvision:` or `galago:` name, with random weights."""
    source, _, model = name.partition(":")
    torch.manual_seed(0)
    if source == "timm":
        found = timm_model(model, classes=1000)
    else:
        found = torchvision_model(model, classes=1000) if source == "torchvision" else resnet20()
    for module in found.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # some start at 0, and OpenVINO stores weights that are alike only once
    return found


def quantized(name: str, data: Noise, bits: int) -> nn.Module:
    """The same network at so many bits, with 8-bit streams and 8-bit first and last layers."""
    weight, inputs = (EWGSWeight(bits), EWGS(bits)) if bits == 1 else (MinMaxWeight(bits), MinMax(bits))
    method = Quantize(weight, inputs, edge_weight=MinMaxWeight(), edge_input=MinMax(), stream=MinMax())
    return method.finish(method.prepare(network(name), data))


def files(name: str, size: int, widths: Sequence[int], folder: Path, threads: int) -> dict[str, Artifact]:
    """Every form of a network, ready to run."""
    task = Classify(10 if name.startswith("galago") else 1000)
    data = Noise(size, task.classes)
    floating = onnx.export(Deployed(network(name).eval(), data.normalize, task), data.example(), folder / "float.onnx")
    found: dict[str, Artifact] = {
        "ONNX Runtime, float32": OnnxRuntime(floating, threads),
        "OpenVINO, float32": OpenVINO(floating, threads),
        "OpenVINO, bf16": OpenVINO(floating, threads, "bf16"),
    }
    for bits in widths:
        integer = lower(quantized(name, data, bits), data.normalize(data.example()))
        deployed = Deployed(integer, data.normalize, task)
        packed, graph = folder / f"w{bits}.onnx", folder / f"w{bits}.xml"
        onnx.export(deployed, data.example(), packed)
        openvino.export(deployed, data.example(), graph)
        found[f"ONNX Runtime, W{bits}A{bits}"] = OnnxRuntime(packed, threads)
        found[f"OpenVINO, W{bits}A{bits}"] = OpenVINO(graph, threads)
    return found


def measured(name: str, size: int, batch: int, widths: Sequence[int], threads: int, seconds: float) -> Table:
    """One network's table."""
    table = Table(
        "file",
        "median ms",
        "p10 to p90",
        "faster than float32",
        "95 %",
        "MB",
        title=f"{name}, {size} px, batch {batch}",
    )
    with TemporaryDirectory() as folder:
        candidates = files(name, size, widths, Path(folder), threads)
        image = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        timings = compare(candidates, image, repeats=30, seconds=seconds)
        for label, timing in timings.items():
            ratio, low, high = timing.ratio_to(timings[f"{label.partition(',')[0]}, float32"])
            spread = f"{timing.p10_ms:.2f} to {timing.p90_ms:.2f}"
            size_mb = f"{bytes_on_disk(candidates[label].path) / 1e6:.2f}"
            table.add_row(label, f"{timing.median_ms:.2f}", spread, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", size_mb)
    return table


def main() -> None:
    """Reads the options and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="timm:NAME, torchvision:NAME or galago:resnet20")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], help="of the integer files, 1 to 8")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=2.0, help="at least so long for each file")
    given = parser.parse_args()
    for name, size in [(given.model, given.size)] if given.model else DEFAULT:
        Console(width=120).print(measured(name, size, given.batch, given.bits, given.threads, given.seconds))


if __name__ == "__main__":
    main()
