"""The password file; the class that reads it in the JVM is compiled and asked here, and over TLS in test_serve.py."""

from pathlib import Path
from typing import Any

import pytest
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.jobs.passwords import ITERATIONS, SOURCE, line_of, require_users, set_password


def test_a_line_has_a_salt_of_its_own_and_never_the_password() -> None:
    first, second = line_of("ada", "correct horse battery"), line_of("ada", "correct horse battery")

    assert first.split(":")[:2] == ["ada", str(ITERATIONS)]
    assert first != second
    assert "horse" not in first


@pytest.mark.parametrize("user", ["", "a:b", "a b", "x\ny", "-" * 65, "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_name_that_could_not_be_read_back_is_refused(user: str) -> None:
    with pytest.raises(ConfigError, match="choose such a one"):
        line_of(user, "correct horse battery")


def test_a_short_password_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 5 characters"):
        line_of("ada", "short")


def test_a_user_is_added_or_replaced_and_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "users"
    for user in ("ada", "bob", "ada"):
        set_password(file, user, "correct horse battery")

    assert [line.partition(":")[0] for line in file.read_text().splitlines()] == ["bob", "ada"]
    assert file.stat().st_mode & 0o777 == 0o600
    require_users(file)


def test_a_file_that_lets_nobody_in_or_everybody_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "users"
    with pytest.raises(ConfigError, match="it cannot be read"):
        require_users(file)
    file.write_text("ada:secret\n")
    with pytest.raises(ConfigError, match="no line of a user"):
        require_users(file)
    set_password(file, "ada", "correct horse battery")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        require_users(file)


@pytest.mark.spark
def test_the_class_that_hive_asks_lets_in_who_is_in_the_file_and_nobody_else(
    spark: SparkSession, tmp_path: Path
) -> None:
    file = tmp_path / "users"
    set_password(file, "ada", "correct horse battery")
    jvm: Any = spark._jvm
    compiler = jvm.org.codehaus.janino.SimpleCompiler()
    compiler.setParentClassLoader(jvm.java.lang.Thread.currentThread().getContextClassLoader())
    compiler.cook(SOURCE)
    provider = compiler.getClassLoader().loadClass("shoal.PasswordFile").getConstructors()[0].newInstance(None)
    jvm.java.lang.System.setProperty("shoal.users", str(file))

    provider.Authenticate("ada", "correct horse battery")
    for user, password in (
        ("ada", "wrong"),
        ("ada", ""),
        ("ada", None),
        ("", ""),
        (None, None),
        ("-", ""),
        ("ad", "x"),
    ):
        with pytest.raises(Py4JJavaError, match="user name or password is wrong"):
            provider.Authenticate(user, password)
    set_password(file, "ada", "another horse battery")
    provider.Authenticate("ada", "another horse battery")
