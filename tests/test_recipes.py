"""Every recipe parses, trains two steps and names nothing that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from conftest import ROOT
from galago import recipe
from galago.catalogue import ideas
from galago.data import Normalize
from galago.models.resnet import resnet20
from galago.models.tiny import Tiny
from galago.probe import device_of
from galago.run import Run
from galago.spec import build

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in RECIPES]


def cifar(root: Path, classes: int) -> None:
    folder, label = ("cifar-10-batches-bin", 1) if classes == 10 else ("cifar-100-binary", 2)
    (root / folder).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in ("data_batch_1.bin", "test_batch.bin") if classes == 10 else ("train.bin", "test.bin"):
        records = draw.integers(0, 256, (40, 3072 + label), dtype=np.uint8)
        records[:, :label] = (np.arange(40) % classes)[:, None]
        (root / folder / name).write_bytes(records.tobytes())


def digits(root: Path) -> None:
    draw = np.random.default_rng(0)
    root.mkdir(parents=True)
    for name in ("train", "t10k"):
        header = np.array([2051, 40, 28, 28], dtype=">i4").tobytes()
        images = draw.integers(0, 256, (40, 28, 28), dtype=np.uint8)
        (root / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.array([2049, 40], dtype=">i4").tobytes() + (np.arange(40) % 10).astype(np.uint8).tobytes()
        (root / f"{name}-labels-idx1-ubyte").write_bytes(labels)


def pictures(root: Path, classes: list[str]) -> None:
    draw = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(16):
                size = draw.integers(20, 60, 2)
                Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")


def texts(path: Path, classes: int) -> None:
    path.parent.mkdir(parents=True)
    lines = [
        f"text {number} of class {number % classes},{number % classes},{part}"
        for part in ("train", "validation", "test")
        for number in range(6 * classes)
    ]
    path.write_text("\n".join(["text,label,split", *lines]))


def own_data(data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class path and arguments of a recipe's data set, or of the one within it."""
    arguments = data["init_args"]
    arguments.update({name: 2 for name in ("factor",) if name in arguments})  # of an imbalance, in so few images
    arguments.update({name: [0.5, 0.6, 0.8, 1.0] for name in ("fractions",) if name in arguments})  # of a growing set
    arguments.update({name: 1 for name in ("times",) if name in arguments})  # that an epoch repeats its images
    return own_data(arguments["data"]) if "data" in arguments else (data["class_path"], arguments)


def shrunk(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with small made-up images in the published layout, no weights to start from, and two steps."""
    kind, data = own_data(content["data"])
    root = folder / "data"
    if "cifar" in kind:
        cifar(root, 100 if kind.endswith("100") else 10)
    elif "idx" in kind:
        digits(root)
    elif "image_folder" in kind:
        pictures(root, [f"class {number}" for number in range(content["task"]["init_args"]["classes"])])
    elif "texts" in kind:
        root = root / "texts.csv"
        texts(root, content["task"]["init_args"]["classes"])
    if "digits.Digits" not in kind:
        data["root"] = str(root)
    if "workers" in data:
        data["workers"] = 0  # which are forked; a process full of engines' threads died of it
    data.update(batch_size=8, per_class=2 if "digits" in kind else 6)
    if content["data"]["class_path"].endswith(".GivenLabels"):
        labels = content["data"]["init_args"]
        np.savez(folder / "labels.npz", **{labels["key"]: np.arange(40) % 10})
        labels["file"] = str(folder / "labels.npz")
    arguments = content["model"].get("init_args", {})
    arguments.pop("weights", None)
    content["methods"] = [one for one in content.get("methods", []) if not one["class_path"].endswith(".StartFrom")]
    for method in content["methods"]:
        own = method.get("init_args", {})
        own.update(
            {
                name: 2
                for name in ("iterations", "scale_iterations", "batches", "steps", "epochs", "folds")
                if name in own
            }
        )
    for probe in content.get("probes", []):
        own = probe.get("init_args", {})
        own.pop("surrogate", None)
        own.update({name: 2 for name in ("steps", "draws", "passes") if isinstance(own.get(name), int)})
    return content | {"epochs": 1, "compile": False, "run": str(folder / "run"), "needs": []}


def without_teachers(content: Any, folder: Path, normalize: Normalize, classes: int) -> Any:
    """Finished runs that a recipe names, replaced by a run of an untrained network for the same images."""
    if isinstance(content, list):
        return [without_teachers(value, folder, normalize, classes) for value in content]
    if not isinstance(content, dict):
        return content
    if content.get("class_path") == "galago.run.load":
        run = Run(folder / "teacher")
        run.folder.mkdir(exist_ok=True)
        run.save_model(untrained(content["init_args"]["run"], classes, normalize.mean.numel()), normalize)
        return {"class_path": "galago.run.load", "init_args": {"run": str(run.folder)}}
    if content.get("class_path") == "galago.search.student.student":
        content["init_args"]["run"] = searched(content["init_args"]["run"], folder, normalize)
        if "teacher" in content["init_args"]:
            named = {"class_path": "galago.run.load", "init_args": {"run": content["init_args"]["teacher"]}}
            made = without_teachers(named, folder, normalize, classes)
            content["init_args"]["teacher"] = made["init_args"]["run"]
        return content
    if content.get("class_path") == "galago.distill.stored.StoredScores":
        content["init_args"]["file"] = str(folder / "scores.npy")
    return {key: without_teachers(value, folder, normalize, classes) for key, value in content.items()}


def searched(run: str, folder: Path, normalize: Normalize) -> str:
    """A finished search, as the run's own recipe has it, that has chosen at random."""
    found = Run(folder / "search")
    found.folder.mkdir()
    model = build(
        yaml.safe_load((ROOT / run.replace("runs/", "recipes/", 1)).with_suffix(".yaml").read_text())["model"]
    )
    found.save_model(model.derived(), normalize)
    return str(found.folder)


def untrained(run: str, classes: int, channels: int) -> nn.Module:
    """A network for these images; one that spikes where the run's own recipe has one."""
    own = (ROOT / run.replace("runs/", "recipes/", 1)).with_suffix(".yaml")
    model = yaml.safe_load(own.read_text())["model"] if own.exists() else {"class_path": ""}
    if model["class_path"].startswith(("galago.models.spiking.", "galago.models.bert.")):
        return build(model)
    return resnet20(classes) if channels == 3 else Tiny(classes, channels, width=4)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_recipe_trains_two_steps(path: Path, tmp_path: Path):
    if "galago.datasets.texts." in path.read_text():
        pytest.importorskip("transformers", reason="the extra `text` is not installed, which the teacher needs")
    content = shrunk(yaml.safe_load(path.read_text()), tmp_path)
    data = build(content["data"])
    content = without_teachers(content, tmp_path, data.normalize, len(data.classes))
    small = tmp_path / "recipe.yaml"
    small.write_text(yaml.safe_dump(content))
    model = recipe.train_recipe(["--config", str(small)])
    assert device_of(model) == torch.device("cpu")
    assert Run(tmp_path / "run").finished
    steps = [line["step"] for line in Run(tmp_path / "run").history() if line["kind"] == "epoch"]
    assert steps[-1] >= 2
    last = [line for line in Run(tmp_path / "run").history() if line["kind"] == "step"][-1]
    nothing = {name for name, value in last.items() if value == 0}
    assert nothing <= {"epoch", "learning_rate", "cross_entropy"}, "a method's loss does nothing"  # a task's may


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_has_the_name_of_its_run_and_says_how_to_run_it(path: Path):
    text = path.read_text()
    assert text.startswith("# ")
    assert f"--config {path.relative_to(ROOT)}" in text
    for needed in yaml.safe_load(text).get("needs", []):
        assert (path.parent / needed).exists()


def test_every_recipe_that_a_page_promises_is_there():
    promised = {idea.recipe for idea in ideas() if idea.recipe}
    missing = {name for name in promised if not (ROOT / name).exists()}
    assert not missing
