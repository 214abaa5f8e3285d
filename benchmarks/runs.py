"""What the benchmarks that train have in common: runs that are made once, whoever asks, and what they say.

Nothing to run by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

Recipe = dict[str, Any]


def galago(*arguments: str) -> None:
    """A command of the toolkit."""
    subprocess.run([sys.executable, "-m", "galago.cli", *arguments], check=False)


def read(path: Path) -> dict[str, Any]:
    """What a file of a run says; nothing where it does not exist yet."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def measured(run: Path) -> bool:
    """Whether a run's network was trained and measured."""
    return "model" in read(run / "metrics.json")


def make(
    run: Path,
    recipe: Recipe,
    done: Callable[[Path], bool] = measured,
    then: Callable[[Path], None] | None = None,
) -> None:
    """Trains a run, unless it is done or another process is at it; an interrupted one goes on.

    Args:
        run: its folder.
        recipe: what it trains; written beside the folder.
        done: whether nothing is left to do.
        then: what to do after training; not done where training failed.
    """
    if done(run):
        return
    with _claimed(run) as mine:
        if not mine:
            return
        written = run.with_suffix(".yaml")
        written.write_text(yaml.safe_dump(recipe | {"run": str(run)}, sort_keys=False))
        galago("train", "--config", str(written))
        if then is not None and (run / "model.safetensors").exists():
            then(run)


@contextmanager
def _claimed(run: Path) -> Iterator[bool]:
    """Whether a run is this process's to do; another process of the same command leaves it alone meanwhile."""
    run.parent.mkdir(parents=True, exist_ok=True)
    claim = run.with_suffix(".claim")
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        claim.unlink()


def spread(values: list[float], digits: int = 2) -> str:
    """A mean, with the standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def held_out(run: Path) -> float:
    """Accuracy on the images that were set aside, after the last epoch."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return float(next(line["accuracy"] for line in reversed(lines) if line["kind"] == "epoch"))


def innermost(data: Recipe) -> Recipe:
    """The arguments of a data set, or of the one that it wraps."""
    arguments: Recipe = data["init_args"]
    return innermost(arguments["data"]) if "data" in arguments else arguments


def damaged(data: Recipe, chosen: argparse.Namespace) -> Recipe:
    """The data set as it is, or with `--noise` in its labels or an `--imbalance` of its classes."""
    for kind, argument, value in (("NoisyLabels", "rate", chosen.noise), ("Imbalanced", "factor", chosen.imbalance)):
        if value:
            data = {"class_path": f"galago.datasets.degraded.{kind}", "init_args": {argument: value, "data": data}}
    return data
