"""Cuts the blood cells of BCCD out of their microscope images: a folder of photographs for each class.

    python recipes/bccd/crop_cells.py SOURCE TARGET [--surroundings 0.2]

SOURCE is the `BCCD` folder of https://github.com/Shenggan/BCCD_Dataset (`JPEGImages`, `Annotations`, `ImageSets`).
Written are TARGET/train, TARGET/val and TARGET/test, by the published split of the images, each with a folder for red
cells (RBC), white cells (WBC) and platelets. A crop is a square around the cell's box with a little of what is around
it (its share is a design choice), moved to lie within the image. TARGET/boxes.csv says where in its crop each cell is
(`galago.datasets.boxed`); for that, give it more surroundings. Boxes without area or beyond the image (two in the
published set) and boxes with a side below 16 pixels are left out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

from PIL import Image

SURROUNDINGS = 0.2  # how much longer a crop's side is than the longer side of its box, unless another share is given
SMALLEST = 16  # pixels


class Cell(NamedTuple):
    """One cell's class and its box in pixels: left, top, right, bottom."""

    label: str
    box: tuple[int, int, int, int]


def cells(annotation: Path) -> Iterator[Cell]:
    """What is marked in an image, in the order of its VOC annotation."""
    for item in ET.parse(annotation).getroot().iter("object"):
        corners = [int(item.findtext(f"bndbox/{name}", "0")) for name in ("xmin", "ymin", "xmax", "ymax")]
        yield Cell(item.findtext("name", ""), (corners[0], corners[1], corners[2], corners[3]))


def usable(box: tuple[int, int, int, int], size: tuple[int, int]) -> bool:
    """Whether a box lies within an image of this width and height and is large enough to show something."""
    left, top, right, bottom = box
    inside = left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]
    return inside and min(right - left, bottom - top) >= SMALLEST


def square(
    box: tuple[int, int, int, int], size: tuple[int, int], surroundings: float = SURROUNDINGS
) -> tuple[int, int, int, int]:
    """A square around a box, moved to lie within the image.

    >>> square((0, 10, 20, 20), (100, 100))
    (0, 3, 24, 27)
    """
    left, top, right, bottom = box
    side = min(round(max(right - left, bottom - top) * (1 + surroundings)), *size)
    x, y = (
        min(max((first + last - side) // 2, 0), limit - side)
        for first, last, limit in ((left, right, size[0]), (top, bottom, size[1]))
    )
    return x, y, x + side, y + side


def inside(box: tuple[int, int, int, int], place: tuple[int, int, int, int]) -> list[int]:
    """A box in the pixels of a crop from this place.

    >>> inside((0, 10, 20, 20), (0, 3, 24, 27))
    [0, 7, 20, 17]
    """
    return [min(max(edge - place[axis % 2], 0), place[2] - place[0]) for axis, edge in enumerate(box)]


def crop(source: Path, target: Path, name: str, surroundings: float, table: list[list[str | int]]) -> Counter[str]:
    """Writes the crops of one image and counts them by class; `unusable` counts the boxes that are left out.

    What is written is added to `table`, with the cell's box in the crop.
    """
    count: Counter[str] = Counter()
    with Image.open(source / "JPEGImages" / f"{name}.jpg") as image:
        for number, cell in enumerate(cells(source / "Annotations" / f"{name}.xml")):
            if not usable(cell.box, image.size):
                count["unusable"] += 1
                continue
            folder = target / cell.label
            folder.mkdir(parents=True, exist_ok=True)
            place, path = square(cell.box, image.size, surroundings), folder / f"{name}_{number:02d}.jpg"
            image.crop(place).save(path, quality=95)
            table.append([path.relative_to(target.parent).as_posix(), *inside(cell.box, place)])
            count[cell.label] += 1
    return count


def main(source: Path, target: Path, surroundings: float = SURROUNDINGS) -> dict[str, Counter[str]]:
    """Writes every part and the table of boxes, and returns what each part holds."""
    found, table = {}, list[list[str | int]]()
    for part in ("train", "val", "test"):
        names = (source / "ImageSets" / "Main" / f"{part}.txt").read_text().split()
        found[part] = sum((crop(source, target / part, name, surroundings, table) for name in names), Counter[str]())
        counts = ", ".join(f"{count} {label}" for label, count in sorted(found[part].items()))
        sys.stdout.write(f"{target / part}: {counts}\n")
    with (target / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "left", "top", "right", "bottom"], *table])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--surroundings", type=float, default=SURROUNDINGS, metavar="SHARE")
    arguments = parser.parse_args()
    if not (arguments.source / "ImageSets" / "Main").is_dir():
        sys.exit(f"{arguments.source} is not the BCCD folder: it has no ImageSets/Main")
    main(arguments.source, arguments.target, arguments.surroundings)
