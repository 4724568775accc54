"""Terms of a text, for BM25: words in lower case, those that say nothing left out, each cut to its stem.

The terms of a query and of the texts that it searches have to be made alike, so a table carries the description that
its terms were made by, and a query is cut by that.
"""

import json
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import regex
import Stemmer

from shoal.conf.errors import ConfigError
from shoal.conf.run import LexicalConfig

MAX_SETTINGS = 8
"""Different descriptions that a worker keeps compiled."""


def describe_terms(lexical: LexicalConfig | None) -> str | None:
    """All that decides on the terms of a text, as JSON: the settings, and the version of the stemmer if there is one.

    None where no terms are asked for.
    """
    if lexical is None:
        return None
    found: dict[str, Any] = lexical.model_dump(mode="json")
    found["stopwords"] = sorted({lower_case(word, lexical.stemmer) for word in lexical.stopwords})
    if lexical.stemmer is not None:
        found["stemmer_version"] = Stemmer.version()
    return json.dumps(found, sort_keys=True, ensure_ascii=False)


@lru_cache(maxsize=MAX_SETTINGS)
def term_finder(described: str) -> Callable[[str], list[str]]:
    """Gives the terms of a text, in their order and as often as they occur, by a description of `describe_terms`.

    ConfigError where the terms were cut by another version of the stemmer than the one here, or by settings that this
    Shoal does not know.
    """
    settings = json.loads(described)
    version = settings.pop("stemmer_version", None)
    if version not in (None, Stemmer.version()):
        raise ConfigError(
            f"the table's terms are cut by version {version} of PyStemmer, and here is {Stemmer.version()}, with other "
            "stems; install the same version on every machine, or let `shoal embed` cut all terms anew from one that "
            "has this version",
            code="TERMS_CHANGED",
        )
    try:
        lexical = LexicalConfig.model_validate(settings)
    except ValueError as error:
        raise ConfigError(
            f"the table's terms are cut by settings that this Shoal does not know ({described}); upgrade Shoal",
            code="TABLE_FORMAT_NEWER",
        ) from error
    pattern, stopwords = regex.compile(lexical.pattern, regex.IGNORECASE), frozenset(lexical.stopwords)
    stems = Stemmer.Stemmer(lexical.stemmer).stemWords if lexical.stemmer else None

    def terms(text: str) -> list[str]:
        words = (match.group() for match in pattern.finditer(lower_case(text, lexical.stemmer)))
        kept = [word for word in words if word and word not in stopwords]
        return stems(kept) if stems else kept

    return terms


def lower_case(text: str, language: str | None) -> str:
    """The text in lower case, in one spelling (NFKC) where two look the same; the Turkish I as that language has it."""
    text = unicodedata.normalize("NFKC", text)
    if language == "turkish":
        text = text.replace("I", "\u0131").replace("\u0130", "i")
    # Python makes two characters of a capital I with a dot.
    return text.lower().replace("i\u0307", "i")
