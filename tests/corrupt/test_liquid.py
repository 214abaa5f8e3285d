"""Spatter against the reference; edges, distances and histograms against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galago.corrupt.corruption import truncated, unit
from galago.corrupt.liquid import Spatter, chamfer, edges, equalized, liquid, mud, sobel, water, widened
from photographs import agrees_with_statistics, difference, golden, photograph


@pytest.mark.parametrize(("size", "severity"), [(32, 1), (32, 3), (32, 5), (64, 2), (64, 4)])
def test_spatter_is_the_reference_s(size: int, severity: int) -> None:
    arrays, key = golden("seeded", size), f"spatter_s{severity}"
    drawn = np.random.RandomState(int(arrays[f"{key}_seed"])).normal(size=(1, size, size))
    m, sigma, b, t, k, muddy = Spatter.settings.at(size)[severity - 1]
    layer = liquid(torch.from_numpy(drawn).float(), m, sigma, b, t)
    x = unit(photograph("seeded", size))
    found = truncated(mud(x, layer, k, t) if muddy else water(x, layer, k))
    assert difference(found, arrays[key]).max() <= 1


@pytest.mark.parametrize(("size", "severity", "images"), [(32, 1, 40), (32, 4, 40), (64, 3, 20), (224, 2, 4)])
def test_own_draws_have_the_reference_s_statistics(size: int, severity: int, images: int) -> None:
    assert agrees_with_statistics(Spatter(), size, severity, images)


def test_distances_equal_a_search_for_shortest_ways() -> None:
    mask = torch.zeros(2, 15, 26, dtype=torch.bool)
    mask[0, 3, 4] = mask[0, 12, 20] = mask[1, 0, 0] = True
    ways = [(dy, dx, {1: 1.0, 2: 1.4, 5: 2.1969}[dy * dy + dx * dx])
            for dy in range(-2, 3) for dx in range(-2, 3) if dy * dy + dx * dx in (1, 2, 5)]  # fmt: skip
    for n in range(2):
        shortest = torch.where(mask[n], 0.0, torch.inf)
        for _ in range(26):
            wide = torch.nn.functional.pad(shortest, (2, 2, 2, 2), value=torch.inf)
            options = [wide[2 + dy : 17 + dy, 2 + dx : 28 + dx] + step for dy, dx, step in ways]
            shortest = torch.stack([shortest, *options]).amin(0)
        torch.testing.assert_close(chamfer(mask)[n], shortest.clamp_max(20))


def test_without_an_edge_all_is_far() -> None:
    assert torch.equal(chamfer(torch.zeros(1, 9, 9, dtype=torch.bool)), torch.full((1, 9, 9), 20.0))


def test_a_step_has_one_line_of_edges_and_a_plain_image_none() -> None:
    image = torch.zeros(1, 10, 10, dtype=torch.uint8)
    assert not edges(image).any()
    image[..., 5:] = 200
    assert edges(image).sum(2).tolist() == [[1] * 10]


def test_a_weak_edge_counts_only_where_it_hangs_on_a_strong_one() -> None:
    image = torch.zeros(2, 12, 12, dtype=torch.uint8)
    image[:, :, 6:] = 25  # a gradient of 100: between low and high
    image[1, :2, 6:] = 100
    found = edges(image)
    assert not found[0].any()
    assert found[1].any(1).sum() >= 1
    assert found[1, 10].any()


def test_the_gradient_is_sobel_s() -> None:
    image = torch.randint(0, 256, (1, 6, 7), generator=torch.Generator().manual_seed(0)).byte()
    gx, gy = sobel(image)
    v = torch.nn.functional.pad(image[None].double(), (1, 1, 1, 1), mode="replicate")[0, 0]
    for y in range(6):
        for x in range(7):
            part = v[y : y + 3, x : x + 3]
            assert gx[0, y, x] == (part * torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])).sum()
            assert gy[0, y, x] == (part * torch.tensor([[-1, -2, -1], [0, 0, 0], [1, 2, 1]])).sum()


def test_a_mask_is_widened_by_its_eight_neighbors() -> None:
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, 2, 2] = True
    assert widened(mask)[0].nonzero().tolist() == [[y, x] for y in (1, 2, 3) for x in (1, 2, 3)]


def test_a_plain_image_stays_plain_when_its_histogram_is_made_even() -> None:
    plain = torch.full((1, 4, 4), 7, dtype=torch.uint8)
    assert len(equalized(plain).unique()) == 1


def test_an_image_without_water_stays_as_it_is() -> None:
    x = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(water(x, torch.zeros(1, 9, 9), 0.5), x)
