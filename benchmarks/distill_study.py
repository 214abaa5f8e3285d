"""When does a teacher help? Wrong labels, rare classes, students of three sizes, and answers that may be withheld.

    python benchmarks/distill_study.py                                  # all that is not done yet, then the table
    python benchmarks/distill_study.py --only plain kd --conditions clean noise_40
    python benchmarks/distill_study.py --seeds 0 1 2
    python benchmarks/distill_study.py --table                          # only the table of what is done

The study of Fahad Sarfraz, Elahe Arani and Bahram Zonooz, "Knowledge Distillation Beyond Model Compression"
(arXiv:2007.01922), in small: little residual networks (`galago.models.tiny`) learn `--per-class` images of each digit;
SGD at 0.1 with momentum, cosine, batch 16. The teacher, 24 channels wide, learns the same images and labels, wrong ones
included, as in the study; students are 8 wide, and 4 and 16 under `narrow` and `wide`. `noise_…`: so many percent of
labels are drawn anew. `rare_…`: the largest class has so many times the images of the smallest; they are shown more
often, so that all train for as many steps. DML's peer and FFL's second branch are of the student's size. `ka` learns
from the teacher put right by the labels, `gambler` may abstain, `ka_gambler` does both; images are withheld by the
reservation or, of the others, by the least confidence. Labels of the 10,000 test images are right and classes equal;
the last weights count. Finished runs are skipped, interrupted ones continued.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from runs import Recipe, make, measured, read, spread

PAYOFFS = {"gambler": 2.2, "ka_gambler": 6.0}  # as in recipes/distill
METRICS = {
    "accuracy": "accuracy %",
    "ece": "ECE %",
    "aurc": "AURC × 100",
    "selective_error_90": "errors % where 90 % are answered",
    "selective_error_80": "errors % where 80 % are answered",
}
RATE, TEACHER, STUDENT = 0.1, 24, 8  # widths


class Condition(NamedTuple):
    """What the training images are like, and how wide the student is."""

    noise: float = 0.0
    rare: float = 1.0
    width: int = STUDENT

    @property
    def damage(self) -> str:
        """Names what is done to the images; networks of all sizes learn the same ones."""
        return f"noise{100 * self.noise:.0f}_rare{self.rare:g}"


CONDITIONS = {
    "clean": Condition(),
    "noise_40": Condition(noise=0.4),
    "rare_100": Condition(rare=100.0),
    "narrow": Condition(width=4),
    "wide": Condition(width=16),
    "noise_60": Condition(noise=0.6),
    "noise_20": Condition(noise=0.2),
    "rare_10": Condition(rare=10.0),
}


def network(width: int) -> Recipe:
    """A network's place in a recipe."""
    return {"class_path": "galago.models.tiny.Tiny", "init_args": {"width": width}}


def loaded(run: Path) -> Recipe:
    """A finished run's network."""
    return {"class_path": "galago.run.load", "init_args": {"run": str(run)}}


def taught(teacher: Path, task_weight: float, lesson: str, **arguments: Any) -> list[Recipe]:
    """One lesson of a finished run."""
    lessons = [{"class_path": f"galago.distill.{lesson}", "init_args": arguments}]
    given = {"teacher": loaded(teacher), "task_weight": task_weight, "lessons": lessons}
    return [{"class_path": "galago.distill.distill.Distill", "init_args": given}]


def methods(teacher: Path, width: int) -> dict[str, list[Recipe]]:
    """What is compared, by name; the weights are those of `recipes/distill`."""
    mutual = {"class_path": "galago.distill.mutual.MutualLearning", "init_args": {"peers": [network(width)]}}
    fused = {"class_path": "galago.distill.feature_fusion.FeatureFusion", "init_args": {"branch_at": "down"}}
    right = {"teacher": loaded(teacher), "temperature": 4.0}
    adjusted = [{"class_path": "galago.distill.adjust.AdjustedTargets", "init_args": right}]
    return {
        "plain": [],
        "kd": taught(teacher, 0.1, "logits.SoftTargets", temperature=4.0, weight=0.9),
        "at": taught(teacher, 1.0, "attention.Attention", weight=1000.0, layers=[0, 1]),
        "sp": taught(teacher, 1.0, "similarity.Similarity", weight=3000.0),
        "rkd": taught(teacher, 1.0, "relations.Relations"),
        "dml": [mutual],
        "ffl": [fused],
        "ka": adjusted,
        "gambler": [],
        "ka_gambler": adjusted,
    }


def abstaining(made: Recipe, payoff: float) -> Recipe:
    """The recipe with an eleventh output, which holds stakes back."""
    made["model"]["init_args"]["classes"] = 11
    arguments = {"classes": 10, "payoff": payoff, "pretraining": 0.3333}
    return made | {"task": {"class_path": "galago.tasks.abstain.ClassifyOrAbstain", "init_args": arguments}}


def recipe(condition: Condition, width: int, used: list[Recipe], seed: int, chosen: argparse.Namespace) -> Recipe:
    """The recipe of one run; seeds decide what is damaged, too."""
    shown = {"batch_size": 16, "per_class": chosen.per_class, "split_seed": seed, "augment": [], "hold_out": 200}
    data: Recipe = {"class_path": "galago.datasets.idx.MNIST", "init_args": {"root": chosen.mnist, **shown}}
    if condition.noise:
        noisy = {"rate": condition.noise, "damage_seed": seed, "data": data}
        data = {"class_path": "galago.datasets.degraded.NoisyLabels", "init_args": noisy}
    if condition.rare > 1:
        uneven = {"factor": condition.rare, "damage_seed": seed, "data": data}
        data = {"class_path": "galago.datasets.degraded.Imbalanced", "init_args": uneven}
        left = statistics.mean(condition.rare ** -(number / 9) for number in range(10))
        again = {"times": round(1 / left), "data": data}
        data = {"class_path": "galago.datasets.repeated.Repeated", "init_args": again}
    return {
        "seed": seed,
        "model": network(width),
        "task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 10}},
        "data": data,
        "epochs": chosen.epochs,
        "methods": used,
        "probes": [
            {"class_path": "galago.probes.calibration.Calibration"},
            {"class_path": "galago.probes.selective.Selective", "init_args": {"coverages": [90, 80]}},
        ],
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": RATE, "momentum": 0.9}},
        "schedule": {"class_path": "galago.schedule.Cosine", "init_args": {"warmup": 0.05}},
    }


def folder(name: str, condition: str, seed: int, chosen: argparse.Namespace) -> Path:
    """Where a student's run lies, or under the name of its damage a teacher's."""
    return Path(chosen.runs) / f"{chosen.epochs}_epochs_{chosen.per_class}" / f"{condition}_{name}_seed{seed}"


def train(name: str, condition: str, seed: int, chosen: argparse.Namespace) -> None:
    """One student, and its teacher before it."""
    given = CONDITIONS[condition]
    teacher = folder("teacher", given.damage, seed, chosen)
    make(teacher, recipe(given, TEACHER, [], seed, chosen))
    made = recipe(given, given.width, methods(teacher, given.width)[name], seed, chosen)
    if name in PAYOFFS:
        made = abstaining(made, PAYOFFS[name])
    make(folder(name, condition, seed, chosen), made)


def number(metrics: dict[str, float], name: str) -> float:
    """One of them; of those for every ranking of the images that by the reservation, or else by confidence."""
    return next(metrics[full] for full in (name, f"{name}_reservation", f"{name}_confidence") if full in metrics)


def table(metric: str, title: str, chosen: argparse.Namespace) -> Table:
    """A row a method, a column a condition."""
    made = Table("method", *chosen.conditions, title=title)
    for name in ("teacher", *chosen.only):
        cells = []
        for condition in chosen.conditions:
            place = CONDITIONS[condition].damage if name == "teacher" else condition
            runs = [run for seed in chosen.seeds if measured(run := folder(name, place, seed, chosen))]
            found = [100 * number(read(run / "metrics.json")["model"], metric) for run in runs]
            cells.append(spread(found, digits=1) if found else "")
        made.add_row(name, *cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(methods(Path(), STUDENT))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these methods")
    parser.add_argument(
        "--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help="these conditions"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--per-class", type=int, default=100, help="training images of each digit")
    parser.add_argument("--mnist", default="../shared/data/mnist", help="folder with MNIST's files")
    parser.add_argument("--runs", default="runs/distill_study", help="where runs are kept")
    parser.add_argument("--table", action="store_true", help="train nothing, only show what is done")
    chosen = parser.parse_args()
    if not chosen.table:
        for seed in chosen.seeds:
            for condition in chosen.conditions:
                for name in chosen.only:
                    train(name, condition, seed, chosen)
    for metric, title in METRICS.items():
        Console(width=150).print(table(metric, title, chosen))


if __name__ == "__main__":
    main()
