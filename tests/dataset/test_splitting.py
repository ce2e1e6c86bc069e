"""Documents longer than a block are cut at the best position, without losing a token."""

from collections.abc import Callable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.dataset.documents import Breaks
from ft_dagster.dataset.splitting import Piece, cut_positions, split_document

CUTS = st.lists(st.lists(st.integers(1, 200), unique=True).map(sorted), min_size=3, max_size=3)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 200), cuts=CUTS, block=st.integers(2, 40))
def test_pieces_cover_every_token_once_and_none_is_longer_than_a_block(
    length: int, cuts: list[list[int]], block: int
) -> None:
    pieces = split_document(length, cuts, block)
    assert [token for piece in pieces for token in range(piece.first, piece.after)] == list(range(length))
    assert all(piece.context <= piece.length - 1 and piece.length <= block for piece in pieces)
    assert [piece.context for piece in pieces] == [0, 1, *[1] * len(pieces)][: len(pieces)]


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 200), cuts=CUTS, block=st.integers(2, 40))
def test_every_cut_is_the_last_one_of_the_best_kind_that_leaves_its_share_of_a_block(
    length: int, cuts: list[list[int]], block: int
) -> None:
    for piece in split_document(length, cuts, block)[:-1]:
        most = block - piece.context
        allowed = [
            [cut for cut in kind if piece.first + max(1, int(most * share)) <= cut <= piece.first + most]
            for kind, share in zip(cuts, (0.5, 0.25, 0.25), strict=True)
        ]
        expected = next((max(kind) for kind in allowed if kind), piece.first + most)
        assert piece.after == expected


def test_a_document_that_fits_is_one_piece_wherever_it_could_be_cut() -> None:
    assert split_document(8, [[4], [5], [6]], 8) == [Piece(0, 8, 0)]


def test_an_empty_document_has_no_piece() -> None:
    assert split_document(0, [[], [], []], 8) == []


def test_a_heading_is_preferred_to_a_later_paragraph() -> None:
    assert split_document(12, [[5], [7], [8]], 8) == [Piece(0, 5, 0), Piece(5, 12, 1)]


def test_a_heading_that_would_leave_less_than_half_a_block_is_skipped() -> None:
    assert split_document(12, [[3], [2], [8]], 8) == [Piece(0, 2, 0), Piece(2, 8, 1), Piece(8, 12, 1)]


def test_without_a_break_the_text_is_cut_where_the_block_is_full() -> None:
    assert split_document(9, [[], [], []], 4) == [Piece(0, 4, 0), Piece(4, 7, 1), Piece(7, 9, 1)]


def test_the_token_of_context_counts_for_the_length() -> None:
    assert [piece.length for piece in split_document(9, [[], [], []], 4)] == [4, 4, 3]


def tokens_at(tokens: dict[int, int]) -> Callable[[Sequence[int]], list[int]]:
    return lambda characters: [tokens[at] for at in characters if at in tokens]


def test_breaks_become_the_positions_of_the_tokens_that_start_there() -> None:
    tokens = {0: 0, 3: 1, 6: 2, 9: 4}  # two tokens of one character start at 6
    assert cut_positions(tokens_at(tokens), Breaks([3], [6], [9])) == [[1], [2], [4]]


def test_breaks_inside_a_token_after_the_last_or_at_the_first_are_ignored() -> None:
    tokens = {0: 0, 3: 1, 6: 2}
    assert cut_positions(tokens_at(tokens), Breaks([4], [7], [0])) == [[], [], []]
