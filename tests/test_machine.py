"""Processors, devices and threads: what the machine gives is used, no more, wherever icf runs."""
import os
import subprocess
import sys

import pytest
import torch

import icf.machine
from icf.config import Config
from icf.engine.conditions import build_loader
from icf.machine import WAIT, _quotas, ahead, pick_device, processors, readers


def groups(root, own, **files):
    """A machine's files that tell of control groups."""
    for name, text in {"proc/self/cgroup": own, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return sorted(_quotas(root))


@pytest.mark.parametrize("own, files, quotas", [
    ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, [1.5]),  # a container's, version 2
    ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, []),
    ("0::/slice/job\n", {"sys/fs/cgroup/slice/cpu.max": "400000 100000\n",
                         "sys/fs/cgroup/slice/job/cpu.max": "200000 100000\n"}, [2, 4]),
    ("4:memory:/x\n1:cpu,cpuacct:/docker/1\n", {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                                                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, [3]),
    ("1:cpuacct,cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                           "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, [0.5]),
    ("1:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                   "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, []),
])
def test_quotas_of_both_versions_of_control_groups(tmp_path, own, files, quotas):
    assert groups(tmp_path, own, **files) == quotas


def test_no_control_groups_no_quota(tmp_path):
    assert [*_quotas(tmp_path)] == []


@pytest.mark.parametrize("bound, quota, expected", [(8, [], 8), (8, [2.0], 2), (8, [1.5, 4], 2), (2, [16], 2),
                                                    (4, [0.1], 1)])
def test_processors_are_those_bound_to_within_the_quota(monkeypatch, bound, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(bound), raising=False)
    monkeypatch.setattr(icf.machine, "_quotas", lambda: quota)
    assert processors() == expected and readers(None) == min(4, expected // 2) and readers(7) == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert readers(None) == min(4, expected // 4)


def test_processors_where_the_system_does_not_bind_to_any(monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(icf.machine, "_quotas", lambda: [])
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert processors() == 6 and build_loader([range(3)], Config()).num_workers == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processors() == 1


@pytest.mark.parametrize("command", [["-m", "icf.cli", "info"], ["-c", "import icf.data.toy; import torch"]])
def test_threads_sleep_while_they_wait_unless_the_user_wants_it_otherwise(command):
    """OpenMP itself says what it took from its surroundings."""
    env = {name: value for name, value in os.environ.items() if name not in WAIT}

    def said(**own):
        done = subprocess.run([sys.executable, *command], env={**env, "OMP_DISPLAY_ENV": "TRUE", **own},
                              capture_output=True, text=True, check=True)
        return done.stderr

    if "OMP_WAIT_POLICY" not in said():
        pytest.skip("this torch has no OpenMP that tells what it took")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said() and "'PASSIVE'" not in said(OMP_WAIT_POLICY="ACTIVE")


def test_a_quota_sets_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(icf.machine, "_visible", lambda: 64)
    monkeypatch.setattr(icf.machine, "_quotas", lambda: [3.0])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    icf.machine.prepare_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    icf.machine.prepare_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "xpu", "gpu", "meta", "", "cpu:x"])
def test_a_device_that_is_not_here_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=f"device: expected one of cpu, .* got '{name}'"):
        pick_device(name)
    assert pick_device("cpu") == pick_device(None) == "cpu"


def test_devices_that_are_here_are_taken(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [pick_device(name) for name in (None, "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match="expected one of cpu, cuda:0, cuda:1, .* got 'cuda:2'"):
        pick_device("cuda:2")


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_items_made_ahead_keep_their_order_and_a_failure_its_place(depth):
    made = []

    def source():
        for item in range(9):
            made.append(item)
            yield item
        raise ValueError("broken")

    items, got = ahead(source(), depth), []
    with pytest.raises(ValueError, match="broken"):
        for item in items:
            got.append(item)
            assert len(made) <= len(got) + depth
    assert got == list(range(9))


def test_items_nobody_wants_are_not_made():
    made = []
    items = ahead((made.append(item) for item in range(100)), 2)
    next(items)
    items.close()
    assert len(made) <= 4
