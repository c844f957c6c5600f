"""Append-only store of transitions: one schema, one immutable Parquet file per append.

::

    replay/schema.json              names, sizes and their hash, written once
    replay/part-00000001.sha256     its checksum, in the format of sha256sum
    replay/part-00000001.parquet    first append
    replay/.lock                    held by the writer while it appends

A reader needs no lock: a part appears complete or not at all. A writer that is killed leaves at most a temporary
file, which readers ignore and the next writer removes, and a checksum, which the next append overwrites. A part is
read only after its checksum: Parquet protects its pages at best, never its footer, and a damaged statistic there
would silently drop rows.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from data.errors import ReplayError
from data.files import (
    TEMP_PREFIX,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    canonical_json,
    sha256_bytes,
    sha256_file,
)
from data.transitions import DTYPES, ReplaySchema, Transitions

_PART = re.compile(r"part-(\d{8})\.parquet")
_HASH_KEY = b"detent.schema_hash"
_SCALAR_TYPES = {
    "float32": pa.float32(),
    "int64": pa.int64(),
    "bool": pa.bool_(),
    "datetime64[us]": pa.timestamp("us", tz="UTC"),
    "str": pa.string(),
}
# Rows per Parquet row group, and per piece while reading whole columns.
_READ_ROWS = 65_536


class ReplayStore:
    """Transitions in a folder; the folder is created by the first append.

    Raises: ReplayError naming the file on an unreadable or foreign part, a missing part or a broken schema file.
        OSError (full disk, permission) while appending propagates, with the store as it was.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def append(self, transitions: Transitions) -> Path:
        """Write `transitions` as a new part and return its path.

        Raises: ReplayError if there are no rows or the store holds another schema.
        """
        if len(transitions) == 0:
            raise ReplayError(f"{self.directory}: append: expected at least one transition, was none")
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._writer_lock():
            # Nobody else writes while we hold the lock, so every temporary is a killed writer's.
            for stray in self.directory.glob(f"{TEMP_PREFIX}*"):
                stray.unlink()
            parts = self._parts()
            self._require_schema(transitions.schema, parts)
            path = self.directory / _part_name(_number(parts[-1]) + 1 if parts else 1)
            content = _encode(transitions)
            # The checksum first: the part is what makes the append count.
            atomic_write_text(_checksum_file(path), f"{sha256_bytes(content)}  {path.name}\n")
            atomic_write_bytes(path, content)
        return path

    @property
    def schema(self) -> ReplaySchema:
        """Schema of the store. Raises: ReplayError if nothing was appended yet or the file is broken."""
        try:
            raw = json.loads(self._schema_file.read_text(encoding="utf-8"))
            schema = ReplaySchema.from_dict(raw)
            stored = raw["hash"]
        except FileNotFoundError as error:
            raise ReplayError(f"{self.directory}: expected a replay store, found no schema.json") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ReplayError(f"{self._schema_file}: not a replay schema: {error}") from error
        if stored != schema.hash:
            raise ReplayError(f"{self._schema_file}: expected hash {schema.hash}, was {stored}")
        return schema

    @property
    def num_rows(self) -> int:
        """Transitions in the store; reads the file footers only."""
        rows = 0
        for part in self._parts():
            with _naming(part):
                rows += pq.read_metadata(part, memory_map=True).num_rows
        return rows

    def content_hash(self) -> str:
        """Return the SHA-256 over schema hash and every part's name and content hash."""
        parts = [[part.name, sha256_file(part)] for part in self._parts()]
        return sha256_bytes(canonical_json({"schema": self.schema.hash, "parts": parts}).encode("utf-8"))

    def read(self, last_months: int | None = None) -> Transitions:
        """Return all transitions in order of appending, or those of the last months up to the newest one."""
        return Transitions(schema=self.schema, **self.read_columns(tuple(DTYPES), last_months))

    def read_columns(self, columns: Sequence[str], last_months: int | None = None) -> dict[str, npt.NDArray[Any]]:
        """Return some columns, keyed by name, without decoding the others.

        Raises: ReplayError on an unknown column or an unreadable part.
        """
        for name in columns:
            if name not in DTYPES:
                raise ReplayError(f"columns: expected any of {', '.join(DTYPES)}, was {name!r}")
        schema = self.schema
        pieces = list(self._scan(schema, columns, last_months, _READ_ROWS))
        return {name: np.concatenate([_empty(schema, name), *(piece[name] for piece in pieces)]) for name in columns}

    def iter_batches(self, batch_size: int, last_months: int | None = None) -> Iterator[Transitions]:
        """Yield the rows of `read` in pieces of at most `batch_size`; no piece spans two parts."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, was {batch_size}")
        schema = self.schema
        for piece in self._scan(schema, tuple(DTYPES), last_months, batch_size):
            yield Transitions(schema=schema, **piece)

    # Decoded pieces, part by part, so that an error can name its file and memory holds one piece at a time.
    def _scan(
        self, schema: ReplaySchema, columns: Sequence[str], last_months: int | None, batch_size: int
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        parts = self._parts()
        for part in parts:
            _check_part(part, schema)
        newer = None if last_months is None else _newer_than(parts, last_months)
        for part in parts:
            with _naming(part):
                files = LocalFileSystem(use_mmap=True)
                fragment = ds.ParquetFileFormat().make_fragment(str(part.resolve()), filesystem=files)
                # Threads could only reorder: the caller's order of rows is the order of appending.
                batches = iter(
                    fragment.scanner(
                        schema=_arrow_schema(schema),
                        columns=list(columns),
                        filter=newer,
                        batch_size=batch_size,
                        use_threads=False,
                    ).to_batches()
                )
            while True:
                with _naming(part):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    piece = {name: _to_numpy(batch.column(name)) for name in columns}
                if batch.num_rows:
                    yield piece

    @property
    def _schema_file(self) -> Path:
        return self.directory / "schema.json"

    def _parts(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        parts = sorted(path for path in self.directory.iterdir() if _PART.fullmatch(path.name))
        if not parts:
            return []
        # The oldest parts may be pruned; a hole in between means lost data.
        first = _number(parts[0])
        for expected, part in enumerate(parts, start=first):
            if _number(part) != expected:
                raise ReplayError(f"{self.directory}: expected {_part_name(expected)} before {part.name}, found none")
        return parts

    def _require_schema(self, schema: ReplaySchema, parts: list[Path]) -> None:
        if self._schema_file.exists():
            stored = self.schema
            if stored != schema:
                raise ReplayError(
                    f"{self.directory}: append: expected schema {stored.to_dict()}, was {schema.to_dict()}; "
                    "a changed layout needs a new store"
                )
        elif parts:
            raise ReplayError(f"{self.directory}: expected schema.json beside {parts[0].name}, found none")
        else:
            atomic_write_json(self._schema_file, {**schema.to_dict(), "hash": schema.hash})

    @contextmanager
    def _writer_lock(self) -> Iterator[None]:
        with open(self.directory / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Closing the file releases the lock, also when the process dies.
            yield


def _part_name(number: int) -> str:
    return f"part-{number:08d}.parquet"


def _number(part: Path) -> int:
    return int(part.stem.removeprefix("part-"))


@contextmanager
def _naming(part: Path) -> Iterator[None]:
    try:
        yield
    except ReplayError:
        raise
    # Arrow's errors derive from ValueError, OSError, or only from ArrowException.
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ReplayError(f"{part}: not a readable replay part: {error}") from error


def _arrow_schema(schema: ReplaySchema) -> pa.Schema:
    columns = []
    for name, dtype in DTYPES.items():
        width = schema.width(name)
        kind = pa.list_(_SCALAR_TYPES[dtype], width) if width else _SCALAR_TYPES[dtype]
        columns.append(pa.field(name, kind, nullable=False))
    return pa.schema(columns, metadata={_HASH_KEY: schema.hash.encode()})


def _encode(transitions: Transitions) -> memoryview:
    schema = _arrow_schema(transitions.schema)
    arrays = []
    for name, column in transitions.columns():
        width = transitions.schema.width(name)
        if width:
            flat = pa.array(np.ascontiguousarray(column).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, width))
        else:
            arrays.append(pa.array(column, type=schema.field(name).type))
    sink = pa.BufferOutputStream()
    table = pa.Table.from_arrays(arrays, schema=schema)
    pq.write_table(table, sink, compression="zstd", row_group_size=_READ_ROWS)
    return memoryview(sink.getvalue())


def _checksum_file(part: Path) -> Path:
    return part.with_suffix(".sha256")


def _check_part(part: Path, schema: ReplaySchema) -> None:
    with _naming(part):
        expected = _checksum_file(part).read_text(encoding="utf-8").partition(" ")[0]
        actual = sha256_file(part)
        if actual != expected:
            raise ReplayError(f"{part}: expected SHA-256 {expected}, was {actual}; the file is damaged")
        found = (pq.read_schema(part, memory_map=True).metadata or {}).get(_HASH_KEY, b"").decode()
        if found != schema.hash:
            raise ReplayError(f"{part}: expected schema hash {schema.hash}, was {found or 'none'}")


def _newer_than(parts: list[Path], last_months: int) -> ds.Expression | None:
    if last_months < 1:
        raise ValueError(f"last_months: expected at least 1, was {last_months}")
    newest = [_newest(part) for part in parts]
    if not newest:
        return None
    cutoff = max(newest) - pd.DateOffset(months=last_months)
    return ds.field("timestamp") > pa.scalar(cutoff.to_pydatetime(), type=_SCALAR_TYPES["datetime64[us]"])


# From the footer's statistics; no data page is read.
def _newest(part: Path) -> pd.Timestamp:
    with _naming(part):
        metadata = pq.read_metadata(part, memory_map=True)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        column = next(i for i in range(metadata.num_columns) if groups[0].column(i).path_in_schema == "timestamp")
        return max(pd.Timestamp(group.column(column).statistics.max) for group in groups)


def _empty(schema: ReplaySchema, name: str) -> npt.NDArray[Any]:
    width = schema.width(name)
    return np.empty((0, width) if width else (0,), dtype=DTYPES[name])


def _to_numpy(column: pa.Array) -> npt.NDArray[Any]:
    if column.null_count:
        raise ValueError(f"expected no nulls, was {column.null_count}")
    # Copies, because Arrow's buffers are read-only and torch warns about sharing those.
    if pa.types.is_fixed_size_list(column.type):
        flat = column.flatten()
        return np.array(flat.to_numpy(zero_copy_only=False)).reshape(len(column), column.type.list_size)
    values = np.array(column.to_numpy(zero_copy_only=False))
    return values.astype(np.str_) if pa.types.is_string(column.type) else values
