#!/usr/bin/env bash
# Build, test and measure on a machine with a GPU, in one call, without a network, within LIMIT seconds.
#
#   benchmarks/gpu/run.sh [WHEEL...]
#
# WHEELS: packages that the machine lacks; one of icf itself takes the place of the build. They are installed beside the
# Python that is there, without touching it. Each stage has a time of its own and may fail; the next one runs. Writes
# gpu-NAME.json, the measurements with device, versions, commit, and exit code and seconds of each stage, and gpu-NAME.log.
#
#   OUT           folder to write to              (benchmarks/results)
#   PYTHON        one that has torch and pytest   (python3)
#   LIMIT         seconds for everything          (570)
#   ICF_DRY_RUN   1: only say what would be run
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-570}
OUT=${OUT:-benchmarks/results}
DRY=${ICF_DRY_RUN:-}
mkdir -p "$OUT"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
LOG=$WORK/log
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PIP_BREAK_SYSTEM_PACKAGES=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}

# stage NAME SECONDS COMMAND...: run it for at most that long, and no longer than what is left of LIMIT; note how it ended
stage() {
    local name=$1 seconds=$2 left=$((LIMIT - SECONDS)) started=$SECONDS code
    shift 2
    [ "$left" -lt "$seconds" ] && seconds=$left
    printf '\n=== %s (at most %s s): %s\n' "$name" "$seconds" "$*" | tee -a "$LOG"
    if [ -n "$DRY" ]; then
        code=0
    elif [ "$seconds" -le 0 ]; then
        code=124
    else
        timeout --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$LOG"
        code=${PIPESTATUS[0]}
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - started))" "$*" >> "$WORK/stages.tsv"
    return "$code"
}

bench() {
    local name=$1 seconds=$2
    shift 2
    stage "$name" "$seconds" "$PYTHON" -m pytest --benchmark-only -q -s --benchmark-json="$WORK/$name.json" "$@"
}

install() {
    if [ $# -gt 0 ]; then
        stage wheels 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" "$@"
        export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
    fi
    case " $* " in *[/\ ]icf-*.whl\ *) return ;; esac
    # for the card that is here alone
    [ -n "$DRY" ] || TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST ICF_CUDA=1
    stage build 180 "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
}

install "$@"
stage info 60 "$PYTHON" -m icf_kernels.info
stage tests 150 "$PYTHON" -m pytest tests/kernels -q --maxfail=20 -k "(cuda or triton or gpu) and not without_gpu"
bench operators 90 benchmarks/bench_machine.py benchmarks/bench_kernels.py
bench step 120 benchmarks/bench_train_step.py -k "not compiled"
bench peers 90 benchmarks/bench_ms_deform_attn.py benchmarks/bench_gram_schmidt.py
if command -v compute-sanitizer > /dev/null || [ -n "$DRY" ]; then
    for tool in memcheck racecheck; do
        stage "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q \
            tests/kernels/test_contract.py -k "strides_do_not_matter and cuda-cuda"
    done
fi
stage profile 60 "$PYTHON" -m icf.cli profile toy-s4 --trace "$OUT/gpu-trace.json.gz"
if command -v nsys > /dev/null || [ -n "$DRY" ]; then
    stage nvtx 60 nsys profile --force-overwrite=true -o "$OUT/gpu-nvtx" "$PYTHON" -m icf.cli profile toy-s4 --nvtx
fi
bench metrics 60 benchmarks/bench_metrics.py
bench compiled 400 benchmarks/bench_train_step.py -k compiled  # compiles for minutes, so it has what time is left

"$PYTHON" benchmarks/gpu/collect.py "$WORK" "$OUT"
