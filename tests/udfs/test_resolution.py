import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.conf.errors import ModelError, WorkerError
from shoal.udfs import resolution
from shoal.udfs.encoder_spec import EncoderSpec
from shoal.udfs.resolution import cpu_flags, resolve, resolve_backends, resolve_precision


@pytest.fixture
def spec(make_checkpoint: Callable[..., Path], describe: Callable[..., EncoderSpec]) -> EncoderSpec:
    return describe(make_checkpoint(), precision="float32", backend="auto")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("sse avx2", "float32"), ("avx512f avx512_bf16", "bfloat16"), ("amx_bf16 amx_tile", "bfloat16"), ("", "float32")],
)
def test_the_precision_of_a_cpu_follows_from_its_flags(
    flags: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolution, "cpu_flags", lambda: frozenset(flags.split()))
    assert resolve_precision("auto", "cpu") == expected


def test_an_explicit_precision_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolution, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    assert resolve_precision("float32", "cpu") == "float32"
    assert resolve_precision("float16", "cuda:0") == "float16"


def test_flags_are_read_from_linux_and_absent_elsewhere(tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("model name\t: X\nflags\t\t: fpu avx512_bf16\n\nflags\t\t: other\n")
    assert cpu_flags(listing) == {"fpu", "avx512_bf16"}
    assert cpu_flags(tmp_path / "absent") == frozenset()


def test_back_ends_are_tried_fastest_first(spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolution.importlib.util, "find_spec", lambda _name: object())
    assert tuple(resolve_backends(spec, "cpu")) == ("openvino", "torch")
    assert tuple(resolve_backends(spec, "cuda:0")) == ("torch",)
    assert tuple(resolve_backends(dataclasses.replace(spec, precision="float16"), "cpu")) == ("torch",)
    assert tuple(resolve_backends(dataclasses.replace(spec, backend="openvino"), "cpu")) == ("openvino",)
    monkeypatch.setattr(resolution.importlib.util, "find_spec", lambda _name: None)
    assert tuple(resolve_backends(spec, "cpu")) == ("torch",)


def test_an_explicit_encoder_is_settled_as_it_is(spec: EncoderSpec) -> None:
    settled = resolve(dataclasses.replace(spec, backend="torch"), "cpu")
    assert settled.spec == dataclasses.replace(spec, backend="torch")
    assert settled.parity_C.min() >= 1 - 1e-6
    assert settled.vectors_CD.shape == (65, spec.dim)


def test_a_back_end_that_cannot_run_gives_way_to_torch(spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    build = resolution.build_encoder

    def without_openvino(candidate: EncoderSpec, device: str, options: object) -> object:
        if candidate.backend == "openvino":
            raise WorkerError("cannot be converted")
        return build(candidate, device, options)  # type: ignore[arg-type]

    monkeypatch.setattr(resolution, "build_encoder", without_openvino)
    monkeypatch.setattr(resolution, "resolve_backends", lambda _spec, _device: ("openvino", "torch"))
    settled = resolve(spec, "cpu").spec
    assert (settled.backend, settled.precision) == ("torch", "float32")


def test_a_class_that_no_back_end_reproduces_stops_the_run(spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resolution.MIN_COSINE, "bfloat16", 1.0)
    with pytest.raises(WorkerError, match=r"in bfloat16 on cpu has no back end .*torch: cosine 0\.99"):
        resolve(dataclasses.replace(spec, precision="bfloat16", backend="torch"), "cpu")


def test_a_dim_that_the_weights_do_not_have_is_a_model_error(spec: EncoderSpec) -> None:
    with pytest.raises(ModelError, match="announces vectors of 7 elements"):
        resolve(dataclasses.replace(spec, dim=7, backend="torch"), "cpu")


def test_the_hash_encoder_is_its_own_reference(spec: EncoderSpec) -> None:
    settled = resolve(dataclasses.replace(spec, kind="hash", precision="auto", pooling="", folder="", dim=8), "cpu")
    assert (settled.spec.precision, settled.spec.backend) == ("float32", "numpy")
    assert settled.parity_C.min() == pytest.approx(1)
