"""Every setting of the service with its default, as a YAML file that explains itself.

A key without a default stands behind a `#`, so that the text can be used as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import yaml

from batchpilot.agents.parameters import Parameters
from batchpilot.service.settings import NO_SETTING, SECTIONS, GroupSettings

_INDENT = "  "
_SAMPLE_GROUP = """\
groups:  # what a group does not set is that of default
# chat:
#   policy: memory+sla
#   itl_slo_ms: 50
"""


def settings_text() -> str:
    """The text; what `read_settings` makes of it is every default."""
    sections = [_section(name, kind) for name, kind in SECTIONS.items()]
    return "\n".join((*sections, _section("default", GroupSettings), _SAMPLE_GROUP))


def _section(name: str, kind: type[Parameters]) -> str:
    title = (kind.__doc__ or "").partition(": ")[2].splitlines()[0].rstrip(".")
    return "\n".join((f"{name}:  # {title}", *_keys(name, kind))) + "\n"


def _keys(section: str, kind: type[Parameters]) -> Iterator[str]:
    for item in fields(kind):
        if (section, item.name) != NO_SETTING:
            sign = "# " if item.default is None else ""
            value = "" if item.default is None else " " + _scalar(item.default)
            yield f"{_INDENT}{sign}{item.name}:{value}  # {item.metadata['help']}"


def _scalar(value: object) -> str:
    """A value as YAML writes it in a line."""
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
