"""What is never shown: names and texts that carry secrets, and those that only look a little like it."""

import pytest

from shoal.conf.redact import is_secret_name, scrub


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "dbPassword",
        "spark.hadoop.fs.s3a.access.key",
        "spark.hadoop.fs.s3a.secret.key",
        "fs.azure.account.key.store.dfs.core.windows.net",
        "authToken",
        "accessKey",
        "api_key",
        "apikey",
        "spark.ssl.keyStorePassword",
        "credentials",
        "fs.azure.sas.container.account",
    ],
)
def test_names_of_secrets_are_recognised(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["header", "keyspace", "spark.sql.shuffle.partitions", "multiLine", "monkeys", "user"])
def test_other_names_are_shown(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pw@host/db", "postgresql://***@host/db"),
        ("s3a://ID:a/b+c@bucket/x", "s3a://***@bucket/x"),
        ("https://token@host/x", "https://***@host/x"),
        ("abfss://box@account.dfs.core.windows.net/x", "abfss://box@account.dfs.core.windows.net/x"),
        ("https://host/x?sig=abc&n=1", "https://host/x?sig=***&n=1"),
        ("jdbc:postgresql://host/db?user=a&password=b", "jdbc:postgresql://host/db?user=a&password=***"),
        ("jdbc:oracle:thin:scott/tiger@//host:1521/db", "jdbc:oracle:thin:***@//host:1521/db"),
        ("token = 'x'", "token = 'x'"),
        ("sc://host:15002/;token=a;use_ssl=true", "sc://host:15002/;***"),
        ("the server sc://host:15002/;x-auth=a is gone", "the server sc://host:15002/;*** is gone"),
        ("sc://host:15002;token=a", "sc://host:15002/;***"),
        ("sc://host:15002", "sc://host:15002"),
    ],
)
def test_credentials_inside_a_uri_are_masked(text: str, shown: str) -> None:
    assert scrub(text, pairs=False) == shown


def test_secret_pairs_are_masked_where_the_entry_is_free() -> None:
    assert scrub("-Dlevel=1 -Djavax.net.ssl.keyStorePassword=abc", pairs=True).endswith("keyStorePassword=***")


def test_a_setting_that_a_message_begins_with_hides_nothing() -> None:
    told = "source.key: 4 rows share their key (id) with another row"
    assert scrub(told, pairs=True) == told
    assert scrub("accountKey=abc; ok", pairs=True) == "accountKey=***; ok"
