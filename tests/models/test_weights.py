"""Loading state dicts: forms, refusals and what the messages say."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from galago.errors import UserError
from galago.models.tiny import Tiny, tiny
from galago.models.weights import load_weights, read_weights


def same(first: nn.Module, second: nn.Module) -> bool:
    mine, other = first.state_dict(), second.state_dict()
    return all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
@pytest.mark.parametrize("inside", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_every_usual_form_is_read(tmp_path: Path, suffix: str, inside: str | None, prefix: str) -> None:
    teacher = tiny(width=4)
    state = {prefix + name: value for name, value in teacher.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    torch.save(state if inside is None else {inside: state, "best_prec1": 91.7}, path)
    assert same(tiny(width=4, weights=path), teacher)


def test_safetensors_are_read(tmp_path: Path) -> None:
    teacher = tiny(width=4)
    save_file(teacher.state_dict(), tmp_path / "weights.safetensors")
    assert same(tiny(width=4, weights=tmp_path / "weights.safetensors"), teacher)


def test_no_path_changes_nothing() -> None:
    model = Tiny(width=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert load_weights(model, None) is model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_old_files_without_batch_counters_are_read(tmp_path: Path) -> None:
    teacher = tiny(width=4)
    state = {name: value for name, value in teacher.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pt")
    assert torch.equal(tiny(width=4, weights=tmp_path / "old.pt").head.weight, teacher.head.weight)  # type: ignore[union-attr,arg-type]


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    torch.save({"state_dict": Harmful(tmp_path / "ran")}, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"bad\.pt.*never pickled objects"):
        read_weights(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"bad\.pth"):
        read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["junk.pt", "junk.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02" + bytes(100), b"PK\x03\x04" + bytes(50)])
def test_junk_is_a_message_not_a_traceback(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_weights(tmp_path / name)


def test_a_truncated_file_is_a_message_not_a_traceback(tmp_path: Path) -> None:
    torch.save(tiny(width=4).state_dict(), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"half\.pt"):
        read_weights(tmp_path / "half.pt")


def test_random_damage_is_a_message_not_a_traceback(tmp_path: Path) -> None:
    torch.save(tiny(width=4).state_dict(), tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    whole, random = (tmp_path / "whole.pt").read_bytes(), Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(5):
            damaged[random.randrange(2000)] = random.randrange(256)
        (tmp_path / "bad.pt").write_bytes(damaged)
        with contextlib.suppress(UserError):
            tiny(width=4, weights=tmp_path / "bad.pt")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt does not exist"):
        tiny(weights=Path("nowhere.pt"))


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "log.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        read_weights(tmp_path / "log.pt")


def test_another_number_of_classes_names_the_head(tmp_path: Path) -> None:
    torch.save(tiny(width=4).state_dict(), tmp_path / "ten.pt")
    with pytest.raises(UserError, match=r"head\.weight is 10×8, not 3×8.*strict=False"):
        tiny(classes=3, width=4, weights=tmp_path / "ten.pt")


def test_a_changed_head_is_kept_when_asked(tmp_path: Path) -> None:
    teacher = tiny(width=4)
    torch.save(teacher.state_dict(), tmp_path / "ten.pt")
    student = load_weights(Tiny(3, width=4), tmp_path / "ten.pt", strict=False)
    assert torch.equal(student.stem[0].weight, teacher.stem[0].weight)  # type: ignore[union-attr,index,arg-type]
    assert student.head.out_features == 3


@pytest.mark.parametrize("strict", [True, False])
def test_another_networks_file_is_refused_either_way(tmp_path: Path, strict: bool) -> None:
    torch.save({f"blocks.{i}.weight": torch.zeros(2) for i in range(9)}, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match=r"missing stem.*and \d+ more; unexpected blocks\.0.*and 6 more.*another network"
    ):
        load_weights(Tiny(width=4), tmp_path / "other.pt", strict)
