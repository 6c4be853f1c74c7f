"""HOST:PORT texts, and which hosts are this machine alone."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from batchpilot.agents.parameters import ConfigError


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, *, where: str) -> Address:
        """Reads `HOST:PORT` or `[IPV6]:PORT`; port 0 lets the system choose.

        Raises:
            ConfigError: The text has another form.
        """
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        fits = colon and bare and port.isdecimal() and int(port) <= 65535
        if not fits or (":" in bare and bare == host):
            raise ConfigError(
                f"{where}={text!r} is not HOST:PORT, such as 127.0.0.1:50061 or [::1]:50061"
            )
        return cls(bare, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it. A name counts only if it is `localhost`."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"
