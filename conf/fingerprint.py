"""One digest for structured values: the identity of an encoder, of a plan, of a table."""

import hashlib
from collections.abc import Mapping


def digest(value: object) -> str:
    """Hex sha256 of a typed canonical encoding, so that 1, 1.0, True and "1" all differ.

    Takes None, bool, int, float, str, bytes, lists or tuples (the same to it) and mappings (in any order), nested at
    will. Raises TypeError for anything else: a guessed `str(value)` would let two identities collide.
    """
    return hashlib.sha256(_encode(value)).hexdigest()


def _encode(value: object) -> bytes:
    """Kind (one byte), length (eight bytes, big-endian), payload: no two values share an encoding."""
    match value:
        case None:
            return _framed(b"n", b"")
        case bool():
            return _framed(b"b", b"1" if value else b"0")
        case int():
            return _framed(b"i", str(int(value)).encode())
        case float():
            return _framed(b"f", float(value).hex().encode())
        case str():
            return _framed(b"s", str.encode(value, "utf-8", "surrogatepass"))
        case bytes():
            return _framed(b"y", bytes(value))
        case list() | tuple():
            return _framed(b"l", b"".join(_encode(item) for item in value))
        case Mapping():
            pairs = sorted((_encode(key), _encode(item)) for key, item in value.items())
            return _framed(b"d", b"".join(key + item for key, item in pairs))
    raise TypeError(
        f"digest() got a {type(value).__name__}; pass None, bool, int, float, str, bytes, list, tuple or dict."
    )


def _framed(kind: bytes, payload: bytes) -> bytes:
    return kind + len(payload).to_bytes(8, "big") + payload
