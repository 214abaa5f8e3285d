"""The network in which all operations compete: a `SuperNetwork`, which `galago.search.nas_kd.NasKd` trains.

Ours, after DARTS (arXiv:1806.09055): the network of cells that is derived from it (`galago.search.cell_network`) with
every operation on every edge, each with its weight, and several numbers of cells at once.

    node_j = Σ_i Σ_o w_{ij,o} o(node_i)        scores = linear(pool(relu(Σ_i softmax(d)_i h_{L_i})))

h_L is what L cells give. The numbers a (of which w is made, `galago.search.relaxation`) and d are shared by all cells.
They are buffers, so that no optimizer but the search's moves them. In evaluation there is no noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.search.cell_network import CellNetwork, Squeeze
from galago.search.relaxation import INPUTS, KEPT, Choice, Edge, derive, draw, edges, expected_cost, mixture
from galago.search.space import OPERATIONS, Operation, Space, Zero

START = 1e-3  # deviation of a and d before the search


class OpenCell(nn.Module):
    """A cell with every operation on every edge.

    Args:
        space: of the operations' layers.
        nodes: how many.
        width: channels.
    """

    def __init__(self, space: Space, nodes: int, width: int) -> None:
        super().__init__()
        self.space, self.nodes, self.width = space, nodes, width
        self.layers = nn.ModuleList(
            nn.ModuleList(space.layer(operation, width, affine=False) for operation in OPERATIONS) for _ in edges(nodes)
        )
        self.squeeze = Squeeze(nodes, width, affine=False)

    def forward(self, first: Tensor, second: Tensor, w: Tensor) -> Tensor:
        states = [first, second]
        for node in range(self.nodes):
            into = [(number, edge.predecessor) for number, edge in enumerate(edges(self.nodes)) if edge.node == node]
            states.append(summed([self._mixed(number, states[start], w) for number, start in into]))
        squeezed: Tensor = self.squeeze(torch.cat(states[INPUTS:], 1))
        return squeezed

    def _mixed(self, number: int, x: Tensor, w: Tensor) -> Tensor:
        competing = cast("nn.ModuleList", self.layers[number])
        parts = [
            w[number, o].to(x.dtype) * layer(x) for o, layer in enumerate(competing) if not isinstance(layer, Zero)
        ]
        return summed(parts)


class SuperNetwork(nn.Module):
    """Cells in which all operations compete, and of which several numbers do; trained by `galago.search.nas_kd.NasKd`.

    Args:
        space: texts or images, and their operations.
        classes: number of outputs.
        width: channels.
        nodes: of a cell.
        depths: numbers of cells to choose among, rising.
    """

    a: Tensor
    d: Tensor
    noise: Tensor
    temperature: Tensor

    def __init__(
        self, space: Space, classes: int, width: int = 128, nodes: int = 4, depths: Sequence[int] = (2, 4, 6)
    ) -> None:
        super().__init__()
        if list(depths) != sorted(set(depths)) or not depths or depths[0] < 1:
            raise UserError(f"SuperNetwork: depths are {list(depths)}; give rising numbers of cells, such as [2, 4, 6]")
        if nodes < 1 or width < 1:
            raise UserError(f"SuperNetwork: nodes is {nodes} and width {width}; give 1 or more of each")
        self.space, self.classes, self.width, self.nodes, self.depths = space, classes, width, nodes, list(depths)
        self.hard = False
        self.stem = space.stem(width, affine=False)
        self.cells = nn.ModuleList(OpenCell(space, nodes, width) for _ in range(depths[-1]))
        self.relu, self.pool = nn.ReLU(), space.summary()
        self.linear = nn.Linear(width, classes)
        self.costs = [space.cost(operation, width) for operation in OPERATIONS]
        self.register_buffer("a", START * torch.randn(len(edges(nodes)), len(OPERATIONS)))
        self.register_buffer("d", START * torch.randn(len(depths)))
        self.register_buffer("noise", torch.zeros_like(self.a))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        w = mixture(self.a, self.noise if self.training else torch.zeros_like(self.a), self.temperature, self.hard)
        first = second = self.stem(x)
        found = []
        for number, cell in enumerate(self.cells, start=1):
            first, second = second, cell(first, second, w)
            if number in self.depths:
                found.append(second)
        scores: Tensor = self.linear(self.pool(self.relu(depth_mixture(self.d, found))).flatten(1))
        return scores

    def draw(self, temperature: float) -> None:
        """New noise for all edges, and how far it counts."""
        self.noise.copy_(draw(self.a.shape))
        self.temperature.fill_(temperature)

    def expected_cost(self) -> Tensor:
        """Of the operations in all cells; 1 is two convolutions of 3 for every node in the deepest network."""
        seed = KEPT * self.nodes * self.depths[-1] * self.costs[OPERATIONS.index(Operation.conv_3)]
        cells = (self.d.softmax(0) * torch.tensor(self.depths, device=self.d.device)).sum()
        return cells * expected_cost(self.a, torch.tensor(self.costs, device=self.a.device), seed)

    def chosen(self) -> list[Choice]:
        """The edges that are kept, as numbers."""
        return derive(self.a, self.nodes, OPERATIONS.index(Operation.zero))

    @torch.no_grad()
    def derived(self) -> CellNetwork:
        """The likeliest operations and number of cells as a network of its own, with the weights that they have here.

        BatchNorm has no factor and no shift in it, as here; `student` makes one to train anew.
        """
        genotype = [(node, start, OPERATIONS[operation]) for node, start, operation in self.chosen()]
        depth = self.depths[int(self.d.argmax())]
        made = CellNetwork(self.space, genotype, self.classes, depth, self.width, affine=False)
        made.stem.load_state_dict(self.stem.state_dict())
        made.linear.load_state_dict(self.linear.state_dict())
        numbers = {edge: number for number, edge in enumerate(edges(self.nodes))}
        for own, open_cell in zip(made.closed(), cast("list[OpenCell]", list(self.cells)), strict=False):
            own.squeeze.load_state_dict(open_cell.squeeze.state_dict())
            for layer, (node, start, operation) in zip(own.layers, self.chosen(), strict=True):
                competing = cast("nn.ModuleList", open_cell.layers[numbers[Edge(start, node)]])
                layer.load_state_dict(competing[operation].state_dict())
        return made.to(self.a.device)


def depth_mixture(d: Tensor, found: Sequence[Tensor]) -> Tensor:
    """`Σ_i softmax(d)_i h_{L_i}`.

    Args:
        d: D numbers.
        found: features of one shape after each of D numbers of cells.
    """
    return summed([share.to(h.dtype) * h for share, h in zip(d.softmax(0), found, strict=True)])


def summed(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, one after another: stacking them first would take twice the memory."""
    total = parts[0]
    for more in parts[1:]:
        total = total + more
    return total
