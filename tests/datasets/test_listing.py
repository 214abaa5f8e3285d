from __future__ import annotations

from pathlib import Path

import pytest

from galago.datasets.listing import Item, Listing, class_names, list_images
from galago.errors import UserError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def relative(items: list[Item], root: Path) -> list[tuple[str, str]]:
    return [(str(Path(path).relative_to(root)), label) for path, label in items]


def test_a_folder_for_each_class_is_walked_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "dog/2.JPG", "dog/1.png", "cat/deep/er/3.jpeg", "cat/0.webp")
    touch(tmp_path, ".git/x.png", "cat/._0.jpg", "cat/notes.txt", "readme.md", "__MACOSX/cat/0.jpg")
    found = list_images(tmp_path)
    assert relative(found.training, tmp_path) == [
        ("cat/0.webp", "cat"),
        ("cat/deep/er/3.jpeg", "cat"),
        ("dog/1.png", "dog"),
        ("dog/2.JPG", "dog"),
    ]
    assert found.validation == found.test == []


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_published_parts_are_kept(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{name}/a/2.jpg", "test/b/3.jpg")
    found = list_images(tmp_path)
    assert relative(found.training, tmp_path) == [("train/a/1.jpg", "a"), ("train/b/1.jpg", "b")]
    assert relative(found.validation, tmp_path) == [(f"{name}/a/2.jpg", "a")]
    assert relative(found.test, tmp_path) == [("test/b/3.jpg", "b")]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    found = list_images(touch(tmp_path, "train/1.jpg", "plane/2.jpg"))
    assert {item.label for item in found.training} == {"train", "plane"}


def test_a_table_names_images_beside_it(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(
        "\ufeffextra,label,path,split\n,cat,a/1.jpg,train\n,dog,2.jpg,\n,dog, 3.jpg ,val\n,cat,/4.jpg,TEST\n"
    )
    found = list_images(table)
    assert found.training == [(str(tmp_path / "a/1.jpg"), "cat"), (str(tmp_path / "2.jpg"), "dog")]
    assert found.validation == [(str(tmp_path / "3.jpg"), "dog")]
    assert found.test == [("/4.jpg", "cat")]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "has no folder for each class"),
        (("a.jpg", "b.jpg"), "has no folder for each class"),
        (("cat/1.jpg",), "all images in .* are of one class, 'cat'"),
        (("cat/1.jpg", "dog/notes.txt"), "the class folder .*dog holds no images"),
        (("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"), "both val and valid"),
        (("train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"), "val has no folder for each class"),
    ],
)
def test_folders_that_cannot_be_used_are_explained(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        list_images(touch(tmp_path, *names))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column label and no column path.*is empty"),
        ("1.jpg,cat\n2.jpg,dog\n", "no column label and no column path.*is 1.jpg,cat"),
        ("path,class\n1.jpg,cat\n", "no column label; its first line must name"),
        ("path,label\n", "lists no training images"),
        ("path,label\n1.jpg,cat\n2.jpg,\n", "line 3 has no label"),
        ("path,label\n1.jpg,cat\n,dog\n", "line 3 has no path"),
        ("path,label,split\n1.jpg,cat,dev\n", "line 2: the split 'dev' is none of train, validation, test"),
        ("path,label\n1.jpg,cat\n2.jpg,cat\n", "of one class, 'cat'"),
    ],
)
def test_tables_that_cannot_be_used_are_explained(tmp_path: Path, text: str, said: str) -> None:
    table = tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=said):
        list_images(table)


def test_a_table_that_is_no_text_is_explained(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="cannot be read as a table"):
        list_images(table)


def test_what_is_neither_a_folder_nor_a_table_is_explained(tmp_path: Path) -> None:
    for name in ("nowhere", "photo.jpg"):
        (tmp_path / "photo.jpg").touch()
        with pytest.raises(UserError, match=r"neither a folder with a folder for each class nor a \.csv"):
            list_images(tmp_path / name)


def listing(*training: str, validation: tuple[str, ...] = ()) -> Listing:
    return Listing([Item("x", label) for label in training], [Item("y", label) for label in validation])


def test_classes_are_sorted_and_numbers_by_value() -> None:
    assert class_names(listing("dog", "ant", "dog"), None) == ("ant", "dog")
    assert class_names(listing("10", "9", "1"), None) == ("1", "9", "10")
    assert class_names(listing("10", "9", "a"), None) == ("10", "9", "a")


def test_an_order_of_classes_can_be_asked_for() -> None:
    assert class_names(listing("a", "b"), ["b", "a"]) == ("b", "a")


def test_classes_that_do_not_match_are_named() -> None:
    with pytest.raises(UserError, match="validation images are of class 'c', which is not among the training images"):
        class_names(listing("a", "b", validation=("c",)), None)
    with pytest.raises(UserError, match="training images are of class 'b', which is not among classes"):
        class_names(listing("a", "b"), ["a", "d"])
    with pytest.raises(UserError, match="no training images of 'd'"):
        class_names(listing("a", "b"), ["a", "b", "d"])
