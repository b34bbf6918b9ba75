"""What compilers say of every GPU kernel: registers, spills, shared memory. Needs no GPU.

    python benchmarks/cubin_stats.py [ROOM ...]      # all rooms by default; others keep what the file says of them

Compiles csrc/<room>/*_cuda.cu with nvcc and the AOT list of kernels/<room>/triton.py with Triton for each architecture,
reads what ptxas reports, and writes it with compilers, commit and seconds to results/cubin.json. Shared memory does not
contain what CUDA kernels ask for at launch.
"""
import json
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import triton
from torch.utils.cpp_extension import include_paths
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from icf_kernels._common.testing import module, operators

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "cubin.json"
ARCHS = (80, 90, 100)
NVCC = ["nvcc", "-cubin", "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-DUSE_CUDA",
        "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FIGURES = {"registers": r"Used (\d+) registers", "spill_store_bytes": r"(\d+) bytes spill stores",
           "spill_load_bytes": r"(\d+) bytes spill loads", "stack_bytes": r"(\d+) bytes stack frame",
           "shared_bytes": r"(\d+) bytes smem"}


def output(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout + done.stderr


def figures(report):
    """{kernel: figures} of what `ptxas -v` printed."""
    kernels = {}
    for part in re.split(r"Compiling entry function '", report)[1:]:
        found = {name: re.search(pattern, part) for name, pattern in FIGURES.items()}
        kernels[part.partition("'")[0]] = {name: int(match[1]) if match else 0 for name, match in found.items()}
    return kernels


def readable(symbols):
    """C++ names without arguments and namespaces, in the order of `symbols`."""
    names = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True).stdout.splitlines()
    noise = r"^void |icf::\(anonymous namespace\)::|torch::headeronly::|c10::|icf::"
    return [re.sub(noise, "", re.sub(r">\(.*", ">", name)).partition("(")[0] for name in names]


def cuda_kernels(source, arch):
    with tempfile.TemporaryDirectory() as folder:
        includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
        started = time.perf_counter()
        report = output(*NVCC, f"-arch=sm_{arch}", *includes, source, "-o", Path(folder) / "out.cubin")
        seconds = round(time.perf_counter() - started, 1)
    found = figures(report)
    rows = [{"kernel": name, **row} for name, row in zip(readable(found), found.values(), strict=True)]
    return sorted(rows, key=lambda row: row["kernel"]), seconds


def triton_kernels(room, arch):
    rows, started = [], time.perf_counter()
    for function, signature, constants in module(room, "triton").AOT:
        signature = {**signature, **dict.fromkeys(constants, "constexpr")}
        source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "in.ptx").write_text(compiled.asm["ptx"])
            report = output(get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}",
                            f"{folder}/in.ptx", "-o", f"{folder}/out.cubin")
        (row,) = figures(report).values()
        types = [kind for kind in signature.values() if kind.startswith("*")]
        name = function.__name__ + "<" + ", ".join([types[0], *(f"{k}={v}" for k, v in constants.items())]) + ">"
        rows.append({"kernel": name, **row, "shared_bytes": compiled.metadata.shared})
    return rows, round(time.perf_counter() - started, 1)


def measure(room):
    """{backend: {architecture: {source: what was compiled, seconds, kernels}}}."""
    jobs = [("cuda", source.name, cuda_kernels, source) for source in sorted((ROOT / "csrc" / room).glob("*_cuda.cu"))]
    if find_spec(f"icf_kernels.{room}.triton"):
        jobs.append(("triton", "triton.py", triton_kernels, room))
    found = {}
    for backend, name, compile_kernels, what in jobs:
        for arch in ARCHS:
            kernels, seconds = compile_kernels(what, arch)
            found.setdefault(backend, {}).setdefault(f"sm_{arch}", {})[name] = dict(seconds=seconds, kernels=kernels)
            spilled = sum(row["spill_store_bytes"] > 0 for row in kernels)
            most = max(row["registers"] for row in kernels)
            print(f"{room} {name} sm_{arch}: {len(kernels)} kernels, at most {most} registers, {spilled} spill, "
                  f"{seconds} s", flush=True)
    return found


def one_line_each(text):
    """JSON with every object that holds no other on a line of its own."""
    return re.sub(r"\{[^{}]*\}", lambda flat: re.sub(r"\s*\n\s*", " ", flat[0]), text)


def main(rooms):
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    made_by = dict(commit=output("git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12").strip(),
                   nvcc_version=re.search(r"release .*", output("nvcc", "--version"))[0],
                   triton_version=triton.__version__,
                   ptxas_of_triton={f"sm_{arch}": get_ptxas(arch).version for arch in ARCHS},
                   command=" ".join(["python benchmarks/cubin_stats.py", *rooms]))
    for room in rooms or sorted({room for room, _ in operators()}):
        known[room] = {**made_by, **measure(room)}
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(one_line_each(json.dumps(known, indent=1)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
