"""Several trained networks behind one classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from galago import cli, recipe
from galago.data import Normalize
from galago.datasets.digits import Digits
from galago.errors import UserError
from galago.laws.trial import clone, identical
from galago.layers import classifier, find, swap
from galago.models.joined import Joined, joined
from galago.models.tiny import Tiny
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.run import Run, load
from galago.spec import architecture, rebuild


def students() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Tiny(width=4), Tiny(width=6)]


def test_it_is_a_linear_layer_on_embeddings_of_length_1() -> None:
    first, second = students()
    image = torch.randn(3, 1, 8, 8)
    taken: list[Tensor] = []
    for student in (first, second):
        student.eval()
        handle = student.head.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
        student(image)
        handle.remove()
    model = Joined([first, second], 5).eval()
    embedding = torch.cat([one / one.norm(dim=1, keepdim=True) for one in taken], 1)
    torch.testing.assert_close(model(image), embedding @ model.head.weight.T + model.head.bias)
    assert embedding.shape == (3, 20)


def test_fitting_the_head_leaves_every_student_as_it_was() -> None:
    model = joined(students(), 10)
    before, head = clone(model.students.state_dict()), model.head.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    for _ in range(3):
        model.train()
        loss = nn.functional.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.arange(16) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert identical(before, model.students.state_dict()), "BatchNorm's statistics included"
    assert not torch.equal(head, model.head.weight)
    assert all(parameter.grad is None for parameter in model.students.parameters())


def test_only_the_head_trains() -> None:
    model = joined(students(), 10)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_a_quantized_student_is_rebuilt_with_its_quantizers() -> None:
    data, (first, second) = Digits(), students()
    method = Quantize(LSQWeight(4), LSQ(4))
    first.__dict__["built_from"] = {"class_path": "galago.models.tiny.Tiny", "init_args": {"width": 4}}
    first = method.prepare(first, data)
    first(data.normalize(data.example()))
    model = joined([method.finish(first), second], 10)
    twin = rebuild(architecture(model))
    assert sum(isinstance(module, QuantLayer) for module in twin.modules()) == 4
    twin.load_state_dict(model.state_dict())
    image = data.normalize(data.example())
    assert torch.equal(twin.eval()(image), model.eval()(image))


def write_run(folder: Path, student: nn.Module, normalize: Normalize) -> dict[str, object]:
    run = Run(folder)
    run.folder.mkdir()
    run.save_model(student, normalize)
    return {"class_path": "galago.run.load", "init_args": {"run": str(folder)}}


def test_from_two_runs_to_proved_files(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(n), student, Digits().normalize) for n, student in enumerate(students())]
    content = {
        "run": str(tmp_path / "joined"),
        "model": {
            "class_path": "galago.models.joined.joined",
            "init_args": {"students": runs, "classes": 10},
        },
        "task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 10}},
        "data": {
            "class_path": "galago.augment.occlude.Occluded",
            "init_args": {
                "data": {"class_path": "galago.datasets.digits.Digits"},
                "visible": {"class_path": "galago.augment.occlude.LowerHalf"},
            },
        },
        "epochs": 1,
        "methods": [{"class_path": "galago.augment.occlude.Occlude"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    before = [load(tmp_path / str(n)).state_dict() for n in range(2)]
    recipe.train_recipe(["--config", str(tmp_path / "recipe.yaml")])
    for n in range(2):
        (tmp_path / str(n) / "model.safetensors").unlink()  # it needs them no more
    found = load(tmp_path / "joined")
    for student, old in zip(found.students, before, strict=True):
        assert identical({k: v for k, v in old.items() if not k.startswith("head.")}, dict(student.state_dict()))
    run = str(tmp_path / "joined")
    assert cli.main(["export", "--run", run]) == 0
    assert cli.main(["verify", "--run", run]) == 0
    verdict = json.loads((tmp_path / "joined" / "verify.json").read_text())
    assert all(verdict[engine]["agreement"] == 1 for engine in ("onnxruntime", "openvino"))


def test_without_students_there_is_nothing_to_join() -> None:
    with pytest.raises(UserError, match="students is empty"):
        joined([], 10)


def test_students_of_different_normalization_are_refused() -> None:
    both = students()
    for student, mean in zip(both, (0.3, 0.4), strict=True):
        student.__dict__["normalization"] = Normalize([mean], [0.5])
    with pytest.raises(UserError, match="normalized in different ways"):
        joined(both, 10)


def test_a_student_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(UserError, match="Conv2d has no linear layer"):
        joined([nn.Conv2d(1, 2, 3)], 10)


def test_the_classifier_is_found_through_what_wraps_it() -> None:
    data, model = Digits(), Tiny(width=4)
    assert classifier(model) == "head"
    wrapped = Quantize(LSQWeight(4), LSQ(4)).prepare(model, data)
    assert classifier(wrapped) == "head"
    assert isinstance(find(wrapped, "head"), QuantLayer)
    assert swap(wrapped, "head", nn.Identity())(data.normalize(data.example())).shape == (1, 8)
