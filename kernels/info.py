"""``python -m icf_kernels.info``: what was built and with what, what can run here, and why the rest cannot."""
import sys

import torch
from icf_kernels._common.backend import BACKENDS, PROBLEM
from icf_kernels._common.testing import module, operators, why_not

if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, device {device}")
    for library, problem in PROBLEM.items():
        print(f"icf_kernels.{library}", problem or f"built with {sys.modules[f'icf_kernels.{library}'].built_with}")
    for room, op in operators():
        cases = module(room, "cases").CASES[op]
        for backend in BACKENDS:
            reason = why_not(room, op, backend, cases.make_inputs(cases.shapes[0], torch.float32, device))
            print(f"{op}: {backend}: {reason or 'can run'}")
