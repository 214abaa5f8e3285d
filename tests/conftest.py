"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from samples import SmallNet, Stripes

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of files that start processes come first: a worker that had run engines for minutes once died so."""
    items.sort(key=lambda item: not starts_processes(item.path))


@cache
def starts_processes(file: Path) -> bool:
    """Whether a file's tests start processes, by its imports and loaders."""
    return any(word in file.read_text() for word in ("import subprocess", "multiprocessing", "workers="))


@pytest.fixture
def stripes() -> Stripes:
    return Stripes()


@pytest.fixture
def small_net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that stands beside the checkout; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("GALAGO_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set GALAGO_DATA to run this test")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _operators_are_read_once() -> Iterator[None]:
    """torch.onnx parses the source of 500 functions in each export; of 1.5 seconds that is 0.6, hundreds of times."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        read = cache(_registration.onnxscript_apis.get_torchlib_ops)
        patch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", read)
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
