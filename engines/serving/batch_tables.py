"""Rows of a batch job in files: a JSON object a line, or a Parquet table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from edgevlm.toolkit.strict import to_json

FORMATS = ("jsonl", "parquet")
ANSWERS, EMBEDDINGS = "answers", "embeddings"
# Columns of answers and their types, by names of pyarrow's functions.
_COLUMNS = {
    "line": "int64",
    "id": "string",
    "prompt": "string",
    "images": "strings",
    "text": "string",
    "token_ids": "ints",
    "prompt_tokens": "int32",
    "image_tokens": "int32",
    "finish_reason": "string",
    "notes": "strings",
    "error": "string",
}


def save(table: str, form: str, rows: Sequence[dict[str, Any]], stream: BinaryIO) -> None:
    """Write rows of answers or of embeddings."""
    if form == "jsonl":
        for row in rows:
            stream.write(to_json(_plain(row)).encode() + b"\n")
        return
    _parquet(table, rows, stream)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}


def _parquet(table: str, rows: Sequence[dict[str, Any]], stream: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if table == EMBEDDINGS:
        columns: dict[str, Any] = {
            "file": pa.string(),
            "embedding": pa.list_(pa.float32()),
            "error": pa.string(),
        }
    else:
        lists = {"strings": pa.list_(pa.string()), "ints": pa.list_(pa.int32())}
        columns = {name: lists.get(kind) or getattr(pa, kind)() for name, kind in _COLUMNS.items()}
    values = {name: [_cell(name, row[name]) for row in rows] for name in columns}
    schema = pa.schema(list(columns.items()))
    pq.write_table(pa.Table.from_pydict(values, schema=schema), stream)


def _cell(name: str, value: Any) -> Any:
    """A value as its column has it; an id may be any JSON value, and is written as JSON."""
    if name == "id" and value is not None:
        return value if isinstance(value, str) else to_json(value)
    return value
