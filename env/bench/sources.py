"""Which of batchpilot's own sources decide what a run gives, as one digest.

A run hangs on the engine's code, which is the same for every contestant, and on the code of the
policy that steers it. Each is found by following the imports inside batchpilot from where it
starts, so that a changed policy leaves the finished runs of all others as good as they were.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Container, Iterable, Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path

from batchpilot.agents.catalog import policy_kind

_PACKAGE = "batchpilot"
#: Where a run starts. The hook is named by its class path only, so imports do not lead to it.
_ENGINE = ("batchpilot.env.virtual_engine", "batchpilot.env.bench.runner")
_HOOK = ("batchpilot.scheduler_hook.scheduler",)
#: What it is given; and who puts it together, whose imports lead to every policy.
_SERVED = ("batchpilot.env.workloads",)
_PUT_TOGETHER = ("batchpilot.env.bench.cells", "batchpilot.env.bench.plan")
#: What is not followed from the engine. The catalog names every policy and decides nothing: all of
#: them would count as one. The other two report and talk to a service, which no such run does.
_ASIDE = (
    "batchpilot.agents.catalog",
    "batchpilot.scheduler_hook.report",
    "batchpilot.scheduler_hook.remote_link",
)


@lru_cache(maxsize=64)
def sources_digest(policy: str | None) -> str:
    """The digest of all code that a run goes through.

    Args:
        policy: The name of the policy that steers, without its parameters; None where vLLM is left
            alone.

    Raises:
        ConfigError: No policy has that name.
    """
    modules = set(imported((*_ENGINE, *_HOOK, *_SERVED), without=_ASIDE)) | {*_PUT_TOGETHER}
    if policy is not None:
        kind = policy_kind(policy)
        modules |= set(imported((kind.build.__module__, kind.parameters.__module__)))
    sha = hashlib.sha256()
    for module in sorted(modules):
        sha.update(module.encode())
        sha.update(_source(module).read_bytes())
    return sha.hexdigest()


def imported(roots: Iterable[str], without: Container[str] = ()) -> list[str]:
    """Modules of batchpilot that these import, directly or not, themselves among them.

    Imports inside functions count too.

    Args:
        roots: Full names, such as "batchpilot.agents.sla".
        without: Modules that are neither counted nor followed.
    """
    found: set[str] = set()
    open_ends = list(roots)
    while open_ends:
        module = open_ends.pop()
        if module in found or module in without:
            continue
        found.add(module)
        open_ends += _imports(module)
    return sorted(found)


@lru_cache(maxsize=1024)
def _imports(module: str) -> tuple[str, ...]:
    tree = ast.parse(_source(module).read_bytes())
    return tuple(dict.fromkeys(name for node in ast.walk(tree) for name in _named_by(node)))


def _named_by(node: ast.AST) -> Iterator[str]:
    """The modules of batchpilot that an import statement names; a package names its own file."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        # What is imported from a package may be a module or something inside its own file.
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    else:
        return
    for name in names:
        if name.startswith(f"{_PACKAGE}.") and _source(name).is_file():
            yield name


def _source(module: str) -> Path:
    """The file of a module, whether there is one or not."""
    parts = module.split(".")[1:]
    path = Path(str(resources.files(_PACKAGE))).joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
