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


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("हिन्दी भाषा में किताबें", ["हिन्दी", "भाषा", "में", "किताबें"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("fac\u0327ade ﬁsh \uff21\uff22", ["façade", "fish", "ab"]),
        ("\u0130stanbul ISTANBUL", ["istanbul", "istanbul"]),
    ],
)
def test_words_of_other_scripts_stay_whole_and_what_looks_the_same_is_the_same(text: str, wanted: list[str]) -> None:
    assert finder()(text) == wanted


def test_turkish_has_its_own_i() -> None:
    assert finder(stemmer="turkish")("ISI \u0130Z") == finder(stemmer="turkish")("\u0131s\u0131 iz")


def test_the_order_and_case_of_stopwords_change_nothing() -> None:
    described = {str(describe_terms(LexicalConfig(stopwords=words))) for words in (("The", "a"), ("a", "the", "A"))}
    assert len(described) == 1
    assert term_finder(described.pop())("The wing") == ["wing"]


def test_a_pattern_says_what_a_term_is_whatever_groups_it_has() -> None:
    assert finder(pattern=r"([A-Z])[0-9]+")("A1 b b22 3c") == ["a1", "b22"]
    assert finder(pattern=r"\b")("ab 1") == []


def test_every_stemmer_of_the_setting_is_there() -> None:
    assert set(get_args(StemmerName)) <= set(Stemmer.algorithms())


def test_the_description_has_the_version_of_the_stemmer_only_where_there_is_one() -> None:
    assert describe_terms(None) is None
    assert "stemmer_version" not in json.loads(str(describe_terms(LexicalConfig())))
    described = json.loads(str(describe_terms(LexicalConfig(stemmer="dutch"))))
    assert described["stemmer_version"] == Stemmer.version()


def test_stems_of_another_version_are_refused() -> None:
    described = json.loads(str(describe_terms(LexicalConfig(stemmer="english")))) | {"stemmer_version": "0.1"}
    with pytest.raises(ConfigError, match=r"version 0\.1 of PyStemmer") as caught:
        term_finder(json.dumps(described))
    assert caught.value.code == "TERMS_CHANGED"


def test_settings_of_a_later_shoal_are_refused() -> None:
    described = json.loads(str(describe_terms(LexicalConfig()))) | {"folding": True}
    with pytest.raises(ConfigError, match="upgrade Shoal") as caught:
        term_finder(json.dumps(described))
    assert caught.value.code == "TABLE_FORMAT_NEWER"
