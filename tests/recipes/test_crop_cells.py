from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from galago.datasets.image_folder import ImageFolder

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "bccd" / "crop_cells.py"))


def write_sample(root: Path, name: str, part: str, boxes: list[tuple[str, int, int, int, int]]) -> None:
    """An image whose pixels say where they are, with its annotation, in the layout of the published set."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:100, :200]
    Image.fromarray(np.stack([x, y, x * 0], 2).astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg", quality=100)
    corners = ("xmin", "ymin", "xmax", "ymax")
    objects = [
        f"<object><name>{label}</name><bndbox>"
        + "".join(f"<{corner}>{value}</{corner}>" for corner, value in zip(corners, box, strict=True))
        + "</bndbox></object>"
        for label, *box in boxes
    ]
    (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    (root / "ImageSets" / "Main" / f"{part}.txt").write_text(f"{name}\n")


def test_crops_are_squares_around_the_boxes_within_the_image(tmp_path: Path) -> None:
    boxes = [("RBC", 50, 30, 70, 50), ("WBC", 180, 80, 200, 100), ("RBC", 9, 9, 9, 9), ("RBC", 190, 0, 210, 40)]
    write_sample(tmp_path / "in", "a", "train", boxes)
    write_sample(tmp_path / "in", "b", "val", [("Platelets", 0, 0, 20, 15)])
    write_sample(tmp_path / "in", "c", "test", [("Platelets", 0, 0, 40, 90)])
    found = SCRIPT["main"](tmp_path / "in", tmp_path / "out")
    assert found["train"] == {"RBC": 1, "WBC": 1, "unusable": 2}
    assert found["val"] == {"unusable": 1}
    with Image.open(tmp_path / "out" / "train" / "RBC" / "a_00.jpg") as image:
        assert image.size == (24, 24)
        middle = np.asarray(image).reshape(-1, 3).mean(0)
    assert np.abs(middle[:2] - [59.5, 39.5]).max() < 1.5
    with Image.open(tmp_path / "out" / "train" / "WBC" / "a_01.jpg") as image:
        assert np.abs(np.asarray(image)[-1, -1, :2].astype(int) - [199, 99]).max() < 6, "moved to lie within the image"
    with Image.open(tmp_path / "out" / "test" / "Platelets" / "c_00.jpg") as image:
        assert image.size == (100, 100), "no larger than the image"


def test_the_real_cells_make_a_set_of_three_classes(real_data: Path, tmp_path: Path) -> None:
    if not (real_data / "bccd").is_dir():
        pytest.skip(f"no bccd in {real_data}")
    found = SCRIPT["main"](real_data / "bccd", tmp_path)
    assert sum(part["unusable"] for part in found.values()) == 2
    assert sum(sum(part.values()) for part in found.values()) == 4888
    data = ImageFolder(str(tmp_path), size=32, batch_size=64, workers=0)
    assert data.classes == ("Platelets", "RBC", "WBC")
    assert (data.images, len(data.validating.positions), len(data.testing.positions)) == (2804, 1137, 945)
    assert next(iter(data.train())).input.shape == (64, 3, 32, 32)
