"""Golden vectors of the quantization methods, and small things that every quantizer's tests need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

Golden = dict[str, Tensor]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Arrays of one golden file as tensors, by key."""

    def load(name: str) -> Golden:
        path = Path(__file__).parent.parent / "golden" / "quantization" / f"{name}.npz"
        with np.load(path) as file:
            return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}

    return load
