"""Features: golden numbers, live equals offline to the bit, and nothing of the future gets in."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.bars import BundledBars, validate_bars
from data.errors import DataError, HistoryError
from data.features import FEATURE_FIELDS, LOOKBACK, FeatureTable, compute_features, latest_features


def make_bars(close: np.ndarray, volume: object = 1000.0, **columns: object) -> pd.DataFrame:
    """Validated daily bars; open, high and low equal close unless given."""
    index = pd.date_range("2020-01-01", periods=len(close), tz="UTC", name="timestamp")
    prices = {"open": close, "high": close, "low": close, "close": close, "volume": volume}
    return validate_bars(pd.DataFrame(prices | columns, index=index).astype(float), "made")


def last_row(bars: pd.DataFrame) -> dict[str, float]:
    """Features of the last bar by name."""
    table = latest_features(bars, 252, "made")
    return dict(zip(table.names, table.values[0].tolist(), strict=True))


@pytest.fixture(scope="module")
def sp500() -> pd.DataFrame:
    return BundledBars("sp500").load()


@pytest.fixture(scope="module")
def table(sp500: pd.DataFrame) -> FeatureTable:
    return compute_features(sp500, 252, "sp500")


def test_the_account_step_finds_its_columns_first() -> None:
    names = [field.name for field in FEATURE_FIELDS]
    assert names[:2] == ["gap_return", "intraday_return"]
    assert len(set(names)) == len(names) == 20
    groups = [field.group for field in FEATURE_FIELDS]
    assert groups == ["market"] * 13 + ["signals"] * 7


def test_gap_and_intraday_return_add_up_to_the_bar_return() -> None:
    close = np.full(LOOKBACK, 100.0)
    open_ = close.copy()
    close[-1], open_[-1] = 121.0, 110.0
    row = last_row(make_bars(close, open=open_, low=np.full(LOOKBACK, 100.0)))
    assert row["gap_return"] == pytest.approx(math.log(1.1), rel=1e-14)
    assert row["intraday_return"] == pytest.approx(math.log(1.1), rel=1e-14)
    assert row["return_2"] == pytest.approx(math.log(1.21), rel=1e-14)
    assert row["range"] == pytest.approx(math.log(1.21), rel=1e-14)


def test_returns_span_their_number_of_bars() -> None:
    row = last_row(make_bars(np.exp(0.01 * np.arange(LOOKBACK)), 5.0))
    for lag in (2, 5, 10, 20):
        assert row[f"return_{lag}"] == pytest.approx(0.01 * lag, rel=1e-12)
    assert row["momentum_60"] == pytest.approx(0.6, rel=1e-12)


def test_alternating_price_has_golden_volatility_rsi_and_bands() -> None:
    # closes a, b, a, b, ... with b = a e^r, ending at b: bar returns +r and -r in turn
    r = 0.02
    a, b = 100.0, 100.0 * math.exp(r)
    row = last_row(make_bars(np.where(np.arange(LOOKBACK) % 2, b, a)))
    # 20 returns: mean 0, squares sum to 20 r^2, divided by 19
    assert row["volatility_20"] == pytest.approx(r * math.sqrt(20 / 19) * math.sqrt(252), rel=1e-12)
    # 5 returns + - + - +: mean r/5, squared deviations sum to 5 r^2 - r^2/5 = 4.8 r^2, divided by 4
    assert row["volatility_5"] == pytest.approx(r * math.sqrt(1.2) * math.sqrt(252), rel=1e-12)
    # 7 gains and 7 losses of one size
    assert row["rsi_14"] == pytest.approx(0.0, abs=1e-12)
    # mean (a+b)/2, deviation (b-a)/2: b lies one deviation above, half of the band
    assert row["bollinger_20"] == pytest.approx(0.5, rel=1e-12)
    for window in (20, 50, 120):
        assert row[f"ma_distance_{window}"] == pytest.approx(math.log(b / ((a + b) / 2)), rel=1e-10)


def test_rsi_counts_size_not_number_of_changes() -> None:
    # the last 14 changes: 13 losses of 1 and one gain of 39: (39 - 13) / (39 + 13) = 0.5
    close = np.full(LOOKBACK, 200.0)
    close[-14:] = [*range(199, 186, -1), 187 + 39]
    assert last_row(make_bars(close))["rsi_14"] == 0.5


def test_volume_is_measured_against_its_own_mean() -> None:
    # log1p is 1 for 19 bars and 2 for the last: 2 - 21/20
    volume = np.full(LOOKBACK, math.e - 1.0)
    volume[-1] = math.e**2 - 1.0
    assert last_row(make_bars(np.full(LOOKBACK, 50.0), volume))["volume"] == pytest.approx(0.95, rel=1e-12)


def test_spread_equals_the_range_when_two_bars_have_the_same_range() -> None:
    # Corwin-Schultz with equal bars gives alpha = log(H / L), so S = 2 (H - L) / (H + L) = 8 / 200
    close = np.full(LOOKBACK, 100.0)
    assert last_row(make_bars(close, high=102.0, low=98.0))["spread"] == pytest.approx(0.04, rel=1e-12)


def test_spread_takes_out_an_overnight_jump() -> None:
    # [98, 102] closing at 98, then [108, 112]: moved back by 10 the ranges agree, as in the test above
    close, high, low = np.full(LOOKBACK, 98.0), np.full(LOOKBACK, 102.0), np.full(LOOKBACK, 98.0)
    close[-1], high[-1], low[-1] = 110.0, 112.0, 108.0
    up = make_bars(close, open=np.where(close > 100, 110.0, 98.0), high=high, low=low)
    assert last_row(up)["spread"] == pytest.approx(0.04, rel=1e-12)
    # mirrored: closing at 102, then [88, 92]
    close, high[-1], low[-1] = np.where(close > 100, 90.0, 102.0), 92.0, 88.0
    down = make_bars(close, open=close, high=high, low=low)
    assert last_row(down)["spread"] == pytest.approx(0.04, rel=1e-12)


def test_negative_spread_estimate_becomes_zero() -> None:
    # two narrow bars far apart inside their joint range: gamma dominates beta
    close, high, low = np.full(LOOKBACK, 100.0), np.full(LOOKBACK, 110.0), np.full(LOOKBACK, 99.9)
    high[-1], low[-1], close[-1] = 101.0, 90.0, 91.0
    assert last_row(make_bars(close, high=high, low=low))["spread"] == 0.0


def test_range_volatility_is_parkinsons_estimate_averaged_with_the_weights_of_pandas(sp500: pd.DataFrame) -> None:
    bars = sp500.iloc[-2 * LOOKBACK :]
    variance = np.log(bars["high"] / bars["low"]) ** 2 / (4.0 * math.log(2.0))
    wanted = math.sqrt(252 * variance.iloc[-LOOKBACK:].ewm(span=32).mean().iloc[-1])
    assert last_row(bars)["range_volatility"] == pytest.approx(wanted, rel=1e-9)


def test_gap_volatility_is_the_root_mean_square_of_twenty_gaps(sp500: pd.DataFrame) -> None:
    bars = sp500.iloc[-LOOKBACK:]
    gaps = np.log(bars["open"] / bars["close"].shift(1)).iloc[-20:]
    wanted = math.sqrt(252 * (gaps**2).mean())
    assert last_row(bars)["gap_volatility_20"] == pytest.approx(wanted, rel=1e-9)
    closed = bars.assign(open=bars["close"].shift(1).fillna(bars["open"]))
    assert last_row(closed.assign(high=closed.max(axis=1)))["gap_volatility_20"] == 0.0


def test_macd_agrees_with_the_weights_of_pandas(sp500: pd.DataFrame) -> None:
    close = sp500["close"].iloc[1000 : 1000 + LOOKBACK].reset_index(drop=True)
    # adjust=True normalises the weights of what is there: exactly a window cut at LOOKBACK
    fast, slow = (close.ewm(span=span, adjust=True).mean().iloc[-1] for span in (12, 26))
    volatility = np.log(close).diff().iloc[-20:].std(ddof=1)
    row = last_row(sp500.iloc[1000 : 1000 + LOOKBACK])
    assert row["macd"] == pytest.approx((fast - slow) / close.iloc[-1] / volatility, rel=1e-9)


def test_windows_agree_with_pandas_on_real_bars(sp500: pd.DataFrame, table: FeatureTable) -> None:
    close, volume = sp500["close"], sp500["volume"]
    bar_return = np.log(close).diff()
    expected = {
        "volatility_5": bar_return.rolling(5).std() * math.sqrt(252),
        "volatility_20": bar_return.rolling(20).std() * math.sqrt(252),
        "volume": np.log1p(volume) - np.log1p(volume).rolling(20).mean(),
        "bollinger_20": (close - close.rolling(20).mean()) / (2 * close.rolling(20).std(ddof=0)),
        "ma_distance_50": np.log(close / close.rolling(50).mean()),
    }
    for name, series in expected.items():
        np.testing.assert_allclose(
            table.values[:, table.index(name)], series.to_numpy()[LOOKBACK - 1 :], rtol=0, atol=1e-9, err_msg=name
        )


@pytest.mark.parametrize("volume", [0.0, 1e9])
@pytest.mark.parametrize("price", [1 / 3, 4321.09])
def test_dead_market_is_all_zeros(price: float, volume: float) -> None:
    assert set(last_row(make_bars(np.full(LOOKBACK, price), volume)).values()) == {0.0}


def test_steady_growth_without_volatility_stays_finite() -> None:
    row = last_row(make_bars(np.exp(0.001 * np.arange(LOOKBACK))))
    assert row["rsi_14"] == 1.0
    # the average difference over price is below one per cent; the volatility floor is one millionth
    assert 0.0 < row["macd"] < 1e4


def test_nasdaq_days_without_volume_are_finite() -> None:
    table = compute_features(BundledBars("nasdaq").load(), 252, "nasdaq")
    assert table.values[:, table.index("volume")].min() < -15.0


@pytest.mark.parametrize("symbol", ["sp500", "nasdaq"])
def test_live_row_is_bit_identical_to_the_offline_row(symbol: str) -> None:
    bars = BundledBars(symbol).load()
    offline = compute_features(bars, 252, symbol)
    for row in (*range(0, 50), *range(2400, 2600), *range(len(offline) - 250, len(offline))):
        # what a live feed holds: the last LOOKBACK bars, in memory of its own
        live = latest_features(bars.iloc[row : row + LOOKBACK].copy(), 252, symbol)
        assert live.values.tobytes() == offline.values[row : row + 1].tobytes(), f"row {row}"
        assert live.timestamps[0] == offline.timestamps[row]


def test_latest_row_reads_only_the_last_bars(sp500: pd.DataFrame, table: FeatureTable) -> None:
    assert latest_features(sp500, 252, "sp500").values.tobytes() == table.values[-1:].tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_future_bars_cannot_change_a_past_row(sp500: pd.DataFrame, table: FeatureTable, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cut = int(rng.integers(LOOKBACK + 1, len(sp500) - 50))
    past = table.values[: cut - LOOKBACK + 1]

    corrupted = sp500.copy()
    factor = rng.uniform(0.2, 5.0, size=len(sp500) - cut)
    corrupted.iloc[cut:] = sp500.iloc[cut:].to_numpy() * factor[:, None]
    shifted = pd.concat([sp500.iloc[:cut], sp500.iloc[cut + 3 :]])
    for changed in (corrupted, shifted, sp500.iloc[:cut]):
        rows = compute_features(changed, 252, "sp500")
        assert rows.values[: len(past)].tobytes() == past.tobytes()
        if len(rows) > len(past):
            assert not np.array_equal(rows.values[len(past)], table.values[len(past)])


def test_every_feature_but_the_bar_before_uses_the_newest_bar(sp500: pd.DataFrame) -> None:
    before = latest_features(sp500, 252, "sp500").values[0]
    moved = sp500.copy()
    moved.iloc[-1] = [2600.0, 2700.0, 2400.0, 2450.0, 9e9]
    after = latest_features(moved, 252, "sp500").values[0]
    assert (before != after).all()


def test_lookback_is_not_longer_than_needed(sp500: pd.DataFrame) -> None:
    window = sp500.iloc[-LOOKBACK:].copy()
    before = latest_features(window, 252, "sp500").values
    window.iloc[0] *= 1.5
    assert not np.array_equal(latest_features(window, 252, "sp500").values, before)


def test_row_timestamps_are_those_of_their_newest_bar(sp500: pd.DataFrame, table: FeatureTable) -> None:
    assert len(table) == len(sp500) - LOOKBACK + 1
    assert table.timestamps.equals(sp500.index[LOOKBACK - 1 :])


def test_one_bar_too_few_is_refused(sp500: pd.DataFrame) -> None:
    assert len(compute_features(sp500.iloc[:LOOKBACK], 252, "x")) == 1
    with pytest.raises(HistoryError, match="x: features need 120 bars, 119 available"):
        compute_features(sp500.iloc[: LOOKBACK - 1], 252, "x")


def test_bars_per_year_scales_volatility_alone(sp500: pd.DataFrame) -> None:
    bars = sp500.iloc[-300:]
    four_times, once = compute_features(bars, 1008, "x"), compute_features(bars, 252, "x")
    for column, name in enumerate(once.names):
        factor = 2.0 if "volatility" in name else 1.0
        np.testing.assert_allclose(four_times.values[:, column], factor * once.values[:, column], rtol=1e-12)
    with pytest.raises(ValueError, match="bars_per_year: expected at least 1, was 0"):
        compute_features(bars, 0, "x")


@st.composite
def any_bars(draw: st.DrawFn) -> pd.DataFrame:
    """Valid bars of all kinds: dead stretches, crashes, tiny and huge prices, no volume."""
    num_bars = draw(st.integers(LOOKBACK, LOOKBACK + 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0.0, 1e-12, 1e-3, 0.05, 1.0]))
    quiet = rng.random(num_bars) < draw(st.sampled_from([0.0, 0.5, 0.98]))
    move = np.where(quiet, 0.0, rng.normal(size=num_bars) * size)
    close = draw(st.sampled_from([1e-8, 1.0, 1e4, 1e12])) * np.exp(np.clip(np.cumsum(move), -50, 50))
    open_ = close * np.exp(np.where(quiet, 0.0, rng.normal(size=num_bars) * size / 3))
    wick = np.where(quiet, 0.0, rng.random(num_bars) * size)
    high = np.maximum(open_, close) * np.exp(wick)
    low = np.minimum(open_, close) * np.exp(-wick)
    volume = rng.integers(0, 10, num_bars) * draw(st.sampled_from([0.0, 1.0, 1e9]))
    return make_bars(close, volume, open=open_, high=high, low=low)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(bars=any_bars())
def test_any_valid_bars_give_finite_rows_in_their_declared_range(bars: pd.DataFrame) -> None:
    table = compute_features(bars, 252, "any")
    for column, field in enumerate(table.fields):
        assert table.values[:, column].min() >= field.low, field.name
        assert table.values[:, column].max() <= field.high, field.name
    assert latest_features(bars, 252, "any").values.tobytes() == table.values[-1:].tobytes()


@settings(deadline=None, derandomize=True, max_examples=20)
@given(bars=any_bars(), exponent=st.integers(-20, 20))
def test_the_unit_of_the_price_does_not_matter(bars: pd.DataFrame, exponent: int) -> None:
    scaled = bars.copy()
    scaled[["open", "high", "low", "close"]] *= 2.0**exponent  # a power of two rounds nothing
    assert compute_features(scaled, 252, "x").values.tobytes() == compute_features(bars, 252, "x").values.tobytes()


def test_table_finds_columns_and_cuts_rows(table: FeatureTable) -> None:
    assert table.names[table.index("spread")] == "spread"
    part = table.rows(slice(10, 13))
    assert len(part) == 3
    assert part.timestamps[0] == table.timestamps[10]
    assert np.array_equal(part.values, table.values[10:13])
    with pytest.raises(KeyError, match="feature 'sprad': expected one of gap_return"):
        table.index("sprad")


def test_table_refuses_wrong_shapes_and_values(table: FeatureTable) -> None:
    with pytest.raises(ValueError, match=r"expected float64 \[4912, 20\], was float64 \[4912, 19\]"):
        FeatureTable(table.timestamps, "x", table.fields, table.values[:, 1:])
    with pytest.raises(ValueError, match="was float32"):
        FeatureTable(table.timestamps, "x", table.fields, table.values.astype(np.float32))
    broken = table.values.copy()
    broken[7, table.index("macd")] = np.nan
    with pytest.raises(DataError, match=r"x: feature 'macd' at 1999-07-.*expected a finite number, was nan"):
        FeatureTable(table.timestamps, "x", table.fields, broken)
