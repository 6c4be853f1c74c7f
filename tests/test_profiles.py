"""GPU profiles: the step-time form, the files, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.profiles import (
    FitError,
    GpuProfile,
    StepTimeModel,
    load_profile,
    parse_profile,
    profile_names,
    profile_to_text,
)

STEP = {
    "floor_ms": 10.0,
    "linear_base_ms": 4.0,
    "token_ms": 0.05,
    "decode_seq_ms": 0.01,
    "kv_token_ms": 0.001,
    "mixed_kv_token_ms": 0.0005,
    "prefill_squared_ms": 0.0001,
    "overhead_ms": 0.5,
    "overhead_decode_seq_ms": 0.04,
}
PROFILE = {
    "name": "toy-gpu",
    "model": "Toy",
    "gpu": "A GPU",
    "tensor_parallel": 1,
    "kv_bytes_per_token": 1024,
    "num_blocks": 101,
    "block_size": 16,
    "max_model_len": 4096,
    "step_time": STEP,
    "noise": 0.0,
    "source": "made up",
    "licence": "Apache-2.0",
    "fit_error": {"mean_relative": 0.01, "p90_relative": 0.02, "samples": 12},
}
WANTED = {
    *(f"llama-3.1-8b-{gpu}" for gpu in ("a100", "h100", "h200", "rtxpro6000", "rtx4090")),
    *(f"qwen3-8b-{gpu}" for gpu in ("h100", "h200")),
    *(f"llama-3.1-70b-{gpu}-tp4" for gpu in ("a100", "h100", "h200")),
}
counts = st.integers(min_value=0, max_value=10_000)


def changed(*path_and_value):
    """PROFILE with one value replaced; `...` takes the key out."""
    *path, value = path_and_value
    profile = json.loads(json.dumps(PROFILE))
    holder = profile
    for key in path[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return json.dumps(profile)


@pytest.mark.parametrize(
    ("batch", "milliseconds"),
    [
        ((0, 0, 0), 10.5),  # the floor and the overhead
        ((100, 0, 0), 10.5 + 100 * 0.05),  # below the knee at 120 tokens: 0.01 + 0.04 a sequence
        ((200, 0, 0), 4 + 200 * 0.05 + 0.5 + 200 * 0.05),
        ((100, 0, 5_000), 10.5 + 100 * 0.05 + 5),
        ((100, 20, 5_000), 10.5 + 100 * 0.05 + 7.5 + 0.04),  # mixed: half as much again of K
        ((0, 300, 0), 4 + 300 * 0.05 + 0.5 + 9),
        ((0, 300, 0, 2 * 150**2), 4 + 300 * 0.05 + 0.5 + 4.5),  # two prompts, not one
    ],
)
def test_seconds_add_up(batch, milliseconds):
    assert StepTimeModel(**STEP).seconds(*batch) == pytest.approx(milliseconds / 1e3, rel=1e-12)


def test_unknown_cost_of_mixing_counts_as_nothing():
    unknown = StepTimeModel(**{**STEP, "mixed_kv_token_ms": None})
    zero = StepTimeModel(**{**STEP, "mixed_kv_token_ms": 0.0})
    assert unknown.seconds(10, 20, 3000) == zero.seconds(10, 20, 3000)


@given(batch=st.tuples(counts, counts, counts), more=st.tuples(counts, counts, counts))
def test_more_work_never_takes_less_time(batch, more):
    model = StepTimeModel(**STEP)
    bigger = [a + b for a, b in zip(batch, more, strict=True)]
    assert 0 < model.seconds(*batch) <= model.seconds(*bigger)


def test_every_bundled_profile_is_whole_and_named_like_its_file():
    assert set(profile_names()) >= WANTED
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert name.endswith(f"-tp{profile.tensor_parallel}") == (profile.tensor_parallel > 1)
        assert profile.licence in ("Apache-2.0", "MIT")
        assert profile.fit_error.mean_relative < 0.06
        assert "/" not in profile.source.split("step_time:")[0]
        assert profile_to_text(profile) == profile_to_text(
            parse_profile(profile_to_text(profile), where=name)
        )


def test_bundled_numbers_of_one_profile():
    profile = load_profile("llama-3.1-8b-rtx4090")
    assert profile.num_blocks == 2588  # as vLLM 0.19 counted on the card
    assert profile.kv_capacity_tokens == 2587 * 16
    assert profile.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    # The overhead that replaying a real run found: half a millisecond at 37 sequences.
    assert profile.step_time.overhead_decode_seq_ms * 37 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        ("llama-3.1-8b-rtx4090", "llama-3.1-8b-rtxpro6000"),
        ("llama-3.1-8b-a100", "llama-3.1-8b-h100"),
        ("llama-3.1-8b-h100", "llama-3.1-8b-h200"),
        ("llama-3.1-70b-a100-tp4", "llama-3.1-70b-h100-tp4"),
        ("llama-3.1-70b-h100-tp4", "llama-3.1-70b-h200-tp4"),
    ],
)
def test_faster_gpus_are_faster(slow, fast):
    batch = (64, 0, 64 * 500)
    slow_seconds = load_profile(slow).step_time.seconds(*batch)
    assert slow_seconds > load_profile(fast).step_time.seconds(*batch)


def test_an_h100_decodes_as_a_real_one():
    # Llama-3.1-8B behind vLLM's server, ml.energy: 16.5 ms between tokens at 128 sequences, 26.1 at
    # 256. Contexts near 650 tokens, and as many prompts as end: about 0.75 prompt tokens a token.
    model = load_profile("llama-3.1-8b-h100").step_time
    assert model.seconds(128, 96, 128 * 650) == pytest.approx(16.5e-3, rel=0.1)
    assert model.seconds(256, 192, 256 * 650) == pytest.approx(26.1e-3, rel=0.15)


def test_a_profile_from_a_file(tmp_path):
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(PROFILE))
    profile = load_profile(str(path))
    assert profile.step_time == StepTimeModel(**STEP)
    assert profile.fit_error == FitError(0.01, 0.02, 12)
    assert json.loads(profile_to_text(profile)) == PROFILE
    assert list(json.loads(profile_to_text(profile))) == list(PROFILE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (changed("name", ...), "name is required"),
        (changed("step_time", ...), "step_time is required"),
        (changed("step_time", "floor_ms", ...), "step_time: floor_ms is required"),
        (changed("colour", "red"), "unknown key 'colour'"),
        (changed("step_time", "colour", 1), "step_time: unknown key 'colour'"),
        (changed("num_blocks", 1), "num_blocks=1 must be at least 2"),
        (changed("num_blocks", 100.5), "num_blocks=100.5 is not a whole number"),
        (changed("num_blocks", "100"), "num_blocks='100' is not a whole number"),
        (changed("num_blocks", True), "num_blocks=True is not a whole number"),
        (changed("num_blocks", None), "num_blocks=None is not a whole number"),
        (changed("block_size", 0), "block_size=0 must be at least 1"),
        (changed("tensor_parallel", 0), "tensor_parallel=0 must be at least 1"),
        (changed("kv_bytes_per_token", -1), "kv_bytes_per_token=-1 must be at least 1"),
        (changed("max_model_len", 1), "max_model_len=1 must be at least 2"),
        (changed("noise", 1), "noise=1.0 must be less than 1"),
        (changed("noise", -0.1), "noise=-0.1 must be at least 0"),
        (changed("model", 5), "model=5 is not a text"),
        (changed("licence", " "), "licence=' ' must not be empty"),
        (changed("name", "Toy GPU"), "name='Toy GPU' must be lower-case"),
        (changed("step_time", "floor_ms", -1), "step_time: floor_ms=-1.0 must be at least 0"),
        (changed("step_time", "token_ms", "x"), "step_time: token_ms='x' is not a number"),
        (changed("step_time", "mixed_kv_token_ms", []), "mixed_kv_token_ms=[] is not a number or"),
        (changed("step_time", [1]), "step_time=[1] is not a JSON object"),
        (changed("step_time", dict.fromkeys(STEP, 0)), "a step of one sequence takes no time"),
        (changed("fit_error", "samples", 0), "fit_error: samples=0 must be at least 1"),
        (changed("noise", 0.25).replace("0.25", "NaN"), "NaN is not a number"),
        (changed("noise", 0.25).replace("0.25", "-Infinity"), "-Infinity is not a number"),
        (changed("noise", 0.25).replace("0.25", "1e999"), "noise=inf is not a finite number"),
        (changed("noise", 0)[:-1] + ', "noise": 0}', "noise is given twice"),
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_profile_names_file_field_and_value(tmp_path, text, words):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_profile(str(path))
    assert str(error.value).startswith(f"profile {path}: ")
    assert words in str(error.value)


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no profile 'llama-9'; known: .*llama-3.1-8b-h100,"):
        load_profile("llama-9")


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read profile .*binary.json"):
        load_profile(str(path))


def test_a_value_built_in_python_is_checked_too():
    profile = load_profile("qwen3-8b-h200")
    with pytest.raises(ConfigError, match="num_blocks=1"):
        GpuProfile(**{**profile.__dict__, "num_blocks": 1})
