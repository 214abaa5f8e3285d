"""What a search for the student is worth: found, drawn at random, made by hand, all of one size and one teacher.

    python recipes/nas_kd/make_texts.py data/python_texts.csv
    python benchmarks/nas_kd.py                               # all that is not done yet, then the table
    python benchmarks/nas_kd.py --seeds 0 1 2
    python benchmarks/nas_kd.py --table                       # only the table of what is done

Teacher, search and student are the recipes of `recipes/nas_kd`. The random students have operations, edges and number
of cells drawn from the search's own space, the hand-made ones two convolutions of 3 on every node; both are as close to
the found one in parameters as 500 draws, or the width, allow. All learn from the same teacher, as long as the found
one; it is also trained from the labels alone. The search is done once for every seed. Accuracy is that of the test
texts, which nothing was chosen on; latency that of the ONNX file, one text at a time, on one thread. Finished runs are
skipped and interrupted ones continued, so the command can be given again.
"""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.probe import Deployed
from galago.probes.latency import compare
from galago.recipe import parts_of, train_recipe
from galago.run import Run, load, read_json
from galago.search.cell_network import CellNetwork
from galago.search.relaxation import INPUTS, KEPT
from galago.search.space import OPERATIONS, Operation
from galago.search.student import student
from galago.search.super_network import SuperNetwork
from galago.spec import build, describe

ROOT = Path(__file__).parents[1]
RECIPES = {name: ROOT / "recipes" / "nas_kd" / f"{name}.yaml" for name in ("teacher", "search", "student")}
VARIANTS = ("found", "at random", "hand-made", "found, labels alone")
DRAWS = 500


def size(network: nn.Module) -> int:
    """How many parameters a network has."""
    return sum(parameter.numel() for parameter in network.parameters())


def at_random(found: CellNetwork, depths: list[int], seed: int) -> CellNetwork:
    """Of so many networks of the same space, the nearest in size."""
    lot = random.Random(seed)
    nodes = found.closed()[0].nodes
    kept = [
        (
            [
                (node, start, lot.choice([one for one in OPERATIONS if one is not Operation.zero]))
                for node in range(nodes)
                for start in sorted(lot.sample(range(INPUTS + node), KEPT))
            ],
            lot.choice(depths),
        )
        for _ in range(DRAWS)
    ]
    made = (CellNetwork(found.space, genotype, found.classes, depth, found.width) for genotype, depth in kept)
    return min(made, key=lambda network: abs(size(network) - size(found)))


def hand_made(found: CellNetwork) -> CellNetwork:
    """Convolutions of 3 on all edges, as deep as the found network, and as wide as its size allows."""
    conv = Operation.conv_3
    genotype = [(node, node + start, conv) for node in range(found.closed()[0].nodes) for start in (0, 1)]
    made = [CellNetwork(found.space, genotype, found.classes, found.depth, width) for width in range(4, 129)]
    return min(made, key=lambda network: abs(size(network) - size(found)))


def varied(name: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """The recipe of one run."""
    kind = name if name in RECIPES else "student"
    recipe: dict[str, Any] = copy.deepcopy(yaml.safe_load(RECIPES[kind].read_text()))
    epochs = chosen.epochs if kind == "student" and chosen.epochs else recipe["epochs"]
    recipe |= {"run": str(folder(name, seed, chosen)), "seed": seed, "epochs": epochs, "needs": []}
    recipe["probes"] = [{"class_path": "galago.probes.cost.Cost"}]
    recipe["data"]["init_args"]["root"] = chosen.data
    for method in recipe.get("methods", []):
        if "teacher" in method["init_args"]:
            method["init_args"]["teacher"]["init_args"]["run"] = str(folder("teacher", 0, chosen))
    if kind == "student":
        recipe["model"] = model(name, seed, chosen)
    if name.endswith("labels alone"):
        recipe["methods"] = []
    return recipe


def model(name: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """A student, as its recipe names it."""
    search = str(folder("search", seed, chosen))
    if name.startswith("found"):
        return {"class_path": "galago.search.student.student", "init_args": {"run": search}}
    found = student(search)
    assert isinstance(found, CellNetwork)
    super_network = build(Run(search).read_recipe()["model"])
    assert isinstance(super_network, SuperNetwork)
    made = hand_made(found) if name == "hand-made" else at_random(found, super_network.depths, seed)
    described: dict[str, Any] = describe(made)
    return described


def folder(name: str, seed: int, chosen: argparse.Namespace) -> Path:
    """Where a run lies."""
    return Path(chosen.runs) / f"{''.join(c if c.isalnum() else '_' for c in name)}_seed{seed}"


def train(recipe: dict[str, Any]) -> None:
    """One run, unless it is done."""
    written = Path(recipe["run"]).with_suffix(".yaml")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(yaml.safe_dump(recipe, sort_keys=False))
    train_recipe(["--config", str(written)])


def engine(run: Run) -> tuple[OnnxRuntime, torch.Tensor]:
    """A run's file on one thread, and a text for it."""
    parts, network = parts_of(run), load(run.folder)
    example = parts.data.example()
    path = export(Deployed(network, parts.data.normalize, parts.task), example, run.folder / "float.onnx")
    return OnnxRuntime(path, threads=1), example


def table(runs: dict[str, Run]) -> Table:
    """All that is done, with latencies taken in turns."""
    made = Table("network", "accuracy %", "parameters", "multiply-accumulates", "ms a text", "cells", "operations")
    done = {name: run for name, run in runs.items() if run.finished}
    engines = {name: engine(run) for name, run in done.items()}
    times = compare({name: one for name, (one, _) in engines.items()}, next(iter(engines.values()))[1], seconds=0.5)
    for name, run in done.items():
        numbers, network = read_json(run.metrics)["model"], load(run.folder)
        kinds = ["", ""]
        if isinstance(network, CellNetwork):
            kinds = [str(network.depth), " ".join(f"{n}←{s}:{o.name}" for n, s, o in network.genotype)]
        counts = [f"{numbers[key]:,.0f}" for key in ("parameters", "macs")]
        made.add_row(name, f"{100 * numbers['accuracy']:.1f}", *counts, f"{times[name].median_ms:.3f}", *kinds)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, help="of the students; the recipe's by default")
    parser.add_argument("--data", default="data/python_texts.csv", help="what make_texts.py wrote")
    parser.add_argument("--runs", default="runs/nas_kd/benchmark", help="where runs are kept")
    parser.add_argument("--table", action="store_true", help="train nothing, only show what is done")
    chosen = parser.parse_args()
    runs = {"teacher": Run(folder("teacher", 0, chosen))}
    if not chosen.table:
        train(varied("teacher", 0, chosen))
    for seed in chosen.seeds:
        for name in ("search", *VARIANTS):
            runs[f"{name}, seed {seed}"] = Run(folder(name, seed, chosen))
            if not chosen.table:
                train(varied(name, seed, chosen))
    Console(width=170).print(table(runs))


if __name__ == "__main__":
    main()
