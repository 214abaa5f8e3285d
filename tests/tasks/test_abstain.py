"""The gambler loss against the official code and its closed form, and what a task that may abstain promises."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from galago.batch import Batch
from galago.deploy.onnx import export
from galago.deploy.report.predictions import read_predictions
from galago.deploy.runtime import OnnxRuntime
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial
from galago.measure import measure_run
from galago.models.tiny import Tiny
from galago.probe import Deployed, measure
from galago.probes.calibration import Calibration
from galago.probes.top_accuracy import TopAccuracy
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.recipe import train_recipe
from galago.tasks.abstain import ClassifyOrAbstain, gambler_loss, optimal_bets
from galago.testing import check_task
from galago.train import check_fit
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden/distillation/kd_abstention.npz")
PAYOFFS = GOLDEN["payoffs"].tolist()


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def close(found: Tensor, expected: Tensor, scale: float = 1e-9) -> None:
    assert (found.detach() - expected).abs().max() <= scale * expected.abs().max() + 1e-12


def one_hot(label: Tensor, classes: int = 5) -> Tensor:
    return nn.functional.one_hot(label, classes).double()


@pytest.mark.parametrize("form", ["hard", "soft"])
@pytest.mark.parametrize("place", range(3))
def test_loss_and_gradient_are_the_official_ones(form: str, place: int) -> None:
    scores = golden("student_logits").requires_grad_()
    target = one_hot(golden("y")) if form == "hard" else golden("ka_target")
    loss = gambler_loss(scores, target, PAYOFFS[place])
    loss.backward()
    close(loss, golden(f"{form}_loss")[place])
    close(scores.grad, golden(f"{form}_grad")[place])


def test_large_scores_keep_the_loss_and_its_gradient_finite_and_exact() -> None:
    scores = golden("extreme_logits").requires_grad_()
    loss = gambler_loss(scores, one_hot(golden("extreme_y")), PAYOFFS[0])
    loss.backward()
    close(loss, golden("extreme_loss"))
    close(scores.grad, golden("extreme_grad"))
    single = gambler_loss(golden("extreme_logits").float(), one_hot(golden("extreme_y")).float(), PAYOFFS[0])
    assert single.item() == pytest.approx(float(GOLDEN["extreme_loss"]), rel=1e-6)


def test_the_loss_of_the_card_is_found() -> None:
    scores, target = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).double(), torch.tensor([[1.0, 0.0, 0.0]]).double()
    assert gambler_loss(scores, target, 2.0).item() == pytest.approx(0.600943760, abs=1e-9)


def test_the_loss_agrees_with_a_loop_over_images_and_classes() -> None:
    scores, target = golden("student_logits"), golden("ka_target")
    f = scores.softmax(1)
    terms = [
        -sum(float(target[b, i]) * math.log(float(f[b, i] + f[b, 5] / 2.2)) for i in range(5)) for b in range(len(f))
    ]
    assert gambler_loss(scores, target, 2.2).item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_at_an_endless_payoff_the_reservation_is_an_output_like_any_other() -> None:
    scores, label = golden("student_logits"), golden("y")
    found = gambler_loss(scores, one_hot(label), 1e12)
    assert found.item() == pytest.approx(nn.functional.cross_entropy(scores, label).item(), rel=1e-9)


def test_the_closed_form_equals_the_golden_optimum() -> None:
    for row, payoff in enumerate(GOLDEN["optimum_payoff"].tolist()):
        bets, reservation = optimal_bets(golden("optimum_p")[row : row + 1], payoff)
        close(bets[0], golden("optimum_f")[row])
        assert reservation.item() == pytest.approx(float(GOLDEN["optimum_reserve"][row]), abs=1e-9)


@pytest.mark.parametrize("payoff", [1.3, 2.0, 2.5, 3.5, 4.5, 6.0])
def test_scores_that_are_free_to_move_end_at_the_closed_form(payoff: float) -> None:
    p = torch.tensor([[0.55, 0.25, 0.1, 0.06, 0.04], [0.3, 0.3, 0.2, 0.1, 0.1]], dtype=torch.float64)
    scores = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.3)
    for step in range(1200):
        optimizer.param_groups[0]["lr"] = 0.3 if step < 800 else 0.01
        optimizer.zero_grad()
        gambler_loss(scores, p, payoff).backward()
        optimizer.step()
    bets, reservation = optimal_bets(p, payoff)
    torch.testing.assert_close(scores.detach().softmax(1)[:, :5], bets, atol=1e-3, rtol=0)
    torch.testing.assert_close(scores.detach().softmax(1)[:, 5], reservation, atol=1e-3, rtol=0)


def test_no_other_bets_lose_less_than_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    for payoff in (1.3, 2.0, 3.5):
        p = torch.rand(50, 5, generator=generator, dtype=torch.float64).pow(3)
        p = p / p.sum(1, keepdim=True)
        bets, reservation = optimal_bets(p, payoff)
        torch.testing.assert_close(bets.sum(1) + reservation, torch.ones(50, dtype=torch.float64))
        best = gambler_loss(torch.cat([bets, reservation[:, None]], 1).clamp_min(1e-30).log(), p, payoff)
        for _ in range(50):
            other = torch.randn(50, 6, generator=generator, dtype=torch.float64)
            assert gambler_loss(other, p, payoff) > best


def test_all_is_held_back_below_the_payoff_and_nothing_above_the_classes() -> None:
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    bets, reservation = optimal_bets(p, 2.5)
    assert reservation.item() == 1
    assert not bets.any()
    bets, reservation = optimal_bets(p.flip(1), 4.5)
    assert reservation.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(bets, p.flip(1))


def batch(count: int = 12, classes: int = 4) -> Batch:
    return Batch(torch.zeros(count, 1, 4, 4), torch.eye(classes)[torch.arange(count) % classes])


def output(count: int = 12, classes: int = 4) -> Tensor:
    return torch.randn(count, classes + 1, generator=torch.Generator().manual_seed(1))


def test_it_obeys_the_laws() -> None:
    perfect = 10 * nn.functional.pad(batch().target, (0, 1))
    check_task(lambda: ClassifyOrAbstain(4), batch(), output(), perfect)
    check_task(lambda: ClassifyOrAbstain(4, 1.5, 0.5), batch(), {"main": output()}, {"main": perfect})


def test_the_reservation_is_never_predicted_however_large() -> None:
    task, scores = ClassifyOrAbstain(4), output()
    scores[:, -1] = 50.0
    assert task.decisions(scores).max() < 4
    assert task.decode(scores).shape == (12, 4)
    assert torch.equal(task.decode(scores.double()).argmax(1), task.decisions(scores))


def test_what_a_user_sees_adds_up_to_one_with_the_reservation() -> None:
    task = ClassifyOrAbstain(4)
    torch.testing.assert_close(task.decode(output()).sum(1), 1 - task.reservation(output()))
    torch.testing.assert_close(task.reservation(output()), output().softmax(1)[:, 4])


def test_pretraining_is_cross_entropy_on_the_classes_and_then_over() -> None:
    task = ClassifyOrAbstain(5, payoff=2.2, pretraining=0.25)
    given = Batch(torch.zeros(6, 1), one_hot(golden("y")).float())
    scores = golden("student_logits")
    first = task.at(0.0).losses(scores.float(), given)
    assert first.keys() == {"cross_entropy"}
    assert first["cross_entropy"].item() == pytest.approx(float(GOLDEN["pretrain_loss"]), rel=1e-6)
    assert task.at(0.2499).losses(scores.float(), given).keys() == {"cross_entropy"}
    assert task.at(0.25) is task
    assert task.losses(scores.float(), given)["gambler"].item() == pytest.approx(GOLDEN["hard_loss"][1], rel=1e-6)
    assert task.at(0.0).at(0.0).losses(scores.float(), given).keys() == {"cross_entropy"}


def test_usual_payoff_needs_no_pretraining_and_a_smaller_one_a_third() -> None:
    assert (ClassifyOrAbstain(10).payoff, ClassifyOrAbstain(10).pretraining) == (6.0, 0.0)
    assert ClassifyOrAbstain(10, payoff=2.2).pretraining == pytest.approx(1 / 3)
    assert ClassifyOrAbstain(10, payoff=8.0).pretraining == 0.0
    assert ClassifyOrAbstain(10, payoff=2.2, pretraining=0.0).pretraining == 0.0


@pytest.mark.parametrize("payoff", [0.0, 1.0, 4.0, 7.0, float("nan")])
def test_a_payoff_that_never_answers_or_never_abstains_is_refused(payoff: float) -> None:
    with pytest.raises(UserError, match=r"payoff is .* above 1 .* below 4, the number of classes"):
        ClassifyOrAbstain(4, payoff)


def test_a_pretraining_that_is_no_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"pretraining is 30; give a share"):
        ClassifyOrAbstain(4, pretraining=30)


def test_a_model_without_the_further_output_is_refused_before_training_with_what_to_do() -> None:
    data = TinyImages()
    with pytest.raises(UserError, match=r"the model has 3 outputs, but 3 classes need 4.*model.init_args.classes: 4"):
        check_fit(Tiny(classes=3, channels=3), ClassifyOrAbstain(3), data)
    check_fit(Tiny(classes=4, channels=3), ClassifyOrAbstain(3), data)


def test_the_trainer_tells_the_task_how_far_it_is() -> None:
    task = ClassifyOrAbstain(3, payoff=2.0, pretraining=0.4)
    trial = Trial(lambda: Tiny(classes=4, channels=3, width=5), task, TinyImages(), list)
    names = [next(iter(trial.step(number).losses)) for number in range(6)]
    assert names == ["cross_entropy"] * 3 + ["gambler"] * 3


def test_a_quantized_gambler_is_exported_with_its_probabilities_and_measured_alike(tmp_path: Path) -> None:
    data, task = TinyImages(), ClassifyOrAbstain(3)
    trial = Trial(
        lambda: Tiny(classes=4, channels=3, width=5),
        task,
        data,
        lambda: [Quantize(LSQWeight(8), LSQ(8), stream=LSQ(8))],
    )
    for number in range(2):
        trial.step(number)
    deployed = Deployed(finish(trial.learner), data.normalize, task).eval()
    export(deployed, data.example(), tmp_path / "model.onnx")
    image = torch.cat([given.input for given in data.test()])
    answer = OnnxRuntime(tmp_path / "model.onnx").run(image)
    assert (answer.output.shape, answer.decoded.shape) == ((48, 4), (48, 3))
    torch.testing.assert_close(1 - answer.decoded.sum(1), task.reservation(answer.output), atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        assert torch.equal(task.decisions(deployed(image)), answer.decoded.argmax(1))
    numbers = measure([Calibration(), TopAccuracy(2)], deployed, task, data)
    assert all(math.isfinite(value) for value in numbers.values())


def test_images_of_noise_are_held_back_more_than_images_that_can_be_known() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(600) % 4
    known = torch.eye(4)[label] * 3 + 0.5 * torch.randn(600, 4, generator=generator)
    noise = 6 * torch.rand(600, 4, generator=generator) - 6
    inputs, labels = torch.cat([known, noise]), torch.cat([label, torch.randint(4, (600,), generator=generator)])
    task = ClassifyOrAbstain(4, payoff=2.0, pretraining=0.2)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for step in range(200):
        given = Batch(inputs, torch.eye(4)[labels])
        optimizer.zero_grad()
        torch.stack(list(task.at(step / 200).losses(network(inputs), given).values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        held = task.reservation(network(inputs))
        right = task.decisions(network(known)) == label
    assert held[600:].mean() > 0.8
    assert held[:600].mean() < 0.2
    assert right.float().mean() > 0.95


def test_a_finished_run_is_measured_with_its_reservations_kept_for_the_report(tmp_path: Path) -> None:
    recipe = {
        "run": str(tmp_path / "run"),
        "model": {"class_path": "galago.models.tiny.Tiny", "init_args": {"width": 4, "classes": 11}},
        "task": {"class_path": "galago.tasks.abstain.ClassifyOrAbstain", "init_args": {"classes": 10, "payoff": 3.0}},
        "data": {"class_path": "galago.datasets.digits.Digits", "init_args": {"per_class": 10}},
        "probes": [
            {"class_path": "galago.probes.selective.Selective", "init_args": {"coverages": [90]}},
            {"class_path": "galago.probes.sensitivity.Sensitivity"},
        ],
        "epochs": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train_recipe(["--config", str(tmp_path / "recipe.yaml")])
    numbers = measure_run(tmp_path / "run")
    assert {"accuracy", "aurc_reservation", "selective_error_90_confidence"} <= numbers.keys()
    answers = read_predictions(tmp_path / "run/predictions")["model"]
    assert answers.correct.mean() == pytest.approx(numbers["accuracy"], abs=1e-6)
    assert answers.risks().mean() == pytest.approx(numbers["aurc_reservation"])
