"""Rows: classes of a probability map, made when they are asked for; what was not scored is background for sure."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from segmentation.rows import LabelRows, LikeliestRows


def probabilities(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).dirichlet(np.ones(3), (7, 5)).transpose(2, 0, 1).astype(np.float32)
    values[:, 2:4, 1] = np.nan
    return values


@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 99))
def test_any_rows_are_those_of_the_whole_map(start: int, stop: int, seed: int) -> None:
    values = probabilities(seed)
    rows = slice(start, stop)
    scored = ~np.isnan(values[0])
    labels = np.where(scored, np.nan_to_num(values).argmax(0), 0)
    likeliest = np.where(scored, np.nan_to_num(values).max(0), 1)
    np.testing.assert_array_equal(LabelRows(values)[rows], labels[rows])
    np.testing.assert_array_equal(LikeliestRows(values)[rows], likeliest[rows].astype(np.float32))


@pytest.mark.parametrize("kind", [LabelRows, LikeliestRows])
def test_the_map_itself_is_left_as_it_is(kind: type[LabelRows] | type[LikeliestRows]) -> None:
    values = probabilities()
    before = values.copy()
    kind(values)[:]
    np.testing.assert_array_equal(values, before)


def test_a_map_on_disk_is_read_by_its_chunks(tmp_path: Path) -> None:
    values = probabilities()
    array = zarr.create_array(tmp_path / "a.zarr", shape=values.shape, chunks=(3, 4, 5), dtype="float32")
    array[:] = values
    rows = LabelRows(array)
    assert (rows.shape, rows.chunks) == ((7, 5), (4, 5))
    np.testing.assert_array_equal(rows[3:6], LabelRows(values)[3:6])
    assert rows[:].dtype == np.uint8
    assert LikeliestRows(array)[:].dtype == np.float32
