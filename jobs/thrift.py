"""Spark's Thrift server around the running session: where it listens, who may in, what Spark has to be started with."""

import contextlib
import fcntl
import ipaddress
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JError
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, RunError, first_line
from shoal.conf.run import SparkConfig
from shoal.jobs.jars import delta_jars
from shoal.jobs.passwords import authenticate_by, require_users

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 10000
KEYSTORE_PASSWORD = "SHOAL_KEYSTORE_PASSWORD"  # noqa: S105 - its name
"""Environment variable with the password of the keystore: on a command line others could read it."""

CONNECT_TOKEN = "SPARK_CONNECT_AUTHENTICATE_TOKEN"  # noqa: S105 - its name
"""Spark's own environment variable with what clients of Spark Connect have to send."""

# Hive's own variables, which would win over what was checked here.
OVERRIDING = ("HIVE_SERVER2_THRIFT_BIND_HOST", "HIVE_SERVER2_THRIFT_PORT")
CLASSES = "classes"
"""Folder of the catalog that is on the JVM's class path."""

SINGLE_SESSION = "spark.sql.hive.thriftServer.singleSession"
START_S = 30.0
START = "org.apache.spark.sql.hive.thriftserver.HiveThriftServer2"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where JDBC clients connect. keystore: PKCS12 or JKS file with the server's key, for TLS; users: passwords.

    connect: port for clients of Spark Connect, on 127.0.0.1 alone; None for no such server.
    """

    host: str = LOOPBACK
    port: int = DEFAULT_PORT
    keystore: Path | None = None
    users: Path | None = None
    connect: int | None = None

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def jdbc(self) -> str:
        """The address as JDBC clients take it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"jdbc:hive2://{host}:{self.port}/default{';ssl=true' if self.keystore else ''}"

    def checked(self) -> "Endpoint":
        """The same with a port that is free now, for port 0 any.

        Raises ConfigError where it cannot be listened on, and for what would let others in unencrypted or unasked.
        """
        for name in OVERRIDING:
            if name in os.environ:
                raise ConfigError(
                    f"{name} is set, and Hive would listen where it says; unset it, use --bind and --port"
                )
        for name, port in (("--port", self.port), ("--connect", self.connect or 0)):
            if not 0 <= port < 2**16:
                raise ConfigError(f"{name} is {port}; give one from 1 to 65535, or 0 for any that is free")
        if self.users is not None:
            require_users(self.users)
        if self.keystore is not None:
            if not self.keystore.is_file():
                raise ConfigError(f"--tls-keystore '{self.keystore}': there is no such file; make one with keytool")
            if not os.environ.get(KEYSTORE_PASSWORD):
                raise ConfigError(f"--tls-keystore is given and {KEYSTORE_PASSWORD} is not set; set it to its password")
        elif not self.is_loopback:
            raise ConfigError(
                f"--bind {self.host} without --tls-keystore: queries, answers and "
                "passwords would travel readable for others; give the server a key, or let it listen on 127.0.0.1 alone"
            )
        found = replace(self, port=_free_port(f"--bind {self.host} --port", self.host, self.port))
        if self.connect is None:
            return found
        if self.users is not None or not self.is_loopback:
            self.require_token()
        return replace(found, connect=_free_port("--connect", LOOPBACK, self.connect))

    def require_token(self) -> None:
        """ConfigError where JDBC clients are asked for passwords, and those of Spark Connect would be for nothing."""
        if self.connect is not None and not os.environ.get(CONNECT_TOKEN):
            raise ConfigError(
                f"--connect beside passwords without {CONNECT_TOKEN}: Spark Connect would let everybody here in "
                "without one; set it to a secret that its clients send as token"
            )


def _free_port(told: str, host: str, port: int) -> int:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"{told} {port}: nothing can listen there ({error.strerror or error}); another server may run already, "
            "choose another port",
            code="SERVER_FAILED",
        ) from error


def session_settings(catalog: Path, connect: int | None = None) -> SparkConfig:
    """What Spark has to be started with to serve SQL; `catalog` keeps schemas, tables and functions between starts.

    A metastore that hive-site.xml names is used instead of the one in `catalog`. connect: the port of a server for
    Spark Connect in the same process, on 127.0.0.1; its clients have sessions of their own, which see the tables and
    permanent functions of the catalog, and no temporary functions.
    """
    # Connections look for Delta's catalog on the class path of the JVM alone.
    class_path = os.pathsep.join(str(entry) for entry in [*delta_jars(), catalog / CLASSES])
    conf: dict[str, Any] = {
        "spark.sql.catalogImplementation": "hive",
        SINGLE_SESSION: "true",
        "spark.scheduler.mode": "FAIR",
        # Without it, named parameters fail as soon as Delta's extension is there.
        "spark.sql.legacy.parameterSubstitution.constantsOnly": "true",
        "spark.driver.extraClassPath": class_path,
    }
    if connect is not None:
        conf |= {
            "spark.plugins": "org.apache.spark.sql.connect.SparkConnectPlugin",
            "spark.connect.grpc.binding.address": LOOPBACK,
            "spark.connect.grpc.binding.port": str(connect),
        }
    if not _names_a_metastore():
        database = catalog / "metastore"
        conf |= {
            "spark.sql.warehouse.dir": str(catalog / "warehouse"),
            "spark.hadoop.javax.jdo.option.ConnectionURL": f"jdbc:derby:;databaseName={database};create=true",
            "spark.driver.defaultJavaOptions": f"-Dderby.stream.error.file={catalog / 'derby.log'}",
        }
    return SparkConfig(conf=conf)


def default_catalog() -> Path:
    """Where the embedded catalog lies unless somebody says otherwise."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "shoal" / "catalog"


@contextlib.contextmanager
def held_catalog(catalog: Path) -> Iterator[None]:
    """Makes the folder, for its owner alone, and keeps other servers out; ConfigError where either cannot be."""
    try:
        if not catalog.exists():
            catalog.mkdir(parents=True)
            catalog.chmod(stat.S_IRWXU)
        elif not (catalog / CLASSES).is_dir() and any(catalog.iterdir()):
            raise ConfigError(f"--catalog '{catalog}': there is something else in this folder; name a new one")
        (catalog / CLASSES).mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--catalog '{catalog}': the folder cannot be made or is not yours ({error.strerror}); name another"
        ) from error
    with (catalog / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"--catalog '{catalog}': another server has it; name another folder, or stop that server",
                code="SERVER_FAILED",
            ) from error
        yield


@contextlib.contextmanager
def thrift_server(spark: SparkSession, endpoint: Endpoint) -> Iterator[None]:
    """JDBC clients get into this session for as long as the context lasts; RunError when the server does not start."""
    if spark.conf.get(SINGLE_SESSION, "false") != "true":
        raise ConfigError(
            f"{SINGLE_SESSION} is not true in the running session, so clients would not see the functions; set it "
            "when Spark is started"
        )
    settings = {
        "hive.server2.transport.mode": "binary",
        "hive.server2.thrift.bind.host": endpoint.host,
        "hive.server2.thrift.port": str(endpoint.port),
        "hive.server2.use.SSL": str(endpoint.keystore is not None).lower(),
    }
    if endpoint.keystore is not None:
        settings["hive.server2.keystore.path"] = str(endpoint.keystore.absolute())
        settings["hive.server2.keystore.password"] = os.environ[KEYSTORE_PASSWORD]
    hadoop = spark._jsc.hadoopConfiguration()
    for name, value in settings.items():
        hadoop.set(name, value)
    started: list[Any] = []
    failed: list[Exception] = []

    def start() -> None:
        try:
            started.append(getattr(spark._jvm, START).startWithSparkSession(spark._jsparkSession, False))
        except Py4JError as error:
            failed.append(error)

    # In a thread of its own: one that has asked the metastore before has a copy of Hadoop's settings as they were then.
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    try:
        try:
            if failed:
                raise failed[0]
            _require_taken(started[0], settings)
            _wait_for(endpoint)
        except (Py4JError, OSError) as error:
            raise RunError(
                f"the SQL server did not start at {endpoint.host}:{endpoint.port} "
                f"({first_line(error)}); Spark's own log says why",
                code="SERVER_FAILED",
            ) from error
        yield
    finally:
        for server in started:
            with contextlib.suppress(Py4JError, OSError):  # a signal to all processes has ended the JVM already
                server.stop()


def require_authentication(spark: SparkSession, endpoint: Endpoint, catalog: Path) -> None:
    """Sets the endpoint's own passwords up; ConfigError for one that others reach and that asks for none at all."""
    if endpoint.users is not None:
        authenticate_by(spark, endpoint.users, catalog / CLASSES)
        return
    found = str(spark._jsc.hadoopConfiguration().get("hive.server2.authentication", "NONE")).upper()
    if found != "NONE":
        endpoint.require_token()
    if not endpoint.is_loopback and found not in ("LDAP", "KERBEROS", "CUSTOM", "PAM"):
        raise ConfigError(
            f"--bind {endpoint.host} with hive.server2.authentication {found} asks nobody for a password; give --users "
            "FILE, or set spark.hadoop.hive.server2.authentication to LDAP in spark-defaults.conf"
        )


def _require_taken(server: Any, settings: dict[str, str]) -> None:
    """RunError where the server goes by other settings, which might let others in."""
    taken = server.getHiveConf()
    for name, value in settings.items():
        if taken.get(name) != value:
            raise RunError(
                f"the SQL server took no notice of {name}; see what hive-site.xml or spark-defaults.conf say about it",
                code="SERVER_FAILED",
            )


def _wait_for(endpoint: Endpoint) -> None:
    """Returns when connections are taken, which a thread of the server's begins; OSError when that takes too long."""
    began = time.monotonic()
    while True:
        try:
            socket.create_connection((endpoint.host, endpoint.port), timeout=START_S).close()
        except ConnectionRefusedError:
            if time.monotonic() - began > START_S:
                raise
            time.sleep(0.1)
        else:
            return


def _names_a_metastore() -> bool:
    """Whether hive-site.xml is where Spark looks for it."""
    folders = [os.environ.get(name) for name in ("SPARK_CONF_DIR", "HADOOP_CONF_DIR", "HIVE_CONF_DIR")]
    home = os.environ.get("SPARK_HOME")
    folders.append(str(Path(home) / "conf") if home else None)
    return any(folder and (Path(folder) / "hive-site.xml").is_file() for folder in folders)
