"""Who may in, by name and password: a file of salted hashes, and the class that Hive asks, compiled when it is needed.

A line of the file is `name:iterations:salt:hash`, salt and hash in hex, the hash PBKDF2 with HMAC-SHA256. The file is
read at every login, so that a change holds at once. Spark brings the compiler (Janino); no JDK is needed.
"""

import hashlib
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError, RunError, first_line

ITERATIONS = 600_000
MIN_LENGTH = 12
CLASS = "shoal.PasswordFile"

# Janino knows Java's language of about version 7; every failure is the same refusal, so that nothing tells names apart.
SOURCE = """
package shoal;

import java.io.BufferedReader;
import java.io.FileInputStream;
import java.io.InputStreamReader;
import java.security.MessageDigest;
import javax.crypto.SecretKeyFactory;
import javax.crypto.spec.PBEKeySpec;
import javax.security.sasl.AuthenticationException;
import org.apache.hive.service.auth.PasswdAuthenticationProvider;

public final class PasswordFile implements PasswdAuthenticationProvider {
    private static final String NOBODY = "-:ITERATIONS:00000000000000000000000000000000:00";

    public void Authenticate(String user, String password) throws AuthenticationException {
        boolean known = false;
        try {
            String line = lineOf(user);
            String[] parts = (line == null ? NOBODY : line).split(":");
            char[] given = (password == null ? "" : password).toCharArray();
            PBEKeySpec key = new PBEKeySpec(given, bytes(parts[2]), Integer.parseInt(parts[1]), 256);
            byte[] hash = SecretKeyFactory.getInstance("PBKDF2WithHmacSHA256").generateSecret(key).getEncoded();
            known = MessageDigest.isEqual(hash, bytes(parts[3])) && line != null;
        } catch (Exception error) {
            known = false;
        }
        if (!known) {
            throw new AuthenticationException("user name or password is wrong");
        }
    }

    private static String lineOf(String user) throws Exception {
        if (user == null || user.length() == 0) {
            return null;
        }
        FileInputStream file = new FileInputStream(System.getProperty("shoal.users"));
        try {
            BufferedReader reader = new BufferedReader(new InputStreamReader(file, "UTF-8"));
            String line = reader.readLine();
            while (line != null) {
                if (line.startsWith(user + ":")) {
                    return line.trim();
                }
                line = reader.readLine();
            }
            return null;
        } finally {
            file.close();
        }
    }

    private static byte[] bytes(String hex) {
        byte[] found = new byte[hex.length() / 2];
        for (int i = 0; i < found.length; i++) {
            found[i] = (byte) Integer.parseInt(hex.substring(2 * i, 2 * i + 2), 16);
        }
        return found;
    }
}
""".replace("ITERATIONS", str(ITERATIONS))


def line_of(user: str, password: str) -> str:
    """The line of the password file; ConfigError for a name that could not be read back, or a short password."""
    if not re.fullmatch(r"[\w.@-]{1,64}", user, flags=re.ASCII):
        raise ConfigError(f"user {user!r}: a name has up to 64 letters, digits and . _ @ -; choose such a one")
    if len(password) < MIN_LENGTH:
        raise ConfigError(
            f"the password of {user!r} has {len(password)} characters; choose one of {MIN_LENGTH} or more"
        )
    salt = secrets.token_bytes(16)
    hashed = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ITERATIONS)
    return f"{user}:{ITERATIONS}:{salt.hex()}:{hashed.hex()}"


def set_password(file: Path, user: str, password: str) -> None:
    """Adds a user or replaces the password of one; the file is its owner's alone."""
    line = line_of(user, password)
    kept = []
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines()
        kept = [other for other in lines if other.strip() and not other.startswith(f"{user}:")]
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
    part.write_text("".join(f"{each}\n" for each in [*kept, line]), encoding="utf-8")
    part.replace(file)


def require_users(file: Path) -> None:
    """ConfigError where nobody could log in by this file, or others than its owner could read or change it."""
    try:
        text, mode = file.read_text(encoding="utf-8"), file.stat().st_mode
    except OSError as error:
        raise ConfigError(f"--users '{file}': it cannot be read ({error.strerror}); `shoal passwd` makes it") from error
    if not re.search(r"^[^:\s]+:\d+:[0-9a-f]+:[0-9a-f]+$", text, flags=re.M):
        raise ConfigError(f"--users '{file}': it has no line of a user; `shoal passwd` writes one")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"--users '{file}': others than its owner may open it; chmod 600 it")


def authenticate_by(spark: SparkSession, users: Path, classes: Path) -> None:
    """Has Hive ask our class about every login; `classes` has to be on the class path of the running JVM."""
    jvm: Any = spark._jvm
    try:
        compiler = jvm.org.codehaus.janino.SimpleCompiler()
        compiler.cook(SOURCE)
        for name, code in dict(compiler.getBytecodes()).items():
            target = classes.joinpath(*name.split(".")).with_suffix(".class")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bytes(code))
    except (Py4JJavaError, OSError) as error:
        raise RunError(
            f"--users: the class that checks passwords was not made ({first_line(error)}); let LDAP "
            "check them, by spark.hadoop.hive.server2.authentication",
            code="SERVER_FAILED",
        ) from error
    jvm.java.lang.System.setProperty("shoal.users", str(users.absolute()))
    jvm.java.lang.System.setProperty("hive.server2.custom.authentication.class", CLASS)
    spark._jsc.hadoopConfiguration().set("hive.server2.authentication", "CUSTOM")
