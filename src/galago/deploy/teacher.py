"""An exported file as a teacher: what it says is learnt from, whoever trained it and however it was shrunk.

    teacher:
      class_path: galago.deploy.teacher.FileTeacher
      init_args: {path: runs/large/model.onnx, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}

A file holds its own normalization and takes images as a camera gives them, so the normalized images of a training step
are turned back into pixels, rounded to 0 … 255 where the file takes integers. It has no layers that could be compared
and no gradients: lessons on features, and those that attack the teacher, need the network itself.

When: the teacher exists as a file only, or an 8-bit file answers faster here than its float network. It is run by the
CPU's engines, wherever the model trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from galago.data import Normalize
from galago.deploy.runtime import load


class FileTeacher(nn.Module):
    """A file that answers normalized images.

    Args:
        path: of the file, `*.onnx` for ONNX Runtime or `*.xml` for OpenVINO.
        mean: of each channel, as the data of the recipe have it.
        std: of each channel, likewise.
        threads: how many the engine may use; none: as many as it likes.
    """

    def __init__(self, path: Path, mean: Sequence[float], std: Sequence[float], threads: int | None = None) -> None:
        super().__init__()
        self.path, self.mean, self.std, self.threads = path, mean, std, threads
        self.normalization = Normalize(mean, std)
        self.file = load(path, threads)
        digest = hashlib.sha256(Path(path).read_bytes()).digest()  # tells files apart, where teachers are compared
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))

    def forward(self, image: Tensor) -> Tensor:
        """Normalized images N×C×H×W to the file's raw output, N×K."""
        pixels = (image.float() * self.normalization.std + self.normalization.mean).clamp(0, 1)
        if self.file.dtype == torch.uint8:
            pixels = (pixels * 255).round().to(torch.uint8)
        scores: Tensor = self.file(pixels)
        return scores.to(image.device)
