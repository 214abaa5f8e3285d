"""Parts of a network with a target of their own: how a budget is shared out, what is left of it, and how it is met."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.errors import UserError
from galago.layers import find
from galago.prune.cost import Costs, Resource, costs_of
from galago.prune.groups import Groups, strengths


@dataclass(frozen=True)
class Block:
    """A part of a network that is controlled by itself.

    Args:
        path: of a module; every layer inside belongs to the block, but for those of a block further in.
        target: share of the block's cost that is to be left; none: as the whole network's.
        strength: how strongly its channels are pressed, for good; none: as its target asks for.
    """

    path: str
    target: float | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.target is not None and not 0 < self.target <= 1:
            raise UserError(f"block {self.path}: target is {self.target}; give the share of its cost to leave")
        if self.strength is not None and self.strength < 0:
            raise UserError(f"block {self.path}: strength is {self.strength}; give a number from 0 up")


def partition(model: nn.Module, layers: Sequence[str], given: Sequence[Block]) -> dict[str, list[int]]:
    """The layers of each block, by path, as places in `layers`; each layer is in exactly one.

    Layers in none of the blocks given are taken together by the network's direct children, its stages as a rule. A
    child with one layer (a stem, a classifier) joins the block before it, or the first one.

    Args:
        model: the network.
        layers: their paths, in the order of execution.
        given: blocks named by hand.

    Raises:
        UserError: a block given is not there, or has no layers.
    """
    for block in given:
        find(model, block.path)
    named, found = [block.path for block in given], dict[str, list[int]]()
    for place, layer in enumerate(layers):
        around = [path for path in named if not path or f"{layer}.".startswith(f"{path}.")]
        found.setdefault(max(around, key=len, default=layer.partition(".")[0]), []).append(place)
    if empty := [path for path in named if path not in found]:
        raise UserError(
            f"block {empty[0]} has no layers of its own; name modules that hold convolutions, each one once"
        )
    stages = [path for path, places in found.items() if path in named or len(places) > 1]
    blocks: dict[str, list[int]] = {path: [] for path in stages or [""]}
    home = next(iter(blocks))
    for path, places in found.items():
        home = path if path in blocks else home
        blocks[home] += places
    return blocks


class Budget(NamedTuple):
    """Targets of B blocks of a network with L layers and G groups."""

    costs: Costs
    members: Tensor  # B×L: one where a layer belongs to a block
    target: Tensor  # ρ, B: share of the cost that is to be left

    def of_blocks(self, layers: Tensor) -> Tensor:
        """Sums over the layers of each block, B, of a number for each layer, L."""
        return (self.members * layers).sum(1)

    def left(self, alive: Tensor) -> Tensor:
        """c: the share of each block's cost that is left, B.

        Args:
            alive: a of each group, G.
        """
        return self.of_blocks(self.costs.cost(alive)) / self.of_blocks(self.costs.cost(torch.ones_like(alive)))

    def trimmed(self, gates: Tensor, alive: Tensor) -> Tensor:
        """What is alive when of each block above its target the weakest groups are cut until it is not, G.

        Those that the block makes go first, and only then those that it reads. The strongest group of each layer stays,
        whatever the target.

        Args:
            gates: g, G.
            alive: a, G.
        """
        spared = self.costs.alive(gates, float("inf")) > 0
        for lies_in in (self.costs.makes, self.costs.reads):
            for _ in self.target:  # each round brings one block at least to its target, if that can be
                over = self.left(alive) > self.target
                touched = (self.members[over].sum(0)[:, None] * lies_in).any(0)
                free = (touched & (alive > 0) & ~spared).nonzero().flatten()
                order = free[gates[free].argsort(stable=True)]
                cuts = _Cuts(self, alive, order, over)
                alive = cuts.without(bisect_left(range(len(order)), True, key=cuts.bring_one_to_its_target))
        return alive

    def relative(self) -> Budget:
        """The same with costs as shares of the whole network's, C_0."""
        whole = self.costs.cost(torch.ones_like(self.costs.makes[0])).sum()
        return self._replace(costs=self.costs._replace(kappa=self.costs.kappa / whole))

    def to(self, like: Tensor) -> Budget:
        """The same on another tensor's device and in its precision."""
        return Budget(self.costs.to(like), self.members.to(like), self.target.to(like))


class _Cuts(NamedTuple):
    """The first groups of an order, cut one after another."""

    budget: Budget
    alive: Tensor
    order: Tensor
    over: Tensor  # blocks that are above their targets

    def without(self, count: int) -> Tensor:
        return self.alive.index_fill(0, self.order[:count], 0.0)

    def bring_one_to_its_target(self, count: int) -> bool:
        return bool((self.budget.left(self.without(count)) <= self.budget.target)[self.over].any())


def shared_out(
    model: nn.Module, groups: Groups, resource: Resource, given: Sequence[Block], share: float
) -> tuple[list[Block], Budget]:
    """All blocks of a network, each with its target: its own, or the common share. What cannot be cut stays as it is.

    Args:
        model: whose groups these are.
        groups: of the network.
        resource: what costs.
        given: blocks with targets or strengths of their own.
        share: the target of all other blocks.

    Raises:
        UserError: a block is not there, or cannot be cut down to its target.
    """
    named = {block.path: block for block in given}
    found = partition(model, [layer.path for layer in groups.layers], given)
    members = torch.zeros(len(found), len(groups.layers), dtype=torch.float64)
    for row, places in zip(members, found.values(), strict=True):
        row[places] = 1.0
    budget = Budget(costs_of(groups, resource), members, torch.ones(len(found), dtype=torch.float64))
    gates = strengths(model, groups).detach().double().cpu()
    least: list[float] = budget.left(budget.costs.alive(gates, float("inf"))).tolist()
    blocks = []
    for path, lowest in zip(found, least, strict=True):
        block = named.get(path, Block(path))
        target = block.target or (share if lowest < 1 else 1.0)
        if target < lowest:
            raise UserError(
                f"block {path!r} cannot be cut down to {target:g} of its {resource.unit}, but to {lowest:.3g} at least;"
                f" give it another target (blocks: [{{path: {path}, target: …}}]), or name blocks that can"
            )
        blocks.append(replace(block, target=target))
    target_of_each = torch.tensor([block.target for block in blocks], dtype=torch.float64)
    return blocks, budget._replace(target=target_of_each)


def shares(blocks: Sequence[Block], budget: Budget, alive: Tensor) -> str:
    """What is left of the whole network's cost and of each block's, for a person to read.

    Args:
        blocks: as `shared_out` gives them, with their budget.
        budget: in float64.
        alive: a of each group, G.
    """
    costs = budget.costs
    whole = float(costs.cost(alive).sum() / costs.cost(torch.ones_like(alive)).sum())
    each = [f"{block.path or 'all'} {float(left):.3f}" for block, left in zip(blocks, budget.left(alive), strict=True)]
    return f"{whole:.3f} ({', '.join(each)})"


def table(blocks: Sequence[Block], budget: Budget, groups: Groups, unit: str) -> Table:
    """The blocks with what they cost and are to cost, and what is left whole, for a person to read.

    Args:
        blocks: as `shared_out` gives them, with their budget.
        budget: in float64.
        groups: of the network.
        unit: what is counted.
    """
    shown = Table("block", "layers", "channels", unit, "share", "target")
    costs = budget.costs.cost(budget.members.new_ones(groups.count))
    for block, members, cost in zip(blocks, budget.members, budget.of_blocks(costs), strict=True):
        channels = (budget.costs.makes[members > 0] > 0).any(0).sum()
        counts = (f"{int(members.sum())}", f"{int(channels)}", f"{int(cost):,}")
        shown.add_row(block.path or "all", *counts, f"{float(cost / costs.sum()):.3f}", f"{block.target:g}")
    shown.caption = f"left whole: {groups.reasons()}" if groups.whole else None
    return shown
