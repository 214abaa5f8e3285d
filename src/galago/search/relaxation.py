"""Cells whose operations are still open: how they are mixed, what they are expected to cost, what is kept of them.

Eric Jang, Shixiang Gu, Ben Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017, arXiv:1611.01144,
for the noise; Hanxiao Liu, Karen Simonyan, Yiming Yang, "DARTS: Differentiable Architecture Search", ICLR 2019,
arXiv:1806.09055, for mixing and deriving.

A cell has two inputs and some nodes; each node adds up what comes over its edges, one from each input and each earlier
node. Every edge e has a number a_{e,o} for each operation o.

    w = softmax((a + g) / τ),   g = -log(-log u),   u ~ Uniform(0, 1)          what is mixed in training
    hard:   onehot(argmax w) - sg(w) + w                                       one operation, the gradient of all
    E[cost] = Σ_e Σ_o softmax(a_e)_o cost_o / seed cost                        without noise, τ = 1
    derived: of each node the two edges whose best operation but `zero` is likeliest, each with that operation
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

INPUTS = 2  # of a cell; the first predecessors of every node
KEPT = 2  # edges of each node that are kept


class Edge(NamedTuple):
    """From a predecessor (0 and 1 are the cell's inputs, 2 + j is node j) to a node."""

    predecessor: int
    node: int


class Choice(NamedTuple):
    """An edge that is kept, and the number of its operation."""

    node: int
    predecessor: int
    operation: int


def edges(nodes: int) -> list[Edge]:
    """Every edge of a cell, node by node.

    >>> [tuple(edge) for edge in edges(2)]
    [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)]
    """
    return [Edge(predecessor, node) for node in range(nodes) for predecessor in range(INPUTS + node)]


def gumbel(u: Tensor) -> Tensor:
    """`g = -log(-log u)`.

    >>> gumbel(torch.tensor([0.5, 0.9]))
    tensor([0.3665, 2.2504])
    """
    return -(-u.log()).log()


def draw(shape: Sequence[int]) -> Tensor:
    """Gumbel noise by torch's generator on the CPU, so that every device trains alike; never infinite."""
    number = torch.finfo(torch.float32)
    return gumbel(torch.rand(tuple(shape)).clamp(number.tiny, 1 - number.eps))


def mixture(a: Tensor, g: Tensor, tau: Tensor | float, hard: bool = False) -> Tensor:
    """`w`, the weight of every operation on every edge.

    Args:
        a: E×O.
        g: noise, E×O.
        tau: temperature, above 0.
        hard: one operation an edge, with the gradient of all.

    >>> mixture(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 1.0, hard=True)
    tensor([[1., 0.]])
    """
    w = ((a + g) / tau).softmax(-1)
    if not hard:
        return w
    chosen = torch.zeros_like(w).scatter(-1, w.argmax(-1, keepdim=True), 1.0)
    return (chosen - w).detach() + w


def expected_cost(a: Tensor, cost: Tensor, seed_cost: float) -> Tensor:
    """`E[cost]`, a scalar with a gradient.

    >>> expected_cost(torch.tensor([[0.0, 0.0]]), torch.tensor([0.0, 60.0]), 10.0)
    tensor(3.)

    Args:
        a: E×O.
        cost: of each operation, O.
        seed_cost: what counts as 1.
    """
    return (a.softmax(-1) * cost).sum() / seed_cost


def derive(a: Tensor, nodes: int, zero: int = 0) -> list[Choice]:
    """What is kept: of every node at most two edges, in order; of equally likely ones the earlier predecessor.

    >>> derive(torch.tensor([[0.0, 1.0, 0.0], [9.0, 0.0, 2.0]]), 1)
    [Choice(node=0, predecessor=0, operation=1), Choice(node=0, predecessor=1, operation=2)]

    Args:
        a: E×O, edges in the order of `edges`.
        nodes: of the cell.
        zero: which operation stands for no edge.
    """
    likely = a.detach().softmax(-1).clone()
    likely[:, zero] = -1.0
    strength, best = likely.max(-1)
    found = []
    for node in range(nodes):
        own = [number for number, edge in enumerate(edges(nodes)) if edge.node == node]
        strongest = sorted(own, key=lambda number: -float(strength[number]))[:KEPT]
        found += [Choice(node, edges(nodes)[number].predecessor, int(best[number])) for number in sorted(strongest)]
    return found
