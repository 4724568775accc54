"""The folders that paths may lie in, where whoever keeps the machine has declared any: in SHOAL_ROOTS.

Paths are compared by where they lead: of local ones links and `..` are followed, of addresses `..`. That keeps paths in
bounds which are put together from what users type; it is no sandbox for whoever may write SQL or settings of Spark.
"""

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal.conf.errors import ConfigError

VARIABLE = "SHOAL_ROOTS"

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:)(?://([^/]*))?(/.*|$)", re.DOTALL)
"""Scheme, host or bucket (without one, as in `hdfs:/docs`, the one that Hadoop is set to), path."""

_FILE = re.compile(r"file:(///*)?(?=/)", re.IGNORECASE)
_WILDCARD = re.compile(r"[*?\[{]")


def require_inside(path: str, setting: str, *, is_pattern: bool = False) -> None:
    """ConfigError where the path, or a link below it, leads out of all declared roots; nothing where none is declared.

    setting: as what the path was given. is_pattern: whether wildcards in it are wildcards; of a local path the last
    part may have some.
    """
    roots = [_leads_to(root) for root in _declared()]
    if not roots:
        return
    wildcard = _WILDCARD.search(path) if is_pattern else None
    base = path[: wildcard.start()].rpartition("/")[0] or "/" if wildcard else path
    rest = path[len(base) :].strip("/")
    if is_pattern and "\\" in path:
        raise _outside(f"{setting} is '{path}', with a backslash, which a pattern may hide anything behind", roots)
    if ".." in rest or ("/" in rest and not _ADDRESS.match(_local(path))):
        raise _outside(f"{setting} is '{path}', with a wildcard before its last part", roots)
    leads = _leads_to(base)
    if not _is_below(leads, roots):
        raise _outside(f"{setting} is '{path}'" + (f", which leads to {leads}" if leads != path else ""), roots)
    for link in _links_below(leads):
        if not _is_below(_leads_to(link), roots):
            raise _outside(f"{setting} is '{path}', and the link {link} leads to {_leads_to(link)}", roots)


def _declared() -> list[str]:
    declared = [root.strip() for root in os.environ.get(VARIABLE, "").split(",") if root.strip()]
    for root in declared:
        if not (root.startswith("/") or ":/" in root):
            raise ConfigError(f"{VARIABLE} has '{root}'; give absolute paths and addresses, separated by commas")
    return declared


def _local(path: str) -> str:
    return _FILE.sub("", path)


def _leads_to(path: str) -> str:
    """The path without links and `..`; of an address, whose store has no links, without `..`."""
    path = _local(path)
    if found := _ADDRESS.match(path):
        return f"{found[1]}//{found[2] or ''}" + posixpath.normpath(f"/{found[3]}").replace("//", "/")
    return os.path.realpath(path)


def _is_below(leads: str, roots: Sequence[str]) -> bool:
    return any(leads == root or leads.startswith(root.rstrip("/") + "/") for root in roots)


def _links_below(folder: str) -> Iterator[str]:
    for above, folders, files in os.walk(folder):
        yield from (str(path) for name in (*folders, *files) if (path := Path(above, name)).is_symlink())


def _outside(found: str, roots: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{found}: outside of {', '.join(roots)}, which {VARIABLE} names as the places that paths may lie in; put it "
        "there, or ask who keeps this machine",
        code="PATH_OUTSIDE_ROOTS",
    )
