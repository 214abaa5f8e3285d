"""The command line: quick, helpful, and never a traceback, whatever a recipe says."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from galago import cli, recipe, ship
from galago.run import Run

RECIPE: dict[str, Any] = {
    "model": {"class_path": "galago.models.tiny.Tiny", "init_args": {"width": 4}},
    "task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 10}},
    "data": {"class_path": "galago.datasets.digits.Digits", "init_args": {"batch_size": 64}},
    "epochs": 1,
    "methods": [
        {
            "class_path": "galago.quantize.quantize.Quantize",
            "init_args": {
                "weight": {"class_path": "galago.quantize.lsq.LSQWeight", "init_args": {"bits": 4}},
                "input": {"class_path": "galago.quantize.lsq.LSQ", "init_args": {"bits": 4}},
                "keep": ["head"],
            },
        },
        {"class_path": "galago.augment.cutmix.CutMix", "init_args": {"probability": 0.5}},
    ],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "schedule": {"class_path": "galago.schedule.Cosine", "init_args": {"warmup": 0.1}},
}


def write(folder: Path, recipe: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run": str(folder / "run"), **recipe}) if isinstance(recipe, dict) else recipe)
    return path


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that must fail as the user's mistake says."""
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("galago:")]
    assert len(lines) == 1
    assert "Traceback" not in said
    return lines[0]


def test_help_answers_in_well_under_a_second():
    began = time.perf_counter()
    said = subprocess.run([sys.executable, "-m", "galago.cli", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 0.8
    assert all(name in said.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_itself(command: str):
    said = subprocess.run(
        [sys.executable, "-m", "galago.cli", command, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert said.returncode == 0
    assert "usage: galago" in said.stdout
    assert "Traceback" not in said.stderr


def test_a_misspelt_command_is_corrected(capsys: pytest.CaptureFixture[str]):
    assert "did you mean train" in complaint(capsys, "trian")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epoch": 3}, "epoch"),
        ({"epochs": "many"}, "epochs"),
        ({"model": {"class_path": "galago.models.tiny.Tinny"}}, "model"),
        ({"model": {"class_path": "galago.models.tiny.Tiny", "init_args": {"widht": 3}}}, "widht"),
        ({"data": {"class_path": "galago.datasets.digits.Digits", "init_args": {"batch_size": 0}}}, "batch_size"),
        ({"task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": "ten"}}}, "classes"),
        ({"optimizer": {"class_path": "torch.optim.SDG"}}, "optimizer"),
        ({"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": -1.0}}}, "learning rate"),
        ({"schedule": {"class_path": "galago.schedule.Cosine", "init_args": {"warmup": 3.0}}}, "warmup"),
        ({"precision": "bf17"}, "precision"),
        ({"accelerator": "abacus"}, "accelerator"),
        ({"watch": "beauty"}, "watch"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, said: str):
    line = complaint(capsys, "train", "--config", str(write(tmp_path, RECIPE | change)))
    assert said in line


def test_a_pattern_that_matches_no_layer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = json.loads(json.dumps(RECIPE))
    recipe["methods"][0]["init_args"]["keep"] = ["haed"]
    assert "head" in complaint(capsys, "train", "--config", str(write(tmp_path, recipe)))


@pytest.mark.parametrize(
    "text", ["", "- a\n- b", "model: [", "\x00", "just words", "model: !!python/object:os.system {}"]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str):
    assert "recipe" in complaint(capsys, "train", "--config", str(write(tmp_path, text)))


def test_a_missing_recipe_is_named(capsys: pytest.CaptureFixture[str]):
    assert "nowhere.yaml" in complaint(capsys, "train", "--config", "nowhere.yaml")


def needing(folder: Path, name: str, *needed: str) -> Path:
    """A recipe of its own run that needs others."""
    path = folder / name
    path.write_text(yaml.safe_dump(RECIPE | {"run": str(folder / path.stem), "needs": list(needed)}))
    return path


def test_what_a_needed_recipe_needs_is_trained_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[str] = []
    monkeypatch.setattr(ship, "measure_run", lambda run, **_: None)
    monkeypatch.setattr(ship.recipe, "train_recipe", lambda arguments: trained.append(Path(arguments[1]).name))
    needing(tmp_path, "first.yaml")
    needing(tmp_path, "second.yaml", "first.yaml")
    third = needing(tmp_path, "third.yaml", "second.yaml")
    ship._needed(third, [])
    assert trained == ["first.yaml", "second.yaml", "third.yaml"]


def test_recipes_that_need_each_other_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    needing(tmp_path, "chicken.yaml", "egg.yaml")
    egg = needing(tmp_path, "egg.yaml", "chicken.yaml")
    assert "chicken.yaml → egg.yaml → chicken.yaml" in complaint(capsys, "ship", "--config", str(egg))


def mutations(value: Any, draw: random.Random) -> Any:
    """A recipe with one place spoilt: a key renamed or dropped, a value of the wrong kind, a path cut short."""
    spoilt = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []
    waiting = [spoilt]
    while waiting:
        inner = waiting.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        places += [(inner, key) for key in keys]
        waiting += [inner[key] for key in keys if isinstance(inner[key], dict | list)]
    where, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0:
        where[key] = draw.choice([None, -1, 10**9, "x", [], {}, [1, 2], {"a": 1}, 0.5, True, "torch.nn.Linear", "§"])
    elif kind == 1 and isinstance(where, dict):
        where[f"{key}s"] = where.pop(key)
    elif kind == 2 and isinstance(where[key], str):
        where[key] = where[key][: len(where[key]) // 2]
    else:
        del where[key]
    return spoilt


def test_no_mutated_recipe_ever_shows_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Some mutations are still recipes; none may end in anything but success or a named mistake."""
    draw = random.Random(0)
    rounds = int(os.environ.get("GALAGO_FUZZ", "40"))
    for number in range(rounds):
        spoilt = mutations(RECIPE, draw)
        folder = tmp_path / str(number)
        folder.mkdir()
        code = cli.main(["check", "--config", str(write(folder, spoilt))])
        said = capsys.readouterr().err
        assert code in (0, 2), spoilt
        assert "Traceback" not in said
        assert "GALAGO_TRACEBACK" not in said, (spoilt, said)
        if code == 2:
            assert any(line.startswith("galago: ") for line in said.splitlines()), spoilt


def test_a_transform_that_asks_for_any_number_is_written_down_with_it(tmp_path: Path):
    turns = {"class_path": "torchvision.transforms.v2.RandomRotation", "init_args": {"degrees": 8}}
    data = {"class_path": "galago.datasets.digits.Digits", "init_args": {"augment": [turns]}}
    path = write(tmp_path, RECIPE | {"data": data})
    with warnings.catch_warnings(action="ignore"):  # as for a user
        recipe.train_recipe(["--config", str(path)])
        (again,) = recipe.parts_of(Run(tmp_path / "run")).data.augment
    assert again.degrees == [-8.0, 8.0]
