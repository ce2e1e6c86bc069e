"""Packed rows as an Arrow table: their columns, their counts and their version."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ft_dagster.dataset.packing import pack

OBJECTIVES = ("text", "rewrite")
"""The objectives. A row contains the index of an objective in this tuple."""


class PlacedPiece(NamedTuple):
    """Tokens of a document that stay together."""

    place: tuple[str, int]
    """Hash of the text, and the index of the piece: a sort key that does not depend on file names."""
    document: int
    ids: np.ndarray
    """Token ids, int32."""
    prompt: int
    """Number of tokens at the start that are read and not supervised."""
    objective: str


def pack_pieces(pieces: Sequence[PlacedPiece], block_length: int) -> pa.Table:
    """Pack pieces into rows of at most `block_length` tokens. The order of `pieces` does not matter.

    Returns:
        A table with the columns `input_ids`, `lengths` (of the pieces in a row), `documents` (that the pieces belong
        to), `pieces` (the index of each piece in its document), `prompts` and `objectives`; all are lists of int32.
    """
    pieces = sorted(pieces, key=lambda piece: piece.place)
    rows = pack([len(piece.ids) for piece in pieces], block_length)
    chosen = [pieces[index] for row in rows for index in row]
    in_row = [len(row) for row in rows]
    lengths = np.asarray([len(piece.ids) for piece in chosen], dtype=np.int32)
    slots = np.add.reduceat(lengths, np.cumsum([0, *in_row[:-1]]))
    columns: dict[str, tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]] = {
        "input_ids": (np.concatenate([piece.ids for piece in chosen]), slots),
        "lengths": (lengths, in_row),
        "documents": ([piece.document for piece in chosen], in_row),
        "pieces": ([piece.place[1] for piece in chosen], in_row),
        "prompts": ([piece.prompt for piece in chosen], in_row),
        "objectives": ([OBJECTIVES.index(piece.objective) for piece in chosen], in_row),
    }
    return pa.table({name: _lists(values, sizes) for name, (values, sizes) in columns.items()})


def count_rows(table: pa.Table | None) -> dict[str, int]:
    """Count the contents of the rows of a split.

    Returns:
        `rows`; `pieces`; `tokens` (a context token, which is in two pieces, counts once); `supervised_tokens`; and
        `slots`, the number of token positions that are taken in rows.
    """
    if table is None:
        return {"rows": 0, "pieces": 0, "tokens": 0, "supervised_tokens": 0, "slots": 0}
    slots, pieces = len(flat(table, "input_ids")), len(flat(table, "lengths"))
    context = int((flat(table, "pieces") > 0).sum())
    return {
        "rows": table.num_rows,
        "pieces": pieces,
        "tokens": slots - context,
        "supervised_tokens": slots - int(flat(table, "prompts").sum()),
        "slots": slots,
    }


def rows_version(table: pa.Table | None) -> str:
    """Return the hash of token ids, boundaries and objectives, row by row. The names of documents do not affect it."""
    version = hashlib.sha256()
    if table is not None:
        pieces_in_row = np.diff(_numpy(table["lengths"].combine_chunks().offsets))
        columns = (flat(table, name) for name in ("input_ids", "lengths", "prompts", "objectives"))
        for values in (*columns, pieces_in_row):
            version.update(len(values).to_bytes(8) + values.astype("<i4").tobytes())
    return version.hexdigest()


def flat(table: pa.Table, column: str) -> np.ndarray:
    """Return all values of a column of lists, one list after the other."""
    return _numpy(table[column].combine_chunks().flatten())


def table_stream(table: pa.Table) -> bytes:
    """Return a table as an Arrow stream, as `read_table` reads it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_table(data: bytes) -> pa.Table:
    """Return the table in an Arrow stream."""
    return pa.ipc.open_stream(data).read_all()


def _numpy(values: pa.Int32Array) -> np.ndarray:
    """Convert without `to_numpy`, which imports pandas (0.2 s). `_arrow` avoids `pa.array` for the same reason."""
    return np.frombuffer(values.buffers()[1], dtype=np.int32)[values.offset : values.offset + len(values)]


def _arrow(values: Sequence[int] | np.ndarray) -> pa.Int32Array:
    plain = np.ascontiguousarray(values, dtype=np.int32)
    return pa.Array.from_buffers(pa.int32(), len(plain), [None, pa.py_buffer(plain)])


def _lists(values: Sequence[int] | np.ndarray, sizes: Sequence[int] | np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return pa.ListArray.from_arrays(_arrow(offsets), _arrow(values))
