"""What every rendered schedule keeps to, whoever runs it.

The exit codes decide: 1 is tried again once, 2 and 3 wait for somebody, 4 means that another run is at it.
"""

import re
from typing import Final

from shoal.conf.errors import ConfigError, RefusedError, UserError

RETRY_MINUTES: Final = 10
LONGEST_HOURS: Final = 12
NOT_AGAIN: Final = (UserError.exit_code, RefusedError.exit_code)
"""Exit codes that the same run would end with again."""

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
