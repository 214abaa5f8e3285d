"""Where a network looked: test images, each beside itself with the map of its attention branch laid over it.

Only networks that draw such a map (`galago.models.attention_branch`) have any; `measure` stores a few images with their
maps in attention.npz. The page fetches nothing and holds no image files, so pixels are drawn as marks, of at most 40 on
a side and 4096 colors, which is little for the eye to miss and some 20 kB an image.
"""

from __future__ import annotations

import math
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from galago.deploy.report.drawing import Canvas, Figure
from galago.deploy.report.predictions import check_sizes
from galago.errors import UserError

FILE, SHOWN, SIDE, GAP, ROW, WIDTH = "attention.npz", 6, 96, 8, 122, 420
PIXELS = 40  # a side at most
_KINDS = {"image": "u", "map": "f", "target": "iu", "answer": "iu", "classes": "U"}
_GLOW = np.array([255.0, 90.0, 0.0])
Values = NDArray[np.float64]


class Looked(NamedTuple):
    """One image and its map."""

    image: Values  # H×W×3, 0 to 255
    map: Values  # h×w, 0 to 1
    words: str
    right: bool


def read_attention(folder: Path) -> list[Looked]:
    """The first stored images; none where nothing is stored.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        check_sizes(path, _KINDS)
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name][: None if name == "classes" else SHOWN] for name in _KINDS}
        return [_looked(arrays, place) for place in range(len(arrays["target"]))]
    except (OSError, ValueError, KeyError, IndexError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged: {(str(error) or 'it ends early').splitlines()[0]};"
            " delete it and run `galago measure` again"
        ) from error


def _looked(arrays: dict[str, NDArray[Any]], place: int) -> Looked:
    image, attention = arrays["image"][place].astype(np.float64), arrays["map"][place].astype(np.float64)
    if image.ndim != 3 or attention.ndim != 2 or not (image.size and attention.size and np.isfinite(attention).all()):
        raise ValueError("it does not hold images C×H×W and maps h×w")
    target, answer = int(arrays["target"][place]), int(arrays["answer"][place])
    if min(target, answer) < 0:
        raise ValueError("a class has a negative number")
    truth, taken = (str(arrays["classes"][one])[:20] for one in (target, answer))
    words = truth if target == answer else f"{truth}, taken for {taken}"
    colors = image[[0, 0, 0]] if len(image) < 3 else image[:3]
    return Looked(colors.transpose(1, 2, 0), attention.clip(0, 1), words, target == answer)


def attention_drawn(looked: list[Looked]) -> Figure | None:
    """Images in two columns, each beside itself with its map on it."""
    if not looked:
        return None
    canvas = Canvas(WIDTH, ROW * math.ceil(len(looked) / 2))
    for place, one in enumerate(looked):
        x, y = (WIDTH / 2) * (place % 2), float(ROW * (place // 2))
        image = resized(one.image, min(PIXELS, one.image.shape[0]), min(PIXELS, one.image.shape[1]))
        for number, shown in enumerate((image, overlaid(image, one.map))):
            left, scale = x + number * (SIDE + GAP), SIDE / max(shown.shape[:2])
            canvas.add('<g transform="translate({} {}) scale({})">{}</g>', left, y, str(round(scale, 4)), _marks(shown))
        canvas.text(x, y + SIDE + 13, one.words, "key" if one.right else "value")
    caption = (
        "Test images, and beside each where the attention branch looked: the brighter, the more; every map goes from"
        " its least value to its greatest."
    )
    return Figure("Where it looked", canvas.drawn("test images with attention maps laid over them"), caption)


def overlaid(image: Values, attention: Values) -> Values:
    """A gray image that glows where the map is greatest. H×W×3 and h×w."""
    low, high = float(attention.min()), float(attention.max())
    stretched = (attention - low) / ((high - low) or 1.0)
    glow = 0.75 * resized(stretched[:, :, None], *image.shape[:2])
    gray = image.mean(2, keepdims=True)
    mixed: Values = (1 - glow) * gray + glow * _GLOW
    return mixed


def resized(values: Values, height: int, width: int) -> Values:
    """Of H×W×C, another size: means of what falls together, the nearest where there are fewer.

    >>> resized(np.array([[[1.0], [3.0]]]), 1, 1).tolist()
    [[[2.0]]]
    """
    for axis, size in ((0, height), (1, width)):
        length = values.shape[axis]
        cuts = [(place * length // size, -(-(place + 1) * length // size)) for place in range(size)]
        values = np.stack([values.take(range(*cut), axis).mean(axis) for cut in cuts], axis)
    return values


def _marks(image: Values) -> Markup:
    """Pixels as paths, one a color; neighbors in a row of one color are one mark."""
    codes = (image.clip(0, 255) / 17).round().astype(int)
    runs: dict[str, list[str]] = {}
    for y, row in enumerate(codes):
        starts = [0, *(np.flatnonzero((row[1:] != row[:-1]).any(1)) + 1).tolist(), len(row)]
        for start, end in pairwise(starts):
            color = "#" + "".join(f"{part:x}" for part in row[start])
            runs.setdefault(color, []).append(f"M{start} {y}h{end - start}v1H{start}z")
    template = Markup('<path fill="{}" d="{}"/>')
    return Markup("").join(template.format(color, "".join(paths)) for color, paths in runs.items())
