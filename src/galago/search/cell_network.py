"""Networks of cells whose operations are chosen: what a search ends with, and what its student is.

Ours, after the stacked cells of DARTS (arXiv:1806.09055), all at one resolution and alike. A cell reads the two before
it (the first ones the stem), its nodes are put side by side, and ReLU, a 1 × 1 convolution and BatchNorm bring them
back to the width of the network:

    node_j = Σ_i o_ij(node_i)        h = BatchNorm(W relu([node_0 … node_{N-1}]))        scores = linear(pool(relu(h)))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.search.relaxation import INPUTS, KEPT
from galago.search.space import Operation, Space


class Squeeze(nn.Sequential):
    """Nodes side by side, brought back to the network's width.

    Args:
        nodes: of the cell.
        width: channels of each, and of what goes out.
        affine: whether BatchNorm learns a factor and a shift.
    """

    def __init__(self, nodes: int, width: int, affine: bool) -> None:
        norm = nn.BatchNorm2d(width, affine=affine)
        super().__init__(nn.ReLU(), nn.Conv2d(nodes * width, width, 1, bias=False), norm)


class Cell(nn.Module):
    """A cell after the choice: one operation on each edge that is left.

    Args:
        space: of the operations' layers.
        genotype: node, predecessor and operation of every edge.
        width: channels.
        affine: whether BatchNorm learns a factor and a shift.
    """

    def __init__(
        self, space: Space, genotype: Sequence[tuple[int, int, Operation]], width: int, affine: bool = True
    ) -> None:
        super().__init__()
        self.space, self.genotype, self.width, self.affine = space, list(genotype), width, affine
        self.layers = nn.ModuleList(space.layer(operation, width, affine) for _, _, operation in genotype)
        self.nodes = nodes_of(genotype)
        self.squeeze = Squeeze(self.nodes, width, affine)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        states = [first, second]
        for node in range(self.nodes):
            into = [number for number, choice in enumerate(self.genotype) if choice[0] == node]
            values: list[Tensor] = [self.layers[number](states[self.genotype[number][1]]) for number in into]
            states.append(values[0] + values[1] if len(values) == KEPT else values[0])
        squeezed: Tensor = self.squeeze(torch.cat(states[INPUTS:], 1))
        return squeezed


class CellNetwork(nn.Module):
    """Cells with chosen operations, from normalized texts or images to class scores N×K.

    Args:
        space: texts or images, and their operations.
        genotype: node, predecessor (0 and 1 are the cells before, 2 + j is node j) and operation of every edge of a
            cell, at most two a node.
        classes: number of outputs.
        depth: number of cells.
        width: channels.
        affine: whether BatchNorm learns a factor and a shift.
    """

    def __init__(
        self,
        space: Space,
        genotype: Sequence[tuple[int, int, Operation]],
        classes: int,
        depth: int = 2,
        width: int = 128,
        affine: bool = True,
    ) -> None:
        super().__init__()
        if depth < 1 or width < 1:
            raise UserError(f"CellNetwork: depth is {depth} and width {width}; give 1 or more of each")
        self.genotype = [(node, start, Operation(operation)) for node, start, operation in genotype]
        require_sound(self.genotype)
        self.space, self.classes, self.depth, self.width, self.affine = space, classes, depth, width, affine
        self.stem = space.stem(width, affine)
        self.cells = nn.ModuleList(Cell(space, self.genotype, width, affine) for _ in range(depth))
        self.relu, self.pool = nn.ReLU(), space.summary()
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        first = second = self.stem(x)
        for cell in self.cells:
            first, second = second, cell(first, second)
        scores: Tensor = self.linear(self.pool(self.relu(second)).flatten(1))
        return scores

    def closed(self) -> list[Cell]:
        """The cells, typed."""
        return [cell for cell in self.cells if isinstance(cell, Cell)]


def nodes_of(genotype: Sequence[tuple[int, int, Operation]]) -> int:
    """How many nodes a genotype speaks of."""
    return 1 + max(node for node, _, _ in genotype)


def require_sound(genotype: Sequence[tuple[int, int, Operation]]) -> None:
    """Sees to it that a cell can be built.

    Raises:
        UserError: a node has no edge or too many, or one that comes from nowhere.
    """
    if not genotype:
        raise UserError("CellNetwork: genotype is empty; give node, predecessor and operation of every edge")
    for node, start, operation in genotype:
        if node < 0 or not 0 <= start < INPUTS + node or operation is Operation.zero:
            raise UserError(
                f"CellNetwork: genotype has [{node}, {start}, {operation.name}]; node {node} may take from"
                f" 0 to {INPUTS + node - 1}, by any operation but zero"
            )
    counts = [sum(node == one for one, _, _ in genotype) for node in range(nodes_of(genotype))]
    if not 1 <= min(counts) <= max(counts) <= KEPT:
        raise UserError(f"CellNetwork: the nodes of genotype have {counts} edges; give each one or two")
