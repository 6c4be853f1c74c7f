"""Every setting of the service with its default, as a YAML file that explains itself.

Every key stands behind a `#`: who takes one up sets it, and the rest keeps the defaults of whatever
release reads the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import yaml

from batchpilot.agents.parameters import Parameters
from batchpilot.service.settings import NO_SETTING, SECTIONS, GroupSettings

_HEADING = """\
# Every setting of `batchpilot serve`, with its default.

"""
_KEY = "  # "
_GROUPS = """\
groups:  # each sets what differs from default
  # chat:
  #   policy: memory+sla
  #   itl_slo_ms: 50
"""


def settings_text() -> str:
    """The text; what `read_settings` makes of it is every default."""
    sections = [_section(name, kind, _title(kind)) for name, kind in SECTIONS.items()]
    sections.append(_section("default", GroupSettings, "of groups that are not named below"))
    return _HEADING + "\n".join((*sections, _GROUPS))


def _section(name: str, kind: type[Parameters], title: str) -> str:
    return "\n".join((f"{name}:  # {title}", *_keys(name, kind))) + "\n"


def _title(kind: type[Parameters]) -> str:
    """What a section is about, from its class."""
    return (kind.__doc__ or "").partition(": ")[2].splitlines()[0].rstrip(".")


def _keys(section: str, kind: type[Parameters]) -> Iterator[str]:
    for item in fields(kind):
        if (section, item.name) != NO_SETTING:
            yield f"{_KEY}{item.name}: {_scalar(item.default)}  # {item.metadata['help']}"


def _scalar(value: object) -> str:
    """A value as YAML writes it in a line."""
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
