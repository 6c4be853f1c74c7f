"""The experience log: whole files at every moment, bounded, and read back by anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.parquet as pq
import pytest

from batchpilot.agents.experience import COLUMNS, ExperienceRow
from batchpilot.agents.features import LatencyTargets, observation
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.telemetry import WindowBuilder
from batchpilot.env import experience as reading
from batchpilot.env.experience import Experience, read_experience
from batchpilot.service import experience
from batchpilot.service.experience import ExperienceLog, ExperienceSettings

FACTS = EngineFacts(BatchLimits(64, 2048), total_blocks=100, block_size=16)
WINDOW = replace(
    WindowBuilder().close(
        EngineSnapshot(FACTS, 1.0, running=4, waiting=2), seconds=0.25, limits=BatchLimits(8, 2048)
    ),
    steps=10,
    busy_seconds=0.2,
    decode_tokens=40,
    slow_decode_tokens=10,
)


def row(sequence: int, session: str = "s1", **changes: object) -> ExperienceRow:
    plain = ExperienceRow(
        recorded_at=1_800_000_000 + sequence,
        session=session,
        sequence=sequence,
        engine_group="chat",
        engine="host-1",
        data_parallel_rank=0,
        model_name="m",
        facts=FACTS,
        targets=LatencyTargets(itl_slo_ms=50.0),
        window=replace(WINDOW, waiting=sequence),
        policy="learned:example@1",
        proposed=BatchLimits(80, 2048),
        limits=BatchLimits(64, 2048),
        source="learned",
        reason="follows the agent's action",
        clamp="above_upper_bound",
    )
    return replace(plain, **changes)


def open_log(folder: Path, **settings: object) -> ExperienceLog:
    return ExperienceLog(ExperienceSettings(str(folder), **settings))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 30 s"
        time.sleep(0.01)


def test_pandas_polars_and_duckdb_read_it_as_it_is(tmp_path):
    log = open_log(tmp_path)
    for sequence in range(1, 4):
        assert log.append(row(sequence))
    log.close()
    tables = [
        pandas.read_parquet(tmp_path),
        polars.read_parquet(f"{tmp_path}/*.parquet").to_pandas(),
        duckdb.sql(f"FROM '{tmp_path}/*.parquet'").df(),
    ]
    for table in tables:
        assert list(table.columns) == list(COLUMNS)
        assert table["window_waiting"].tolist() == [1, 2, 3]
        assert table["window_seconds"].tolist() == [0.25] * 3
        assert table["policy"].tolist() == ["learned:example@1"] * 3
        assert table["itl_slo_ms"].tolist() == [50.0] * 3
        assert table["ttft_slo_ms"].isna().all()
        assert table["local_max_num_seqs"].isna().all()
        assert table["recorded_at"][0] == pandas.Timestamp(1_800_000_001, unit="s", tz="UTC")


def test_the_documented_query_joins_decisions_with_their_outcomes(tmp_path):
    log = open_log(tmp_path)
    for sequence in (1, 2, 3):
        log.append(row(sequence))
    log.close()
    found = duckdb.sql(
        "SELECT sequence, lead(window_waiting) OVER (PARTITION BY session ORDER BY sequence) "
        f"AS next FROM '{tmp_path}/*.parquet' ORDER BY sequence"
    ).fetchall()
    assert found == [(1, 2), (2, 3), (3, None)]


def test_a_file_grows_until_it_is_full_and_then_the_next_begins(tmp_path):
    log = open_log(tmp_path, flush_seconds=0.01, segment_rows=3)
    for sequence in range(1, 8):
        log.append(row(sequence))
        wait_for(lambda wanted=sequence: log.written_rows == wanted)
    log.close()
    assert [pq.read_metadata(path).num_rows for path in files(tmp_path)] == [3, 3, 1]
    assert pandas.read_parquet(tmp_path)["sequence"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_beyond_its_size_the_oldest_files_go(tmp_path):
    log = open_log(tmp_path, flush_seconds=0.01, segment_rows=1, max_bytes=2**16)
    for sequence in range(1, 13):
        log.append(row(sequence))
        wait_for(lambda wanted=sequence: log.written_rows == wanted)
    log.close()
    kept = pandas.read_parquet(tmp_path)["sequence"].tolist()
    assert 1 < len(kept) < 12
    assert kept == list(range(13 - len(kept), 13))
    assert sum(path.stat().st_size for path in files(tmp_path)[:-1]) <= 2**16


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from test_experience import open_log, row
log = open_log(sys.argv[1], flush_seconds=0.05)
sequence = 0
while True:
    sequence += 1
    while not log.append(row(sequence)): pass
    if log.written_rows >= 2000:
        print(log.written_rows, flush=True)
"""


def test_a_process_killed_in_the_middle_loses_only_what_was_not_flushed(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        written = int(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = pandas.read_parquet(tmp_path)["sequence"].tolist()
    assert len(kept) >= written
    assert kept == list(range(1, len(kept) + 1))


def test_what_a_killed_process_left_half_written_is_never_read_and_goes_later(tmp_path):
    leftover = tmp_path / ".unfinished-experience-1-1-0001.parquet.tmp"
    leftover.write_bytes(b"PAR1 half")
    young = tmp_path / ".unfinished-experience-2-1-0001.parquet.tmp"
    young.write_bytes(b"PAR1 half")
    os.utime(leftover, (1, 1))
    log = open_log(tmp_path)
    log.append(row(1))
    log.close()
    assert pandas.read_parquet(tmp_path)["sequence"].tolist() == [1]
    assert duckdb.sql(f"SELECT count(*) FROM '{tmp_path}/*.parquet'").fetchall() == [(1,)]
    assert not leftover.exists()
    assert young.exists()  # another process may be writing it


def test_on_a_full_disk_rows_are_dropped_counted_and_logged_once(tmp_path, monkeypatch, caplog):
    real, full = experience.pq.write_table, True

    def write_table(table, where, **options):
        if full:
            Path(where).write_bytes(b"half a fi")
            raise OSError(28, "No space left on device")
        real(table, where, **options)

    monkeypatch.setattr(experience.pq, "write_table", write_table)
    log = open_log(tmp_path, flush_seconds=0.01)
    for sequence in (1, 2):
        log.append(row(sequence))
        wait_for(lambda wanted=sequence: log.failed_flushes == wanted)
    assert list(tmp_path.iterdir()) == []
    full = False
    log.append(row(3))
    log.close()
    assert pandas.read_parquet(tmp_path)["sequence"].tolist() == [3]
    assert (log.written_rows, log.dropped) == (1, 2)
    assert [r.levelname for r in caplog.records] == ["ERROR", "WARNING"]
    assert "No space left" in caplog.text
    assert "written again; 2 rows were dropped" in caplog.text


def test_a_folder_that_is_taken_away_comes_back(tmp_path):
    folder = tmp_path / "log"
    log = open_log(folder, flush_seconds=0.01)
    log.append(row(1))
    wait_for(lambda: log.written_rows == 1)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    log.append(row(2))
    wait_for(lambda: log.failed_flushes == 1)
    log.append(row(3))
    log.close()
    assert pandas.read_parquet(folder)["sequence"].tolist() == [3]


def test_a_full_queue_drops_and_never_waits(tmp_path):
    log = open_log(tmp_path, flush_seconds=5, queue_rows=2)
    assert [log.append(row(sequence)) for sequence in (1, 2, 3)] == [True, True, False]
    log.close()
    assert (log.written_rows, log.dropped) == (2, 1)
    assert not log.append(row(4))


def test_a_row_that_does_not_fit_takes_no_other_with_it(tmp_path):
    log = open_log(tmp_path)
    log.append(row(1))
    log.append(row(2, window=replace(WINDOW, decode_tokens=2**64 - 1)))
    log.append(row(3))
    log.close()
    assert pandas.read_parquet(tmp_path)["sequence"].tolist() == [1, 3]
    assert (log.written_rows, log.dropped) == (2, 1)


def test_training_reads_transitions_back(tmp_path):
    log = open_log(tmp_path)
    for sequence in (1, 2, 4, 5):  # report 3 was dropped
        log.append(row(sequence))
    log.append(row(1, session="s2", local_limits=BatchLimits(10, 1024)))
    log.append(row(2, session="s2"))
    log.close()
    found = read_experience(tmp_path)
    assert len(found) == 3
    assert found.starts.tolist() == [True, True, True]
    expected = observation(replace(WINDOW, waiting=5), FACTS, LatencyTargets(itl_slo_ms=50.0))
    assert np.array_equal(found.next_observations[1], expected)
    assert found.observations.shape == (3, 26)
    assert found.limits.tolist() == [[64, 2048]] * 3
    assert found.base_limits.tolist() == [[0, 0], [0, 0], [10, 1024]]
    assert found.good_tokens_per_s.tolist() == [120.0] * 3  # 30 of 40 tokens in 0.25 s
    assert found.seconds.tolist() == [0.25] * 3


def test_transitions_of_a_session_follow_each_other(tmp_path):
    log = open_log(tmp_path)
    for sequence in (3, 1, 2):
        log.append(row(sequence))
    log.close()
    found = read_experience(tmp_path)
    assert found.starts.tolist() == [True, False]
    assert np.array_equal(found.observations[1], found.next_observations[0])


def made_up(count: int, seed: int) -> list[ExperienceRow]:
    """Rows of five sessions in no order, some missing, all different."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in rng.permutation(count):
        tokens, slow, prompts = (int(number) for number in rng.integers(0, 5000, 3))
        window = replace(
            WINDOW,
            seconds=float(rng.uniform(0.0, 3.0)),
            decode_tokens=tokens + slow,
            slow_decode_tokens=slow,
            prefill_tokens=prompts,
            recomputed_tokens=int(rng.integers(0, 900)),
            kv_bound_steps=int(rng.integers(0, 10)),
        )
        local = BatchLimits(*map(int, rng.integers(1, 99, 2))) if rng.random() < 0.5 else None
        more = {
            "window": window,
            "local_limits": local,
            "limits": BatchLimits(*map(int, rng.integers(1, 999, 2))),
            "targets": LatencyTargets(float(rng.uniform(10, 90)), None),
            "facts": replace(FACTS, total_blocks=int(rng.integers(50, 500))),
        }
        if rng.random() < 0.9:
            rows.append(row(int(index) // 5 + 1, f"s{'éab1ü'[index % 5]}", **more))
    return rows


def pair(limits: BatchLimits | None) -> tuple[int, int]:
    return (limits.max_num_seqs, limits.max_num_batched_tokens) if limits is not None else (0, 0)


def transitions(rows: list[ExperienceRow]) -> Experience:
    """What `read_experience` is to give, from the rows themselves, one by one."""
    ordered = sorted(rows, key=lambda row: (row.session, row.sequence))
    pairs = [
        (before, after)
        for before, after in pairwise(ordered)
        if (before.session, before.sequence + 1) == (after.session, after.sequence)
    ]
    ends = {id(after) for _, after in pairs}
    windows = [after.window for _, after in pairs]

    def seen(at: int) -> np.ndarray:
        return np.array([observation(p[at].window, p[at].facts, p[at].targets) for p in pairs])

    return Experience(
        observations=seen(0),
        next_observations=seen(1),
        limits=np.array([pair(before.limits) for before, _ in pairs]),
        base_limits=np.array([pair(before.local_limits) for before, _ in pairs]),
        startup_limits=np.array([pair(before.facts.startup_limits) for before, _ in pairs]),
        seconds=np.array([w.seconds for w in windows], np.float32),
        good_tokens_per_s=np.array(
            [(w.decode_tokens - w.slow_decode_tokens) / max(w.seconds, 1e-9) for w in windows],
            np.float32,
        ),
        recomputed_share=np.array([w.recomputed_share for w in windows], np.float32),
        starts=np.array([id(before) not in ends for before, _ in pairs]),
    )


def test_what_is_read_is_what_was_written_however_it_is_split(tmp_path, monkeypatch):
    rows, log = made_up(400, seed=1), open_log(tmp_path, flush_seconds=0.01, segment_rows=50)
    for appended, each in enumerate(rows, 1):
        assert log.append(each)
        if appended % 50 == 0:
            wait_for(lambda wanted=appended: log.written_rows == wanted)
    log.close()
    assert len(files(tmp_path)) > 3
    expected = transitions(rows)
    assert 200 < len(expected) < len(rows)
    for batch_rows in (7, 4096):
        monkeypatch.setattr(reading, "_BATCH_ROWS", batch_rows)
        found = read_experience(tmp_path)
        for item in fields(Experience):
            ours, theirs = getattr(found, item.name), getattr(expected, item.name)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), item.name


def test_a_log_of_no_rows(tmp_path):
    pq.write_table(experience.SCHEMA.empty_table(), tmp_path / "experience-1.parquet")
    found = read_experience(tmp_path)
    assert (len(found), found.observations.shape, found.limits.shape) == (0, (0, 26), (0, 2))


def test_a_log_is_read_in_less_memory_than_its_rows_take_as_objects(tmp_path):
    log = open_log(tmp_path)
    for sequence in range(1, 20_001):
        log.append(row(sequence))
    log.close()
    read_experience(tmp_path)  # what is imported, and kept, the first time
    tracemalloc.start()
    try:
        found = read_experience(tmp_path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 19_999
    assert most < 2000 * len(found)


def test_what_is_no_experience_log(tmp_path):
    with pytest.raises(ConfigError, match="no experience-\\*.parquet"):
        read_experience(tmp_path)
    pandas.DataFrame({"a": [1]}).to_parquet(tmp_path / "experience-1.parquet")
    with pytest.raises(ConfigError, match="has schema none; this batchpilot reads 1 only"):
        read_experience(tmp_path)
    (tmp_path / "experience-0.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ConfigError, match="cannot read the experience log"):
        read_experience(tmp_path)
