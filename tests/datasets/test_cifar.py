from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from galago.datasets.cifar import CIFAR10, CIFAR100
from galago.errors import UserError
from galago.spec import describe


def write_records(path: Path, labels: np.ndarray, images: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.concatenate([labels.reshape(len(images), -1), images.reshape(len(images), -1)], 1).tobytes())


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """CIFAR-10 with two training batches of 20 images and 10 test images."""
    folder = tmp_path / "cifar-10-batches-bin"
    for k in (1, 2):
        write_records(folder / f"data_batch_{k}.bin", np.arange(20, dtype=np.uint8) % 10, images(20, k))
    write_records(folder / "test_batch.bin", np.arange(10, dtype=np.uint8), images(10, 3))
    (folder / "batches.meta.txt").write_text("a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n\n")
    return tmp_path


def test_whatever_batches_exist_are_read_in_order(small: Path) -> None:
    data = CIFAR10(str(small), batch_size=40, augment=[])
    (batch,) = data.train()
    order = batch.extra["index"].argsort()
    assert torch.equal(batch.input[order], torch.from_numpy(np.concatenate([images(20, 1), images(20, 2)])))
    assert batch.target[order].argmax(1).tolist() == [k % 10 for k in range(20)] * 2
    assert torch.equal(torch.cat([b.input for b in data.validation()]), torch.from_numpy(images(10, 3)))
    assert data.classes == tuple("abcdefghij")


def test_the_folder_of_the_files_itself_may_be_named(small: Path) -> None:
    assert CIFAR10(str(small / "cifar-10-batches-bin"), batch_size=4).images == 40


def test_without_test_images_some_must_be_held_out(small: Path) -> None:
    (small / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    with pytest.raises(UserError, match="hold_out"):
        CIFAR10(str(small))
    data = CIFAR10(str(small), hold_out=10, batch_size=10)
    assert sum(len(batch.input) for batch in data.test()) == 10


def test_the_usual_augmentation_pads_crops_and_flips(small: Path) -> None:
    batches = [next(iter(CIFAR10(str(small), batch_size=40, augment=a).train())) for a in ([], None)]
    plain, augmented = (batch.input for batch in batches)
    places = 0
    for image, found in zip(plain, augmented, strict=True):
        padded = torch.nn.functional.pad(image, [4, 4, 4, 4])
        windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        places += any((candidates == found).flatten(1).all(1).any() for candidates in (windows, windows.flip(-1)))
    assert places == 40


def test_missing_files_are_told_with_their_layout_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar-10-batches-bin with data_batch_1\.bin.*download: true"):
        CIFAR10(str(tmp_path))
    with pytest.raises(UserError, match=r"cifar-100-binary with train\.bin.*download: true"):
        CIFAR100(str(tmp_path))


def test_a_truncated_file_is_named(small: Path) -> None:
    path = small / "cifar-10-batches-bin" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"data_batch_2\.bin is damaged: 61455 bytes"):
        CIFAR10(str(small))


@pytest.mark.parametrize(("coarse", "label", "classes"), [(False, [99, 0, 50], 100), (True, [19, 0, 7], 20)])
def test_cifar_100_has_fine_and_coarse_classes(tmp_path: Path, coarse: bool, label: list[int], classes: int) -> None:
    labels = np.array([[19, 99], [0, 0], [7, 50]], dtype=np.uint8)
    for name in ("train", "test"):
        write_records(tmp_path / "cifar-100-binary" / f"{name}.bin", labels, images(3, 4))
    data = CIFAR100(str(tmp_path), coarse=coarse)
    (batch,) = data.validation()
    assert batch.target.argmax(1).tolist() == label
    assert batch.target.shape == (3, classes)
    assert torch.equal(batch.input, torch.from_numpy(images(3, 4)))


def test_every_argument_is_written_down(small: Path) -> None:
    found = describe(CIFAR10(str(small), hold_out=10))["init_args"]
    assert found["root"] == str(small)
    assert found["hold_out"] == 10
    assert found["augment"] is None
    assert found["std"] == [0.2470, 0.2435, 0.2616]


def test_the_real_images_are_read_as_they_were_published(real_data: Path, tmp_path: Path) -> None:
    if not (real_data / "unpack_cifar10.py").exists():
        pytest.skip(f"no unpack_cifar10.py in {real_data}")
    subprocess.run([sys.executable, real_data / "unpack_cifar10.py", tmp_path], check=True, capture_output=True)
    data = CIFAR10(str(tmp_path), hold_out=5000)
    assert data.images == 40_000
    assert len(data.training.positions) == 35_000
    assert len(data.testing.positions) == 1000
    assert data.classes[int(data.training.source.labels[0])] == "frog"
    sheet = np.asarray(Image.open(real_data / "cifar-10" / "train_17.webp").convert("RGB"))
    tiles = sheet.reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    mine = data.training.source.take(torch.arange(17_000, 18_000)).images
    assert isinstance(mine, torch.Tensor)
    assert hashlib.sha256(mine.numpy().tobytes()).digest() == hashlib.sha256(tiles.tobytes()).digest()
    held = torch.cat([batch.target for batch in data.validation()]).sum(0)
    shares = torch.bincount(data.training.source.labels) / 8
    assert (held - shares).abs().max() <= 1
