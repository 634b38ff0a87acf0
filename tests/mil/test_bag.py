"""Bags: what is no bag is refused with the reason; batches hold what the bags held and nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mil.bag import Bag, Batch, collate
from wsi.errors import UsageError


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_a_batch_holds_every_bag_and_zeros_elsewhere(lengths: list[int], half: bool, placed: bool) -> None:
    dtype = torch.float16 if half else torch.float32
    bags = [
        Bag(torch.randn(n, 3).to(dtype) + 5, torch.randint(1, 99, (n, 2)) if placed else None, str(n)) for n in lengths
    ]
    batch = collate(bags)
    assert len(batch) == len(bags)
    assert batch.features.dtype == dtype
    assert (batch.xy is not None) == placed
    for index, bag in enumerate(bags):
        assert torch.equal(batch.features[index, batch.mask[index]], bag.features)
        assert int(batch.mask[index].sum()) == len(bag)
        assert bool(batch.mask[index, : len(bag)].all())
        if batch.xy is not None and bag.xy is not None:
            assert torch.equal(batch.xy[index, batch.mask[index]], bag.xy)
    assert not batch.features[~batch.mask].any()


def test_one_bag_makes_a_batch_without_a_copy() -> None:
    features = torch.randn(5, 3)
    assert collate([Bag(features)]).features.data_ptr() == features.data_ptr()


def test_half_and_single_precision_together_are_single() -> None:
    batch = collate([Bag(torch.ones(2, 3).half()), Bag(torch.ones(1, 3))])
    assert batch.features.dtype == torch.float32


def test_places_are_dropped_unless_all_bags_have_them() -> None:
    assert collate([Bag(torch.ones(1, 3), torch.zeros(1, 2, dtype=torch.int64)), Bag(torch.ones(1, 3))]).xy is None


def test_arrays_do_as_well_even_read_only_ones() -> None:
    features = np.arange(6, dtype=np.float16).reshape(2, 3)
    features.flags.writeable = False
    bag = Bag(features, np.array([[0, 0], [256, 0]]), "slide")
    assert bag.features.tolist() == features.tolist()
    assert bag.xy is not None
    assert (len(bag), bag.dim, bag.key) == (2, 3, "slide")
    assert "slide" in repr(bag)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(0, 4), "has no tiles"),
        (torch.zeros(4), "tiles, dim"),
        (torch.zeros(2, 3, 4), "tiles, dim"),
        (torch.zeros(2, 4, dtype=torch.float64), "float16 or float32"),
        (torch.zeros(2, 4, dtype=torch.int64), "float16 or float32"),
        (torch.tensor([[1.0], [torch.nan]]), "tile 1 are not finite"),
        (torch.tensor([[torch.inf], [1.0]]), "tile 0 are not finite"),
    ],
)
def test_what_is_no_bag_is_refused_with_the_reason(features: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=rf"bag 'a/slide.svs'.*{message}"):
        Bag(features, key="a/slide.svs")


def test_a_value_that_is_not_finite_is_found_far_down_a_bag() -> None:
    features = torch.zeros(20_000, 2)
    features[12_345, 1] = torch.nan
    with pytest.raises(UsageError, match="tile 12345"):
        Bag(features)


@pytest.mark.parametrize(
    "xy", [torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)]
)
def test_places_that_do_not_fit_are_refused(xy: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"xy is \(2, 2\) int64"):
        Bag(torch.zeros(2, 4), xy)


def test_bags_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UsageError, match="one width"):
        collate([Bag(torch.zeros(2, 4)), Bag(torch.zeros(2, 5))])
    with pytest.raises(UsageError, match="no bags"):
        collate([])


def test_a_batch_checks_itself() -> None:
    features, mask = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(UsageError, match="bool mask"):
        Batch(features, mask.float())
    with pytest.raises(UsageError, match="bool mask"):
        Batch(features, mask[:, :2])
    with pytest.raises(UsageError, match="xy of a batch"):
        Batch(features, mask, torch.zeros(2, 3))
    mask[1] = False
    with pytest.raises(UsageError, match="without tiles"):
        Batch(features, mask)


def test_a_batch_moves_with_all_it_has() -> None:
    batch = collate([Bag(torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.int64))]).to("cpu")
    assert batch.xy is not None
    assert {batch.features.device.type, batch.mask.device.type, batch.xy.device.type} == {"cpu"}
