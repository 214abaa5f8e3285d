"""Wrong labels on MNIST: what refined labels and others make of them, while a plain network learns them by heart.

    python benchmarks/label_noise.py                                  # all that is not done yet, then the table
    python benchmarks/label_noise.py --rates 0.2 0.4 0.6 --only baseline slr_free mltp
    python benchmarks/label_noise.py --table                          # only the table of what is done

A plain network of 29,066 parameters, `--per-class` images of each digit as they are (no crops), of whose labels a share
is drawn anew; SGD at 0.02 with momentum, cosine, batch 64. All train for `--epochs`; SLR's ten sub-trainings, of half
as many each, come on top. Labels of the 10,000 test images are right, and nothing is chosen on them: the last weights
count. Finished runs are skipped and interrupted ones continued, so the command can be given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from runs import Recipe, make, measured, read, spread

RATE = 0.02


def methods(epochs: int) -> dict[str, list[Recipe]]:
    """What is compared, by name."""
    refinery = "galago.regularize.label_refinery.LabelRefinery"
    sub = {"epochs": max(1, epochs // 2), "rate": RATE}
    return {
        "baseline": [],
        "label_smoothing": [{"class_path": "galago.regularize.label_smoothing.LabelSmoothing"}],
        "slr_anchored": [{"class_path": refinery, "init_args": sub}],
        "slr_free": [{"class_path": refinery, "init_args": {**sub, "free": True}}],
        "slr_free_far": [{"class_path": refinery, "init_args": {**sub, "free": True, "shares": [0.7, 0.7]}}],
        "slr_online": [{"class_path": "galago.regularize.label_refinery_online.OnlineLabelRefinery"}],
        "mltp": [{"class_path": "galago.regularize.meta_learning.MLTP", "init_args": {"rate": RATE}}],
        "mixup": [{"class_path": "galago.augment.mixup.Mixup"}],
    }


def recipe(name: str, rate: float, seed: int, chosen: argparse.Namespace) -> Recipe:
    """The recipe of one run; seeds decide the wrong labels, too."""
    shown = {"batch_size": 64, "per_class": chosen.per_class, "split_seed": seed, "augment": [], "hold_out": 1000}
    images: Recipe = {"class_path": "galago.datasets.idx.MNIST", "init_args": {"root": chosen.mnist, **shown}}
    noisy = {"rate": rate, "damage_seed": seed, "data": images}
    return {
        "seed": seed,
        "model": {
            "class_path": "galago.models.small.cnn_lc",
            "init_args": {"channels": 1, "size": 28, "width": 16, "dropout": 0.0},
        },
        "task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 10}},
        "data": {"class_path": "galago.datasets.degraded.NoisyLabels", "init_args": noisy} if rate else images,
        "epochs": chosen.epochs,
        "methods": methods(chosen.epochs)[name],
        "probes": [{"class_path": "galago.probes.calibration.Calibration"}],
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": RATE, "momentum": 0.9}},
        "schedule": {"class_path": "galago.schedule.Cosine", "init_args": {"warmup": 0.05}},
    }


def folder(name: str, rate: float, seed: int, chosen: argparse.Namespace) -> Path:
    """Where a run lies."""
    return Path(chosen.runs) / f"{chosen.epochs}_epochs_{chosen.per_class}" / f"{name}_{100 * rate:.0f}_seed{seed}"


def table(chosen: argparse.Namespace) -> Table:
    """Accuracy and calibration on right labels, a row a method, two columns a rate."""
    columns = [f"{100 * rate:g} %: {what}" for rate in chosen.rates for what in ("accuracy %", "ECE %")]
    made = Table("method", "seeds", *columns)
    for name in chosen.only:
        cells, most = [], 0
        for rate in chosen.rates:
            runs = [folder(name, rate, seed, chosen) for seed in chosen.seeds]
            found = [read(run / "metrics.json")["model"] for run in runs if measured(run)]
            most = max(most, len(found))
            cells += [spread([100 * one[key] for one in found]) if found else "" for key in ("accuracy", "ece")]
        if most:
            made.add_row(name, str(most), *cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(methods(2))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these methods")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.4], help="shares of labels that are drawn anew")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--per-class", type=int, default=100, help="training images of each digit")
    parser.add_argument("--mnist", default="../shared/data/mnist", help="folder with MNIST's files")
    parser.add_argument("--runs", default="runs/label_noise", help="where runs are kept")
    parser.add_argument("--table", action="store_true", help="train nothing, only show what is done")
    chosen = parser.parse_args()
    if not chosen.table:
        for seed in chosen.seeds:
            for rate in chosen.rates:
                for name in chosen.only:
                    make(folder(name, rate, seed, chosen), recipe(name, rate, seed, chosen))
    Console(width=140).print(table(chosen))


if __name__ == "__main__":
    main()
