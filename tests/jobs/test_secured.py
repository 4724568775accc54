"""What the target `secured` lets others see of a driver: UI and metrics, over TLS, with a token or not at all."""

import base64
import hashlib
import hmac
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from cluster import clean_environment

pytestmark = [pytest.mark.spark, pytest.mark.slow]

# What CLUSTERS.md says makes Prometheus see everything that Spark measures in the driver.
METRICS = {
    "spark.metrics.namespace": "shoal",
    "spark.metrics.conf.*.sink.prometheusServlet.class": "org.apache.spark.metrics.sink.PrometheusServlet",
    "spark.metrics.conf.*.sink.prometheusServlet.path": "/metrics/prometheus",
}
DRIVER = """\
import json, sys
from shoal.conf.loader import load_target
from shoal.conf.run import SparkConfig
from shoal.jobs.session import open_spark
conf = dict(load_target("secured").conf) | json.loads(sys.argv[1])
spark = open_spark(SparkConfig(master="local[1]", conf=conf), app_name="secured")
spark.range(10).count()
print(spark.sparkContext.uiWebUrl, flush=True)
sys.stdin.read()
"""


def token(key: bytes) -> str:
    """A JSON Web Token (RFC 7519) that this key has signed, good for a minute."""
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256"}, {"exp": int(time.time()) + 60})]
    text = b".".join(map(_text, parts))
    return b".".join([text, _text(hmac.new(key, text, hashlib.sha256).digest())]).decode()


def _text(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@pytest.mark.skipif(shutil.which("keytool") is None, reason="the JDK's keytool makes the certificate")
def test_the_ui_and_the_metrics_of_a_driver_are_for_those_with_a_token(tmp_path: Path) -> None:
    store, key = tmp_path / "ui.p12", os.urandom(32)
    made = "keytool -genkeypair -alias spark -keyalg EC -storetype PKCS12 -dname CN=localhost -storepass of-the-tests"
    subprocess.run([*made.split(), "-keystore", str(store)], check=True, capture_output=True)
    env = clean_environment() | {
        "SHOAL_MASTER": "spark://not-asked:7077",
        "SPARK_SECRET": "of the tests",
        "SPARK_KEYSTORE": str(store),
        "SPARK_KEYSTORE_PASSWORD": "of-the-tests",
        "SPARK_UI_KEY": base64.urlsafe_b64encode(key).decode(),
    }
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE

    def look(page: str, bearer: str | None) -> tuple[int, str]:
        headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(url + page, headers=headers), context=trusting) as found:
                return found.status, found.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    call = [sys.executable, "-c", DRIVER, json.dumps(METRICS)]
    pipe = subprocess.PIPE
    with subprocess.Popen(call, env=env, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        assert driver.stderr is not None
        url = driver.stdout.readline().strip()
        assert url.startswith("https://"), driver.stderr.read()
        for page, shown in (
            ("/jobs/", "secured - Spark Jobs"),
            ("/api/v1/applications", '"name" : "secured"'),
            ("/metrics/executors/prometheus", "metrics_executor_totalTasks_total{"),
            ("/metrics/prometheus", "metrics_shoal_driver_"),
        ):
            assert look(page, None)[0] == 403
            assert look(page, token(b"another key, of thirty two bytes"))[0] == 403
            status, text = look(page, token(key))
            assert (status, shown in text) == (200, True), text[:2000]
        driver.stdin.close()
