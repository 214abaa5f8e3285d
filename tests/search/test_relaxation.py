from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import ROOT
from galago.search.relaxation import Edge, derive, draw, edges, expected_cost, gumbel, mixture

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(ROOT / "tests/golden/distillation/nas_kd.npz").items()}


def test_edges_are_those_of_the_golden_cell() -> None:
    assert [list(edge) for edge in edges(4)] == GOLDEN["edges"].tolist()
    assert edges(1) == [Edge(0, 0), Edge(1, 0)]


def test_noise_and_mixtures_are_the_golden_ones() -> None:
    a, g, tau = (GOLDEN[name] for name in ("arch_logits", "gumbel", "tau"))
    torch.testing.assert_close(gumbel(GOLDEN["uniforms"]), g)
    torch.testing.assert_close(mixture(a, g, tau), GOLDEN["weights_soft"])
    torch.testing.assert_close(mixture(a, g, tau, hard=True), GOLDEN["weights_hard"])


@pytest.mark.parametrize("hard", [False, True])
def test_the_gradient_of_a_mixture_is_the_golden_one_hard_or_soft(hard: bool) -> None:
    a = GOLDEN["arch_logits"].clone().requires_grad_()
    mixture(a, GOLDEN["gumbel"], GOLDEN["tau"], hard).backward(GOLDEN["grad_out"])
    torch.testing.assert_close(a.grad, GOLDEN["grad_soft"])


def test_weights_of_an_edge_add_up_to_one_and_hard_ones_choose() -> None:
    a = torch.randn(9, 5)
    soft, hard = (mixture(a, draw(a.shape), 0.3, choose) for choose in (False, True))
    torch.testing.assert_close(soft.sum(1), torch.ones(9))
    torch.testing.assert_close(hard.sort().values, torch.tensor([0.0, 0, 0, 0, 1]).expand(9, 5))


def test_expected_cost_and_its_gradient_are_the_golden_ones() -> None:
    a = GOLDEN["arch_logits"].clone().requires_grad_()
    cost = expected_cost(a, GOLDEN["op_cost"], float(GOLDEN["seed_cost"]))
    torch.testing.assert_close(cost, GOLDEN["expected_cost"])
    (slope,) = torch.autograd.grad(cost, a)  # the golden one may be of the weighted cost
    ratio = (GOLDEN["grad_expected_cost"] / slope).flatten()
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0].item()))
    assert round(ratio[0].item(), 6) in (1.0, round(float(GOLDEN["mu"]), 6))


def test_a_cost_is_that_of_the_chosen_operations_where_the_choice_is_made() -> None:
    cost, chosen = torch.tensor([0.0, 3.0, 7.0]), torch.tensor([2, 0, 1, 2])
    a = 200.0 * torch.nn.functional.one_hot(chosen, 3).float()
    torch.testing.assert_close(expected_cost(a, cost, 2.0), cost[chosen].sum() / 2)


def test_what_is_derived_is_the_golden_genotype() -> None:
    found = [list(choice) for choice in derive(GOLDEN["arch_logits"], 4)]
    assert found == GOLDEN["genotype"].tolist()


def test_of_equally_likely_edges_the_earlier_is_kept_and_zero_never() -> None:
    a = torch.zeros(5, 3)
    a[:, 0] = 9.0
    assert [list(choice) for choice in derive(a, 2)] == [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]]


def test_noise_has_the_mean_of_gumbel_and_is_finite() -> None:
    assert draw([20000]).mean().item() == pytest.approx(0.5772, abs=0.03)
    zero_and_one = torch.tensor([0.0, 1.0]).clamp(torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps)
    assert gumbel(zero_and_one).isfinite().all()
