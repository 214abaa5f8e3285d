"""Divides the ORL faces by image number: a folder of images for each person in each part.

    python recipes/faces/split_faces.py SOURCE TARGET

SOURCE is "The Database of Faces" (AT&T Laboratories Cambridge; Samaria and Harter 1994) or some of its persons, in the
original layout, `sN/K.pgm`. Written are TARGET/train, TARGET/val and TARGET/test, each with a folder for each person
that holds copies of the images 1 to 4, 5, and 6 to 10 (the usual split of halves; which are for validation is a design
choice). Nothing is drawn at random.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

PARTS = {"train": range(1, 5), "val": range(5, 6), "test": range(6, 11)}


def main(source: Path, target: Path) -> dict[str, int]:
    """Writes every part and returns how many images it holds."""
    found = dict.fromkeys(PARTS, 0)
    for person in people(source):
        for part, numbers in PARTS.items():
            folder = target / part / person.name
            folder.mkdir(parents=True, exist_ok=True)
            for number in numbers:
                shutil.copyfile(person / f"{number}.pgm", folder / f"{number}.pgm")
                found[part] += 1
    for part, count in found.items():
        sys.stdout.write(f"{target / part}: {count} faces\n")
    return found


def people(source: Path) -> list[Path]:
    """The folder of each person, in order."""
    return sorted(path for path in source.glob("s*") if (path / "10.pgm").is_file())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    arguments = parser.parse_args()
    if not people(arguments.source):
        sys.exit(f"{arguments.source} holds no person's folder of ten images, such as s1/1.pgm to s1/10.pgm")
    main(arguments.source, arguments.target)
