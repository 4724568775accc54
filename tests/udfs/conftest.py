"""Tiny random checkpoints of real architectures, saved as sentence-transformers folders."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.conf.run import EncoderConfig
from shoal.udfs.checkpoint import describe_checkpoint
from shoal.udfs.encoder_spec import EncoderSpec

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
HIDDEN = 32
MAX_TOKENS = 48

TEXTS = [
    "a",
    "two words",
    "The shoal turned at once, as if one thought had passed through it.",
    "caf\u00e9 na\u00efve \u6e56\u4e0a\u7684\u9c7c \U0001f41f and so on",
    "tabs\tand\nlines",
    "a much longer text about boats and nets and lamps that burn all night " * 6,
    "?",
    "the keeper wrote every evening how many lamps had burned",
    "fish fish fish fish",
]


@pytest.fixture
def texts() -> list[str]:
    """Texts of many lengths, one of them longer than the encoders see."""
    return list(TEXTS)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 400 tokens that adds <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=MAX_TOKENS,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def _configuration(architecture: str) -> Any:
    import transformers

    shape = {
        "vocab_size": 400,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "pad_token_id": 1,
        "initializer_range": 0.4,
    }
    special = {"bos_token_id": 0, "eos_token_id": 2}
    decoder = {**shape, **special, "num_key_value_heads": 2, "max_position_embeddings": 64}
    made = {
        "bert": lambda: transformers.BertConfig(**shape, max_position_embeddings=64),
        "roberta": lambda: transformers.RobertaConfig(
            **shape, **special, max_position_embeddings=66, type_vocab_size=1
        ),
        "xlm-roberta": lambda: transformers.XLMRobertaConfig(
            **shape, **special, max_position_embeddings=66, type_vocab_size=1
        ),
        "camembert": lambda: transformers.CamembertConfig(
            **shape, **special, max_position_embeddings=66, type_vocab_size=1
        ),
        "electra": lambda: transformers.ElectraConfig(**shape, embedding_size=16, max_position_embeddings=64),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=400, dim=HIDDEN, n_layers=2, n_heads=4, hidden_dim=64, pad_token_id=1,
            max_position_embeddings=64, initializer_range=0.4,
        ),
        "mpnet": lambda: transformers.MPNetConfig(**shape, **special, max_position_embeddings=66),
        "modernbert": lambda: transformers.ModernBertConfig(
            **{**shape, "num_hidden_layers": 4}, **special, max_position_embeddings=64, cls_token_id=0, sep_token_id=2,
            local_attention=8, global_attn_every_n_layers=2,
        ),
        "qwen2": lambda: transformers.Qwen2Config(**decoder),
        "qwen3": lambda: transformers.Qwen3Config(**decoder, head_dim=8),
        "mistral": lambda: transformers.MistralConfig(**decoder, sliding_window=8),
    }  # fmt: skip
    return made[architecture]()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[..., Path]:
    """Build (once) a folder with a random encoder: architecture, pooling, normalise, dense, prompts, include_prompt."""
    built: dict[str, Path] = {}

    def build(
        architecture: str = "bert",
        *,
        pooling: str | tuple[str, ...] = "mean",
        normalize: bool = True,
        dense: int | None = None,
        prompts: dict[str, str] | None = None,
        include_prompt: bool = True,
    ) -> Path:
        key = repr((architecture, pooling, normalize, dense, prompts, include_prompt))
        if key not in built:
            import torch
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer import modules as models
            from transformers import AutoModel, AutoTokenizer

            torch.manual_seed(7)
            plain = tmp_path_factory.mktemp("plain")
            AutoModel.from_config(_configuration(architecture)).save_pretrained(plain)
            AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(plain)
            modules: list[Any] = [models.Transformer(str(plain), max_seq_length=MAX_TOKENS)]
            modules.append(models.Pooling(HIDDEN, pooling, include_prompt=include_prompt))
            if dense is not None:
                width = HIDDEN * (1 if isinstance(pooling, str) else len(pooling))
                modules.append(models.Dense(width, dense, activation_function=torch.nn.Tanh()))
            if normalize:
                modules.append(models.Normalize())
            folder = tmp_path_factory.mktemp("checkpoint")
            SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(folder))
            built[key] = folder
        return built[key]

    return build


@pytest.fixture(scope="session")
def describe() -> Callable[..., EncoderSpec]:
    """Describe a folder as the driver does; float32 torch unless told otherwise."""

    def described(folder: Path, **settings: Any) -> EncoderSpec:
        wanted = {"precision": "float32", "backend": "torch", **settings}
        return describe_checkpoint(EncoderConfig(model=str(folder), **wanted), str(folder))

    return described


@pytest.fixture(autouse=True)
def _leave_no_encoder() -> Iterator[None]:
    """Every test starts with an empty encoder cache."""
    from shoal.udfs import encoder_cache

    yield
    for slot in list(encoder_cache._ENCODERS):
        encoder_cache.drop_encoder(slot)
