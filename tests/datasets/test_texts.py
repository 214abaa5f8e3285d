from __future__ import annotations

from pathlib import Path

import pytest
import torch

from galago.datasets.texts import Texts, as_image
from galago.errors import UserError


def table(folder: Path, *lines: str, name: str = "texts.csv") -> str:
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


LINES = ("text,label,split", '"one, two",b,train', "three,a,train", "four,b,validation", "five,a,test", "six,a,test")


def test_parts_labels_and_bytes_are_those_of_the_table(tmp_path: Path) -> None:
    data = Texts(table(tmp_path, *LINES), length=6, batch_size=2)
    assert data.classes == ("a", "b")
    assert (data.images, data.example().shape, data.example().dtype) == (2, (1, 1, 1, 6), torch.uint8)
    (batch,) = data.train()
    said = {
        bytes(row.flatten().tolist()): int(label)
        for row, label in zip(batch.input, batch.target.argmax(1), strict=True)
    }
    assert said == {b"one, t": 1, b"three\0": 0}
    found = [
        [int(label) for batch in part() for label in batch.target.argmax(1)] for part in (data.validation, data.test)
    ]
    assert found == [[1], [0, 0]]


def test_a_network_sees_bytes_as_they_are(tmp_path: Path) -> None:
    data = Texts(table(tmp_path, *LINES), length=6, batch_size=2)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, -1)
    assert torch.equal(data.normalize(every).round().long(), every.long())


def test_texts_are_held_out_where_no_part_is_given(tmp_path: Path) -> None:
    lines = ["text,label", *(f"text {number},{'ab'[number % 2]}" for number in range(20))]
    data = Texts(table(tmp_path, *lines), length=8, batch_size=4, hold_out=0.2, per_class=3)
    assert sum(len(batch.input) for batch in data.validation()) == 4
    assert sum(len(batch.input) for batch in data.plain()) == 6


def test_a_character_of_several_bytes_may_be_cut_and_zeros_are_padding_only(tmp_path: Path) -> None:
    assert as_image("aé", 2).tolist() == [[[97, 195]]]
    data = Texts(table(tmp_path, "text\tlabel", "x\0y\ta", "z\tb", name="t.tsv"), 4, 2, classes=["b", "a"], hold_out=1)
    source = data.training.source
    assert source.take(torch.tensor([0])).images.tolist() == [[[[120, 32, 121, 0]]]]
    assert data.training.source.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("words,label", "x,a"), "has no column text"),
        (("nothing",), "no column label and no column text"),
        (("text,label", "x,a", ",b"), "line 3 has no text"),
        (("text,label", "x,"), "line 2 has no label"),
        (("text,label,split", "x,a,testing"), "line 2: the split 'testing' is none of"),
        (("text,label",), "lists no training texts"),
        (("text,label", "x,a", "y,a"), "of one class, 'a'"),
        (("text,label,split", "x,a,train", "y,b,train", "z,c,test"), "also has texts of c"),
    ],
)
def test_a_table_that_cannot_be_learned_from_is_named(tmp_path: Path, lines: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Texts(table(tmp_path, *lines), hold_out=0.5)


def test_a_missing_file_a_folder_and_other_mistakes_are_named(tmp_path: Path) -> None:
    for root in (tmp_path / "nothing.csv", tmp_path):
        with pytest.raises(UserError, match="cannot be read as a table of text,label"):
            Texts(str(root))
    (tmp_path / "latin.csv").write_bytes("text,label\nné,a".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read as a table"):
        Texts(str(tmp_path / "latin.csv"))
    good = table(tmp_path, *LINES)
    with pytest.raises(UserError, match="0 bytes hold no text"):
        Texts(good, length=0)
    with pytest.raises(UserError, match="no training texts of c"):
        Texts(good, classes=["a", "b", "c"])
    with pytest.raises(UserError, match="of one class, 'a'"):
        Texts(good, classes=["a"])
