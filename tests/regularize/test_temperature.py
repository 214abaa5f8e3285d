"""One temperature, or one for each class, in the last layer of a trained network."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conftest import ROOT
from galago import cli, recipe
from galago.batch import Batch
from galago.datasets.digits import Digits
from galago.distill.noise_injection import NoiseInjection
from galago.errors import UserError
from galago.laws.trial import TinyImages, clone, identical, tiny_network
from galago.layers import classifier, find
from galago.method import Method
from galago.models.attention_branch import attention_branch
from galago.models.ensemble import Ensemble
from galago.models.tiny import Tiny
from galago.quantize.dorefa import DoReFa, DoReFaWeight
from galago.quantize.ewgs import EWGS
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.quantize.quantizer import Quantizer
from galago.regularize.temperature import Rescaled, TemperatureScaling, VectorScaling, fit_vector, fold
from galago.run import Run, load
from galago.temperature import fit_temperature
from galago.testing import check_method

GOLDEN = np.load(ROOT / "tests/golden/regularization/reliability_metrics_calibration.npz")


class Doubtful(TinyImages):
    """Images of which every fifth is labeled wrongly, so that whoever is sure of all of them is too sure."""

    def validation(self) -> list[Batch]:
        batches = super().validation()
        for batch in batches:
            batch.target[::5] = batch.target[::5].roll(1, 1)
        return batches


IMAGES = Doubtful().normalize(torch.cat([batch.input for batch in Doubtful().validation()]))
LABELS = torch.cat([batch.target for batch in TinyImages().validation()])
TARGETS = torch.cat([batch.target for batch in Doubtful().validation()])


def trained() -> nn.Module:
    """A network that knows all images, and far too well."""
    torch.manual_seed(0)
    model = tiny_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(40):
        loss = cross_entropy(model.train()(IMAGES + 0.5 * torch.randn_like(IMAGES)), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for parameter in find(model, classifier(model)).parameters():
            parameter.mul_(3)
    return model.eval()


def finished(method: Method, model: nn.Module) -> nn.Module:
    return method.finish(method.prepare(model, Doubtful()))


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    said: Tensor = model(IMAGES)
    return said


def test_the_folded_network_gives_its_scores_over_the_golden_temperature() -> None:
    scores, labels = torch.from_numpy(GOLDEN["logits"]), torch.from_numpy(GOLDEN["labels"]).long()
    target = nn.functional.one_hot(labels, 10)
    scale, shift = TemperatureScaling().fit(scores, target.double())
    assert 1 / float(scale[0]) == pytest.approx(float(GOLDEN["expected_temperature_nll"]), abs=1e-4)
    head = nn.Linear(10, 10)
    with torch.no_grad():
        before = head(scores)
        assert fold(head, scale, shift)
        torch.testing.assert_close(head(scores), before * float(scale[0]), rtol=1e-5, atol=1e-6)


def test_decisions_stay_and_the_validation_images_become_likeliest() -> None:
    model = trained()
    before = answers(model)
    temperature = fit_temperature(before, TARGETS)
    after = answers(finished(TemperatureScaling(), model))
    assert temperature > 1.5
    torch.testing.assert_close(after, before / temperature, rtol=1e-5, atol=1e-6)
    assert torch.equal(after.argmax(1), before.argmax(1))
    assert cross_entropy(after, TARGETS) < cross_entropy(before, TARGETS)
    assert fit_temperature(after, TARGETS) == pytest.approx(1, abs=1e-3)


def test_nothing_but_the_classifier_changes() -> None:
    model = trained()
    before = clone(model.state_dict())
    after = finished(VectorScaling(), model).state_dict()
    assert {name for name in before if not identical(before[name], after[name])} == {"head.weight", "head.bias"}


def test_vector_scaling_is_no_less_likely_and_finds_what_each_class_was_multiplied_by() -> None:
    torch.manual_seed(3)
    z = 2 * torch.randn(4000, 3, dtype=torch.float64)
    target = torch.eye(3).double()[torch.multinomial(z.softmax(1), 1).squeeze(1)]
    a, c = torch.tensor([2.0, 0.5, 1.0]).double(), torch.tensor([0.5, -1.0, 0.5]).double()
    scale, shift = fit_vector((z - c) / a, target)
    torch.testing.assert_close(scale, a, rtol=0.1, atol=0)
    torch.testing.assert_close(shift - shift.mean(), c - c.mean(), rtol=0, atol=0.15)
    best = [cross_entropy(one, target) for one in (z, scale * (z - c) / a + shift, (z - c) / a)]
    temperature = fit_temperature((z - c) / a, target)
    assert best[1] <= best[0] < cross_entropy((z - c) / a / temperature, target) <= best[2]


def test_scores_that_are_always_right_have_a_vector_too() -> None:
    scale, shift = fit_vector(torch.eye(3).repeat(4, 1) * 5, torch.eye(3).repeat(4, 1))
    assert scale.isfinite().all()
    assert shift.isfinite().all()


QUANTIZERS: list[tuple[Quantizer, Quantizer]] = [
    (LSQWeight(4), LSQ(4)),
    (LSQWeight(4, per_channel=False), LSQ(4)),
    (MinMaxWeight(8), MinMax(8)),
    (EWGS(4), EWGS(4)),
    (DoReFaWeight(4), DoReFa(4)),
]


@pytest.mark.parametrize("pair", QUANTIZERS, ids=lambda pair: type(pair[0]).__name__)
@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_a_quantized_classifier_keeps_its_integers(pair: tuple[Quantizer, Quantizer], first: bool) -> None:
    weight, inputs = pair
    quantize = Quantize(weight, inputs, edge_weight=copy.deepcopy(weight), stream=MinMax(8))
    scaling = TemperatureScaling()
    methods: list[Method] = [scaling, quantize] if first else [quantize, scaling]
    model = trained()
    for method in methods:
        model = method.prepare(model, Doubtful())
    head = find(model, "head")
    assert isinstance(head, QuantLayer)
    codes = head.weight_quantizer.codes(head.layer.weight).clone()
    alone = quantize.finish(copy.deepcopy(model))
    for method in reversed(methods):
        model = method.finish(model)
    assert not isinstance(model, Rescaled)
    assert torch.equal(head.weight_quantizer.codes(head.layer.weight), codes)
    before, after = answers(alone), answers(model)
    temperature = fit_temperature(before, TARGETS)
    torch.testing.assert_close(after, before / temperature, rtol=1e-3, atol=1e-3 * float(after.abs().max()))
    assert torch.equal(after.argmax(1), before.argmax(1))


def test_what_cannot_be_folded_is_applied_behind_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    pair = Ensemble([trained(), trained()])
    before = answers(pair)
    after = finished(TemperatureScaling(), pair)
    assert isinstance(after, Rescaled)
    torch.testing.assert_close(answers(after), before / fit_temperature(before, TARGETS))
    assert "applied behind the network" in capsys.readouterr().err


def test_a_vector_that_one_step_for_all_channels_cannot_take_is_applied_behind_the_network() -> None:
    for weight, folded in ((LSQWeight(4), True), (LSQWeight(4, per_channel=False), False), (EWGS(4), False)):
        quantize = Quantize(weight, LSQ(4), edge_weight=copy.deepcopy(weight))
        model = quantize.prepare(trained(), TinyImages())
        before = answers(model)
        scale, shift = fit_vector(before, TARGETS)
        after = finished(VectorScaling(), model)
        assert isinstance(after, Rescaled) != folded
        torch.testing.assert_close(answers(after), (before * scale + shift).float(), rtol=1e-4, atol=1e-4)


def test_a_classifier_without_bias_takes_a_temperature_but_no_shift() -> None:
    model = trained()
    model.head.bias = None
    assert not isinstance(finished(TemperatureScaling(), copy.deepcopy(model)), Rescaled)
    assert isinstance(finished(VectorScaling(), model), Rescaled)


def test_noise_and_attention_branches_are_no_hindrance() -> None:
    noise = NoiseInjection(draws=2)
    model = noise.finish(noise.prepare(trained(), TinyImages()))
    assert isinstance(finished(TemperatureScaling(), model), Rescaled)
    model = attention_branch(trained(), "down", 0.2).eval()
    before = answers(model)
    after = finished(TemperatureScaling(), model)
    assert not isinstance(after, Rescaled)
    torch.testing.assert_close(answers(after), before / fit_temperature(before, TARGETS), rtol=1e-4, atol=1e-5)


def test_a_network_with_other_scores_than_classes_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="gives 4 scores for 3 classes"):
        TemperatureScaling().prepare(Tiny(4, 3, 5), TinyImages())


@pytest.mark.parametrize("method", [TemperatureScaling, VectorScaling])
def test_it_obeys_the_laws(method: type[Method]) -> None:
    check_method(method, same_answer=False)
    check_method(method, lambda: Ensemble([tiny_network(), tiny_network()]), same_answer=False)


def test_a_finished_run_is_scaled_without_training_and_its_files_are_proved(tmp_path: Path) -> None:
    started, model = Run(tmp_path / "started"), Tiny(width=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in Digits(batch_size=32).train():
        optimizer.zero_grad()
        cross_entropy(model(Digits().normalize(batch.input)), batch.target).backward()
        optimizer.step()
    started.folder.mkdir()
    started.save_model(model, Digits().normalize)
    quantize = {
        "class_path": "galago.quantize.quantize.Quantize",
        "init_args": {
            "weight": {"class_path": "galago.quantize.lsq.LSQWeight", "init_args": {"bits": 4}},
            "input": {"class_path": "galago.quantize.lsq.LSQ", "init_args": {"bits": 4}},
        },
    }
    content = {
        "run": str(tmp_path / "run"),
        "model": {"class_path": "galago.run.load", "init_args": {"run": str(started.folder)}},
        "task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 10}},
        "data": {"class_path": "galago.datasets.digits.Digits"},
        "epochs": 0,
        "methods": [quantize, {"class_path": "galago.regularize.temperature.TemperatureScaling"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe.train_recipe(["--config", str(tmp_path / "recipe.yaml")])
    run = str(tmp_path / "run")
    held = Digits()
    scores = torch.cat([load(run)(held.normalize(batch.input)) for batch in held.validation()]).detach()
    target = torch.cat([batch.target for batch in held.validation()])
    assert fit_temperature(scores, target) == pytest.approx(1, abs=0.05)
    assert cli.main(["export", "--run", run]) == 0
    assert cli.main(["verify", "--run", run]) == 0
    verdict = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert all(verdict[engine]["passed"] for engine in ("onnxruntime", "openvino"))
