"""Where the server may listen and what has to be there first; the server itself is asked in test_serve.py."""

import os
import socket
from pathlib import Path

import pytest

from shoal.conf.errors import ConfigError
from shoal.jobs.passwords import set_password
from shoal.jobs.thrift import KEYSTORE_PASSWORD, Endpoint, held_catalog, session_settings


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (KEYSTORE_PASSWORD, "SPARK_CONF_DIR", "HADOOP_CONF_DIR", "HIVE_CONF_DIR", "SPARK_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
def test_on_this_machine_alone_nothing_more_is_asked_for(host: str) -> None:
    endpoint = Endpoint(host=host, port=0).checked()

    assert endpoint.port > 0
    assert endpoint.jdbc == f"jdbc:hive2://{host}:{endpoint.port}/default"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.invalid", ""])
def test_anywhere_else_is_refused_without_encryption(host: str, tmp_path: Path) -> None:
    set_password(tmp_path / "users", "ada", "correct horse battery")

    with pytest.raises(ConfigError, match="without --tls-keystore"):
        Endpoint(host=host, port=0, users=tmp_path / "users").checked()


def test_a_key_needs_its_file_and_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keystore = tmp_path / "server.p12"
    with pytest.raises(ConfigError, match="there is no such file"):
        Endpoint(port=0, keystore=keystore).checked()
    keystore.touch()
    with pytest.raises(ConfigError, match=f"{KEYSTORE_PASSWORD} is not set"):
        Endpoint(port=0, keystore=keystore).checked()
    monkeypatch.setenv(KEYSTORE_PASSWORD, "secret")

    assert Endpoint(port=0, keystore=keystore).checked().jdbc.endswith("/default;ssl=true")


def test_a_port_that_is_taken_is_an_error_that_names_it() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: nothing can listen there") as caught:
            Endpoint(port=port).checked()

    assert caught.value.code == "SERVER_FAILED"
    with pytest.raises(ConfigError, match="--port is 70000"):
        Endpoint(port=70000).checked()
    with pytest.raises(ConfigError, match="--connect is -1"):
        Endpoint(connect=-1).checked()


def test_spark_connect_is_no_way_round_the_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_password(tmp_path / "users", "ada", "a long secret")
    endpoint = Endpoint(port=0, users=tmp_path / "users", connect=0)
    monkeypatch.delenv("SPARK_CONNECT_AUTHENTICATE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="--connect beside passwords without SPARK_CONNECT_AUTHENTICATE_TOKEN"):
        endpoint.checked()
    monkeypatch.setenv("SPARK_CONNECT_AUTHENTICATE_TOKEN", "another secret")
    assert endpoint.checked().connect


def test_hives_own_variables_may_not_decide_where_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIVE_SERVER2_THRIFT_BIND_HOST", "0.0.0.0")

    with pytest.raises(ConfigError, match="HIVE_SERVER2_THRIFT_BIND_HOST is set"):
        Endpoint(port=0).checked()


def test_the_catalog_is_its_owners_alone_and_of_one_server_at_a_time(tmp_path: Path) -> None:
    catalog = tmp_path / "a" / "catalog"
    (tmp_path / "file").touch()

    with held_catalog(catalog):
        assert catalog.stat().st_mode & 0o077 == 0
        with pytest.raises(ConfigError, match="another server has it"), held_catalog(catalog):
            pass
    with held_catalog(catalog):
        pass
    with pytest.raises(ConfigError, match="the folder cannot be made"), held_catalog(tmp_path / "file" / "catalog"):
        pass


def test_spark_gets_deltas_jars_on_the_class_path_and_a_catalog_of_ours_only_where_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = session_settings(tmp_path).conf
    (tmp_path / "hive-site.xml").touch()
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    theirs = session_settings(tmp_path).conf

    entries = str(own["spark.driver.extraClassPath"]).split(os.pathsep)
    assert all(Path(entry).is_file() for entry in entries[:-1])
    assert any("delta-spark" in entry for entry in entries)
    assert own["spark.sql.hive.thriftServer.singleSession"] == "true"
    url = "spark.hadoop.javax.jdo.option.ConnectionURL"
    assert str(tmp_path / "metastore") in str(own[url])
    assert url not in theirs
