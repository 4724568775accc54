"""The section `source.database` of a run file: which database, who logs in, and how many connections read."""

import re
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from shoal.conf.redact import scrub
from shoal.conf.section import PositiveInt, Section, SettingProblem, Text, VariableName, checked, raise_all

POSTGRESQL = "jdbc:postgresql:"


_jdbc_address = checked(
    r"jdbc:[a-z0-9+]+:\S+", "write an address that starts with jdbc:, as the database's JDBC driver says"
)


def _database_url(value: str) -> str:
    if isinstance(value, str):
        _jdbc_address(value)
        if scrub(value, pairs=True) != value or re.search(r"[?&;]user=", value):
            raise ValueError("user and password are no part of the address; use user and password_env or password_file")
    return value


DatabaseUrl = Annotated[str, BeforeValidator(_database_url)]


class DatabaseConfig(Section):
    """A database that Spark reads over JDBC: one consistent state of it for each run."""

    url: DatabaseUrl = Field(
        description="JDBC address without user and password, such as `jdbc:postgresql://HOST/DATABASE`."
    )
    user: Text | None = Field(default=None, description="Who logs in; unset: as the address or the driver says.")
    password_env: VariableName | None = Field(
        default=None, description="Environment variable of the driver that has the password; this or `password_file`."
    )
    password_file: Text | None = Field(
        default=None, description="File on the driver's machine whose first line is the password."
    )
    partitions: PositiveInt = Field(
        default=1,
        description="Connections that read at the same time, for PostgreSQL, which shows them all the same state.",
    )
    partition_column: Text | None = Field(
        default=None, description="Numeric, date or timestamp column whose range the connections share out."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.password_env and self.password_file:
            problems.append(SettingProblem((("password_env",), ("password_file",)), "keep one of the two"))
        if (self.partitions > 1) != (self.partition_column is not None):
            advice = "reading by several connections takes both, a number and a column to share out"
            problems.append(SettingProblem((("partitions",), ("partition_column",)), advice))
        if self.partitions > 1 and not self.url.startswith(POSTGRESQL):
            advice = (
                "only PostgreSQL lets several connections see one state of a table; leave the partitions out, or copy "
                "the table to the lake first"
            )
            problems.append(SettingProblem((("url",), ("partitions",)), advice))
        raise_all(problems)
        return self
