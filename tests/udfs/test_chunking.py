import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from shoal.conf.errors import ModelError
from shoal.conf.run import ChunkConfig
from shoal.udfs.chunking import Chunker, in_windows, load_tokenizer, rising, trimmed

WORDS = ["shoal", "swim", "close", "lake", "fish", "water", "many", "alike", "deep", "cold"]
PROSE = " ".join(f"{a.capitalize()} {b} in the {c}, {a}." for a in WORDS for b in WORDS for c in WORDS)
MEASURES = ["words", "bytes", "pieces"]

awkward = st.sampled_from(
    [
        "\U0001f600",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "e\u0301\u0302\u0303",
        "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643",
        "\u05e9\u05dc\u05d5\u05dd",
        "\u6f22\u5b57\u4eee\u540d\u3002",
        "\r\n",
        "\n\n\n",
        "\t",
        "\x00",
        "\x1c",
        "\u0085",
        "\u00a0",
        "\u200b",
        "\ufeff",
        "\u2028",
        "\ud800",
        "a" * 150,
        "Hello there. How are you? ",
        "[CLS]",
    ]
)
texts = st.lists(st.one_of(awkward, st.text(max_size=12), st.sampled_from(WORDS), st.just(" ")), max_size=60).map(
    "".join
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Tokenizer folders by how they count: WordPiece with a limit and padding, byte-level BPE that merges spaces."""
    root = tmp_path_factory.mktemp("tokenizers")
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[CLS]", "[PAD]"], show_progress=False)
    pieces.train_from_iterator([PROSE], trainer)
    pieces.enable_truncation(6)
    pieces.enable_padding(length=10)
    by_bytes = Tokenizer(models.BPE())
    by_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    by_bytes.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, special_tokens=["[CLS]"])
    by_bytes.train_from_iterator([PROSE[at : at + 40] for at in range(0, 8000, 40)], bpe)
    found = {"words": ""}
    for name, tokenizer in (("pieces", pieces), ("bytes", by_bytes)):
        (root / name).mkdir()
        tokenizer.save(str(root / name / "tokenizer.json"))
        found[name] = str(root / name)
    return found


def tokens_of(folder: str, text: str) -> int:
    """Counted apart from the code under test."""
    if not folder:
        return len(text.split())
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return len(tokenizer.encode(re.sub("[\ud800-\udfff]", "\ufffd", text), add_special_tokens=False).ids)


def check(text: str, spans: list[tuple[int, int]], chunk: ChunkConfig, folder: str) -> None:
    assert bool(spans) == bool(text.strip())
    position = 0
    for start, end in spans:
        found = text[start:end]
        assert found
        assert found == found.strip()
        assert tokens_of(folder, found) <= chunk.tokens or len(found) == 1
        assert not text[position:start].strip(), "only whitespace lies between chunks"
        position = end
    assert not text[position:].strip()
    for (start, end), (next_start, next_end) in pairwise(spans):
        assert start < next_start
        assert end < next_end
        assert tokens_of(folder, text[next_start:end].strip()) <= chunk.overlap


@pytest.mark.parametrize("boundary", ["sentence", "word"])
@pytest.mark.parametrize("measure", MEASURES)
@settings(max_examples=80, deadline=None)
@given(text=texts, tokens=st.integers(1, 24), share=st.floats(0, 0.9))
@example(text="\x1c0:", tokens=2, share=0.5)
@example(text="\x1c0:\x80", tokens=2, share=0.5)
def test_chunks_are_exact_complete_and_within_the_maximum(folders, boundary, measure, text, tokens, share):
    chunk = ChunkConfig(tokens=tokens, overlap=int(tokens * share), boundary=boundary)
    chunker = Chunker(chunk, folders[measure])
    check(text, chunker.split(text), chunk, folders[measure])


@pytest.mark.parametrize("boundary", ["sentence", "word"])
@pytest.mark.parametrize("measure", MEASURES)
@settings(max_examples=80, deadline=None)
@given(text=texts, tokens=st.integers(1, 12), share=st.floats(0, 0.9), window=st.integers(1, 40))
@example(text="00\x1f0\x00", tokens=2, share=0.5, window=3)
@example(text="\x1f0/00", tokens=2, share=0.5, window=3)
def test_windows_that_cut_anywhere_lose_nothing(folders, boundary, measure, text, tokens, share, window):
    chunk = ChunkConfig(tokens=tokens, overlap=int(tokens * share), boundary=boundary)
    chunker = Chunker(chunk, folders[measure])
    chunker._window = window
    check(text, chunker.split(text), chunk, folders[measure])


@pytest.mark.parametrize("boundary", ["sentence", "word"])
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("overlap", [0, 12])
def test_a_text_of_many_windows_is_cut_as_if_it_were_seen_whole(folders, boundary, measure, overlap):
    chunk = ChunkConfig(tokens=40, overlap=overlap, boundary=boundary)
    chunker = Chunker(chunk, folders[measure])
    assert len(PROSE) > 5 * chunker._window
    spans = chunker.split(PROSE)
    assert spans == chunker._find(PROSE)
    check(PROSE, spans, chunk, folders[measure])


@pytest.mark.parametrize("boundary", ["sentence", "word"])
@pytest.mark.parametrize("measure", MEASURES)
def test_overlap_repeats_text(folders, boundary, measure):
    chunk = ChunkConfig(tokens=40, overlap=20, boundary=boundary)
    spans = Chunker(chunk, folders[measure]).split(PROSE[:4000])
    repeated = sum(next_start < end for (_, end), (next_start, _) in pairwise(spans))
    assert repeated > 0.9 * (len(spans) - 1)


def test_word_boundaries_fill_chunks_that_sentences_would_leave_short(folders):
    by_word = Chunker(ChunkConfig(tokens=10, boundary="word"), "").split(PROSE)
    by_sentence = Chunker(ChunkConfig(tokens=10), "").split(PROSE)
    assert {len(PROSE[start:end].split()) for start, end in by_word[:-1]} == {10}
    assert all(PROSE[start:end].endswith(".") for start, end in by_sentence)
    assert len(by_word) < len(by_sentence)


@pytest.mark.parametrize("boundary", ["sentence", "word"])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_word_of_a_megabyte_is_cut_or_is_one_token(folders, boundary, measure):
    chunk = ChunkConfig(tokens=256, overlap=32, boundary=boundary)
    text = "x\u00e9" * 500_000 if measure != "bytes" else "x\u00e9" * 20_000
    spans = Chunker(chunk, folders[measure]).split(text)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    if measure == "bytes":
        check(text, spans, chunk, folders[measure])
        assert len(spans) > 50
    else:
        assert len(spans) == 1


def test_a_code_point_above_the_maximum_stands_alone(folders):
    spans = Chunker(ChunkConfig(tokens=1), folders["bytes"]).split("\U0001f600\U0001f600")
    assert spans == [(0, 1), (1, 2)]


def test_truncation_and_padding_of_the_tokenizer_do_not_count(folders):
    chunker = Chunker(ChunkConfig(tokens=8), folders["pieces"])
    assert chunker.count_tokens(["lake " * 30, "lake"])[0] == 30 * chunker.count_tokens(["lake"])[0]
    tokenizer = load_tokenizer(folders["pieces"])
    assert tokenizer.truncation is None
    assert tokenizer.padding is None


def test_special_tokens_are_not_counted(folders):
    tokenizer = Tokenizer.from_file(folders["pieces"] + "/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    plain = len(tokenizer.encode(PROSE[:200], add_special_tokens=False).ids)
    assert Chunker(ChunkConfig(tokens=plain), folders["pieces"]).split(PROSE[:200].strip()) == [(0, 200)]


@pytest.mark.parametrize("blank", ["", " ", "\n\t \u00a0", "\x1c\x1d"])
def test_a_blank_text_has_no_chunk(blank):
    assert Chunker(ChunkConfig(tokens=3), "").split(blank) == []


def test_offsets_count_code_points():
    text = "\U0001f600 one two \U0001f468\u200d\U0001f469 three"
    spans = Chunker(ChunkConfig(tokens=2, boundary="word"), "").split(text)
    assert [text[start:end] for start, end in spans] == ["\U0001f600 one", "two \U0001f468\u200d\U0001f469", "three"]


def test_windows_grow_until_they_hold_two_spans():
    asked = []

    def whole(text: str) -> list[tuple[int, int]]:
        asked.append(len(text))
        return [(0, len(text))]

    assert in_windows("x" * 100, 10, whole) == [(0, 100)]
    assert asked == [10, 20, 40, 80, 100]


def test_spans_inside_a_neighbour_are_left_out():
    assert rising([(0, 5), (2, 5), (3, 4), (3, 8)]) == [(0, 5), (3, 8)]
    assert rising([(0, 1), (1, 2), (1, 3), (4, 5)]) == [(0, 1), (1, 3), (4, 5)]


def test_spans_are_trimmed_and_blank_ones_left_out():
    assert trimmed(" a \x1c b", [(0, 3), (3, 4), (4, 6)]) == [(1, 2), (5, 6)]


def test_a_folder_without_a_tokenizer_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; save a fast tokenizer"):
        Chunker(ChunkConfig(tokens=3), str(tmp_path))


def test_a_broken_tokenizer_is_a_model_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer that can be read"):
        Chunker(ChunkConfig(tokens=3), str(tmp_path))
