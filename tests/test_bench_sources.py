"""A kept run is found again only under the code that made it, and only its own code counts."""

import pytest

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench import sources
from batchpilot.env.bench.sources import imported, sources_digest


@pytest.fixture
def edited(monkeypatch, tmp_path):
    """Makes a module's file look changed."""
    plain = sources._source

    def edit(module):
        changed = tmp_path / f"{module}.py"
        changed.write_bytes(plain(module).read_bytes() + b"\n# changed\n")
        monkeypatch.setattr(sources, "_source", lambda m: changed if m == module else plain(m))
        sources_digest.cache_clear()

    yield edit
    sources_digest.cache_clear()


def test_imports_are_followed_to_their_end():
    found = imported(["batchpilot.agents.combined"])
    assert "batchpilot.agents.combined" in found
    assert "batchpilot.agents.survival" in found  # by memory_peak and lengths
    assert "batchpilot.agents.trtllm" not in found
    assert "batchpilot.env.virtual_engine" not in found


@pytest.mark.parametrize(
    ("module", "moved"),
    [
        ("batchpilot.agents.sla", {"sla", "memory+sla"}),
        ("batchpilot.agents.static", {"static"}),
        ("batchpilot.agents.shield", {None, "static", "sla", "memory+sla"}),
        ("batchpilot.scheduler_hook.hook", {None, "static", "sla", "memory+sla"}),
        ("batchpilot.env.scheduler_core", {None, "static", "sla", "memory+sla"}),
        ("batchpilot.env.bench.cells", {None, "static", "sla", "memory+sla"}),
        ("batchpilot.env.workloads", {None, "static", "sla", "memory+sla"}),
        ("batchpilot.env.bench.figures", set()),
        ("batchpilot.scheduler_hook.report", set()),
    ],
)
def test_a_changed_file_touches_the_runs_that_go_through_it(module, moved, edited):
    policies = (None, "static", "sla", "memory+sla")
    before = {policy: sources_digest(policy) for policy in policies}
    edited(module)
    assert {policy for policy in policies if sources_digest(policy) != before[policy]} == moved


def test_an_unknown_policy_has_no_digest():
    with pytest.raises(ConfigError, match="unknown policy 'nothing'"):
        sources_digest("nothing")
