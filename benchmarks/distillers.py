"""Every distillation method with one student, one teacher, one short schedule: what each is worth.

    python benchmarks/distillers.py                             # all that is not done yet, then the table
    python benchmarks/distillers.py --only plain kd at --seeds 0 1 2
    python benchmarks/distillers.py --noise 0.4                 # with 40 % of the labels drawn anew
    python benchmarks/distillers.py --imbalance 50              # with rare classes
    python benchmarks/distillers.py --student mobilenet_v2    # another gap to the teacher
    python benchmarks/distillers.py --bits 2 --only plain kd at fitnet ffl    # students that are quantized (EWGS)
    python benchmarks/distillers.py --trust                     # corrupted images, too, for all that is trained
    python benchmarks/distillers.py --table                     # only the table of what is done

ResNet-20 from random weights; the teacher, where there is one, is the published ResNet-56. Each method is its recipe of
`recipes/distill/`, shortened; `plain` is the same without a method. Under noise and imbalance the teacher stays the
published one, which has seen clean labels. With `--bits` students begin with published float weights, as in
`recipes/distill/kd_w2a2_resnet20_cifar10.yaml`. 5,000 training images are set aside, on which accuracy is measured
beside the test images, of which there may be a thousand only (the teacher has seen them, no student has, but for its
first weights). `--trust` shows a thousand test images under 15 corruptions at severities 1, 3 and 5. Runs are trained
and measured in PyTorch; `galago ship` with the recipe itself makes and proves the file. Finished runs are skipped and
interrupted ones continued, so the command can be given again.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from runs import Recipe, damaged, galago, held_out, make, measured, read, spread

RECIPES = Path(__file__).parents[1] / "recipes"
TEACHER = "published/resnet56_cifar10"
WITH_TEACHER = ("kd", "dkd", "dist", "at", "fitnet", "fsp", "rkd", "sp", "crd", "bss", "ensemble")
METHODS = ("plain", *WITH_TEACHER, "dml", "one", "ffl", "oskd", "dml_mixed", "ffl_mixed")
STUDENTS: dict[str, Recipe] = {
    "resnet20": {"class_path": "galago.models.resnet.resnet20"},
    "resnet32": {"class_path": "galago.models.resnet.resnet32"},
    "mobilenet_v2": {"class_path": "galago.models.mobilenet.mobilenet_v2", "init_args": {"width": 0.5}},
}


def recipe(name: str, seed: int, chosen: argparse.Namespace) -> Recipe:
    """The recipe of one run."""
    path = RECIPES / "distill" / f"{'kd' if name == 'plain' else name}_resnet20_cifar10.yaml"
    made: Recipe = yaml.safe_load(path.read_text())
    made |= {"seed": seed, "epochs": chosen.epochs}
    made["model"] = copy.deepcopy(STUDENTS[chosen.student])
    made["data"]["init_args"] |= {"root": chosen.data, "hold_out": 5000}
    made["data"] = damaged(made["data"], chosen)
    made["probes"] = [*made.get("probes", ()), {"class_path": "galago.probes.calibration.Calibration"}]
    if name == "plain":
        made["methods"] = []
    if chosen.bits:
        quantized(made, chosen.bits)
    return made


def quantized(made: Recipe, bits: int) -> None:
    """The recipe with the network, the quantizers and the optimizer of the 2-bit recipe, at so many bits."""
    low: Recipe = yaml.safe_load((RECIPES / "distill" / "kd_w2a2_resnet20_cifar10.yaml").read_text())
    quantize = low["methods"][0]
    for side in ("weight", "input"):
        quantize["init_args"][side]["init_args"]["bits"] = bits
    made |= {"model": low["model"], "optimizer": low["optimizer"], "methods": [quantize, *made["methods"]]}


def folder(name: str, seed: int, chosen: argparse.Namespace) -> Path:
    """Where a run lies."""
    kind = f"{chosen.student}_{chosen.epochs}"
    kind += f"_w{chosen.bits}a{chosen.bits}" if chosen.bits else ""
    kind += f"_noise{chosen.noise:g}" if chosen.noise else ""
    kind += f"_imbalance{chosen.imbalance:g}" if chosen.imbalance else ""
    return Path(chosen.runs) / kind / f"{name}_seed{seed}"


def finished(name: str, chosen: argparse.Namespace) -> list[Path]:
    """A method's runs that are trained and measured."""
    return [run for seed in chosen.seeds if measured(run := folder(name, seed, chosen))]


def corruption_error(run: Path) -> float | None:
    """Mean error on corrupted images, where `galago trust` has measured it."""
    rows = read(run / "trust.json").get("rows", ())
    return next((row["value"] for row in rows if row["metric"] == "corruption_error"), None)


def table(chosen: argparse.Namespace) -> Table:
    """Mean and spread over seeds."""
    made = Table("method", "seeds", "held out: accuracy %", "test: accuracy %", "ECE %", "NLL", "corrupted: error %")
    for name in chosen.only:
        runs = finished(name, chosen)
        found = [read(run / "metrics.json")["model"] for run in runs]
        if found:
            aside = spread([100 * held_out(run) for run in runs])
            shares = [spread([100 * each[key] for each in found]) for key in ("accuracy", "ece")]
            errors = [100 * error for run in runs if (error := corruption_error(run)) is not None]
            corrupted = spread(errors) if errors else ""
            made.add_row(name, str(len(found)), aside, *shares, spread([each["nll"] for each in found]), corrupted)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="these methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--student", choices=STUDENTS, default="resnet20")
    parser.add_argument("--noise", type=float, default=0.0, help="share of training labels that are drawn anew")
    parser.add_argument("--imbalance", type=float, default=0.0, help="the largest class over the smallest")
    parser.add_argument("--bits", type=int, default=0, help="of the student's weights and inputs; float without it")
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's binary files")
    parser.add_argument("--runs", default="runs/distillers", help="where runs are kept")
    parser.add_argument("--trust", action="store_true", help="train nothing, ask what is done about corrupted images")
    parser.add_argument("--table", action="store_true", help="train nothing, only show what is done")
    chosen = parser.parse_args()
    if chosen.trust:
        for run in [run for name in chosen.only for run in finished(name, chosen)]:
            if corruption_error(run) is None:
                galago("trust", "--run", str(run), "--images", "1000", "--severities", "[1,3,5]", "--rounds", "0")
    elif not chosen.table:
        galago("train", "--config", str(RECIPES / f"{TEACHER}.yaml"), "--data.init_args.root", chosen.data)
        for seed in chosen.seeds:
            for name in chosen.only:
                make(folder(name, seed, chosen), recipe(name, seed, chosen))
    Console(width=120).print(table(chosen))


if __name__ == "__main__":
    main()
