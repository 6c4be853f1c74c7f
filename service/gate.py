"""What every call passes first: how often its client may call, who it is, and what it may do."""

from __future__ import annotations

from typing import Any

import grpc

from batchpilot.service.access import (
    AccessList,
    Caller,
    Role,
    certificate_names,
    certificate_scope,
)
from batchpilot.service.rates import ClientRates
from batchpilot.service.refusals import RefusalError
from batchpilot.service.wire import EngineKey

_BEARER = "bearer "


class Gate:
    """Admits callers.

    Attributes:
        access: The clients that are known; may be replaced at any time.

    Args:
        access: See above.
        rates: How often one client may call.
        is_open: Whether a caller without token and certificate may do everything: on loopback, or
            where the operator has said so.
        certificate_names_engines: Whether an engine must bear a name of its certificate.
    """

    def __init__(
        self,
        access: AccessList,
        rates: ClientRates,
        *,
        is_open: bool,
        certificate_names_engines: bool = True,
    ) -> None:
        """Begins with the clients known now."""
        self.access = access
        self._rates = rates
        self._is_open = is_open
        self._certificate_names_engines = certificate_names_engines

    def admit(self, context: Any, *roles: Role, cost: float = 1.0) -> Caller:
        """The caller, if it may make a call that needs one of these roles.

        Args:
            context: The call's.
            roles: Those it needs one of.
            cost: What the call takes out of its client's bucket.

        Raises:
            RefusalError: RESOURCE_EXHAUSTED, UNAUTHENTICATED or PERMISSION_DENIED.
        """
        # By address first, so that guessing tokens is slow too.
        if not self._rates.take(_host(context.peer()), cost):
            raise _too_fast("this address")
        caller = self._identify(context)
        if caller.role not in roles:
            raise RefusalError(
                grpc.StatusCode.PERMISSION_DENIED,
                "role",
                f"{caller.name} has the role {caller.role}; this call needs {' or '.join(roles)}",
            )
        return caller

    def why_no_longer(self, caller: Caller) -> RefusalError | None:
        """Why a caller that was admitted would not be today; None where it would be."""
        if caller.client is None or caller.client in self.access.clients:
            return None
        text = f"{caller.name} is no longer known, or known otherwise"
        return RefusalError(grpc.StatusCode.UNAUTHENTICATED, "access_changed", text)

    def _identify(self, context: Any) -> Caller:
        names = certificate_names(context.auth_context())
        token = _bearer_token(context.invocation_metadata())
        client = self.access.by_token(token) if token is not None else None
        if token is not None and client is None:
            raise _unknown("the token is not known")
        if client is None:
            client = self.access.by_certificate(names)
        if client is not None:
            scopes = [client.scope]
            if names and client.certificate is None and self._certificate_names_engines:
                scopes.append(certificate_scope(names))
            return Caller(client.name, client.role, tuple(scopes), client)
        if names:
            scope = (certificate_scope(names),) if self._certificate_names_engines else ()
            return Caller(names[0], Role.ENGINE, scope)
        if self._is_open:
            return Caller("anyone", Role.ADMIN)
        raise _unknown("a token is needed: metadata `authorization: Bearer TOKEN`")


def check_speaks_for(caller: Caller, key: EngineKey) -> None:
    """Refuses a caller that is not the engine it says it is.

    Raises:
        RefusalError: PERMISSION_DENIED.
    """
    if not caller.may_speak_for(key):
        raise RefusalError(
            grpc.StatusCode.PERMISSION_DENIED,
            "not_its_engine",
            f"{caller.name} may not speak for engine {key}",
        )


def _bearer_token(metadata: Any) -> str | None:
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            if not value.lower().startswith(_BEARER):
                raise _unknown("authorization is not of the form `Bearer TOKEN`")
            return value[len(_BEARER) :].strip()
    return None


def _host(peer: str) -> str:
    """`ipv4:10.0.0.1:1234` without its port."""
    return peer.rpartition(":")[0]


def _unknown(text: str) -> RefusalError:
    return RefusalError(grpc.StatusCode.UNAUTHENTICATED, "unknown_caller", text)


def _too_fast(who: str) -> RefusalError:
    return RefusalError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "too_many_calls", f"{who} makes too many calls"
    )
