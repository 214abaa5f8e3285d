"""Small sets of images to load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteImages = Callable[..., Path]


@pytest.fixture
def write_images(tmp_path: Path) -> WriteImages:
    """Writes `count` images of different sizes for each class, each of one color of its own, below a folder."""

    def write(
        folder: str = "photos", classes: tuple[str, ...] = ("cat", "dog"), count: int = 10, ending: str = "jpg"
    ) -> Path:
        for k, name in enumerate(classes):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20 + i, 26 + k, 3), (10 * i, 100 * k, 50), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{i:02d}.{ending}", quality=95)
        return tmp_path / folder

    return write
