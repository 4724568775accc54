"""What is installed: the wheel's content, the console script, the command line, the pins, and make's targets."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shoal.jobs.cli import build_parser

ROOT = Path(__file__).parent.parent
SHOAL = Path(sys.executable).with_name("shoal")

# Frozen: a new knob belongs into the run file. Positional arguments stand in capitals.
COMMAND_LINE = {
    "embed": ["--debug", "--full-refresh", "--json", "--limit", "--set", "FILE"],
    "plan": ["--debug", "--full-refresh", "--json", "--set", "FILE"],
    "cutover": ["--debug", "--json", "--set", "FILE"],
    "submit": ["--debug", "--dry-run", "--full-refresh", "--json", "--set", "--target", "FILE"],
    "doctor": ["--debug", "--json", "--set", "--target", "FILE"],
    "schedule": ["--at", "--for", "--out", "--set", "--target", "FILE"],
    "search": ["--debug", "--json", "--where", "-k", "TABLE", "TEXT"],
    "serve": [
        "--bind",
        "--catalog",
        "--connect",
        "--debug",
        "--json",
        "--port",
        "--reranker",
        "--table",
        "--tls-keystore",
        "--users",
    ],
    "export": ["--debug", "--json", "--out", "--to", "TABLE"],
    "sql install": ["--catalog", "--debug", "--dry-run", "--json", "--schema", "TABLES"],
    "sql dbt": ["--debug", "--json", "TABLES"],
    "join": ["--debug", "--json", "--k", "--out", "--probes", "--threshold", "LEFT", "RIGHT"],
    "passwd": ["--debug", "--json", "FILE", "USER"],
    "history": ["--debug", "--json", "TABLE"],
    "status": ["--debug", "--json", "--max-lag", "--pending", "TABLES"],
    "errors": ["--debug", "--json", "TABLE"],
    "audit": ["--debug", "--json", "--sample", "TABLE"],
    "purge": ["--debug", "--json", "--keys", "TABLE"],
    "restore": ["--before", "--debug", "--json", "--run", "--to", "TABLE"],
    "index": ["--cells", "--debug", "--json", "--plot", "--recall", "--report", "TABLE"],
    "optimize": ["--debug", "--dry-run", "--json", "TABLE"],
    "vacuum": ["--debug", "--dry-run", "--json", "TABLE"],
    "config check": ["--set", "FILE"],
    "config schema": [],
    "quickstart": ["--debug", "--json"],
    "bench encode": ["--debug", "--json", "--model", "--texts"],
    "bench join": ["--debug", "--dim", "--json", "--left", "--right"],
    "bench nightly": ["--chunks", "--debug", "--json", "--nights"],
    "bench ranking": ["--debug", "--json", "--model", "--queries", "--stemmer", "FOLDER"],
    "bench scale": ["--debug", "--json", "--rows"],
    "bench search": ["--debug", "--dim", "--json", "--nights", "--queries", "--rows", "--skip"],
}


def verbs_of(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, list[str]]]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for verb, sub in action.choices.items():
            yield from verbs_of(sub, f"{name} {verb}".strip())
    if not below:
        flags = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        yield name, sorted(max(action.option_strings, key=len, default=action.dest.upper()) for action in flags)


def test_the_command_line_is_closed() -> None:
    assert dict(verbs_of(build_parser())) == COMMAND_LINE


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves build/ and egg-info where it builds."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("conf", "jobs", "udfs", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return source / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_three_folders_under_shoal_and_nothing_else(unpacked: Path) -> None:
    kinds = {"conf": {".py", ".yaml", ".sh"}, "jobs": {".py"}, "udfs": {".py", ".json"}}
    expected = {
        f"shoal/{path.relative_to(ROOT).as_posix()}"
        for folder, suffixes in kinds.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
    }
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    about = {name for name in found if name.startswith("shoal-")}
    assert found - about == expected
    assert any(name.endswith("licenses/LICENSE") for name in about)
    entry_points = next(unpacked.glob("shoal-*/entry_points.txt")).read_text()
    assert "shoal = shoal.jobs.cli:main" in entry_points


@pytest.fixture
def repository_of_a_user(tmp_path: Path) -> Path:
    """A folder with packages of the names that Shoal's own folders have; importing one of them fails."""
    for name in ("conf", "jobs", "udfs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('the user\\'s {name} was imported')\n")
    shutil.copy(ROOT / "conf/quickstart.yaml", tmp_path / "run.yaml")
    return tmp_path


def test_shoal_runs_where_the_user_has_folders_of_the_same_names(repository_of_a_user: Path) -> None:
    done = subprocess.run(
        [SHOAL, "config", "check", "run.yaml"], cwd=repository_of_a_user, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "valid run 'quickstart'" in done.stdout


def test_the_unpacked_wheel_runs_with_the_files_it_carries(unpacked: Path, repository_of_a_user: Path) -> None:
    code = (
        "import sys; sys.path.remove(''); import shoal.conf.run as run, shoal.udfs.canaries as canaries\n"
        "from shoal.jobs.quickstart import RUN_FILE\n"
        "import shoal.jobs.cli as cli\n"
        "code = cli.main(['config', 'check', str(RUN_FILE)])\n"
        "import json; print(json.dumps([code, run.__file__, len(canaries.canary_texts())]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository_of_a_user,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    code_of_check, file, num_canaries = json.loads(done.stdout.splitlines()[-1])
    assert code_of_check == 0
    assert Path(file).is_relative_to(unpacked)
    assert num_canaries >= 32


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line for line in lines if not line.startswith("#")]
    strange = [line for line in found if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.!]*", line)]
    assert strange == [], "constraints.txt has names and versions only"
    return dict(line.split("==") for line in found)


def test_every_requirement_is_pinned_to_a_version_in_its_range(project: dict[str, Any]) -> None:
    pinned = pins()
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    wanted += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin: run `make lock`"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement}: {pinned[name]}"
    assert list(pinned) == sorted(pinned)
    assert "shoal" not in pinned


def make(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", "--no-print-directory", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("spark", "delta"), [("4.0.0", "4.0.0"), ("4.0.1", "4.0.1"), ("4.1.0", "4.4.0"), ("4.2.0", "4.4.0")]
)
def test_a_spark_that_is_there_is_never_replaced_by_an_installation(
    project: dict[str, Any], spark: str, delta: str
) -> None:
    extras = [text for texts in project["project"]["optional-dependencies"].values() for text in texts]
    wanted = {"pyspark": spark, "delta-spark": delta}
    found = [Requirement(text) for text in [*project["project"]["dependencies"], *extras]]
    held = [each for each in found if each.name in wanted]
    assert {each.name for each in held} == set(wanted)
    for each in held:
        assert each.specifier.contains(wanted[each.name]), str(each)


def test_bare_make_prints_one_line_for_each_target() -> None:
    done = make()
    makefile = (ROOT / "Makefile").read_text()
    phony = " ".join(re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.M)).split()
    shown = [line.split()[1] for line in done.stdout.splitlines()]
    assert sorted(shown) == sorted(set(phony) - {"check-java", "check-python", "test-of-spark"})


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("check-python", "PYTHON=no-such-python"), "install python3.11"),
        (("check-python", "PYTHON="), "install python3.11"),
        (("check-java", "JAVA=no-such-java"), "JDK or JRE 17"),
    ],
)
def test_make_names_what_has_to_be_installed(words: tuple[str, ...], named: str) -> None:
    done = make(*words)
    assert done.returncode != 0
    assert named in done.stderr.splitlines()[0]


def test_ci_runs_what_make_check_runs() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "make check </dev/null" in script.read_text()
    plan = make("--dry-run", "check").stdout
    assert all(
        tool in plan for tool in ("ruff check", "ruff format --check", "hadolint Dockerfile", "mypy", "-m pytest")
    )
