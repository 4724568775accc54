"""The section `source.database`: what contradicts itself, and that no password has a place in it."""

from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError
from shoal.conf.loader import load_run

RUN = """name: docs
source:
  format: jdbc
  table: articles
  key: id
  text: body
  database: {url: "jdbc:postgresql://db/shop", user: reader, password_file: secret.txt}
encoder: {model: "hash:8"}
destination: {path: out/docs}
"""


def file_with(folder: Path, old: str = "", new: str = "") -> Path:
    assert old in RUN
    path = folder / "run.yaml"
    path.write_text(RUN.replace(old, new) if old else RUN)
    return path


def test_a_run_on_a_database_names_its_places_and_where_the_password_is(tmp_path: Path) -> None:
    config = load_run(file_with(tmp_path))
    assert config.source.database is not None
    assert config.source.database.password_file == str(tmp_path / "secret.txt")
    assert config.source.database.partitions == 1
    assert config.places == ["jdbc:postgresql://db/shop", str(tmp_path / "out/docs"), "hash:8"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("//db/shop", "//reader:geheim@db/shop", "user and password are no part of the address"),
        ("//db/shop", "//db/shop?password=geheim", "user and password are no part of the address"),
        ("//db/shop", "//db/shop?user=reader", "user and password are no part of the address"),
        (
            "postgresql://db/shop",
            "oracle:thin:scott/geheim@//db:1521/shop",
            "user and password are no part of the address",
        ),
        ("jdbc:postgresql:", "postgresql:", "write an address that starts with jdbc:"),
        ("secret.txt", "secret.txt, password_env: PGPASSWORD", "keep one of the two"),
        ("password_file: secret.txt", "password_env: $PGPASSWORD", "name of an environment variable, without"),
        ("secret.txt", "secret.txt, partitions: 4", "takes both, a number and a column"),
        ("secret.txt", "secret.txt, partition_column: id", "takes both, a number and a column"),
        (
            'postgresql://db/shop", user: reader, password_file: secret.txt',
            'mysql://db/shop", partitions: 4, partition_column: id',
            "only PostgreSQL lets several connections see one state",
        ),
        ("  table: articles\n", "", "exactly one of the two"),
        ("table: articles", "table: articles\n  query: SELECT 1", "exactly one of the two"),
        ("table: articles", "table: articles\n  path: here", "remove source.path"),
        ("format: jdbc", "format: table", "format jdbc and a database go together"),
        ("table: articles", "table: articles\n  options: {password: geheim}", "keeps passwords out of the run file"),
        ("table: articles", "table: articles\n  options: {dbtable: other}", "use source.database"),
        ("table: articles", "table: articles\n  options: {numPartitions: 4}", "use source.database"),
        (
            "secret.txt}",
            "secret.txt, partitions: 4, partition_column: id}\n  options: {sessionInitStatement: SET ROLE x}",
            "part the connections from the state",
        ),
    ],
)
def test_what_contradicts_itself_is_said(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_run(file_with(tmp_path, old, new))
    assert "geheim" not in str(error.value)
