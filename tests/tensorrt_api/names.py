"""Which names each TensorRT version has, and which of them our code uses: needs no bindings.

``names.json`` holds names only. ``python -m tests.tensorrt_api.names`` writes it anew from the bindings.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tests.tensorrt_api.bindings import ROOT, VERSIONS, environment

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TABLE = Path(__file__).with_name("names.json")
# Names that the wrapping package leaves behind, not part of the interface.
LEFT = {"attr", "common_enter", "common_exit", "ctypes", "os", "sys", "tensorrt", "tensorrt_libs", "value", "warnings"}
ANY = "?"  # an object of a class that the syntax does not tell

Surface = dict[str, dict[str, list[str]]]


def surface() -> Surface:
    """In a process that has the bindings: class -> bases and own names; the module itself is ""."""
    import tensorrt

    from tests.tensorrt_api.stubs import classes_of

    public = sorted(name for name in vars(tensorrt) if not name.startswith("_") and name not in LEFT)
    found: Surface = {"": {"bases": [], "names": public}}
    classes = classes_of(tensorrt.tensorrt)
    for qualified, cls in classes.items():
        bases = [base.__qualname__ for base in cls.__bases__ if base.__qualname__ in classes]
        found[qualified] = {"bases": bases, "names": sorted(name for name in vars(cls) if not name.startswith("_"))}
    return found


def generate() -> str:
    """The text of the table, from all bindings."""
    surfaces: dict[str, Surface] = {}
    for version in VERSIONS:
        command = [sys.executable, "-m", __spec__.name, "--surface"]
        result = subprocess.run(command, env=environment(version), capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(result.stderr)
        surfaces[version] = json.loads(result.stdout)
    lines = []
    for name in sorted({name for found in surfaces.values() for name in found}):
        grouped: dict[str, list[str]] = {}
        for member in sorted({m for found in surfaces.values() for m in found.get(name, {}).get("names", [])}):
            having = [v for v in VERSIONS if member in surfaces[v].get(name, {}).get("names", [])]
            grouped.setdefault(" ".join(having), []).append(member)
        bases = sorted({base for found in surfaces.values() for base in found.get(name, {}).get("bases", [])})
        lines.append(f"{json.dumps(name)}: {json.dumps([bases, grouped])}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


@cache
def names(version: str) -> dict[str, frozenset[str]]:
    """Class -> all its public names in a version, those of its bases included; the module itself is ""."""
    table = json.loads(TABLE.read_text("utf-8"))

    def members(cls: str) -> frozenset[str]:
        bases, grouped = table[cls]
        own = [name for having, group in grouped.items() if version in having.split() for name in group]
        return frozenset(own).union(*map(members, bases))

    return {cls: members(cls) for cls in table}


@cache
def partial() -> frozenset[str]:
    """Members that some class has in some versions only, and that no class has in all of them.

    Single words (``mask``, ``precision``) are left out: an object that is not TensorRT's may have them, too.
    """
    kept: set[str] = set()
    lost: set[str] = set()
    for cls in names(VERSIONS[0]):
        having = [names(version)[cls] for version in VERSIONS]
        kept |= frozenset.intersection(*having)
        lost |= frozenset.union(*having)
    return frozenset(name for name in lost - kept if name.islower() and "_" in name)


@dataclass(frozen=True, order=True)
class Use:
    """One place that names something of TensorRT's: ``trt.A.b`` is ``("A", "b")``, ``x.b`` is ``(ANY, "b")``."""

    line: int
    chain: tuple[str, ...]
    guarded: bool = False

    def missing(self) -> list[str]:
        """Versions that lack it."""
        if self.chain[0] == ANY:
            return [v for v in VERSIONS if not any(self.chain[1] in found for found in names(v).values())]
        return [version for version in VERSIONS if not self._in(names(version))]

    def _in(self, table: dict[str, frozenset[str]]) -> bool:
        holder = ""
        for name in self.chain:
            if name not in table[holder]:
                return name.startswith("__")
            holder = f"{holder}.{name}".lstrip(".")
            holder = "ILogger.Severity" if holder == "Logger.Severity" else holder
            if holder not in table:
                return True  # a value: what it has is for mypy
        return True


def used_names(path: Path) -> list[Use]:
    """Every ``trt.X.Y`` in a file, and every ``x.y`` whose ``y`` is a member in some versions only.

    A use is guarded where ``hasattr`` has asked for the same name: in the true branch of an ``if``, in the rest of an
    ``and``, or after an ``if not hasattr(...)`` that leaves the block.
    """
    tree = ast.parse(path.read_text("utf-8"), str(path))
    finder = _Finder(tree)
    finder.block(tree.body, frozenset())
    return sorted(finder.uses)


def problems(paths: Iterable[Path]) -> list[str]:
    """Names that are missing from a version and that nothing guards: ``path:line: name is missing in ...``."""
    found = []
    for path in paths:
        for use in used_names(path):
            missing = [] if use.guarded else use.missing()
            if missing:
                found.append(f"{path}:{use.line}: {'.'.join(use.chain)} is missing in {', '.join(missing)}")
    return found


def product_files(*, rtx: bool = False) -> list[Path]:
    """The files of the product that use TensorRT, or also those that use TensorRT for RTX by its own name."""
    files = [path for package in ("models", "exporters", "deploycli") for path in (ROOT / package).rglob("*.py")]
    finders = {path: _Finder(ast.parse(path.read_text("utf-8"))) for path in files}
    uses = {path for path, finder in finders.items() if finder.aliases or finder.imported}
    return sorted(uses | {path for path in files if rtx and "import tensorrt_rtx" in path.read_text("utf-8")})


def values(paths: Iterable[Path]) -> list[str]:
    """Where the module is used through a variable or a parameter: there mypy sees `ModuleType` and checks nothing."""
    return [
        f"{path}:{line}: {name} is a variable, which has no types: `import tensorrt as {name}` there"
        for path in paths
        for line, name in _Finder(ast.parse(path.read_text("utf-8"))).values
        if any(use.chain[0] != ANY and not use.chain[0].startswith("__") for use in used_names(path))
    ]


class _Finder:
    def __init__(self, tree: ast.Module) -> None:
        self.aliases: set[str] = set()
        self.imported: dict[str, str] = {}
        self.uses: set[Use] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.aliases |= {n.asname or n.name for n in node.names if n.name == "tensorrt"}
            elif isinstance(node, ast.ImportFrom) and node.module == "tensorrt" and not node.level:
                self.imported |= {n.asname or n.name: n.name for n in node.names}
                self.uses |= {Use(node.lineno, (n.name,)) for n in node.names}
        self.values = [
            (node.lineno, node.id if isinstance(node, ast.Name) else node.arg)
            for node in ast.walk(tree)
            if (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in {"trt", *self.aliases})
            or (isinstance(node, ast.arg) and node.arg in {"trt", *self.aliases})
        ]
        self.aliases |= {name for _, name in self.values}

    def block(self, statements: list[ast.stmt], guards: frozenset[str]) -> None:
        """Visit statements, of which one may guard those after it."""
        for statement in statements:
            if isinstance(statement, ast.If):
                self.visit(statement.test, guards)
                self.block(statement.body, guards | self.asked(statement.test))
                refused = self.asked(statement.test, negated=True)
                self.block(statement.orelse, guards | refused)
                if isinstance(statement.body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break):
                    guards |= refused
            else:
                self.visit(statement, guards)

    def visit(self, node: ast.AST, guards: frozenset[str]) -> None:
        """Visit anything."""
        chain = self.chain(node)
        if chain:
            guarded = any(".".join(chain[: n + 1]) in guards for n in range(len(chain)))
            self.uses.add(Use(getattr(node, "lineno", 0), chain, guarded))
        elif isinstance(node, ast.Attribute) and node.attr in partial():
            self.uses.add(Use(node.lineno, (ANY, node.attr), node.attr in guards))
        if isinstance(node, ast.IfExp):
            self.visit(node.test, guards)
            self.visit(node.body, guards | self.asked(node.test))
            self.visit(node.orelse, guards | self.asked(node.test, negated=True))
        elif isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
            for value in node.values:
                self.visit(value, guards)
                guards |= self.asked(value)
        elif not chain:
            for name, value in ast.iter_fields(node):
                if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                    self.block(value, guards)
                elif isinstance(value, ast.AST):
                    self.visit(value, guards)
                elif isinstance(value, list):
                    for child in value:
                        if isinstance(child, ast.AST):
                            self.visit(child, guards)
                elif name == "value" and isinstance(value, str) and value.partition(".")[0] in self.aliases:
                    self.quoted(value, guards)

    def quoted(self, text: str, guards: frozenset[str]) -> None:
        """An annotation in quotes."""
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            return
        self.visit(tree, guards)

    def chain(self, node: ast.AST) -> tuple[str, ...]:
        """The names after the module's, if this is a chain that starts with it."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ()
        if node.id in self.imported:
            return (self.imported[node.id], *names)
        return tuple(names) if node.id in self.aliases else ()

    def asked(self, test: ast.expr, *, negated: bool = False) -> frozenset[str]:
        """What ``hasattr`` says there is where a test holds (or does not): chains, and bare names for other objects."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self.asked(test.operand, negated=not negated)
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or if negated else ast.And):
            return frozenset().union(*(self.asked(value, negated=negated) for value in test.values))
        return frozenset() if negated else frozenset(self._asked(test))

    def _asked(self, test: ast.expr) -> Iterator[str]:
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "hasattr":
            holder, name = test.args
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                is_module = isinstance(holder, ast.Name) and holder.id in self.aliases
                yield ".".join([*self.chain(holder), name.value]) if self.chain(holder) or is_module else name.value


def main(arguments: list[str]) -> None:
    """Write the table, or this process's surface to stdout."""
    if arguments == ["--surface"]:
        print(json.dumps(surface()))
    else:
        TABLE.write_text(generate(), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
