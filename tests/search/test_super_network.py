from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import ROOT
from galago.errors import UserError
from galago.search.cell_network import CellNetwork
from galago.search.relaxation import Edge, edges
from galago.search.space import OPERATIONS, ImageSpace, Operation, Space, TextSpace, Zero, byte_numbers
from galago.search.super_network import SuperNetwork, depth_mixture
from galago.spec import build, describe

SPACES: list[Space] = [TextSpace(), ImageSpace(stride=2)]


def given(space: Space) -> Tensor:
    return torch.randint(1, 256, (4, 1, 1, 12)).float() if isinstance(space, TextSpace) else torch.randn(4, 3, 8, 8)


def network(space: Space, nodes: int = 2) -> SuperNetwork:
    return SuperNetwork(space, classes=3, width=6, nodes=nodes, depths=[1, 3])


def decide(made: SuperNetwork, depth: int) -> None:
    """One-hot numbers: a random operation on two edges of each node, `zero` on all others, one number of cells."""
    made.a.zero_()
    for node in range(made.nodes):
        own = [number for number, edge in enumerate(edges(made.nodes)) if edge.node == node]
        kept = set(torch.tensor(own)[torch.randperm(len(own))[:2]].tolist())
        for number in own:
            operation = int(torch.randint(1, len(OPERATIONS), ())) if number in kept else 0
            made.a[number, operation] = 200.0
    made.d.zero_()[depth] = 200.0


def trained_a_little(made: SuperNetwork, x: Tensor) -> None:
    made.train()
    for _ in range(3):
        made.draw(1.0)
        made(x)
    made.eval()


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_derived_network_answers_as_the_super_network_does_where_all_is_decided(
    space: Space, hard: bool, depth: int
) -> None:
    made = network(space, nodes=3)
    trained_a_little(made, given(space))
    decide(made, depth)
    made.hard, x = hard, given(space)
    derived = made.derived().eval()
    torch.testing.assert_close(derived(x), made(x), rtol=1e-5, atol=1e-5)
    assert derived.depth == [1, 3][depth]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_the_expected_cost_of_a_decided_network_is_counted_in_its_derived_one(space: Space) -> None:
    made = network(space, nodes=3)
    decide(made, 1)
    layers = [layer for cell in made.derived().closed() for layer in cell.layers]
    counted = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    conv = sum(p.numel() for p in space.layer(Operation.conv_3, 6, affine=False).parameters())
    assert made.expected_cost().item() == pytest.approx(counted / (2 * 3 * 3 * conv), rel=1e-5)


def test_the_expected_cost_has_a_gradient_for_operations_and_for_the_number_of_cells() -> None:
    made = network(TextSpace())
    made.a.requires_grad_()
    made.d.requires_grad_()
    slopes = torch.autograd.grad(made.expected_cost(), [made.a, made.d])
    assert all(slope.abs().max() > 0 for slope in slopes)
    assert slopes[1][1] > 0 > slopes[1][0]


def test_a_mixed_network_is_the_sum_that_the_page_says() -> None:
    made = network(TextSpace()).eval()
    made.a.copy_(torch.randn_like(made.a))
    made.d.copy_(torch.randn_like(made.d))
    x = given(made.space)
    before = last = made.stem(x)
    after = []
    for cell in made.cells:
        states = [before, last]
        for node in range(2):
            total = torch.zeros_like(last)
            for number, edge in enumerate(edges(2)):
                if edge.node == node:
                    shares = made.a[number].softmax(0)
                    for share, layer in zip(shares, cell.layers[number], strict=True):
                        total = total + share * layer(states[edge.predecessor])
            states.append(total)
        before, last = last, cell.squeeze(torch.cat(states[2:], 1))
        after.append(last)
    mixed = made.d.softmax(0)[0] * after[0] + made.d.softmax(0)[1] * after[2]
    torch.testing.assert_close(made(x), made.linear(mixed.relu().amax((2, 3))))


def test_depths_are_mixed_as_in_the_golden_vectors() -> None:
    golden = np.load(ROOT / "tests/golden/distillation/nas_kd.npz")
    d, found, wanted = (torch.from_numpy(golden[f"depth_{name}"]) for name in ("logits", "features", "mixture"))
    torch.testing.assert_close(depth_mixture(d, list(found)), wanted)


def test_noise_counts_in_training_only() -> None:
    made, x = network(TextSpace()), given(TextSpace())
    made.eval()
    quiet = made(x)
    made.draw(1.0)
    assert torch.equal(made(x), quiet)
    trained = [made.train()(x)]
    made.draw(1.0)
    assert not torch.equal(made(x), trained[0])


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_keeps_the_shape_and_costs_what_it_holds(space: Space, operation: Operation) -> None:
    layer, x = space.layer(operation, 6, affine=True), torch.randn(2, 6, 1 if isinstance(space, TextSpace) else 5, 9)
    assert layer(x).shape == x.shape
    norms = sum(p.numel() for m in layer.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert space.cost(operation, 6) == sum(p.numel() for p in layer.parameters()) - norms
    assert (space.cost(operation, 6) == 0) == (operation.name in ("zero", "identity", "average", "maximum"))


def test_operations_on_texts_see_neighbors_and_those_on_images_are_separable() -> None:
    wide = TextSpace().layer(Operation.conv_7, 4, affine=False)[1]
    assert (wide.kernel_size, wide.padding, wide.groups) == ((1, 7), (0, 3), 1)
    apart = TextSpace().layer(Operation.dilated_5, 4, affine=False)[1]
    assert (apart.kernel_size, apart.dilation, apart.padding) == ((1, 5), (2, 2), (0, 4))
    _, depth_wise, across, _ = ImageSpace().layer(Operation.conv_5, 4, affine=False)
    assert (depth_wise.kernel_size, depth_wise.groups, across.kernel_size) == ((5, 5), 4, (1, 1))
    assert not Zero()(torch.ones(1, 2, 1, 3)).any()


def test_padding_of_a_text_is_no_feature() -> None:
    stem = TextSpace().stem(5, affine=True)
    features = stem(torch.tensor([72.0, 105.0, 0.0]).view(1, 1, 1, 3))
    assert features.shape == (1, 5, 1, 3)
    assert not features[..., 2].any()
    assert features[..., :2].abs().min() > 0
    assert byte_numbers(torch.tensor([64.00001, 254.9999]).view(1, 1, 1, 2)).tolist() == [[64, 255]]


def test_no_batch_norm_learns_while_operations_compete_and_all_do_afterwards() -> None:
    made = network(ImageSpace())
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.affine for norm in norms)
    derived = made.derived()
    fresh = CellNetwork(derived.space, derived.genotype, 3, derived.depth, 6)
    assert all(m.affine for m in fresh.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_search_s_numbers_are_no_parameters() -> None:
    made = network(TextSpace())
    assert {"a", "d"} <= dict(made.named_buffers()).keys()
    assert not {"a", "d"} & dict(made.named_parameters()).keys()


def test_networks_are_written_down_as_plain_data_and_built_again() -> None:
    made = network(ImageSpace(stride=2))
    decide(made, 1)
    for one in (made, made.derived()):
        again = build(describe(one))
        assert describe(again) == describe(one)
        again.load_state_dict(one.state_dict())
        x = given(made.space)
        assert torch.equal(again.eval()(x), one.eval()(x))


GENOTYPE = [(0, 0, Operation.conv_3), (0, 1, Operation.identity), (1, 2, Operation.maximum)]


@pytest.mark.parametrize(
    ("genotype", "said"),
    [
        ([], "genotype is empty"),
        ([*GENOTYPE, (1, 3, Operation.conv_1)], r"\[1, 3, conv_1\]; node 1 may take from 0 to 2"),
        ([*GENOTYPE[:2], (1, 2, Operation.zero)], "any operation but zero"),
        ([*GENOTYPE, (2, 0, Operation.conv_1), (2, 1, Operation.conv_1), (2, 2, Operation.conv_1)], r"\[2, 1, 3\]"),
        ([GENOTYPE[0], (2, 2, Operation.conv_1)], r"\[1, 0, 1\] edges"),
    ],
)
def test_a_genotype_that_makes_no_cell_is_refused(genotype: list[tuple[int, int, Operation]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CellNetwork(TextSpace(), genotype, classes=2)


def test_numbers_that_make_no_network_are_refused() -> None:
    for depths in ([], [2, 1], [0, 1], [2, 2]):
        with pytest.raises(UserError, match="rising numbers of cells"):
            SuperNetwork(TextSpace(), 2, depths=depths)
    for wrong in ({"nodes": 0}, {"width": 0}):
        with pytest.raises(UserError, match="give 1 or more of each"):
            SuperNetwork(TextSpace(), 2, **wrong)
    with pytest.raises(UserError, match="depth is 0"):
        CellNetwork(TextSpace(), GENOTYPE, 2, depth=0)
    with pytest.raises(UserError, match="stride is 0"):
        ImageSpace(stride=0)


def test_a_larger_weight_of_the_cost_alone_never_makes_a_larger_network() -> None:
    """With the loss of the task as a random linear pull that is the same for every weight."""
    sizes = []
    pull = torch.randn(9, len(OPERATIONS))
    for mu in (0.0, 0.3, 1.0, 3.0, 10.0):
        torch.manual_seed(0)
        made = SuperNetwork(TextSpace(), 3, width=6, nodes=3, depths=[1, 3])
        made.a.requires_grad_()
        made.d.requires_grad_()
        optimizer = torch.optim.SGD([made.a, made.d], lr=1.0)
        for _ in range(150):
            optimizer.zero_grad()
            (0.1 * (made.a.softmax(1) * pull).sum() + mu * made.expected_cost()).backward()
            optimizer.step()
        layers = [layer for cell in made.derived().closed() for layer in cell.layers]
        sizes.append(sum(p.numel() for layer in layers for p in layer.parameters()))
    assert all(larger >= smaller for larger, smaller in pairwise(sizes))
    assert sizes[0] > sizes[-1]


def test_edges_are_looked_up_by_predecessor_and_node() -> None:
    assert Edge(predecessor=2, node=1) in edges(2)
