from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import jsonargparse
import pytest
import torch
from torchvision.transforms import v2

from galago.data import Data
from galago.datasets.image_files import OnError
from galago.datasets.image_folder import ImageFolder
from galago.errors import UserError
from galago.spec import describe

WriteImages = Callable[..., Path]


def labels(loader) -> list[int]:
    return [int(label) for batch in loader for label in batch.target.argmax(1)]


def break_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:-200])


def test_photographs_of_different_sizes_become_batches(write_images: WriteImages) -> None:
    data = ImageFolder(str(write_images()), size=(16, 24), batch_size=4, workers=0)
    assert data.classes == ("cat", "dog")
    assert len(data.train()) == 4
    for batch in (*data.train(), *data.validation()):
        assert batch.input.shape == (4, 3, 16, 24)
        assert batch.input.dtype == torch.uint8
        assert torch.equal(batch.input[:, 1].float().mean((1, 2)) > 50, batch.target.argmax(1) == 1), (
            "the class's color"
        )
    assert data.example().shape == (1, 3, 16, 24)


def test_every_class_is_split_alike(write_images: WriteImages) -> None:
    data = ImageFolder(str(write_images(count=10)), size=8, batch_size=2, workers=0, hold_out=0.3)
    assert sorted(labels(data.validation())) == [0] * 3 + [1] * 3
    assert not {*data.training.positions.tolist()} & {*data.validating.positions.tolist()}


def test_published_parts_are_used_as_they_are(write_images: WriteImages) -> None:
    root = write_images("photos/train", count=6).parent
    write_images("photos/val", classes=("dog",), count=3)
    data = ImageFolder(str(root), size=8, batch_size=12, workers=0)
    assert sorted(labels(data.train())) == [0] * 6 + [1] * 6
    assert labels(data.validation()) == labels(data.test()) == [1] * 3
    write_images("photos/test", count=2)
    assert labels(ImageFolder(str(root), size=8, workers=0).test()) == [0, 0, 1, 1]


def test_a_table_is_as_good_as_folders(write_images: WriteImages) -> None:
    root = write_images()
    rows = [
        f"photos/{name}/{i:02d}.jpg,{name},{'val' if i < 2 else 'train'}" for name in ("cat", "dog") for i in range(10)
    ]
    (root.parent / "table.csv").write_text("\n".join(["path,label,split", *rows]))
    data = ImageFolder(str(root.parent / "table.csv"), size=8, batch_size=16, workers=0)
    assert labels(data.validation()) == [0, 0, 1, 1]
    assert sorted(labels(data.train())) == [0] * 8 + [1] * 8


def test_workers_give_the_same_images(write_images: WriteImages) -> None:
    root = str(write_images())
    alone, helped = (list(ImageFolder(root, size=16, batch_size=4, workers=w).train(1)) for w in (0, 2))
    assert all(torch.equal(a.input, b.input) for a, b in zip(alone, helped, strict=True))


def test_a_set_reaches_workers_that_are_started_afresh(write_images: WriteImages) -> None:
    data = ImageFolder(str(write_images()), size=16, batch_size=4, workers=0, on_error=OnError.skip)
    loader = data.train(1)
    copy = pickle.loads(pickle.dumps(loader.set))
    assert copy.source.on_error is OnError.skip
    assert all(torch.equal(copy[k].batch.input, batch.input) for k, batch in enumerate(loader))


def test_grey_images_can_be_asked_for(write_images: WriteImages) -> None:
    data = ImageFolder(str(write_images()), size=8, batch_size=2, workers=0, channels=1)
    assert next(iter(data.train())).input.shape == (2, 1, 8, 8)
    assert data.normalize.mean.flatten().tolist() == pytest.approx([0.449])


def test_an_augmentation_that_leaves_another_size_is_followed_by_fitting(write_images: WriteImages) -> None:
    augment = [v2.RandomHorizontalFlip(), v2.RandomRotation(10)]
    data = ImageFolder(str(write_images()), size=8, batch_size=2, workers=0, augment=augment)
    assert next(iter(data.train())).input.shape == (2, 3, 8, 8)


def test_broken_files_stop_before_training_and_the_first_ten_are_named(write_images: WriteImages) -> None:
    root = write_images(count=12)
    break_files(root, *(f"cat/{i:02d}.jpg" for i in range(11)))
    (root / "dog" / "text.png").write_text("no image")
    with pytest.raises(UserError) as caught:
        ImageFolder(str(root), size=8)
    said = str(caught.value).splitlines()
    assert said[0] == "12 of 25 images cannot be used:"
    assert said[1].strip().startswith(f"{root}/cat/00.jpg is broken or truncated")
    assert len(said) == 13
    assert said[-2].strip() == "and 2 more"
    assert "on_error: skip" in said[-1]


def test_broken_files_are_left_out_and_told_once(write_images: WriteImages, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images(count=10)
    break_files(root, "cat/03.jpg", "dog/04.jpg")
    with caplog.at_level(logging.WARNING):
        data = ImageFolder(str(root), size=8, batch_size=2, workers=0, on_error=OnError.skip)
        list(data.train()), list(data.validation())
    assert data.images == 18
    (record,) = caplog.records
    assert "2 of 20 images cannot be used" in record.getMessage()
    assert "cat/03.jpg" in record.getMessage()


def test_a_class_of_which_nothing_is_left_is_named(write_images: WriteImages) -> None:
    root = write_images(count=3)
    break_files(root, "cat/00.jpg", "cat/01.jpg", "cat/02.jpg")
    with pytest.raises(UserError, match=r"no usable training images of class cat are left"):
        ImageFolder(str(root), size=8, on_error=OnError.skip)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_during_training_is_named_without_a_traceback(
    write_images: WriteImages, workers: int
) -> None:
    root = write_images()
    data = ImageFolder(str(root), size=8, batch_size=16, workers=workers)
    list(data.train(0))
    (root / "cat" / "05.jpg").write_text("overwritten")
    (root / "dog" / "05.jpg").unlink()
    with pytest.raises(UserError, match=r"05\.jpg is not (an image|there); mend or remove it") as caught:
        list(data.train(1)), list(data.validation())
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_during_training_can_be_left_out(write_images: WriteImages, workers: int) -> None:
    root = write_images()
    data = ImageFolder(str(root), size=8, batch_size=16, workers=workers, on_error=OnError.skip)
    broken = data.training.source.paths[int(data.training.positions[3])]
    Path(broken).write_text("overwritten")
    (batch,) = data.train(1)
    assert len(batch.input) == len(batch.target) == len(batch.extra["index"]) == 15
    assert int(data.training.positions[3]) not in batch.extra["index"]


def test_looking_at_every_file_first_can_be_left_out(write_images: WriteImages) -> None:
    root = write_images()
    break_files(root, "cat/03.jpg")
    assert ImageFolder(str(root), size=8, check=False).images == 20


def test_wrong_channels_count_as_unusable_where_nothing_is_to_be_converted(write_images: WriteImages) -> None:
    with pytest.raises(UserError, match="has 3 channels, not 1"):
        ImageFolder(str(write_images()), size=8, channels=1, convert=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"channels": 2}, "channels: 2"),
        ({"crop": 0}, "crop: 0"),
        ({"crop": 1.5}, "crop: 1.5"),
        ({"size": 0}, "size: 0"),
        ({"size": [8, 8, 8]}, r"size: \[8, 8, 8\]"),
        ({"hold_out": 0}, "hold_out"),
        ({"mean": [0.5]}, "each of 3 channels"),
        ({"classes": ["cat"]}, "'dog', which is not among classes"),
    ],
)
def test_arguments_that_make_no_sense_are_named(
    write_images: WriteImages, arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        ImageFolder(str(write_images()), **{"size": 8, **arguments})


def test_every_argument_is_written_down(write_images: WriteImages) -> None:
    arguments = describe(ImageFolder(str(write_images()), size=[8, 9], on_error=OnError.skip, hold_out=0.25))[
        "init_args"
    ]
    assert arguments["size"] == [8, 9]
    assert arguments["on_error"] == "skip"
    assert arguments["hold_out"] == 0.25
    assert arguments["classes"] == ["cat", "dog"]


def test_a_recipe_names_enumerations_and_transforms(write_images: WriteImages) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=Data)
    crop = {"class_path": "torchvision.transforms.v2.RandomCrop", "init_args": {"size": 8, "pad_if_needed": True}}
    arguments = {
        "root": str(write_images()),
        "size": 8,
        "workers": 0,
        "batch_size": 2,
        "on_error": "skip",
        "augment": [crop],
    }
    recipe = {"data": {"class_path": "galago.datasets.image_folder.ImageFolder", "init_args": arguments}}
    data = parser.instantiate(parser.parse_object(recipe)).data
    assert data.on_error is OnError.skip
    assert [type(transform) for transform in data.augment] == [v2.RandomCrop]
    assert next(iter(data.train())).input.shape == (2, 3, 8, 8)
    again = parser.instantiate(parser.parse_object({"data": describe(data)})).data
    assert torch.equal(next(iter(again.train())).input, next(iter(data.train())).input)
