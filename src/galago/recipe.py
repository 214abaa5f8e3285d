"""Recipes: YAML that names classes and their arguments, checked against their signatures before anything runs."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

from galago.data import Data
from galago.errors import UserError
from galago.probe import Probe
from galago.run import Run
from galago.schedule import Schedule
from galago.spec import describe, guard
from galago.task import Task
from galago.train import train

_PURPOSES = {
    "train": "Train a recipe into a run's folder. Given again, it continues where it stopped.",
    "ship": "Train (with all that the recipe needs), export, verify, measure and report.",
    "check": "Say what a recipe would do, layer by layer, without training.",
}


class Parts:
    """What measuring a run needs of its recipe."""

    task: Task
    data: Data
    probes: Sequence[Probe]

    def __init__(self, task: Task, data: Data, probes: Sequence[Probe]) -> None:
        self.task, self.data, self.probes = task, data, probes


def parser(command: str = "train") -> ArgumentParser:
    """The options of `galago train`, `ship` and `check`: every argument of `galago.train.train`, and `--config`."""
    made = ArgumentParser(prog=f"galago {command}", description=_PURPOSES[command], exit_on_error=False)
    made.add_argument("--config", action="config", help="a recipe; later options override what it says")
    made.add_function_arguments(train, skip={"recipe"})
    return made


def read(path: Path) -> dict[str, Any]:
    """A recipe as plain data.

    Raises:
        UserError: the file is missing, no YAML, or no mapping.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not readable YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(recipe, dict):
        raise UserError(
            f"recipe {path} should say `model:`, `task:`, `data:` and so on; it holds {type(recipe).__name__}"
        )
    return recipe


def parse(arguments: Sequence[str]) -> Namespace:
    """Command-line arguments, `--config` among them, checked and with every default filled in."""
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == "--config":
            read(Path(value))  # so that what is wrong with the file is said in plain words
    try:
        return parser().parse_args(list(arguments))
    except (ArgumentError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(in_a_line(error)) from error


def plain(config: Namespace) -> dict[str, Any]:
    """The resolved recipe as plain data: what is written into a run's folder."""
    # errors, or jsonargparse writes a remark in place of some numbers
    with warnings.catch_warnings(action="error", category=UserWarning):
        text = parser().dump(_described(config), skip_validation=True)
    resolved: dict[str, Any] = yaml.safe_load(text)
    return {key: value for key, value in resolved.items() if key not in ("config", "restart")}


def _described(value: Any) -> Any:
    """The same with schedules as plain data: jsonargparse leaves them as they are where a number is allowed too."""
    if isinstance(value, Namespace):
        value = value.clone()
        for name, one in vars(value).items():
            value[name] = _described(one)
        return value
    if isinstance(value, list):
        return [_described(one) for one in value]
    return describe(value) if isinstance(value, Schedule) else value


def instantiate(config: Namespace) -> Namespace:
    """Every class of the recipe as an object, its weights drawn from the recipe's seed.

    Raises:
        UserError: a class refuses its arguments; the message names the key.
    """
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)  # noqa: NPY002 - for libraries that still draw from it
    torch.manual_seed(config.seed)
    try:
        made: Namespace = parser().instantiate(config)
        return made
    except UserError:
        raise
    except Exception as error:  # whatever a class of the recipe raises is about the recipe
        raise UserError(in_a_line(error)) from error


def train_recipe(arguments: Sequence[str]) -> nn.Module:
    """What `galago train` does."""
    config = parse(arguments)
    recipe = plain(config)
    made = instantiate(config)
    chosen = {name: getattr(made, name) for name in recipe}
    chosen["restart"] = config.restart
    return train(**chosen, recipe=recipe)


def parts_of(run: Run, allow: Sequence[str] = (), data_root: Path | None = None) -> Parts:
    """Task, data and probes of a run, made from the recipe in its folder without running a stranger's code.

    Args:
        run: whose recipe.
        allow: packages to import from besides galago, torch, torchvision and timm.
        data_root: where the images lie now, where the recipe's `root` is another machine's.
    """
    recipe = {key: value for key, value in run.read_recipe().items() if key in ("task", "data", "probes")}
    guard(recipe, allow)
    arguments = _arguments(recipe.get("data") or {})
    if arguments.get("download"):
        arguments["download"] = False
    if data_root is not None:
        arguments["root"] = str(data_root)
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(Parts)
    try:
        parts = made.instantiate(made.parse_object(recipe))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{run.recipe}: {in_a_line(error)}") from error
    return Parts(parts.task, parts.data, parts.probes or ())


def _arguments(data: dict[str, Any]) -> dict[str, Any]:
    """Those of a data set, or of the one within it: only that one has files."""
    arguments: dict[str, Any] = data.get("init_args") or {}
    within = arguments.get("data")
    return _arguments(within) if isinstance(within, dict) else arguments


def in_a_line(error: BaseException) -> str:
    """What a person needs of an error: key by key from outside in, without types and code.

    >>> in_a_line(ValueError('Parser key "data":\\n  Option "sise" is not accepted'))
    'data: Option "sise" is not accepted'
    """
    text = str(error) or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    keys = [line.split('"')[1] for line in lines if line.startswith("Parser key") and '"' in line]
    told = [line for line in lines if not line.startswith(("Parser key", "Problem with given class_path"))]
    missing = [line for line in told if "No module named" in line or "has no attribute" in line]
    said = " ".join((missing or told)[:3]) or type(error).__name__
    if len(said) > 400:
        said = said[:397] + "…"
    return f"{'.'.join(keys)}: {said}" if keys else said
