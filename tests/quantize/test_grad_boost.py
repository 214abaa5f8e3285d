"""GradBoost against the official code's trajectories, brute force, and the optimizers that it builds on."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from galago.errors import UserError
from galago.quantize import grad_boost
from galago.quantize.grad_boost import Extremes, GradBoostAdamW, GradBoostSGD, boost, boosted, remember, track
from galago.quantize.rest import float_step

OPTIMIZERS = (GradBoostSGD, GradBoostAdamW)


class BoostedRMSprop(RMSprop):
    """What anybody can make of another optimizer with two lines."""

    def __init__(self, params, **settings) -> None:
        super().__init__(params, lr=0.01, alpha=0.9, eps=1e-8, weight_decay=0.01, momentum=0.9)
        remember(self, settings["kappa"], settings["fade"], True, 0.9, settings["released"], seed=0)

    @torch.no_grad()
    def step(self, closure=None):
        with boosted(self):
            super().step()


class BoostedAdam(Adam):
    """With the decay inside the gradient that is boosted, as the official code has it."""

    def __init__(self, params, **settings) -> None:
        super().__init__(params, lr=0.01, eps=1e-8)
        remember(self, settings["kappa"], settings["fade"], True, 0.9, settings["released"], seed=0)

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.add_(parameter, alpha=0.01)
        with boosted(self):
            super().step()


MADE = {
    "QSGD": lambda p, **o: GradBoostSGD(p, 0.05, momentum=0.9, weight_decay=0.01, nesterov=True, **o),
    "QRMSprop": BoostedRMSprop,
    "QAdam": BoostedAdam,
    "QAdamW": lambda p, **o: GradBoostAdamW(p, 0.01, weight_decay=0.01, **o),
}


@pytest.fixture
def given(golden, monkeypatch):
    """The golden arrays, and a function that trains one parameter with their gradients, draws and coins."""
    want = golden("statassist_gradboost")
    floats = int(want["float_steps"])

    def run(optimizer, parameter: Tensor, coin: Tensor):
        for step, gradient in enumerate(want["grads"].to(parameter.dtype)):
            drawn = want["laplace"][step].abs() * coin[step]
            monkeypatch.setattr(grad_boost, "draw", lambda like, coin, generator, drawn=drawn: drawn.to(like.dtype))
            parameter.grad = gradient.clone()
            with float_step(step < floats):
                optimizer.step()
            yield step, gradient

    return want, run


@pytest.mark.parametrize("name", MADE)
def test_the_released_form_follows_the_official_code(given, name):
    want, run = given
    parameter = nn.Parameter(want["p0"].clone())
    settings = {"kappa": float(want["clip_by"]), "fade": float(want["noise_decay"]), "released": True}
    optimizer = MADE[name]([parameter], **settings)
    for step, _ in run(optimizer, parameter, want[f"{name}_coin"]):
        torch.testing.assert_close(parameter.detach(), want[f"{name}_expected_params"][step], rtol=0, atol=1e-5)
        state, largest = optimizer.state[parameter], want[f"{name}_expected_M_released"][step]
        torch.testing.assert_close(state["largest"], largest, rtol=1e-4, atol=0)
        assert (state["smallest"] == 0).all()
    assert state["boosts"] == len(want["grads"]) - int(want["float_steps"])


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("off", [{"kappa": 0.001, "fade": 1.0}, {"kappa": 0.0, "fade": 0.01}])
def test_without_noise_it_is_the_official_codes_plain_optimizer(given, name, off):
    want, run = given
    parameter = nn.Parameter(want["p0"].clone())
    for step, _ in run(MADE[name]([parameter], released=True, **off), parameter, want[f"{name}_coin"]):
        expected = want[f"{name}_expected_params_no_boost"][step]
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-5)


def test_the_formulas_form_is_that_of_the_golden_file(given):
    want, run = given
    parameter = nn.Parameter(want["p0"].double())
    optimizer = GradBoostSGD([parameter], kappa=float(want["clip_by"]), fade=float(want["noise_decay"]))
    for step, gradient in run(optimizer, parameter, want["QSGD_coin"]):
        state = optimizer.state[parameter]
        for found, expected in (
            (state["smallest"], want["paper_expected_m"][step]),
            (state["largest"], want["paper_expected_M"][step]),
            (parameter.grad - gradient, want["paper_expected_noise"][step]),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)


def test_every_element_by_itself_is_the_same():
    gradients, smallest, largest = torch.randn(6, 5, dtype=torch.float64), [0.0] * 5, [0.0] * 5
    extremes = None
    for step, gradient in enumerate(gradients):
        extremes = track(gradient.abs(), extremes, beta=0.7)
        for i, size in enumerate(map(abs, gradient.tolist())):
            smallest[i] = size if step == 0 else 0.7 * smallest[i] + 0.3 * min(smallest[i], size)
            largest[i] = size if step == 0 else 0.7 * largest[i] + 0.3 * max(largest[i], size)
        noise = boost(gradient, extremes.largest - extremes.smallest, torch.ones(5).double(), kappa=0.2)
        for i, g in enumerate(gradient.tolist()):
            expected = min(largest[i] - smallest[i], 0.2) * (1 if g > 0 else -1)
            assert noise[i].item() == pytest.approx(expected, abs=1e-12)


def test_the_smallest_never_rises_the_largest_never_falls_and_their_distance_is_bounded():
    gradients = torch.randn(50, 20).abs()
    extremes = track(gradients[0], None, 0.9)
    for size in gradients[1:]:
        before, extremes = extremes, track(size, extremes, 0.9)
        assert (extremes.smallest <= before.smallest).all()
        assert (extremes.largest >= before.largest).all()
    spread = extremes.largest - extremes.smallest
    assert (spread >= 0).all()
    assert (spread <= gradients.amax(0)).all()


def test_released_extremes_end_up_far_larger_than_any_gradient_and_then_stay():
    parameter = nn.Parameter(torch.zeros(40))
    optimizer = GradBoostSGD([parameter], lr=0.0, released=True)
    seen = torch.zeros(40)
    for step in range(450):
        parameter.grad = 0.01 * torch.randn(40)
        seen = torch.maximum(seen, parameter.grad.abs())
        optimizer.step()
        if step == 399:
            largest = optimizer.state[parameter]["largest"].clone()
    assert ((largest > 1e2 * seen) & (largest < 1e6 * seen)).all()
    torch.testing.assert_close(optimizer.state[parameter]["largest"], largest, rtol=1e-5, atol=0)
    assert (optimizer.state[parameter]["smallest"] == 0).all()


def boosts(optimizer, parameter, steps, size=1.0):
    """The noise of each step."""
    found = []
    for _ in range(steps):
        gradient = size * torch.randn_like(parameter)
        gradient.view(-1)[0] = 0.0
        parameter.grad = gradient.clone()
        optimizer.step()
        found.append((gradient, parameter.grad - gradient))
    return found


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_noise_never_turns_a_gradient_around_nor_exceeds_its_bound(kind, released):
    parameter = nn.Parameter(torch.randn(30, 40))
    found = boosts(kind([parameter], kappa=0.03, released=released), parameter, 30)
    for gradient, noise in found:
        assert torch.equal((gradient + noise).sign(), gradient.sign())
        assert (noise.abs() <= 0.03 + 1e-6).all()  # the difference of two rounded numbers
        assert noise.view(-1)[0] == 0
    assert found[-1][1].abs().max() > 0.02


def test_with_the_coin_half_of_the_elements_are_as_they_were():
    for coin, share in ((True, 0.5), (False, 0.0)):
        parameter = nn.Parameter(torch.zeros(100, 100))
        (_, noise) = boosts(GradBoostSGD([parameter], kappa=None, coin=coin), parameter, 2)[-1]
        assert (noise == 0).float().mean().item() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("fade", [0.5, 0.1])
def test_the_noise_is_exponential_and_fades_geometrically(fade):
    parameter = nn.Parameter(torch.zeros(100, 100))
    optimizer = GradBoostSGD([parameter], kappa=None, fade=fade, coin=False)
    for step in range(1, 6):
        ((_, noise),) = boosts(optimizer, parameter, 1)
        state = optimizer.state[parameter]
        spread = (state["largest"] - state["smallest"]) * (1 - fade) ** step
        counted = spread > 1e-3
        counted.view(-1)[0] = False  # its gradient is 0
        drawn = noise[counted].abs() / spread[counted]
        if step > 1:  # |Laplace(0, 1)| has mean 1 and standard deviation 1
            assert drawn.mean().item() == pytest.approx(1.0, abs=0.05)
            assert drawn.std().item() == pytest.approx(1.0, abs=0.1)


def test_in_the_float_phase_extremes_are_gathered_nothing_is_added_and_nothing_counted():
    parameter = nn.Parameter(torch.zeros(30))
    optimizer = GradBoostSGD([parameter], kappa=None)
    with float_step():
        assert all((noise == 0).all() for _, noise in boosts(optimizer, parameter, 5))
    state = optimizer.state[parameter]
    assert (state["gradients"], state["boosts"]) == (5, 0)
    assert (state["largest"] > state["smallest"]).any()
    assert boosts(optimizer, parameter, 1)[0][1].abs().max() > 0
    assert state["boosts"] == 1


def mixed_parameters():
    """A weight, a bias, a scalar, and one parameter that never gets a gradient."""
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (4,), (), (2,))]


def trained(optimizer, parameters, steps, start=0):
    for step in range(start, start + steps):
        numbers = torch.Generator().manual_seed(step)
        for parameter in parameters[:-1]:
            parameter.grad = torch.randn(parameter.shape, generator=numbers)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("options", [{"kappa": 0.0}, {"fade": 1.0}, {"fade": 1.0, "kappa": None, "released": True}])
def test_without_noise_each_is_bit_for_bit_its_torch_counterpart(options):
    for kind, plain, settings in (
        (GradBoostSGD, SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        (GradBoostSGD, SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "nesterov": True}),
        (GradBoostSGD, SGD, {"lr": 0.1, "momentum": 0.0}),
        (GradBoostAdamW, AdamW, {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.99)}),
        (GradBoostAdamW, AdamW, {"lr": 0.1, "weight_decay": 0.0}),
    ):
        ours, theirs = mixed_parameters(), mixed_parameters()
        found = trained(kind(ours, **settings, **options), ours, 5)
        expected = trained(plain(theirs, **settings), theirs, 5)
        assert all(map(torch.equal, found, expected))


def test_adamw_without_decay_is_adam():
    ours, theirs = mixed_parameters(), mixed_parameters()
    found = trained(GradBoostAdamW(ours, weight_decay=0.0, kappa=0.0), ours, 5)
    torch.testing.assert_close(found, trained(Adam(theirs), theirs, 5))


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_saved_and_resumed_it_goes_on_bit_for_bit_whatever_else_draws(kind, released):
    straight, first, second = mixed_parameters(), mixed_parameters(), mixed_parameters()
    expected = trained(kind(straight, lr=0.1, kappa=0.5, released=released), straight, 7)
    before = kind(first, lr=0.1, kappa=0.5, released=released)
    for parameter, value in zip(second, trained(before, first, 3), strict=True):
        parameter.data.copy_(value)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    torch.rand(5)  # the generator of everything else is another
    after = kind(second, lr=0.1, kappa=0.5, released=released)
    after.load_state_dict(torch.load(file, weights_only=True))
    assert all(map(torch.equal, trained(after, second, 4, start=3), expected))


def test_training_draws_nothing_from_the_common_generator():
    parameters, before = mixed_parameters(), torch.get_rng_state()
    trained(GradBoostSGD(parameters), parameters, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_draws_other_noise_and_no_two_steps_draw_the_same():
    ends = []
    for seed in (0, 0, 1):
        parameters = mixed_parameters()
        ends.append(trained(GradBoostSGD(parameters, lr=0.1, kappa=0.5, seed=seed), parameters, 3)[0])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    first, second = (torch.rand(9, generator=grad_boost.seeded(0, k, torch.device("cpu"))) for k in (1, 2))
    assert (first != second).all()


def test_a_copy_of_the_optimizer_keeps_its_settings():
    parameters = mixed_parameters()
    optimizer = copy.deepcopy(GradBoostSGD(parameters, kappa=0.25, seed=3))
    optimizer.step()
    assert (optimizer.param_groups[0]["kappa"], optimizer.param_groups[0]["seed"]) == (0.25, 3)


def test_parameters_added_later_are_boosted_too():
    parameters = mixed_parameters()
    optimizer = GradBoostSGD(parameters[:1], lr=0.1, kappa=0.5)
    optimizer.add_param_group({"params": parameters[1:]})
    trained(optimizer, parameters, 3)
    assert optimizer.state[parameters[1]]["boosts"] == 3


def test_a_closure_is_asked_once_with_gradients():
    parameter = nn.Parameter(torch.ones(3))
    optimizer, asked = GradBoostSGD([parameter], lr=0.1, kappa=0.0), []

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        asked.append(loss)
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert len(asked) == 1
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.8))


@pytest.mark.parametrize(
    ("options", "text"), [({"kappa": -1.0}, "kappa"), ({"fade": 1.5}, "fade"), ({"beta": 1.0}, "beta")]
)
def test_settings_out_of_range_are_refused_by_name(options, text):
    with pytest.raises(UserError, match=text):
        GradBoostSGD(mixed_parameters(), **options)


def test_extremes_start_at_the_first_gradient():
    first = track(torch.tensor([2.0, 0.0]), None, 0.9)
    assert first == Extremes(first.smallest, first.largest)
    assert first.smallest.tolist() == first.largest.tolist() == [2.0, 0.0]
