"""Reads a model folder's settings without torch or transformers: what the driver knows of an encoder.

Understands sentence-transformers folders, written by old releases and new ones, and plain transformers folders (pooled
as sentence-transformers pools them). Weights are hashed and their headers checked, never loaded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shoal.conf.errors import ModelError
from shoal.conf.fingerprint import digest
from shoal.udfs.encoder_spec import EncoderSpec

if TYPE_CHECKING:
    from shoal.conf.run import EncoderConfig

POOLING_MODES: Final = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

_POOLING_FLAGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TRANSFORMER_SETTINGS: Final = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_SUPPORTED_MODULES: Final = frozenset(
    {"Transformer", "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout", "StaticEmbedding", "WeightedLayerPooling"}
)
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "*.model",
)
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_VOLATILE_KEYS: Final = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "auto_map", "use_cache"}
)
_POSITIONS_AFTER_PADDING: Final = frozenset(
    {
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "roberta-prelayernorm",
        "camembert",
        "mpnet",
        "longformer",
        "data2vec-text",
        "ibert",
        "luke",
        "mluke",
        "xmod",
    }
)
"""Families whose position table starts at padding_idx + 1, so that they take that many tokens fewer than its length."""

_MAX_HEADER: Final = 100_000_000
_UNBOUNDED: Final = 1_000_000
_HASH_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Module:
    """One module of a sentence-transformers folder: its class, its folder and its settings."""

    type: str
    folder: Path
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Class name without its package, which releases have moved."""
        return self.type.rpartition(".")[2]


def describe_checkpoint(config: EncoderConfig, folder: str, *, revision: str | None = None) -> EncoderSpec:
    """Describe the encoder in `folder`; its precision and back end stay as the run file has them, "auto" included.

    Raises ModelError for a folder that is no model, weights that are not sound safetensors, code in the checkpoint that
    is not trusted, a pooling that is unknown, and more `max_tokens` than the encoder accepts.
    """
    root = Path(folder)
    modules = read_modules(root, trust_remote_code=config.trust_remote_code)
    first = modules[0]
    dim, pooling = _dim_and_pooling(modules, config)
    prompts = _prompts(root)
    return EncoderSpec(
        kind="sentence_transformers",
        reference=config.model,
        revision=revision if revision is not None else config.revision,
        folder=str(root),
        dim=dim,
        pooling=pooling,
        max_tokens=_max_tokens(first, config),
        normalize=config.normalize,
        document_prompt=_prompt(config.document_prompt, prompts, ("document", "passage", "corpus")),
        query_prompt=_prompt(config.query_prompt, prompts, ("query",)),
        weights_digest=_weights_digest(root, modules),
        tokenizer_digest=_tokenizer_digest(first.folder),
        modules_digest=_modules_digest(root, modules, trust_remote_code=config.trust_remote_code),
        trust_remote_code=config.trust_remote_code,
        precision=config.precision,
        backend=config.backend,
    )


def read_modules(root: Path, *, trust_remote_code: bool = False) -> list[Module]:
    """The modules of a model folder in the order of a forward pass; ModelError where they cannot be used."""
    if not root.is_dir():
        raise ModelError(
            f"encoder.model: {str(root)!r} is not a folder; give a folder that holds a model", code="MODEL_NOT_FOUND"
        )
    listing = root / "modules.json"
    if listing.is_file():
        modules = [_module(root, entry) for entry in _module_entries(listing)]
    elif (root / "config.json").is_file():
        transformer = Module("sentence_transformers.models.Transformer", root, _transformer_settings(root))
        modules = [transformer, Module("sentence_transformers.models.Pooling", root, _default_pooling(transformer))]
    else:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"encoder.model: {str(root)!r} is no model folder: it has neither modules.json nor config.json "
            f"(found: {found}); give a folder saved by sentence-transformers or transformers"
        )
    _refuse_code(modules, trust_remote_code=trust_remote_code)
    known = [module.name for module in modules]
    strange = [name for name in known if name not in _SUPPORTED_MODULES]
    if (strange and not trust_remote_code) or not known:
        raise ModelError(
            f"encoder.model: {str(root)!r} is built of {' > '.join(known) or 'no modules'}, and Shoal does not support "
            f"{', '.join(strange) or 'that'}; use a text encoder made of {', '.join(sorted(_SUPPORTED_MODULES))}"
        )
    return modules


def _module_entries(listing: Path) -> list[dict[str, Any]]:
    entries = _read_json(listing)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "type" in entry for entry in entries):
        raise ModelError(f"encoder.model: {str(listing)!r} does not list modules with a type; download the model again")
    return sorted(entries, key=lambda entry: int(entry.get("idx", 0)))


def _module(root: Path, entry: Mapping[str, Any]) -> Module:
    kind = str(entry["type"])
    folder = root / str(entry.get("path", ""))
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ModelError(f"encoder.model: modules.json of {str(root)!r} points outside its folder ({entry['path']!r})")
    if kind.rpartition(".")[2] == "Transformer":
        return Module(kind, folder, _transformer_settings(folder))
    settings = folder / "config.json"
    return Module(kind, folder, _read_object(settings) if settings.is_file() else {})


def _transformer_settings(folder: Path) -> dict[str, Any]:
    """config.json under "model", the sentence-transformers settings beside it under their own names."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"encoder.model: {str(folder)!r} has no config.json; download the model again")
    settings: dict[str, Any] = {}
    for name in _TRANSFORMER_SETTINGS:
        if (folder / name).is_file():
            settings = _read_object(folder / name)
            break
    return {**settings, "model": _read_object(path)}


def _default_pooling(transformer: Module) -> dict[str, Any]:
    """What sentence-transformers adds to a plain transformers folder: last token for causal models, else mean."""
    model = transformer.settings["model"]
    architectures = model.get("architectures") or [""]
    causal = str(architectures[0]).endswith("ForCausalLM") and model.get("is_causal", True)
    return {"pooling_mode": "lasttoken" if causal else "mean"}


def _refuse_code(modules: list[Module], *, trust_remote_code: bool) -> None:
    if trust_remote_code:
        return
    foreign = [module.type for module in modules if not module.type.startswith("sentence_transformers.")]
    mapped = [str(m.folder) for m in modules if m.name == "Transformer" and m.settings["model"].get("auto_map")]
    if foreign or mapped:
        what = f"module {foreign[0]}" if foreign else f"auto_map in {mapped[0]}/config.json"
        raise ModelError(
            f"encoder.trust_remote_code is false, but the checkpoint brings its own code ({what}); read that code, and "
            "set encoder.trust_remote_code: true if you trust it, or choose another model"
        )


def _dim_and_pooling(modules: list[Module], config: EncoderConfig) -> tuple[int, str]:
    first = modules[0]
    if first.name == "StaticEmbedding":
        if config.pooling not in (None, "mean"):
            raise ModelError(
                f"encoder.pooling is {config.pooling!r}, but {config.model!r} is a table of word vectors that are "
                "averaged; remove encoder.pooling"
            )
        dim, pooling = _static_dim(first.folder), "mean"
    else:
        dim, pooling = _hidden_size(first), ""
    for module in modules[1:]:
        if module.name == "Pooling":
            modes = [config.pooling] if config.pooling is not None else pooling_modes(module.settings, config.model)
            dim, pooling = dim * len(modes), "+".join(modes)
        elif module.name == "Dense" and module.settings.get("module_output_name") in (None, "sentence_embedding"):
            dim = int(module.settings["out_features"])
    if not pooling:
        raise ModelError(f"encoder.model: {config.model!r} has no pooling module; use a sentence encoder")
    return dim, pooling


def pooling_modes(settings: Mapping[str, Any], reference: str) -> list[str]:
    """Pooling modes in their order, from either spelling of the settings; ModelError for an unknown one."""
    named = settings.get("pooling_mode")
    if named is None:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if settings.get(flag)] or ["mean"]
        modes += [
            key for key, on in settings.items() if key.startswith("pooling_mode_") and on and key not in _POOLING_FLAGS
        ]
    else:
        modes = [named] if isinstance(named, str) else [str(mode) for mode in named]
    unknown = [mode for mode in modes if mode not in POOLING_MODES]
    if unknown:
        raise ModelError(
            f"encoder.model: {reference!r} pools by {unknown[0]!r}, which Shoal does not know "
            f"({', '.join(POOLING_MODES)}); set encoder.pooling or choose another model"
        )
    return modes


def _hidden_size(transformer: Module) -> int:
    model = _text_model(transformer)
    for key in ("hidden_size", "dim", "d_model", "n_embd", "word_embed_proj_dim"):
        if isinstance(model.get(key), int):
            return int(model[key])
    raise ModelError(
        f"encoder.model: {str(transformer.folder / 'config.json')!r} names no hidden size; this is not the "
        "configuration of a text encoder"
    )


def _text_model(transformer: Module) -> Mapping[str, Any]:
    model: Mapping[str, Any] = transformer.settings["model"]
    nested = model.get("text_config")
    return nested if isinstance(nested, dict) and "hidden_size" not in model else model


def _max_tokens(first: Module, config: EncoderConfig) -> int:
    """Tokens the encoder sees of a text: the run file's, else the checkpoint's, never above what it accepts."""
    if first.name == "StaticEmbedding":
        return config.max_tokens or _UNBOUNDED
    accepts = _accepted_tokens(first)
    if config.max_tokens is not None:
        if accepts is not None and config.max_tokens > accepts:
            raise ModelError(
                f"encoder.max_tokens is {config.max_tokens}, but {config.model!r} accepts at most {accepts}; lower it"
            )
        return config.max_tokens
    return min(limit for limit in (_default_tokens(first), accepts, _UNBOUNDED) if limit is not None)


def _accepted_tokens(transformer: Module) -> int | None:
    model = _text_model(transformer)
    positions = model.get("max_position_embeddings", model.get("n_positions"))
    if not isinstance(positions, int) or positions <= 0:
        return None
    family = str(model.get("model_type", ""))
    padding = model.get("pad_token_id")
    return (
        positions - (padding if isinstance(padding, int) else 1) - 1
        if family in _POSITIONS_AFTER_PADDING
        else positions
    )


def _default_tokens(transformer: Module) -> int | None:
    settings = transformer.settings
    for key in ("processor_kwargs", "tokenizer_args"):
        nested = settings.get(key)
        if isinstance(nested, dict) and isinstance(nested.get("model_max_length"), int):
            return int(nested["model_max_length"])
    if isinstance(settings.get("max_seq_length"), int):
        return int(settings["max_seq_length"])
    tokenizer = transformer.folder / "tokenizer_config.json"
    limit = _read_object(tokenizer).get("model_max_length") if tokenizer.is_file() else None
    return int(limit) if isinstance(limit, int | float) else None


def _prompts(root: Path) -> dict[str, str]:
    """Prompts by name, with the default one under ""."""
    path = root / "config_sentence_transformers.json"
    settings = _read_object(path) if path.is_file() else {}
    prompts = {str(name): str(text) for name, text in (settings.get("prompts") or {}).items() if text is not None}
    return {**prompts, "": prompts.get(str(settings.get("default_prompt_name")), "")}


def _prompt(wanted: str | None, prompts: Mapping[str, str], names: tuple[str, ...]) -> str:
    """The run file's prompt, else the first of the checkpoint's by these names with a text, else its default."""
    if wanted is not None:
        return wanted
    return next((prompts[name] for name in names if prompts.get(name)), prompts[""])


def _static_dim(folder: Path) -> int:
    for path in sorted(folder.glob("*.safetensors")):
        tensors = _check_safetensors(path)
        for name in ("embedding.weight", "embeddings"):
            if name in tensors:
                return int(tensors[name]["shape"][1])
    raise ModelError(f"encoder.model: {str(folder)!r} has no table of word vectors in safetensors; download it again")


def _weights_digest(root: Path, modules: list[Module]) -> str:
    """Digest of the tensors by module and name: saving them again, or in other shards, changes nothing."""
    tensors: list[tuple[str, str, str, list[int], str]] = []
    for folder in sorted(set(_weight_folders(modules))):
        for path in _weight_files(folder):
            found = _check_safetensors(path)
            tensors += [(folder.relative_to(root).as_posix(), *tensor) for tensor in _tensor_digests(path, found)]
    return digest(sorted(tensors))


def _tensor_digests(path: Path, tensors: dict[str, Any]) -> Iterator[tuple[str, str, list[int], str]]:
    """Name, dtype, shape and sha256 of the bytes of each tensor of a sound file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        for name, entry in tensors.items():
            start, end = entry["data_offsets"]
            file.seek(8 + length + start)
            hasher = sha256()
            left = end - start
            while left > 0:
                block = file.read(min(left, _HASH_BLOCK))
                hasher.update(block)
                left -= len(block)
            yield name, str(entry["dtype"]), [int(size) for size in entry["shape"]], hasher.hexdigest()


def _weight_folders(modules: list[Module]) -> Iterator[Path]:
    """Folders that must hold weights: the first module's, and those of later modules that have any."""
    yield modules[0].folder
    patterns = ("*.safetensors", *_PICKLES)
    for module in modules[1:]:
        if module.folder != modules[0].folder and any(any(module.folder.glob(pattern)) for pattern in patterns):
            yield module.folder


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set((_read_object(index).get("weight_map") or {}).values()))
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"encoder.model: {str(folder)!r} lacks {missing[0]!r}, which its index names "
                f"({len(missing)} of {len(named)} missing); download the model again"
            )
    if files:
        return files
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"encoder.model: {str(folder)!r} has its weights only in {pickles[0]!r}, a pickle, which can run code when "
            "loaded; Shoal reads safetensors only: choose a revision that has them, or load the model where you trust "
            "it and save it with SentenceTransformer(...).save_pretrained(folder)"
        )
    raise ModelError(f"encoder.model: {str(folder)!r} has no weights (*.safetensors); download the model again")


def _check_safetensors(path: Path) -> dict[str, Any]:
    """The header's tensors; ModelError unless it parses and its offsets account for the whole file.

    The layout is that of https://huggingface.co/docs/safetensors: 8 bytes of header length, a JSON header, the data.
    """
    size = path.stat().st_size
    problem = f"has {size} bytes, too few for a header"
    if size >= 8:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, size - 8):
                problem = f"announces a header of {length} bytes in a file of {size}"
            else:
                try:
                    header = json.loads(file.read(length))
                    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
                    end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
                except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                    problem = "has a header that cannot be read"
                else:
                    if 8 + length + end == size:
                        return tensors
                    problem = f"has {size} bytes where its header announces {8 + length + end}"
    raise ModelError(f"encoder.model: {str(path)!r} {problem}: it is damaged or incomplete; download the model again")


def _tokenizer_digest(folder: Path) -> str:
    files = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)})
    if not files:
        raise ModelError(f"encoder.model: {str(folder)!r} has no tokenizer (tokenizer.json); download the model again")
    return digest([(path.name, _file_digest(path)) for path in files])


def _modules_digest(root: Path, modules: list[Module], *, trust_remote_code: bool) -> str:
    """Digest of the parsed module settings, without what a mere saving by another release changes."""
    code = sorted(root.rglob("*.py")) if trust_remote_code else []
    return digest(
        [
            [(module.name, _stable_settings(module)) for module in modules],
            [(path.relative_to(root).as_posix(), _file_digest(path)) for path in code],
        ]
    )


def _stable_settings(module: Module) -> dict[str, Any]:
    if module.name == "Pooling":
        return {"include_prompt": bool(module.settings.get("include_prompt", True))}
    if module.name == "Transformer":
        model = {key: value for key, value in module.settings["model"].items() if key not in _VOLATILE_KEYS}
        return {"model": model, "do_lower_case": bool(module.settings.get("do_lower_case", False))}
    return dict(module.settings)


def _file_digest(path: Path) -> str:
    hasher = sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def _read_object(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise ModelError(f"encoder.model: {str(path)!r} holds no JSON object; download the model again")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"encoder.model: {str(path)!r} cannot be read ({error}); download the model again") from error
