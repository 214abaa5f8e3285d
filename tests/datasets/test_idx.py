from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from galago.datasets.idx import IDX, MNIST, FashionMNIST, parse
from galago.errors import UserError
from galago.spec import describe

TRAINING = np.random.default_rng(0).integers(0, 256, (30, 5, 7), dtype=np.uint8)
TEST = np.random.default_rng(1).integers(0, 256, (8, 5, 7), dtype=np.uint8)
LABELS = np.arange(30, dtype=np.uint8) % 3


def as_idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(as_idx(TRAINING))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(as_idx(LABELS)))
    (tmp_path / "t10k-images.idx3-ubyte.gz").write_bytes(gzip.compress(as_idx(TEST)))
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(as_idx(LABELS[:8]))
    return tmp_path


def test_files_are_read_compressed_or_not_and_in_both_spellings(folder: Path) -> None:
    data = IDX(str(folder), batch_size=30)
    (batch,) = data.train()
    order = batch.extra["index"].argsort()
    assert torch.equal(batch.input[order], torch.from_numpy(TRAINING).unsqueeze(1))
    assert batch.target[order].argmax(1).tolist() == LABELS.tolist()
    (test,) = data.test()
    assert torch.equal(test.input, torch.from_numpy(TEST).unsqueeze(1))
    assert data.classes == ("0", "1", "2")


def test_files_may_begin_with_another_name_and_be_in_the_usual_subfolders(folder: Path) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in folder.glob("*ubyte*"):
        path.rename(raw / path.name)
    assert MNIST(str(folder), batch_size=4).images == 30
    for path in raw.iterdir():
        path.rename(folder / path.name.replace("train", "emnist-train"))
    assert IDX(str(folder), training_files="emnist-train").images == 30


def test_every_argument_is_written_down(folder: Path) -> None:
    arguments = describe(IDX(str(folder), classes=["a", "b", "c"], test_files="t10k"))["init_args"]
    assert arguments["classes"] == ["a", "b", "c"]
    assert arguments["test_files"] == "t10k"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG....", "not an IDX file"),
        (as_idx(TRAINING)[:9], "ends within its header"),
        (as_idx(TRAINING)[:-1], "holds 1049 bytes but says 30×5×7"),
        (as_idx(TRAINING) + b"x", "holds 1051 bytes"),
        (b"\0\0\x0d\x01\0\0\0\1....", "type 13"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(folder: Path, content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(content)
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=rf"train-images-idx3-ubyte cannot be read as an IDX file: .*{said}"):
        IDX(str(folder))


def test_a_damaged_archive_is_refused_with_the_reason(folder: Path) -> None:
    path = folder / "train-labels-idx1-ubyte.gz"
    for content in (path.read_bytes()[:-12], b"not gzip", path.read_bytes()[:15] + b"\xff" * 30):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\.gz cannot be read"):
            IDX(str(folder))


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte and train-labels.*download: true"):
        MNIST(str(tmp_path / "nowhere"))
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\[\.gz\] is missing"):
        IDX(str(folder))


def test_images_and_labels_that_do_not_belong_together_are_refused(folder: Path) -> None:
    (folder / "t10k-labels.idx1-ubyte").write_bytes(as_idx(LABELS))
    with pytest.raises(UserError, match=r"of shape \[8, 5, 7\] and .* of \[30\] do not match"):
        IDX(str(folder))


def test_fashion_mnist_names_its_classes(folder: Path) -> None:
    data = FashionMNIST(str(folder), augment=[])
    assert len(data.classes) == 10
    assert data.classes[9] == "boot"


def test_the_real_mnist_is_read_as_it_was_published(real_data: Path) -> None:
    if not (real_data / "mnist").is_dir():
        pytest.skip(f"no mnist in {real_data}")
    data = MNIST(str(real_data / "mnist"), hold_out=5000)
    assert (data.images, len(data.testing.positions), len(data.validating.positions)) == (60_000, 10_000, 5000)
    source = data.training.source
    assert source.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.bincount(data.testing.source.labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    images = data.normalize(source.take(torch.arange(0, 60_000, 7)).images)
    assert abs(float(images.mean())) < 0.005
    assert abs(float(images.std()) - 1) < 0.005
    assert data.example().shape == (1, 1, 28, 28)
