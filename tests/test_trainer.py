"""The loop: resumed equals uninterrupted; schedules, groups, averaging and stopping do what they say."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.quantize.quantizer import OwnRates
from galago.regularize.label_smoothing import LabelSmoothing
from galago.run import Run, load
from galago.schedule import Constant, Cosine, Restarts
from galago.tasks.classify import Classify
from galago.train import train
from galago.trainer import Learner, Plan, follow, new_optimizer
from samples import SmallNet, StopAt, Stopped, Stripes


class Jitter(Method):
    """Draws random numbers and has a private state that must survive."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def step(self, batch: Batch, inner: Forward) -> Step:
        self.count += 1
        noise = torch.randn_like(batch.input) * 0.1 * self.count
        return inner(batch._replace(input=batch.input + noise))


def trained(run: Path, *, methods=(), seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return train(SmallNet(), Classify(2), Stripes(), run, methods=[Jitter(), *methods], **options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("at", [2, 4, 8])
@pytest.mark.parametrize("every", [None, 2])
def test_a_run_killed_anywhere_and_resumed_equals_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, every: int | None
):
    options = {
        "epochs": 3,
        "average": 0.9,
        "checkpoint_every": every,
        "log_every": 1,
        "optimizer": lambda p: AdamW(p, lr=0.01),
    }
    whole = trained(tmp_path / "whole", methods=[StopAt()], **options)
    monkeypatch.setattr(StopAt, "at", at)
    with pytest.raises(Stopped):
        trained(tmp_path / "parts", methods=[StopAt()], **options)
    monkeypatch.setattr(StopAt, "at", 0)
    parts = trained(tmp_path / "parts", methods=[StopAt()], **options)  # its seed is the same: the recipe says so
    assert equal(whole, parts)
    lines = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in Run(tmp_path / n).history()]
        for n in ("whole", "parts")
    ]
    assert lines[0] == lines[1]


def test_a_finished_run_is_given_back_not_trained_again(tmp_path: Path):
    first = trained(tmp_path, epochs=1)
    again = trained(tmp_path, epochs=1, seed=5)
    assert equal(first, again)
    assert equal(first, load(tmp_path, allow=["samples"]))


def test_restart_throws_the_old_run_away(tmp_path: Path):
    first = trained(tmp_path, epochs=1)
    measured, own = tmp_path / "latency.json", tmp_path / "notes.txt"
    measured.touch()
    own.touch()
    assert not equal(first, trained(tmp_path, epochs=2, restart=True))
    assert own.exists()
    assert not measured.exists()


def test_accumulating_two_half_batches_is_one_whole_batch(tmp_path: Path, small_net: SmallNet):
    """With BatchNorm at rest, as its statistics are those of the half batch otherwise."""
    nets = []
    for size, accumulate in ((16, 1), (8, 2)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        data = Halves(16, size)
        nets.append(train(net, Classify(2), data, tmp_path / str(size), epochs=1, accumulate=accumulate, recipe=RECIPE))
    torch.testing.assert_close(nets[0][1].weight, nets[1][1].weight)


RECIPE = {"model": {"class_path": "torch.nn.Identity"}}


class Halves(Stripes):
    """The same sixteen images in batches of any size."""

    def epoch(self, seed: int):
        whole = Stripes(16, 16).draw(torch.Generator().manual_seed(seed), 0)
        pieces = zip(whole.input.split(self.batch_size), whole.target.split(self.batch_size), strict=True)
        return type(super().epoch(seed))(Batch(image, target) for image, target in pieces)


class OwnRate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.range, self.inner = nn.Parameter(torch.ones(())), nn.Linear(2, 2)

    def own_rates(self) -> OwnRates:
        return OwnRates(0.01, 0.0)


def test_modules_decide_about_the_rates_of_their_own_parameters_only():
    learner = Learner(OwnRate(), Classify(2), [], nn.Identity())
    optimizer = new_optimizer(learner, lambda groups: SGD(groups, lr=1.0, weight_decay=0.1))
    found = {(len(g["params"]), g["base_lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {(1, 0.01, 0.0), (2, 1.0, 0.1)}


def test_the_optimizer_keeps_what_it_knows_of_surviving_parameters():
    learner = Learner(nn.Linear(2, 2), Classify(2), [], nn.Identity())

    def factory(groups):
        return SGD(groups, lr=0.1, momentum=0.9)

    optimizer = new_optimizer(learner, factory)
    learner.model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weight = learner.model.weight
    learner.model = nn.Sequential(learner.model, nn.Linear(2, 3))
    grown = follow(learner, optimizer, factory)
    assert grown is not optimizer
    assert torch.equal(grown.state[weight]["momentum_buffer"], optimizer.state[weight]["momentum_buffer"])
    assert follow(learner, grown, factory) is grown


def test_the_average_is_what_is_measured_and_shipped(tmp_path: Path):
    """Decay 1 keeps the weights of the first step for good, decay 0 those of the last."""
    nets = [trained(tmp_path / str(decay), epochs=1, average=decay) for decay in (1.0, 0.0, None)]
    assert not equal(nets[0], nets[2])
    assert equal(nets[1], nets[2])


def test_a_schedule_that_restarts_begins_each_run_at_its_full_rate():
    for epochs in range(4, 60):
        schedule = Restarts(Cosine(), epochs, first=3, every=2)
        assert [schedule(epoch / epochs) for epoch in range(3, epochs, 2)] == pytest.approx(
            [1.0] * len(range(3, epochs, 2))
        )
        assert schedule(2 / epochs) == pytest.approx(Cosine()(2 / 3), abs=1e-5)
    assert Restarts(Cosine(), 4, first=0, every=2)(0.25) == pytest.approx(0.5, abs=1e-5)
    with pytest.raises(ValueError, match="first is not negative"):
        Restarts(Cosine(), 4, first=-1, every=2)


def test_a_schedule_of_zero_leaves_the_weights_alone(tmp_path: Path):
    class Zero(Constant):
        def __call__(self, progress: float) -> float:
            return 0.0

    net = trained(tmp_path, epochs=1, schedule=Zero())
    torch.manual_seed(0)
    assert torch.equal(net.conv1.weight, SmallNet().conv1.weight)


def test_training_stops_when_it_no_longer_gets_better(tmp_path: Path):
    trained(tmp_path, epochs=30, patience=1, optimizer=lambda p: SGD(p, lr=0.0))
    epochs = [line for line in Run(tmp_path).history() if line["kind"] == "epoch"]
    assert len(epochs) == 3  # the first is the best, two more are not better


def test_the_best_epoch_can_be_shipped(tmp_path: Path):
    options = {"epochs": 4, "optimizer": lambda p: SGD(p, lr=3.0), "log_every": 1, "clip": 1e3}
    best = trained(tmp_path / "a", restore_best=True, **options)
    saved = Run(tmp_path / "a").load_checkpoint(Run(tmp_path / "a").best)
    assert torch.equal(best.conv1.weight, saved["learner"]["model.conv1.weight"])


class Widen(Method):
    """Another network from the third epoch on."""

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        return SmallNet(width=9) if epoch == 2 else model


def test_the_best_epoch_is_one_of_the_network_that_is_shipped(tmp_path: Path):
    """Nothing is better than the first epoch of either network, and nothing improves."""
    options = {"optimizer": lambda p: SGD(p, lr=0.0), "patience": 1, "restore_best": True, "epochs": 9}
    best = trained(tmp_path, methods=[Widen()], **options)
    assert best.conv1.out_channels == 9
    assert len([line for line in Run(tmp_path).history() if line["kind"] == "epoch"]) == 5  # two, then three


def test_clipping_bounds_the_step(tmp_path: Path):
    net = trained(tmp_path, epochs=1, clip=1e-6, schedule=Constant(), optimizer=lambda p: SGD(p, lr=1.0))
    torch.manual_seed(0)
    moved = (net.fc.weight - SmallNet().fc.weight).norm()
    assert 0 < moved < 1e-5


def test_losses_and_probes_are_logged_for_tensorboard_too(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="pip install 'galago[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, epochs=2, log_every=1, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for part, name, kind in (("train", "loss", "step"), ("validation", "accuracy", "epoch")):
        said = [event.value for event in events.Scalars(f"{part}/{name}")]
        assert said == pytest.approx([line[name] for line in Run(tmp_path).history() if line["kind"] == kind])


@pytest.mark.parametrize("options", [{"channels_last": True}, {"precision": "bf16-mixed"}])
def test_layout_and_precision_train(tmp_path: Path, options):
    net = trained(tmp_path, epochs=1, **options)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert next(net.parameters()).dtype == torch.float32


class Targets(Method):
    """Keeps the targets of the training batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def step(self, batch: Batch, inner: Forward) -> Step:
        self.seen.append(batch.target)
        return inner(batch)


def test_mixed_precision_leaves_targets_as_they_are(tmp_path: Path):
    targets = Targets()
    trained(tmp_path, epochs=1, precision="bf16-mixed", methods=[LabelSmoothing(0.1), targets])
    assert {target.dtype for target in targets.seen} == {torch.float32}
    torch.testing.assert_close(targets.seen[0].max(1).values, torch.full((len(targets.seen[0]),), 0.95))


def test_a_loss_that_is_not_a_number_stops_the_run_in_words(tmp_path: Path):
    with pytest.raises(UserError, match="lower optimizer"):
        trained(tmp_path, epochs=3, log_every=1, optimizer=lambda p: SGD(p, lr=1e30))


@pytest.mark.parametrize(
    ("net", "said"), [(SmallNet(classes=3), "tells 3 classes apart"), (nn.Conv2d(4, 2, 1), "cannot take the images")]
)
def test_a_model_that_does_not_fit_the_data_is_refused_before_training(tmp_path: Path, net: nn.Module, said: str):
    with pytest.raises(UserError, match=said):
        train(net, Classify(2), Stripes(), tmp_path, epochs=1, recipe=RECIPE)


def test_watching_what_nobody_measures_names_what_there_is(tmp_path: Path):
    with pytest.raises(UserError, match=r"watch: nothing measures 'acuracy'.*accuracy"):
        trained(tmp_path, epochs=1, watch="acuracy")


def test_warm_up_and_cosine_are_continuous():
    schedule = Cosine(warmup=0.1, floor=0.2)
    values = [schedule(i / 1000) for i in range(1001)]
    assert max(abs(a - b) for a, b in pairwise(values)) < 0.011
    assert values[-1] == pytest.approx(0.2)


def test_the_plan_is_frozen():
    with pytest.raises(AttributeError):
        Plan(epochs=1).epochs = 2  # type: ignore[misc]


class Watched(Method):
    """Keeps how many images of each training batch a layer gave out, by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        def keep(layer: nn.Module, inputs: object, output: Tensor) -> None:
            if layer.training:
                self.seen.append(len(output))

        model.get_submodule("conv1").register_forward_hook(keep)
        return model


def test_a_compiled_network_has_its_hooks_though_another_of_its_class_was_compiled_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled(module, backend="eager"))
    train(SmallNet(), Classify(2), Stripes(), tmp_path / "first", epochs=1, compile=True)
    watched = Watched()
    train(SmallNet(), Classify(2), Stripes(), tmp_path / "second", epochs=1, compile=True, methods=[watched])
    assert watched.seen == [16, 16, 16]
