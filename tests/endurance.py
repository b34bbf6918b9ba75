"""A training run that is interrupted again and again, in every way, beside one that is not: `make endurance`.

Both train the toy benchmark on the CPU, saving every step. The one has a reader killed, its disk filled, its memory,
open files and file sizes limited (as by ``ulimit``), is terminated, and is killed at random moments, while it saves,
too; each time ``icf train --resume`` goes on. In the end both must hold the same losses of every step, weights and
scores, to the last bit; a fault may cost the step in flight, must be told in one line with how to go on, and must leave
no file behind. The disk is a small tmpfs in a mount namespace, for which no root is needed where the kernel lets users
have one; where not, the size of files alone is limited.
"""
from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file

PRIVATE = "ICF_ENDURANCE_PRIVATE"   # set in the mount namespace
DISK = 400                          # MB; a run holds two states, writes a third, and has weights and a report beside
DATA, FILES = 8 << 30, 256          # what every disturbed run has to do with: bytes of private memory, open files
OPTIONS = ["--data.workers=2", "--train.save_every=1", "--train.log_every=1", "--train.evaluate_every=1",
           "--eval.negatives=[]"]


class Run:
    """An `icf train` as a process of its own, and what it says."""

    def __init__(self, *arguments: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen([sys.executable, "-m", "icf.cli", "train", *arguments], env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # universal newlines: \r too
        self.pid, self.said = self.process.pid, []
        self.started = self.step = None  # of the progress bar, its first and its last
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if bar := re.search(r"(\d+)/\d+ \[", line):
                self.step = int(bar[1])
                self.started = self.step if self.started is None else self.started
            elif line.strip():
                self.said.append(line.rstrip())

    def running(self) -> bool:
        return self.process.poll() is None

    def reach(self, step: int) -> bool:
        """Whether the run comes as far as `step`."""
        while self.running() and (self.step is None or self.step < step):
            time.sleep(0.02)
        return self.running()

    def end(self, timeout: float | None = None) -> int:
        status = self.process.wait(timeout)
        self.reader.join()
        return status


# ---- Faults: each takes a run and its folder, and strikes ----


def kill(run: Run, folder: Path) -> None:
    time.sleep(random.random() * 3)
    run.process.kill()


def kill_while_saving(run: Run, folder: Path) -> None:
    while run.running() and not any((folder / "checkpoints").glob(".step-*.partial")):
        time.sleep(0.001)
    time.sleep(random.random() * 0.05)
    run.process.kill()


def kill_reader(run: Run, folder: Path) -> None:
    readers = []
    while run.running() and not readers:
        time.sleep(0.01)
        readers = [child for child in psutil.Process(run.pid).children() if child.name() == "pt_data_worker"]
    random.choice(readers).kill()


def terminate(run: Run, folder: Path) -> None:
    run.process.terminate()


def fill_disk(run: Run, folder: Path) -> None:
    with (folder.parent / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1 << 16))
            except OSError:
                return


def limit_file_size(run: Run, folder: Path) -> None:
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (1 << random.randrange(10, 25),) * 2)


def limit_open_files(run: Run, folder: Path) -> None:
    resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (psutil.Process(run.pid).num_fds(),) * 2)


def limit_memory(run: Run, folder: Path) -> None:
    resource.prlimit(run.pid, resource.RLIMIT_DATA, (1 << 20,) * 2)


FAULTS = [kill_reader, fill_disk, kill_while_saving, kill, limit_open_files, limit_file_size, limit_memory, terminate]
SILENT = {kill, kill_while_saving}  # the killed say nothing


@dataclass
class Outcome:
    fault: str
    step: int
    status: int
    said: str
    resumed: int
    problems: list[str]

    @property
    def lost(self) -> int:
        return self.step - self.resumed


def strike(fault, run: Run, folder: Path) -> tuple[Run, Outcome] | None:
    """Interrupt a run and go on with it; None if it ended before."""
    fault(run, folder)
    try:
        status = run.end(timeout=120)
    except subprocess.TimeoutExpired:
        run.process.kill()
        status = run.end()
        run.said.append("still running after two minutes")
    (folder.parent / "filler").unlink(missing_ok=True)
    if status == 0:
        return None
    problems = []
    if fault not in SILENT:
        if not re.fullmatch(rf"icf train: .*--resume {folder}\b.*", run.said[-1]):
            problems.append("does not say how to go on")
        if any("Traceback" in line for line in run.said):
            problems.append("traceback")
        leftovers = ", ".join(str(path.relative_to(folder)) for path in folder.rglob("*.partial"))
        if leftovers and fault is not limit_open_files:  # removing a folder opens it; resuming does it then
            problems.append(f"left {leftovers}")
    problems += [f"broke {path.relative_to(folder)}" for path in broken(folder)]
    following = start(folder, "--resume", str(folder))
    following.reach(0)
    outcome = Outcome(fault.__name__, run.step, status, run.said[-1] if fault not in SILENT else "",
                      following.started if following.started is not None else -1, problems)
    if outcome.lost > 1:
        problems.append(f"lost {outcome.lost} steps")
    return following, outcome


def start(folder: Path, *arguments: str) -> Run:
    """A run under `ulimit`."""
    run = Run(*arguments)
    resource.prlimit(run.pid, resource.RLIMIT_DATA, (DATA, DATA))
    resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
    return run


def broken(folder: Path) -> Iterator[Path]:
    """Files that cannot be read."""
    load = partial(torch.load, weights_only=False)
    readers = {".safetensors": load_file, ".bin": load, ".pkl": load,
               ".json": lambda path: json.loads(path.read_text())}
    for path in folder.rglob("*"):
        if path.suffix in readers and ".partial" not in str(path):
            try:
                readers[path.suffix](path)
            except Exception:
                yield path


def differences(undisturbed: Path, disturbed: Path) -> Iterator[str]:
    """What is not the same in two finished runs, or not whole."""
    histories, results = ([json.loads((run / name).read_text()) for run in (undisturbed, disturbed)]
                          for name in ("metrics.json", "results.json"))
    for a, b in zip(histories[0]["steps"], histories[1]["steps"], strict=False):
        if a != b:
            yield f"losses of step {a['step']}: {a} and {b}"
            break
    for name in ("steps", "evaluations"):
        if histories[0][name] != histories[1][name]:
            yield f"{name} differ: {len(histories[0][name])} and {len(histories[1][name])}"
    if results[0] != results[1]:
        yield "scores of the test split"
    for name in ("last.safetensors", "best.safetensors"):
        weights = [load_file(run / name) for run in (undisturbed, disturbed)]
        if weights[0].keys() != weights[1].keys() or any(
                not torch.equal(value, weights[1][key]) for key, value in weights[0].items()):
            yield name
    yield from (f"left {path}" for path in disturbed.rglob("*.partial"))


def endure(minutes: float, folder: Path) -> int:
    """Both runs in `folder`; returns the number of problems."""
    data, disk = f"--data.root={folder / 'data'}", folder / "disk"
    disk.mkdir(parents=True)
    faults = list(FAULTS)
    if PRIVATE in os.environ:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}M", "tmpfs", disk], check=True)
    else:
        faults.remove(fill_disk)
    print(f"disk: {f'a tmpfs of {DISK} MB' if fill_disk in faults else 'no mount namespace, file sizes limited only'}")

    probe = Run(data, *OPTIONS, "--train.iters=24", f"--out={folder / 'probe'}")  # writes the data, too
    assert probe.reach(4), "\n".join(probe.said)
    before = probe.step, time.monotonic()
    probe.reach(24)
    second = (time.monotonic() - before[1]) / (24 - before[0])
    assert probe.end() == 0, "\n".join(probe.said)
    shared = 2 if len(os.sched_getaffinity(0)) == 1 else 1  # the two runs on one core
    times = max(len(faults), int(0.5 * minutes))
    # Starting again takes time, which the run that is left alone gives back when it has ended.
    steps = max(int(minutes * 60 / second / shared), 4 * times)
    options = [data, *OPTIONS, f"--train.iters={steps}"]
    print(f"{steps} steps, {second:.2f} s each")

    began = time.monotonic()
    quiet = Run(*options, f"--out={folder / 'undisturbed'}")
    run_folder, outcomes = disk / "disturbed", []
    run = start(run_folder, *options, f"--out={run_folder}")
    order = chain.from_iterable(random.sample(faults, len(faults)) for _ in count())
    for number, fault in zip(range(times), order, strict=False):
        if not run.reach(steps * (number + 1) // (times + 1)):
            break
        struck = strike(fault, run, run_folder)
        if struck is None:
            break
        run, outcome = struck
        outcomes.append(outcome)
        print(f"{(time.monotonic() - began) / 60:5.1f} min", outcome, flush=True)
    status, lasted = run.end(), (time.monotonic() - began) / 60
    problems = [f"{outcome.fault} at step {outcome.step}: {problem}" for outcome in outcomes
                for problem in outcome.problems]
    if len(outcomes) < times or status:
        problems.append(f"ended with status {status} after {len(outcomes)} of {times} faults: {run.said[-5:]}")
    if quiet.end():
        problems.append(f"the undisturbed run failed: {quiet.said[-5:]}")
    if not status and not quiet.process.returncode:
        problems += differences(folder / "undisturbed", run_folder)

    table = Table("fault", "at step", "status", "said", "resumed at", "lost steps",
                  title=f"{steps} steps in {lasted:.1f} minutes, {len(outcomes)} faults")
    for x in outcomes:
        table.add_row(x.fault, str(x.step), str(x.status), escape(x.said.replace(str(folder), ".")), str(x.resumed),
                      str(x.lost))
    Console(width=160).print(table)
    print(*problems or ["the same losses of every step, weights and scores; nothing left behind"], sep="\n")
    return len(problems)


def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 30
    private = ["unshare", "--user", "--map-root-user", "--mount"]
    if PRIVATE not in os.environ and shutil.which("unshare") and not subprocess.run([*private, "true"]).returncode:
        os.execvpe(private[0], [*private, sys.executable, *sys.argv], {**os.environ, PRIVATE: "1"})
    random.seed(0)
    with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
        try:
            problems = endure(minutes, Path(folder))
        finally:
            if PRIVATE in os.environ:
                subprocess.run(["umount", Path(folder, "disk")])
    sys.exit(min(problems, 1))


if __name__ == "__main__":
    main()
