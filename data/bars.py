"""Where bars come from, and the checks every bar passes before anything is computed from it.

Bars are a DataFrame with an ascending UTC ``DatetimeIndex`` named ``timestamp`` and the float64 columns
``open, high, low, close, volume``. A bar's timestamp is the time at which it is known in full (its close).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import pandas as pd

from data.errors import BarsError

PRICES = ("open", "high", "low", "close")
COLUMNS = (*PRICES, "volume")
BUNDLED_SYMBOLS = ("nasdaq", "sp500")
MAX_GAP_DAYS = 10.0


class BarSource(Protocol):
    """Anything that can load validated bars of one instrument."""

    @property
    def symbol(self) -> str:
        """Name of the instrument."""
        ...

    def load(self) -> pd.DataFrame:
        """Return validated bars. Raises: BarsError."""
        ...


class SourceSettings(Protocol):
    """What `open_source` reads; `configs.schema.SourceConfig` is one.

    A protocol, because serving may load this package but not the configuration package.
    """

    @property
    def kind(self) -> str:
        """`bundled` or `file`."""
        ...

    @property
    def symbol(self) -> str:
        """Name of the instrument."""
        ...

    @property
    def path(self) -> str | None:
        """CSV or Parquet file, only for `file`."""
        ...


@dataclass(frozen=True)
class BundledBars:
    """Daily bars 1999-2018 that come with the `arch` package; `symbol` is sp500 or nasdaq."""

    symbol: str

    def __post_init__(self) -> None:
        if self.symbol not in BUNDLED_SYMBOLS:
            raise BarsError(
                f"bundled bars: symbol: expected one of {BUNDLED_SYMBOLS}, was {self.symbol!r}"
                f"{_did_you_mean(self.symbol, BUNDLED_SYMBOLS)}"
            )

    def load(self) -> pd.DataFrame:
        """Return the bars; Close, not Adj Close: an index pays no dividends, so both agree."""
        # Imported here because arch brings scipy and statsmodels along.
        if self.symbol == "sp500":
            from arch.data.sp500 import load
        else:
            from arch.data.nasdaq import load
        frame = load().drop(columns="Adj Close").rename(columns=str.lower)
        return validate_bars(frame.rename_axis("timestamp"), f"bundled {self.symbol}")


@dataclass(frozen=True)
class FileBars:
    """Bars in a CSV or Parquet file with columns timestamp, open, high, low, close, volume."""

    path: Path
    symbol: str

    def load(self) -> pd.DataFrame:
        """Return the bars. Raises: BarsError with a hint if the file cannot be read or a check fails."""
        path = Path(self.path)
        try:
            frame = _read_frame(path)
        except FileNotFoundError as error:
            raise BarsError(f"{path}: expected a bar file, found none; check data.source.path") from error
        except PermissionError as error:
            raise BarsError(f"{path}: not readable by this user; check the file's permissions") from error
        # What pyarrow raises on broken files derives from one of these two.
        except (OSError, ValueError) as error:
            raise BarsError(
                f"{path}: not a readable {path.suffix} file ({error}); check that the file is complete"
            ) from error
        return validate_bars(frame, str(path))


def open_source(settings: SourceSettings) -> BarSource:
    """Return the source a configuration names. Raises: BarsError if it names none."""
    if settings.kind == "bundled":
        return BundledBars(settings.symbol)
    if settings.kind == "file" and settings.path:
        return FileBars(Path(settings.path), settings.symbol)
    raise BarsError(
        "data.source: expected kind 'bundled', or 'file' with a path, "
        f"was kind={settings.kind!r}, path={settings.path!r}"
    )


def validate_bars(frame: pd.DataFrame, source: str, max_gap_days: float = MAX_GAP_DAYS) -> pd.DataFrame:
    """Return `frame` as bars, or refuse it with the first offending row.

    Args:
        frame: the five columns plus `timestamp`, as a column or as the name of the index. Timestamps without
            an offset count as UTC; numbers are refused, because their unit and zone are guesses.
        source: what error messages call the data.
        max_gap_days: longest time between two bars, in days.

    Returns: a new frame; microsecond UTC index `timestamp`, float64 columns open, high, low, close, volume.

    Raises: BarsError naming source, row, timestamp and column. NaN and infinity are refused. Zero volume is
        allowed: real feeds have it.
    """
    if "timestamp" not in frame.columns and frame.index.name == "timestamp":
        frame = frame.reset_index()
    _check_columns(frame, source)
    if frame.empty:
        raise BarsError(f"{source}: expected at least one bar, was empty")
    stamps = _parse_timestamps(frame["timestamp"], source)
    bars = pd.DataFrame(
        {name: _parse_numbers(frame[name], stamps, source) for name in COLUMNS}, index=stamps, columns=list(COLUMNS)
    )
    _check_values(bars, source)
    _check_order(stamps, source, max_gap_days)
    return bars


def hash_bars(frame: pd.DataFrame) -> str:
    """Return the SHA-256 of validated bars: equal values give equal hashes, whatever file they came from."""
    index = frame.index
    if not isinstance(index, pd.DatetimeIndex) or tuple(frame.columns) != COLUMNS:
        raise ValueError(f"hash_bars: expected validated bars with columns {COLUMNS}, was {list(frame.columns)}")
    # Adding 0 turns -0.0, which compares equal to 0.0, into the same bits.
    values = np.ascontiguousarray(frame.to_numpy(dtype="<f8") + 0.0)
    digest = hashlib.sha256(b"detent bars 1\0")
    digest.update(index.as_unit("us").asi8.astype("<i8").tobytes())
    digest.update(values.tobytes())
    return digest.hexdigest()


def _read_frame(path: Path) -> pd.DataFrame:
    if path.suffix == ".csv":
        from pyarrow import csv, string

        # Not pandas.read_csv, which drops surplus cells with a mere warning and, before 3.1, rounds the last bit.
        table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types={"timestamp": string()}))
    elif path.suffix == ".parquet":
        from pyarrow import parquet

        # Not pandas.read_parquet: it adds a column for every `key=value` folder in the path.
        with parquet.ParquetFile(path) as file:
            table = file.read()
    else:
        raise ValueError(f"expected suffix .csv or .parquet, was {path.suffix!r}")
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _did_you_mean(name: str, known: tuple[str, ...] | list[str]) -> str:
    lowered = {candidate.lower(): candidate for candidate in known}
    close = get_close_matches(name.lower(), lowered, n=1)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""


def _check_columns(frame: pd.DataFrame, source: str) -> None:
    expected = ("timestamp", *COLUMNS)
    found = [str(name) for name in frame.columns]
    for name in found:
        if name not in expected:
            raise BarsError(
                f"{source}: unknown column {name!r}, expected {', '.join(expected)}{_did_you_mean(name, expected)}"
            )
        if found.count(name) > 1:
            raise BarsError(f"{source}: column {name!r} appears {found.count(name)} times, expected once")
    for name in expected:
        if name not in found:
            raise BarsError(f"{source}: missing column {name!r}, found {', '.join(found)}")


def _parse_timestamps(column: pd.Series[Any], source: str) -> pd.DatetimeIndex:
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        parsed = pd.Series(pd.to_datetime(column, utc=True))
    elif pd.api.types.is_numeric_dtype(column.dtype):
        raise BarsError(
            f"{source}: column 'timestamp': expected ISO 8601 text or datetimes, was {column.dtype} "
            f"(row 0: {column.iloc[0]}); numbers do not say their unit, write them as UTC text"
        )
    else:
        text = column.astype(str).str.strip()
        # pandas would also read digits alone, such as 20180102, which may just as well be an epoch.
        dated = text.str.match(r"\d{4}-\d{2}-\d{2}")
        parsed = pd.to_datetime(text.where(dated), format="ISO8601", utc=True, errors="coerce")
    bad = parsed.isna().to_numpy()
    if bad.any():
        row = int(bad.argmax())
        raise BarsError(
            f"{source}: row {row}, column 'timestamp': expected an ISO 8601 date or time, was {column.iloc[row]!r}"
        )
    return pd.DatetimeIndex(parsed, name="timestamp").as_unit("us")


def _parse_numbers(column: pd.Series[Any], stamps: pd.DatetimeIndex, source: str) -> np.ndarray[Any, Any]:
    if column.dtype == bool or np.issubdtype(getattr(column.dtype, "type", object), np.complexfloating):
        raise BarsError(f"{source}: column {column.name!r}: expected numbers, was {column.dtype}")
    numbers = pd.to_numeric(column, errors="coerce")
    unreadable = (numbers.isna() & column.notna()).to_numpy()
    if unreadable.any():
        row = int(unreadable.argmax())
        _refuse(source, stamps, row, column=str(column.name), expected="a number", actual=repr(column.iloc[row]))
    return numbers.to_numpy(dtype=np.float64, na_value=np.nan)


def _refuse(source: str, stamps: pd.DatetimeIndex, row: int, *, column: str, expected: str, actual: object) -> NoReturn:
    raise BarsError(
        f"{source}: row {row} ({stamps[row].isoformat()}), column {column!r}: expected {expected}, was {actual}"
    )


def _check_values(bars: pd.DataFrame, source: str) -> None:
    stamps = pd.DatetimeIndex(bars.index)
    values = {name: bars[name].to_numpy() for name in COLUMNS}
    top = np.maximum(values["open"], values["close"])
    bottom = np.minimum(values["open"], values["close"])
    checks = [(name, ~np.isfinite(values[name]), "a finite number") for name in COLUMNS]
    checks += [(name, values[name] <= 0.0, "a price above 0") for name in PRICES]
    checks += [
        ("volume", values["volume"] < 0.0, "a volume of at least 0"),
        ("high", values["high"] < top, "high >= open and close"),
        ("low", values["low"] > bottom, "low <= open and close"),
    ]
    for name, bad, expected in checks:
        if bad.any():
            row = int(bad.argmax())
            _refuse(source, stamps, row, column=name, expected=expected, actual=float(values[name][row]))


def _check_order(stamps: pd.DatetimeIndex, source: str, max_gap_days: float) -> None:
    repeated = stamps.duplicated()
    if repeated.any():
        row = int(repeated.argmax())
        first = f"a duplicate of row {int((stamps == stamps[row]).argmax())}"
        _refuse(source, stamps, row, column="timestamp", expected="each timestamp once", actual=first)
    steps = np.diff(stamps.asi8)
    backward = steps < 0
    if backward.any():
        row = int(backward.argmax()) + 1
        expected = f"a time after row {row - 1} ({stamps[row - 1].isoformat()})"
        _refuse(source, stamps, row, column="timestamp", expected=expected, actual=stamps[row].isoformat())
    gaps = steps > timedelta(days=max_gap_days) / timedelta(microseconds=1)
    if gaps.any():
        row = int(gaps.argmax()) + 1
        expected = f"at most {max_gap_days:g} days after row {row - 1}"
        gap = f"a gap from {stamps[row - 1].isoformat()} to {stamps[row].isoformat()}"
        _refuse(source, stamps, row, column="timestamp", expected=expected, actual=gap)
