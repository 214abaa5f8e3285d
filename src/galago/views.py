"""What networks said about named sets of images: asked once, stored, and read back as long as both are the same.

Files of a folder, one a view: `corrupted-fog-3.npz` holds outputs, targets and a fingerprint of whoever was asked and
of the images, so that a network trained anew, or other images, are asked again. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from galago.probe import Outputs
from galago.run import atomic


class StoredViews:
    """Outputs of one network, by view.

    Args:
        folder: where they are kept; made when something is first written.
        fingerprint: of the network and of the images; what was stored under another is not read.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def path(self, view: str) -> Path:
        """Where a view's outputs are kept."""
        return self.folder / f"{view.replace('/', '-')}.npz"

    def read(self, view: str) -> Outputs | None:
        """What was stored; None where there is nothing, nothing readable, or another network's."""
        try:
            # opened here, because NumPy leaves a file open that it cannot read
            with self.path(view).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                if str(stored["fingerprint"]) != self.fingerprint:
                    return None
                return Outputs(torch.from_numpy(stored["output"]), torch.from_numpy(stored["target"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, view: str, outputs: Outputs) -> None:
        """Stores a view's outputs, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {"output": outputs.output.numpy(), "target": outputs.target.numpy()}
        with atomic(self.path(view)) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, fingerprint=np.array(self.fingerprint), **arrays)


def fingerprint(files: Sequence[Path], *texts: str) -> str:
    """A number for the contents of files and texts, another for any change of them.

    >>> fingerprint([], "a", "b") == fingerprint([], "a", "b"), fingerprint([], "a", "b") == fingerprint([], "ab")
    (True, False)
    """
    parts = [hashlib.sha256(path.read_bytes()) for path in files]
    parts += [hashlib.sha256(text.encode()) for text in texts]
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()
