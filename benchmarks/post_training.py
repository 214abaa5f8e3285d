"""Quantization without training, way by way: what each repair is worth against rounding to the nearest.

    python benchmarks/post_training.py                         # ResNet-20, all that is not done yet, then the table
    python benchmarks/post_training.py --network resnet56 --widths 8/8 4/8 --only nearest AdaRound GPTQ
    python benchmarks/post_training.py --few                   # two-stage distillation from few images
    python benchmarks/post_training.py --table

Published float weights, calibration on training images without labels and without augmentation, accuracy on the test
images. First and last layers and streams have 8 bits; ranges are searched (weights by the 2.4th power of the error,
inputs by percentile at 8 bits, by squared error below; learned steps where a way learns them). Few iterations at a high
rate, as each cell is to take minutes on one core; the papers have 10,000 to 20,000 at 0.001.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from galago.data import Data
from galago.datasets.cifar import CIFAR10
from galago.method import Method
from galago.models.resnet import resnet20, resnet56
from galago.probes.calibration import Calibration
from galago.probes.saturation import Saturation
from galago.quantize.adaround import AdaRound
from galago.quantize.brecq import BRECQ
from galago.quantize.calibrated import Calibrated, CalibratedWeight
from galago.quantize.correct_bias import CorrectBias
from galago.quantize.equalize import Equalize
from galago.quantize.few_images import FewImages
from galago.quantize.gptq import GPTQ
from galago.quantize.group_wise import GroupWiseWeight
from galago.quantize.lsq import LSQ
from galago.quantize.quantize import Quantize
from galago.quantize.quantizer import Quantizer
from galago.run import read_json, write_json
from galago.tasks.classify import Classify
from galago.train import train

PUBLISHED = Path("../shared/data/pretrained-cifar10-resnet")
NETWORKS = {"resnet20": (resnet20, "resnet20-12fca82f.th"), "resnet56": (resnet56, "resnet56-4bfd9763.th")}
Way = Callable[[int, int], list[Method]]


def quantize(
    weight_bits: int, input_bits: int, weight: Quantizer | None = None, learned: bool = False, **options: Any
) -> Quantize:
    """The common part of all ways."""
    searched = Calibrated(input_bits, "percentile" if input_bits == 8 else "mse")
    return Quantize(
        weight or CalibratedWeight(weight_bits),
        LSQ(input_bits) if learned else searched,
        edge_weight=CalibratedWeight(),
        edge_input=Calibrated(),
        stream=Calibrated(),
        batches=8,
        post_training=True,
        **options,
    )


ITERATIONS, RATE = 300, 0.03
WAYS: dict[str, Way] = {
    "nearest": lambda w, a: [quantize(w, a)],
    "nearest, weights of 7 bits": lambda w, a: [quantize(w, a, reduce_range=True)],
    "nearest, min-max ranges": lambda w, a: [quantize(w, a, CalibratedWeight(w, "min_max"))],
    "nearest, a range a tensor": lambda w, a: [quantize(w, a, CalibratedWeight(w, per_channel=False))],
    "equalized, a range a tensor": lambda w, a: [Equalize(), quantize(w, a, CalibratedWeight(w, per_channel=False))],
    "bias correction": lambda w, a: [quantize(w, a), CorrectBias()],
    "GPTQ": lambda w, a: [quantize(w, a), GPTQ()],
    "AdaRound": lambda w, a: [quantize(w, a), AdaRound(ITERATIONS, rate=RATE)],
    "BRECQ": lambda w, a: [
        quantize(w, a, learned=True),
        BRECQ(ITERATIONS, rate=RATE, scale_iterations=150, scale_rate=1e-3),
    ],
    "QDrop": lambda w, a: [quantize(w, a, learned=True), BRECQ(ITERATIONS, rate=RATE, drop=0.5, scale_iterations=0)],
}


def few(images: int, groups: int | None, independent: bool, joint: bool) -> Way:
    """Two-stage distillation from so many images a class, with so many groups of channels (none: a range a channel)."""

    def way(weight_bits: int, input_bits: int) -> list[Method]:
        weight = GroupWiseWeight(weight_bits, groups=groups) if groups else None
        stages = FewImages(150, images=images, independent=independent, joint=joint, rate=1e-3)
        return [quantize(weight_bits, input_bits, weight, learned=True), *([stages] if independent or joint else [])]

    return way


BOTH = (True, True)
FEW: dict[str, Way] = {
    **{f"{n} images a class, 4 groups, both stages": few(n, 4, *BOTH) for n in (1, 5, 10, 50)},
    "10 images a class, 4 groups, first stage only": few(10, 4, True, False),
    "10 images a class, 4 groups, second stage only": few(10, 4, False, True),
    "10 images a class, 4 groups, no stage": few(10, 4, False, False),
    "10 images a class, 1 group, both stages": few(10, 1, *BOTH),
    "10 images a class, 16 groups, both stages": few(10, 16, *BOTH),
    "10 images a class, a range a channel, both stages": few(10, None, *BOTH),
}


def data(root: str) -> Data:
    """CIFAR-10 as the published weights know it, not augmented."""
    return CIFAR10(root, batch_size=128, augment=[], mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def cell(way: Way | None, network: str, widths: str, seed: int, root: str) -> dict[str, float]:
    """What one way makes of the network; none: the float network."""
    make, weights = NETWORKS[network]
    weight_bits, input_bits = map(int, widths.split("/"))
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        methods = [] if way is None else way(weight_bits, input_bits)
        probes = [Calibration(), Saturation()]
        train(
            make(weights=PUBLISHED / weights), Classify(10), data(root), run, 0, methods, probes=probes, seed=seed,
            accelerator="cpu",
        )  # fmt: skip
        numbers: dict[str, float] = read_json(run / "metrics.json")["model"]
    return numbers | {"seconds": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--widths", nargs="+", default=["8/8", "4/8", "4/4"], help="bits of weights/inputs")
    parser.add_argument("--only", nargs="+", help="these ways")
    parser.add_argument("--few", action="store_true", help="the ways with few images instead")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="other calibration images each")
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's binary files")
    parser.add_argument("--results", default="runs/post_training", help="folder for a JSON file a cell")
    parser.add_argument("--table", action="store_true", help="only show what is done")
    chosen = parser.parse_args()
    ways = {"float": None, **(FEW if chosen.few else WAYS)}
    made = Table("way", *(f"W{w.replace('/', 'A')}" for w in chosen.widths), title=chosen.network)
    for name, way in ways.items():
        if chosen.only and name not in (*chosen.only, "float"):
            continue
        row = [cell_text(name, way, widths, chosen) for widths in chosen.widths]
        made.add_row(name, *row)
    Console(width=160).print(made)


def cell_text(name: str, way: Way | None, widths: str, chosen: argparse.Namespace) -> str:
    """A cell of the table, measured first if need be: accuracy, calibration error, seconds of one core."""
    found = []
    for seed in chosen.seeds:
        path = (
            Path(chosen.results) / chosen.network / widths.replace("/", "_") / f"{name.replace(' ', '_')}_{seed}.json"
        )
        if not path.exists() and not chosen.table:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, cell(way, chosen.network, widths, seed, chosen.data))
            print(widths, name, seed, path.read_text().replace("\n", ""), flush=True)
        found += [json.loads(path.read_text())] if path.exists() else []
    if not found:
        return ""
    accuracy = ", ".join(f"{100 * numbers['accuracy']:.1f}" for numbers in found)
    saturating = found[0].get("saturating_accuracy")
    old = "" if saturating is None else f"; saturating {100 * saturating:.1f}"
    return f"{accuracy} (ECE {100 * found[0]['ece']:.1f}{old}; {found[0]['seconds']:.0f} s)"


if __name__ == "__main__":
    main()
