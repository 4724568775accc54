from pathlib import Path

import pytest
from tokenizers import Tokenizer

from shoal.udfs.tokenizing import CHARS_PER_TOKEN, SPARE_TOKENS, WindowTokenizer, clean


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


def whole(tokenizer_folder: Path, text: str, max_tokens: int) -> list[int]:
    """Ids of the text tokenised in one piece."""
    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    plain.enable_truncation(max_tokens)
    return list(plain.encode(text).ids)


def test_ids_hold_the_prompt_and_special_tokens(tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    window = WindowTokenizer(tokenizer, max_tokens=40, prompt="ask: ")(["where", ""])
    assert window.items_N[0].tolist() == whole(tokenizer_folder, "ask: where", 40)
    assert window.items_N[1].tolist() == whole(tokenizer_folder, "ask: ", 40)
    assert window.n_tokens_N.tolist() == [len(ids) for ids in window.items_N]
    assert window.truncated_N.tolist() == [False, False]


@pytest.mark.parametrize("max_tokens", [3, 16])
@pytest.mark.parametrize("word", ["word ", "x", "\u9b5a", "a" * 3000 + " ", "\t"])
def test_a_cut_text_gives_the_ids_of_the_whole_one(
    tokenizer: Tokenizer, tokenizer_folder: Path, word: str, max_tokens: int
) -> None:
    text = word * (3 * CHARS_PER_TOKEN * (max_tokens + SPARE_TOKENS) // len(word) + 2)
    window = WindowTokenizer(tokenizer, max_tokens=max_tokens, prompt="")([text, "short"])
    assert window.items_N[0].tolist() == whole(tokenizer_folder, text, max_tokens)
    assert window.truncated_N[0] == (len(tokenizer.encode(text).overflowing) > 0)


def test_what_a_cut_would_change_is_tokenised_whole() -> None:
    from tokenizers import models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "end": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    limit = 2 * CHARS_PER_TOKEN * (4 + SPARE_TOKENS)
    text = "x" * (limit // 2 + 5) + " " + "y" * limit + " end"
    window = WindowTokenizer(words, max_tokens=4, prompt="")([text])
    assert window.items_N[0].tolist() == [0, 0, 1]
    assert not window.truncated_N[0]


def test_lone_surrogates_become_question_marks_and_nothing_else_changes() -> None:
    assert clean("a\ud800b") == "a?b"
    assert clean("\U0001f41f caf\u00e9 \u05d0") == "\U0001f41f caf\u00e9 \u05d0"
