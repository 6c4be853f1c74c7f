"""What `batchpilot policies explain` says of each policy."""

import re

import pytest

from batchpilot.__main__ import main
from batchpilot.agents.catalog import POLICIES, SELF_CONTAINED, PolicySpec
from batchpilot.agents.parameters import ConfigError

LINE = re.compile(r"  (\w+)(?:=(\S+)| \(required\))?  +\S.*")


def explained(capsys, *name):
    assert main(["policies", "explain", *name]) == 0
    return capsys.readouterr().out


def test_all_in_brief_are_every_policy_by_its_first_line(capsys):
    text = explained(capsys)
    for name, kind in POLICIES.items():
        assert f"{name}: {kind.build.__doc__.splitlines()[0]}\n" in text


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_its_keys_and_defaults_are_those_that_a_setting_takes(capsys, name):
    text = explained(capsys, name)
    for part in ("Formula", "Limitations:", "Parameters:"):
        assert part in text
    assert "Args:" not in text
    lines = text.partition("Parameters:\n\n")[2].splitlines()
    found = dict(LINE.fullmatch(line).groups() for line in lines)
    assert tuple(found) == POLICIES[name].parameters.names()
    given = {key: value for key, value in found.items() if value}
    assert PolicySpec(name, given).build({"itl_slo_ms": 50.0})


def test_what_a_value_may_be_is_said(capsys):
    text = explained(capsys, "memory+sla")
    assert "tolerance=0.1          eps_D as a share of the target" in text
    assert "(above 0, below 1)" in text
    assert "the memory rule (memory, memory-clt, memory-peak)" in text


def test_a_name_that_nobody_has_is_bad_input(capsys):
    with pytest.raises(ConfigError):
        PolicySpec("memry").build()
    assert main(["policies", "explain", "memry"]) == 2
    assert "unknown policy 'memry'; known: static, memory" in capsys.readouterr().err
