"""What each command does, as a plain typed function: its docstring and signature are its help.

Results (tables, JSON) go to standard output, remarks to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.markup import escape

from galago.catalogue import ideas
from galago.errors import UserError

Command = Callable[..., int]
RECIPE_COMMANDS = ("train", "ship", "check")


def run(name: str, arguments: Sequence[str]) -> int:
    """Parses the arguments of a command and runs it; its exit code."""
    if name in RECIPE_COMMANDS:
        return _with_recipe(name, arguments)
    command = globals()[f"{name}_command"]
    parser = ArgumentParser(
        prog=f"galago {name}", description=(command.__doc__ or "").split("\n\n")[0], exit_on_error=False
    )
    parser.add_function_arguments(command, as_positional=name == "inspect")
    try:
        given = parser.parse_args(list(arguments))
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        from galago.recipe import in_a_line

        raise UserError(f"{in_a_line(error)} (see galago {name} --help)") from error
    return int(command(**given.as_dict()))


def _with_recipe(name: str, arguments: Sequence[str]) -> int:
    """train, ship and check take a recipe, and any value of it on the command line."""
    from galago import recipe

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a recipe may name classes of the folder it is used in
    if any(option in ("-h", "--help") or option.startswith("--help=") for option in arguments) or not arguments:
        recipe.parser(name).parse_args(list(arguments) or ["--help"])
    if name == "train":
        recipe.train_recipe(arguments)
        return 0
    if name == "check":
        from galago.check import check

        return check(arguments)
    from galago.ship import ship

    return ship(arguments)


def export_command(run: Path, float_image: bool = False, allow: Sequence[str] = ()) -> int:
    """Write a run's model as integer files: model.onnx for ONNX Runtime, model.xml and model.bin for OpenVINO.

    Args:
        run: folder of a finished run.
        float_image: take float images in 0…1 rather than uint8 images in 0…255.
        allow: packages that the run's architecture may import from besides galago, torch, torchvision and timm.
    """
    from galago.ship import export_run

    for path, size in export_run(run, float_image, allow).items():
        print(f"{path}  {size / 1e6:.3f} MB")
    return 0


def verify_command(run: Path, images: int = 1000, data_root: Path | None = None, allow: Sequence[str] = ()) -> int:
    """Prove that a run's files equal its trained model: codes layer by layer, decisions, metrics. Exits 1 if not.

    Args:
        run: folder of a run whose model has been exported.
        images: how many test images are compared.
        data_root: where the images lie, if no longer where the recipe says.
        allow: packages to import from besides galago, torch, torchvision and timm.
    """
    from galago.deploy.verify import show, verify_run

    outcome = verify_run(run, images, data_root, allow)
    show(outcome)
    return 0 if outcome["passed"] else 1


def measure_command(
    run: Path,
    artifact: Path | None = None,
    latency: bool = False,
    threads: int = 1,
    data_root: Path | None = None,
    allow: Sequence[str] = (),
) -> int:
    """Measure a run's model, or the file made from it, with the same probes. Prints JSON.

    Args:
        run: folder of a finished run.
        artifact: measure this .onnx or .xml file in the model's place.
        latency: also time float fp32, float bf16 and the integer files side by side.
        threads: processor threads an engine may use while timed.
        data_root: where the images lie, if no longer where the recipe says.
        allow: packages to import from besides galago, torch, torchvision and timm.
    """
    from galago.measure import measure_latency, measure_run

    numbers: dict[str, Any] = measure_run(run, artifact, data_root, allow)
    if latency:
        numbers["latency"] = measure_latency(run, threads, data_root, allow)["rows"]
    print(json.dumps(numbers, indent=2))
    return 0


def trust_command(
    run: Path,
    against: Path | None = None,
    images: int | None = None,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    rounds: int = 200,
    data_root: Path | None = None,
    allow: Sequence[str] = (),
    json_output: bool = False,
) -> int:
    """Measure how far a run's network and its files can be trusted, beside the network that came before.

    Args:
        run: folder of a finished run; its files are measured too where they exist.
        against: folder of the run that came before, a float teacher for instance.
        images: of the test, at most, spread evenly over it; by default all.
        severities: of corruptions, from 1 to 5.
        rounds: how often the images are drawn again for the intervals; 0 for none.
        data_root: where the images lie, if no longer where the recipe says.
        allow: packages to import from besides galago, torch, torchvision and timm.
        json_output: print what is written to trust.json rather than a table.
    """
    from galago.trust import trust_run
    from galago.verdicts import show

    found = trust_run(run, against, images, severities, rounds, None, data_root, allow)
    if json_output:
        print(json.dumps(found, indent=2))
    elif found is not None:
        show(found)
    return 0


def report_command(run: Path, against: Path | None = None) -> int:
    """Write a run's report, report.html: one page that holds everything and needs nothing else.

    Args:
        run: folder of a run.
        against: another run to compare with, a float teacher for instance.
    """
    from galago.deploy.report.report import write_report

    print(write_report(run, against))
    return 0


def inspect_command(file: Path, json_output: bool = False) -> int:
    """Say which layers of an .onnx or .xml file run as integers in each engine, and why the others do not.

    Args:
        file: the file.
        json_output: print JSON rather than a table.
    """
    from galago.deploy.inspect import inspect_file, show

    rows = inspect_file(file)
    if json_output:
        print(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        show(rows)
    return 0


def methods_command(json: bool = False) -> int:
    """List every published method and what belongs to it, with class path, paper, kind and recipe.

    Args:
        json: print JSON rather than a list to read.
    """
    found = ideas()
    if json:
        sys.stdout.write(_as_json([idea._asdict() for idea in found]))
        return 0
    console = Console(soft_wrap=True, highlight=False)
    for idea in found:  # a table would cut the class path, which is what a recipe needs
        console.print(f"[bold]{idea.class_path}[/]  {idea.kind}")
        console.print(f"    {escape(idea.summary)}")
        if idea.system:
            console.print(f"    [dim]{escape(idea.system)} ({idea.paper})[/]")
        if idea.recipe:
            console.print(f"    [dim]{idea.recipe}[/]")
    return 0


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"
