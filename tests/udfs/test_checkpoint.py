import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from shoal.conf.errors import ModelError
from shoal.udfs.encoder_spec import EncoderSpec

Build = Callable[..., Path]
Describe = Callable[..., EncoderSpec]


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    settings = json.loads(path.read_text())
    settings.update(changes)
    path.write_text(json.dumps(settings))


@pytest.fixture
def folder(make_checkpoint: Build, tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(make_checkpoint(), copy)
    return copy


def test_a_folder_of_a_new_release_is_described(make_checkpoint: Build, describe: Describe) -> None:
    spec = describe(make_checkpoint(pooling=("cls", "mean"), dense=12, prompts={"query": "q: ", "passage": "p: "}))
    assert (spec.dim, spec.pooling, spec.max_tokens, spec.normalize) == (12, "cls+mean", 48, True)
    assert (spec.query_prompt, spec.document_prompt) == ("q: ", "p: ")
    assert len(pickle.dumps(spec)) < 4096


def test_both_spellings_of_the_settings_give_the_same_fingerprint(folder: Path, describe: Describe) -> None:
    new = describe(folder)
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
    )
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
    edit(folder / "config.json", transformers_version="4.6.1", _name_or_path="elsewhere")
    assert describe(folder).fingerprint == new.fingerprint


def test_the_place_of_a_folder_is_not_part_of_the_fingerprint(
    make_checkpoint: Build, folder: Path, describe: Describe
) -> None:
    assert describe(folder).fingerprint == describe(make_checkpoint()).fingerprint


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_weights_tokenizer_and_settings_change_the_fingerprint(folder: Path, describe: Describe, file: str) -> None:
    before = describe(folder).fingerprint
    path = folder / file
    if file == "model.safetensors":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    else:
        edit(path, something_else=1)
    assert describe(folder).fingerprint != before


@pytest.mark.parametrize(
    "settings",
    [{"pooling": "cls"}, {"max_tokens": 20}, {"normalize": False}, {"document_prompt": "x"}, {"precision": "bfloat16"}],
)
def test_settings_that_change_a_vector_change_the_fingerprint(
    make_checkpoint: Build, describe: Describe, settings: dict[str, Any]
) -> None:
    assert describe(make_checkpoint(), **settings).fingerprint != describe(make_checkpoint()).fingerprint


@pytest.mark.parametrize("settings", [{"query_prompt": "q"}, {"backend": "openvino"}])
def test_settings_that_change_no_stored_vector_keep_the_fingerprint(
    make_checkpoint: Build, describe: Describe, settings: dict[str, Any]
) -> None:
    assert describe(make_checkpoint(), **settings).fingerprint == describe(make_checkpoint()).fingerprint


def test_a_plain_transformers_folder_is_pooled_by_the_mean(folder: Path, describe: Describe) -> None:
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink(missing_ok=True)
    spec = describe(folder)
    assert (spec.pooling, spec.dim, spec.max_tokens) == ("mean", 32, 48)
    edit(folder / "config.json", architectures=["SomethingForCausalLM"])
    assert describe(folder).pooling == "lasttoken"


def test_a_run_files_empty_prompt_switches_the_checkpoints_off(make_checkpoint: Build, describe: Describe) -> None:
    folder = make_checkpoint(prompts={"document": "d: "})
    assert describe(folder).document_prompt == "d: "
    assert describe(folder, document_prompt="").document_prompt == ""


@pytest.mark.parametrize(("architecture", "accepted"), [("bert", 64), ("roberta", 64), ("mpnet", 64)])
def test_more_tokens_than_the_encoder_accepts_are_refused(
    make_checkpoint: Build, describe: Describe, architecture: str, accepted: int
) -> None:
    folder = make_checkpoint(architecture)
    assert describe(folder, max_tokens=accepted).max_tokens == accepted
    with pytest.raises(ModelError, match=rf"max_tokens is {accepted + 1}, but .* accepts at most {accepted}"):
        describe(folder, max_tokens=accepted + 1)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, describe: Describe) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"is no model folder: .*found: notes\.txt"):
        describe(tmp_path)
    with pytest.raises(ModelError, match="is not a folder"):
        describe(tmp_path / "absent")


def test_pickled_weights_are_refused_with_what_to_do(folder: Path, describe: Describe) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only in 'pytorch_model\.bin', a pickle.*save_pretrained"):
        describe(folder)


def test_a_pickled_dense_module_is_refused(make_checkpoint: Build, describe: Describe, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(make_checkpoint(dense=12), copy)
    (copy / "2_Dense" / "model.safetensors").rename(copy / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="2_Dense' has its weights only in"):
        describe(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "where its header announces"),
        (lambda content: content + b"x", "where its header announces"),
        (lambda content: content[:4], "too few for a header"),
        (lambda content: struct.pack("<Q", 1 << 40) + content[8:], "announces a header of"),
        (lambda content: content[:8] + b"!" + content[9:], "has a header that cannot be read"),
        (lambda _content: b"", "has 0 bytes"),
    ],
)
def test_damaged_safetensors_are_refused(
    folder: Path, describe: Describe, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=rf"{message}.*it is damaged or incomplete"):
        describe(folder)


def test_a_missing_shard_is_named(folder: Path, describe: Describe) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 'model-00002-of-00002\.safetensors'.*1 of 2 missing"):
        describe(folder)


def test_no_weights_and_no_tokenizer_are_refused(folder: Path, describe: Describe) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        describe(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        describe(folder)


def test_code_in_a_checkpoint_is_refused_unless_trusted(folder: Path, describe: Describe) -> None:
    edit(folder / "config.json", auto_map={"AutoModel": "modeling.Thing"})
    with pytest.raises(ModelError, match=r"trust_remote_code is false.*auto_map in"):
        describe(folder)
    trusted = describe(folder, trust_remote_code=True)
    (folder / "modeling.py").write_text("class Thing: ...\n")
    assert describe(folder, trust_remote_code=True).fingerprint != trusted.fingerprint


def test_a_foreign_module_class_is_refused_unless_trusted(folder: Path, describe: Describe) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "custom_code.Normalize"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"brings its own code \(module custom_code\.Normalize\)"):
        describe(folder)
    assert describe(folder, trust_remote_code=True).dim == 32


def test_modules_and_poolings_that_are_unknown_are_refused(folder: Path, describe: Describe) -> None:
    edit(folder / "1_Pooling" / "config.json", pooling_mode="median")
    with pytest.raises(ModelError, match="pools by 'median'"):
        describe(folder)
    assert describe(folder, pooling="cls").pooling == "cls"
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "sentence_transformers.models.CLIPModel"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="does not support CLIPModel"):
        describe(folder)


@pytest.mark.parametrize("file", ["modules.json", "config.json", "1_Pooling/config.json"])
def test_settings_that_are_no_json_are_refused(folder: Path, describe: Describe, file: str) -> None:
    (folder / file).write_text("{not json")
    with pytest.raises(ModelError, match="cannot be read"):
        describe(folder)


def test_a_module_outside_the_folder_is_refused(folder: Path, describe: Describe) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../1_Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="points outside its folder"):
        describe(folder)


def test_describing_imports_no_model_library(make_checkpoint: Build) -> None:
    code = (
        "import sys; from shoal.conf.run import EncoderConfig; from shoal.udfs.checkpoint import describe_checkpoint; "
        f"describe_checkpoint(EncoderConfig(model='m'), {str(make_checkpoint())!r}); "
        "print({'torch', 'transformers', 'sentence_transformers', 'openvino', 'pyspark'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_saving_the_same_weights_again_keeps_the_fingerprint_and_one_changed_number_moves_it(
    folder: Path, describe: Describe
) -> None:
    before = describe(folder)
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    whole.unlink()
    save_file({name: tensors[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file(
        {name: tensors[name] for name in names[1::2]}, folder / "model-00002-of-00002.safetensors", {"format": "pt"}
    )
    assert describe(folder).weights_digest == before.weights_digest

    tensors[names[0]].flat[0] += 1
    save_file({name: tensors[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    assert describe(folder).weights_digest != before.weights_digest
