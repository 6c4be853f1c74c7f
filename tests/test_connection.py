"""How `top` and `groups` reach a service: what cannot work or would tell a secret is refused."""

import argparse

import pytest

from batchpilot.agents.parameters import ConfigError
from batchpilot.service.connection import add_connection_arguments, connection


def options(*texts):
    parser = argparse.ArgumentParser()
    add_connection_arguments(parser)
    return parser.parse_args(texts)


@pytest.fixture
def token(tmp_path):
    file = tmp_path / "token"
    file.write_text("a-secret\n")
    return str(file)


def test_a_token_goes_with_every_call(token):
    with connection(options("--token-file", token)) as (_, metadata):
        assert metadata == (("authorization", "Bearer a-secret"),)


@pytest.mark.parametrize(
    "target", ["localhost:1", "dns:///localhost:1", "[::1]:1", "unix:/run/tuner"]
)
def test_a_token_may_go_in_clear_on_this_machine(token, target):
    with connection(options("--token-file", token, "--target", target)) as (_, metadata):
        assert metadata


@pytest.mark.parametrize("target", ["tuner:50061", "dns:///tuner:50061", "10.0.0.1:50061"])
def test_and_nowhere_else(token, target):
    with (
        pytest.raises(ConfigError, match=f"the token would go to {target} in clear"),
        connection(options("--token-file", token, "--target", target)),
    ):
        pass


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["--target", "tuner"], "--target='tuner' is not HOST:PORT"),
        (["--target", "tuner:70000"], "--target='tuner:70000' is not HOST:PORT"),
        (["--key-file", "x"], "--cert-file and --key-file go together: give both"),
        (["--cert-file", "x", "--key-file", "x"], "--cert-file needs --ca-file"),
        (["--ca-file", "/nowhere/ca"], "/nowhere/ca: cannot be read"),
        (["--token-file", "/dev/null"], "/dev/null: holds no token"),
    ],
)
def test_what_cannot_work_is_refused(texts, message):
    with pytest.raises(ConfigError, match=message), connection(options(*texts)):
        pass
