"""The report: one page of HTML that says what a run gained and what it cost, and needs nothing but itself.

It only reads the files of a run's folder. What was not measured is left out, with the command that measures it. The
page holds no script and fetches nothing; everything in it that came from the folder is escaped, so that a stranger's
run is as safe to look at as one's own.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from galago.deploy.report import layers, parity, plots, training
from galago.deploy.report.attention import attention_drawn
from galago.deploy.report.comparison import Cost, answers, what_it_cost
from galago.deploy.report.drawing import Figure
from galago.deploy.report.reading import RECIPE, ROWS, Record, number, read_record, text
from galago.deploy.report.summary import cards, headline
from galago.deploy.report.trust import trust
from galago.deploy.report.wording import (
    ENGINES,
    FORMS,
    MISSING,
    counted,
    megabytes,
    milliseconds,
    name_of,
    percent,
    reference,
    significant,
    unbroken,
)
from galago.run import atomic

LABELS = {
    "accuracy": "Accuracy",
    "ece": "Calibration error (ECE)",
    "mce": "Largest calibration gap (MCE)",
    "adaptive_ece": "Calibration error, bins of equal count",
    "class_wise_ece": "Calibration error, class by class",
    "nll": "Surprise (NLL, nats)",
    "brier": "Brier score (0 to 2)",
    "parameters": "Parameters",
    "macs": "Multiply-accumulates an image",
    "bops": "Bit operations an image",
    "mean_weight_bits": "Mean bits of a weight",
    "weight_bytes": "Bytes of the weights, packed",
    "file_mb": "Size on disk",
    "quantization_kl": "Divergence from itself in float (KL, nats)",
    "quantization_db": "Output against itself in float (dB)",
}


def write_report(run: Path, against: Path | None = None) -> Path:
    """Writes report.html into a run's folder.

    Args:
        run: folder of a run.
        against: another run to compare with, a float teacher for instance.

    Returns:
        Where the page is.

    Raises:
        UserError: the folder holds no run, a file of it is damaged, or the page cannot be written.
    """
    record = read_record(run)
    other = None if against is None else read_record(against)
    page = render(record, other)
    target = record.folder / "report.html"
    with atomic(target) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return target


def render(record: Record, against: Record | None = None) -> str:
    """The page as text."""
    cost = what_it_cost(record, against) if against else None
    environment = Environment(
        loader=PackageLoader("galago.deploy", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "megabytes": megabytes,
        "milliseconds": milliseconds,
        "counted": counted,
        "significant": significant,
        "unbroken": unbroken,
    }
    return environment.get_template("page.html").render(_contents(record, against, cost))


def _contents(record: Record, against: Record | None, cost: Cost | None) -> dict[str, Any]:
    return {
        "style": Markup(files("galago.deploy.report").joinpath("style.css").read_text(encoding="utf-8")),
        "name": name_of(record),
        "headline": headline(record, against),
        "cards": cards(record, against, cost.paired if cost else None),
        "record": record,
        "against": against,
        "beside": reference(against) if against else "",
        "cost": cost,
        "trade": _drawn(plots.accuracy_against_size(record, against), plots.accuracy_against_latency(record, against)),
        "reliability": _reliability(record, against),
        "scores": _scores(record),
        "trust": trust(record.trust),
        "looked": _drawn(attention_drawn(record.looked)),
        "bars": plots.latency_bars(record),
        "layers": _drawn(
            layers.layer_bits(record.layers),
            layers.layer_errors(record.layers),
            layers.losses_alone(record.losses, record.layers),
            layers.losses_all_but(record.losses, record.layers),
        ),
        "training": _drawn(training.loss_curves(record), training.accuracy_curve(record, against)),
        "parity": parity.verdicts(record),
        "codes": parity.codes(record),
        "images": number(record.verification.get("images")),
        "provenance": _provenance(record),
        "engines": ENGINES,
        "most_rows": ROWS,
        "most_recipe": RECIPE,
    }


def _drawn(*figures: Figure | None) -> list[Figure]:
    return [figure for figure in figures if figure is not None]


def _reliability(record: Record, against: Record | None) -> list[Figure]:
    """Before and after with another run; without one, the trained model and what ships."""
    if against is not None and (before := answers(against)) is not None and (after := answers(record)) is not None:
        shown = [(f"{reference(against)}, before", before, "theirs"), (f"{name_of(record)}, after", after, "ours")]
    else:
        shown = [(FORMS[form], found, "ours") for form, found in list(record.predictions.items())[:2]]
    diagrams = [plots.reliability_diagram(found, whose, kind) for whose, found, kind in shown]
    ours_first = sorted(shown, key=lambda one: one[2] == "theirs")
    return diagrams + ([plots.risk_coverage([(whose, found) for whose, found, _ in ours_first])] if shown else [])


def _scores(record: Record) -> list[tuple[str, list[str]]]:
    """Every measured number, a row each, a column for every form of the network."""
    names = dict.fromkeys(name for numbers in record.metrics.values() for name in numbers)
    return [
        (
            LABELS.get(name, name.replace("_", " ")),
            [_shown(name, numbers.get(name)) for numbers in record.metrics.values()],
        )
        for name in names
    ]


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return MISSING
    if name in ("accuracy", "ece", "mce", "adaptive_ece", "class_wise_ece") or name.startswith("accuracy"):
        return percent(value, 2)
    if name.endswith("_mb"):
        return megabytes(value)
    if name.endswith("_bits"):
        return f"{value:.2f}"
    return counted(value) if abs(value) >= 1000 else significant(value, 4)


def _provenance(record: Record) -> list[tuple[str, str]]:
    info = record.info
    labels = ("command", "seed", "started", "device", "threads", "platform", "python")
    found = [(label, text(info.get(label), 400)) for label in labels]
    versions = info.get("versions")
    if isinstance(versions, dict):
        said = ", ".join(f"{text(name, 40)} {text(value, 40)}" for name, value in list(versions.items())[:30])
        found.append(("versions", said))
    return [("run", str(record.folder)), *((label, said) for label, said in found if said)]
