"""`trust`: all that is measured about trust, on the network before, the trained model and its files, side by side.

Each set of images is shown to each network once; what was said is stored in the run's folder (`trust/`), so that what
was broken off goes on, and further numbers cost nothing. Written down, in trust.json: every number with the interval in
which 95 % of bootstrap draws lie, the change from one form of the network to the next, and what of it somebody has to
know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from galago.console import say, watched
from galago.corrupt.robustness import CorruptionRobustness
from galago.data import Data, Loader, Wrapped
from galago.deploy import runtime
from galago.errors import UserError
from galago.intervals import NOTHING, Estimate, Views, estimates
from galago.outside_made_up import Blobs, Permuted, Uniform
from galago.probe import TEST, Deployed, OutputProbe, Outputs, Probe, TaskMetrics, ViewsProbe, collect_each, spread
from galago.probes.adversarial import Adversarial
from galago.probes.calibration import Calibration
from galago.probes.out_of_distribution import OutOfDistribution
from galago.probes.selective import Selective
from galago.probes.temperature import TemperatureScaled
from galago.recipe import Parts, parts_of
from galago.run import Run, load, normalization_of, read_json, write_json
from galago.spec import describe
from galago.task import Task
from galago.train import check_fit
from galago.verdicts import BEFORE, MODEL, told
from galago.views import StoredViews, fingerprint

ATTACKED = 256  # images, of those that are measured on
UNKNOWN = 1000  # images of each made-up set


class Subject(NamedTuple):
    """One form of the network, and what it said so far."""

    name: str
    deployed: nn.Module
    stored: StoredViews


class Few(Wrapped):
    """Another data set with fewer test images, spread evenly over all.

    Args:
        data: the other.
        few: how many test images.
    """

    def __init__(self, data: Data, few: int) -> None:
        super().__init__(data)
        self.few = few

    def test(self) -> Loader:
        """All where there are hardly more: how many the last batch holds is not known before it is loaded."""
        loader = self.data.test()
        return loader if self.few > (len(loader) - 1) * self.batch_size else spread(loader, self.few)


def trust_run(
    run: Path,
    against: Path | None = None,
    images: int | None = None,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    rounds: int = 200,
    at_most: float | None = None,
    data_root: Path | None = None,
    allow: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Measures how far a run's network and its files can be trusted, and writes trust.json into its folder.

    Args:
        run: folder of a finished run.
        against: folder of the run that came before, a float teacher for instance.
        images: of the test, at most, spread evenly over it; none: all.
        severities: of corruptions, from 1 to 5.
        rounds: how often the images are drawn again for the intervals; 0 for none.
        at_most: seconds; where it would take longer, nothing is measured.
        data_root: where the images lie, if no longer where the recipe says.
        allow: packages to import from besides galago, torch, torchvision and timm.

    Returns:
        What was written; None where it would have taken too long.

    Raises:
        UserError: a run is unfinished, or the two do not tell the same classes apart.
    """
    if images is not None and images < 2:
        raise UserError(f"images is {images}; give at least 2, or leave it out for all")
    if rounds < 0:
        raise UserError(f"rounds is {rounds}; give 0 for no intervals, or some hundred")
    files = Run(run)
    parts = parts_of(files, allow, data_root)
    data = parts.data if images is None else Few(parts.data, images)
    subjects = list(_subjects(files, against, parts, images, allow))
    probes, views, left_out = _views(group(severities, against, parts.probes), data)
    seconds = _seconds(subjects, views, data)
    say(f"{len(views)} sets of images, {', '.join(one.name for one in subjects)}: {_spoken(seconds)}")
    if at_most is not None and seconds > at_most:
        say(f"That is long; when there is time: galago trust --run {run}")
        return None
    for name in watched(list(views), "asking"):
        _ask(name, views[name], subjects)
    found = {one.name: _numbers(one, probes, list(views), parts.task, data, rounds) for one in subjects}
    written = {
        "before": None if against is None else str(against),
        "images": images_of(subjects[0]),
        "severities": list(severities),
        "rounds": rounds,
        **told(found),
        "remarks": [*left_out, *_remarks(parts.data)],
    }
    write_json(files.folder / "trust.json", written)
    return written


def group(severities: Sequence[int], against: Path | None, own: Sequence[Probe] = ()) -> list[Probe]:
    """What is measured: the usual, each replaced by the recipe's own probe of that class where there is one.

    Args:
        severities: of corruptions.
        against: folder of a run whose network attacks are tried on first.
        own: the recipe's probes.
    """
    usual: list[Probe] = [
        TaskMetrics(),
        Calibration(),
        TemperatureScaled(grid=False),
        Selective(coverages=[80, 90, 95]),
        CorruptionRobustness(severities=severities),
        OutOfDistribution([Uniform(UNKNOWN), Blobs(UNKNOWN), Permuted()]),
        Adversarial(images=ATTACKED, surrogate=against),
    ]
    chosen = {type(probe): probe for probe in usual}
    chosen |= {type(probe): probe for probe in own if isinstance(probe, OutputProbe | ViewsProbe | Adversarial)}
    return list(chosen.values())


def _subjects(
    files: Run, against: Path | None, parts: Parts, images: int | None, allow: Sequence[str]
) -> Iterator[Subject]:
    """The network before, the trained model, and its files where they exist."""
    shown = json.dumps([files.read_recipe().get("data"), images])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, run in ((BEFORE, against), (MODEL, files.folder)):
        if run is not None:
            network = load(run, allow)
            _require_fit(network, run, parts)
            deployed = Deployed(network, normalization_of(network), parts.task).to(device)
            paths = [Run(run).weights, Run(run).architecture]
            yield Subject(name, deployed, StoredViews(files.folder / "trust" / name, fingerprint(paths, shown)))
    for name, path in (("onnx", files.onnx), ("openvino", files.openvino)):
        if path.exists():
            paths = [path, path.with_suffix(".bin")] if name == "openvino" else [path]
            stored = StoredViews(files.folder / "trust" / name, fingerprint(paths, shown))
            yield Subject(name, runtime.load(path), stored)


def _require_fit(network: nn.Module, run: Path, parts: Parts) -> None:
    """Checks that a run's network takes these images and tells these classes apart."""
    try:
        check_fit(network, parts.task, parts.data)
    except UserError as error:
        reason = str(error).removeprefix("model: ").partition(";")[0]
        raise UserError(f"{run} cannot be compared on these images: {reason}") from error


def _views(probes: Sequence[Probe], data: Data) -> tuple[list[Probe], dict[str, Loader], list[str]]:
    """The probes that these images are good for, every set of images that one asks for, and why others are left out."""
    kept, views, left_out = [], {TEST: data.test()}, []
    for probe in probes:
        try:
            views |= probe.views(data) if isinstance(probe, ViewsProbe) else {}
            kept.append(probe)
        except UserError as error:
            left_out.append(f"Not measured: {error}.")
    return kept, views, left_out


def _seconds(subjects: Sequence[Subject], views: Mapping[str, Loader], data: Data) -> float:
    """How long asking will take, by what one batch takes; attacks count as so many passes forward."""
    batch = next(iter(views[TEST]))
    total = 0.0
    for subject in subjects:
        collect_each([subject.deployed], [batch])  # the first call takes longer
        begun = time.perf_counter()
        collect_each([subject.deployed], [batch])
        each = (time.perf_counter() - begun) / len(batch.input)
        missing = sum(len(view) * data.batch_size for name, view in views.items() if subject.stored.read(name) is None)
        attacks = 0 if isinstance(subject.deployed, runtime.Artifact) else 40 * ATTACKED  # 11 steps there and back
        total += each * (missing + attacks)
    return total


def _spoken(seconds: float) -> str:
    return "less than a minute" if seconds < 60 else f"about {seconds / 60:.0f} minutes"


def _ask(view: str, batches: Loader, subjects: Sequence[Subject]) -> None:
    """Stores what those subjects say about a set of images that have not been asked yet."""
    missing = [subject for subject in subjects if subject.stored.read(view) is None]
    if missing:
        for subject, outputs in zip(missing, collect_each([one.deployed for one in missing], batches), strict=True):
            subject.stored.write(view, outputs)


def _stored(subject: Subject, view: str) -> Outputs:
    outputs = subject.stored.read(view)
    if outputs is None:
        raise UserError(f"{subject.stored.path(view)} is gone or damaged; run the same command again")
    return outputs


def images_of(subject: Subject) -> int:
    """How many test images a subject was asked about."""
    return len(_stored(subject, TEST).output)


def _numbers(
    subject: Subject, probes: Sequence[Probe], names: Sequence[str], task: Task, data: Data, rounds: int
) -> dict[str, Estimate]:
    """Everything that the probes find, by name; without draws what is no matter of stored outputs."""
    stored = {name: _stored(subject, name) for name in names}
    found: dict[str, Estimate] = {}
    for probe in watched(probes, f"{subject.name}: counting"):
        if isinstance(probe, ViewsProbe):
            seen = {name: stored[name] for name in probe.views(data)}
            found |= estimates(partial(probe.score, task=task), seen, rounds)
        elif isinstance(probe, OutputProbe):
            found |= estimates(partial(_of_test, probe, task), {TEST: stored[TEST]}, rounds)
        else:
            found |= {name: Estimate(value, NOTHING) for name, value in _asked_once(subject, probe, task, data).items()}
    return found


def _of_test(probe: OutputProbe, task: Task, views: Views) -> dict[str, float]:
    return probe.score(views[TEST], task)


def _asked_once(subject: Subject, probe: Probe, task: Task, data: Data) -> dict[str, float]:
    """What a probe found that needs the network itself, kept beside the views."""
    path = subject.stored.folder / f"{type(probe).__name__.lower()}.json"
    asked = json.dumps([subject.stored.fingerprint, describe(probe)])
    kept = read_json(path) if path.exists() else {}
    if kept.get("asked") != asked:
        kept = {"asked": asked, "numbers": probe(subject.deployed, task, data)}
        write_json(path, kept)
    return dict(kept["numbers"])


def _remarks(data: Data) -> list[str]:
    """What a reader has to know about the images."""
    test, validation = next(iter(data.test())).input, next(iter(data.validation())).input
    count = min(len(test), len(validation))
    if torch.equal(test[:count], validation[:count]):
        return ["No images are set apart for validation (hold_out): what was fitted, was fitted on the test images."]
    return []
