from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from galago.datasets.boxed import Boxed, as_seen, read_boxes
from galago.datasets.digits import Digits
from galago.datasets.image_files import Files
from galago.datasets.image_folder import ImageFolder
from galago.errors import UserError

SPOT = (30, 10, 60, 40)  # left, top, right, bottom


def photographs(root: Path, size: tuple[int, int] = (100, 60)) -> Path:
    """Dark photographs of two classes with a white spot, and the table of the spots."""
    lines = ["path,left,top,right,bottom"]
    for part in ("train", "val", "test"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
                pixels[SPOT[1] : SPOT[3], SPOT[0] : SPOT[2]] = 255
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
                lines.append(f"{part}/{name}/{number}.png,{','.join(map(str, SPOT))}")
    (root / "boxes.csv").write_text("\n".join([*lines, f"test/b/2.png,0,0,{size[0]},{size[1]}"]) + "\n")
    return root


def folder(root: Path, size: int = 32, crop: float = 1.0) -> ImageFolder:
    return ImageFolder(str(root), size=size, crop=crop, batch_size=4, workers=0)


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (80, 80)])
@pytest.mark.parametrize("crop", [1.0, 0.7])
def test_boxes_lie_where_the_object_is_seen(tmp_path: Path, size: tuple[int, int], crop: float) -> None:
    data = Boxed(folder(photographs(tmp_path, size), crop=crop), tmp_path / "boxes.csv")
    for batch in data.test():
        for image, boxes in zip(batch.input, batch.extra["box"], strict=True):
            rows, columns = ((image[0] > 127).any(axis).nonzero()[:, 0] for axis in (1, 0))
            seen = torch.tensor([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1])
            assert (boxes[0] - seen).abs().max() <= 1.0


def test_an_image_may_have_several_boxes_and_others_are_filled_up_with_empty_ones(tmp_path: Path) -> None:
    data = Boxed(folder(photographs(tmp_path)), tmp_path / "boxes.csv")
    boxes = torch.cat([batch.extra["box"] for batch in data.test()])
    assert boxes.shape == (6, 2, 4)
    assert (boxes[:5, 1] == 0).all()
    assert boxes[5, 1].tolist() == [0, 32, 0, 32]


def test_everything_else_is_the_other_data_sets(tmp_path: Path) -> None:
    plain = folder(photographs(tmp_path))
    data = Boxed(plain, tmp_path / "boxes.csv")
    assert (data.classes, data.batch_size, data.images) == (plain.classes, plain.batch_size, plain.images)
    assert torch.equal(data.example(), plain.example())
    assert len(data.test()) == len(plain.test())
    for own, other in ((data.train(1), plain.train(1)), (data.validation(), plain.validation())):
        for one, two in zip(own, other, strict=True):
            assert torch.equal(one.input, two.input)
            assert "box" not in one.extra


def test_an_image_of_the_size_that_the_network_sees_is_left_as_it_is() -> None:
    source = Files([], [], (3, 60, 100), crop=0.5)
    assert as_seen(SPOT, (100, 60), source) == [10, 40, 30, 60]


def test_tables_that_say_nothing_usable_are_refused_with_the_line(tmp_path: Path) -> None:
    table = tmp_path / "boxes.csv"
    with pytest.raises(UserError, match=r"boxes\.csv cannot be read"):
        read_boxes(table)
    table.write_text("path,left,top,right,bottom\na.png,1,2,3,4\nb.png,1,x,3,4\n")
    with pytest.raises(UserError, match=r"line 3 .* is not path,left,top,right,bottom"):
        read_boxes(table)
    table.write_text("path,left,top,right,bottom\na.png,3,2,3,4\n")
    with pytest.raises(UserError, match="is a box without area"):
        read_boxes(table)


def test_images_without_boxes_or_files_are_refused(tmp_path: Path) -> None:
    data = folder(photographs(tmp_path / "photographs"))
    (tmp_path / "few.csv").write_text("path,left,top,right,bottom\na.png,1,2,3,4\n")
    with pytest.raises(UserError, match=r"has no line for .*test.a.0\.png"):
        Boxed(data, tmp_path / "few.csv")
    with pytest.raises(UserError, match="must be in files"):
        Boxed(Digits(), tmp_path / "few.csv")
