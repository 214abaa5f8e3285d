"""What each part of a method brings: shipped recipes with and without their parts, on one schedule and one seed.

    python benchmarks/parts.py                                  # all that is not done yet, then the tables
    python benchmarks/parts.py --only lbt oscillation --seeds 0 1
    python benchmarks/parts.py --table                          # only the tables of what is done

Every comparison takes a recipe of `recipes/quantize/`, shortens it and takes parts out or puts a baseline in. Runs are
trained and measured in PyTorch; what is shipped of them is tested and timed by `galago ship` with the recipe itself.
Finished runs are skipped and interrupted ones continued, so the command can be given again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml
from rich.console import Console
from rich.table import Table
from runs import Recipe, make, read, spread

Edit = Callable[[Recipe], None]


class Comparison(NamedTuple):
    """A recipe and what is changed in it, variant by variant."""

    recipe: str
    epochs: int
    variants: dict[str, Edit]


def keep(*names: str) -> Edit:
    """Leaves only the methods whose class path ends so, and no probes of the others."""

    def edit(recipe: Recipe) -> None:
        recipe["probes"] = []
        recipe["methods"] = [m for m in recipe["methods"] if m["class_path"].rpartition(".")[2] in names]

    return edit


def both(*edits: Edit) -> Edit:
    """One change after the other."""

    def edit(recipe: Recipe) -> None:
        for each in edits:
            each(recipe)

    return edit


def min_max_gradients(recipe: Recipe) -> None:
    """All of a gradient's range is rounded, whatever its distribution."""
    gradient = {"class_path": "galago.quantize.lbt.FixedInterval", "init_args": {"bits": 4}}
    recipe["methods"][1]["init_args"]["gradient"] = gradient


def from_scratch(recipe: Recipe) -> None:
    """Random weights, and SGD's usual rate for them."""
    recipe["model"].pop("init_args")
    recipe["optimizer"]["init_args"] |= {"lr": 0.1, "weight_decay": 0.0005, "nesterov": True}


def plain_sgd(recipe: Recipe) -> None:
    """SGD with momentum instead of GradBoost's."""
    arguments = recipe["optimizer"]["init_args"]
    arguments = {name: value for name, value in arguments.items() if name not in ("kappa", "fade", "released")}
    recipe["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": arguments}


def one_phase(recipe: Recipe) -> None:
    """No float phase: the schedule runs once."""
    recipe["schedule"] = recipe["schedule"]["init_args"]["schedule"]


def optimizer(name: str, **arguments: float) -> Edit:
    """Another of PyTorch's optimizers."""

    def edit(recipe: Recipe) -> None:
        recipe["optimizer"] = {"class_path": f"torch.optim.{name}", "init_args": arguments}

    return edit


def as_it_is(recipe: Recipe) -> None:
    """The recipe itself, but shorter."""


GRADIENTS: dict[str, Edit] = {
    "float": keep(),
    "4/4, gradients float": keep("Quantize"),
    "4/4/4, min-max gradients": min_max_gradients,
    "4/4/4, adaptive interval (LBT)": as_it_is,
}
LBT = "lbt_w4a4g4_resnet20_cifar10"
STAT_ASSIST = "statassist_gradboost_w8a8_resnet20_cifar10"
FREEZE = "lsq_w3a3_frozen_resnet20_cifar10"
COMPARISONS: dict[str, Comparison] = {
    "lbt": Comparison(LBT, 2, GRADIENTS),
    "lbt_scratch": Comparison(LBT, 3, {name: both(from_scratch, edit) for name, edit in GRADIENTS.items()}),
    "stat_assist": Comparison(
        STAT_ASSIST,
        3,
        {
            "float, SGD": both(keep(), plain_sgd, one_phase),
            "W8A8, SGD": both(keep("Quantize"), plain_sgd, one_phase),
            "W8A8, StatAssist, SGD": plain_sgd,
            "W8A8, GradBoost": both(keep("Quantize"), one_phase),
            "W8A8, StatAssist, GradBoost": as_it_is,
        },
    ),
    "oscillation": Comparison(
        FREEZE,
        2,
        {
            "LSQ W3A3": keep("Quantize"),
            "BatchNorm measured anew": keep("Quantize", "ReestimateNorm"),
            "frozen": keep("Quantize", "FreezeOscillations"),
            "frozen, BatchNorm measured anew": as_it_is,
        },
    ),
    "dampening": Comparison("lsq_w3a3_dampened_resnet20_cifar10", 2, {"damped": as_it_is}),
    "optimizers": Comparison(  # whose first step is to be there: galago ship --config .../reactnet_w1a1_cifar10.yaml
        "reactnet_w1a1_cifar10",
        3,
        {
            "Adam": as_it_is,
            "Adam, decay 5e-6": optimizer("Adam", lr=0.001, weight_decay=0.000005),
            "SGD, momentum, rate 0.1": optimizer("SGD", lr=0.1, momentum=0.9),
            "SGD, momentum, rate 0.01": optimizer("SGD", lr=0.01, momentum=0.9),
        },
    ),
    "mixed": Comparison(
        "mixed_w4_resnet20_cifar10", 2, {"4 bits in every layer": keep("Quantize"), "4 bits on average": as_it_is}
    ),
}


def shortened(comparison: Comparison, edit: Edit, seed: int, chosen: argparse.Namespace) -> Recipe:
    """The recipe of one run."""
    path = Path(__file__).parents[1] / "recipes" / "quantize" / f"{comparison.recipe}.yaml"
    recipe: Recipe = copy.deepcopy(yaml.safe_load(path.read_text()))
    epochs = chosen.epochs or comparison.epochs
    recipe |= {"seed": seed, "epochs": epochs}
    recipe["data"]["init_args"]["root"] = chosen.data
    if "epochs" in (schedule := recipe["schedule"].get("init_args", {})):
        schedule["epochs"] = epochs
    edit(recipe)
    recipe.pop("needs", None)  # of these the recipe's own training takes care
    recipe["probes"] = [*recipe.get("probes", ()), {"class_path": "galago.probes.calibration.Calibration"}]
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), help="these comparisons")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--epochs", type=int, help="of 40,000 images; a few are the default, others for each comparison"
    )
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's binary files")
    parser.add_argument("--runs", default="runs/parts", help="where runs are kept")
    parser.add_argument("--table", action="store_true", help="train nothing, only show what is done")
    chosen = parser.parse_args()
    for name in chosen.only:
        comparison = COMPARISONS[name]
        epochs = chosen.epochs or comparison.epochs
        made = Table("variant", "accuracy %", "ECE %", title=f"{name}: {comparison.recipe}, {epochs} epochs")
        for variant, edit in comparison.variants.items():
            found = []
            for seed in chosen.seeds:
                folder = "".join(letter if letter.isalnum() else "_" for letter in variant.lower())
                run = Path(chosen.runs) / f"{name}_{epochs}" / f"{folder}_seed{seed}"
                if not chosen.table:
                    make(run, shortened(comparison, edit, seed, chosen))
                found += [numbers] if (numbers := read(run / "metrics.json").get("model")) else []
            if found:
                made.add_row(variant, *(spread([100 * each[key] for each in found]) for key in ("accuracy", "ece")))
        Console(width=120).print(made)


if __name__ == "__main__":
    main()
