"""The quickstart's corpus: docstrings of the running Python's standard library, read with `ast`, nothing imported.

One JSON line per documented module, class, function and method that has a public name:
id (`module:qualname`, `module:` for a module, `#2` and so on appended where a name is defined again), module, qualname,
kind (module | class | function | method), signature ("" for modules), doc (dedented).
"""

import ast
import contextlib
import json
import os
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "idle_test", "__pycache__"}
)

# Not of every Python: some distributions leave out what needs Tk, and 3.12 has no distutils.
NOT_EVERYWHERE = frozenset({"distutils", "tkinter", "turtle", "turtledemo"})

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def write_corpus(path: Path) -> int:
    """Write the corpus to `path` and return its rows; a file that already says the same is left untouched."""
    rows = stdlib_rows(Path(sysconfig.get_path("stdlib")))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows if _is_public(row)]
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
    if not (path.is_file() and path.read_bytes() == content):
        _write_at_once(path, content)
    return len(lines)


def stdlib_rows(root: Path) -> Iterator[dict[str, str]]:
    """Rows of every module under `root`, by module name; files that are not Python source are passed over."""
    for file in sorted(root.rglob("*.py"), key=lambda file: module_name(root, file)):
        if LEFT_OUT.isdisjoint(file.relative_to(root).parts[:-1]):
            tree = _parse(file)
            if tree is not None:
                yield from module_rows(module_name(root, file), tree)


def _is_public(row: dict[str, str]) -> bool:
    names = [*row["module"].split("."), *row["qualname"].split(".")]
    private = any(name.startswith("_") and not name.endswith("__") for name in names)
    return not private and names[0] not in NOT_EVERYWHERE


def module_name(root: Path, file: Path) -> str:
    """Dotted name of a source file: `json/decoder.py` is json.decoder, `json/__init__.py` is json."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_rows(module: str, tree: ast.Module) -> Iterator[dict[str, str]]:
    """Rows of one module in source order, those under `if` and `try` included, those inside functions not."""
    seen: dict[str, int] = {}
    doc = ast.get_docstring(tree)
    if doc and doc.strip():
        yield _row(module, "", "module", "", doc, seen)
    for qualname, kind, definition in _definitions(tree, "", "function"):
        doc = ast.get_docstring(definition)
        if doc and doc.strip():
            yield _row(module, qualname, kind, signature(definition), doc, seen)


def signature(definition: Definition) -> str:
    """`name(arguments) -> result` of a function, `name(bases)` of a class, as `ast.unparse` spells them."""
    if isinstance(definition, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*definition.bases, *definition.keywords])
        return f"{definition.name}({bases})" if bases else definition.name
    returns = f" -> {ast.unparse(definition.returns)}" if definition.returns else ""
    return f"{definition.name}({ast.unparse(definition.args)}){returns}"


def _row(module: str, qualname: str, kind: str, spelled: str, doc: str, seen: dict[str, int]) -> dict[str, str]:
    seen[qualname] = seen.get(qualname, 0) + 1
    again = f"#{seen[qualname]}" if seen[qualname] > 1 else ""
    return {
        "id": f"{module}:{qualname}{again}",
        "module": module,
        "qualname": qualname,
        "kind": kind,
        "signature": spelled,
        "doc": doc,
    }


def _definitions(node: ast.AST, prefix: str, kind: str) -> Iterator[tuple[str, str, Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield f"{prefix}{child.name}", "class", child
            yield from _definitions(child, f"{prefix}{child.name}.", "method")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", kind, child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child, prefix, kind)


def _parse(file: Path) -> ast.Module | None:
    try:
        with tokenize.open(file) as source, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings are the library's business
            return ast.parse(source.read())
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


def _write_at_once(path: Path, content: bytes) -> None:
    """Replace the file in one move: a reader sees the former content or this, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
