"""How many tasks encode; tests/jobs/test_cluster.py has executors with GPUs."""

import pytest
from pyspark.sql import SparkSession

from shoal.conf.errors import ConfigError
from shoal.jobs.encoder_tasks import encoder_tasks, sharing_of

pytestmark = pytest.mark.spark


def test_without_gpus_every_slot_encodes(spark: SparkSession) -> None:
    found = encoder_tasks(spark)
    assert (found.slots, found.profile) == (2, None)


def test_a_share_is_a_whole_number_of_tasks() -> None:
    assert sharing_of("3") == 3
    for text in ("0", "0.5", "-1", "two"):
        with pytest.raises(ConfigError, match=r"spark.shoal.encodersPerGpu is '.*'; write how many tasks"):
            sharing_of(text)
