"""Which backend runs: what can be asked for, what an automatic choice takes and says, and what is refused."""
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import icf
from icf.ops import (
    contrast_positives,
    gaussian_entropy,
    gaussian_wasserstein,
    gram_schmidt,
    gw_contrast,
    gw_text_contrast,
    ms_deform_attn,
    ms_deform_attn_fused,
    orthogonal_blend,
    orthogonal_directions,
    use_backend,
)
from icf_kernels._common import backend as backends
from icf_kernels._common.testing import Calls

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
RUN = {"gram_schmidt": lambda **k: gram_schmidt(X, **k), "orthogonal_blend": lambda **k: orthogonal_blend(X, 0.5, **k),
       "gaussian_w2": lambda **k: gaussian_wasserstein(X, X, **k)}
needs_cpp = pytest.mark.skipif(bool(backends.PROBLEM["_C"]), reason=f"icf_kernels._C {backends.PROBLEM['_C']}")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing asked for and nothing said yet."""
    monkeypatch.setattr(backends, "_requests", {})
    monkeypatch.setattr(backends, "_told", set())


def taken(**options) -> dict[str, str]:
    """The backend that each operator of RUN is run on."""
    found = {}
    for op, run in RUN.items():
        with Calls() as calls:
            run(**options)
        found[op] = calls[0][0]._overloadname if calls else "reference"
    return found


@needs_cpp
@pytest.mark.parametrize("name, per_operator, reference", [
    ("reference", {}, {"gram_schmidt", "orthogonal_blend", "gaussian_w2"}), ("cpp", {}, set()), ("auto", {}, set()),
    ("cpp", {"gw_contrast": "reference"}, {"gaussian_w2"}), ("cpp,gw_contrast=reference", {}, {"gaussian_w2"}),
    ("cpp", {"orthogonal_blend": "reference"}, {"orthogonal_blend"}),
    ("auto", {"gram_schmidt": "reference"}, {"gram_schmidt", "orthogonal_blend"}),                     # the family
    ("reference", {"gram_schmidt": "cpp", "orthogonal_blend": "reference"}, {"orthogonal_blend", "gaussian_w2"}),
    ("reference", {"gram_schmidt": "auto"}, {"gaussian_w2"})])
def test_a_request_is_for_all_operators_a_family_or_one(name, per_operator, reference):
    icf.set_backend(name, **per_operator)
    assert taken() == {op: "reference" if op in reference else "cpp" for op in RUN}


@needs_cpp
def test_a_call_comes_before_set_backend_and_that_before_the_variable():
    code = ("import torch, icf; from icf.ops import gram_schmidt; from icf_kernels._common import testing\n"
            "def run(**k):\n"
            "    with testing.Calls() as calls: gram_schmidt(torch.ones(2, 3), **k)\n"
            "    print('cpp' if calls else 'reference', end=' ')\n"
            "run(); run(backend='cpp'); run(backend='auto'); icf.set_backend('cpp'); run(); icf.set_backend(); run()")
    for variable in ("reference", "cpp, gram_schmidt=reference"):
        said = subprocess.check_output([sys.executable, "-c", code], text=True,
                                       env={**os.environ, "ICF_BACKEND": variable})
        assert said.split() == ["reference", "cpp", "cpp", "cpp", "cpp"]


@pytest.mark.parametrize("variable, error", [
    ("fast", "backend must be one of"), ("reference,gw_contrst=reference", "no operator gw_contrst")])
def test_mistakes_in_the_variable_are_named(variable, error):
    code = "import torch; from icf.ops import gram_schmidt; gram_schmidt(torch.ones(2, 3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "ICF_BACKEND": variable})
    assert f"ValueError: ICF_BACKEND: {error}" in done.stderr


@pytest.mark.parametrize("name, per_operator, error", [
    ("fast", {}, "backend must be one of .*got 'fast'"), ("auto", {"gw_contrast": None}, "backend must be one of"),
    ("auto", {"gw_contrst": "cpp"}, "no operator gw_contrst; there are .*gw_contrast"),
    *((text, {}, "expected a backend for all operators") for text in ("=cpp", "gw_contrast=", "cpp,cpp"))])
def test_mistakes_are_named_and_change_nothing(name, per_operator, error):
    icf.set_backend("reference")
    with pytest.raises(ValueError, match=f"set_backend: {error}"):
        icf.set_backend(name, **per_operator)
    assert backends.requested() == "reference"


def test_what_is_not_installed_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(backends.PROBLEM, "_C", "was not built")
    with pytest.raises(RuntimeError, match="'cpp' was requested, but cannot run: icf_kernels._C was not built"):
        icf.set_backend("auto", gw_contrast="cpp")
    with pytest.raises(ValueError, match="icf_kernels._C was not built"), use_backend("cpp"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_at_once():
    with pytest.raises(RuntimeError, match="'cuda' was requested, but cannot run: "):
        icf.set_backend("cuda")


@needs_cpp
def test_a_request_that_some_input_does_not_allow_raises_there():
    icf.set_backend("cpp")
    with pytest.raises(RuntimeError, match="gaussian_w2: backend 'cpp' was requested, but cannot run: spectral='eps'"):
        gaussian_wasserstein(X, X, spectral="eps")


def test_a_setting_of_a_run_lasts_as_long_as_the_run():
    icf.set_backend("reference")
    with use_backend(None):
        assert backends.requested() == "reference"
    with pytest.raises(KeyError), use_backend("auto,gram_schmidt=reference"):
        assert backends.requested() == "auto,gram_schmidt=reference"
        raise KeyError
    assert backends.requested() == "reference"


@needs_cpp
def test_automatic_choice_says_once_what_it_took_and_why(caplog):
    caplog.set_level(logging.INFO, "icf")
    for _ in range(2):
        taken()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and all("cpp is the fastest backend that can run (cuda: " in line for line in told)
    assert sorted(line.partition(":")[0] for line in told) == ["gram_schmidt", "gw_contrast"]
    icf.set_backend("cpp")
    taken()
    assert len(caplog.records) == 2


def test_plain_pytorch_is_warned_of_once():
    with pytest.warns(UserWarning, match=r"gaussian_w2 runs in plain PyTorch \(cuda: .*; cpp: ") as warned:
        for _ in range(2):
            gaussian_wasserstein(X, X, spectral="eps")
    assert len(warned) == 1 and warned[0].filename.endswith("api.py")


VALUE, LOCATIONS, WEIGHTS = torch.randn(1, 6, 1, 4), torch.full((1, 2, 1, 1, 1, 2), 0.4), torch.ones(1, 2, 1, 1, 1)
# Operator -> a call with one thing wrong, which differs from a call that is right in that alone.
MISTAKES = {
    "shapes": (lambda: ms_deform_attn(VALUE, [(2, 2)], None, LOCATIONS, WEIGHTS), "together the 6 pixels"),
    "starts": (lambda: ms_deform_attn(VALUE, [(2, 3)], [1], LOCATIONS, WEIGHTS), "level_start_index must be"),
    "dtype": (lambda: ms_deform_attn(VALUE.int(), [(2, 3)], None, LOCATIONS, WEIGHTS), "must be floating point"),
    "locations": (lambda: ms_deform_attn(VALUE, [(2, 3)], None, LOCATIONS[..., :1], WEIGHTS), "sampling_locations"),
    "noise": (lambda: orthogonal_blend(X, X[..., 0].abs(), noise="pink"), "noise must be a tensor or one of"),
    "ratio": (lambda: orthogonal_blend(X, X[0, :2, 0]), "ratio must broadcast"),
    "seed": (lambda: orthogonal_blend(X, X[..., 0].abs(), seed=torch.ones(1)), "seed must be an integer"),
    "method": (lambda: gram_schmidt(X, method="qr"), "method must be one of"),
    "tolerance": (lambda: gram_schmidt(X, rank_tol=1.5), "rank_tol must be in"),
    "mask": (lambda: gaussian_wasserstein(X, X, x_mask=torch.ones(2, 3)), "x_mask must be bool"),
    "spectral": (lambda: gaussian_wasserstein(X, X, spectral="sharp"), "spectral must be one of"),
    "regularization": (lambda: gaussian_wasserstein(X, X, regularization=0), "regularization finite and above 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_call_that_was_right_does_not_excuse_another(mistake):
    wrong, error = MISTAKES[mistake]
    for _ in range(2):
        ms_deform_attn(VALUE, [(2, 3)], None, LOCATIONS, WEIGHTS)
        orthogonal_blend(X, X[..., 0].abs())
        gram_schmidt(X)
        gaussian_wasserstein(X, X)
        with pytest.raises(ValueError, match=error):
            wrong()


@needs_cpp
def test_what_is_remembered_follows_the_request():
    for name, expected in [("auto", "cpp"), ("reference", "reference"), ("cpp", "cpp"), ("auto", "cpp")]:
        icf.set_backend(name)
        assert {*taken().values(), *taken().values()} == {expected}
        assert {*taken(backend="reference").values()} == {"reference"}
    with use_backend("reference"):
        assert {*taken().values()} == {"reference"}
    assert {*taken().values()} == {"cpp"}


@needs_cpp
def test_what_is_remembered_of_a_constant_holds_for_a_leaf_and_the_other_way_round():
    for _ in range(2):
        for x in (X, X.clone().requires_grad_()):
            for run in (gram_schmidt, lambda x: orthogonal_blend(x, x[..., 0].detach().abs(), seed=1),
                        lambda x: gaussian_wasserstein(x, x)):
                assert run(x).requires_grad == x.requires_grad
                with torch.no_grad():
                    assert not run(x).requires_grad


@needs_cpp
def test_sizes_in_a_tensor_are_read_at_each_call():
    shapes = torch.tensor([(2, 3)])
    first = ms_deform_attn(VALUE, shapes, None, LOCATIONS, WEIGHTS)
    shapes.copy_(torch.tensor([(3, 2)]))
    second = ms_deform_attn(VALUE, shapes, None, LOCATIONS, WEIGHTS)
    torch.testing.assert_close(second, ms_deform_attn(VALUE, [[3, 2]], None, LOCATIONS, WEIGHTS, backend="reference"))
    assert not torch.equal(first, second)


@needs_cpp
def test_of_tensors_without_elements_as_much_is_prepared_the_second_time():
    """Their addresses do not tell one from its copy in another dtype."""
    value, points = torch.randn(2, 6, 2, 8).half(), torch.rand(2, 0, 1, 2).half()
    for _ in range(3):
        out = ms_deform_attn_fused(value, [(3, 2)], points, torch.zeros(2, 0, 12).half(), torch.zeros(2, 0, 6).half())
        assert out.shape == (2, 0, 16) and out.dtype == torch.float16


@needs_cpp
def test_no_more_is_remembered_than_fits(monkeypatch):
    monkeypatch.setattr(backends, "MOST_REMEMBERED", 4)
    for n in range(1, 20):
        gram_schmidt(torch.randn(1, n, 32))
        assert len(backends._remembered) <= 4


X = torch.randn(2, 3, 4)
NO_TENSORS = [[1.0], None, 3, np.ones((2, 3, 4), np.float32), torch.eye(3).to_sparse()]


@pytest.mark.parametrize("wrong", NO_TENSORS, ids=lambda wrong: type(wrong).__name__)
@pytest.mark.parametrize("call, name", [
    (lambda x: ms_deform_attn(x, [(3, 2)], None, LOCATIONS, WEIGHTS), "ms_deform_attn: value"),
    (lambda x: ms_deform_attn(VALUE, [(3, 2)], None, x, WEIGHTS), "ms_deform_attn: sampling_locations"),
    (lambda x: ms_deform_attn(VALUE, [(3, 2)], None, LOCATIONS, x), "ms_deform_attn: attention_weights"),
    (lambda x: ms_deform_attn_fused(VALUE, [(3, 2)], x, X, X), "ms_deform_attn_fused: reference_points"),
    (lambda x: orthogonal_blend(x, torch.tensor(0.5)), "orthogonal_blend: z"),
    (lambda x: orthogonal_directions(x, 2), "orthogonal_directions: z"),
    (lambda x: gram_schmidt(x), "gram_schmidt: vectors"),
    (lambda x: gaussian_wasserstein(x, X), "gaussian_wasserstein: x"),
    (lambda x: gaussian_wasserstein(X, x), "gaussian_wasserstein: y"),
    (lambda x: gaussian_entropy(x), "gaussian_entropy: x"),
    (lambda x: gw_contrast(x, X), "gw_contrast: x"), (lambda x: gw_contrast(X, x), "gw_contrast: y"),
    (lambda x: gw_text_contrast(X, X, x), "gw_text_contrast: counterfactuals"),
    (lambda x: contrast_positives(x), "contrast_positives: anchors")])
def test_what_is_no_dense_tensor_is_refused_by_name(call, name, wrong):
    with pytest.raises(ValueError, match=f"^{name} must be a dense tensor, got "):
        call(wrong)
