"""One verb on a table in a process of its own that is killed, with its JVM, at a named step; started by `dying`.

python verb_and_die.py VERB TABLE STEP [KEYS]
"""

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    from shoal.conf.run import SparkConfig
    from shoal.jobs.index import index
    from shoal.jobs.optimize import optimize
    from shoal.jobs.purge import purge
    from shoal.jobs.restore import Wanted, restore
    from shoal.jobs.session import open_spark
    from shoal.jobs.vacuum import vacuum

    verb, table, wanted, *keys = sys.argv[1:]

    def step(name: str) -> None:
        if name == wanted:
            os.killpg(os.getpgid(0), signal.SIGKILL)

    log_file = Path(table).with_name("dying.log")
    spark = open_spark(SparkConfig(master="local[2]"), app_name="verb and die", log_file=log_file)
    if verb == "index":
        index(spark, table, cells=4, step=step)
    elif verb == "optimize":
        optimize(spark, table, step=step)
    elif verb == "purge":
        purge(spark, table, Path(keys[0]), step=step)
    elif verb == "restore":
        restore(spark, table, Wanted(to=0), step=step)
    elif verb == "vacuum":
        vacuum(spark, table, step=step)


if __name__ == "__main__":
    main()
