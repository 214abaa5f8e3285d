"""The top of a report: everything in one sentence, and the key figures."""

from __future__ import annotations

from typing import Any, NamedTuple

from galago.deploy.report.predictions import Paired
from galago.deploy.report.reading import Record, Timing
from galago.deploy.report.wording import (
    ENGINES,
    FORMS,
    MADE_BY,
    MISSING,
    between,
    megabytes,
    name_of,
    percent,
    reference,
    signed,
    significant,
    times,
    width_of,
)


def shrunk(record: Record, against: Record | None) -> tuple[float, str] | None:
    """How many times smaller than float the shipped file is, and than what."""
    own = next((row for row in record.own() if row.precision == "integer" and row.file_mb), None)
    whole = record.timed(own.engine, "fp32") if own else None
    if own and own.file_mb and whole and whole.file_mb:
        return whole.file_mb / own.file_mb, "the same network as a float file"
    size, before = (
        one.metrics[one.shipped].get("file_mb") if one and one.shipped else None for one in (record, against)
    )
    return (before / size, f"{against.folder.name}'s {FORMS[against.shipped]}") if size and before and against else None


def quickest(record: Record) -> Timing | None:
    """The integer file that gained most over float in its own engine."""
    rows = [row for row in record.own() if row.precision == "integer" and row.ratio]
    return max(rows, key=lambda row: row.ratio or 0, default=None)


def proved(record: Record) -> str:
    """What verify.json says of the files, in half a sentence."""
    checked = {name: bool(part.get("passed")) for name, part in checks(record) if name in MADE_BY}
    failed = [FORMS[MADE_BY[name]] for name, passed in checked.items() if not passed]
    if not checked:
        return proof_in_general(record)
    if failed:
        return f"the {' and the '.join(failed)} did NOT prove equal to the trained model"
    if record.verification.get("passed") is not True:
        return "the integer network did NOT prove equal to the trained model"
    good = [FORMS[MADE_BY[name]] for name in checked]
    return f"{'both files' if len(good) == 2 else f'the {good[0]}'} proved equal to the trained model"


def proof_in_general(record: Record) -> str:
    """The verdict alone, where no engine has a section."""
    if not record.verification:
        return "its files are not verified yet" if record.exported else "no file is exported yet"
    return "proved equal to the trained model" if record.verification.get("passed") is True else "NOT proved equal"


def checks(record: Record) -> list[tuple[str, dict[str, Any]]]:
    """The sections of verify.json, in the order in which the network goes through them."""
    order = ("integer", "onnxruntime", "openvino")
    return [(name, part) for name in order if isinstance(part := record.verification.get(name), dict)]


def headline(record: Record, against: Record | None) -> str:
    """The whole report in one sentence."""
    said = ", ".join(part for part in (name_of(record), width_of(record.layers)) if part)
    accuracy, before = (one.number("accuracy") if one else None for one in (record, against))
    parts = []
    if accuracy is not None:
        beside = f" ({reference(against)} {percent(before)})" if against and before is not None else ""
        parts.append(percent(accuracy) + beside)
    size, less = record.size(record.shipped), shrunk(record, against)
    if size:
        parts.append(megabytes(size) + (f" ({times(less[0], 'smaller', 'larger')})" if less else ""))
    if (row := quickest(record)) and row.ratio:
        speed = "as fast as float" if abs(row.ratio - 1) < 0.05 else times(row.ratio, "faster", "slower")
        parts.append(f"{speed} in {ENGINES.get(row.engine, row.engine)}")
    return f"{said}: {', '.join(parts) or 'not measured yet'}; {proved(record)}."


class Card(NamedTuple):
    """A key figure."""

    label: str
    value: str
    note: str
    mood: str = ""  # "good" or "bad" where it is a verdict


def cards(record: Record, against: Record | None, paired: Paired | None) -> list[Card]:
    """The key figures, as many as were measured."""
    found = [_accuracy(record, against, paired), _calibration(record, against), _size(record, against)]
    found += [_speed(row) for row in record.own()[:3] if row.engine != "torch"]
    if bits := width_of(record.layers):
        whole = sum(layer.weight_bits is None for layer in record.layers)
        of = f"{len(record.layers)} layers"
        found.append(
            Card(
                "Precision",
                bits.split(",")[0],
                f"{whole} of {of} stay float" if 0 < whole < len(record.layers) else f"all {of}",
            )
        )
    if record.verification:
        good = record.verification.get("passed") is True
        said = proved(record)
        found.append(
            Card("Parity", "proved" if good else "FAILED", said[0].upper() + said[1:], "good" if good else "bad")
        )
    return [card for card in found if card is not None and card.value != MISSING]


def _accuracy(record: Record, against: Record | None, paired: Paired | None) -> Card:
    now, before = (one.number("accuracy") if one else None for one in (record, against))
    note = "of the test images" if record.shipped == "model" else f"{FORMS.get(record.shipped, '')}, test images"
    if against and now is not None and before is not None:
        spread = f" ({between(paired.accuracy, 100, 1)})" if paired else ""
        note = f"{reference(against)} {percent(before)}: {signed(100 * (now - before), 1)} points{spread}"
    return Card("Accuracy", percent(now), note)


def _calibration(record: Record, against: Record | None) -> Card:
    before = against.number("ece") if against else None
    note = f"{reference(against)} {percent(before, 2)}" if against and before is not None else "0 % is perfect"
    return Card("Calibration error", percent(record.number("ece"), 2), note)


def _size(record: Record, against: Record | None) -> Card:
    less = shrunk(record, against)
    note = f"{times(less[0], 'smaller', 'larger')} than {less[1]}" if less else FORMS.get(record.shipped, "")
    return Card("Size", megabytes(record.size(record.shipped)), note)


def _speed(row: Timing) -> Card:
    digits = 2 if (row.ratio_low or 0) >= 1.1 else 3
    ends = [significant(end, digits) for end in (row.ratio_low, row.ratio_high)]
    spread = f" ({ends[0]}–{ends[1]} ×)" if row.ratio_low and row.ratio_high else ""
    note = f"{times(row.ratio, 'faster', 'slower')} than float{spread}" if row.ratio else f"batch {row.batch}"
    note = note.replace("unchanged than", "as fast as")
    return Card(f"Latency, {ENGINES.get(row.engine, row.engine)}", f"{significant(row.median, 2)} ms", note)
