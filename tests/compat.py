"""Proves from vLLM's sources that `scheduler_hook/vllm_adapter.py` fits its releases.

    python tests/compat.py                  every release, one a minor version from 0.16 to 0.33
    python tests/compat.py 0.24.0 0.25.1    these

Downloads the wheels into `.cache/wheels` (2 GB in all, kept), reads the scheduler's sources out of
them, and looks in their syntax trees for every attribute, call and comparison the adapter relies
on. Nothing of a wheel is installed or run. Prints a table; exit code 1 when something is missing.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from compat_code import Code, always, empty_function, nodes, sets_self
from compat_sources import ENGINE_CORE, RELEASES, ROOT, Sources, SourcesError, read_release

from batchpilot.scheduler_hook.kv_groups import WINDOWS
from batchpilot.scheduler_hook.vllm_adapter import (
    CUT_SHORT,
    OUTPUT_PARTS,
    PARTS,
    REQUEST_PARTS,
    WRAPPED_METHODS,
    Era,
    era_of,
)

#: Final statuses the adapter counts as a whole output; the others are its `CUT_SHORT`.
WHOLE = {"FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION"}

OPERATORS: Mapping[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.GtE: ">=",
    ast.Gt: ">",
    ast.LtE: "<=",
    ast.Lt: "<",
}

#: What `schedule()` must count against the limit: the sequences a snapshot reports as held.
COUNTED = {
    "==": {"len(self.running)"},
    ">=": {"len(self.running)", "self.num_waiting_for_streaming_input"},
}


@dataclass(frozen=True)
class Fact:
    """Something the adapter relies on.

    Attributes:
        claim: What it is.
        holds: Whether this release's source says so.
    """

    claim: str
    holds: bool


@dataclass(frozen=True)
class Report:
    """What was proved of one release.

    Attributes:
        version: The release.
        admission: The comparison that stops admission, as the source has it.
        facts: Everything that was looked for.
    """

    version: str
    admission: str
    facts: tuple[Fact, ...]

    @property
    def missing(self) -> list[str]:
        """The claims that this release does not bear out."""
        return [fact.claim for fact in self.facts if not fact.holds]


def prove(sources: Sources) -> Report:
    """Looks in a release's source for everything the adapter relies on."""
    era = era_of(sources.version)
    if era is None:
        unknown = Fact(f"the adapter knows vLLM {sources.version}", False)
        return Report(sources.version, "unknown", (unknown,))
    code = Code(sources)
    facts = (
        *_parts(code, era),
        *_wrapped_methods(code),
        *_admission_limit(code, era),
        *_limits_are_read_live(code, era),
        *_token_budget(code),
        *_kv_groups(code),
        *_admissions(code),
        *_preemptions(code),
        *_step_output(code),
        *_queues(code),
        *_configuration(code),
        *_engine_core(code),
    )
    stops = _admission_stops(code, era)
    return Report(sources.version, str(stops[0]) if stops else "not found", facts)


def _parts(code: Code, era: Era) -> Iterator[Fact]:
    for path in (*PARTS, era.limit):
        yield Fact(f"Scheduler has {path}", code.holds("Scheduler", path))
    for part in REQUEST_PARTS:
        yield Fact(f"Request has {part}", code.holds("Request", part))
    for part in OUTPUT_PARTS:
        yield Fact(f"SchedulerOutput has {part}", code.holds("SchedulerOutput", part))
    owner = code.classes.get("RequestStatus")
    assigned = [node for node in owner.body if isinstance(node, ast.Assign)] if owner else []
    statuses = {ast.unparse(node.targets[0]) for node in assigned}
    for name in CUT_SHORT:
        yield Fact(f"RequestStatus has {name}", name in statuses)
    unknown = {name for name in statuses if name.startswith("FINISHED_")} - WHOLE - {*CUT_SHORT}
    yield Fact(f"every final status is a known one{_listed(unknown)}", not unknown)


def _wrapped_methods(code: Code) -> Iterator[Fact]:
    """Each wrapper in `scheduler_hook/scheduler.py` takes what vLLM's own method takes."""
    tree = ast.parse((ROOT / "scheduler_hook" / "scheduler.py").read_text("utf-8"))
    wrapping = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "_Steered")
    wrappers = {node.name: node for node in wrapping.body if isinstance(node, ast.FunctionDef)}
    for name in WRAPPED_METHODS:
        own = code.method("Scheduler", name)
        fits = own is not None and name in wrappers and _takes_all_of(wrappers[name], own)
        yield Fact(f"Scheduler.{name} takes what its wrapper passes on", fits)
        override = code.method("AsyncScheduler", name)
        fits = override is None or _takes_all_of(wrappers[name], override)
        yield Fact(f"AsyncScheduler.{name}, where there is one, takes the same", fits)


def _takes_all_of(wrapper: ast.FunctionDef, own: ast.FunctionDef) -> bool:
    """Whether every call that fits `own` fits `wrapper`, its named parameters meaning the same."""
    ours = [arg.arg for arg in wrapper.args.args]
    theirs = [arg.arg for arg in (*own.args.posonlyargs, *own.args.args)]
    passes_positions = wrapper.args.vararg is not None or (
        len(ours) == len(theirs) and own.args.vararg is None
    )
    passes_keywords = wrapper.args.kwarg is not None or not (own.args.kwonlyargs or own.args.kwarg)
    return theirs[: len(ours)] == ours and passes_positions and passes_keywords


@dataclass(frozen=True)
class AdmissionStop:
    """The `if count OP limit: break` that ends a step's admissions.

    Attributes:
        terms: The terms of `count`.
        operator: The comparison.
        limit: The scheduler's attribute it compares with.
        line: Where it is.
    """

    terms: frozenset[str]
    operator: str
    limit: str
    line: int

    def __str__(self) -> str:
        """As the source has it, shorter."""
        return f"{' + '.join(sorted(self.terms))} {self.operator} {self.limit}".replace("self.", "")


def _admission_stops(code: Code, era: Era) -> list[AdmissionStop]:
    """Every `if ... self.<limit>: break` in the part of `schedule()` that admits."""
    found = []
    for node in nodes(_admission_part(code), ast.If):
        test = node.test
        if (
            isinstance(test, ast.Compare)
            and ast.unparse(test.comparators[0]) == f"self.{era.limit}"
            and isinstance(node.body[0], ast.Break)
        ):
            terms = frozenset(map(ast.unparse, _terms(_resolved(code, test.left, node.lineno))))
            operator = OPERATORS.get(type(test.ops[0]), "?")
            found.append(AdmissionStop(terms, operator, era.limit, node.lineno))
    return found


def _resolved(code: Code, value: ast.expr, line: int) -> ast.expr:
    """What a local name of `schedule()` stands for at a line: its last assignment before it."""
    assigned = [
        (node.lineno, node.value)
        for node in nodes([code.schedule], ast.Assign)
        if ast.unparse(node.targets[0]) == ast.unparse(value) and node.lineno < line
    ]
    return max(assigned, key=lambda pair: pair[0])[1] if assigned else value


def _terms(value: ast.expr) -> list[ast.expr]:
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return [*_terms(value.left), *_terms(value.right)]
    return [value]


def _admission_limit(code: Code, era: Era) -> Iterator[Fact]:
    stops = _admission_stops(code, era)
    yield Fact(f"schedule() stops admitting at self.{era.limit}, once", len(stops) == 1)
    yield Fact(
        f"it compares with {era.comparison}",
        [stop.operator for stop in stops] == [era.comparison],
    )
    counted = COUNTED[era.comparison]
    yield Fact(
        f"it counts {' + '.join(sorted(counted))}", [stop.terms for stop in stops] == [counted]
    )
    appended = _lines(code, "self.running.append(request)")
    yield Fact(
        "it compares before it admits",
        bool(stops and appended) and max(stop.line for stop in stops) < min(appended),
    )
    yield Fact(
        "schedule() asserts len(self.running) <= self.max_num_running_reqs",
        "len(self.running) <= self.max_num_running_reqs" in _assertions(code),
    )


def _limits_are_read_live(code: Code, era: Era) -> Iterator[Fact]:
    """Both limits are read in `schedule()` and what it calls, and kept nowhere else."""
    in_schedule = code.called_from("Scheduler", "schedule")
    for name in (era.limit, "max_num_scheduled_tokens"):
        readers = {
            function.name
            for owner in ("Scheduler", "AsyncScheduler")
            for function in code.methods(owner)
            if _reads(function, name)
        }
        elsewhere = readers - in_schedule
        yield Fact(f"only schedule() reads self.{name}{_listed(elsewhere)}", not elsewhere)
        copies = [
            node
            for owner in ("Scheduler", "AsyncScheduler")
            for function in code.methods(owner)
            for node in nodes([function], ast.Assign)
            if _reads(node.value, name) and ast.unparse(node.targets[0]).startswith("self.")
        ]
        yield Fact(f"no attribute keeps a copy of self.{name}", not copies)
        core = code.trees[ENGINE_CORE].body
        in_core = [n for n in nodes(core, ast.Attribute) if n.attr == name]
        yield Fact(f"the engine core does not read {name}", not in_core)


def _reads(node: ast.AST, name: str) -> bool:
    return any(
        isinstance(n, ast.Attribute)
        and n.attr == name
        and isinstance(n.ctx, ast.Load)
        and ast.unparse(n.value) == "self"
        for n in ast.walk(node)
    )


def _token_budget(code: Code) -> Iterator[Fact]:
    statements = [ast.unparse(node) for node in code.schedule.body]
    budget = "token_budget = self.max_num_scheduled_tokens"
    yield Fact(f"schedule() begins with {budget}", budget in statements)
    asserted = "total_num_scheduled_tokens <= self.max_num_scheduled_tokens"
    yield Fact(f"schedule() asserts {asserted}", asserted in _assertions(code))
    threshold = "self.scheduler_config.long_prefill_token_threshold"
    read = any(ast.unparse(node) == threshold for node in nodes([code.schedule], ast.Attribute))
    yield Fact(f"schedule() reads {threshold}", read)


def _kv_groups(code: Code) -> Iterator[Fact]:
    path = "kv_cache_spec.block_size"
    yield Fact(f"KVCacheGroupSpec has {path}", code.holds("KVCacheGroupSpec", path))
    for name, attribute in WINDOWS.items():
        yield Fact(f"{name} has {attribute}", code.holds(name, attribute))
    yield Fact("MambaSpec is a kind of layer that keeps one state", "MambaSpec" in code.classes)


def _running_part(code: Code) -> Sequence[ast.While]:
    """The loop of `schedule()` over RUNNING."""
    loops = (node for node in code.schedule.body if isinstance(node, ast.While))
    return [loop for loop in loops if "len(self.running)" in ast.unparse(loop.test)][:1]


def _admission_part(code: Code) -> Sequence[ast.stmt]:
    """The statements of `schedule()` under `if not preempted_reqs`."""
    for node in code.schedule.body:
        if isinstance(node, ast.If):
            both = isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
            conditions = (
                node.test.values if both and isinstance(node.test, ast.BoolOp) else [node.test]
            )
            if "not preempted_reqs" in map(ast.unparse, conditions):
                return node.body
    return []


def _admissions(code: Code) -> Iterator[Fact]:
    running, admitting = _running_part(code), _admission_part(code)
    yield Fact("schedule() loops over RUNNING", bool(running))
    yield Fact("schedule() admits only `if not preempted_reqs`", bool(admitting))
    yield Fact(
        "it admits after that loop",
        bool(running and admitting) and running[0].lineno < admitting[0].lineno,
    )
    grown = [node for node in _changes(code.schedule) if not _removes(node)]
    appended = [node for node in grown if ast.unparse(node) == "self.running.append(request)"]
    inside = {*nodes(admitting, ast.Call)}
    yield Fact("it admits by self.running.append(request)", bool(appended))
    yield Fact("and only there, and in no other way", bool(grown) and inside.issuperset(grown))
    yield Fact("at the end of RUNNING", len(appended) == len(grown))
    helpers = code.called_from("Scheduler", "schedule") - {"schedule"}
    changing = {
        name
        for owner in ("Scheduler", "AsyncScheduler")
        for name in helpers
        if (function := code.method(owner, name)) is not None and any(_changes(function))
    }
    yield Fact(f"nothing it calls changes RUNNING{_listed(changing)}", not changing)


def _changes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Whatever changes `self.running`: calls of its methods, `del`, and assignments."""
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr=attr)):
                if ast.unparse(owner) == "self.running" and attr not in ("index", "count", "copy"):
                    yield node
            case ast.Delete(targets=targets) | ast.Assign(targets=targets):
                if any(_is_running(target) for target in targets):
                    yield node
            case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
                if _is_running(target):
                    yield node


def _is_running(target: ast.expr) -> bool:
    target = target.value if isinstance(target, ast.Subscript) else target
    return ast.unparse(target) == "self.running"


def _removes(node: ast.AST) -> bool:
    if isinstance(node, ast.Delete):
        return any(_is_running(target) for target in node.targets)
    return isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "self.running.pop",
        "self.running.remove",
    )


def _preemptions(code: Code) -> Iterator[Fact]:
    """RUNNING loses a request inside `schedule()` exactly where `_preempt_request` is called."""
    covered: set[ast.AST] = set()
    calls = noted = 0
    for block in _blocks(code.schedule):
        for position, statement in enumerate(block):
            if not _calls(statement, "self._preempt_request"):
                continue
            taking, after = block[max(0, position - 1) : position], block[position + 1 :]
            calls += 1
            noted += bool(after) and _calls(after[0], "preempted_reqs.append")
            if always(taking, _removes):
                covered |= {node for node in ast.walk(taking[0]) if _removes(node)}
    removals = {node for node in ast.walk(code.schedule) if _removes(node)}
    yield Fact("schedule() calls self._preempt_request(), once", calls == 1)
    yield Fact("each victim it takes from RUNNING is then preempted", removals == covered != set())
    yield Fact("and listed in preempted_reqs", calls > 0 and noted == calls)
    all_calls = [
        node
        for node in nodes([code.schedule], ast.Call)
        if ast.unparse(node.func) == "self._preempt_request"
    ]
    yield Fact("it preempts only what it took from RUNNING", len(all_calls) == calls)
    within = [node for part in _running_part(code) for node in ast.walk(part) if _removes(node)]
    yield Fact("it takes victims only while it loops over RUNNING", removals == {*within} != set())


def _blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield block


def _calls(statement: ast.stmt, function: str) -> bool:
    """Whether a statement is just a call of `function`."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and ast.unparse(statement.value.func) == function
    )


def _step_output(code: Code) -> Iterator[Fact]:
    built = [
        node
        for node in nodes([code.schedule], ast.Call)
        if ast.unparse(node.func) == "SchedulerOutput"
    ]
    words = {ast.unparse(word) for call in built for word in nodes([call], ast.keyword)}
    updates = _lines(code, "self._update_after_schedule(scheduler_output)")
    yield Fact("schedule() builds one SchedulerOutput", len(built) == 1)
    for part in (
        "finished_req_ids=self.finished_req_ids",
        "num_scheduled_tokens=num_scheduled_tokens",
    ):
        yield Fact(f"with {part}", part in words)
    yield Fact(
        "then calls self._update_after_schedule()",
        bool(built) and len(updates) == 1 and built[0].lineno < updates[0],
    )
    yield Fact(
        "and returns it",
        isinstance(code.schedule.body[-1], ast.Return)
        and ast.unparse(code.schedule.body[-1]) == "return scheduler_output",
    )
    update = code.method("Scheduler", "_update_after_schedule") or empty_function("none")
    yield Fact(
        "that replaces self.finished_req_ids, and does not empty it",
        always(update.body, sets_self("finished_req_ids"))
        and not any(
            _calls(node, "self.finished_req_ids.clear")
            for function in code.methods("Scheduler")
            for node in nodes([function], ast.Expr)
        ),
    )
    yield Fact("and sets each scheduled request's is_prefill_chunk", _marks_prefills(update))


def _marks_prefills(update: ast.FunctionDef) -> bool:
    loops = (node for node in update.body if isinstance(node, ast.For))
    targets = {
        ast.unparse(node.targets[0])
        for loop in loops
        if ast.unparse(loop.iter) == "num_scheduled_tokens.items()"
        for node in loop.body
        if isinstance(node, ast.Assign)
    }
    return "request.is_prefill_chunk" in targets


def _queues(code: Code) -> Iterator[Fact]:
    first_come = code.classes.get("FCFSRequestQueue")
    bases = [ast.unparse(base) for base in first_come.bases] if first_come else []
    yield Fact("the first-come queue is a deque", any(base.startswith("deque") for base in bases))
    for name in ("FCFSRequestQueue", "PriorityRequestQueue"):
        peeks = code.method(name, "peek_request")
        yield Fact(f"{name} has peek_request()", peeks is not None and len(peeks.args.args) == 1)
    yield Fact(
        "both have a length",
        all(code.method(n, "__len__") for n in ("RequestQueue", "PriorityRequestQueue")),
    )
    counts = code.method("Scheduler", "get_request_counts") or empty_function("none")
    returned = counts.body[-1]
    pair = returned.value if isinstance(returned, ast.Return) else None
    running, waiting = map(ast.unparse, pair.elts) if isinstance(pair, ast.Tuple) else ("", "")
    yield Fact(
        "get_request_counts() returns len(self.running) first", running == "len(self.running)"
    )
    yield Fact("then len(self.waiting) and whatever else waits", "len(self.waiting)" in waiting)


def _configuration(code: Code) -> Iterator[Fact]:
    for part in ("additional_config", "scheduler_config"):
        yield Fact(f"VllmConfig has {part}", code.holds("VllmConfig", part))
    base = code.classes.get("AsyncScheduler")
    bases = [ast.unparse(node) for node in base.bases] if base else []
    yield Fact("AsyncScheduler is a Scheduler", bases == ["Scheduler"])
    update = code.method("AsyncScheduler", "_update_after_schedule")
    yield Fact(
        "AsyncScheduler keeps Scheduler's _update_after_schedule()",
        update is None
        or any(_calls(node, "super()._update_after_schedule") for node in update.body),
    )
    choose = code.method("SchedulerConfig", "get_scheduler_cls") or empty_function("none")
    returned = {ast.unparse(node) for node in nodes([choose], ast.Return)}
    yield Fact(
        "--scheduler-cls may name a class by its path",
        "return resolve_obj_by_qualname(self.scheduler_cls)" in returned,
    )


def _engine_core(code: Code) -> Iterator[Fact]:
    owner = [node for node in (code.classes.get("EngineCore"),) if node is not None]
    chosen = "Scheduler = vllm_config.scheduler_config.get_scheduler_cls()"
    yield Fact(f"EngineCore has {chosen}", chosen in map(ast.unparse, nodes(owner, ast.Assign)))
    calls = nodes(owner, ast.Call)
    built = [call for call in calls if ast.unparse(call.func) == "Scheduler"]
    by_keyword = [
        not call.args and "vllm_config=vllm_config" in map(ast.unparse, call.keywords)
        for call in built
    ]
    yield Fact("EngineCore builds it with keywords, vllm_config one of them", by_keyword == [True])
    called = {ast.unparse(call.func) for call in calls}
    for name in ("add_request", "schedule", "update_from_output", "shutdown"):
        yield Fact(f"EngineCore calls self.scheduler.{name}()", f"self.scheduler.{name}" in called)
    step = code.method("EngineCore", "step") or empty_function("none")
    scheduled = [
        ast.unparse(node.targets[0])
        for node in nodes([step], ast.Assign)
        if ast.unparse(node.value).startswith("self.scheduler.schedule(")
    ]
    taken_in = [
        ast.unparse(call.args[0])
        for call in nodes([step], ast.Call)
        if ast.unparse(call.func) == "self.scheduler.update_from_output" and call.args
    ]
    yield Fact(
        "EngineCore.step() hands schedule()'s output to update_from_output() first",
        scheduled == taken_in == ["scheduler_output"],
    )


def _lines(code: Code, statement: str) -> list[int]:
    """The lines of `schedule()` that hold just this call."""
    return [n.lineno for n in nodes([code.schedule], ast.Expr) if ast.unparse(n) == statement]


def _assertions(code: Code) -> set[str]:
    return {ast.unparse(node.test) for node in nodes([code.schedule], ast.Assert)}


def _listed(names: Iterable[str]) -> str:
    return "".join(f", but {name}" for name in sorted(names))


def read_touched(source: str) -> set[str]:
    """The paths from the scheduler, a request or an output that a module of the hook touches.

    Args:
        source: The module's text. Its names `scheduler`, `request` and `output`, and what it
            assigns from them, are followed.

    Returns:
        Paths such as `scheduler.kv_cache_manager.block_pool` and `request.status.name`.
    """
    tree = ast.parse(source)
    known = {name: name for name in ("scheduler", "request", "output")}
    known |= {"self._scheduler": "scheduler"}
    touched: set[str] = set()
    for _ in range(2):  # the second time with every name the first one learned
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and (path := _path(node.value, known)):
                known.update((ast.unparse(target), path) for target in node.targets)
            elif isinstance(node, ast.Attribute) and (path := _path(node, known)):
                touched.add(path)
    return touched - {"scheduler", "request", "output"}


def _path(node: ast.expr, known: Mapping[str, str]) -> str | None:
    """The path a chain of attributes takes from a known name."""
    name = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
    if name in known:
        return known[name]
    if isinstance(node, ast.Attribute) and (owner := _path(node.value, known)):
        return f"{owner}.{node.attr}"
    return None


def listed_paths() -> set[str]:
    """The paths the adapter's tables list, written as `read_touched` writes them."""
    return {
        *(f"scheduler.{part}" for part in PARTS),
        *(f"request.{part}" for part in REQUEST_PARTS),
        *(f"output.{part}" for part in OUTPUT_PARTS),
    }


def unlisted(source: str) -> set[str]:
    """What a module of the hook touches though the adapter's tables do not list it.

    A step on the way to a listed path is covered, and so is what the value of a listed path
    offers, such as a list's length.
    """
    listed = listed_paths()
    return {
        path
        for path in read_touched(source)
        if not any(f"{path}.".startswith(f"{p}.") or f"{p}.".startswith(f"{path}.") for p in listed)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Proves releases and prints one line for each; 1 if something is missing, 2 if unreadable."""
    parser = argparse.ArgumentParser(description="Proves the vLLM adapter from vLLM's sources.")
    parser.add_argument("release", nargs="*", default=RELEASES, help="such as 0.32.0")
    releases = parser.parse_args(arguments).release
    print(f"{'vLLM':8} {'facts':>7}  admission stops when")
    failed = False
    for release in releases:
        try:
            report = prove(read_release(release))
        except SourcesError as error:
            print(f"compat: {error}", file=sys.stderr)
            return 2
        proved = f"{len(report.facts) - len(report.missing)}/{len(report.facts)}"
        print(f"{report.version:8} {proved:>7}  {report.admission}")
        for claim in report.missing:
            print(f"{'':18}MISSING: {claim}")
        failed = failed or bool(report.missing)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
