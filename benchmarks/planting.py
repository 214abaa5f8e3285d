"""Accuracy against parameters: a network that grows by planting, by lot, and the grown one trained from scratch.

    python benchmarks/planting.py                               # all that is not done yet, then the tables
    python benchmarks/planting.py --epochs 200 --seeds 0 1
    python benchmarks/planting.py --teacher resnet20 --epochs 20 --first 8 --every 2 --trial 30     # in an hour
    python benchmarks/planting.py --table                       # only the tables of what is done

`recipes/distill/planting_cifar10.yaml` is trained as it is; with layers chosen at random in place of those that gain
most; and the network that it ends with from random weights, for as many epochs, with the teacher and without. What is
measured after each epoch is measured on the images that layers are chosen on, the last row of each on the test set.
Finished runs are skipped and interrupted ones continued, so the command can be given again.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from galago.distill.planting import Planting
from galago.distill.widen import Junction
from galago.recipe import train_recipe
from galago.run import Run, read_json
from galago.spec import rebuild

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "distill" / "planting_cifar10.yaml"
VARIANTS = ("planted", "planted at random", "same network, distilled", "same network, labels alone")


class AtRandom(Planting):
    """Planting that chooses layers by lot. As always, channels stay only where the loss is lower with them."""

    def score(self, model: nn.Module, place: Junction, gain: float) -> float:
        number = sum(map(ord, place.layer)) + 1000 * len(self.planted)
        return float(torch.rand((), generator=torch.Generator().manual_seed(number)))


def teacher(chosen: argparse.Namespace) -> str:
    """The name of its recipe in `recipes/published`."""
    return f"{chosen.teacher}_cifar10"


def like(run: Path) -> nn.Module:
    """The network that a run ended with, with fresh weights."""
    record = read_json(Run(run).architecture)
    made = rebuild(record)
    made.__dict__["built_from"] = record["model"]
    return made


def varied(variant: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """The recipe of one run."""
    recipe: dict[str, Any] = copy.deepcopy(yaml.safe_load(RECIPE.read_text()))
    epochs = chosen.epochs or recipe["epochs"]
    recipe |= {"run": str(folder(variant, seed, epochs, chosen)), "seed": seed, "epochs": epochs, "needs": []}
    recipe["data"]["init_args"]["root"] = chosen.data
    recipe["schedule"]["init_args"]["epochs"] = epochs
    (method,) = recipe["methods"]
    method["init_args"]["distill"]["init_args"]["teacher"]["init_args"]["run"] = f"runs/published/{teacher(chosen)}"
    for name in ("first", "every", "trial"):
        if (given := getattr(chosen, name)) is not None:
            for place in (recipe["schedule"], method):
                if name in place["init_args"]:
                    place["init_args"][name] = given
    if variant == "planted at random":
        method["class_path"] = "__main__.AtRandom"
        method["init_args"]["patience"] = epochs  # a lot that gains nothing says nothing about the next one
    if variant.startswith("same network"):
        grown = folder("planted", seed, epochs, chosen)
        recipe["model"] = {"class_path": "__main__.like", "init_args": {"run": str(grown)}}
        recipe["schedule"] = {"class_path": "galago.schedule.Cosine"}
        recipe["methods"] = [method["init_args"]["distill"]] if variant.endswith("distilled") else []
    return recipe


def folder(variant: str, seed: int, epochs: int, chosen: argparse.Namespace) -> Path:
    """Where a run lies."""
    name = "".join(c if c.isalnum() else "_" for c in variant)
    return Path(chosen.runs) / f"{chosen.teacher}_{epochs}_epochs" / f"{name}_seed{seed}"


def train(recipe: dict[str, Any]) -> None:
    """One run, unless it is done."""
    written = Path(recipe["run"]).with_suffix(".yaml")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(yaml.safe_dump(recipe, sort_keys=False))
    train_recipe(["--config", str(written)])


def table(run: Run) -> Table:
    """Accuracy before each planting, and at the end."""
    made = Table("parameters", "accuracy %")
    lines = [line for line in run.history() if line["kind"] == "epoch"]
    for line in {line["parameters"]: line for line in lines}.values():  # the last of each size
        made.add_row(f"{line['parameters']:,.0f}", f"{100 * line['accuracy']:.2f}")
    if run.metrics.exists():
        last = read_json(run.metrics)["model"]
        made.add_row(f"{last['parameters']:,.0f}, test set", f"{100 * last['accuracy']:.2f}", style="bold")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, help="these variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, help="all of them; the recipe's by default, as the next three")
    parser.add_argument("--first", type=int, help="epochs before the first planting")
    parser.add_argument("--every", type=int, help="epochs between two")
    parser.add_argument("--trial", type=int, help="batches that each layer is tried with")
    parser.add_argument("--teacher", choices=("resnet20", "resnet56"), default="resnet56", help="published")
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's binary files")
    parser.add_argument("--runs", default="runs/planting", help="where runs are kept")
    parser.add_argument("--table", action="store_true", help="train nothing, only show what is done")
    chosen = parser.parse_args()
    if not chosen.table:
        train_recipe(["--config", str(ROOT / "recipes" / "published" / f"{teacher(chosen)}.yaml")])
    for seed in chosen.seeds:
        for variant in chosen.only:
            recipe = varied(variant, seed, chosen)
            if not chosen.table:
                train(recipe)
            if (run := Run(recipe["run"])).log.exists():
                Console(width=120).print(f"{variant}: {run.folder}", table(run))


if __name__ == "__main__":
    main()
