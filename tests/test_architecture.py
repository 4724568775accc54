"""The shape of the code: who may import whom, where things are named, what must not stand in a file."""

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("conf", "udfs", "jobs")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))
STDLIB = frozenset(sys.stdlib_module_names)

# Whatever is not listed here, and is not the standard library or the package itself, may not be imported.
ALLOWED = {
    "conf": {"pydantic", "pydantic_core", "regex", "yaml"},
    "udfs": {
        "Stemmer", "numpy", "openvino", "pandas", "pyarrow", "semantic_text_splitter", "sentence_transformers",
        "regex", "shoal.conf", "sklearn", "tokenizers", "torch", "transformers",
    },
    "jobs": {
        "databricks", "delta", "huggingface_hub", "matplotlib", "mlflow", "numpy", "py4j", "pyarrow", "pyspark", "rich",
        "shoal.conf", "shoal.udfs", "tokenizers", "yaml",
    },
}  # fmt: skip

# Modules that run a model import these inside functions: what the driver imports must not bring them in.
HEAVY = ("matplotlib", "openvino", "sentence_transformers", "sklearn", "torch", "transformers")

# All that a Spark adapter may know of Spark: never a session.
OF_SPARK = (
    "pyspark.SparkFiles",
    "pyspark.TaskContext",
    "pyspark.sql.types",
    "pyspark.sql.functions.arrow_udf",
    "pyspark.sql.functions.pandas_udf",
)
ADAPTERS = ("*_udf.py", "sent_model.py")

# One verb each. What two of them share has a module of its own; only three put verbs together: the command line calls
# each, the quickstart embeds and searches, and a bench of the main job, or of what it exports, has to run it.
ENTRY_FILES = frozenset(
    {
        "audit",
        "config",
        "cutover",
        "doctor",
        "embed",
        "errors",
        "export",
        "history",
        "index",
        "index_report",
        "join",
        "optimize",
        "plan",
        "purge",
        "quickstart",
        "restore",
        "schedule",
        "search",
        "serve",
        "status",
        "submit",
        "vacuum",
    }
)
MAY_IMPORT_ENTRY_FILES = {
    "cli": ENTRY_FILES | {"bench", "bench_join", "bench_nightly", "bench_ranking", "bench_scale", "bench_search"},
    "quickstart": {"embed", "search"},
    "bench": {"embed"},
    "bench_nightly": {"embed"},
    "bench_ranking": {"embed"},
    "bench_scale": {"embed"},
    "bench_search": {"export"},
}

# Exceptions that are no ShoalError, and why.
OUTSIDE_THE_TREE = {
    "SettingsError": "pydantic turns only a ValueError of a validator into a problem with a place",
    "ChildDied": "the encoder in isolation makes an error row of it, or a WorkerError",
}

# Test files of tests/X/ without a module X/Y.py, and why.
WITHOUT_A_MODULE = {
    "tests/jobs/test_protocol.py": "a run killed between any two steps, and two runs at once",
    "tests/jobs/test_cluster.py": "the main job on several executor processes",
    "tests/jobs/test_connect.py": "the main job on a server of Spark Connect",
    "tests/jobs/test_secured.py": "what others see of a driver that is secured",
    "tests/jobs/test_databricks.py": "a verb as a job of Databricks, from this side and from that",
    "tests/jobs/test_faults.py": "a pipeline killed and hurt by the harness in tests/jobs/faults",
    "tests/jobs/test_other_readers.py": "the published table, read by other engines",
    "tests/jobs/test_metastore.py": "the main job on tables of a catalog",
    "tests/jobs/test_object_store.py": "the main job on S3's own protocol",
    "tests/jobs/test_cranfield.py": "the whole pipeline, judged by a known ranking",
}

SMELLS = {"file lines": 300, "function lines": 60}
NOT_OUR_WORDS = ("checksum", "embedder", "mini-batch", "passthrough", "quarantine")

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users|mnt|srv)/\w+")
# Packages are named, never the hosts they come from: of public hosts only these may be written down.
HOST = re.compile(r"(?<![\w.-])(?:[a-z0-9-]+\.)+(?:ai|co|com|dev|eu|io|net|org)\b(?![\w(-]|\.\w)", re.IGNORECASE)
KNOWN_HOSTS = {
    "account.dfs.core.windows.net",
    "example.org",
    "fs.azure.account.key.store.dfs.core.windows.net",
    "huggingface.co",
    "json-schema.org",
    "keepachangelog.com",
    "nvidia.com",
    "semver.org",
}
REGISTRY = re.compile(r"artifact(?:ory)|--index(?:-url)", re.IGNORECASE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, functions included; `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_at_import_time(tree: ast.Module) -> Iterator[str]:
    """As `imported_names`, without what stands in functions or under `if TYPE_CHECKING`."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from imported_at_import_time(ast.Module(node.body, []))
        else:
            yield from imported_names(node)


def within(name: str, packages: Iterator[str] | set[str] | tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.fixture(scope="module", autouse=True)
def outliers() -> Iterator[None]:
    """Lists what is far above its neighbours, for people to look at once; it never fails a build."""
    yield
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        num_lines = text.count("\n")
        if num_lines > SMELLS["file lines"]:
            warnings.warn(f"{name_of(path)} has {num_lines} lines", stacklevel=1)
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= SMELLS["function lines"]:
                length = (node.end_lineno or 0) - node.lineno + 1
                warnings.warn(f"{name_of(path)}:{node.lineno} {node.name} has {length} lines", stacklevel=1)
        for word in NOT_OUR_WORDS:
            if word in text.lower():
                warnings.warn(f"{name_of(path)} says '{word}'; CONTRIBUTING.md has the words", stacklevel=1)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_what_its_folder_may_know(path: Path) -> None:
    package = path.parent.name
    allowed = ALLOWED[package] | {f"shoal.{package}"}
    spark = OF_SPARK if package == "udfs" and any(map(path.match, ADAPTERS)) else ()
    for name in imported_names(tree_of(path)):
        if name.split(".")[0] in STDLIB:
            continue
        assert within(name, allowed) or within(name, spark), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_model_libraries_are_imported_only_inside_functions(path: Path) -> None:
    found = [name for name in imported_at_import_time(tree_of(path)) if within(name, HEAVY)]
    assert found == [], f"{name_of(path)} imports {found} as soon as it is imported"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name == "jobs"], ids=name_of)
def test_verbs_do_not_import_each_other(path: Path) -> None:
    entry_files = ENTRY_FILES | {other.stem for other in path.parent.glob("bench*.py")}
    allowed = MAY_IMPORT_ENTRY_FILES.get(path.stem, set())
    for name in imported_names(tree_of(path)):
        part = name.split(".")[2] if name.startswith("shoal.jobs.") else ""
        if part in entry_files:
            assert part in allowed, f"{name_of(path)} imports the entry file jobs/{part}.py"


def test_importing_every_job_and_spark_adapter_leaves_the_model_libraries_out() -> None:
    shared = [path for path in MODULES if path.parent.name == "jobs" or path.name.endswith("_udf.py")]
    names = [f"shoal.{path.parent.name}.{path.stem}" for path in shared if path.stem != "__init__"]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", PACKAGES)
def test_the_map_in_a_folders_readme_lists_exactly_its_files(folder: str) -> None:
    readme = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w.]+\.(?:py|json|yaml))` \|", readme, flags=re.M)
    there = {path.name for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".json", ".yaml")}
    assert len(listed) == len(set(listed)), "a file is listed twice"
    assert set(listed) - {"__init__.py"} == there - {"__init__.py"}


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("folder", PACKAGES)
def test_every_test_file_mirrors_a_module(folder: str) -> None:
    tests = {name_of(path): path for path in (ROOT / "tests" / folder).glob("test_*.py")}
    for name, path in tests.items():
        module = ROOT / folder / path.name.removeprefix("test_")
        assert module.exists() or name in WITHOUT_A_MODULE, f"{name} tests no module of {folder}/"
    stale = [name for name in WITHOUT_A_MODULE if name.startswith(f"tests/{folder}/") and name not in tests]
    assert stale == [], "WITHOUT_A_MODULE names files that are gone"


def files_of_ours() -> list[Path]:
    folders = [*PACKAGES, "tests", "notebooks", ".ci"]
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    top = [ROOT / name for name in ("Makefile", "constraints.txt", "pyproject.toml", ".gitignore", *_pages())]
    hidden = {"__pycache__", ".ipynb_checkpoints", ".hypothesis", ".pytest_cache"}
    return [path for path in [*inside, *top] if path.is_file() and not hidden & set(path.parts)]


def _pages() -> list[str]:
    return [path.name for path in ROOT.glob("*.md")]


def test_no_file_names_a_machines_folder_or_a_registry() -> None:
    found = []
    for path in files_of_ours():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            bad = MACHINE_PATH.findall(line) + REGISTRY.findall(line)
            bad += [host for host in HOST.findall(line) if host.lower() not in KNOWN_HOSTS]
            found += [f"{name_of(path)}:{number}: {match}" for match in bad]
    assert found == []


def test_code_is_ascii() -> None:
    found = [name_of(path) for path in MODULES if not path.read_text(encoding="utf-8").isascii()]
    assert found == []


def test_every_exception_class_appears_in_the_drawing_with_its_parent_code_and_status() -> None:
    from shoal.conf import errors

    depth_of: dict[int, str] = {}
    drawn: dict[str, tuple[str | None, int, str]] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ((?:\|  )*)(?:(?:\|-|`-) )?(\w+)\s+(\d)  (\w+)", line)
        if match:
            indented = len(line) - len(line.lstrip(" |`-"))
            depth = (indented - 4) // 3
            depth_of[depth] = match[2]
            drawn[match[2]] = (depth_of[depth - 1] if depth else None, int(match[3]), match[4])
    classes = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.ShoalError)
    }
    assert set(drawn) == set(classes)
    for name, (parent, exit_code, status) in drawn.items():
        assert (classes[name].exit_code, classes[name].status) == (exit_code, status), name
        assert parent is None or classes[name].__base__ is classes[parent], name


def test_exceptions_are_defined_in_one_place() -> None:
    found = set()
    for path in MODULES:
        if name_of(path) == "conf/errors.py":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases
            ):
                found.add(node.name)
    assert found == set(OUTSIDE_THE_TREE)
