"""Cut a text into chunks of at most so many tokens, with exact offsets; pure Python on strings, no model and no Spark.

Boundaries (`chunk.boundary`):

- `sentence`: the largest units that fit are kept together: paragraphs, lines, sentences (Unicode TR29), words,
  graphemes (semantic-text-splitter). A chunk ends where a unit ends, so it may be well below `tokens`.
- `word`: as many whitespace-separated words as fit, whatever they say; fewer and fuller chunks, cheaper to find. Only a
  word above `tokens` is cut, by the rules of `sentence` and with no overlap between its parts.

For every text that is not blank (`text.strip()` is empty): at least one chunk, none of them blank, none starting or
ending in whitespace, starts and ends both rising, and every character outside all chunks is whitespace. A chunk counts
at most `tokens` tokens, without special tokens; the one exception is a single code point that alone counts more.
"""

import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from semantic_text_splitter import TextSplitter
from tokenizers import Tokenizer

from shoal.conf.errors import ModelError
from shoal.conf.run import ChunkConfig

Span = tuple[int, int]
"""Start and end in code points, end exclusive."""

TOKENIZER_FILE = "tokenizer.json"

WINDOW_CHARS_PER_TOKEN = 24
MIN_WINDOW_CHARS = 4_096

_WORD = re.compile(r"\S+")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Chunker:
    """Splits texts by one tokenizer; `tokenizer_folder` "" counts whitespace words (the hash encoder's tokens).

    Raises ModelError when the folder has no readable tokenizer.json.
    """

    def __init__(self, chunk: ChunkConfig, tokenizer_folder: str) -> None:
        self._max_tokens = chunk.tokens
        self._overlap = chunk.overlap
        self._tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder else None
        self._window = max(MIN_WINDOW_CHARS, WINDOW_CHARS_PER_TOKEN * chunk.tokens)
        self._sentences = self._sentence_splitter(chunk.overlap)
        self._inside_word = self._sentence_splitter(0)
        self._find = self._find_by_words if chunk.boundary == "word" else self._find_by_sentences

    def split(self, text: str) -> list[Span]:
        """Spans of the chunks in reading order; an empty list for a blank text."""
        if not text.strip():
            return []
        return in_windows(_SURROGATE.sub("\ufffd", text), self._window, self._find)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text without special tokens, as the encoder's tokenizer counts them before truncation."""
        if self._tokenizer is None:
            return [len(text.split()) for text in texts]
        clean = [_SURROGATE.sub("\ufffd", text) for text in texts]
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)]

    def _sentence_splitter(self, overlap: int) -> TextSplitter:
        if self._tokenizer is None:
            return TextSplitter.from_callback(lambda text: len(text.split()), self._max_tokens, overlap)
        return TextSplitter.from_huggingface_tokenizer(self._tokenizer, self._max_tokens, overlap)

    def _find_by_sentences(self, text: str) -> list[Span]:
        found = self._sentences.chunk_indices(text)
        return rising(trimmed(text, [(start, start + len(chunk)) for start, chunk in found]))

    def _find_by_words(self, text: str) -> list[Span]:
        pieces = self._word_pieces(text)
        costs = self.count_tokens([text[start:end] for start, end in pieces])
        totals = [0, *accumulate(costs)]
        spans: list[Span] = []
        first, covered = 0, 0  # pieces[first:last] is the next chunk, pieces[:covered] are in the chunks so far
        while covered < len(pieces):
            last = covered + 1
            while last < len(pieces) and totals[last + 1] - totals[first] <= self._max_tokens:
                last += 1
            # Costs are summed word by word; a tokenizer that merges across words may count the whole otherwise.
            while last - first > 1 and self._count_span(text, pieces, first, last) > self._max_tokens:
                if last - 1 > covered:
                    last -= 1
                else:
                    first += 1
            spans.append((pieces[first][0], pieces[last - 1][1]))
            covered = last
            first = self._start_of_overlap(text, pieces, totals, first, last)
        return spans

    def _word_pieces(self, text: str) -> list[Span]:
        """Words, and in place of a word above the maximum its parts."""
        words = [(word.start(), word.end()) for word in _WORD.finditer(text)]
        pieces = []
        for (start, end), cost in zip(words, self.count_tokens([text[a:b] for a, b in words]), strict=True):
            if cost <= self._max_tokens:
                pieces.append((start, end))
            else:
                parts = self._inside_word.chunk_indices(text[start:end])
                pieces += [(start + at, start + at + len(part)) for at, part in parts]
        return pieces

    def _start_of_overlap(self, text: str, pieces: list[Span], totals: list[int], first: int, last: int) -> int:
        """First piece of the next chunk: back from `last` as far as overlap and room for one new piece allow."""
        if last == len(pieces):
            return last
        back = last
        while (
            back - 1 > first
            and totals[last] - totals[back - 1] <= self._overlap
            and totals[last + 1] - totals[back - 1] <= self._max_tokens
        ):
            back -= 1
        while back < last and self._count_span(text, pieces, back, last) > self._overlap:
            back += 1
        return back

    def _count_span(self, text: str, pieces: list[Span], first: int, last: int) -> int:
        return self.count_tokens([text[pieces[first][0] : pieces[last - 1][1]]])[0]


def in_windows(text: str, window: int, find: Callable[[str], list[Span]]) -> list[Span]:
    """Spans that `find` gives for the whole text, asking it about `window` code points at a time.

    The last span of a window may have been cut by the window's end, so the next window starts where that span did. This
    keeps long texts linear: a splitter that weighs the rest of the text for every chunk is quadratic in it.
    """
    spans: list[Span] = []
    start, size = 0, window
    while start + size < len(text):
        found = [(start + first, start + last) for first, last in find(text[start : start + size])]
        if len(found) > 1 and found[-1][0] > start:
            spans += found[:-1]
            start, size = found[-1][0], window
        else:
            size *= 2
    return rising([*spans, *((start + first, start + last) for first, last in find(text[start:]))])


def rising(spans: list[Span]) -> list[Span]:
    """The spans without those that lie inside a neighbour; what they cover together stays the same."""
    kept: list[Span] = []
    for start, end in spans:
        while kept and start <= kept[-1][0] and end > kept[-1][1]:
            kept.pop()
        if not kept or end > kept[-1][1]:
            kept.append((start, end))
    return kept


def trimmed(text: str, spans: list[Span]) -> list[Span]:
    """Each span without the whitespace at its ends, blank ones left out; Python knows more whitespace than Unicode."""
    stripped = []
    for start, end in spans:
        found = text[start:end]
        left = len(found) - len(found.lstrip())
        right = len(found.rstrip())
        if left < right:
            stripped.append((start + left, start + right))
    return stripped


def load_tokenizer(folder: str) -> Tokenizer:
    """The folder's tokenizer.json without its truncation and padding, which would make counts stop at a maximum."""
    file = Path(folder) / TOKENIZER_FILE
    if not file.is_file():
        raise ModelError(
            f"chunk.tokens counts with the encoder's tokenizer, but {folder} has no {TOKENIZER_FILE}; "
            "save a fast tokenizer there, or leave out chunk."
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception for a file it cannot read
        raise ModelError(f"{file} is not a tokenizer that can be read ({error}); save the encoder again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
