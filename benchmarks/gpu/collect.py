"""What `run.sh` left in a folder, as one file of measurements: collect.py FOLDER OUT"""
import csv
import json
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("triton", "torchvision", "timm", "transformers", "diffusers", "accelerate", "icf")


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def versions():
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
             "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def collect(folder, device):
    """In the format of pytest-benchmark, with `device`, `versions` and `stages` beside what it writes."""
    saved = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    with open(folder / "stages.tsv", newline="") as file:
        stages = [{"name": name, "exit_code": int(code), "seconds": int(seconds), "command": command}
                  for name, code, seconds, command in csv.reader(file, delimiter="\t")]
    changed = said("git", "status", "--porcelain", "--untracked-files=no")
    commit = {"id": said("git", "rev-parse", "HEAD") or None, "dirty": bool(changed)}
    empty = {"machine_info": {"node": platform.node()}, "commit_info": commit, "version": None,
             "datetime": datetime.now(timezone.utc).isoformat()}
    return {**(saved[0] if saved else empty), "benchmarks": [bench for run in saved for bench in run["benchmarks"]],
            "device": device, "versions": versions(), "stages": stages}


def main(folder, out):
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    name = "gpu-" + (re.sub(r"\W+", "-", device.lower()) if device else "none")
    results = collect(folder, device)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1))
    shutil.copy(folder / "log", out / f"{name}.log")
    for stage in results["stages"]:
        print(f"{stage['name']:10} exit {stage['exit_code']:3}  {stage['seconds']:4} s")
    print(f"{len(results['benchmarks'])} measurements: {out / name}.json")
    sys.exit(any(stage["exit_code"] for stage in results["stages"]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
