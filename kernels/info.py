"""``python -m icf_kernels.info``: what was built and with what, what can run here, and why the rest cannot."""
import sys

import torch

from icf_kernels._common.backend import BACKENDS, PROBLEM, requested
from icf_kernels._common.testing import module, operators, why_not


def report() -> str:
    """The lines that ``icf info`` prints: versions, the native libraries, and every operator on every backend."""
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    names = {"cuda": lambda: torch.cuda.get_device_name(), "cpu": lambda: f"{torch.get_num_threads()} threads"}
    name = names.get(device, lambda: "which no kernel is for")()
    lines = [f"python {sys.version.split()[0]}, torch {torch.__version__}, device {device} ({name})"]
    for library, problem in PROBLEM.items():
        built = problem or f"built with {sys.modules[f'icf_kernels.{library}'].built_with}"
        lines.append(f"icf_kernels.{library} {built}")
    lines.append(f"backends asked for: {requested() or 'none, the fastest that can run is taken'}")
    lines.append("tensors elsewhere than on cpu and cuda, as on mps and xpu: reference, which is plain PyTorch")
    for room, op in operators():
        cases = module(room, "cases").CASES[op]
        for backend in BACKENDS:
            reason = why_not(room, op, backend, cases.make_inputs(cases.shapes[0], torch.float32, device))
            lines.append(f"{op}: {backend}: {reason or 'can run'}")
    return "\n".join(lines)


def fastest(device: str) -> dict[str, str]:
    """The backend that the automatic choice takes first on a type of device, by family of operators; where others are
    asked for, these."""
    asked, found = requested(), {}
    for room, op in operators():
        cases = module(room, "cases").CASES[op]
        inputs = cases.make_inputs(cases.shapes[0], torch.float32, device if device in ("cpu", "cuda") else "cpu")
        backend = next(backend for backend in BACKENDS if device in ("cpu", "cuda") and not why_not(
            room, op, backend, inputs) or backend == "reference")
        found.setdefault(room, backend)
    return found if not asked else {"asked for": asked}


if __name__ == "__main__":
    print(report())
