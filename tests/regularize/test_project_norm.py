"""Projections against the official code's numbers, and what must be true of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.laws.trial import TinyImages, tiny_network
from galago.norms import L1, Linf, channel_factors, operators
from galago.regularize.project_norm import ProjectNorm, limit_factor, onto_ball
from galago.testing import check_method

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "norm_decay.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


@pytest.mark.parametrize("number", range(3))
def test_projections_onto_the_ball_are_those_of_the_official_code(number: int) -> None:
    v, radius = golden(f"l1ball{number}_input"), float(golden(f"l1ball{number}_radius"))
    found = onto_ball(v, radius)
    torch.testing.assert_close(found, golden(f"l1ball{number}_output"), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.abs().sum(), v.abs().sum().clamp_max(radius))
    assert (found * v >= 0).all()


def test_only_what_is_chosen_is_projected_and_as_if_it_were_alone() -> None:
    v, chosen = torch.randn(4, 5), torch.rand(4, 5) > 0.5
    found = onto_ball(v, 0.7, chosen)
    torch.testing.assert_close(found[chosen], onto_ball(v[chosen], 0.7))
    assert torch.equal(found[~chosen], v[~chosen])


@pytest.mark.parametrize("v", [torch.zeros(3), torch.tensor([1.0, -1.0, 0.0])])
def test_what_is_inside_or_on_the_ball_stays(v: Tensor) -> None:
    assert torch.equal(onto_ball(v, 2.0), v)


def test_a_factor_above_the_limit_is_put_back_as_in_the_official_code() -> None:
    norm = nn.BatchNorm2d(6, eps=float(golden("bn_eps"))).double()
    norm.weight.data, norm.running_var = golden("bn_weight").clone(), golden("bn_running_var")
    limit_factor(norm, 5.0)
    torch.testing.assert_close(norm.weight.data, golden("bn_weight_after_projection_5"), rtol=1e-9, atol=1e-12)
    settled = norm.weight.data.clone()
    for _ in range(6):
        limit_factor(norm, 5.0)
    assert float(channel_factors(norm).max()) <= 5.0 + 1e-9
    limit_factor(norm, 1e3)
    assert norm.weight.data.sign().equal(settled.sign())


@pytest.mark.parametrize("norm", [L1(), Linf()])
def test_after_enough_steps_no_norm_is_above_its_radius(norm) -> None:
    model, data = tiny_network(), TinyImages()
    method = ProjectNorm(limit=2.0, radius=0.5, norm=norm)
    method.prepare(model, data)
    for _ in range(200):
        method.update(model, lambda: None)
    for path, operator in operators(model, data.normalize(data.example())).items():
        assert float(norm(model.get_submodule(path).weight.detach(), operator)) <= 0.5 * (1 + 1e-5)


def test_senseless_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="both null"):
        ProjectNorm(limit=None)
    with pytest.raises(UserError, match="radius is 0"):
        ProjectNorm(radius=0.0)
    with pytest.raises(UserError, match="limit is -1"):
        ProjectNorm(limit=-1.0)


def test_the_laws_of_methods_hold() -> None:
    check_method(ProjectNorm)
    check_method(lambda: ProjectNorm(limit=None, radius=1.0))
