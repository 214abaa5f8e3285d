"""MaxDropout against the official layer, and what must be true of it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, tiny_network
from galago.method import Method
from galago.models.resnet import resnet20
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.regularize.max_dropout import MaxDropout, drop_maxima
from galago.testing import check_method
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "maxdropout.npz")
CASES = [key.removesuffix("_rate") for key in GOLDEN if key.endswith("_rate")]


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def on_tiny(rate: float = 0.3) -> MaxDropout:
    return MaxDropout(rate, layers=["block", "down"])


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_official_layer(case: str) -> None:
    x = golden(f"{case}_x").clone().requires_grad_()
    y = drop_maxima(x, float(golden(f"{case}_rate")))
    y.backward(golden(f"{case}_grad_out"))
    assert torch.equal(y.detach(), golden(f"{case}_y"))
    assert torch.equal(x.grad, golden(f"{case}_grad_x"))


@pytest.mark.parametrize("scope", [{}, {"per_image": True}, {"per_channel": True}])
def test_every_dropped_value_is_larger_than_every_kept_one(scope: dict[str, bool]) -> None:
    x = torch.randn(3, 4, 5, 5)
    kept = drop_maxima(x, 0.4, **scope) != 0
    images = x.split(1) if "per_image" in scope else x.split(1, 1) if "per_channel" in scope else [x]
    masks = kept.split(1) if "per_image" in scope else kept.split(1, 1) if "per_channel" in scope else [kept]
    for image, mask in zip(images, masks, strict=True):
        assert image[~mask].min() > image[mask].max()
        assert image[mask].max() <= image.min() + 0.6 * (image.max() - image.min()) + 1e-6


def test_scale_and_shift_do_not_decide_what_is_dropped() -> None:
    x = torch.rand(4, 5) + 1
    assert torch.equal(drop_maxima(x, 0.3) == 0, drop_maxima(2 * x + 3, 0.3) == 0)


def test_equal_values_and_a_rate_of_zero_drop_nothing() -> None:
    assert torch.equal(drop_maxima(torch.full((2, 3), 5.0), 1.0), torch.full((2, 3), 5.0))
    x = torch.randn(3, 3)
    assert torch.equal(drop_maxima(x, 0.0), x)


def test_a_range_that_half_precision_cannot_hold_is_no_infinity() -> None:
    x = torch.tensor([60000.0, -60000.0, 100.0], dtype=torch.float16)
    assert drop_maxima(x, 0.3).tolist() == [0.0, -60000.0, 100.0]
    assert drop_maxima(x, 0.3).dtype == torch.float16


def test_only_the_named_layers_drop_and_only_while_training() -> None:
    model = resnet20()
    method = MaxDropout()
    method.prepare(model, TinyImages())
    assert method.summary() == "MaxDropout: 0.3 of the range behind layer1, layer2, layer3"
    image = torch.randn(2, 3, 16, 16)
    plain = resnet20()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(image), plain.eval()(image))
    seen = []
    model.layer2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    plain.layer2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.random.fork_rng():
        model.train()(image), plain.train()(image)
    dropped, whole = seen
    assert (dropped == 0).sum() > (whole == 0).sum()
    assert dropped.max() < whole.max()


def test_type_names_mean_layers_as_well_and_wrapped_ones() -> None:
    model = Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8)).prepare(tiny_network(), TinyImages())
    method = MaxDropout(layers=["Residual", "head"])
    method.prepare(model, TinyImages())
    assert len(method._told) == 2
    hooked = [path for path, module in model.named_modules() if method._hook in module._forward_hooks.values()]
    assert all(path.startswith(("block", "head")) for path in hooked)
    assert len(hooked) == 2


@pytest.mark.parametrize("make_other", [lambda: Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8)), CutMix])
@pytest.mark.parametrize("first", [True, False])
def test_it_trains_and_exports_beside_other_methods_and_leaves_nothing(make_other, first: bool) -> None:
    def methods() -> list[Method]:
        return [on_tiny(), make_other()] if first else [make_other(), on_tiny()]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    average = copy.deepcopy(trial.learner.model)
    assert exported(finish(trial.learner), trial.image()).isfinite().all()
    method = next(idea for idea in trial.learner.ideas if isinstance(idea, MaxDropout))
    method.finish(average)
    assert not any(module._forward_hooks for module in average.modules()), "nor in a copy, such as an average"


def test_a_compiled_network_drops_the_same() -> None:
    torch.manual_seed(0)
    model, image = tiny_network(), torch.randn(4, 3, 8, 8)
    on_tiny().prepare(model, TinyImages())
    written = model.train()(image)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), written)
    torch.compiler.reset()


def test_senseless_arguments_and_layers_are_refused() -> None:
    with pytest.raises(UserError, match="rate is 2"):
        MaxDropout(rate=2)
    with pytest.raises(UserError, match="layers is empty"):
        MaxDropout(layers=[])
    with pytest.raises(UserError, match=r"'layer\[0-9\]' matches no layer"):
        MaxDropout().prepare(tiny_network(), TinyImages())

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    model = nn.Sequential(Two())
    MaxDropout(layers=["0"]).prepare(model, TinyImages())
    with pytest.raises(UserError, match="a Two gives no single tensor"):
        model.train()(torch.zeros(1))


def test_the_laws_of_methods_hold() -> None:
    check_method(on_tiny)
