from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from galago.regularize.grouping import distances, group_targets, grouping, members

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "ssal.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def by_hand(confusion: Tensor, count: int, similar: bool = True) -> list[int]:
    """The rule of the card, in loops."""
    classes = len(confusion)
    most = max(float(confusion[i, j]) for i in range(classes) for j in range(classes) if i != j)
    apart = [[0.0] * classes for _ in range(classes)]
    for i in range(classes):
        for j in range(classes):
            if i != j:
                both = float(confusion[i, j]) + float(confusion[j, i])
                apart[i][j] = most - both / 2 if similar else both / 2
    groups: list[list[int]] = [[min(range(classes), key=lambda i: sum(apart[i]))]]
    free = [i for i in range(classes) if i not in groups[0]]

    def distance(i: int, group: list[int]) -> float:
        return sum(apart[i][j] for j in group) / len(group)

    while len(groups) < count:
        chosen = max(free, key=lambda i: min(distance(i, group) for group in groups))
        groups.append([chosen])
        free.remove(chosen)
    while free:
        chosen = min(free, key=lambda i: min(distance(i, group) for group in groups))
        for group in sorted(groups, key=lambda group: distance(chosen, group)):
            if len(group) < 1.1 * classes / count:
                group.append(chosen)
                break
        free.remove(chosen)
    return [next(number for number, group in enumerate(groups) if i in group) for i in range(classes)]


@pytest.mark.parametrize("case", range(4))
def test_groups_of_similar_classes_are_the_official_ones_with_their_numbers(case: int) -> None:
    found = grouping(golden(f"similar{case}_confusion"), int(golden(f"similar{case}_groups")))
    assert found == golden(f"similar{case}_map").tolist()


@pytest.mark.parametrize("case", [case for case in range(4) if GOLDEN[f"split{case}_ok"]])
def test_groups_that_split_similar_classes_are_the_official_partition(case: int) -> None:
    found = grouping(golden(f"similar{case}_confusion"), int(golden(f"similar{case}_groups")), similar=False)
    assert [found.index(group) for group in found] == golden(f"split{case}_partition_canonical").tolist()


def test_blocks_of_confused_classes_are_found() -> None:
    found = grouping(golden("block_confusion"), 4)
    partition = [found.index(group) for group in found]
    official = golden("block_map").tolist()
    assert partition == [official.index(group) for group in official]


@pytest.mark.parametrize("similar", [True, False])
@pytest.mark.parametrize(("classes", "count"), [(5, 2), (10, 3), (10, 7), (12, 12), (17, 4)])
def test_groups_are_those_of_the_loop_all_filled_and_none_too_large(classes: int, count: int, similar: bool) -> None:
    torch.manual_seed(classes)
    confusion = torch.rand(classes, classes, dtype=torch.float64)
    found = grouping(confusion, count, similar)
    assert found == by_hand(confusion, count, similar)
    sizes = [found.count(group) for group in range(count)]
    assert min(sizes) >= 1
    assert max(sizes) <= -(-1.1 * classes // count)
    assert sum(sizes) == classes


def test_the_diagonal_and_the_given_table_do_not_matter() -> None:
    confusion = torch.randint(0, 9, (6, 6))
    before = confusion.clone()
    other = confusion.clone().fill_diagonal_(1000)
    assert torch.equal(distances(confusion), distances(other))
    assert torch.equal(confusion, before)


def test_targets_of_groups_are_sums_over_their_classes() -> None:
    target, group = torch.rand(7, 5).softmax(1), [2, 0, 1, 0, 2]
    found = group_targets(target, group)
    for number in range(3):
        expected = sum(target[:, k] for k in range(5) if group[k] == number)
        torch.testing.assert_close(found[:, number], expected)
    assert members(group, "abcde") == "{b, d} {c} {a, e}"
