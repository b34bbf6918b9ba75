"""What `icf bench report` makes of saved measurements, what `icf profile` finds, and what the GPU script writes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from icf.cli import main
from icf.studies.bench import read, report
from icf.studies.profile import REST, breakdown, peak_memory, ranges, trace

ROOT = Path(__file__).parents[2]
TINY = ["toy-s4", "--train.batch", "2", "--data.size", "32", "--data.frames", "2", "--model.decoder.layers", "1",
        "--model.decoder.pixel_layers", "1"]
FAST, REFERENCE, DENSE = "fast", "reference", "dense contrast"
TEXT = "# Numbers\n\n" + "".join(f"<!-- bench:begin {name} -->\n<!-- bench:end {name} -->\n\n" for name in (
    "operators", "peers", "step", "parts", "share", "rates", "plots")) + "The end.\n"


def measured(group, median, params=None, **extra):
    device = {"device": "cpu", "threads": 2, "torch": "2.10.0"}
    return {"group": group, "name": f"bench_{group}", "params": params, "stats": {"median": median},
            "extra_info": {**device, **extra}}


def contrast(B, d, seconds):
    return measured(f"gw_contrast, B={B}, T=5, d={d}", seconds, {"B": B, "T": 5, "d": d}, gemm_gflop=0.001,
                    rotation_gflop=0.0, ratios={"POT": 300.0})


def each(value):
    return dict.fromkeys((FAST, REFERENCE, DENSE), value)


BENCHMARKS = [
    measured("blend-8x256-forward", 1e-3, {"backend": "cpp"}),
    measured("blend-8x256-forward", 4e-3, {"backend": "reference"}),
    measured("machine-copy", 0.1, copy_bytes_per_s=1e10), measured("machine-matmul", 0.1, matmul_flops_per_s=1e11),
    measured("ms_deform_attn-small", 2e-3, floor={"bytes": 1e7, "flops": 1e6},
             times_ours={"ours": 1.0, "ours, bfloat16": 0.5, "grid_sample": 3.2}),
    measured("set-8x4x256", 1e-3, ratios={"in turn": {"qr": 20.0, "floor": 0.25}, "in a row": {"qr": 9.0}}),
    contrast(8, 256, 1e-3), contrast(32, 256, 5e-3), contrast(8, 512, 2e-3),
    measured("train_step-toy", 0.2, encoder="test_resnet", clips=4, frames=5, size=64, dtype="float32",
             seconds={FAST: 0.2, REFERENCE: 0.6, DENSE: 0.8}, times_fast={REFERENCE: 3.0, DENSE: 4.0},
             clips_per_s={FAST: 20.0, REFERENCE: 6.7, DENSE: 5.0},
             peak_memory_growth_mb={FAST: 100.0, REFERENCE: 250.0, DENSE: None},
             parts=each({"SC": [10.0, 10.0], "rest": [60.0, 20.0]}),
             operators=each({"gw_contrast": [4.0, 1.0], "rest": [90.0, 5.0]})),
    measured("share_of_objective", 0.1, share=each({"SC": 0.05, "CDCL": 0.01})),
    measured("metrics-binary", 0.1, frames_per_second=400),
]


@pytest.fixture
def saved(tmp_path):
    """A file of measurements."""
    def save(name="cpu.json", benchmarks=BENCHMARKS):
        file = tmp_path / name
        file.write_text(json.dumps({
            "machine_info": {"cpu": {"brand_raw": "Some CPU"}}, "commit_info": {"id": "0123456789", "dirty": False},
            "datetime": "2026-01-02T03:04", "benchmarks": benchmarks}))
        return file
    return save


def cells(text, start):
    """The cells of the row of a table that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_report_fills_every_section_and_keeps_the_rest(saved, tmp_path, capsys):
    text = tmp_path / "README.md"
    text.write_text(TEXT)
    report([saved()], [text], tmp_path / "plots")
    filled = text.read_text()
    assert filled.startswith("# Numbers\n\n<!-- bench:begin operators -->\nSome CPU, 2 threads, torch 2.10.0, "
                             "2026-01-02, commit 01234567, `cpu.json`")
    assert filled.endswith("<!-- bench:end plots -->\n\nThe end.\n")
    assert cells(filled, "blend-8x256-forward") == ["blend-8x256-forward", "4", "1", "4 x"]
    assert cells(filled, "ms_deform_attn-small")[1:] == ["2", "grid_sample 3.2 x", "50.0%"]    # 1 ms of bytes in 2 ms
    assert cells(filled, "set-8x4x256")[1:] == ["1", "qr 20 x", "25.0%"]
    assert cells(filled, "gw_contrast, B=8, T=5, d=256")[1:] == ["1", "POT 300 x", "1.0%"]
    assert cells(filled, "train_step-toy: test_resnet, B=4, 64², float32, ref")[1:] == ["600", "3 x", "6.7", "250"]
    assert cells(filled, "train_step-toy: SC")[1:] == ["20 (20.0%)"] * 3
    assert cells(filled, "train_step-toy: gw_contrast")[1:] == ["5 (5.0%)"] * 3
    assert cells(filled, "CDCL")[1:] == ["1.0%"] * 3
    assert cells(filled, "bench_metrics-binary")[1:] == ["100", "400 frames/s"]
    pictures = [f"plots/cpu-{kind}.png" for kind in ("speedup", "roofline", "contrast", "memory")]
    assert all(f"({path})" in filled and (tmp_path / path).read_bytes()[:4] == b"\x89PNG" for path in pictures)


def test_report_twice_changes_nothing(saved, tmp_path, capsys):
    text = tmp_path / "README.md"
    text.write_text(TEXT)
    report([saved()], [text], tmp_path)
    once, picture = text.read_text(), (tmp_path / "cpu-speedup.png").read_bytes()
    report([saved()], [text], tmp_path)
    assert (text.read_text(), (tmp_path / "cpu-speedup.png").read_bytes()) == (once, picture)
    assert "as it was" in capsys.readouterr().out


def test_report_keeps_machines_apart_and_says_what_was_not_measured(saved, tmp_path, capsys):
    text = tmp_path / "README.md"
    text.write_text(TEXT)
    gpu = [dict(bench, extra_info={**bench["extra_info"], "device": "Some GPU"}) for bench in BENCHMARKS[:2]]
    report([saved(), saved("gpu.json", gpu)], [text], tmp_path)
    filled = text.read_text()
    assert filled.index("Some CPU") < filled.index("Some GPU") < filled.index("bench:end operators")
    report([saved("gpu.json", gpu)], [text], tmp_path)
    assert "<!-- bench:begin share -->\nNot measured yet.\n<!-- bench:end share -->" in text.read_text()


@pytest.mark.parametrize("text, message", [
    ("<!-- bench:begin tables -->\n<!-- bench:end tables -->", "expected a mark of operators, peers, .*, got 'tables'"),
    ("<!-- bench:begin step -->\n", "expected <!-- bench:end step --> after its begin"),
    ("<!-- bench:begin step -->\n<!-- bench:end peers -->", "expected <!-- bench:end step --> .* got begin, end peers"),
])
def test_wrong_marks_are_refused_and_the_text_stays(text, message, saved, tmp_path):
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        report([saved()], [file], tmp_path)
    assert file.read_text() == text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": []}'])
def test_other_files_are_refused_by_name(content, tmp_path):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match="other.json: expected what pytest --benchmark-json writes"):
        read(tmp_path / "other.json")


def test_bench_run_outside_of_a_checkout_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "run", "--benchmarks", str(tmp_path)])
    assert "holds no bench_*.py" in capsys.readouterr().err


class Host(nn.Module):
    """Two parts; the second does nearly all of the work."""

    def __init__(self):
        super().__init__()
        self.light, self.heavy = nn.Linear(8, 256), nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))

    def forward(self, x):
        return self.heavy(self.light(x))


def test_backward_counts_for_the_part_that_made_it():
    host, names = Host(), {"light": "light.forward", "heavy": "heavy.forward", "absent": "objective.read"}
    with ranges(names, host):
        spent = breakdown(trace(lambda: host(torch.randn(4096, 8)).sum().backward()), names)
    assert {*spent} == {"light", "heavy", REST}
    assert min(spent["heavy"]) > max(spent["light"].forward, spent["light"].backward) > 0
    assert spent["heavy"].backward > spent[REST].backward


def test_ranges_leave_no_trace():
    host = Host()
    with ranges({"light": "light.forward"}, host):
        assert "forward" in vars(host.light)
    assert "forward" not in vars(host.light)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory_is_what_was_allocated():
    grown = peak_memory(lambda: torch.ones(64, 2**18).sum(), torch.device("cpu"))
    assert 60 * 2**20 <= grown < 96 * 2**20     # the kernel counts pages in batches


@pytest.mark.parametrize("baseline", [False, True])
def test_profile_of_a_step(baseline, tmp_path, capsys):
    main(["profile", *TINY, "--trace", str(tmp_path / "trace.json"), "--device", "cpu",
          *(["--objective.enabled", "false"] if baseline else [])])
    out = capsys.readouterr().out
    for part in ("visual encoder", "decoder", "loss", "optimiser", "ms_deform_attn"):
        assert f"│ {part} " in out
    for part in ("MIT", "SC", "CDCL", "orthogonal_blend", "gw_contrast"):
        assert (f"│ {part} " in out) is not baseline
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"step", "pixel decoder"} <= {event.get("name") for event in events}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nvtx_without_a_gpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["profile", *TINY, "--nvtx"])
    assert "--nvtx needs an NVIDIA GPU" in capsys.readouterr().err


def test_gpu_script_notes_every_stage(tmp_path):
    run = subprocess.run(["bash", str(ROOT / "benchmarks/gpu/run.sh")], capture_output=True, text=True, env={
        **os.environ, "ICF_DRY_RUN": "1", "OUT": str(tmp_path), "PYTHON": sys.executable})
    assert run.returncode == 0, run.stderr
    (file,) = tmp_path.glob("gpu-*.json")
    results = json.loads(file.read_text())
    assert {"build", "tests", "operators", "step", "memcheck"} <= {stage["name"] for stage in results["stages"]}
    assert results["versions"]["torch"] == torch.__version__ and read(file).benchmarks == []
