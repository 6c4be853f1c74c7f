"""The speed of the virtual engine, beside the most that vLLM's own scheduler allows."""

from itertools import islice

import pytest

from batchpilot.env import bench_env, engine_speed


def test_both_serve_the_same_requests():
    first, second = engine_speed._requests(), engine_speed._requests()
    assert list(islice(first, 20)) == list(islice(second, 20))


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_as_many_run_as_were_asked_for(prefix_caching):
    speed = engine_speed.measure_engine(4, 60, rounds=1, prefix_caching=prefix_caching)
    assert 3.5 < speed.running <= 4
    assert speed.prefix_caching is prefix_caching
    assert speed.engine > 0
    assert speed.vllm_alone > 0


@pytest.mark.parametrize("option", ["--processes", "--running"])
@pytest.mark.parametrize("value", ["0", "two", "1,"])
def test_a_bad_number_is_named(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_env.main([option, value])
    assert stopped.value.code == 2
    assert f"{option} {value}" in capsys.readouterr().err
