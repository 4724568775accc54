import pandas as pd

from shoal.conf.run import LexicalConfig
from shoal.udfs.terms import describe_terms
from shoal.udfs.terms_udf import terms_of


def test_each_text_is_cut_by_its_own_description() -> None:
    plain, stemmed = describe_terms(LexicalConfig()), describe_terms(LexicalConfig(stemmer="english"))
    found = terms_of(pd.Series([plain, stemmed, plain, plain]), pd.Series(["two wings", "two wings", None, "?"]))
    assert found.tolist() == [["two", "wings"], ["two", "wing"], None, []]
