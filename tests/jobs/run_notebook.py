"""A driver of Databricks, as far as one can be had elsewhere: a session that is there already, and a notebook in it.

Arguments: the notebook, its parameters as JSON, the file for its task values. Started with DATABRICKS_RUNTIME_VERSION.
"""

import builtins
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from pyspark.sql import SparkSession

# There is an IPython around notebooks, by which a library may take its output elsewhere than to the streams.
builtins.get_ipython = object
notebook, parameters, values = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])


def asked(session):
    """Delta's classes there are others, so Shoal itself asks none."""
    assert "shoal" not in sys._getframe(1).f_code.co_filename
    return session.__dict__["_java"]


SparkSession._jvm = property(asked, lambda session, java: session.__dict__.update(_java=java))

settings = json.loads(os.environ["CLUSTER_CONF"])
builder = SparkSession.builder.appName("a cluster of somebody else's")
for setting, value in settings.items():
    builder = builder.config(setting, value)
spark = builder.getOrCreate()
told = {}
dbutils = SimpleNamespace(
    widgets=SimpleNamespace(get=parameters.__getitem__),
    jobs=SimpleNamespace(taskValues=SimpleNamespace(set=lambda key, value: told.__setitem__(key, value))),
)
try:
    exec(compile(notebook.read_text(encoding="utf-8"), str(notebook), "exec"), {"dbutils": dbutils})
finally:
    values.write_text(json.dumps(told), encoding="utf-8")
    # Shoal has left it running, or this fails.
    told_by_spark = spark.range(3).count()
sys.stdout.write(
    f"the session still counts to {told_by_spark}; Shoal was at {sys.modules['shoal.jobs.cli'].__file__}\n"
)
spark.stop()
