"""The overhead benchmark: a saturated scheduler, and a row for each policy."""

from batchpilot.env.bench import overhead, overhead_remote


def test_a_saturated_scheduler_keeps_as_many_running_as_asked():
    scheduler = overhead.SaturatedScheduler(running=4)
    ours, theirs = scheduler.steps(50)
    assert scheduler.core.hook.snapshot().running == 4
    assert scheduler.core.hook.snapshot().waiting >= 4
    assert len(ours) == len(theirs) == 50
    assert all(seconds > 0 for seconds in (*ours, *theirs))


def test_the_command_prints_a_row_for_each_policy(capsys):
    arguments = ["--running", "2", "--steps", "20", "--policies", "static", "memory-peak"]
    assert overhead.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "static" in printed
    assert "memory-peak" in printed


def test_mode_remote_is_measured_without_a_service_too(capsys, monkeypatch):
    monkeypatch.setattr(overhead_remote, "CASES", ("local", "dead"))
    arguments = ["--running", "2", "--steps", "20", "--rounds", "1", "--policies", "memory"]
    assert overhead_remote.main(arguments) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [row[1] for row in rows] == ["none", "dead"]
    assert all(row[-3:-1] == ["0", "%"] for row in rows)
