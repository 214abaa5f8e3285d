"""Which image files there are, and of which class each is: from folders, or from a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from galago.errors import UserError

_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)
_VALIDATION = ("validation", "val", "valid")


class Item(NamedTuple):
    """An image file and its class's name."""

    path: str
    label: str


@dataclass
class Listing:
    """The files of each part; `validation` and `test` are empty where no such part is given."""

    training: list[Item] = field(default_factory=list)
    validation: list[Item] = field(default_factory=list)
    test: list[Item] = field(default_factory=list)


def list_images(root: Path) -> Listing:
    """Everything below a folder, or in a table of `path,label` (a `.csv` file).

    Raises:
        UserError: there is nothing, or not enough to tell classes apart.
    """
    if root.is_file() and root.suffix.lower() in (".csv", ".tsv"):
        listing = list_table(root)
    elif root.is_dir():
        listing = list_folder(root)
    else:
        raise UserError(f"root: {root} is neither a folder with a folder for each class nor a .csv of path,label")
    found = {item.label for item in listing.training}
    if not found:
        raise UserError(f"root: {root} lists no training images")
    if len(found) == 1:
        raise UserError(f"root: all images in {root} are of one class, {found.pop()!r}; there is nothing to tell apart")
    return listing


def list_folder(root: Path) -> Listing:
    """`root/class/*.jpg`, or `root/train/class/*.jpg` with `val`, `valid` or `validation` and `test` beside it."""
    if not ((root / "train").is_dir() and _folders(root / "train")):
        return Listing(list(_walk(root)))
    validation = [root / name for name in _VALIDATION if (root / name).is_dir()]
    if len(validation) > 1:
        raise UserError(f"root: {root} has both {validation[0].name} and {validation[1].name}; keep one of them")
    test = [root / "test"] if (root / "test").is_dir() else []
    return Listing(
        list(_walk(root / "train")), *([i for part in parts for i in _walk(part)] for parts in (validation, test))
    )


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    except OSError as error:
        raise UserError(f"root: {root} cannot be read: {error.strerror or error}") from error


def _walk(root: Path) -> Iterator[Item]:
    """Every image below a folder of class folders, in order of name."""
    if not (folders := _folders(root)):
        raise UserError(
            f"root: {root} has no folder for each class, as in {root.name}/cat/1.jpg and {root.name}/dog/2.jpg"
        )
    for folder in folders:
        files = list(_files(folder))
        if not files:
            endings = ", ".join(ending[1:] for ending in _ENDINGS[:6])
            raise UserError(f"root: the class folder {folder} holds no images ({endings}, …); fill it or remove it")
        yield from (Item(path, folder.name) for path in files)


def _files(folder: Path) -> Iterator[str]:
    def complain(error: OSError) -> None:
        raise UserError(f"root: {error.filename} cannot be read: {error.strerror or error}") from error

    for parent, inner, names in os.walk(folder, onerror=complain, followlinks=True):
        inner.sort()
        for name in sorted(names):
            if name.lower().endswith(_ENDINGS) and not name.startswith("."):
                yield os.path.join(parent, name)


def list_table(path: Path) -> Listing:
    """A table with the columns `path` (relative to the table's folder), `label` and, if wanted, `split`.

    Raises:
        UserError: the file is no such table; a line is named.
    """
    listing = Listing()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            _check_columns(path, rows.fieldnames or ())
            for row in rows:
                _place(listing, row.get("split"), f"{path}, line {rows.line_num}").append(
                    _item(path, rows.line_num, row)
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table: {error}") from error
    return listing


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if missing := {"path", "label"} - set(columns):
        raise UserError(
            f"{path} has no column {' and no column '.join(sorted(missing))}; its first line must name the columns"
            f" path,label (and split, if wanted), and is {','.join(columns) or 'empty'}"
        )


def _item(table: Path, line: int, row: dict[str, str | None]) -> Item:
    path, label = (row.get("path") or "").strip(), (row.get("label") or "").strip()
    if not path or not label:
        raise UserError(f"{table}, line {line} has no {'label' if path else 'path'}")
    return Item(str(table.parent / path), label)


def _place(listing: Listing, split: str | None, where: str) -> list[Item]:
    name = (split or "train").strip().lower()
    if name in ("train", "training"):
        return listing.training
    if name in _VALIDATION:
        return listing.validation
    if name == "test":
        return listing.test
    raise UserError(f"{where}: the split {name!r} is none of train, validation, test")


def class_names(listing: Listing, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The classes in order: as asked for, or sorted, numbers by their value.

    Raises:
        UserError: a part has a class that the training part, or what was asked for, does not have.
    """
    found = {item.label for item in listing.training}
    names = (
        tuple(sorted(found, key=_by_value if all(map(str.isdecimal, found)) else str))
        if wanted is None
        else tuple(wanted)
    )
    for part, items in vars(listing).items():
        if extra := sorted({item.label for item in items} - set(names)):
            among = "classes" if wanted is not None else "the training images"
            raise UserError(f"{part} images are of class {', '.join(map(repr, extra[:5]))}, which is not among {among}")
    if empty := [name for name in names if name not in found]:
        raise UserError(f"classes: there are no training images of {', '.join(map(repr, empty[:5]))}")
    return names


def _by_value(name: str) -> tuple[int, str]:
    return int(name), name
