"""Adaptive noise: the golden numbers, what noise has to be, what it does to a student, and what ships."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.deploy import onnx, openvino, runtime
from galago.deploy.verify import compare
from galago.distill.distill import Distill
from galago.distill.logits import SoftTargets
from galago.distill.noise_injection import NoiseInjection, Noisy, channel_variance, draw, inject, noisy_parts, set_alpha
from galago.draws import MeanOfDraws
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, identical, tiny_network
from galago.layers import find
from galago.method import Forward, Method
from galago.probe import Deployed
from galago.quantize.layer import QuantOutput
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.run import Run, load
from galago.schedule import LinearDecay, Steps
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.trainer import finish
from noise import golden, normalized_batch, trained_network

ALPHA = 0.2


def noisy(alpha: float = ALPHA, channels: int = 5, **options: bool) -> Noisy:
    made = Noisy(nn.Identity(), channels, **options).double()
    set_alpha(made, alpha)
    return made


def prepared(method: NoiseInjection, model: nn.Module | None = None) -> nn.Module:
    return method.prepare(model or tiny_network(), TinyImages())


def quantize() -> Quantize:
    return Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8))


def image() -> Tensor:
    return normalized_batch().input


# The formulas


def test_the_noise_is_the_golden_one() -> None:
    y, alpha = golden("ani_y"), float(golden("ani_alpha"))
    spread = channel_variance(y).sqrt()
    torch.testing.assert_close(spread, golden("ani_std"))
    torch.testing.assert_close(inject(y, spread, golden("ani_eps"), alpha), golden("ani_out"))
    per_channel = inject(y, spread, golden("ani_eps_per_channel"), alpha)
    torch.testing.assert_close(per_channel, golden("ani_out_per_channel"))


def test_the_gradient_is_the_golden_one_as_statistics_are_constant() -> None:
    y = golden("ani_y").requires_grad_()
    inject(y, channel_variance(y).sqrt(), golden("ani_eps"), ALPHA).backward(golden("ani_grad_out"))
    assert torch.equal(y.grad, golden("ani_grad_y"))
    assert torch.equal(y.grad, golden("ani_grad_out"))


def test_running_statistics_are_updated_in_training_and_then_used() -> None:
    part = noisy(float(golden("ani_alpha")), running=True).train()
    part.variance.copy_(golden("ani_running_var_before"))
    y = golden("ani_y")
    spread = part.spread(y)
    torch.testing.assert_close(part.variance, golden("ani_running_var_after"))
    torch.testing.assert_close(inject(y, spread, golden("ani_eps"), part.alpha), golden("ani_out_running"))
    part.eval().spread(3 * y)
    torch.testing.assert_close(part.variance, golden("ani_running_var_after"))


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (7, 3)])
def test_variance_and_noise_are_what_loops_give(shape: tuple[int, ...]) -> None:
    y, noise = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    found = inject(y, channel_variance(y).sqrt(), noise, 0.3)
    for channel in range(3):
        values = y[:, channel].flatten().tolist()
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        assert channel_variance(y)[channel].item() == pytest.approx(variance)
        wanted = y[:, channel] + 0.3 * variance**0.5 * noise[:, channel]
        torch.testing.assert_close(found[:, channel], wanted)


class Fixed(nn.Module):
    """The same scores whatever it sees."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.scores + 0


def test_the_loss_is_distillation_with_soft_targets() -> None:
    student, teacher = Fixed(golden("loss_z_student")), Fixed(golden("loss_z_teacher"))
    lessons = [SoftTargets(temperature=float(golden("loss_T")), weight=float(golden("loss_lambda")))]
    batch = Batch(torch.zeros(4, 1), nn.functional.one_hot(golden("loss_y"), 5).double())
    losses = Distill(teacher, lessons).step(batch, Forward(student, Classify(5))).losses
    total = losses["cross_entropy"] + losses["soft_targets"]
    total.backward()
    # lessons compute in float32
    torch.testing.assert_close(total.item(), float(golden("loss")), rtol=1e-5, atol=0)
    torch.testing.assert_close(student.scores.grad, golden("loss_grad"), rtol=1e-5, atol=1e-7)


# What noise has to be


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_noise_has_mean_0_and_the_strength_of_its_channel(uniform: bool, per_channel: bool) -> None:
    y = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64).view(1, 3, 1, 1) * torch.randn(50, 3, 2, 2).double()
    part = noisy(channels=3, uniform=uniform, per_channel=per_channel).eval()
    with torch.no_grad():
        change = torch.stack([part(y) - y for _ in range(400)]) / (ALPHA * channel_variance(y).sqrt().view(1, 3, 1, 1))
    if per_channel:
        torch.testing.assert_close(change, change[..., :1, :1].expand_as(change))
        change = change[..., 0, 0]
    draws = change.transpose(0, 2).flatten(1)
    error = draws.shape[1] ** -0.5
    assert (draws.mean(1).abs() < 4 * error).all()
    assert ((draws.square().mean(1) - 1).abs() < 4 * 2**0.5 * error).all()
    assert (draws.abs().max() <= 3**0.5 + 1e-6) == uniform


def test_activations_that_are_larger_get_noise_that_is_as_much_larger() -> None:
    y, changes = golden("ani_y"), []
    part = noisy().eval()
    for scale in (1.0, 50.0):
        torch.manual_seed(3)
        changes.append(part(scale * y) - scale * y)
    torch.testing.assert_close(changes[1], 50 * changes[0])


def test_noise_of_one_size_does_not_adapt() -> None:
    part = noisy(adaptive=False).eval()
    y = 50 * golden("ani_y").repeat(50, 1, 1, 1)
    assert (part(y) - y).std().item() == pytest.approx(ALPHA, rel=0.02)


def test_noise_is_drawn_anew_in_evaluation_mode_too_and_repeats_with_its_seed() -> None:
    network = prepared(NoiseInjection(ALPHA)).eval()
    first, second = network(image()), network(image())
    assert not torch.equal(first, second)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(network(image()))
    assert torch.equal(*found)


def test_without_strength_the_student_is_its_teacher_exactly() -> None:
    teacher = trained_network()
    wanted = teacher(image())
    student = prepared(NoiseInjection(alpha=0.0), teacher).eval()
    assert noisy_parts(student)
    assert torch.equal(student(image()), wanted)


@pytest.mark.parametrize("options", [{}, {"running": True}])
def test_where_a_channel_has_one_value_running_statistics_count(options: dict[str, bool]) -> None:
    part = noisy(**options)
    part.variance.copy_(torch.arange(5.0))
    for mode in (True, False):
        spread = part.train(mode).spread(torch.randn(1, 5, 1, 1).double())
        torch.testing.assert_close(spread, torch.arange(5.0).double().sqrt())


def test_a_batch_of_one_has_the_spread_of_its_places() -> None:
    y = golden("ani_y")[:1]
    torch.testing.assert_close(noisy().eval().spread(y), y[0].flatten(1).std(1, correction=0))


def test_half_precision_stays_what_it_is() -> None:
    part = Noisy(nn.Identity(), 5)
    set_alpha(part, ALPHA)
    for running in (False, True):
        part.running = running
        assert part(golden("ani_y").bfloat16()).dtype == torch.bfloat16


def test_draws_follow_shape_and_device_of_what_they_are_added_to() -> None:
    y = torch.zeros(4, 5, 6, 7, device="meta", dtype=torch.float16)
    assert draw(y, per_channel=True, uniform=False).shape == (4, 5, 1, 1)
    assert draw(y, per_channel=False, uniform=True).shape == y.shape
    assert draw(y[:, :, 0, 0], per_channel=True, uniform=False).shape == (4, 5)
    assert draw(y, per_channel=False, uniform=False).device.type == "meta"


# The method


def test_noise_stands_behind_every_batch_norm_and_in_front_of_what_follows() -> None:
    network = prepared(NoiseInjection())
    found = {path for path, part in network.named_modules() if isinstance(part, Noisy)}
    assert found == {"stem.1", "block.first.1", "block.bn", "down.1"}
    assert all(isinstance(part.layer, nn.BatchNorm2d) for part in noisy_parts(network))


def test_strength_follows_the_schedule() -> None:
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [NoiseInjection(ALPHA, schedule=LinearDecay())])
    for number, factor in ((0, 1.0), (3, 0.5), (5, 1 / 6)):
        trial.step(number)
        for part in noisy_parts(trial.learner.model):
            assert part.alpha.item() == pytest.approx(ALPHA * factor)
    ramp = Trial(
        tiny_network, classify(), TinyImages(), lambda: [NoiseInjection(ALPHA, schedule=Steps((), warmup=0.5))]
    )
    ramp.step(0)
    assert noisy_parts(ramp.learner.model)[0].alpha == 0


def test_a_compiled_network_follows_the_strength_without_being_compiled_again() -> None:
    network = prepared(NoiseInjection(ALPHA))
    graphs: list[object] = []

    def counting(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(network, backend=counting, fullgraph=True)
    outputs = []
    for alpha in (0.0, 0.0, 0.3, 3.0):
        set_alpha(network, alpha)
        for norm in (part for part in network.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.reset_running_stats()
        outputs.append(compiled(image()))
    assert len(graphs) == 1
    assert torch.equal(outputs[0], outputs[1])
    assert (outputs[2] - outputs[0]).norm() < (outputs[3] - outputs[0]).norm()


def test_the_teacher_sees_clean_images_without_noise_and_the_student_has_noise() -> None:
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = trained_network()

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            scores: Tensor = self.network(x)
            seen.append(scores)
            return scores

    methods: list[Method] = [NoiseInjection(ALPHA), Distill(Watching(), [SoftTargets(temperature=1.0, weight=1.0)])]
    model, data = trained_network(), TinyImages()
    for method in methods:
        model = method.prepare(model, data)
    batch = normalized_batch(data)
    seen.clear()
    steps = [methods[0].step(batch, Forward(model.eval(), classify(), methods[1:])) for _ in range(2)]
    assert all(torch.equal(given, batch.input) for given in seen[::2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(steps[0].output, steps[1].output)
    assert not noisy_parts(methods[1])


def accuracy(network: nn.Module) -> float:
    data = TinyImages()
    right = [network(data.normalize(b.input)).argmax(1) == b.target.argmax(1) for b in data.validation()]
    return float(torch.cat(right).float().mean())


def test_accuracy_falls_with_strength_and_training_wins_some_of_it_back() -> None:
    def mean(network: nn.Module) -> float:
        return sum(accuracy(network) for _ in range(20)) / 20

    network = prepared(NoiseInjection(), trained_network(60)).eval()
    found = []
    with torch.no_grad():
        for alpha in (0.0, 0.5, 1.5, 4.0):
            set_alpha(network, alpha)
            found.append(mean(network))
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.9
    assert found[-1] < 0.6
    trial = Trial(lambda: trained_network(60), classify(), TinyImages(), lambda: [NoiseInjection(1.5)])
    for number in range(60):
        trial.step(number % 6)
    with torch.no_grad():
        assert mean(trial.learner.model.eval()) > found[2] + 0.05


@pytest.mark.parametrize("options", [{}, {"running": True, "per_channel": True}, {"uniform": True, "adaptive": False}])
def test_it_obeys_the_laws(options: dict[str, bool]) -> None:
    check_method(lambda: NoiseInjection(ALPHA, **options), same_answer=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"draws": -1}, "draws is -1"),
        ({"layers": []}, "layers is empty"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        NoiseInjection(**arguments)


def test_layers_that_are_not_there_or_give_no_channels_are_refused() -> None:
    with pytest.raises(UserError, match=r"did you mean block\.bn"):
        prepared(NoiseInjection(layers=["block.bm"]))
    tokens = nn.Sequential(nn.Flatten(2), nn.LayerNorm(64))
    with pytest.raises(UserError, match="1 gives 1×3×64"):
        prepared(NoiseInjection(layers=["LayerNorm"]), tokens)


# With quantization


def test_behind_quantize_noise_comes_before_the_quantizer_of_its_activation() -> None:
    model, data = quantize().prepare(tiny_network(), TinyImages()), TinyImages()
    streams = {path for path, part in model.named_modules() if isinstance(part, QuantOutput)}
    model = NoiseInjection().prepare(model, data)
    assert {path for path, part in model.named_modules() if isinstance(part, QuantOutput)} == streams
    stream = find(model, "block.bn")
    assert isinstance(stream, QuantOutput)
    assert isinstance(stream.layer, Noisy)
    assert not any(isinstance(part, QuantOutput) for noisy_part in noisy_parts(model) for part in noisy_part.modules())


def test_ranges_are_set_again_with_the_noise_on() -> None:
    data = TinyImages()
    ranges = []
    for alpha in (0.0, 3.0):
        torch.manual_seed(0)
        model = NoiseInjection(alpha).prepare(quantize().prepare(tiny_network(), data), data)
        stream = find(model, "block.bn")
        assert isinstance(stream, QuantOutput)
        ranges.append(float(stream.output_quantizer.grid().scale))
        assert all(torch.equal(part.variance, torch.ones_like(part.variance)) for part in noisy_parts(model))
    assert ranges[1] > 1.5 * ranges[0]


def test_in_front_of_quantize_it_says_where_it_belongs() -> None:
    with pytest.raises(UserError, match="NoiseInjection is listed before Quantize"):
        Trial(tiny_network, classify(), TinyImages(), lambda: [NoiseInjection(), quantize()])


def test_a_quantized_student_with_a_teacher_resumes_bit_for_bit() -> None:
    def methods() -> list[Method]:
        return [quantize(), NoiseInjection(), Distill(tiny_network(), [SoftTargets(temperature=1.0, weight=1.0)])]

    def start(saved: dict[str, Any] | None = None) -> Trial:
        return Trial(tiny_network, classify(), TinyImages(), methods, saved)

    straight = start()
    straight.step(0)
    saved = straight.save()
    for number in (1, 2):
        straight.step(number)
    resumed = start(saved)
    for number in (1, 2):
        resumed.step(number)
    assert identical(straight.learner.state_dict(), resumed.learner.state_dict())


# What ships


def shipped(methods: Sequence[Method]) -> Deployed:
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: list(methods))
    for number in range(3):
        trial.step(number)
    return Deployed(finish(trial.learner), trial.data.normalize, classify()).eval()


def files(deployed: Deployed, folder: Path) -> dict[str, Path]:
    paths = {"onnxruntime": folder / "model.onnx", "openvino": folder / "model.xml"}
    integer = onnx.lowered(deployed, TinyImages().example())
    model = onnx.build(integer, TinyImages().example())
    openvino.write(model, paths["openvino"])
    onnx.write(model, integer, paths["onnxruntime"])
    return paths


def test_by_default_files_are_verified_in_both_engines(tmp_path: Path) -> None:
    deployed = shipped([quantize(), CutMix(probability=1.0), NoiseInjection(ALPHA)])
    assert not noisy_parts(deployed)
    outcome = compare(deployed, files(deployed, tmp_path), Parts(classify(), TinyImages(), []), images=48)
    assert outcome["passed"]
    assert {"integer", "onnxruntime", "openvino"} <= outcome.keys()


@pytest.mark.parametrize(("draws", "options"), [(1, {}), (3, {"per_channel": True, "uniform": True})])
def test_files_that_draw_vary_as_the_network_does(draws: int, options: dict[str, bool], tmp_path: Path) -> None:
    deployed = shipped([quantize(), NoiseInjection(0.5, draws=draws, **options)])
    assert isinstance(deployed.network, MeanOfDraws) == (draws > 1)
    raw = TinyImages().example().expand(4000, -1, -1, -1)
    with torch.no_grad():
        own = deployed(raw)
    for path in files(deployed, tmp_path).values():
        artifact = runtime.load(path)
        its = artifact(raw)
        assert not torch.equal(its, artifact(raw))
        assert ((its.mean(0) - own.mean(0)).abs() < 5 * own.std(0) * (2 / len(own)) ** 0.5).all()
        torch.testing.assert_close(its.std(0), own.std(0), rtol=0.07, atol=0)


def test_what_draws_is_written_down_and_rebuilt(tmp_path: Path) -> None:
    deployed = shipped([NoiseInjection(ALPHA, draws=3)])
    deployed.network.layer.__dict__["built_from"] = None
    deployed.network.__dict__["built_from"] = {
        "class_path": "galago.models.tiny.Tiny",
        "init_args": {"classes": 3, "channels": 3, "width": 5},
    }
    run = Run(tmp_path)
    run.save_model(deployed.network, TinyImages().normalize)
    again = load(tmp_path)
    assert isinstance(again, MeanOfDraws)
    assert again.draws == 3
    assert [(part.running, part.alpha.item()) for part in noisy_parts(again)] == [(True, pytest.approx(ALPHA))] * 4
    torch.manual_seed(0)
    wanted = deployed.network(image())
    torch.manual_seed(0)
    assert torch.equal(again(image()), wanted)


def test_an_answer_that_ships_does_not_depend_on_its_batch() -> None:
    network = shipped([NoiseInjection(0.5, draws=1)]).network
    for part in noisy_parts(network):
        assert torch.equal(part.spread(torch.randn(1, part.channels, 4, 4)), part.variance.sqrt())


def test_what_draws_cannot_be_verified_and_says_so() -> None:
    with pytest.raises(UserError, match="draws random numbers"):
        compare(shipped([NoiseInjection(ALPHA, draws=1)]), {}, Parts(classify(), TinyImages(), []), images=48)


def test_the_finished_network_is_exported() -> None:
    network = shipped([NoiseInjection(ALPHA)]).network
    torch.testing.assert_close(exported(network, image()), network(image()))
