"""What a plan would cost: tokens counted on a sample of the content to encode, time from the last known rate."""

from dataclasses import dataclass
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from tokenizers import Tokenizer

from shoal.conf.run import ChunkConfig
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.hash_encoder import cut_words
from shoal.udfs.tokenizing import WindowTokenizer

SAMPLE = 1000
SAMPLE_CHARS = 50_000
MANY_TRUNCATED = 0.05


@dataclass(frozen=True)
class Estimate:
    """tokens: what the encoder will see, exact up to SAMPLE contents; seconds and price None where no rate is known."""

    tokens: int
    truncated_share: float
    seconds: float | None
    price: float | None


def estimate(
    todo: DataFrame | None, num_todo: int, spec: EncoderSpec, *, rate: float | None, price_per_hour: float | None
) -> Estimate:
    """Counts the tokens of up to SAMPLE contents, taken by content hash and so at random, and scales them up."""
    if todo is None:
        return Estimate(0, 0.0, 0.0, 0.0 if price_per_hour is not None else None)
    rows = todo.select("content_hash", F.substring("text", 1, SAMPLE_CHARS).alias("text"))
    if num_todo > SAMPLE:
        # Hashes are evenly spread, so those below a bound are a sample, which no partition has to be sorted for.
        bound = min(2 * SAMPLE / num_todo, 1.0) * 0xFFFFFFFF
        rows = rows.where(F.conv(F.hex(F.substring("content_hash", 1, 4)), 16, 10).cast("long") <= int(bound))
    sample = [row["text"] for row in rows.limit(SAMPLE).collect()]
    tokens, truncated = count_tokens(spec, sample)
    total = tokens if len(sample) == num_todo else round(tokens * num_todo / len(sample))
    seconds = None if rate is None else total / rate
    price = None if seconds is None or price_per_hour is None else seconds / 3600 * price_per_hour
    return Estimate(total, truncated / len(sample), seconds, price)


def count_tokens(spec: EncoderSpec, texts: list[str]) -> tuple[int, int]:
    """Tokens that the encoder sees of these texts together, and how many of them it would cut; needs no torch."""
    if spec.kind == "hash":
        cut = [cut_words(spec.document_prompt + text, spec.max_tokens) for text in texts]
        return sum(count for _, count, _ in cut), sum(was_cut for _, _, was_cut in cut)
    tokenizer = Tokenizer.from_file(str(Path(spec.folder) / "tokenizer.json"))
    counted = WindowTokenizer(tokenizer, max_tokens=spec.max_tokens, prompt=spec.document_prompt)(texts)
    return int(counted.n_tokens_N.sum()), int(counted.truncated_N.sum())


def warnings_of(spec: EncoderSpec, found: Estimate, chunk: ChunkConfig | None) -> list[str]:
    """What the run file lets the encoder overlook."""
    warning = warn_truncated(spec, found) if chunk is None else warn_chunks(spec, chunk.tokens)
    return [warning] if warning else []


def warn_chunks(spec: EncoderSpec, chunk_tokens: int) -> str | None:
    """A warning when a full chunk, with the encoder's special tokens and prompt, is more than the encoder sees."""
    room = spec.max_tokens - count_tokens(spec, [""])[0]
    if chunk_tokens <= room:
        return None
    return (
        f"chunk.tokens is {chunk_tokens} and {spec.reference} sees {spec.max_tokens} tokens of a chunk, prompt and "
        f"special tokens included, so that full chunks lose their end; set chunk.tokens to {max(1, room)} or less"
    )


def warn_truncated(spec: EncoderSpec, found: Estimate) -> str | None:
    """A warning when many contents are longer than the encoder sees and the run file does not chunk."""
    if found.truncated_share <= MANY_TRUNCATED:
        return None
    tokens = max(1, spec.max_tokens - 2)
    return (
        f"about {found.truncated_share:.0%} of the texts are longer than the {spec.max_tokens} tokens that "
        f"{spec.reference} sees, and their ends would be ignored; set chunk.tokens to {tokens} and chunk.overlap to "
        f"{min(32, tokens // 4)}"
    )
