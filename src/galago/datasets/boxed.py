"""Images with known boxes: a folder of photographs and a table that says where in each the object is.

    path,left,top,right,bottom
    test/WBC/BloodImage_00038_04.png,53,47,161,169

One line a box, in pixels of the upright image; right and bottom are the first column and row outside. An image may have
several lines, and each test image needs one. The boxes go with the test images, as `extra["box"]`: N×M×4 (top, bottom,
left, right, in pixels of the image as the network sees it, resized and cropped as it was), with empty boxes where an
image has fewer than another.

When: to measure where a classifier looks (`galago.probes.localization`). Training goes by the classes alone.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from galago.batch import Batch
from galago.data import Loader, Wrapped
from galago.datasets.image_files import Files, upright
from galago.datasets.images import ImageData
from galago.datasets.source import Split
from galago.errors import UserError

BOX = "box"  # where a batch's `extra` holds them
COLUMNS = ("left", "top", "right", "bottom")

Corners = tuple[float, ...]  # left, top, right, bottom


def read_boxes(table: Path) -> dict[Path, list[Corners]]:
    """The boxes of each image, by its path.

    Raises:
        UserError: the table cannot be read, or a line has no box.
    """
    found: dict[Path, list[Corners]] = defaultdict(list)
    try:
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"boxes: {table} cannot be read: {error}") from error
    for number, row in enumerate(rows, 2):
        try:
            path, corners = row["path"], tuple(float(row[name]) for name in COLUMNS)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"boxes: line {number} of {table} is not path,left,top,right,bottom") from error
        if not (corners[0] < corners[2] and corners[1] < corners[3]):
            raise UserError(f"boxes: line {number} of {table} is a box without area; leave it out")
        found[(table.parent / path).resolve()].append(corners)
    return found


def as_seen(corners: Corners, size: tuple[int, int], source: Files) -> list[float]:
    """A box in the image that the network sees: top, bottom, left, right.

    Args:
        corners: left, top, right, bottom in the file's pixels.
        size: width and height of the upright image.
        source: resizes and crops it.
    """
    (_, height, width), (wide, tall) = source.shape, size
    if (tall, wide) == (height, width):
        return [corners[1], corners[3], corners[0], corners[2]]
    scale = max(height / tall, width / wide) / source.crop
    resized = max(height, round(tall * scale)), max(width, round(wide * scale))
    top, left = (round((big - small) / 2) for big, small in zip(resized, (height, width), strict=True))
    rows = [min(max(y * resized[0] / tall - top, 0), height) for y in corners[1::2]]
    columns = [min(max(x * resized[1] / wide - left, 0), width) for x in corners[::2]]
    return [*rows, *columns]


class Boxed(Wrapped):
    """Photographs in files, with the boxes that a table knows of.

    Args:
        data: photographs (`galago.datasets.image_folder.ImageFolder`).
        boxes: the table, a `.csv` file of path,left,top,right,bottom; paths are relative to it.
    """

    def __init__(self, data: ImageData, boxes: Path) -> None:
        super().__init__(data)
        self.boxes = boxes
        self._known = _boxes_of(data.testing, read_boxes(boxes), boxes)

    def test(self) -> Loader:
        """The other's test images, with boxes."""
        return WithBoxes(self.data.test(), self._known)


class WithBoxes:
    """A `Loader`: the batches of another one, with boxes.

    Args:
        batches: with the position of each image.
        boxes: P×M×4, of each position.
    """

    def __init__(self, batches: Loader, boxes: Tensor) -> None:
        self.batches, self.boxes = batches, boxes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch._replace(extra=batch.extra | {BOX: self.boxes[batch.extra["index"]]})


def _boxes_of(split: Split, known: dict[Path, list[Corners]], table: Path) -> Tensor:
    """The boxes of a part by position in its source, P×M×4; nothing where the part does not hold it.

    Raises:
        UserError: the images are in no files, or one of them has no box.
    """
    source = split.source
    if not isinstance(source, Files):
        raise UserError("Boxed: the images must be in files, one each (galago.datasets.image_folder.ImageFolder)")
    found: dict[int, list[list[float]]] = {}
    for position in split.positions.tolist():
        path = Path(source.paths[position])
        if not (corners := known.get(path.resolve())):
            raise UserError(f"boxes: {table} has no line for {path}; its paths are relative to the table itself")
        with Image.open(path) as image:
            size = upright(image).size
        found[position] = [as_seen(one, size, source) for one in corners]
    boxes = torch.zeros(len(source), max(map(len, found.values()), default=1), 4)
    for position, own in found.items():
        boxes[position, : len(own)] = torch.tensor(own)
    return boxes
