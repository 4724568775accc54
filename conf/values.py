"""The small values that settings are made of: limits, durations, column entries and model references.

Parsers raise ValueError with advice only; the loader puts the setting and what was found in front of it, so that a
value which came from the environment is never repeated.
"""

import re
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Literal

SHOAL_COLUMNS = (
    "chunk_index",
    "chunk_start",
    "chunk_end",
    "text",
    "content_hash",
    "row_hash",
    "meta_hash",
    "embedding",
    "n_tokens",
    "truncated",
    "error",
    "embedded_at",
    "cell",
    "bm25_terms",
)
"""Columns of a published table that Shoal owns: no key or metadata column may take their names, in any case."""

UNFIT_NAME = re.compile(r"[\s,;{}()=]")
"""Characters that Delta refuses in a column's name, unless the table maps its columns."""

ModelForm = Literal["folder", "store", "package", "hash", "registry", "hub"]

_FOLDER = re.compile(r"\.{0,2}/|~|\.{1,2}$")
_LIMIT_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_COUNT = re.compile(r"\d{1,18}")
_DURATION = re.compile(r"(\d{1,9})\s*([smhd])")
_UNIT_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_RENAMED = re.compile(r"(`[^`]+`|\S(?:.*?\S)?)\s+[aA][sS]\s+(`[^`]+`|\S+)")
_STORE = re.compile(r"(?!https?:)[a-z][a-z0-9+-]*://[^\s/:]+(:\d+)?/\S+")
_PACKAGE = re.compile(r"package:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_HASH = re.compile(r"hash:([1-9]\d{0,4})")
_REGISTRY = re.compile(r"models:/[^/@]+(/[^/@]+|@[^/@]+)|models:/m-[0-9a-f]+")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FORMS: dict[ModelForm, re.Pattern[str]] = {
    "store": _STORE,
    "package": _PACKAGE,
    "hash": _HASH,
    "registry": _REGISTRY,
    "hub": _HUB,
}


@dataclass(frozen=True, slots=True)
class Limit:
    """How many of a whole may be bad: a share (0.01 is 1%) or a count, exactly one of the two.

    `floor` is the size of the whole below which the limit never trips, for shares of very small tables.
    """

    share: float | None = None
    count: int | None = None
    floor: int = 0

    def __post_init__(self) -> None:
        if (self.share is None) == (self.count is None):
            raise ValueError("a limit is a share or a count; give exactly one of the two")

    def exceeded(self, part: int, whole: int) -> bool:
        """True when `part` of `whole` is more than the limit allows; exactly at the limit is still allowed."""
        if whole < self.floor:
            return False
        if self.count is not None:
            return part > self.count
        return part > Fraction(str(self.share)) * whole

    def __str__(self) -> str:
        if self.count is not None:
            return str(self.count)
        return f"{(Decimal(str(self.share)) * 100).normalize():f}%"


def parse_limit(value: object) -> Limit:
    """A limit from a percentage such as "1%" or a count such as 100; raises ValueError for a bare fraction."""
    if isinstance(value, Limit):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Limit(count=value)
    if isinstance(value, str):
        text = value.strip()
        if share := _LIMIT_SHARE.fullmatch(text):
            percent = Decimal(share[1])
            if percent > 100:
                raise ValueError("a share is at most 100%; leave the setting out for the default")
            return Limit(share=float(percent / 100))
        if _COUNT.fullmatch(text):
            return Limit(count=int(text))
        if re.fullmatch(r"\d*\.\d+|\d+\.\d*", text):
            value = float(text)
    if isinstance(value, float):
        raise ValueError("a bare fraction is ambiguous; write a percentage such as 1% or a whole number such as 100")
    raise ValueError("write a percentage such as 1% or a whole number such as 100")


def parse_duration(value: object) -> timedelta:
    """A length of time from a whole number and a unit (s, m, h, d), such as "30s" or "7d"; more than zero."""
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
        if seconds <= 0 or seconds != int(seconds):
            raise ValueError("a duration is a positive whole number of seconds")
        return value
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError("write a whole number and a unit (s, m, h or d), such as 30s, 10m, 36h or 7d")
    seconds = int(found[1]) * _UNIT_SECONDS[found[2]]
    if not 0 < seconds <= 36_500 * 86_400:
        raise ValueError("write a duration of more than zero and at most 36500d")
    return timedelta(seconds=seconds)


def format_duration(value: timedelta) -> str:
    """The duration as a run file writes it, in the largest unit that loses nothing (90m stays 90m, 24h is 1d)."""
    seconds = int(value.total_seconds())
    unit = next(unit for unit, size in _UNIT_SECONDS.items() if seconds % size == 0)
    return f"{seconds // _UNIT_SECONDS[unit]}{unit}"


@dataclass(frozen=True, slots=True)
class MetadataColumn:
    """A column that travels with a row: `source` is its exact name in the source, `name` the published one."""

    source: str
    name: str


def parse_column(entry: str) -> MetadataColumn:
    """A column entry, `name` or `name AS new`; backticks around a name keep blanks and the word AS inside it."""
    text = entry.strip()
    if not text:
        raise ValueError("a column name is empty; write the name of a column")
    renamed = _RENAMED.fullmatch(text)
    source, name = (renamed[1], renamed[2]) if renamed else (text, text)
    source, name = source.strip("`"), name.strip("`")
    if not source.strip() or not name.strip():
        raise ValueError("a column name is empty; write 'name' or 'name AS new'")
    return MetadataColumn(source, name)


def model_form(reference: str) -> ModelForm:
    """Where a model reference points, by its spelling alone; raises ValueError when it fits none of the forms."""
    if _FOLDER.match(reference):
        return "folder"
    for form, pattern in _FORMS.items():
        if pattern.fullmatch(reference):
            return form
    raise ValueError(
        "write a folder (starting with ./, ../, ~ or /), its address on a store ('s3a://BUCKET/FOLDER'), "
        "'package:NAME', a Hub id such as 'BAAI/bge-small-en-v1.5', 'models:/NAME@ALIAS', 'models:/NAME/VERSION', or "
        "'hash:DIM' for vectors without meaning"
    )
