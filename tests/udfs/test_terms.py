import json
from typing import get_args

import bm25s
import pytest
import Stemmer

from shoal.conf.errors import ConfigError
from shoal.conf.run import LexicalConfig
from shoal.conf.section import StemmerName
from shoal.udfs.terms import describe_terms, term_finder

TEXTS = [
    "The wings of a wing, winged: 12 wings!",
    "Größe ΣΊΣΥΦΟΣ naïve façade — l'été, don't, snake_case x y2",
    "日本語 テキスト",
    "... !!",
    "",
]


def finder(**settings: object):
    return term_finder(str(describe_terms(LexicalConfig.model_validate(settings))))


@pytest.mark.parametrize("stemmer", [None, "english", "german"])
def test_the_terms_are_those_of_a_kept_library(stemmer: str | None) -> None:
    other = Stemmer.Stemmer(stemmer) if stemmer else None
    theirs = bm25s.tokenize(TEXTS, stopwords=None, stemmer=other, return_ids=False, show_progress=False)
    assert [finder(stemmer=stemmer)(text) for text in TEXTS] == [list(terms) for terms in theirs]


def test_stopwords_go_before_stems_are_cut() -> None:
    terms = finder(stemmer="english", stopwords=["wings"])
    assert terms("Wings and WING and winged") == ["and", "wing", "and", "wing"]


def test_a_pattern_says_what_a_term_is_whatever_groups_it_has() -> None:
    assert finder(pattern=r"([a-z])[0-9]+")("A1 b b22 3c") == ["a1", "b22"]


def test_every_stemmer_of_the_setting_is_there() -> None:
    assert set(get_args(StemmerName)) <= set(Stemmer.algorithms())


def test_the_description_has_the_version_of_the_stemmer_only_where_there_is_one() -> None:
    assert describe_terms(None) is None
    assert "stemmer_version" not in json.loads(str(describe_terms(LexicalConfig())))
    described = json.loads(str(describe_terms(LexicalConfig(stemmer="dutch"))))
    assert described["stemmer_version"] == Stemmer.version()


def test_stems_of_another_version_are_refused() -> None:
    described = json.loads(str(describe_terms(LexicalConfig(stemmer="english")))) | {"stemmer_version": "0.1"}
    with pytest.raises(ConfigError, match=r"version 0\.1 of the stemmer") as caught:
        term_finder(json.dumps(described))
    assert caught.value.code == "TERMS_CHANGED"
