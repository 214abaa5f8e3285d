"""Every regularizer on one network and one short schedule: what each is worth for accuracy, and for trust.

    python benchmarks/regularizers.py                            # all that is not done yet, then the table
    python benchmarks/regularizers.py --only baseline cutmix rsc --seeds 0 1 2
    python benchmarks/regularizers.py --noise 0.4                # with 40 % of the labels drawn anew
    python benchmarks/regularizers.py --human cifar10n.npz       # with CIFAR-10N's worst labels, 40 % of them wrong
    python benchmarks/regularizers.py --tuned resnet20-12fca82f.th --epochs 2   # from published weights, at a low rate
    python benchmarks/regularizers.py --table                    # only the table of what is done

ResNet-20 from random weights on CIFAR-10. Each method is its recipe of `recipes/regularize/`, shortened: `--epochs`
over `--per-class` images of each class, 5,000 further training images set aside, on which temperatures are fitted. Test
images may be a thousand only: a point is ten of them. What is measured is what `galago trust` measures, corruptions
of severities 1, 3 and 5 and, as images from outside, digits of MNIST, blood cells and uniform noise. Finished runs are
skipped and interrupted ones continued, so the command can be given again, also twice at a time.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from runs import Recipe, damaged, galago, held_out, innermost, make, read, spread

RECIPES = Path(__file__).parents[1] / "recipes" / "regularize"
END = "_resnet20_cifar10"
METHODS = sorted(path.stem.removesuffix(END) for path in RECIPES.glob(f"*{END}.yaml"))
COMBINATIONS = (
    "cutout+label_smoothing",
    "mixup+label_smoothing",
    "cutmix+label_smoothing",
    "cutout+shake_drop",
    "cutmix+shake_drop",
)
SHARED = Path("../shared/data")
TUNED_RATE = 0.01


def named(name: str) -> str:
    """A name on the command line: one method, or several with `+` between them."""
    unknown = set(name.split("+")) - set(METHODS)
    if unknown:
        raise argparse.ArgumentTypeError(f"no recipe for {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    return name


def outside(chosen: argparse.Namespace) -> Recipe:
    """Images that are none of CIFAR-10's classes: two other data sets and noise."""
    digits = {"class_path": "galago.datasets.idx.MNIST", "init_args": {"root": str(Path(chosen.shared) / "mnist")}}
    cells = {"class_path": "galago.datasets.image_folder.ImageFolder", "init_args": {"root": chosen.cells, "size": 32}}
    sets = [
        {"class_path": "galago.outside.OtherData", "init_args": {"name": "mnist", "data": digits}},
        {"class_path": "galago.outside.OtherData", "init_args": {"name": "cells", "data": cells}},
        {"class_path": "galago.outside_made_up.Uniform", "init_args": {"images": 1000}},
    ]
    return {"class_path": "galago.probes.out_of_distribution.OutOfDistribution", "init_args": {"outside": sets}}


def recipe(name: str, seed: int, chosen: argparse.Namespace) -> Recipe:
    """The recipe of one run; of a combination that of the first with the methods of the others."""
    made: Recipe
    made, *others = [yaml.safe_load((RECIPES / f"{part}{END}.yaml").read_text()) for part in name.split("+")]
    made["methods"] = [method for one in (made, *others) for method in one.get("methods", [])]
    made |= {"seed": seed, "epochs": chosen.epochs, "probes": []}
    innermost(made["data"]).update({"root": chosen.data, "hold_out": 5000, "per_class": chosen.per_class})
    made["data"] = asked_for(made["data"], chosen)
    if "Growing" in made["data"]["class_path"]:
        stages = [chosen.epochs // 4] * 3 + [chosen.epochs // 2]
        made["epochs"] = sum(stages)
        made["data"]["init_args"]["epochs"] = made["schedule"]["init_args"]["epochs"] = stages
    for method in made["methods"]:
        if method["class_path"].endswith(".LabelRefinery"):  # whose sub-trainings are half as long
            method["init_args"]["epochs"] = max(1, chosen.epochs // 2)
        if method["class_path"].endswith(".Autogenous"):  # which groups classes by what a plain network confuses
            method["init_args"]["base"]["init_args"]["run"] = str(folder("baseline", seed, chosen))
    if chosen.tuned:
        made["model"]["init_args"] = {"weights": chosen.tuned}
        made["optimizer"]["init_args"]["lr"] = TUNED_RATE
    return made


def asked_for(data: Recipe, chosen: argparse.Namespace) -> Recipe:
    """The data set with the labels and sizes of classes that were asked for, in place of those of the recipe."""
    if data["class_path"].startswith("galago.datasets.degraded."):
        data = data["init_args"]["data"]
    if chosen.human:
        named = {"file": chosen.human, "key": "worse_label", "data": data}
        data = {"class_path": "galago.datasets.degraded.GivenLabels", "init_args": named}
    return damaged(data, chosen)


def folder(name: str, seed: int, chosen: argparse.Namespace) -> Path:
    """Where a run lies."""
    kind = f"{chosen.epochs}_epochs_{chosen.per_class}"
    kind += "_human" if chosen.human else ""
    kind += f"_noise{chosen.noise:g}" if chosen.noise else ""
    kind += f"_imbalance{chosen.imbalance:g}" if chosen.imbalance else ""
    kind += "_tuned" if chosen.tuned else ""
    return Path(chosen.runs) / kind / f"{name}_seed{seed}"


def trusted(run: Path) -> bool:
    """Whether a run was trained and everything of it measured."""
    return (run / "trust.json").exists()


def measure(run: Path, chosen: argparse.Namespace) -> None:
    """Trust, with images from outside and mixtures among the run's probes."""
    of_run = yaml.safe_load((run / "recipe.yaml").read_text())
    probes = [outside(chosen), {"class_path": "galago.probes.mixed_confidence.MixedConfidence"}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(of_run | {"probes": probes}, sort_keys=False))
    galago("trust", "--run", str(run), "--images", "1000", "--severities", "[1,3,5]", "--rounds", "50")


def numbers(run: Path) -> dict[str, float]:
    """What trust.json says of the trained network, and the accuracy on the images that were set aside."""
    rows = read(run / "trust.json").get("rows", [])
    return {row["metric"]: row["value"] for row in rows if row["form"] == "model"} | {"held_out": held_out(run)}


COLUMNS = {
    "held_out": ("held out: accuracy %", 100),
    "accuracy": ("test: accuracy %", 100),
    "ece": ("ECE %", 100),
    "ece_scaled": ("ECE % after T", 100),
    "temperature": ("T", 1),
    "nll": ("NLL", 1),
    "corruption_error": ("corruption error %", 100),
    "auroc_msp_mean": ("AUROC % (MSP)", 100),
    "auroc_energy_mean": ("AUROC % (energy)", 100),
    "linf_0.0314_fgsm_accuracy": ("FGSM: accuracy %", 100),
}


def table(chosen: argparse.Namespace) -> Table:
    """Mean and spread over seeds, a row a method."""
    made = Table("method", "seeds", *(title for title, _ in COLUMNS.values()))
    for name in chosen.only:
        runs = [run for seed in chosen.seeds if trusted(run := folder(name, seed, chosen))]
        found = [numbers(run) for run in runs]
        if found:
            cells = [spread([scale * one[key] for one in found]) for key, (_, scale) in COLUMNS.items()]
            made.add_row(name, str(len(found)), *cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*METHODS, *COMBINATIONS]
    parser.add_argument("--only", nargs="+", type=named, default=every, help="these, e.g. cutmix or cutmix+shake_drop")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--per-class", type=int, default=2000, help="training images of each class")
    parser.add_argument("--noise", type=float, default=0.0, help="share of training labels that are drawn anew")
    parser.add_argument("--imbalance", type=float, default=0.0, help="the largest class over the smallest")
    parser.add_argument("--human", help="file of labels that people gave, with `worse_label`")
    parser.add_argument("--tuned", help="file of weights to begin with")
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's binary files")
    parser.add_argument("--shared", default=str(SHARED), help="folder with mnist")
    parser.add_argument("--cells", default="data/cells", help="folder of recipes/bccd/crop_cells.py")
    parser.add_argument("--runs", default="runs/regularizers", help="where runs are kept")
    parser.add_argument("--table", action="store_true", help="train nothing, only show what is done")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    chosen = parser.parse_args()
    if not chosen.table:
        for seed in chosen.seeds:
            for name in chosen.only:
                run = folder(name, seed, chosen)
                make(run, recipe(name, seed, chosen), trusted, partial(measure, chosen=chosen))
    if chosen.json:
        runs = [folder(name, seed, chosen) for name in chosen.only for seed in chosen.seeds]
        print(json.dumps({str(run): numbers(run) for run in runs if trusted(run)}, indent=2))
    else:
        Console(width=200).print(table(chosen))


if __name__ == "__main__":
    main()
