"""StatAssist: a float phase that is one, a switch that keeps what the optimizer knows, and exact resume across both."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics import MetricCollection

from galago.batch import Batch
from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.probe import Deployed, Probe
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.grad_boost import GradBoostAdamW, GradBoostSGD
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.quantize.quantizer import Quantizer
from galago.quantize.rest import is_float_step, rest, rests, wake
from galago.quantize.stat_assist import Restarted, StatAssist
from galago.recipe import Parts
from galago.run import Run
from galago.schedule import Constant, Cosine
from galago.task import Task
from galago.tasks.classify import Classify, TopAccuracy
from galago.testing import check_method
from galago.train import train
from galago.trainer import Learner, finish, follow, new_optimizer, prepare
from samples import SmallNet, StopAt, Stopped, Stripes, quantized_tiny_network

KINDS = {
    "MinMax": lambda: Quantize(MinMaxWeight(8), MinMax(8), stream=MinMax(8)),
    "LSQ": lambda: Quantize(LSQWeight(4), LSQ(4), stream=LSQ(8)),
    "EWGS": lambda: Quantize(EWGSWeight(3), EWGS(3), edge_weight=LSQWeight(8), edge_input=LSQ(8), stream=MinMax(8)),
}


def factory(parameters):
    return SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


class Course:
    """A training by hand, step by step, so that its parts can be looked at."""

    def __init__(self, methods, make=factory, model=None) -> None:
        torch.manual_seed(0)
        self.data = Stripes()
        self.learner = Learner(model or SmallNet(), Classify(2), methods, self.data.normalize)
        prepare(self.learner, self.data, None)
        self.make, self.optimizer = make, new_optimizer(self.learner, make)

    @property
    def model(self) -> nn.Module:
        return self.learner.model

    def begin(self, epoch: int) -> None:
        for method in self.learner.ideas:
            self.learner.model = method.epoch(self.learner.model, epoch)
        self.learner.follow_average()
        self.optimizer = follow(self.learner, self.optimizer, self.make)

    def step(self, batch: Batch) -> None:
        self.learner.train()
        self.optimizer.zero_grad()
        self.learner(batch).loss.backward()
        apply = self.optimizer.step
        for method in reversed(self.learner.ideas):
            apply = lambda method=method, apply=apply: method.update(self.model, apply)  # noqa: E731
        apply()

    def epoch(self, epoch: int) -> None:
        self.begin(epoch)
        for batch in self.data.train(epoch):
            self.step(batch)


def weights(model: nn.Module) -> list[Tensor]:
    """What a float network has too, in its order."""
    own = {id(p) for part in model.modules() if isinstance(part, Quantizer) for p in part.parameters()}
    scales = {id(layer.output_scale) for layer in model.modules() if isinstance(layer, QuantLayer)}
    ours = [p.detach() for p in model.parameters() if id(p) not in own | scales]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return [*ours, *(buffer for norm in norms for buffer in norm.buffers())]


@pytest.mark.parametrize("kind", KINDS)
def test_the_float_phase_is_bit_for_bit_float_training(kind):
    course, plain = Course([KINDS[kind](), StatAssist(2)]), Course([])
    for epoch in range(2):
        course.epoch(epoch)
        plain.epoch(epoch)
    assert rests(course.model)
    assert all(map(torch.equal, weights(course.model), weights(plain.model)))
    image = course.data.normalize(course.data.example())
    assert torch.equal(course.model.eval()(image), plain.model.eval()(image))


@pytest.mark.parametrize("kind", KINDS)
def test_the_switch_keeps_parameters_and_the_optimizers_state_bit_for_bit(kind):
    course = Course([KINDS[kind](), StatAssist(1)])
    course.epoch(0)
    parameters, state = list(course.model.parameters()), copy.deepcopy(course.optimizer.state_dict()["state"])
    values = [tensor.clone() for tensor in weights(course.model)]
    course.begin(1)
    assert not rests(course.model)
    assert list(map(id, course.model.parameters())) == list(map(id, parameters))
    held = {id(p) for group in course.optimizer.param_groups for p in group["params"]}
    assert held == set(map(id, parameters))
    assert all(map(torch.equal, weights(course.model), values))
    after = course.optimizer.state_dict()["state"]
    assert len(after) > 0
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key]["momentum_buffer"], state[key]["momentum_buffer"]) for key in state)


@pytest.mark.parametrize("kind", KINDS)
def test_after_the_switch_ranges_are_those_of_the_trained_weights_quantized_anew(kind):
    course = Course([KINDS[kind](), StatAssist(1)])
    course.epoch(0)
    plain = Course([])
    plain.epoch(0)
    course.begin(1)
    expected = KINDS[kind]().prepare(plain.model, plain.data)
    found = course.model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_the_switch_leaves_modes_and_random_numbers_as_they_were():
    course = Course([KINDS["LSQ"](), StatAssist(1)])
    course.epoch(0)
    course.model.bn2.eval()
    modes, state = [module.training for module in course.model.modules()], torch.get_rng_state()
    course.begin(1)
    assert [module.training for module in course.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wiped", [False, True])
def test_the_first_quantized_step_goes_on_with_the_momentum_of_the_float_phase(wiped):
    course = Course([KINDS["MinMax"](), StatAssist(1)])
    course.epoch(0)
    course.begin(1)
    weight = course.model.conv2.layer.weight
    velocity, before = course.optimizer.state[weight]["momentum_buffer"].clone(), weight.detach().clone()
    assert velocity.abs().max() > 0
    if wiped:
        course.optimizer = new_optimizer(course.learner, factory)
    course.step(course.data.train(1)[0])
    expected = before - 0.05 * (0.9 * velocity + weight.grad + 0.01 * before)
    close = torch.allclose(weight, expected, rtol=0, atol=1e-7)
    assert close != wiped


def test_without_a_float_phase_training_is_bit_for_bit_that_without_it():
    course, plain = Course([KINDS["LSQ"](), StatAssist(0)]), Course([KINDS["LSQ"]()])
    for one in (course, plain):
        one.epoch(0)
    for found, expected in zip(course.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(found, expected)


def test_grad_boost_adds_noise_in_the_quantized_phase_only():
    def make(p):
        return GradBoostSGD(p, lr=0.05)

    course = Course([KINDS["MinMax"](), StatAssist(1)], make)
    course.epoch(0)
    weight = course.model.conv2.layer.weight
    state = course.optimizer.state[weight]
    assert (state["gradients"], state["boosts"]) == (3, 0)
    course.epoch(1)
    assert (state["gradients"], state["boosts"]) == (6, 3)
    assert not is_float_step()


def run(folder: Path, kind: str = "LSQ", phase: int = 1, **options) -> nn.Module:
    torch.manual_seed(0)
    options = {"epochs": 3, "optimizer": factory, "schedule": Constant(), **options}
    return train(
        SmallNet(), Classify(2), Stripes(), folder, methods=[KINDS[kind](), StatAssist(phase), StopAt()], **options
    )


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("LSQ", lambda p: GradBoostSGD(p, 0.05, weight_decay=0.01, kappa=0.01)),
        ("EWGS", lambda p: GradBoostAdamW(p, 0.01, kappa=0.01, released=True)),
    ],
)
def test_killed_in_either_phase_or_at_the_switch_and_resumed_it_equals_a_run_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, make
):
    options = {"kind": kind, "optimizer": make, "checkpoint_every": 1, "average": 0.5, "phase": 2, "epochs": 4}
    whole = run(tmp_path / "whole", **options)
    for at in (2, 7, 8, 11):  # of 12 batches; the first 6 in float, the seventh right behind the switch
        monkeypatch.setattr(StopAt, "at", at)
        with pytest.raises(Stopped):
            run(tmp_path / str(at), **options)
        monkeypatch.setattr(StopAt, "at", 0)
        assert equal(whole, run(tmp_path / str(at), **options)), at


def test_a_moving_average_begins_anew_at_the_switch():
    course = Course([KINDS["LSQ"](), StatAssist(1)])
    course.learner.decay = 0.9
    course.begin(0)
    first = course.learner.average
    course.epoch(0)
    assert course.learner.average is first
    assert rests(course.learner.measured)
    course.begin(1)
    assert course.learner.average is not first
    assert not rests(course.learner.measured)
    assert equal(course.learner.measured, course.model)


class Counted(Probe):
    """Lower each time it is asked, but for the first."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, deployed: nn.Module, task: Task, data: Stripes) -> dict[str, float]:
        self.asked += 1
        return {"score": float(self.asked == 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_ends_in_the_float_phase_ships_what_the_switch_would_have_made(kind):
    ended, switched = (Course([KINDS[kind](), StatAssist(1)]) for _ in range(2))
    for one in (ended, switched):
        one.epoch(0)
    switched.begin(1)
    model = finish(ended.learner)
    assert not rests(model)
    assert equal(model, finish(switched.learner))


def test_going_back_to_an_epoch_of_the_float_phase_quantizes_it(tmp_path: Path):
    best = run(tmp_path / "best", probes=[Counted()], watch="score", restore_best=True, epochs=3)
    assert not rests(best)
    assert equal(best, run(tmp_path / "first", epochs=1))


def test_state_that_is_loaded_brings_its_phase():
    course, other = Course([KINDS["LSQ"](), StatAssist(1)]), Course([KINDS["LSQ"](), StatAssist(1)])
    course.epoch(0)
    at_rest = copy.deepcopy(course.model.state_dict())
    course.begin(1)
    for state, resting in ((course.model.state_dict(), False), (at_rest, True), (at_rest, True)):
        other.model.load_state_dict(state)
        assert rests(other.model) is resting


@pytest.mark.parametrize("kind", ["MinMax", "EWGS"])
def test_the_compiler_takes_both_phases_in_one_piece_and_gets_the_same(kind):
    course, plain = (Course([KINDS[kind](), StatAssist(1)]) for _ in range(2))
    course.model.compile(backend="aot_eager", fullgraph=True)
    for epoch in range(2):
        for one in (course, plain):
            one.epoch(epoch)
        for found, expected in zip(weights(course.model), weights(plain.model), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_in_bfloat16_and_channels_last_it_trains_through_both_phases(tmp_path: Path):
    model = run(tmp_path, precision="bf16-mixed", channels_last=True, optimizer=lambda p: GradBoostSGD(p, 0.05))
    losses = [line["loss"] for line in Run(tmp_path).history() if line["kind"] == "step"]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert losses[-1] < losses[0]


class Segment(Task):
    """Every pixel is of one of two classes."""

    def losses(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"pixels": nn.functional.cross_entropy(output, batch.target)}

    def decode(self, output: Tensor) -> Tensor:
        return output.softmax(1)

    def decisions(self, output: Tensor) -> Tensor:
        return output.argmax(1)

    def metrics(self) -> MetricCollection:
        return MetricCollection({"accuracy": TopAccuracy()})


class Bright(Stripes):
    """Which pixels are bright, N×2×H×W."""

    def draw(self, generator: torch.Generator, first: int) -> Batch:
        batch = super().draw(generator, first)
        bright = (batch.input.float().mean(1) > 112).long()
        return batch._replace(target=nn.functional.one_hot(bright, 2).permute(0, 3, 1, 2).float())


class Segmenter(nn.Module):
    """Down by two and up again: scores for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(8, 12, 3, 2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(12, 8, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.wide(self.down(x)))


def test_a_network_that_segments_trains_from_scratch_exports_and_is_verified(tmp_path: Path):
    data, task = Bright(batch_size=8), Segment()
    model = train(
        Segmenter(),
        task,
        data,
        tmp_path,
        epochs=6,
        methods=[KINDS["MinMax"](), StatAssist(1)],
        optimizer=lambda p: GradBoostSGD(p, 0.05, nesterov=True),
        schedule=Restarted(Cosine(), 1, 6),
    )
    lines = Run(tmp_path).history()
    losses = [line["pixels"] for line in lines if line["kind"] == "step"]
    assert losses[-1] < losses[0] / 2
    assert lines[-1]["accuracy"] > 0.95
    trained = Deployed(model, data.normalize, task).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome
    assert outcome["onnxruntime"]["agreement"] > 0.98


class EncoderDecoder(nn.Module):
    """Down twice by stride, up by a transposed convolution and by interpolation, with a way across."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(6, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 12, 3, 2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(12, 8, 2, 2), nn.ReLU())
        self.wide = nn.Upsample(scale_factor=2, mode="bilinear")
        self.leave = nn.Conv2d(14, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = self.enter(x)
        half = self.down(across)
        return self.leave(torch.cat([self.wide(self.up(self.deep(half)) + half), across], 1))


@pytest.mark.parametrize("kind", ["LSQ", "EWGS"])
def test_an_encoder_and_decoder_trains_resumes_exports_and_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    data, task = Bright(batch_size=8), Segment()

    def segmented(folder: Path) -> nn.Module:
        torch.manual_seed(0)
        quantize = KINDS[kind]()
        methods = [quantize, StatAssist(1), StopAt()]
        options = {"epochs": 3, "checkpoint_every": 1, "optimizer": lambda p: GradBoostSGD(p, 0.05, kappa=0.01)}
        network = train(EncoderDecoder(), task, data, folder, methods=methods, **options)
        up = next(row.note for row in quantize.rows() if row.path == "up.0")
        # LSQ's scales lie along the weight's first axis, which counts a transposed convolution's inputs
        assert ("one scale (`per_channel: false`)" in up) == (kind == "LSQ")
        return network

    model = segmented(tmp_path / "whole")
    monkeypatch.setattr(StopAt, "at", 8)  # of 18 batches; the first 6 in float
    with pytest.raises(Stopped):
        segmented(tmp_path / "killed")
    monkeypatch.setattr(StopAt, "at", 0)
    assert equal(model, segmented(tmp_path / "killed"))
    assert isinstance(model.up.get_submodule("0"), QuantLayer | QuantOutput)
    losses = [line["pixels"] for line in Run(tmp_path / "whole").history() if line["kind"] == "step"]
    assert losses[-1] < losses[0]
    trained = Deployed(model, data.normalize, task).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome


@pytest.mark.parametrize("epochs", [0, 1])
def test_it_obeys_the_laws_of_a_method(epochs):
    # one step is still in the float phase, and what is shipped is quantized all the same
    check_method(lambda: StatAssist(epochs), make_model=quantized_tiny_network, same_answer=epochs == 0)


def test_a_restarted_schedule_begins_twice_at_every_step():
    inner = Cosine(warmup=0.25)
    for total in (3, 7, 391):
        schedule = Restarted(inner, float_epochs=2, epochs=12)
        for epoch in range(12):
            for batch in range(total):
                expected = inner((epoch - 2 * (epoch >= 2) + batch / total) / 10)
                assert schedule((epoch + batch / total) / 12) == pytest.approx(expected, abs=1e-9)
    assert Restarted(Constant(), 1, 4)(0.3) == 1.0


@pytest.mark.parametrize("options", [{"epochs": -1}, {"batches": 0}])
def test_numbers_that_make_no_sense_are_refused_by_name(options):
    with pytest.raises(UserError, match=next(iter(options))):
        StatAssist(**options)


def test_a_schedule_without_quantized_epochs_is_refused():
    with pytest.raises(UserError, match="float_epochs"):
        Restarted(Cosine(), 3, 3)


def test_a_network_without_quantizers_is_refused_in_plain_words(small_net: SmallNet, stripes: Stripes):
    with pytest.raises(UserError, match="behind Quantize"):
        StatAssist().prepare(small_net, stripes)


def test_a_resting_layer_computes_what_the_layer_in_it_does():
    layer = QuantLayer(nn.Conv2d(3, 4, 3), EWGSWeight(2), EWGS(2))
    x = torch.rand(2, 3, 5, 5)
    layer.observe(x)
    assert not torch.equal(layer(x), layer.layer(x))
    rest(layer)
    assert torch.equal(layer(x), layer.layer(x))


def test_a_wrapper_in_a_wrapper_rests_and_wakes_too():
    x = torch.randn(2, 3, 5, 5)
    layer = QuantLayer(nn.Conv2d(3, 4, 3), LSQWeight(2), LSQ(2))
    both = QuantOutput(layer, LSQ(2))
    layer.observe(x)
    both.output_quantizer.initialize(layer(x))
    quantized = both(x)
    rest(both)
    assert {"resting", "layer.resting"} < both.state_dict().keys()
    assert torch.equal(both(x), layer.layer(x))
    wake(both)
    assert torch.equal(both(x), quantized)
