"""Writes a small task of real texts from the Python standard library: which package is a piece of documentation from?

    python recipes/nas_kd/make_texts.py TARGET.csv

The texts are the paragraphs of at least 20 characters in the docstrings of eight packages of the standard library (they
are parsed, not imported; their tests are left out), with white space made single. Paragraphs that several packages
share are left out. What stands in one docstring belongs to one part: the CRC-32 of its file and name, modulo 10, is 0
or 1 for test, 2 for validation, else train. Nothing is drawn at random and nothing is downloaded; another version of
Python has other texts, so compare results of one table only.
"""

from __future__ import annotations

import argparse
import ast
import csv
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

PACKAGES = ("asyncio", "email", "http", "idlelib", "importlib", "logging", "multiprocessing", "tkinter")
SHORTEST = 20
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Text(NamedTuple):
    """A line of the table."""

    text: str
    label: str
    split: str


def main(library: Path, target: Path) -> dict[str, int]:
    """Writes the table and returns how many texts each part has."""
    found = [text for package in PACKAGES for text in texts(library, package)]
    homes = defaultdict(set)
    for text in found:
        homes[text.text].add(text.label)
    kept = {text.text: text for text in reversed(found) if len(homes[text.text]) == 1}  # the first of equal ones
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(Text._fields)
        table.writerows(sorted(kept.values()))
    counts = Counter(text.split for text in kept.values())
    sys.stdout.write(f"{target}: {', '.join(f'{counts[name]} {name}' for name in sorted(counts))}\n")
    return dict(counts)


def texts(library: Path, package: str) -> Iterator[Text]:
    """Every paragraph of a package's documentation, file by file."""
    for path in sorted((library / package).rglob("*.py")):
        name = path.relative_to(library)
        if not {"test", "tests", "idle_test"} & set(name.parts):
            yield from _of_file(path, name.as_posix(), package)


def _of_file(path: Path, name: str, package: str) -> Iterator[Text]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, DOCUMENTED) and (documentation := ast.get_docstring(node)):
            split = part(f"{name}:{getattr(node, 'name', '')}:{getattr(node, 'lineno', 0)}")
            paragraphs = [" ".join(one.split()) for one in documentation.split("\n\n")]
            yield from (Text(one, package, split) for one in paragraphs if len(one) >= SHORTEST)


def part(name: str) -> str:
    """Which part a docstring belongs to."""
    number = crc32(name.encode()) % 10
    return "test" if number < 2 else "validation" if number == 2 else "train"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, metavar="TARGET.csv")
    arguments = parser.parse_args()
    standard = Path(sysconfig.get_paths()["stdlib"])
    if missing := [package for package in PACKAGES if not (standard / package).is_dir()]:
        sys.exit(f"{standard} lacks {', '.join(missing)}; install Python's full standard library (python3-tk, idle)")
    main(standard, arguments.target)
