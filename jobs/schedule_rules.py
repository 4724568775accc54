"""What every rendered schedule keeps to, whoever runs it.

The exit codes decide: 1 is tried again once, 2 and 3 wait for somebody, 4 means that another run is at it.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Final

import yaml

from shoal.conf.errors import ConfigError, RefusedError, UserError
from shoal.conf.redact import is_secret_name, scrub
from shoal.conf.section import Section

RETRY_MINUTES: Final = 10
LONGEST_HOURS: Final = 12
NOT_AGAIN: Final = (UserError.exit_code, RefusedError.exit_code)
"""Exit codes that the same run would end with again."""

_VARIABLE = re.compile(r"\$\$|\$\{([A-Za-z_]\w*)", re.ASCII)
_OF_THIS_MACHINE = ("JAVA_HOME", "SPARK_HOME")
_OF_KIND: Final = {
    "yarn": ("HADOOP_CONF_DIR", "YARN_CONF_DIR"),
    "databricks": ("DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CONFIG_PROFILE"),
}
"""What a cluster manager's own client looks for, one of them at least."""

_TIME = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")


def hour_and_minute(at: str) -> tuple[int, int]:
    """A time of day as text; ConfigError for one that is none."""
    found = _TIME.fullmatch(at)
    if found is None:
        raise ConfigError(f"--at is {at!r}; write a time of day such as 02:30")
    return int(found[1]), int(found[2])


def dns_name(name: str) -> str:
    """The name as Kubernetes takes it: lower case, digits and hyphens, at most 52 for a CronJob."""
    return f"shoal-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}"[:52].rstrip("-")


def named_variables(files: Iterable[str], texts: Iterable[str] = ()) -> set[str]:
    """The variables that YAML files (outside their comments) and overrides take from the environment."""
    values = [token.value for file in files for token in yaml.scan(file) if isinstance(token, yaml.ScalarToken)]
    return {found[1] for text in (*values, *texts) for found in _VARIABLE.finditer(text) if found[1]}


def variables_of_kind(kind: str, *, in_pod: bool) -> set[str]:
    """What a target of this kind wants besides, ConfigError where none of it is set; a pod has a Java of its own."""
    names = _OF_KIND.get(kind, ())
    if names and not any(os.environ.get(name) for name in names):
        raise ConfigError(
            f"a target of kind {kind} wants {' or '.join(names)}, and none is set here; set it as the run needs it, "
            "and render again"
        )
    return {*names, *(() if in_pod else _OF_THIS_MACHINE)}


def split_variables(names: Iterable[str], sections: Sequence[Section]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The values of those that are set here, and the names of those that may be secret, whose values nobody writes.

    Secret is what a name or a value says so of, and what goes into a value of the sections that is not shown. A name
    that is not set has a default: loading the files has refused all others.
    """
    found = {name: os.environ[name] for name in sorted(names) if os.environ.get(name) is not None}
    masked = [texts for section in sections for texts in section.masked_texts()]

    def is_secret(name: str, value: str) -> bool:
        is_used = bool(value) and any(text.count(value) > shown.count(value) for text, shown in masked)
        return is_secret_name(name) or scrub(value, pairs=True) != value or is_used or "\n" in value

    secrets = tuple(name for name, value in found.items() if is_secret(name, value))
    return {name: value for name, value in found.items() if name not in secrets}, secrets
