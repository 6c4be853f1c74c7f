"""The syntax trees of one vLLM release, and the questions the proof asks of them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import TypeVar

from compat_sources import Sources

Node = TypeVar("Node", bound=ast.AST)


@lru_cache(maxsize=64)
def _parsed(text: str) -> ast.Module:
    """A file's tree, which nobody changes; edited releases share most of their files."""
    return ast.parse(text)


class Code:
    """The syntax trees of one release, and what their classes hold.

    Args:
        sources: The release.
    """

    def __init__(self, sources: Sources) -> None:
        """Parses every file once."""
        self.trees = {path: _parsed(text) for path, text in sources.texts.items()}
        self.classes: dict[str, ast.ClassDef] = {}
        self.functions: dict[str, ast.FunctionDef] = {}
        for node in (node for tree in self.trees.values() for node in tree.body):
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node

    @cached_property
    def schedule(self) -> ast.FunctionDef:
        """`Scheduler.schedule`; empty where there is none."""
        return self.method("Scheduler", "schedule") or empty_function("schedule")

    def method(self, class_name: str, name: str) -> ast.FunctionDef | None:
        """A method, property or class method that this very class defines."""
        return next((f for f in self.methods(class_name) if f.name == name), None)

    def methods(self, class_name: str) -> list[ast.FunctionDef]:
        """All that this very class defines."""
        owner = self.classes.get(class_name)
        return [n for n in owner.body if isinstance(n, ast.FunctionDef)] if owner else []

    def holds(self, class_name: str, path: str) -> bool:
        """Whether every instance has a path such as `kv_cache_manager.block_pool`."""
        name, _, rest = path.partition(".")
        if not self._has(class_name, name):
            return False
        if not rest:
            return True
        held = self._type_of(class_name, name)
        return held is not None and self.holds(held, rest)

    def called_from(self, class_name: str, name: str) -> set[str]:
        """The names of a method and of all methods of `self` that it may call."""
        found: set[str] = set()
        to_visit = [name]
        while to_visit:
            current = to_visit.pop()
            function = self.method(class_name, current)
            if current in found or function is None:
                continue
            found.add(current)
            to_visit += [
                node.func.attr
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) in ("self", "super()")
            ]
        return found

    def _has(self, class_name: str, name: str) -> bool:
        if self.method(class_name, name) is not None:
            return True
        sets = sets_self(name)
        field = self._field(class_name, name)
        if field is not None and not _set_after_init(field):
            return True
        init, post_init = (self.method(class_name, f"__{n}__") for n in ("init", "post_init"))
        if field is not None:
            return post_init is not None and any(map(sets, ast.walk(post_init)))
        return any(
            function is not None and always(function.body, sets) for function in (init, post_init)
        )

    def _field(self, class_name: str, name: str) -> ast.AnnAssign | None:
        """A dataclass field."""
        owner = self.classes.get(class_name)
        if owner is None or not owner.decorator_list:
            return None
        fields = (node for node in owner.body if isinstance(node, ast.AnnAssign))
        return next((field for field in fields if ast.unparse(field.target) == name), None)

    def _type_of(self, class_name: str, name: str) -> str | None:
        """The class of an attribute, where annotations and constructor calls tell it."""
        field = self._field(class_name, name)
        if field is not None:
            return self._named_class(field.annotation)
        init = self.method(class_name, "__init__")
        if init is None:
            return None
        for node in ast.walk(init):
            if sets_self(name)(node) and isinstance(node, ast.Assign | ast.AnnAssign):
                return self._class_of(node.value, class_name, init)
        return None

    def _class_of(
        self, value: ast.expr | None, class_name: str, function: ast.FunctionDef
    ) -> str | None:
        match value:
            case ast.Name(id=name):
                annotations = {arg.arg: arg.annotation for arg in function.args.args}
                return self._named_class(annotations.get(name))
            case ast.Attribute(value=ast.Name(id="self"), attr=attr):
                return self._type_of(class_name, attr)
            case ast.Attribute(value=base, attr=attr):
                owner = self._class_of(base, class_name, function)
                return self._type_of(owner, attr) if owner else None
            case ast.Call(func=ast.Name(id=name)) if name in self.functions:
                return self._named_class(self.functions[name].returns)
            case ast.Call(func=ast.Name(id=name)):
                return name if name in self.classes else None
        return None

    def _named_class(self, annotation: ast.expr | None) -> str | None:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        names = (n.id for n in nodes([annotation or ast.Pass()], ast.Name))
        return next((name for name in names if name in self.classes), None)


def empty_function(name: str) -> ast.FunctionDef:
    """Stands for a method that is not there."""
    function = ast.parse(f"def {name}(self): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


def _set_after_init(field: ast.AnnAssign) -> bool:
    """Whether a field is `Field(init=False)` without a default: `__post_init__` must set it."""
    if not isinstance(field.value, ast.Call):
        return False
    words = {word.arg: ast.unparse(word.value) for word in field.value.keywords}
    return words.get("init") == "False" and not words.keys() & {"default", "default_factory"}


def sets_self(name: str) -> Callable[[ast.AST], bool]:
    """Whether a node assigns an attribute of `self`."""

    def sets(node: ast.AST) -> bool:
        if isinstance(node, ast.Assign):
            return f"self.{name}" in map(ast.unparse, node.targets)
        return (
            isinstance(node, ast.AnnAssign)
            and node.value is not None
            and ast.unparse(node.target) == f"self.{name}"
        )

    return sets


def always(block: Sequence[ast.stmt], does: Callable[[ast.AST], bool]) -> bool:
    """Whether every way through a block passes a simple statement that `does` it."""
    for statement in block:
        match statement:
            case ast.If(body=body, orelse=orelse):
                found = always(body, does) and always(orelse, does)
            case ast.With(body=body) | ast.Try(body=body):
                found = always(body, does)
            case ast.For() | ast.While() | ast.FunctionDef() | ast.Match():
                found = False
            case _:
                found = any(does(node) for node in ast.walk(statement))
        if found:
            return True
    return False


def nodes(roots: Iterable[ast.AST], kind: type[Node]) -> list[Node]:
    """All nodes of one kind in some trees."""
    return [node for root in roots for node in ast.walk(root) if isinstance(node, kind)]
