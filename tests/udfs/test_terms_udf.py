import pandas as pd

from shoal.conf.run import LexicalConfig
from shoal.udfs.terms import describe_terms
from shoal.udfs.terms_udf import query_terms_udf, terms_udf

PLAIN, STEMMED = str(describe_terms(LexicalConfig())), str(describe_terms(LexicalConfig(stemmer="english")))


def test_each_query_is_cut_by_its_own_description() -> None:
    found = query_terms_udf().func(pd.Series([PLAIN, STEMMED, PLAIN]), pd.Series(["two wings", "two wings", None]))
    assert found.tolist() == [["two", "wings"], ["two", "wing"], None]


def test_texts_are_cut_by_one_description() -> None:
    assert terms_udf(STEMMED).func(pd.Series(["two wings", None, "?"])).tolist() == [["two", "wing"], None, []]
