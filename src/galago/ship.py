"""`ship`: from a recipe to proved files and a report, in one go."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from galago import recipe
from galago.console import say
from galago.deploy import onnx, openvino
from galago.deploy.report.report import write_report
from galago.deploy.verify import show, verify_run
from galago.errors import UserError
from galago.measure import measure_latency, measure_run
from galago.probe import Deployed
from galago.run import Run, load, normalization_of
from galago.spec import packages
from galago.trust import trust_run

# For trust after each shipping: what the report then states; `galago trust` alone measures everything.
IMAGES, SEVERITIES, ROUNDS, SECONDS = 1000, (1, 3, 5), 100, 300.0


def ship(arguments: Sequence[str]) -> int:
    """Trains what is missing, then exports, verifies, measures and reports. 1 when a file is not proved equal."""
    config = recipe.parse(arguments)
    needed = [_needed(Path(path), arguments) for path in config.needs or ()]
    say(f"— train {config.run}")
    recipe.train_recipe(arguments)
    run = Path(config.run)
    allow = packages(recipe.plain(config))
    say("— export")
    for path, size in export_run(run, allow=allow).items():
        say(f"{path}  {size / 1e6:.3f} MB")
    say("— verify")
    outcome = verify_run(run, allow=allow)
    show(outcome)
    say("— measure")
    for artifact in (None, Run(run).onnx, Run(run).openvino):
        measure_run(run, artifact, allow=allow)
    measure_latency(run, allow=allow)
    say("— trust")
    trust_run(run, needed[0] if needed else None, IMAGES, SEVERITIES, ROUNDS, at_most=SECONDS, allow=allow)
    say(f"— report: {write_report(run, needed[0] if needed else None)}")
    return 0 if outcome["passed"] else 1


def _needed(path: Path, arguments: Sequence[str], above: tuple[Path, ...] = ()) -> Path:
    """The run of a recipe that this one needs, trained (behind what it needs itself) and measured if it is not yet."""
    base = next((Path(value).parent for option, value in pairwise(arguments) if option == "--config"), Path())
    location = (path if path.exists() else base / path).resolve()
    if location in above:
        raise UserError(f"needs: {location.name} needs itself: {' → '.join(p.name for p in (*above, location))}")
    own = ["--config", str(location)]
    config = recipe.parse(own)
    if not Run(config.run).finished:
        for further in config.needs or ():
            _needed(Path(further), own, (*above, location))
        say(f"— train {config.run} first, which the recipe needs")
        recipe.train_recipe(own)
    measure_run(Path(config.run), allow=packages(recipe.plain(config)))
    return Path(config.run)


def export_run(run: Path, float_image: bool = False, allow: Sequence[str] = ()) -> dict[str, int]:
    """Writes model.onnx, model.xml and model.bin into a run's folder; paths and bytes.

    Args:
        run: folder of a finished run.
        float_image: take float images in 0…1 rather than uint8 images in 0…255.
        allow: packages to import from besides galago, torch, torchvision and timm.
    """
    files, network = Run(run), load(run, allow)
    parts = recipe.parts_of(files, allow)
    normalize, example = normalization_of(network), parts.data.example()
    integer = onnx.lowered(Deployed(network, normalize, parts.task), example)
    model = onnx.build(integer, example, float_image)
    openvino.write(model, files.openvino)
    onnx.write(model, integer, files.onnx)
    written = (files.onnx, files.openvino, files.openvino.with_suffix(".bin"))
    return {str(path): path.stat().st_size for path in written}
