"""What shrinking does to trust: ResNet-20 on CIFAR-10 in float and at 8, 4 and 2 bits, with their files.

    python benchmarks/trust.py                          # all that is not done yet, then the table
    python benchmarks/trust.py --table                  # only the table of what is done

The float network is the published one (`recipes/published/resnet20_cifar10.yaml`); the others are the runs of
`recipes/quantize/lsq_w8a8…`, `…w4a4…` and `…w2a2…`, trained from it with `galago ship --config RECIPE`; `control` is
trained on as long as the last of them, in float, which tells what the training did from what the bits did. Each is
measured by `galago trust` against the float one, on a thousand test images: all corruptions at severities 1, 3 and 5,
and as images from outside digits of MNIST, blood cells and uniform noise. All of these networks have seen every
training image, so temperatures are fitted on the test images themselves: one number for a thousand images, which
flatters little.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import yaml
from regularizers import outside
from rich.console import Console
from rich.table import Table
from runs import Recipe, galago, innermost, make, read

CONTROL = "control"  # in float, trained on with the recipe of the fewest bits
BITS = ("w8a8", "w4a4", "w2a2")
RECIPES = Path(__file__).parents[1] / "recipes" / "quantize"
METRICS = {
    "accuracy": ("accuracy %", 100),
    "ece": ("ECE %", 100),
    "nll": ("NLL", 1),
    "temperature": ("T", 1),
    "ece_scaled": ("ECE % after T", 100),
    "nll_scaled": ("NLL after T", 1),
    "aurc_confidence": ("AURC × 100", 100),
    "corruption_error": ("corruption error %", 100),
    "corruption_ece": ("ECE % corrupted", 100),
    "auroc_msp_mnist": ("AUROC % MSP: MNIST", 100),
    "auroc_msp_cells": ("AUROC % MSP: cells", 100),
    "auroc_msp_uniform": ("AUROC % MSP: noise", 100),
    "auroc_energy_mean": ("AUROC % energy, mean", 100),
    "linf_0.00392_fgsm_accuracy": ("FGSM 1/255 %", 100),
    "linf_0.00392_pgd_accuracy": ("PGD 1/255 %", 100),
    "linf_0.00392_transfer_accuracy": ("PGD 1/255 of the float network %", 100),
}


def control(chosen: argparse.Namespace) -> Recipe:
    """The recipe of the network that stays float."""
    recipe: Recipe = yaml.safe_load((RECIPES / f"{chosen.method}_{BITS[-1]}_resnet20_cifar10.yaml").read_text())
    recipe["data"]["init_args"]["root"] = chosen.data
    return recipe | {"methods": []}


def prepared(run: Path, chosen: argparse.Namespace) -> None:
    """Puts the images from outside and a weak attack into the recipe of a finished run."""
    recipe: Recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    attack = {
        "ball": {"class_path": "galago.attacks.Linf", "init_args": {"epsilon": 1 / 255}},
        "surrogate": chosen.float,
    }
    weak = {"class_path": "galago.probes.adversarial.Adversarial", "init_args": attack}
    recipe["probes"] = [outside(chosen), weak]
    recipe["data"] = copy.deepcopy(recipe["data"])
    innermost(recipe["data"])["root"] = chosen.data
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def table(chosen: argparse.Namespace) -> Table:
    """A row a number, a column a form of the network."""
    columns = [(bits, form) for bits in ("float", CONTROL, *BITS) for form in forms(bits)]
    made = Table("", *[f"{bits}: {form}" for bits, form in columns])
    for metric, (title, scale) in METRICS.items():
        found = [rows(chosen, bits).get((source(bits, form), metric)) for bits, form in columns]
        made.add_row(title, *[_cell(row, scale) for row in found])
    return made


def forms(bits: str) -> tuple[str, ...]:
    return ("model",) if bits in ("float", CONTROL) else ("model", "onnx", "openvino")


def source(bits: str, form: str) -> str:
    return "before" if bits == "float" else form


def rows(chosen: argparse.Namespace, bits: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Every number of trust.json by form and name; the float network's from the first of the others."""
    written = read(run_of(chosen, BITS[0] if bits == "float" else bits) / "trust.json")
    return {(row["form"], row["metric"]): row for row in written.get("rows", [])}


def run_of(chosen: argparse.Namespace, bits: str) -> Path:
    return Path(chosen.runs) / f"{chosen.method}_{bits}_resnet20_cifar10"


def _cell(row: dict[str, Any] | None, scale: int) -> str:
    if row is None:
        return ""
    interval = "" if row["low"] is None else f" ({scale * row['low']:.1f} to {scale * row['high']:.1f})"
    return f"{scale * row['value']:.{1 if scale == 100 else 2}f}" + (interval if scale == 100 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lsq", help="whose runs: lsq or ewgs")
    parser.add_argument("--only", nargs="+", choices=(CONTROL, *BITS), default=(CONTROL, *BITS), help="measure these")
    parser.add_argument("--runs", default="runs/quantize", help="where the runs of recipes/quantize are")
    parser.add_argument("--float", default="runs/published/resnet20_cifar10", help="the float run")
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's binary files")
    parser.add_argument("--shared", default="../shared/data", help="folder with mnist")
    parser.add_argument("--cells", default="data/cells", help="folder of recipes/bccd/crop_cells.py")
    parser.add_argument("--table", action="store_true", help="measure nothing, only show what is done")
    chosen = parser.parse_args()
    if CONTROL in chosen.only and not chosen.table:
        make(run_of(chosen, CONTROL), control(chosen))
    for bits in () if chosen.table else chosen.only:
        run = run_of(chosen, bits)
        prepared(run, chosen)
        if bits != CONTROL:
            galago("export", "--run", str(run))
        galago("trust", "--run", str(run), "--against", chosen.float, "--images", "1000", "--severities", "[1,3,5]")
    Console(width=240).print(table(chosen))


if __name__ == "__main__":
    main()
