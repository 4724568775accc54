"""`shoal serve` as a process of its own, asked by beeline, the JDBC client that pyspark's wheel brings."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyspark
import pytest
import sqlalchemy
from py4j.protocol import Py4JJavaError
from pyhive import hive
from pyspark.sql import SparkSession

from shoal.conf.loader import load_run
from shoal.jobs.embed import embed

pytestmark = [pytest.mark.spark, pytest.mark.slow]

PYSPARK = Path(pyspark.__file__).parent
START_S = 240
BODIES = ["one fish", "two fish", "red fish", "blue fish"]


class Server:
    """A running `shoal serve`; `told` is its line on stdout."""

    def __init__(self, *argv: object, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "shoal.jobs.cli", "serve", "--port", "0", "--json", *map(str, argv)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.err: list[str] = []
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self.err.extend, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        late = threading.Timer(START_S, self.process.kill)
        late.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        late.cancel()
        if not line.startswith('{"status": "ready"'):
            self.process.wait(timeout=60)
            raise AssertionError(f"no server: {''.join(self.err)}")
        self.told: dict[str, Any] = json.loads(line)

    def stop(self) -> int:
        """Exit code after SIGTERM; kills what does not go within a minute."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def processes(self) -> set[int]:
        """Ids of everything that the server started, itself included."""
        found, parents = {self.process.pid}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                parents[int(stat.parent.name)] = int(fields[1])
        while below := {child for child, parent in parents.items() if parent in found} - found:
            found |= below
        return found


def left_alive(processes: set[int], within_s: float = 30) -> set[int]:
    """Those that still run when the time is up; Python workers end a moment after the JVM that they belong to."""
    until = time.monotonic() + within_s
    while (alive := {number for number in processes if _runs(number)}) and time.monotonic() < until:
        time.sleep(0.2)
    return alive


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def serving(*argv: object, environment: dict[str, str] | None = None) -> Iterator[Server]:
    server = Server(*argv, environment=environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def client(url: str, *statements: str, login: tuple[str, str] = ("tester", "any")) -> subprocess.Popen[str]:
    """beeline at work: one after another, going on after an error; rows as comma-separated values."""
    script = [part for statement in statements for part in ("-e", statement)]
    command = [
        str(PYSPARK / "bin" / "spark-class"), "org.apache.hive.beeline.BeeLine", "-u", url, "-n", login[0], "-p",
        login[1], "--outputformat=csv2", "--silent=true", "--force=true", *script,
    ]  # fmt: skip
    environment = {**os.environ, "SPARK_HOME": str(PYSPARK)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def answer(asked: subprocess.Popen[str]) -> tuple[list[list[str]], str]:
    """Rows of all statements, their headers included, and what went wrong; without beeline's prompts and the JVM's
    warnings.
    """
    out, err = asked.communicate(timeout=240)
    out = re.sub(r"^(\d: jdbc:hive2:[^>]*> ?)+", "", out, flags=re.M)
    err = re.sub(r"^WARNING: .*\n?", "", err, flags=re.M)
    return [row for row in csv.reader(out.splitlines()) if row], err


def ask(url: str, *statements: str, **more: Any) -> tuple[list[list[str]], str]:
    return answer(client(url, *statements, **more))


@pytest.fixture(scope="module")
def write(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    folder = tmp_path_factory.mktemp("serve")

    def write(bodies: list[str], encoder: dict[str, str] | None = None, name: str = "docs") -> str:
        rows = [{"id": n, "body": body, "tag": "ab"[n % 2]} for n, body in enumerate(bodies)]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = {
            "name": "docs",
            "source": {
                "format": "json", "path": "corpus.jsonl", "schema": "id INT, body STRING, tag STRING", "key": "id",
                "text": "body", "columns": ["tag"],
            },
            "encoder": encoder or {"model": "hash:8"},
            "destination": {"path": name},
            "tracking": {"enabled": False},
        }  # fmt: skip
        (folder / "run.yaml").write_text(json.dumps(run))
        embed(spark, load_run(folder / "run.yaml"), full_refresh=encoder is not None)
        return str(folder / name)

    return write


@pytest.fixture(scope="module")
def server(write: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    catalog = tmp_path_factory.mktemp("catalog")
    with serving("--table", f"docs={write(BODIES)}", "--catalog", catalog, "--connect", 0) as server:
        yield server


def test_clients_search_over_jdbc_and_are_told_what_is_wrong(server: Server) -> None:
    url = server.told["jdbc"]
    assert url.startswith("jdbc:hive2://127.0.0.1:")
    assert server.told["status"] == "ready"

    rows, err = ask(
        url,
        "SELECT id, tag, text, round(score, 4) AS score FROM docs_search('red fish', 1)",
        "SELECT id FROM docs_scores('red fish') WHERE tag = 'b' ORDER BY score DESC LIMIT 1",
        "SELECT size(shoal_embed('docs', 'red fish')) AS dim",
        "SELECT id FROM docs_search('  ', 1)",
        "SELECT id FROM docs_search_vector(array(1, 2), 1)",
        "SELECT 'still here' AS said",
    )

    assert rows[:2] == [["id", "tag", "text", "score"], ["2", "a", "red fish", "1.0"]]
    assert rows[2] == ["id"]
    assert rows[3][0] in ("1", "3")
    assert rows[4:] == [["dim"], ["8"], ["said"], ["still here"]]
    assert "[QUERY_INVALID] docs_search: the query is NULL or blank" in err
    assert "[QUERY_INVALID] docs_search_vector: the vector has 2 elements" in err


def test_two_clients_at_once_get_their_own_answers_and_share_settings(server: Server) -> None:
    url = server.told["jdbc"]
    asked = [
        client(url, *[f"SELECT text FROM docs_search('{text}', 1)"] * 3, "SET spark.shoal.test.said=yes")
        for text in ("one fish", "blue fish")
    ]
    answers = [answer(one)[0] for one in asked]
    shared, _ = ask(url, "SET spark.shoal.test.said")

    for text, rows in zip(("one fish", "blue fish"), answers, strict=True):
        assert rows[:6] == [["text"], [text]] * 3
    assert ["spark.shoal.test.said", "yes"] in shared


# In a process of its own: here a classic session is open.
CONNECT_CLIENT = """
import json, sys
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

spark = SparkSession.builder.remote(sys.argv[1]).getOrCreate()
texts = [row["text"] for row in spark.sql("SELECT text FROM seen.docs ORDER BY id").collect()]
[[twice]] = spark.sql("SELECT seen.twice(4)").collect()
try:
    spark.sql("SELECT * FROM docs_search('x', 1)").collect()
    told = ""
except AnalysisException as error:
    told = str(error)
print(json.dumps([texts, twice, told]))
"""


def test_a_client_of_spark_connect_has_the_tables_and_permanent_functions(server: Server) -> None:
    pytest.importorskip("grpc", reason="needs pyspark[connect]")
    [path] = [table["table"] for table in server.told["tables"].values()]
    _, err = ask(
        server.told["jdbc"],
        "CREATE SCHEMA seen",
        f"CREATE TABLE seen.docs USING delta LOCATION '{path}'",
        "CREATE FUNCTION seen.twice(x INT) RETURNS INT RETURN 2 * x",
    )
    assert err == ""

    asked = subprocess.run(
        [sys.executable, "-c", CONNECT_CLIENT, server.told["connect"]],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip

    assert asked.returncode == 0, asked.stderr[-4000:]
    texts, twice, told = json.loads(asked.stdout.splitlines()[-1])
    assert (texts, twice) == (BODIES, 8)
    assert "docs_search" in told


def test_python_clients_and_the_plain_driver_get_the_same_answers_and_errors(
    server: Server, spark: SparkSession
) -> None:
    """PyHive, SQLAlchemy with a bound parameter that has quotes in it, and Hive's JDBC driver in a JVM."""
    port = int(server.told["jdbc"].rsplit(":", 1)[1].split("/")[0])
    cursor = hive.connect("127.0.0.1", port, username="tester").cursor()
    cursor.execute("SELECT text, score FROM docs_search(%s, 1)", ("red fish",))
    [(text, score)] = cursor.fetchall()
    assert (text, score) == ("red fish", pytest.approx(1, abs=1e-6))
    with pytest.raises(hive.OperationalError, match="QUERY_INVALID"):
        cursor.execute("SELECT text FROM docs_search(NULL, 1)")

    with sqlalchemy.create_engine(f"hive://tester@127.0.0.1:{port}/default").connect() as connection:
        query = sqlalchemy.text("SELECT count(*) FROM docs_search(:query, 3)")
        assert connection.execute(query, {"query": "a 'quoted' \\ fish; --"}).scalar() == 3

    jvm = spark._jvm
    assert jvm is not None
    jvm.java.lang.Class.forName("org.apache.hive.jdbc.HiveDriver")
    connection = jvm.java.sql.DriverManager.getConnection(server.told["jdbc"], "tester", "any")
    rows = connection.createStatement().executeQuery("SELECT text FROM docs_search('blue fish', 1)")
    assert rows.next()
    assert rows.getString(1) == "blue fish"
    with pytest.raises(Py4JJavaError, match="QUERY_INVALID"):
        connection.createStatement().executeQuery("SELECT text FROM docs_search('blue fish', 0)")
    connection.close()


@pytest.mark.long
def test_new_rows_and_a_new_encoder_are_served_without_a_restart(server: Server, write: Callable[..., str]) -> None:
    """While a client keeps asking, the encoder changes: every answer is exact, of the old encoder or of the new."""
    url = server.told["jdbc"]
    statement = "SELECT round(score, 4) AS score FROM docs_search('red fish', 1)"
    asking = client(url, *[statement] * 30)
    write([*BODIES, "new fish"], {"model": "hash:8", "document_prompt": "b: ", "query_prompt": "b: "})
    rows, err = answer(asking)

    assert err == ""
    assert [row for row in rows if row != ["score"]] == [["1.0"]] * 30
    for _ in range(10):
        rows, _ = ask(url, statement.replace("red", "new"), "SELECT count(*) AS n FROM docs_scores('x')")
        if rows[-1] == ["5"]:
            break
    assert rows == [["score"], ["1.0"], ["n"], ["5"]]


@pytest.mark.long
def test_a_stopped_server_leaves_no_process_and_its_catalog_outlives_it(
    write: Callable[..., str], tmp_path: Path
) -> None:
    table = write(BODIES, name="kept")
    with serving("--table", f"docs={table}", "--catalog", tmp_path / "catalog") as first:
        _, err = ask(
            first.told["jdbc"],
            "CREATE SCHEMA shop",
            f"CREATE TABLE shop.docs USING delta LOCATION '{table}'",
            "CREATE FUNCTION shop.twice(x INT) RETURNS INT RETURN 2 * x",
        )
        assert err == ""
        started = first.processes()
        assert len(started) > 1, "no JVM was seen"
        assert first.stop() == 0
        assert left_alive(started) == set()
        assert first.process.stdout is not None
        assert first.process.stdout.read() == "", "more than one line stood on stdout"

    with serving("--table", "docs=shop.docs", "--catalog", tmp_path / "catalog") as second:
        rows, err = ask(
            second.told["jdbc"],
            "SELECT shop.twice(count(*)) AS n FROM shop.docs",
            "USE shop",
            "SELECT text FROM docs_search('red fish', 1)",
        )
        second.process.send_signal(signal.SIGINT)
        assert second.process.wait(timeout=60) == 0

    assert (rows, err) == ([["n"], ["8"], ["Result"], ["text"], ["red fish"]], "")


@pytest.mark.long
def test_with_a_key_and_passwords_only_those_who_know_theirs_get_in(write: Callable[..., str], tmp_path: Path) -> None:
    table, users, keystore = write(BODIES, name="locked"), tmp_path / "users", tmp_path / "server.p12"
    subprocess.run(
        ["keytool", "-genkeypair", "-alias", "shoal", "-keyalg", "RSA", "-keysize", "2048", "-dname", "CN=localhost",
         "-ext", "san=ip:127.0.0.1,dns:localhost", "-storetype", "PKCS12", "-keystore", str(keystore), "-storepass",
         "changeit-now"], check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "shoal.jobs.cli", "passwd", str(users), "ada"],
        input="correct-horse-battery\n", text=True, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    with serving(
        "--table", f"docs={table}", "--catalog", tmp_path / "catalog", "--bind", "0.0.0.0",
        "--tls-keystore", keystore, "--users", users, environment={"SHOAL_KEYSTORE_PASSWORD": "changeit-now"},
    ) as server:  # fmt: skip
        port = server.told["jdbc"].split(":")[3].split("/")[0]
        trust = f";sslTrustStore={keystore};trustStorePassword=changeit-now"
        url = f"jdbc:hive2://127.0.0.1:{port}/default;ssl=true{trust}"
        statements = ("SELECT text FROM docs_search('red fish', 1)", "SET hive.server2.keystore.password")
        rows, err = ask(url, *statements, login=("ada", "correct-horse-battery"))
        refused = [
            ask(url, statements[0], login=login)
            for login in (("ada", "wrong"), ("ada", ""), ("bob", "correct-horse-battery"))
        ]
        plain = ask(f"jdbc:hive2://127.0.0.1:{port}/default", statements[0], login=("ada", "correct-horse-battery"))

    assert rows[:2] == [["text"], ["red fish"]], err
    assert "changeit" not in str(rows)
    for got, told in [*refused, plain]:
        assert got == []
        assert "Error" in told or "error" in told
