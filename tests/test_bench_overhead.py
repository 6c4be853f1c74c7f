"""The overhead benchmark: a saturated scheduler, and a row for each policy."""

from batchpilot.env.bench import overhead


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
