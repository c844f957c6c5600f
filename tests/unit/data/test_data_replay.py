"""Replay store: nothing is lost, nothing half-written is read, and broken files are named."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_worlds import SCHEMA, columns, same, transitions

from data.errors import ReplayError
from data.files import TEMP_PREFIX, sha256_bytes, sha256_file
from data.replay import ReplayStore
from data.transitions import DTYPES, ReplaySchema, Transitions

HERE = Path(__file__).parent


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def store(tmp_path: Path) -> ReplayStore:
    """20 rows from 1 January and 15 rows from 1 March 2024, in two parts."""
    store = ReplayStore(tmp_path / "replay")
    store.append(transitions(20, seed=1, start="2024-01-01"))
    store.append(transitions(15, seed=2, start="2024-03-01"))
    return store


def test_what_was_appended_is_read_back_in_order(store: ReplayStore) -> None:
    everything = store.read()
    assert store.num_rows == len(everything) == 35
    first, second = transitions(20, seed=1, start="2024-01-01"), transitions(15, seed=2, start="2024-03-01")
    for name, column in everything.columns():
        assert np.array_equal(column, np.concatenate([getattr(first, name), getattr(second, name)])), name
    assert sorted(os.listdir(store.directory)) == [
        ".lock",
        "part-00000001.parquet",
        "part-00000001.sha256",
        "part-00000002.parquet",
        "part-00000002.sha256",
        "schema.json",
    ]


def test_read_arrays_may_be_written_to(store: ReplayStore) -> None:
    # torch warns about arrays that share read-only memory
    assert all(column.flags.writeable for _, column in store.read().columns())
    assert all(column.flags.writeable for batch in store.iter_batches(10) for _, column in batch.columns())


def test_columns_are_stored_as_documented(store: ReplayStore) -> None:
    schema = pq.read_schema(store.directory / "part-00000001.parquet")
    assert {field.name: str(field.type).replace(" not null", "") for field in schema} == {
        "obs": "fixed_size_list<element: float>[3]",
        "state": "fixed_size_list<element: float>[4]",
        "action": "int64",
        "action_masks": "fixed_size_list<element: bool>[7]",
        "reward": "float",
        "next_obs": "fixed_size_list<element: float>[3]",
        "next_state": "fixed_size_list<element: float>[4]",
        "next_action_masks": "fixed_size_list<element: bool>[7]",
        "terminated": "bool",
        "truncated": "bool",
        "behaviour_log_prob": "float",
        "timestamp": "timestamp[us, tz=UTC]",
        "symbol": "string",
    }


def test_last_months_count_back_from_the_newest_row(store: ReplayStore) -> None:
    # newest is 15 March: one month back is 15 February, two months back is 15 January (excluded: 5 rows remain)
    assert len(store.read(last_months=1)) == 15
    assert len(store.read(last_months=2)) == 15 + 5
    assert store.read(last_months=2).timestamp[0] == np.datetime64("2024-01-16")
    assert len(store.read(last_months=3)) == 35
    with pytest.raises(ValueError, match="last_months: expected at least 1, was 0"):
        store.read(last_months=0)


def test_last_months_do_not_depend_on_the_order_of_appending(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path)
    store.append(transitions(15, start="2024-03-01"))
    store.append(transitions(20, start="2024-01-01"))
    assert len(store.read(last_months=1)) == 15


def test_single_columns_can_be_read(store: ReplayStore) -> None:
    some = store.read_columns(["reward", "action_masks"], last_months=1)
    assert list(some) == ["reward", "action_masks"]
    assert np.array_equal(some["action_masks"], transitions(15, seed=2, start="2024-03-01").action_masks)
    with pytest.raises(ReplayError, match=r"columns: expected any of obs, .*, was 'rewards'"):
        store.read_columns(["rewards"])


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 8, 4, 8, 7]), (100, [20, 15]), (1, [1] * 35)])
def test_batches_are_the_same_rows_in_pieces(store: ReplayStore, batch_size: int, sizes: list[int]) -> None:
    batches = list(store.iter_batches(batch_size))
    assert [len(batch) for batch in batches] == sizes
    whole = {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in DTYPES}
    assert same(Transitions(schema=SCHEMA, **whole), store.read())
    assert sum(len(batch) for batch in store.iter_batches(batch_size, last_months=1)) == 15


def test_batch_size_must_be_positive(store: ReplayStore) -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, was 0"):
        next(store.iter_batches(0))


def test_part_of_many_row_groups_keeps_its_order(tmp_path: Path) -> None:
    store, many = ReplayStore(tmp_path), transitions(1)
    rows = 150_000
    many = Transitions(
        schema=SCHEMA,
        **{name: np.repeat(column, rows, axis=0) for name, column in many.columns() if name != "timestamp"},
        timestamp=np.datetime64("2024-01-01", "us") + np.arange(rows) * np.timedelta64(1, "m"),
    )
    store.append(many)
    assert pq.read_metadata(tmp_path / "part-00000001.parquet").num_row_groups == 3
    assert np.array_equal(store.read_columns(["timestamp"])["timestamp"], many.timestamp)
    assert len(store.read_columns(["action"], last_months=1)["action"]) == 31 * 24 * 60


def test_content_hash_changes_with_content_only(store: ReplayStore, tmp_path: Path) -> None:
    before = store.content_hash()
    assert store.content_hash() == before == ReplayStore(store.directory).content_hash()
    twin = ReplayStore(tmp_path / "twin")
    twin.append(transitions(20, seed=1, start="2024-01-01"))
    assert twin.content_hash() != before
    twin.append(transitions(15, seed=2, start="2024-03-01"))
    assert twin.content_hash() == before
    twin.append(transitions(1))
    assert twin.content_hash() != before


def test_another_schema_is_refused_and_nothing_is_written(store: ReplayStore) -> None:
    other = ReplaySchema(("a", "c", "b"), SCHEMA.state_names, 7)
    with pytest.raises(ReplayError, match=r"append: expected schema .* a changed layout needs a new store"):
        store.append(Transitions(schema=other, **columns(3)))
    assert store.num_rows == 35


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="expected at least one transition, was none"):
        ReplayStore(tmp_path).append(transitions(0))


def test_empty_folder_is_not_a_store_yet(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path / "nowhere")
    assert store.num_rows == 0
    with pytest.raises(ReplayError, match=r"expected a replay store, found no schema\.json"):
        store.read()


def test_store_whose_first_part_was_never_written_is_empty(store: ReplayStore) -> None:
    for part in store.directory.glob("part-*"):
        part.unlink()
    assert len(store.read()) == 0
    assert len(store.read(last_months=1)) == 0
    assert list(store.iter_batches(10)) == []


def test_stray_temporary_is_ignored_by_readers_and_removed_by_the_next_writer(store: ReplayStore) -> None:
    stray = store.directory / f"{TEMP_PREFIX}999-abc"
    stray.write_bytes(b"half a part")
    assert len(store.read()) == 35
    assert stray.exists()
    assert store.append(transitions(1)).name == "part-00000003.parquet"
    assert not stray.exists()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "swapped"])
def test_corrupt_part_is_named(store: ReplayStore, damage: str) -> None:
    part = store.directory / "part-00000002.parquet"
    content = {
        "empty": b"",
        "text": b"not parquet",
        "cut": part.read_bytes()[:1000],
        "swapped": (store.directory / "part-00000001.parquet").read_bytes(),
    }[damage]
    part.write_bytes(content)
    for read in (store.read, lambda: list(store.iter_batches(10)), lambda: store.read(last_months=1)):
        with pytest.raises(ReplayError, match=r"part-00000002\.parquet: expected SHA-256"):
            read()


@settings(deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0.0, 1.0, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(store: ReplayStore, where: float, bit: int) -> None:
    # the footer included: it has no checksum of its own, and its statistics decide which rows are read
    part = store.directory / "part-00000001.parquet"
    whole = part.read_bytes()
    content = bytearray(whole)
    content[int(where * len(whole))] ^= 1 << bit
    part.write_bytes(content)
    with pytest.raises(ReplayError, match=r"part-00000001\.parquet"):
        store.read(last_months=1)
    part.write_bytes(whole)


def test_unreadable_parquet_with_a_fitting_checksum_is_named(store: ReplayStore) -> None:
    part = store.directory / "part-00000002.parquet"
    part.write_bytes(b"not parquet")
    part.with_suffix(".sha256").write_text(sha256_bytes(b"not parquet"))
    with pytest.raises(ReplayError, match=r"part-00000002\.parquet: not a readable replay part"):
        store.read()


def test_part_without_checksum_is_named(store: ReplayStore) -> None:
    (store.directory / "part-00000002.sha256").unlink()
    with pytest.raises(ReplayError, match=r"part-00000002\.parquet: not a readable replay part: .*sha256"):
        store.read()


def test_checksum_of_a_killed_append_is_overwritten(store: ReplayStore) -> None:
    (store.directory / "part-00000003.sha256").write_text("of a part that was never written\n")
    assert len(store.read()) == 35
    store.append(transitions(4))
    assert len(store.read()) == 39


def test_part_of_another_schema_is_named(store: ReplayStore, tmp_path: Path) -> None:
    other = ReplayStore(tmp_path / "other")
    foreign = other.append(Transitions(schema=ReplaySchema(("x", "y", "z"), SCHEMA.state_names, 7), **columns(3)))
    for suffix in (".parquet", ".sha256"):
        foreign.with_suffix(suffix).rename(store.directory / f"part-00000003{suffix}")
    with pytest.raises(ReplayError, match=r"part-00000003\.parquet: expected schema hash"):
        store.read()


def test_parquet_without_our_schema_is_named(store: ReplayStore) -> None:
    part = store.directory / "part-00000002.parquet"
    pq.write_table(pq.read_table(part).replace_schema_metadata(None), part)
    part.with_suffix(".sha256").write_text(sha256_file(part))
    with pytest.raises(ReplayError, match=r"part-00000002\.parquet: expected schema hash .*, was none"):
        store.read()


def test_hole_in_the_numbering_is_lost_data_but_pruning_the_oldest_is_not(store: ReplayStore) -> None:
    store.append(transitions(4, start="2024-04-01"))
    (store.directory / "part-00000001.parquet").unlink()
    assert store.num_rows == 19
    assert store.append(transitions(1)).name == "part-00000004.parquet"
    (store.directory / "part-00000003.parquet").unlink()
    with pytest.raises(ReplayError, match=r"expected part-00000003\.parquet before part-00000004\.parquet, found none"):
        store.read()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"obs_names": 3}', "hash"])
def test_broken_schema_file_is_named(store: ReplayStore, content: str) -> None:
    path = store.directory / "schema.json"
    if content == "hash":
        content = json.dumps(json.loads(path.read_text()) | {"num_actions": 8})
    path.write_text(content)
    with pytest.raises(ReplayError, match="schema"):
        store.read()
    with pytest.raises(ReplayError, match="schema"):
        store.append(transitions(1))


def test_lost_schema_file_is_not_silently_replaced(store: ReplayStore) -> None:
    (store.directory / "schema.json").unlink()
    with pytest.raises(ReplayError, match=r"expected schema\.json beside part-00000001\.parquet"):
        store.append(transitions(1))


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda seed: ReplayStore(tmp_path).append(transitions(5, seed)), range(12)))
    assert len(set(parts)) == 12
    assert ReplayStore(tmp_path).num_rows == 60


def test_full_disk_leaves_the_store_as_it_was(store: ReplayStore) -> None:
    before = store.content_hash()
    code = """
        import resource, sys
        from replay_worlds import transitions
        from data.replay import ReplayStore
        many = transitions(5000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            ReplayStore(sys.argv[1]).append(many)
        except OSError as error:
            print(type(error).__name__)
    """
    out, err = child(code, str(store.directory)).communicate()
    assert out.strip() == "OSError", err
    assert store.content_hash() == before
    assert not list(store.directory.glob(f"{TEMP_PREFIX}*"))


def test_killed_writer_leaves_whole_parts_only(store: ReplayStore) -> None:
    code = """
        import sys
        from replay_worlds import transitions
        from data.replay import ReplayStore
        store, batch = ReplayStore(sys.argv[1]), transitions(500)
        while True:
            store.append(batch)
    """
    writer = child(code, str(store.directory))
    deadline = time.monotonic() + 60
    while len(list(store.directory.glob("part-*"))) < 6:
        assert writer.poll() is None, writer.communicate()[1]
        assert time.monotonic() < deadline, "the writer never got going"
        time.sleep(0.005)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    rows = store.num_rows
    assert len(store.read()) == rows
    assert (rows - 35) % 500 == 0
    store.append(transitions(7))
    assert store.num_rows == rows + 7
    assert not list(store.directory.glob(f"{TEMP_PREFIX}*"))
