"""`make bench-cluster`: one run submitted to one worker of one core and to two, in turn, and how much faster two are.

    python time_workers.py [--rows 500] [--rounds 3] [--json]

The workers are processes of this machine: with fewer than three idle cores, two of them and the driver share.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from cluster import SHORT_LIVED, Cluster, clean_environment, die_with_parent

from shoal.jobs.quickstart import prepare

SHOAL = Path(sys.executable).with_name("shoal")
WORKERS = (1, 2)
CONF = {
    "spark.executor.memory": "2g",
    "spark.sql.shuffle.partitions": "4",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, default=500, help="docstrings of the standard library (default 500)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--json", action="store_true", help="print the seconds of each run too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as made:
        found = measured(Path(made), args.rows, args.rounds)
    if args.json:
        sys.stdout.write(f"{json.dumps(found, indent=2)}\n")
        return
    sys.stdout.write(
        f"{found['chunks']} chunks, {found['cores']} cores in this machine, medians of {args.rounds}\n"
        f"{'workers of one core':22}{'encode, s':>12}{'whole run, s':>14}\n"
    )
    for number in WORKERS:
        encode, total = (statistics.median(found["seconds"][str(number)][name]) for name in ("encode", "total"))
        sys.stdout.write(f"{number:<22}{encode:12.1f}{total:14.1f}\n")
    sys.stdout.write(f"{'one over two':22}{found['ratio']['encode']:12.2f}{found['ratio']['total']:14.2f}\n")


def measured(folder: Path, num_rows: int, rounds: int) -> dict[str, Any]:
    """Seconds of each run by the number of workers, and the ratios of their medians."""
    source = prepare(folder, say=lambda _: None).source
    lines = Path(str(source.path)).read_text(encoding="utf-8").splitlines()[:num_rows]
    Path(str(source.path)).write_text("\n".join(lines) + "\n", encoding="utf-8")
    seconds: dict[str, dict[str, list[float]]] = {str(number): {"encode": [], "total": []} for number in WORKERS}
    chunks = set()
    cluster = Cluster(folder / "cluster", memory="2g")
    try:
        cluster.wait()
        for number in WORKERS:
            target = {"kind": "standalone", "master": cluster.address, "conf": {**CONF, "spark.cores.max": str(number)}}
            (folder / f"target{number}.yaml").write_text(yaml.safe_dump(target))
        for turn in range(rounds):
            for number in WORKERS:
                record = submitted(folder, number, f"out/{number}-{turn}")
                chunks.add(record["chunks"]["encoded"])
                for name, values in seconds[str(number)].items():
                    values.append(record["seconds"][name])
                sys.stderr.write(f"{number} of them: encode {record['seconds']['encode']:.1f} s\n")
    finally:
        cluster.kill()
    medians = {
        number: {name: statistics.median(values) for name, values in of.items()} for number, of in seconds.items()
    }
    ratio = {name: medians["1"][name] / medians["2"][name] for name in ("encode", "total")}
    return {"chunks": max(chunks), "cores": len(os.sched_getaffinity(0)), "seconds": seconds, "ratio": ratio}


def submitted(folder: Path, number: int, table: str) -> dict[str, Any]:
    """The record of a run on so many workers, into a table of its own."""
    run = folder / "quickstart.yaml"
    words = ["submit", run, "--target", folder / f"target{number}.yaml", "--json"]
    words += ["--set", f"destination.path={folder / table}", "--set", "tracking.enabled=false"]
    done = subprocess.run(
        [str(SHOAL), *map(str, words)],
        env=clean_environment() | {"SPARK_LOCAL_IP": "127.0.0.1", "SPARK_SUBMIT_OPTS": SHORT_LIVED}, cwd=folder,
        capture_output=True, text=True, check=False, preexec_fn=die_with_parent,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    record: dict[str, Any] = json.loads(done.stdout)
    return record


if __name__ == "__main__":
    main()
