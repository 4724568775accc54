"""Which jars Spark lacks, and whether Ivy has brought them."""

from pathlib import Path

import pytest

from shoal.jobs.jars import IVY_CACHE, IVY_JARS, connectors, delta


@pytest.mark.parametrize(
    ("spark_version", "version", "package"),
    [
        ("4.0.1", "4.0.0", "io.delta:delta-spark_2.13:4.0.0"),
        ("4.1.0", "4.1.0", "io.delta:delta-spark_4.1_2.13:4.1.0"),
        ("4.2.0", "4.4.0", "io.delta:delta-spark_4.2_2.13:4.4.0"),
    ],
)
def test_the_delta_package_fits_spark(
    monkeypatch: pytest.MonkeyPatch, spark_version: str, version: str, package: str
) -> None:
    monkeypatch.setattr("pyspark.__version__", spark_version)
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)

    assert delta().coordinates == package


def test_the_connector_of_s3_is_of_the_version_of_sparks_hadoop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.jobs.jars._home", lambda: tmp_path)
    (tmp_path / "jars").mkdir()
    assert connectors(["s3a://lake/docs"], tmp_path) == []
    (tmp_path / "jars/hadoop-client-api-3.5.0.jar").touch()

    (found,) = connectors(["/data/docs", "docs=s3a://lake/docs"], tmp_path)
    assert found.coordinates == "org.apache.hadoop:hadoop-aws:3.5.0"
    assert found.fetched() == []
    assert connectors(["/data/docs", "hdfs://name/docs"], tmp_path) == []


def test_what_ivy_has_brought_is_known_by_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.jobs.jars._home", lambda: tmp_path)
    monkeypatch.setattr("pyspark.__version__", "4.2.0")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "4.4.0")
    described = tmp_path / IVY_CACHE / "io.delta/delta-spark_4.2_2.13/ivy-4.4.0.xml"
    for folder in (tmp_path / IVY_JARS, described.parent):
        folder.mkdir(parents=True)
    assert delta().fetched() == []
    described.write_text(
        """<dependencies>
        <dependency org="org.apache.spark" name="spark-core_2.13" rev="4.2.0" conf="provided->compile(*)"/>
        <dependency org="io.delta" name="delta-storage" rev="4.4.0" conf="compile->compile(*),master(*)"/>
        <dependency org="io.delta" name="delta-kernel-api" rev="4.4.0" conf="compile->compile(*),master(*)"/>
        </dependencies>"""
    )
    names = ["delta-spark_4.2_2.13", "delta-storage", "delta-kernel-api"]
    jars = [tmp_path / IVY_JARS / f"io.delta_{name}-4.4.0.jar" for name in names]
    for jar in jars:
        assert delta().fetched() == []
        jar.touch()
    assert delta().fetched() == jars


def test_a_spark_that_has_the_connector_gets_no_other(tmp_path: Path) -> None:
    (tmp_path / "jars").mkdir()
    for name in ("hadoop-client-api-3.4.1.jar", "hadoop-aws-3.4.1.jar"):
        (tmp_path / "jars" / name).touch()

    assert connectors(["s3a://lake/docs"], tmp_path) == []
