"""A teacher whose scores are computed once, kept in a file and read from there in all further epochs.

Geoffrey Hinton, Oriol Vinyals, Jeff Dean, "Distilling the Knowledge in a Neural Network", NIPS 2014 Deep Learning
Workshop, arXiv:1503.02531: a frozen teacher says the same of the same image.

    teacher:
      class_path: galago.distill.stored.StoredScores
      init_args:
        teacher: {class_path: galago.run.load, init_args: {run: runs/teacher}}
        file: runs/teacher/scores.npy

The first epoch asks the teacher as always and writes down, for each training image (`extra["index"]`), what it said; an
image that has an entry is never computed again, by this run or the next one that names the same file and teacher.

**Only where an image is always the same**: no random crops or flips (`augment: []`), no CutMix or Mixup. Stored scores
of another crop would teach what the model does not see. So the teacher is asked again in the first batch that has
entries, and in every two hundredth from there on, and training stops if it does not say what is stored. There are no
features: lessons that compare layers, or attack the teacher, need the network itself.

When: the teacher is many times as large as the model and its images are not augmented, such as in search or in tuning a
head. The file is a NumPy array N×K of float32, memory-mapped: 4 bytes an image and class, 2 MB for CIFAR-10, 5 GB for
ImageNet. In training by several processes each writes its own images' rows.

Recipe: recipes/distill/stored_resnet20_cifar10.yaml.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.distill.teacher import AskedByBatch, scores
from galago.errors import UserError
from galago.run import read_json, write_json

Rows = np.memmap[Any, np.dtype[np.float32]]

EVERY = 200  # batches that are looked up, to one that is compared
CLOSE = 1e-2  # of the largest score: another batch, precision or machine moves scores less than another crop does


class StoredScores(AskedByBatch):
    """A teacher and what it said of each image.

    Args:
        teacher: a trained network.
        file: where scores are kept, `*.npy`; made where it is missing.
    """

    def __init__(self, teacher: nn.Module, file: Path) -> None:
        super().__init__()
        self.teacher, self.file = teacher, Path(file)
        self._rows: Rows | None = None
        self._looked_up = 0

    def forward(self, image: Tensor) -> Tensor:
        """What the teacher says, asked anew: N×C×H×W to N×K."""
        return scores(self.teacher(image))

    @torch.no_grad()
    def answer(self, batch: Batch) -> Tensor:
        """What is stored of these images, or else what the teacher says now, which is stored.

        Raises:
            UserError: images have no numbers, or the teacher does not say of one what is stored.
        """
        if self.images is None or "index" not in batch.extra:
            raise UserError("StoredScores: these data do not number their images (`index`); use the teacher itself")
        place = np.asarray(batch.extra["index"].cpu())
        if self._rows is None:
            self._rows = opened(self.file, self.images, classes_of(self, batch), fingerprint(self.teacher))
        stored = torch.from_numpy(self._rows[place]).to(batch.input.device)
        known = stored[:, 0].isfinite()
        if known.all():
            self._looked_up += 1
            if self._looked_up % EVERY != 1:
                return stored
        said = self(batch.input)
        self._compare(stored[known], said[known])
        said = torch.where(known[:, None], stored, said)
        self._rows[place] = said.cpu().numpy()
        return said

    def _compare(self, stored: Tensor, said: Tensor) -> None:
        if len(stored) and (stored - said).abs().max() > CLOSE * said.abs().max():
            raise UserError(
                f"StoredScores: the teacher does not say of an image what is in {self.file}: it sees other images than"
                " those. Turn augmentation (`augment: []`) and mixing off, or use the teacher itself"
            )


def opened(file: Path, images: int, classes: int, teacher: str) -> Rows:
    """The array in a file, images×classes, not a number where there is no entry yet; made where it is missing.

    Raises:
        UserError: the file holds another teacher's scores, or cannot be read or written.
    """
    notes = file.with_suffix(".json")
    wanted = {"teacher": teacher, "images": images, "classes": classes}
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        empty = np.lib.format.open_memmap(file, "w+", np.float32, (images, classes))
        empty[:] = np.nan
        write_json(notes, wanted)
        return empty
    if read_json(notes) != wanted:
        raise UserError(f"{file} holds the scores of another teacher or of other data; delete it or name another file")
    return np.lib.format.open_memmap(file, "r+")


def classes_of(teacher: nn.Module, batch: Batch) -> int:
    """How many classes a teacher tells apart."""
    return int(teacher(batch.input[:1]).shape[1])


def fingerprint(teacher: nn.Module) -> str:
    """Tells teachers apart by their weights."""
    digest = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
