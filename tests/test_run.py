"""A run's folder: nothing half-written, nothing unpickled, everything that is wrong said in words."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from galago.data import Normalize
from galago.errors import UserError
from galago.models.by_name import torchvision_model
from galago.run import Run, atomic, load
from galago.tasks.classify import Classify
from galago.train import train
from samples import SmallNet, Stripes


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.fixture
def finished(tmp_path: Path, small_net: SmallNet) -> Path:
    run = Run(tmp_path / "run")
    run.begin({"model": 1}, seed=0)
    run.save_model(small_net, Normalize([0.5] * 3, [0.2] * 3))
    return run.folder


def test_a_loaded_model_is_the_saved_one(finished: Path, small_net: SmallNet):
    again = load(finished, allow=["samples"])
    image = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(image), small_net.eval()(image))
    assert not again.training
    assert again.normalization.mean.flatten().tolist() == [0.5] * 3


def test_a_network_of_an_earlier_run_trains_further_into_a_run_of_its_own(finished: Path, tmp_path: Path):
    recipe = {"model": {"class_path": "galago.run.load", "init_args": {"run": str(finished)}}}
    second, network = tmp_path / "second", load(finished, allow=["samples"])
    trained = train(network, Classify(2), Stripes(), second, epochs=1, accelerator="cpu", recipe=recipe)
    shutil.rmtree(finished)
    image = torch.rand(2, 3, 8, 8)
    assert torch.equal(load(second, allow=["samples"])(image), trained(image))


def test_a_strangers_package_is_not_imported(finished: Path):
    with pytest.raises(UserError, match="allow 'samples' by name"):
        load(finished)


@pytest.mark.parametrize("name", ["model.safetensors", "architecture.json", "last.ckpt"])
def test_a_pickle_in_place_of_a_file_never_runs(finished: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(finished)
    (finished / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        load(finished, allow=["samples"]) if name != "last.ckpt" else Run(finished).load_checkpoint(finished / name)
    assert not (finished / "exploded").exists()


def test_a_torch_archive_with_a_pickled_object_never_runs(finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(finished)
    torch.save({"learner": Bomb()}, finished / "last.ckpt")
    with pytest.raises(UserError, match="damaged"):
        Run(finished).load_checkpoint(finished / "last.ckpt")
    assert not (finished / "exploded").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "architecture.json"])
def test_a_truncated_file_is_named(finished: Path, name: str):
    content = (finished / name).read_bytes()
    (finished / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load(finished, allow=["samples"])


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_recipe_in_the_same_folder_is_refused_and_named(tmp_path: Path):
    run = Run(tmp_path / "run")
    run.begin({"epochs": 3, "data": {"class_path": "a"}}, seed=0)
    run.begin({"epochs": 3, "data": {"class_path": "a"}}, seed=0)
    with pytest.raises(UserError, match="epochs: 3 → 4"):
        run.begin({"epochs": 4, "data": {"class_path": "a"}}, seed=0)


def test_what_was_logged_after_the_checkpoint_is_forgotten(tmp_path: Path):
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.append({"step": step})
    with run.log.open("a") as file:
        file.write('{"step": 4, "lo')  # the crash
    run.rewind(2)
    assert run.history() == [{"step": 1}, {"step": 2}]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Run(tmp_path / "file" / "run").begin({}, seed=0)


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path):
    with pytest.raises(UserError, match="galago train"):
        load(tmp_path)


def test_a_network_that_asks_for_the_version_of_its_state_comes_back(tmp_path: Path) -> None:
    network = torchvision_model("mnasnet0_5", 3).eval()
    files = Run(tmp_path / "run")
    files.begin({"model": network.__dict__["built_from"]}, seed=0)
    files.save_model(network, Normalize([0.5] * 3, [0.5] * 3))
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "run")(image), network(image))
