"""Arithmetic that host and device share (csrc/*/*_math.h), each property by itself, without an operator around it."""
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def icf_math(tmp_path_factory):
    """The module of math_bindings.cpp, built by ninja."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which(os.getenv("CXX", "c++").split()[0])
    if compiler is None or shutil.which("ninja") is None:
        pytest.skip("no C++ compiler or no ninja to build the bindings with")
    folder = tmp_path_factory.mktemp("bindings")
    target = folder / f"icf_math{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = " ".join(f"-I{path}" for path in (CSRC, pybind11.get_include(), sysconfig.get_path("include")))
    (folder / "build.ninja").write_text(
        f"rule module\n  command = {compiler} -O1 -std=c++20 -shared -fPIC -fvisibility=hidden -Wno-psabi {includes} "
        f"$in -o $out\nbuild {target}: module {HERE / 'math_bindings.cpp'}\n")
    done = subprocess.run(["ninja", "-C", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    spec = importlib.util.spec_from_file_location("icf_math", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VARIANTS = {"float64": (np.float64, 1), "float32": (np.float32, 1), "float32x16": (np.float32, 16)}


def columns(kind: str, rows: int, cols: int, lanes: int) -> np.ndarray:
    """Matrices [cols, rows, lanes] of float64."""
    a = np.random.default_rng(rows * 100 + cols).standard_normal((cols, rows, lanes))
    if kind == "null":
        a[1::3] = 0
    elif kind == "repeated":
        a[1::2] = a[:len(a[1::2])]
    elif kind == "graded":
        a *= 10.0 ** -np.arange(cols)[:, None, None]
    elif kind == "one for all":
        a[:] = a[:1]
    return a


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["random", "null", "repeated", "graded", "one for all"])
@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 2), (5, 5), (9, 9), (24, 12), (31, 31), (63, 63)])
def test_rotations_end_in_orthogonal_columns_of_the_singular_values(icf_math, variant, kind, rows, cols):
    dtype, lanes = VARIANTS[variant]
    before = columns(kind, rows, cols, lanes).astype(dtype)
    after, v, squares, _ = getattr(icf_math, f"jacobi_{variant}")(before)
    eps = np.finfo(dtype).eps
    for lane in range(lanes):
        a, b = after[..., lane].T.astype(np.float64), before[..., lane].T.astype(np.float64)      # [rows, cols]
        turned = v[..., lane].astype(np.float64)
        largest = np.linalg.norm(b, 2)
        assert np.isfinite(a).all() and np.isfinite(turned).all()
        found = np.sort(np.sqrt(np.maximum(squares[:, lane].astype(np.float64), 0)))[::-1][:min(rows, cols)]
        np.testing.assert_allclose(found, np.linalg.svd(b, compute_uv=False)[:len(found)], rtol=0,
                                   atol=40 * cols * eps * largest)
        assert np.abs(np.sqrt((a * a).sum(0)) - np.sqrt(np.maximum(squares[:, lane], 0))).max() <= 40 * eps * largest
        norms = np.maximum(np.linalg.norm(a, axis=0), eps * largest)
        cosines = a.T @ a / norms / norms[:, None]
        kept = np.linalg.norm(a, axis=0) > 10 * cols * eps * largest  # what is left of null columns is noise
        off = (cosines - np.diag(np.diag(cosines)))[np.ix_(kept, kept)]
        assert np.abs(off).max(initial=0) <= 2e3 * eps
        for matrix in (turned, turned.T):  # either way of storing it is orthogonal
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(cols), atol=200 * cols * eps)


@pytest.mark.parametrize("rounds, counter, key, words", [
    (10, [0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (10, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (10, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    (7, [0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    (7, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (7, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A])])
def test_random_words_are_those_published_of_philox(icf_math, rounds, counter, key, words):
    """The known answers of Random123 for philox4x32."""
    assert getattr(icf_math, f"philox{rounds}")(counter, key) == words


@pytest.mark.parametrize("width, height", [(1, 1), (1, 4), (5, 3), (16, 9)])
def test_corners_are_the_pixels_around_a_location_and_none_beyond_the_border(icf_math, width, height):
    start, pixels = 7, np.arange(height * width, dtype=float).reshape(height, width) ** 1.5 + 1
    padded = np.pad(pixels, 2)
    places = np.unique([0, 1, 0.5, -0.5, 1.5, *(np.arange(-2, 2 * width + 3) / (2 * width))])
    for x in places:
        for y in np.unique([0, 1, 0.25, 1.2, *(np.arange(-1, 2 * height + 2) / (2 * height))]):
            rows, weights = icf_math.corners(x, y, width, height, start)
            assert all(row == -1 or start <= row < start + width * height for row in rows)
            sampled = sum(w * pixels.flat[row - start] for row, w in zip(rows, weights, strict=True) if row >= 0)
            px, py = x * width - 0.5 + 2, y * height - 0.5 + 2                       # in the map with a border of zeros
            i, j = int(np.floor(py)), int(np.floor(px))
            inside = 0 <= i < height + 3 and 0 <= j < width + 3
            window = padded[i:i + 2, j:j + 2] if inside else np.zeros((2, 2))
            t, s = py - i, px - j
            expected = np.array([1 - t, t]) @ window @ np.array([1 - s, s])
            np.testing.assert_allclose(sampled, expected, atol=1e-9)
            if all(row >= 0 for row in rows):
                assert abs(sum(weights) - 1) < 1e-12


@pytest.mark.parametrize("x, y", [(np.nan, 0.5), (0.5, np.nan), (np.inf, 0.5), (0.5, -np.inf), (1e30, 0.5)])
def test_what_is_no_place_has_no_corners(icf_math, x, y):
    assert icf_math.corners(x, y, 4, 4, 0)[0] == [-1] * 4
