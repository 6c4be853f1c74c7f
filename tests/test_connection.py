"""How `top` and `groups` reach a service: what cannot work or would tell a secret is refused."""

import argparse
from concurrent import futures

import grpc
import pytest
from certificates import Authority

from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.connection import add_connection_arguments, connection, said

HINT = " (a service with TLS needs --ca-file)"


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


class Busy(tuner_pb2_grpc.TunerServiceServicer):
    """Answers, but only that it cannot."""

    def ListEngines(self, request, context):
        context.abort(grpc.StatusCode.UNAVAILABLE, "the service is shutting down")


@pytest.fixture
def serve():
    """Starts a service, with TLS or without; its address."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    tuner_pb2_grpc.add_TunerServiceServicer_to_server(Busy(), server)

    def start(tls):
        pair = Authority().sign("localhost")
        credentials = grpc.ssl_server_credentials([(pair.key, pair.certificate)])
        port = (
            server.add_secure_port("localhost:0", credentials)
            if tls
            else server.add_insecure_port("localhost:0")
        )
        server.start()
        return f"localhost:{port}"

    yield start
    server.stop(None)


def failure(target):
    args = options("--target", target)
    with connection(args) as (channel, _), pytest.raises(grpc.RpcError) as failed:
        stub = tuner_pb2_grpc.TunerServiceStub(channel)
        stub.ListEngines(pb.ListEnginesRequest(), timeout=30)
    return said(failed.value, args)


def test_what_tls_needs_is_said_where_nothing_was_reached_and_not_where_a_service_spoke(serve):
    assert failure(serve(tls=False)) == "UNAVAILABLE: the service is shutting down"
    assert failure("localhost:1").endswith(HINT)


def test_a_service_with_tls_lets_nobody_in_without(serve):
    text = failure(serve(tls=True))
    assert text.startswith("UNAVAILABLE: failed to connect")
    assert text.endswith(HINT)
