"""A tuning service that does as a test says, and everything a test needs to be wrong about TLS."""

from __future__ import annotations

import datetime
import ipaddress
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as wire
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc as rpc

Answer = Callable[[wire.Report], Iterable[wire.TuneResponse]]


def lease(report: wire.Report, seqs: int = 7, tokens: int = 128, ms: int = 20_000, **more: Any):
    """An answer in good order, unless told otherwise."""
    fields = {"sequence": report.sequence, "source": "static", "policy": "static", **more}
    limits = wire.BatchLimits(max_num_seqs=seqs, max_num_batched_tokens=tokens)
    return wire.TuneResponse(lease=wire.LimitsLease(limits=limits, lease_ms=ms, **fields))


def good(report: wire.Report) -> Iterator[wire.TuneResponse]:
    yield lease(report)


@dataclass
class Double(rpc.TunerServiceServicer):
    """A service: welcomes, then answers every report as `answer` says."""

    answer: Answer = good
    welcome: wire.Welcome = field(
        default_factory=lambda: wire.Welcome(report_interval_ms=20, detail=wire.DETAIL_WINDOW)
    )
    token: str | None = None
    hellos: list[wire.EngineHello] = field(default_factory=list)
    reports: list[wire.Report] = field(default_factory=list)
    refused: int = 0

    def Tune(self, requests: Iterator[wire.TuneRequest], context: Any):
        if self.token is not None:
            sent = dict(context.invocation_metadata()).get("authorization")
            if sent != f"Bearer {self.token}":
                self.refused += 1
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown token")
        for request in requests:
            if request.WhichOneof("kind") == "hello":
                self.hellos.append(request.hello)
                yield wire.TuneResponse(welcome=self.welcome)
            else:
                self.reports.append(request.report)
                yield from self.answer(request.report)


class Server:
    """A double behind a port of this machine."""

    def __init__(
        self, double: Any, port: int = 0, credentials: grpc.ServerCredentials | None = None
    ) -> None:
        self.double = double
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        rpc.add_TunerServiceServicer_to_server(double, self._server)
        # Of a name with two addresses one may be taken, and the port that is found is the other's.
        address = f"127.0.0.1:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        assert self.port, f"{address} is taken"
        self._server.start()

    @property
    def target(self) -> str:
        return f"localhost:{self.port}"

    def stop(self) -> None:
        self._server.stop(0).wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def until(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    """Waits for something another thread does; False where it did not in time."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return True
        pause.wait(0.01)
    return bool(condition())


class Authority:
    """A certificate authority in a folder, which signs whatever it is asked to."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.ca_file = self._write("ca.pem", self._sign(self._name, self._key, is_authority=True))

    def issue(self, name: str, *, days: int = 1) -> tuple[str, str]:
        """A certificate for this machine and its key, as file names; expired with negative days."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key, days=days)
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        (self.folder / f"{name}.key").write_bytes(pem)
        return self._write(f"{name}.pem", certificate), str(self.folder / f"{name}.key")

    def server_credentials(self, name: str, **how: Any) -> grpc.ServerCredentials:
        """What a server needs that asks its clients for a certificate of ours."""
        certificate, key = (Path(path).read_bytes() for path in self.issue(name, **how))
        ca = Path(self.ca_file).read_bytes()
        return grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)

    def _sign(self, subject: Any, key: Any, *, days: int = 1, is_authority: bool = False) -> Any:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=9))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name: str, certificate: Any) -> str:
        from cryptography.hazmat.primitives import serialization

        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return str(path)
