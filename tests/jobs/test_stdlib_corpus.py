import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from shoal.jobs import stdlib_corpus
from shoal.jobs.stdlib_corpus import module_name, module_rows, stdlib_rows, write_corpus

SOURCE = '''
"""A module."""
raise RuntimeError("it was executed")

class Fish(Animal, metaclass=Meta):
    """
    Swims.
        Deep.
    """

    def swim(self, far: int = 3, *, fast=True) -> bool:
        """Swims far."""
        def inner():
            """Not seen from outside."""

    async def wait(self):
        """Waits."""

    class Fin:
        """Of a fish."""

try:
    from _fast import parse
except ImportError:
    def parse(text):
        """Parses."""
else:
    def parse(text, /):
        """Parses again."""

def silent():
    return 1

def blank():
    "   "
'''


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "new" / "corpus.jsonl"
    write_corpus(path)
    return path


def test_definitions_are_read_and_nothing_is_executed():
    rows = list(module_rows("pond", ast.parse(SOURCE)))
    assert [(row["id"], row["kind"], row["signature"]) for row in rows] == [
        ("pond:", "module", ""),
        ("pond:Fish", "class", "Fish(Animal, metaclass=Meta)"),
        ("pond:Fish.swim", "method", "swim(self, far: int=3, *, fast=True) -> bool"),
        ("pond:Fish.wait", "method", "wait(self)"),
        ("pond:Fish.Fin", "class", "Fin"),
        ("pond:parse", "function", "parse(text)"),
        ("pond:parse#2", "function", "parse(text, /)"),
    ]
    assert rows[1]["doc"] == "Swims.\n    Deep."


def test_files_are_taken_by_module_name_and_tests_left_out(tmp_path):
    for name in ("b.py", "a/__init__.py", "a/c.py", "a/test/d.py", "site-packages/e.py", "a/idlelib/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('"""Doc."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    assert [row["module"] for row in stdlib_rows(tmp_path)] == ["a", "a.c", "b"]


def test_a_package_is_named_by_its_folder():
    assert module_name(Path("/lib"), Path("/lib/json/__init__.py")) == "json"
    assert module_name(Path("/lib"), Path("/lib/json/decoder.py")) == "json.decoder"


def test_the_corpus_has_thousands_of_rows_with_unique_ids(corpus):
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    kinds = Counter(row["kind"] for row in rows)
    assert len(rows) > 4_000
    assert len({row["id"] for row in rows}) == len(rows)
    assert min(kinds[kind] for kind in ("module", "class", "function", "method")) > 300
    assert all(list(row) == ["id", "module", "qualname", "kind", "signature", "doc"] for row in rows)
    assert all(row["doc"].strip() for row in rows)
    assert {"json:dumps", "collections:Counter.__init__"} < {row["id"] for row in rows}
    assert not {"tkinter", "distutils.core", "_pydecimal", "importlib._bootstrap"} & {row["module"] for row in rows}


def test_the_corpus_is_the_same_in_another_process_with_another_hash_seed(corpus, tmp_path):
    code = "import sys; from shoal.jobs.stdlib_corpus import Path, write_corpus; write_corpus(Path(sys.argv[1]))"
    again = tmp_path / "corpus.jsonl"
    subprocess.run([sys.executable, "-c", code, str(again)], check=True, env={"PYTHONHASHSEED": "7"})
    assert again.read_bytes() == corpus.read_bytes()


@pytest.fixture
def small(monkeypatch):
    """A standard library of two functions."""
    rows = list(module_rows("pond", ast.parse('def swim():\n    """Swims."""\n\ndef dive():\n    """Dives."""\n')))
    monkeypatch.setattr(stdlib_corpus, "stdlib_rows", lambda _: iter(rows))


@pytest.mark.usefixtures("small")
def test_an_equal_file_is_left_untouched_and_another_one_is_replaced(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    assert write_corpus(corpus) == 2
    before = corpus.stat()
    num_rows = write_corpus(corpus)
    after = corpus.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert num_rows == len(corpus.read_text(encoding="utf-8").splitlines())
    good = corpus.read_bytes()
    corpus.write_bytes(good[: len(good) // 2])
    assert write_corpus(corpus) == num_rows
    assert corpus.read_bytes() == good
    assert [entry.name for entry in corpus.parent.iterdir()] == ["corpus.jsonl"]


@pytest.mark.usefixtures("small")
def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "corpus.jsonl"
    path.write_text("former")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_corpus(path)
    assert path.read_text() == "former"
    assert [entry.name for entry in tmp_path.iterdir()] == ["corpus.jsonl"]
