"""Planting: what a round keeps and gives back, exact resume across plantings, the grown network as it is shipped."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.optim import SGD

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.distill.attention import Attention
from galago.distill.distill import Distill
from galago.distill.hints import Hints
from galago.distill.logits import SoftTargets
from galago.distill.planting import Planting, Price
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, exported, identical
from galago.method import Method
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.probes.cost import Cost
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.oscillation import FreezeOscillations
from galago.quantize.quantize import Quantize
from galago.quantize.sign_flips import SignFlips
from galago.recipe import Parts
from galago.run import Run, load
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.train import train
from galago.trainer import finish
from samples import StopAt, Stopped, Stripes


def distill(*lessons: Any, classes: int = 3) -> Distill:
    torch.manual_seed(5)
    return Distill(Tiny(classes, 3, 8), lessons or (SoftTargets(4.0, 0.7),), 0.3)


def planting(**options: Any) -> Planting:
    """A round before the first step, in which a layer gains."""
    usual: dict[str, Any] = {"channels": 2, "first": 0, "every": 1, "trial": 4, "rate": 0.3}
    return Planting(**{"distill": distill(), **usual, **options})


def trial(*methods: Method, **options: Any) -> Trial:
    return Trial(tiny_network, classify(), TinyImages(), lambda: [*methods, planting(**options)])


def layers_of(method: Method) -> list[str]:
    assert isinstance(method, Planting)
    return [place.layer for place, _ in method.planted]


def test_it_obeys_the_laws() -> None:
    check_method(planting)
    assert layers_of(trial().learner.ideas[0]), "the laws were tried on a network that grew"


def test_the_loss_on_held_out_images_is_lower_whenever_a_plant_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    started = trial()
    model, method = started.learner.model, started.learner.ideas[0]
    for epoch in (1, 2):
        model = method.epoch(model, epoch)
    said = capsys.readouterr().err
    pairs = [line.partition("images ")[2].partition(",")[0].split(" → ") for line in said.splitlines()]
    assert len(pairs) == 3
    assert all(float(after) < float(before) for before, after in pairs)


def test_the_loss_that_is_compared_is_that_of_distill_with_labels() -> None:
    started = trial(first=9)
    learner, method = started.learner, started.learner.ideas[0]
    assert isinstance(method, Planting)
    before, _ = method._tried(learner.model, [], 0)
    learner.eval()
    with torch.no_grad():
        steps = [learner(batch).loss for batch in started.data.validation()]
    assert before == pytest.approx(torch.stack(steps).mean().item(), rel=1e-6)


def test_only_what_was_planted_learns_and_nothing_else_moves_by_a_bit() -> None:
    untouched = clone(Trial(tiny_network, classify(), TinyImages(), list).learner.model.state_dict())
    started = trial(channels=3)
    for number in range(4):
        started.step(number)
    now = started.learner.model.state_dict()
    grown = {name for name, tensor in now.items() if tensor.shape != untouched[name].shape}
    assert grown == {
        f"down.{name}" for name in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    } | {"head.weight"}
    for name, old in untouched.items():
        assert torch.equal(now[name][tuple(slice(size) for size in old.shape)], old), name
    assert (now["head.weight"][:, 10:] != 0).all()
    assert (now["down.1.running_mean"][10:] != 0).all()


def test_a_second_plant_freezes_the_first() -> None:
    started = trial()
    method, learner = started.learner.ideas[0], started.learner
    started.step(0)
    first = clone(learner.model.state_dict())
    learner.model = method.epoch(learner.model, 1)
    assert len(layers_of(method)) == 2
    assert {name for name, p in learner.model.named_parameters() if p.requires_grad} <= {
        name for name in learner.model.state_dict() if name.startswith(("down", "head", "block"))
    }
    started.optimizer = SGD([p for p in learner.model.parameters() if p.requires_grad], 0.1, 0.9, weight_decay=0.1)
    started.step(1)
    now = learner.model.state_dict()
    assert all(torch.equal(now[name][tuple(slice(s) for s in old.shape)], old) for name, old in first.items())


def test_a_round_without_gain_leaves_everything_as_it_was() -> None:
    """A learning rate that destroys whatever is planted; then nothing is frozen either."""
    started = trial(first=1, rate=1e4)
    model, method = started.learner.model, started.learner.ideas[0]
    objects, before = dict(model.named_parameters()), clone(model.state_dict())
    random = torch.get_rng_state()
    model = method.epoch(model, 1)
    assert layers_of(method) == []
    assert identical(before, dict(model.state_dict()))
    assert all(objects[name] is parameter and parameter.requires_grad for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in started.learner.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_rounds_come_when_they_are_due_and_end_after_idle_ones(capsys: pytest.CaptureFixture[str]) -> None:
    started = trial(first=1, every=2, rate=1e4, patience=2)
    for epoch in range(8):
        started.learner.ideas[0].epoch(started.learner.model, epoch)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[0].endswith("no layer gains from channels")
    assert said[2] == "planting ends: 2 rounds in a row gained less than 0.001"


def test_a_network_never_grows_beyond_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    started = trial(budget=1118 + 150)  # has 1,118; one plant has 100, the other 184
    for epoch in range(1, 4):
        started.learner.ideas[0].epoch(started.learner.model, epoch)
    assert layers_of(started.learner.ideas[0]) == ["down.0"]
    assert sum(p.numel() for p in started.learner.model.parameters()) == 1218
    assert "planting ends at 1,218 parameters" in capsys.readouterr().err


def test_a_price_divides_the_gain() -> None:
    for price, cost in ((Price.nothing, 1), (Price.parameters, 184), (Price.macs, 11_520)):
        method = planting(price=price, first=9)
        model = method.prepare(tiny_network(), TinyImages())
        (place, *_) = method._places
        assert place.layer == "block.first.0"
        assert method.score(model, place, 2.0) == 2.0 / cost


def test_adapters_of_lessons_learn_in_training_but_not_in_trials() -> None:
    method = planting(distill=distill(SoftTargets(), Hints(1.0, layers=["block"])), first=1)
    model = method.prepare(tiny_network(), TinyImages())
    before = clone(method.distill.lessons.state_dict())
    method.epoch(model, 1)
    assert layers_of(method)
    assert identical(before, dict(method.distill.lessons.state_dict()))
    assert all(parameter.grad is None for parameter in method.distill.parameters())


def test_a_layer_that_lessons_compare_does_not_grow() -> None:
    method = planting(distill=distill(Attention(1.0, layers=[-1])))
    method.prepare(tiny_network(), TinyImages())
    assert [place.layer for place in method._places] == ["block.first.0"]


def test_a_compiled_network_trains_as_one_that_is_not() -> None:
    trained = []
    for compiled in (False, True):
        started = trial(first=1)
        model, method = started.learner.model, started.learner.ideas[0]
        if compiled:
            model.compile(backend="eager")
        started.step(0)
        method.epoch(model, 1)
        started.optimizer = SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for number in (1, 2):
            started.step(number)
        trained.append(clone(model.state_dict()))
    assert identical(*trained)


def two_classes(**options: Any) -> Planting:
    return planting(**{"distill": distill(classes=2), "channels": 2, "rate": 0.1, **options})


def run(folder: Path, *methods: Method, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return train(
        Tiny(2, 3, 4), Classify(2), Stripes(), folder, methods=methods, **{"epochs": 4, "log_every": 1, **options}
    )


OPTIONS = {"average": 0.9, "optimizer": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01), "clip": 1.0}


@pytest.mark.parametrize(("at", "quantized"), [(4, False), (6, False), (7, False), (11, False), (6, True), (11, True)])
def test_a_run_killed_around_a_planting_and_resumed_equals_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, quantized: bool
) -> None:
    """Three steps an epoch, a checkpoint every two, rounds before the second and the third epoch and the fourth."""

    def methods() -> list[Method]:
        first: list[Method] = [Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8))] if quantized else [CutMix()]
        return [*first, two_classes(first=1), StopAt()]

    options = OPTIONS | {"checkpoint_every": 2}
    whole = run(tmp_path / "whole", *methods(), **options)
    monkeypatch.setattr(StopAt, "at", at)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", *methods(), **options)
    monkeypatch.setattr(StopAt, "at", 0)
    parts = run(tmp_path / "parts", *methods(), **options)
    assert sum(p.numel() for p in whole.parameters()) > sum(p.numel() for p in Tiny(2, 3, 4).parameters()) + 100
    assert identical(dict(whole.state_dict()), dict(parts.state_dict()))
    lines = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in Run(tmp_path / n).history()]
        for n in ("whole", "parts")
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("quantized", [False, True])
def test_the_grown_network_is_written_exported_and_proved_equal(tmp_path: Path, quantized: bool) -> None:
    first = [Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8))] if quantized else []
    trained = run(tmp_path, *first, two_classes(first=1), epochs=3, probes=[Cost()])
    record = json.loads((tmp_path / "architecture.json").read_text())
    assert {change["path"] for change in record["changes"]} >= {"down.0", "down.1", "head"}
    loaded, image = load(tmp_path), Stripes().normalize(Stripes().example())
    with torch.no_grad():
        assert torch.equal(loaded(image), trained(image))
    curve = [(line["parameters"], line["accuracy"]) for line in Run(tmp_path).history() if line["kind"] == "epoch"]
    assert curve[0][0] < curve[1][0] <= curve[2][0]
    deployed = Deployed(loaded, Stripes().normalize, Classify(2))
    path = onnx.export(deployed, Stripes().example(), tmp_path / "model.onnx")
    outcome = compare(deployed, {"onnxruntime": path}, Parts(Classify(2), Stripes(), ()), images=32)
    assert outcome["passed"], outcome


def test_a_network_that_grew_is_quantized_in_a_second_run(tmp_path: Path) -> None:
    run(tmp_path / "grown", two_classes(first=1), epochs=3)
    grown = load(tmp_path / "grown")
    wide = dict(grown.named_parameters())["down.0.weight"].shape
    train(grown, Classify(2), Stripes(), tmp_path / "quantized", methods=[Quantize(LSQWeight(4), LSQ(4))], epochs=1)
    again = load(tmp_path / "quantized")
    assert dict(again.named_parameters())["down.0.layer.weight"].shape == wide > torch.Size([8, 4, 3, 3])


def test_the_best_epoch_is_looked_for_among_networks_of_the_last_size(tmp_path: Path) -> None:
    """The smallest network would be the best of all, but its weights are another network's."""
    best = {"restore_best": True, "watch": "macs", "lower_is_better": True, "probes": [Cost()]}
    trained = run(tmp_path, two_classes(first=1, every=2), epochs=5, **best)
    lines = [line["parameters"] for line in Run(tmp_path).history() if line["kind"] == "epoch"]
    assert sum(p.numel() for p in trained.parameters()) == lines[-1] > lines[0]


def test_quantize_behind_it_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="list Planting behind Quantize"):
        run(tmp_path, two_classes(first=1), Quantize(LSQWeight(4), LSQ(4)))


def test_the_summary_says_what_grows_what_it_costs_and_what_is_chosen_on() -> None:
    method = planting(budget=2000)
    method.prepare(tiny_network(), TinyImages())
    console = Console(width=140, file=StringIO())
    console.print(method.summary())
    said = console.file.getvalue()
    for words in (
        "1,118 parameters now, 2,000 at most",
        "5 + 2",
        "+184",
        "+11,520",
        "block.conv",
        "give data a hold_out",
    ):
        assert words in said
    assert "cannot grow: an addition in block reads its result" in said


def test_images_that_were_held_out_are_no_reason_for_a_warning() -> None:
    class Apart(TinyImages):
        def test(self) -> list[Batch]:
            return self._batches(-2)

    method = planting()
    method.prepare(tiny_network(), Apart())
    assert method._table is not None
    assert method._table.caption is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels is 0; give 1 or more"),
        ({"every": 0}, "every is 0"),
        ({"trial": 0}, "trial is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"first": -1}, "first is -1"),
        ({"rate": 0.0}, "rate 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planting(**options)


def test_what_cannot_be_planted_is_said_before_training() -> None:
    with pytest.raises(UserError, match=r"'stem\.\*' matches no convolution that can grow: stem\.0: 2 operations"):
        planting(layers=["stem.*"]).prepare(tiny_network(), TinyImages())
    with pytest.raises(UserError, match="no layer of this network can grow"):
        planting().prepare(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), TinyImages())
    with pytest.raises(UserError, match="the teacher tells 4 classes apart"):
        planting(distill=distill(classes=4)).prepare(tiny_network(), TinyImages())


@pytest.mark.parametrize("counting", [FreezeOscillations, SignFlips])
def test_what_keeps_a_number_for_each_weight_is_refused_once_a_layer_has_grown(counting: type[Method]) -> None:
    started = trial(Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8)), counting())
    with pytest.raises(UserError, match=f"{counting.__name__} keeps a number for each weight, and .* another size now"):
        started.step(0)


@pytest.mark.parametrize("other", [CutMix, lambda: Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8))])
def test_it_trains_and_is_exported_with_other_methods(other) -> None:
    started = trial(other())
    for number in range(2):
        assert started.step(number).losses.keys() == {"cross_entropy", "soft_targets"}
    assert layers_of(started.learner.ideas[1])
    finished, image = finish(started.learner), started.image()
    with torch.no_grad():
        torch.testing.assert_close(exported(finished, image), finished(image))
