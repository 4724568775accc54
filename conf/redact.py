"""What may be shown of a setting: passwords, tokens and values from the environment are replaced by `***`."""

import re

MASK = "***"

_SECRET_NAME = re.compile(
    r"passw|passphrase|\bpwd\b|secret|token|credential|signature|\bsas\b|key$|\bkey\b|(?:api|access|account|private)_?key",
    re.IGNORECASE,
)
_USER_INFO = re.compile(
    r"(?<=://)[^/\s@:]*:[^\s@]*@|(?<=http://)[^/\s@]+@|(?<=https://)[^/\s@]+@|(?<=:thin:)[^/\s@:]*/[^\s@]*@"
)
_SECRET_PAIR = re.compile(
    r"((?:(?:[\w.-]*(?:passw|secret|token|credential|passphrase)[\w.-]*|pwd|sig|sas)\s*[=:]|[\w.-]*key\s*=)\s*)[^\s&;,\"']+",
    re.IGNORECASE,
)


_CONNECT = re.compile(r"(sc://[^\s/;?'\"]*)[/;?][^\s'\"]*=[^\s'\"]*")
"""An address of Spark Connect with parameters, each of which may be a header that lets somebody in."""


def is_secret_name(name: str) -> bool:
    """True for the name of a free entry (an option, a Spark property, a tag) whose value nobody should see.

    Shoal's own settings hold no secret, so `source.key` and `chunk.tokens` are never asked.
    """
    return _SECRET_NAME.search(re.sub(r"(?<=[a-z])(?=[A-Z])|_", "-", name)) is not None


_CREDENTIAL = re.compile(
    r"(?:passw(?:or)?d|passphrase|secret(?:[._-]?key)?|account[._-]?key|(?:[._-]|oauth|session|access|auth|api|^)token)"
    r"(?:\.[\w-]+(?:\.[\w-]+){2,})?$",
    re.IGNORECASE,
)
"""At the end of a name, or before the account of a store that the name goes on with."""


def is_credential(name: str) -> bool:
    """True for the name of a free entry whose value lets somebody in, and so never stands in a file."""
    return _CREDENTIAL.search(name) is not None


def scrub(text: str, *, pairs: bool) -> str:
    """The text without `user:password@` in a URI; with `pairs` also without what follows `password=` and its like."""
    text = _CONNECT.sub(rf"\1/;{MASK}", _USER_INFO.sub(f"{MASK}@", text))
    if pairs or "://" in text:
        text = _SECRET_PAIR.sub(lambda found: found[1] + MASK, text)
    return text


def masked_address(url: str) -> str:
    """A webhook's address down to its host: path and query are what authorises whoever knows them."""
    scheme, found, rest = url.partition("://")
    host = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
    return f"{scheme}://{host}/{MASK}" if found else MASK
