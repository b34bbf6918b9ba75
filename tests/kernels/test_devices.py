"""Devices that no kernel is for, as MPS and XPU: the definition runs there, and says so. The device of these tests is
meta, which has shapes and types but no values."""
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from icf_kernels import info
from icf_kernels._common import backend as backends
from icf_kernels._common.testing import forward_backward, module, operator_function, operators
from icf_kernels.gram_schmidt import reference

every_operator = pytest.mark.parametrize("room, op", [pytest.param(room, op, id=op) for room, op in operators()])


class Made(TorchDispatchMode, set):
    """Collects device and type of all tensors that are made."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        self.update((t.device.type, t.dtype) for t in torch.utils._pytree.tree_leaves(made)
                    if isinstance(t, torch.Tensor))
        return made


@pytest.fixture
def without_float64(monkeypatch):
    monkeypatch.setattr(reference, "NO_FLOAT64", ("mps", "xpu", "meta"))
    monkeypatch.setattr(backends, "_told", set())


@every_operator
def test_the_definition_runs_and_says_so_once(room, op, without_float64):
    cases = module(room, "cases").CASES[op]
    args = cases.make_inputs(cases.shapes[0], torch.float32, "meta")
    with warnings.catch_warnings(record=True) as warned, Made() as made:
        warnings.simplefilter("always")
        for _ in range(2):
            forward_backward(operator_function(room, op, "api"), args, torch.float32)
    said = [str(w.message) for w in warned if "plain PyTorch" in str(w.message)]
    assert len(said) == 1 and said[0].startswith(f"{op} runs in plain PyTorch (cuda: ") and "got meta" in said[0]
    assert made and ("meta", torch.float64) not in made  # which MPS has not


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_noise_without_float64_is_the_same_to_rounding(kind, monkeypatch):
    seed = torch.tensor(5)
    exact = reference.philox_noise((50, 33), seed, kind)
    monkeypatch.setattr(reference, "NO_FLOAT64", ("cpu",))
    single = reference.philox_noise((50, 33), seed, kind)
    assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_table_shows_it(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    said = info.report().splitlines()
    assert "device meta (which no kernel is for)" in said[0]
    assert any("mps and xpu: reference" in line for line in said)
    for _, op in operators():
        assert f"{op}: reference: can run" in said
        assert any(line.startswith((f"{op}: cpp: needs cpu tensors, got meta", f"{op}: cpp: icf_kernels._C "))
                   for line in said)
