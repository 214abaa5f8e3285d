"""Texts with one class each, as images of one row: a byte a pixel.

Everything here takes raw images, uint8, N×C×H×W, from loaders to files. A text of T bytes (UTF-8) is such an image with
one channel and one row, 1×1×T: longer texts are cut, shorter ones end in zeros. Networks see the bytes as floats 0 to
255, round them, and look them up (`galago.models.bert`, `galago.search.space.Bytes`). An exported file takes N×1×1×T.

When: classification of short texts by small networks, without a vocabulary. What is made for photographs (crops, flips,
corruptions, attacks, mixing) says nothing about bytes.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from galago.datasets.images import ImageData, Sources
from galago.datasets.source import Pixels
from galago.errors import UserError

PARTS = ("train", "validation", "test")


class Row(NamedTuple):
    """A text and its class's name."""

    text: str
    label: str


class Texts(ImageData):
    """A table of texts and their classes.

    Args:
        root: a `.csv` (or `.tsv`) file whose first line names the columns `text`, `label` and, if wanted, `split`
            (train, validation or test).
        length: T, bytes of a text that the network sees.
        batch_size: texts a training step sees in each process.
        workers: processes that load; 0 loads in the training process itself.
        hold_out: training texts set aside for validation where none are given: below 1 a share, from 1 on a number.
        split_seed: decides which texts are set aside and which are kept by `per_class`.
        per_class: train on at most this many texts of each class; None for all.
        classes: names in the order of the network's outputs; None for all that are found, sorted.
        together: texts of one class that each training batch holds together; None for batches of any texts.
    """

    def __init__(
        self,
        root: str,
        length: int = 128,
        batch_size: int = 64,
        workers: int = 0,
        hold_out: float = 0,
        split_seed: int = 0,
        per_class: int | None = None,
        classes: Sequence[str] | None = None,
        together: int | None = None,
    ) -> None:
        if length < 1:
            raise UserError(f"length: {length} bytes hold no text; give 1 or more")
        self.root, self.length = root, length
        parts = read_table(Path(root))
        names = _class_names(parts, classes, root)
        made = {part: _pixels(rows, names, length) for part, rows in parts.items() if rows}
        super().__init__(
            sources=Sources(made["train"], made.get("validation"), made.get("test")),
            classes=names,
            mean=[0.0],
            std=[1 / 255],  # bytes stay bytes
            batch_size=batch_size,
            workers=workers,
            hold_out=hold_out,
            split_seed=split_seed,
            per_class=per_class,
            augment=(),
            together=together,
        )


def read_table(path: Path) -> dict[str, list[Row]]:
    """The rows of each part.

    Raises:
        UserError: the file is no such table, or has no training texts; a line is named where there is one.
    """
    parts: dict[str, list[Row]] = {part: [] for part in PARTS}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            if missing := {"text", "label"} - set(rows.fieldnames or ()):
                raise UserError(f"root: {path} has no column {' and no column '.join(sorted(missing))}")
            for row in rows:
                part, read = _row(row, f"root: {path}, line {rows.line_num}")
                parts[part].append(read)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"root: {path} cannot be read as a table of text,label: {error}") from error
    if not parts["train"]:
        raise UserError(f"root: {path} lists no training texts")
    return parts


def _row(row: dict[str, str | None], where: str) -> tuple[str, Row]:
    text, label = (row.get("text") or "").replace("\0", " ").strip(), (row.get("label") or "").strip()
    if not text or not label:
        raise UserError(f"{where} has no {'label' if text else 'text'}")
    part = (row.get("split") or "train").strip().lower()
    if part not in PARTS:
        raise UserError(f"{where}: the split {part!r} is none of {', '.join(PARTS)}")
    return part, Row(text, label)


def _class_names(parts: dict[str, list[Row]], wanted: Sequence[str] | None, root: str) -> tuple[str, ...]:
    found = {row.label for row in parts["train"]}
    names = tuple(sorted(found)) if wanted is None else tuple(wanted)
    if len(names) < 2:
        raise UserError(f"root: all texts in {root} are of one class, {names[0]!r}; there is nothing to tell apart")
    if unknown := {row.label for rows in parts.values() for row in rows} - set(names):
        raise UserError(f"classes: {root} also has texts of {', '.join(sorted(unknown)[:5])}, which is none of them")
    if empty := [name for name in names if name not in found]:
        raise UserError(f"classes: {root} has no training texts of {', '.join(empty[:5])}")
    return names


def _pixels(rows: Sequence[Row], names: tuple[str, ...], length: int) -> Pixels:
    numbers = {name: number for number, name in enumerate(names)}
    images = torch.stack([as_image(row.text, length) for row in rows])
    return Pixels(images, torch.tensor([numbers[row.label] for row in rows]))


def as_image(text: str, length: int) -> Tensor:
    """1×1×T bytes: cut, or filled up with zeros.

    >>> as_image("hé", 4).tolist()
    [[[104, 195, 169, 0]]]
    """
    cut = text.encode()[:length]
    return torch.tensor(list(cut.ljust(length, b"\0")), dtype=torch.uint8).view(1, 1, -1)
