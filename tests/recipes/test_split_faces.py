from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from galago.datasets.image_folder import ImageFolder

PATH = Path(__file__).parents[2] / "recipes" / "faces" / "split_faces.py"
SCRIPT = runpy.run_path(str(PATH))


def write_person(root: Path, name: str, count: int = 10) -> None:
    """Images whose grey value is their number."""
    (root / name).mkdir(parents=True)
    for number in range(1, count + 1):
        Image.fromarray(np.full((12, 10), number, dtype=np.uint8)).save(root / name / f"{number}.pgm")


def test_images_are_divided_by_their_number(tmp_path: Path) -> None:
    for name in ("s1", "s2", "s11"):
        write_person(tmp_path / "in", name)
    write_person(tmp_path / "in", "s3", count=9)
    (tmp_path / "in" / "SOURCE.md").write_text("no face")
    assert SCRIPT["main"](tmp_path / "in", tmp_path / "out") == {"train": 12, "val": 3, "test": 15}
    data = ImageFolder(str(tmp_path / "out"), size=[12, 10], channels=1, workers=0, crop=1.0)
    assert data.classes == ("s1", "s11", "s2")
    grey = [
        sorted({int(v) for batch in part() for v in batch.input.flatten()}) for part in (data.validation, data.test)
    ]
    assert grey == [[5], [6, 7, 8, 9, 10]]


def test_a_folder_without_faces_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PATH, tmp_path, tmp_path / "out"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"{tmp_path} holds no person's folder of ten images" in done.stderr


def test_the_real_faces_are_twenty_persons(real_data: Path, tmp_path: Path) -> None:
    if not (real_data / "orl-faces").is_dir():
        pytest.skip(f"no orl-faces in {real_data}")
    assert SCRIPT["main"](real_data / "orl-faces", tmp_path) == {"train": 80, "val": 20, "test": 100}
    data = ImageFolder(str(tmp_path), size=[32, 26], batch_size=40, channels=1, workers=0, together=4)
    assert (len(data.classes), data.images) == (20, 80)
    assert sorted(next(iter(data.train())).target.sum(0).tolist()) == [0] * 10 + [4] * 10
