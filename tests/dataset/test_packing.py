"""Pieces are packed into rows without cutting or losing any."""

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.dataset.packing import pack


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 64))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


def next_fit(lengths: list[int], capacity: int) -> int:
    """Return how many rows the simplest packing needs: a new row whenever the next piece does not fit."""
    rows, free = 0, 0
    for length in lengths:
        if length > free:
            rows, free = rows + 1, capacity
        free -= length
    return rows


@settings(max_examples=200, deadline=None)
@given(lengths_and_capacity())
def test_every_piece_is_in_one_row_and_no_row_is_over_capacity(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)
    assert pack(lengths, capacity) == rows


@settings(max_examples=200, deadline=None)
@given(lengths_and_capacity())
def test_there_are_at_most_as_many_rows_as_next_fit_needs_and_enough_for_all_tokens(
    case: tuple[list[int], int],
) -> None:
    lengths, capacity = case
    assert ceil(sum(lengths) / capacity) <= len(pack(lengths, capacity)) <= next_fit(lengths, capacity)


@settings(max_examples=200, deadline=None)
@given(lengths_and_capacity())
def test_pieces_go_longest_first_into_the_fullest_row_that_has_space(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    where = {index: number for number, row in enumerate(pack(lengths, capacity)) for index in row}
    filled: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [full for full in filled if full + lengths[index] <= capacity]
        if where[index] == len(filled):
            assert not fitting
            filled.append(0)
        else:
            assert filled[where[index]] == max(fitting)
        filled[where[index]] += lengths[index]


def test_pieces_that_fill_rows_exactly_leave_no_free_space() -> None:
    assert pack([3, 5, 2, 5], 5) == [[1], [3], [0, 2]]


def test_no_pieces_give_no_rows() -> None:
    assert pack([], 8) == []


@pytest.mark.parametrize("length", [0, -1, 9])
def test_a_piece_longer_than_a_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"every length must be in 1\.\.8: \[{length}\]"):
        pack([4, length], 8)
