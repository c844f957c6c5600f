"""Bars: every broken input is refused by name, and equal bars hash alike whatever file they came from."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import SourceConfig
from data.bars import BundledBars, FileBars, hash_bars, open_source, validate_bars
from data.errors import BarsError


def raw_bars(num_bars: int = 8) -> pd.DataFrame:
    """Valid file content: a timestamp column of ISO text and the five number columns."""
    close = 100.0 + np.arange(num_bars) / 3.0
    return pd.DataFrame(
        {
            "timestamp": pd.date_range("2024-01-01", periods=num_bars).strftime("%Y-%m-%d"),
            "open": close - 0.1,
            "high": close + 0.7,
            "low": close - 0.9,
            "close": close,
            "volume": np.arange(num_bars) * 10,
        }
    )


def refused(frame: pd.DataFrame, match: str) -> None:
    with pytest.raises(BarsError, match=match):
        validate_bars(frame, "feed")


@pytest.mark.parametrize(("symbol", "zero_volume_rows"), [("sp500", 0), ("nasdaq", 2)])
def test_bundled_bars_are_valid_as_they_come(symbol: str, zero_volume_rows: int) -> None:
    bars = BundledBars(symbol).load()
    assert len(bars) == 5031
    assert list(bars.columns) == ["open", "high", "low", "close", "volume"]
    assert set(bars.dtypes) == {np.dtype("float64")}
    assert bars.index.name == "timestamp"
    assert bars.index[0] == pd.Timestamp("1999-01-04", tz="UTC")
    assert (bars["volume"] == 0).sum() == zero_volume_rows


def test_unknown_bundled_symbol_suggests_the_nearest() -> None:
    with pytest.raises(BarsError, match=r"was 'SP50'; did you mean 'sp500'\?"):
        BundledBars("SP50")


def test_open_source_follows_the_configuration(tmp_path: Path) -> None:
    raw_bars().to_csv(tmp_path / "bars.csv", index=False)
    assert open_source(SourceConfig()) == BundledBars("sp500")
    source = open_source(SourceConfig(kind="file", symbol="x", path=str(tmp_path / "bars.csv")))
    assert source.symbol == "x"
    assert len(source.load()) == 8


def test_source_without_a_file_is_refused() -> None:
    settings_without_path = SourceConfig.model_construct(kind="file", symbol="x", path=None)
    with pytest.raises(BarsError, match=r"data\.source: expected kind 'bundled', or 'file' with a path"):
        open_source(settings_without_path)


def test_csv_and_parquet_of_the_same_bars_hash_alike(tmp_path: Path) -> None:
    frame = raw_bars()
    frame["close"] = frame["close"] + np.random.default_rng(0).uniform(-0.05, 0.05, len(frame))
    frame.to_csv(tmp_path / "bars.csv", index=False)
    frame.to_parquet(tmp_path / "text.parquet")
    indexed = frame.assign(timestamp=pd.to_datetime(frame["timestamp"], utc=True)).set_index("timestamp")
    indexed.to_parquet(tmp_path / "indexed.parquet")
    hashes = {
        hash_bars(FileBars(tmp_path / name, "x").load()) for name in ("bars.csv", "text.parquet", "indexed.parquet")
    }
    assert hashes == {hash_bars(validate_bars(frame, "feed"))}


@settings(deadline=None, derandomize=True, max_examples=30)
@given(row=st.integers(0, 7), column=st.sampled_from(["open", "high", "low", "close", "volume"]))
def test_hash_sees_every_value(row: int, column: str) -> None:
    bars = validate_bars(raw_bars(), "feed")
    changed = bars.copy()
    changed.loc[changed.index[row], column] = np.nextafter(bars[column].iloc[row], np.inf)
    assert hash_bars(changed) != hash_bars(bars)


def test_hash_sees_the_time_and_ignores_the_sign_of_zero() -> None:
    bars = validate_bars(raw_bars(), "feed")
    later = bars.set_axis(bars.index + pd.Timedelta(microseconds=1))
    negative_zero = bars.assign(volume=bars["volume"].where(bars["volume"] > 0, -0.0))
    assert hash_bars(later) != hash_bars(bars)
    assert hash_bars(negative_zero) == hash_bars(bars)


def test_hash_of_unvalidated_bars_is_a_caller_mistake() -> None:
    with pytest.raises(ValueError, match="expected validated bars"):
        hash_bars(raw_bars())


def test_offsets_become_utc_and_no_offset_counts_as_utc() -> None:
    frame = raw_bars(3)
    frame["timestamp"] = ["2024-01-01T01:00:00+02:00", "2024-01-01T01:00:00", "2024-01-01 03:00:00.5Z"]
    index = validate_bars(frame, "feed").index
    assert [stamp.isoformat() for stamp in index] == [
        "2023-12-31T23:00:00+00:00",
        "2024-01-01T01:00:00+00:00",
        "2024-01-01T03:00:00.500000+00:00",
    ]


def test_datetimes_of_any_zone_become_utc_microseconds() -> None:
    frame = raw_bars(3)
    frame["timestamp"] = pd.date_range("2024-06-03 16:00", periods=3, tz="America/New_York")
    index = validate_bars(frame, "feed").index
    assert index[0] == pd.Timestamp("2024-06-03 20:00", tz="UTC")
    assert index.dtype == "datetime64[us, UTC]"


@pytest.mark.parametrize("epoch", [1704067200, 1704067200.5])
def test_epoch_numbers_are_refused(epoch: float) -> None:
    refused(raw_bars().assign(timestamp=epoch), r"feed: column 'timestamp': expected ISO 8601 .* numbers do not say")


@pytest.mark.parametrize("text", ["1704067200", "20240101", "01/02/2024", "", "yesterday", "2024-13-01", None])
def test_timestamp_text_that_is_not_a_date_is_refused_by_row(text: str | None) -> None:
    frame = raw_bars()
    frame.loc[2, "timestamp"] = text
    refused(frame, "feed: row 2, column 'timestamp': expected an ISO 8601 date or time")


def test_epoch_numbers_in_a_csv_are_refused(tmp_path: Path) -> None:
    raw_bars().assign(timestamp=range(1704067200, 1704067208)).to_csv(tmp_path / "bars.csv", index=False)
    with pytest.raises(BarsError, match="row 0, column 'timestamp': expected an ISO 8601"):
        FileBars(tmp_path / "bars.csv", "x").load()


def test_missing_column_is_named() -> None:
    refused(raw_bars().drop(columns="volume"), "feed: missing column 'volume', found timestamp, open, high, low, close")


@pytest.mark.parametrize(("typo", "meant"), [("Close", "close"), ("volum", "volume"), ("time_stamp", "timestamp")])
def test_misspelt_column_suggests_the_right_one(typo: str, meant: str) -> None:
    refused(raw_bars().rename(columns={meant: typo}), rf"unknown column '{typo}', .* did you mean '{meant}'\?")


def test_surplus_column_is_refused() -> None:
    refused(raw_bars().assign(zzz=1.0), r"unknown column 'zzz', expected timestamp, open, high, low, close, volume$")


def test_repeated_column_is_refused() -> None:
    frame = raw_bars()
    refused(pd.concat([frame, frame[["close"]]], axis=1), "column 'close' appears 2 times, expected once")


def test_no_bars_are_refused() -> None:
    refused(raw_bars().iloc[:0], "feed: expected at least one bar, was empty")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    row=st.integers(0, 7),
    case=st.sampled_from(
        [
            (column, value, expected)
            for column in ("open", "high", "low", "close")
            for value, expected in [
                (np.nan, "a finite number"),
                (np.inf, "a finite number"),
                (-np.inf, "a finite number"),
                (0.0, "a price above 0"),
                (-1.0, "a price above 0"),
            ]
        ]
        + [
            ("volume", np.nan, "a finite number"),
            ("volume", -1.0, "a volume of at least 0"),
            ("high", 99.5, "high >= open and close"),
            ("low", 200.0, "low <= open and close"),
            ("open", "abc", "a number"),
            ("volume", "1,000", "a number"),
        ]
    ),
)
def test_one_bad_value_names_source_row_time_and_column(row: int, case: tuple[str, object, str]) -> None:
    column, value, expected = case
    frame = raw_bars().astype({column: object})
    frame.loc[row, column] = value
    refused(frame, rf"^feed: row {row} \(2024-01-0{row + 1}T00:00:00\+00:00\), column '{column}': expected {expected}")


@pytest.mark.parametrize("kind", [bool, complex])
def test_columns_that_are_no_real_numbers_are_refused(kind: type) -> None:
    refused(raw_bars().astype({"open": kind}), f"feed: column 'open': expected numbers, was {kind.__name__}")


def test_duplicate_names_both_rows() -> None:
    frame = raw_bars()
    frame.loc[5, "timestamp"] = frame.loc[2, "timestamp"]
    refused(frame, r"row 5 \(2024-01-03T00:00:00\+00:00\), column 'timestamp': .* was a duplicate of row 2")


def test_backward_time_names_both_times() -> None:
    frame = raw_bars().iloc[[0, 1, 3, 2, 4]]
    refused(frame, r"row 3 \(2024-01-03.*expected a time after row 2 \(2024-01-04.* was 2024-01-03")


def test_gap_of_exactly_the_limit_is_fine_and_one_second_more_is_not() -> None:
    frame = raw_bars(2)
    frame["timestamp"] = ["2024-01-01T00:00:00", "2024-01-11T00:00:00"]
    assert len(validate_bars(frame, "feed")) == 2
    frame["timestamp"] = ["2024-01-01T00:00:00", "2024-01-11T00:00:01"]
    refused(frame, r"at most 10 days after row 0, was a gap from 2024-01-01T00:00:00\+00:00 to 2024-01-11T00:00:01")
    assert len(validate_bars(frame, "feed", max_gap_days=11)) == 2


def test_missing_file_has_a_hint(tmp_path: Path) -> None:
    with pytest.raises(BarsError, match=r"expected a bar file, found none; check data\.source\.path"):
        FileBars(tmp_path / "bars.csv", "x").load()


def test_folder_and_unknown_suffix_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bars.csv").mkdir()
    with pytest.raises(BarsError, match=r"not a readable \.csv file"):
        FileBars(tmp_path / "bars.csv", "x").load()
    (tmp_path / "bars.xlsx").write_text("")
    with pytest.raises(BarsError, match=r"expected suffix \.csv or \.parquet, was '\.xlsx'"):
        FileBars(tmp_path / "bars.xlsx", "x").load()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00binary",
        gzip.compress(b"timestamp,open\n"),
        b"timestamp,open,high,low,close,volume\n2024-01-01,1,2,1,1,5,9\n",
        b"timestamp,open,high,low,close,volume\n2024-01-01,1,2,1,1\n",
        b'timestamp,open,high,low,close,volume\n"2024-01-01,1,2,1,1,5\n',
    ],
    ids=["empty", "binary", "gzip", "row too long", "row too short", "open quote"],
)
def test_broken_csv_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bars.csv").write_bytes(content)
    with pytest.raises(BarsError, match=r"bars\.csv"):
        FileBars(tmp_path / "bars.csv", "x").load()


def test_empty_cell_is_refused_by_name(tmp_path: Path) -> None:
    text = raw_bars().to_csv(index=False)
    (tmp_path / "bars.csv").write_text(text[: text.rindex(",") + 1] + "\n")
    with pytest.raises(BarsError, match=r"row 7 .* column 'volume': expected a finite number, was nan"):
        FileBars(tmp_path / "bars.csv", "x").load()


def test_word_among_numbers_is_refused_by_name(tmp_path: Path) -> None:
    raw_bars().to_csv(tmp_path / "bars.csv", index=False)
    text = (tmp_path / "bars.csv").read_text().replace(",70\n", ",many\n")
    (tmp_path / "bars.csv").write_text(text)
    with pytest.raises(BarsError, match=r"row 7 .* column 'volume': expected a number, was 'many'"):
        FileBars(tmp_path / "bars.csv", "x").load()


def test_long_file_whose_volume_turns_fractional_late_is_read(tmp_path: Path) -> None:
    # over a megabyte, the block in which the file is read: the first block alone says integer
    num_bars = 20_000
    frame = pd.concat([raw_bars(1)] * num_bars, ignore_index=True)
    stamps = pd.date_range("2024-01-01", periods=num_bars, freq="min").strftime("%Y-%m-%dT%H:%M:%S.000000+00:00")
    frame["timestamp"] = stamps
    frame["volume"] = frame["volume"].astype(object)
    frame.loc[num_bars - 1, "volume"] = 2.5
    frame.to_csv(tmp_path / "bars.csv", index=False)
    assert (tmp_path / "bars.csv").stat().st_size > 2**20
    assert FileBars(tmp_path / "bars.csv", "x").load()["volume"].iloc[-1] == 2.5


def test_csv_with_byte_order_mark_is_read(tmp_path: Path) -> None:
    raw_bars().to_csv(tmp_path / "bars.csv", index=False, encoding="utf-8-sig")
    assert len(FileBars(tmp_path / "bars.csv", "x").load()) == 8


@settings(deadline=None, derandomize=True, max_examples=25)
@given(cut=st.floats(0.0, 0.999))
def test_parquet_cut_anywhere_is_refused(cut: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "bars.parquet"
    raw_bars().to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(BarsError, match=r"not a readable \.parquet file .* check that the file is complete"):
        FileBars(path, "x").load()


def test_folder_named_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "year=2024"
    folder.mkdir()
    raw_bars().to_parquet(folder / "bars.parquet")
    assert len(FileBars(folder / "bars.parquet", "x").load()) == 8
