"""What each policy that a setting can name decides by, and the parameters it takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from batchpilot.agents.catalog import POLICIES, policy_kind
from batchpilot.agents.parameters import range_text

#: Where a docstring turns from the policy to its Python interface.
_SECTIONS = re.compile(r"\n\n(?:Args|Attributes|Raises):\n")


def explain_all() -> str:
    """Every policy in a line, with its parameters below."""
    parts = []
    for name in POLICIES:
        headline = _docstring(name).partition("\n")[0]
        parts.append("\n".join((f"{name}: {headline}", *_parameters(name))))
    return "\n\n".join(parts)


def explain(name: str) -> str:
    """One policy at length: formula, regimes, limitations, parameters.

    Raises:
        ConfigError: No policy has that name.
    """
    policy_kind(name)
    text = _SECTIONS.split(_docstring(name))[0]
    return "\n".join((f"{name}: {text}", "", "Parameters:", "", *_parameters(name)))


def _docstring(name: str) -> str:
    return inspect.cleandoc(POLICIES[name].build.__doc__ or "")


def _parameters(name: str) -> Iterator[str]:
    items = fields(POLICIES[name].parameters)
    keys = [_key(item) for item in items]
    width = max(map(len, keys), default=0)
    for item, key in zip(items, keys, strict=True):
        allowed = range_text(item.metadata)
        yield f"  {key:{width}}  {item.metadata['help']}{f' ({allowed})' if allowed else ''}"
    if not items:
        yield "  no parameters"


def _key(item: Field[Any]) -> str:
    """`key=default`; the bare key where there is no default that could be written."""
    if item.default is MISSING:
        return f"{item.name} (required)"
    return item.name if item.default in (None, "") else f"{item.name}={item.default}"
