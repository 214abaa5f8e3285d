from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from galago.datasets.image_files import BadImageError, Files, OnError, decode, inspect, inspect_all
from galago.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]


def saved(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


def smooth(width: int = 300, height: int = 200) -> Image.Image:
    """A picture that survives JPEG compression well."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) // 3], 2).astype(np.uint8))


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "ppm"])
def test_color_comes_back_exactly(tmp_path: Path, ending: str) -> None:
    image = decode(saved(tmp_path / f"a.{ending}", Image.fromarray(RGB)), 3, convert=True)
    assert torch.equal(image, torch.from_numpy(RGB).permute(2, 0, 1))


def test_grey_becomes_three_equal_channels_and_color_becomes_luminance(tmp_path: Path) -> None:
    grey, color = (saved(tmp_path / name, Image.fromarray(a)) for name, a in (("g.png", GREY), ("c.png", RGB)))
    assert torch.equal(decode(grey, 3, True), torch.from_numpy(GREY).expand(3, -1, -1))
    assert torch.equal(decode(grey, 1, False), torch.from_numpy(GREY).unsqueeze(0))
    luminance = (RGB @ np.array([299, 587, 114])) / 1000
    assert np.abs(decode(color, 1, True).numpy()[0] - luminance).max() <= 1


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_cut_off(tmp_path: Path, ending: str) -> None:
    deep = np.linspace(0, 65535, 12 * 9).reshape(12, 9).astype(np.uint16)
    image = decode(saved(tmp_path / f"deep.{ending}", Image.fromarray(deep)), 1, convert=True)
    assert np.abs(image.numpy()[0] - deep / 257).max() <= 0.5


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    alpha = np.full((12, 9), 255, dtype=np.uint8)
    alpha[:6] = 0
    image = decode(saved(tmp_path / "a.png", Image.fromarray(np.dstack([RGB, alpha]))), 3, True)
    assert (image[:, :6] == 255).all()
    assert torch.equal(image[:, 6:], torch.from_numpy(RGB[6:]).permute(2, 0, 1))


def test_palettes_keep_their_colors_and_their_transparent_one_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 0]], dtype=np.uint8), mode=None).convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250] + [0] * 759)
    plain = decode(saved(tmp_path / "p.png", image), 3, True)
    assert plain[:, 0, 1].tolist() == [200, 0, 0]
    assert plain[:, 1, 0].tolist() == [0, 0, 250]
    image.save(tmp_path / "t.png", transparency=0)
    assert decode(tmp_path / "t.png", 3, True)[:, 0].T.tolist() == [[255, 255, 255], [200, 0, 0]]


def test_cmyk_and_black_and_white_are_converted(tmp_path: Path) -> None:
    cmyk = decode(saved(tmp_path / "c.tiff", Image.new("CMYK", (4, 3), (0, 255, 255, 0))), 3, True)
    assert cmyk[:, 0, 0].tolist() == [255, 0, 0]
    binary = decode(saved(tmp_path / "b.png", Image.fromarray(GREY > 100)), 1, True)
    assert set(binary.unique().tolist()) == {0, 255}


@pytest.mark.parametrize(
    ("note", "turned"), [(1, RGB), (3, RGB[::-1, ::-1]), (6, np.rot90(RGB, -1)), (8, np.rot90(RGB))]
)
def test_images_are_turned_as_the_camera_says(tmp_path: Path, note: int, turned: np.ndarray) -> None:
    exif = Image.Exif()
    exif[274] = note
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(decode(tmp_path / "a.png", 3, True), torch.from_numpy(turned.copy()).permute(2, 0, 1))


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be used, and why."""
    for ending in ("jpg", "png", "bmp", "tiff", "webp"):
        smooth().save(tmp_path / f"whole.{ending}", lossless=True)
        content = (tmp_path / f"whole.{ending}").read_bytes()
        (tmp_path / f"cut.{ending}").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / "text.jpg").write_text("this is no photograph")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.zeros((3, 3), dtype=np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((3, 3), -5, dtype=np.int32)).save(tmp_path / "wide.tiff")
    content = bytearray((tmp_path / "whole.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(content)
    reasons = {
        **{f"cut.{ending}": "broken or truncated" for ending in ("jpg", "png", "bmp", "tiff")},
        "cut.webp": "is (broken or truncated|not an image)",
        "flipped.png": "broken or truncated",
        "text.jpg": "is not an image",
        "empty.png": "is empty",
        "folder.png": "is a folder",
        "missing.jpg": "is not there",
        "float.tiff": "floating-point",
        "wide.tiff": "32-bit",
    }
    return {name: (tmp_path / name, reason) for name, reason in reasons.items()}


def test_every_kind_of_broken_file_is_found_by_looking_and_by_reading(broken: dict[str, tuple[Path, str]]) -> None:
    for path, reason in broken.values():
        assert any(part in str(inspect(path, 3, True)) for part in reason.split("(")[-1].rstrip(")").split("|")), path
        with pytest.raises(BadImageError, match=reason):
            decode(path, 3, True)


def test_nothing_is_said_of_whole_files(tmp_path: Path) -> None:
    for ending in ("jpg", "png", "bmp", "tiff", "webp", "gif"):
        assert inspect(saved(tmp_path / f"a.{ending}", smooth()), 3, True) is None
    trailing = tmp_path / "trailing.jpg"
    trailing.write_bytes((tmp_path / "a.jpg").read_bytes() + b"\0" * 5000)
    assert inspect(trailing, 3, True) is None, "bytes after the end are harmless"


@pytest.mark.parametrize(
    ("image", "channels", "said"),
    [
        (RGB, 1, "has 3 channels, not 1"),
        (GREY, 3, "has 1 channel, not 3"),
        (np.dstack([RGB, GREY]), 3, "has 4 channels"),
    ],
)
def test_other_channels_can_be_refused(tmp_path: Path, image: np.ndarray, channels: int, said: str) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(image))
    assert said in str(inspect(path, channels, convert=False))
    with pytest.raises(BadImageError, match=said):
        decode(path, channels, convert=False)


def test_reasons_are_given_by_position(broken: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("whole.jpg", "cut.jpg", "whole.png", "text.jpg")]
    assert sorted(inspect_all(paths, 3, True)) == [1, 3]


def test_a_broken_file_stops_loading_and_is_named(broken: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    files = Files([str(tmp_path / "whole.jpg"), str(tmp_path / "cut.jpg")], [0, 1], (3, 8, 8))
    assert len(files.take(torch.tensor([0])).images) == 1
    with pytest.raises(UserError, match=r"cut\.jpg is broken or truncated .*; mend or remove it.*on_error: skip"):
        files.take(torch.tensor([0, 1]))


def test_a_broken_file_is_left_out_where_that_is_wanted(broken: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("text.jpg", "whole.jpg")]
    kept, images, skipped = Files(paths, [0, 1], (3, 8, 8), on_error=OnError.skip).take(torch.tensor([0, 1]))
    assert kept.tolist() == [1]
    assert len(images) == 1
    assert skipped == (f"{paths[0]} is not an image",)


@pytest.mark.parametrize("shape", [(3, 20, 20), (3, 16, 32), (3, 250, 100)])
@pytest.mark.parametrize("size", [(40, 80), (80, 40), (7, 9)])
def test_fitting_keeps_the_middle_in_proportion(shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    files = Files([], [], shape, crop=0.8)
    height, width = size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0] = ((torch.arange(height).view(-1, 1) + 0.5) * 255 / height).to(torch.uint8)
    image[1] = ((torch.arange(width) + 0.5) * 255 / width).to(torch.uint8)
    fitted = files.fit(image)
    assert tuple(fitted.shape) == shape
    down, right = fitted[0].float().mean(1), fitted[1].float().mean(0)
    assert abs(float(down.mean()) - 127) < 10, "the middle of the image is in the middle"
    assert abs(float(right.mean()) - 127) < 10
    kept_down, kept_right = (float(v.max() - v.min()) / 255 for v in (down, right))
    assert max(kept_down, kept_right) < 0.83, "no more than the share of the shorter side that is to be kept"


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    image = torch.from_numpy(RGB).permute(2, 0, 1)
    assert Files([], [], (3, 12, 9), crop=0.5).fit(image) is image


def test_odd_but_usable_files_raise_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = (saved(tmp_path / "a.jpg", smooth())).read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:2] + b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\x7f" + content[2:])
    with caplog.at_level(logging.WARNING):
        assert inspect_all([str(tmp_path / "a.jpg")], 3, True) == {}
        assert len(Files([str(tmp_path / "a.jpg")], [0], (3, 200, 300)).take(torch.tensor([0])).images) == 1
