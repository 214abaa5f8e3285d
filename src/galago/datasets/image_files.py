"""Images in files: what is in them, whether they can be used, and every kind turned into 8-bit grey or color.

Turned as the camera's note (EXIF) says; 16-bit grey scaled to 8; palettes, CMYK and other color spaces converted;
transparent parts on white (design choice). Files of 32-bit numbers are refused: their range is unknown.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from galago.datasets.source import Source, Taken
from galago.errors import UserError

_BANDS = {"1": 1, "L": 1, "I": 1, "F": 1, "LA": 2, "La": 2, "PA": 4, "RGBA": 4, "RGBa": 4, "RGBX": 3}
_END_OF_JPEG = b"\xff\xd9"


class OnError(Enum):
    """What to do about an image that cannot be used."""

    stop = "stop"
    skip = "skip"


class BadImageError(Exception):
    """Why a file cannot be used, in a few words."""


def decode(path: Path | str, channels: int, convert: bool) -> Tensor:
    """An image file as uint8 C×H×W.

    Args:
        path: the file.
        channels: 3 for color, 1 for grey.
        convert: whether an image with another number of channels is converted or refused.

    Raises:
        BadImageError: it cannot be used; says why.
    """
    try:
        with Image.open(path) as image:
            refuse(image, channels, convert)
            image.load()
            pixels = np.array(flatten(upright(image), "RGB" if channels == 3 else "L"))
    except BadImageError:
        raise
    except Exception as error:  # decoders fail in many ways, and one file must not end a training
        raise BadImageError(_why(error, path)) from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def refuse(image: Image.Image, channels: int, convert: bool) -> None:
    """Raises `BadImageError` for an image of the wrong kind; its header is enough to know."""
    found = 1 if image.mode.startswith("I;16") else _BANDS.get(image.mode, 3)
    if found != channels and not convert:
        raise BadImageError(f"has {found} channel{'s' * (found > 1)}, not {channels} (convert: true would convert it)")
    if image.mode == "F":
        raise BadImageError("holds floating-point numbers of unknown range; save it with 8 or 16 bits")


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF note says; as it is where that note is broken."""
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def flatten(image: Image.Image, mode: str) -> Image.Image:
    """Any kind of image as 8-bit `RGB` or `L`."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "P":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError("holds 32-bit numbers of unknown range; save it with 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _why(error: Exception, path: Path | str) -> str:
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    if isinstance(error, PermissionError):
        return "must not be read (permissions)"
    if isinstance(error, UnidentifiedImageError):
        return "is empty" if not os.path.getsize(path) else "is not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "has too many pixels to be opened safely"
    return f"is broken or truncated ({str(error).splitlines()[0] if str(error) else type(error).__name__})"


def inspect(path: Path | str, channels: int, convert: bool) -> str | None:
    """Why a file cannot be used, found as cheaply as its format allows; None where nothing is wrong.

    PNG files carry checksums. A JPEG file ends with a mark; one that does not, and all other formats, are decoded.
    """
    try:
        with Image.open(path) as image:
            refuse(image, channels, convert)
            if image.format == "PNG":
                image.verify()
                return None
            if image.format == "JPEG" and _ends_with_mark(path):
                return None
        decode(path, channels, convert)
    except BadImageError as error:
        return str(error)
    except Exception as error:  # as in `decode`
        return _why(error, path)
    return None


def _ends_with_mark(path: Path | str) -> bool:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
        return _END_OF_JPEG in file.read()


def inspect_all(paths: Sequence[str], channels: int, convert: bool) -> dict[int, str]:
    """Why files cannot be used, by position."""
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # PIL's remarks on odd but usable files
        reasons = pool.map(lambda path: inspect(path, channels, convert), paths)
        return {position: reason for position, reason in enumerate(reasons) if reason is not None}


class Files(Source):
    """Images in files.

    Args:
        paths: of the images.
        labels: their classes.
        shape: C, H, W as the network sees an image.
        crop: share of an image's shorter side that is kept when it is fitted.
        convert: whether an image with another number of channels is converted or refused.
        on_error: what to do about a file that cannot be used.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        shape: tuple[int, int, int],
        crop: float = 1.0,
        convert: bool = True,
        on_error: OnError = OnError.stop,
    ) -> None:
        self.paths, self.labels, self.shape = list(paths), torch.tensor(labels, dtype=torch.int64), shape
        self.crop, self.convert, self.on_error = crop, convert, on_error

    def take(self, positions: Tensor) -> Taken:
        """Images of different sizes, without those that are to be skipped."""
        images, kept, skipped = [], [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd but usable files
            for position in positions.tolist():
                try:
                    images.append(decode(self.paths[position], self.shape[0], self.convert))
                    kept.append(position)
                except BadImageError as error:
                    skipped.append(self._excuse(self.paths[position], error))
        return Taken(torch.tensor(kept, dtype=torch.int64), images, tuple(skipped))

    def _excuse(self, path: str, error: BadImageError) -> str:
        if self.on_error is OnError.stop:
            raise UserError(f"{path} {error}; mend or remove it, or leave such files out with on_error: skip")
        return f"{path} {error}"

    def fit(self, image: Tensor) -> Tensor:
        """Resizes so that the wanted shape covers `crop` of the shorter side, and cuts out the middle."""
        if tuple(image.shape) == self.shape:
            return image
        _, height, width = self.shape
        scale = max(height / image.shape[1], width / image.shape[2]) / self.crop
        size = [max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))]
        fitted: Tensor = functional.center_crop(functional.resize(image, size, antialias=True), [height, width])
        return fitted
