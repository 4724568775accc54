"""A source in a real PostgreSQL: types, one consistent state by several connections, passwords that nobody sees."""

import os
import pwd
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from cluster import free_port
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, SourceError
from shoal.conf.loader import load_run
from shoal.conf.source import SourceConfig
from shoal.jobs.database import read_database, shared_snapshot
from shoal.jobs.embed import embed
from shoal.jobs.hooks import Hooks
from shoal.jobs.plan import lines as plan_lines
from shoal.jobs.plan import plan
from shoal.jobs.source import read_source

pytestmark = [pytest.mark.spark, pytest.mark.slow]

PASSWORD = "lamp-keeper's-secret-7c1"
FOLDERS = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep) if folder]
FOLDERS += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
PROGRAMS = ("initdb", "pg_ctl", "psql")
BIN = next((folder for folder in FOLDERS if all((folder / name).exists() for name in PROGRAMS)), None)

if BIN is None:
    pytest.skip("PostgreSQL's initdb, pg_ctl and psql are not installed", allow_module_level=True)


class Database:
    """A server of its own on a free port, with one user who has a password."""

    def __init__(self, folder: Path) -> None:
        # PostgreSQL will not run as root.
        self._user = "nobody" if os.getuid() == 0 else None
        self._data = folder / "data"
        if self._user:
            identity = pwd.getpwnam(self._user)
            self._data.mkdir()
            os.chown(self._data, identity.pw_uid, identity.pw_gid)
            folder.chmod(0o755)
        self.port = free_port()
        self._call("initdb", "--auth=trust", "--no-sync", "--encoding=UTF8", "--username=owner", "-D", str(self._data))
        rules = "local all all trust\nhost all owner 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
        (self._data / "pg_hba.conf").write_text(rules)
        options = f"-c port={self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._call("pg_ctl", "-D", str(self._data), "-w", "-o", options, "-l", str(self._data / "log"), "start")
        quoted = PASSWORD.replace("'", "''")
        self.run(f"CREATE ROLE reader LOGIN SUPERUSER PASSWORD '{quoted}'")

    @property
    def url(self) -> str:
        return f"jdbc:postgresql://127.0.0.1:{self.port}/postgres"

    def run(self, statements: str) -> str:
        assert BIN is not None
        call = [BIN / "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "owner", "-qAt", "-v", "ON_ERROR_STOP=1"]
        done = subprocess.run([*call, "postgres"], input=statements, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def stop(self) -> None:
        self._call("pg_ctl", "-D", str(self._data), "-m", "immediate", "stop")

    def _call(self, program: str, *arguments: str) -> None:
        assert BIN is not None
        # The server inherits what it is given, and a pipe of ours would not end before it does.
        with (self._data.parent / f"{program}.log").open("a") as log:
            subprocess.run([BIN / program, *arguments], stdout=log, stderr=log, check=True, user=self._user, cwd="/")


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    # Not below pytest's folder, which is open to its owner alone.
    with tempfile.TemporaryDirectory(prefix="shoal-postgresql-", ignore_cleanup_errors=True) as folder:
        server = Database(Path(folder))
        yield server
        server.stop()


@pytest.fixture
def source(database: Database, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Settings of a source whose password is in the environment; keywords go to the database's section."""
    monkeypatch.setenv("SHOP_PASSWORD", PASSWORD)

    def settings(table: str, **more: Any) -> dict[str, Any]:
        login = {"url": database.url, "user": "reader", "password_env": "SHOP_PASSWORD"}
        return {"format": "jdbc", "database": login | more, "table": table, "key": "id", "text": "body"}

    return settings


def test_nights_follow_a_table_of_a_database(
    spark: SparkSession, database: Database, source: Callable[..., dict[str, Any]], run_file: Callable[..., Path]
) -> None:
    database.run(
        "CREATE TABLE articles (id uuid PRIMARY KEY, body text, lang varchar(2), price numeric(8, 2),"
        " seen timestamptz, about jsonb, digest bytea, tags text[], weight double precision, open boolean, day date);"
        "INSERT INTO articles SELECT gen_random_uuid(), 'article ' || n, 'de', n / 2.0, now(),"
        """ '{"a": [1, "\u00e4"]}', '\\x00ff', '{b,NULL}', 0.1, true, '2026-11-21' FROM generate_series(1, 40) n;\n"""
        "INSERT INTO articles VALUES (gen_random_uuid(), NULL, 'en')"
    )
    columns = ["lang", "price", "seen", "about", "digest", "tags", "weight", "open", "day"]
    file = run_file(source=source("articles") | {"columns": columns})
    report = embed(spark, load_run(file), hooks=Hooks()).public()
    assert (report["rows"]["new"], report["chunks"]["encoded"], report["chunks"]["errors"]) == (41, 40, 1)
    planned = plan(spark, load_run(file))
    assert (planned["rows"]["unchanged"], planned["reads"]["source_bytes"]) == (41, None)
    assert any("the source" in line and "TB" not in line for line in plan_lines(planned))

    database.run(
        "UPDATE articles SET body = 'another' WHERE body = 'article 7'; DELETE FROM articles WHERE lang = 'en'"
    )
    report = embed(spark, load_run(file), hooks=Hooks()).public()
    assert (report["rows"]["changed"], report["rows"]["deleted"], report["chunks"]["encoded"]) == (1, 1, 1)
    assert embed(spark, load_run(file), hooks=Hooks()).status == "unchanged"

    published = spark.read.format("delta").load(str(file.parent / "out/docs"))
    types = dict(published.dtypes)
    assert {name: types[name] for name in ("id", *columns)} == {
        "id": "string",
        "lang": "string",
        "price": "decimal(8,2)",
        "seen": "timestamp",
        "about": "string",
        "digest": "binary",
        "tags": "array<string>",
        "weight": "double",
        "open": "boolean",
        "day": "date",
    }
    (row,) = published.where("text = 'article 8'").select(*columns[3:]).collect()
    assert tuple(row) == ('{"a": [1, "\u00e4"]}', b"\x00\xff", ["b", None], 0.1, True, date(2026, 11, 21))
    for path in file.parent.rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path


def test_a_table_of_another_catalog_is_a_source_by_its_name_in_three_parts(
    spark: SparkSession, database: Database, run_file: Callable[..., Path]
) -> None:
    database.run("CREATE TABLE pages AS SELECT n AS id, 'page ' || n AS body FROM generate_series(1, 5) n")
    catalog = "org.apache.spark.sql.execution.datasources.v2.jdbc.JDBCTableCatalog"
    login = {"url": database.url, "user": "reader", "password": PASSWORD, "driver": "org.postgresql.Driver"}
    for name, value in {"": catalog, **{f".{key}": value for key, value in login.items()}}.items():
        spark.conf.set(f"spark.sql.catalog.shop{name}", value)
    file = run_file(source={"format": "table", "table": "shop.public.pages", "key": "id", "text": "body"})

    report = embed(spark, load_run(file), hooks=Hooks()).public()
    assert (report["rows"]["new"], report["chunks"]["encoded"]) == (5, 5)
    database.run("UPDATE pages SET body = 'another' WHERE id = 3")
    report = embed(spark, load_run(file), hooks=Hooks()).public()
    assert (report["rows"]["changed"], report["chunks"]["encoded"]) == (1, 1)


def test_a_query_in_the_databases_own_sql_is_a_source(
    spark: SparkSession, database: Database, source: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    database.run("CREATE TABLE notes AS SELECT n AS id, 'note ' || n AS body FROM generate_series(1, 9) n")
    (tmp_path / "password").write_text(f"{PASSWORD}\nanother line\n")
    login = {"password_env": None, "password_file": str(tmp_path / "password")}
    settings = source("notes", **login) | {
        "table": None,
        "query": "SELECT id, upper(body) AS body FROM notes WHERE id < 3",
    }

    rows = read_source(spark, SourceConfig.model_validate(settings), None).rows.collect()
    assert sorted((row["id"], row["__shoal_text"]) for row in rows) == [(1, "NOTE 1"), (2, "NOTE 2")]


def test_several_connections_see_one_state_while_others_write(
    spark: SparkSession, database: Database, source: Callable[..., dict[str, Any]]
) -> None:
    database.run("CREATE TABLE moving AS SELECT n AS id, 'text ' || n AS body FROM generate_series(1, 1000) n")
    settings = SourceConfig.model_validate(source("moving", partitions=4, partition_column="id"))

    with shared_snapshot(spark, settings) as session:
        database.run(
            "UPDATE moving SET id = 1001 - id; DELETE FROM moving WHERE id > 990;\n"
            "INSERT INTO moving VALUES (5000, 'new')"
        )
        rows = read_database(spark, settings, session)
        assert rows.rdd.getNumPartitions() == 4
        assert {row["id"]: row["body"] for row in rows.collect()} == {n: f"text {n}" for n in range(1, 1001)}
    assert read_database(spark, settings).count() == 991
    assert database.run("SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'") == "0"

    database.run("DELETE FROM moving")
    with shared_snapshot(spark, settings) as session:
        assert read_database(spark, settings, session).count() == 0


def test_a_run_by_several_connections_publishes_every_row_once(
    spark: SparkSession, database: Database, source: Callable[..., dict[str, Any]], run_file: Callable[..., Path]
) -> None:
    database.run(
        "CREATE TABLE dated AS SELECT n AS id, 'text ' || n AS body, date '2026-01-01' + n AS day"
        " FROM generate_series(1, 300) n"
    )
    database.run("UPDATE dated SET day = NULL WHERE id = 7")
    file = run_file(source=source("dated", partitions=3, partition_column="day"))

    report = embed(spark, load_run(file), hooks=Hooks()).public()
    assert (report["rows"]["new"], report["chunks"]["encoded"]) == (300, 300)
    assert not (file.parent / "out/docs__shoal/work").exists() or not list(
        (file.parent / "out/docs__shoal/work").iterdir()
    )


def test_what_is_wrong_is_said_without_the_password(
    spark: SparkSession, database: Database, source: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def read(**changes: Any) -> None:
        read_source(spark, SourceConfig.model_validate(source("absent", **changes)), None)

    with pytest.raises(
        SourceError, match=r"source 'absent' \(format jdbc\) .*relation \"absent\" does not exist"
    ) as absent:
        read()
    with pytest.raises(SourceError, match=r"password authentication failed for user \"owner2\"") as refused:
        read(user="owner2")
    with pytest.raises(SourceError, match=r"refused|Connection") as down:
        read(url="jdbc:postgresql://127.0.0.1:1/postgres")
    with pytest.raises(SourceError, match=r"jdbc:nothing.*spark.jars.packages|No suitable driver.*spark.jars.packages"):
        read(url="jdbc:nothing://127.0.0.1/x")
    with pytest.raises(ConfigError, match=r"password_env: the environment of the driver has no SHOP_WORD"):
        read(password_env="SHOP_WORD")
    with pytest.raises(ConfigError, match=r"password_file: .*/none cannot be read \(FileNotFoundError\)"):
        read(password_env=None, password_file=str(tmp_path / "none"))
    for told in (absent, refused, down):
        assert PASSWORD not in str(told.value)
