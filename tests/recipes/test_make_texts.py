from __future__ import annotations

import csv
import runpy
import sysconfig
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "nas_kd" / "make_texts.py"))


def module(folder: Path, package: str, name: str, text: str) -> None:
    (folder / package / Path(name).parent).mkdir(parents=True, exist_ok=True)
    (folder / package / name).write_text(text)


def test_paragraphs_are_written_once_with_their_package_and_part(tmp_path: Path) -> None:
    long, other = "A sentence about\n    waiting for events.", "Something that all packages repeat."
    module(tmp_path, "asyncio", "a.py", f'def wait():\n    """{long}\n\n    short\n\n    {other}\n    """\n')
    module(tmp_path, "email", "b.py", f'"""{other}"""\nclass Mail:\n    """Holds one message and its parts."""\n')
    module(tmp_path, "email", "test/c.py", '"""This is a test and stays outside."""\n')
    counts = SCRIPT["main"](tmp_path, tmp_path / "out" / "texts.csv")
    with (tmp_path / "out" / "texts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["text"], row["label"]) for row in rows} == {
        ("A sentence about waiting for events.", "asyncio"),
        ("Holds one message and its parts.", "email"),
    }
    assert sum(counts.values()) == 2
    assert {row["split"] for row in rows} <= {"train", "validation", "test"}


def test_two_tenths_of_the_names_are_for_testing_and_one_for_validation() -> None:
    parts = [SCRIPT["part"](f"file.py:name:{number}") for number in range(5000)]
    shares = {name: parts.count(name) / 5000 for name in ("test", "validation", "train")}
    assert shares == pytest.approx({"test": 0.2, "validation": 0.1, "train": 0.7}, abs=0.02)


def test_the_real_texts_are_thousands_and_the_same_each_time(tmp_path: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    if missing := [package for package in SCRIPT["PACKAGES"] if not (library / package).is_dir()]:
        pytest.skip(f"{library} lacks {missing}")
    first, second = (SCRIPT["main"](library, tmp_path / f"{name}.csv") for name in "ab")
    assert first == second
    assert first["train"] > 2000
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
