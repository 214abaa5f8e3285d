"""Few images of each class: networks and ways of augmenting, by how many images there are.

    python benchmarks/small_data.py                                    # all that is not done yet, then the table
    python benchmarks/small_data.py --images 10 40 160 --models cnn8 cnn32 --modes none dynamic
    python benchmarks/small_data.py --steps 1000 --repetitions 3
    python benchmarks/small_data.py --table                            # only the table of what is done

The protocol of Brigato and Iocchi, "A Close Look at Deep Learning with Small Data" (arXiv:2003.12843), recalled in
outline: n images of each class of CIFAR-10, drawn anew in each repetition (ten for n ≤ 80, five otherwise, unless
`--repetitions` says how many), the full test set, mean and standard deviation. All train for the same number of steps,
up to rounding to whole epochs, whatever n is. Settings are fixed beforehand and the last weights count: nothing is
chosen on test images.

Models: cnn8, cnn16 and cnn32 (`galago.models.small`, by width) with dropout and `-plain` without, ResNet-20. Modes:
`none` shows the images as they are, `dynamic` other crops and flips in every epoch, `static` four fixed copies of each
image beside it, `reconstruct` is `dynamic` with a decoder that rebuilds the image (`galago.regularize.reconstruct`).
Finished runs are skipped and interrupted ones continued, so the command can be given again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from runs import Recipe, make, measured, read, spread

from galago.spec import build

RECIPE = Path(__file__).parents[1] / "recipes" / "regularize" / "small_data_cifar10.yaml"
IMAGES = (10, 20, 40, 80, 160, 320, 640, 1280)
MODES = ("none", "dynamic", "static", "reconstruct")
CLASSES, COPIES = 10, 4


def cnn(width: int, dropout: float = 0.4) -> Recipe:
    """A small network's place in a recipe."""
    return {"class_path": "galago.models.small.cnn_lc", "init_args": {"width": width, "dropout": dropout}}


MODELS: dict[str, Recipe] = {
    **{f"cnn{width}": cnn(width) for width in (8, 16, 32)},
    **{f"cnn{width}-plain": cnn(width, 0.0) for width in (8, 16, 32)},
    "resnet20": {"class_path": "galago.models.resnet.resnet20"},
}


def length(images: int, batch: int, steps: int) -> tuple[int, int]:
    """Passes an epoch and epochs, from 3 to 15, that are nearest to so many steps from above.

    Args:
        images: training images, copies included.
        batch: images a step.
        steps: the budget.
    """
    passes = math.ceil(steps / (images // batch))
    epochs = min(range(15, 2, -1), key=lambda count: count * math.ceil(passes / count))
    return math.ceil(passes / epochs), epochs


def recipe(model: str, mode: str, images: int, repetition: int, chosen: argparse.Namespace) -> Recipe:
    """The recipe of one run."""
    made: Recipe = yaml.safe_load(RECIPE.read_text())
    batch = min(32, images * CLASSES)
    data: Recipe = {
        "class_path": "galago.datasets.cifar.CIFAR10",
        "init_args": {"root": chosen.data, "batch_size": batch, "per_class": images, "split_seed": repetition},
    }
    if mode == "none":
        data["init_args"]["augment"] = []
    if mode == "static":
        arguments = {"copies": COPIES, "copies_seed": repetition, "data": data}
        data = {"class_path": "galago.datasets.fixed_copies.FixedCopies", "init_args": arguments}
    if mode == "reconstruct":
        made["methods"] = [{"class_path": "galago.regularize.reconstruct.Reconstruct"}]
    shown = images * CLASSES * (1 + COPIES if mode == "static" else 1)
    times, epochs = length(shown, batch, chosen.steps)
    made["data"] = {"class_path": "galago.datasets.repeated.Repeated", "init_args": {"times": times, "data": data}}
    return made | {"model": MODELS[model], "epochs": epochs, "seed": repetition}


def folder(model: str, mode: str, images: int, repetition: int, chosen: argparse.Namespace) -> Path:
    """Where a run lies."""
    return Path(chosen.runs) / f"{chosen.steps}_steps" / f"{model}_{mode}" / f"{images}_images_{repetition}"


def repetitions(images: int, chosen: argparse.Namespace) -> range:
    """More where fewer images make results scatter."""
    return range(chosen.repetitions or (10 if images <= 80 else 5))


def accuracies(model: str, mode: str, images: int, chosen: argparse.Namespace) -> list[float]:
    """In percent, of the repetitions that are done."""
    runs = [folder(model, mode, images, number, chosen) for number in repetitions(images, chosen)]
    return [100 * read(run / "metrics.json")["model"]["accuracy"] for run in runs if measured(run)]


def table(chosen: argparse.Namespace) -> Table:
    """Accuracy on the test images by how many training images of each class there are."""
    made = Table("model", "parameters", "mode", *map(str, chosen.images))
    made.caption = "test accuracy in %: mean ± standard deviation (repetitions), by images of each class"
    for model in chosen.models:
        size = sum(parameter.numel() for parameter in build(MODELS[model]).parameters())
        for mode in chosen.modes:
            found = [accuracies(model, mode, images, chosen) for images in chosen.images]
            cells = [f"{spread(each, digits=1)} ({len(each)})" if each else "" for each in found]
            if any(cells):
                made.add_row(model, f"{size:,}", mode, *cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=int, default=list(IMAGES), help="of each class")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=5000, help="that each training takes")
    parser.add_argument("--repetitions", type=int, help="10 up to 80 images of each class and 5 beyond, by default")
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's binary files")
    parser.add_argument("--runs", default="runs/small_data", help="where runs are kept")
    parser.add_argument("--table", action="store_true", help="train nothing, only show what is done")
    chosen = parser.parse_args()
    if not chosen.table:
        for images in chosen.images:
            for repetition in repetitions(images, chosen):
                for model in chosen.models:
                    for mode in chosen.modes:
                        run = folder(model, mode, images, repetition, chosen)
                        make(run, recipe(model, mode, images, repetition, chosen))
    Console(width=160).print(table(chosen))


if __name__ == "__main__":
    main()
