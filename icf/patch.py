"""Lets the deformable attention of transformers' and mmcv's models run on this package's operator.

What is replaced is the code of their sampling functions, not the names that refer to them, so that it reaches models
that were built, and names that were imported, before. Replaced code runs among the names of its own module, hence the
imports inside of the functions below.
"""
import sys
from functools import partial, reduce
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import FunctionType, ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from icf.ops import ms_deform_attn

_undo = {}  # library -> what to call to have its own code again
own = {}  # module -> its sampling function with its own code, for where that is needed


def patch_transformers() -> list[str]:
    """Make transformers' Deformable DETR, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, RF-DETR, LW-DETR, Grounding DINO, OMDet,
    PP-DocLayout, Mask2Former, OneFormer and relatives sample with :func:`icf.ops.ms_deform_attn`, in models built
    before and after the call. Outputs and gradients stay the same up to rounding; :func:`unpatch_transformers` undoes
    it. The ``discrete`` method of RT-DETRv2 and its descendants keeps its own code, and so does an export to ONNX.

    Returns:
        The names of the patched models; those that the installed transformers does not have are left out.

    Raises:
        RuntimeError: transformers is missing, or has one of these models in a form that is not known.
    """
    if find_spec("transformers") is None:
        raise RuntimeError("patch_transformers: transformers is not installed; pip install transformers")
    models = [name for name in _MODELS if find_spec(f"transformers.models.{name}") is not None]
    if "transformers" not in _undo:
        functions = [_function_of(f"transformers.models.{name}.modeling_{name}", *_MODELS[name]) for name in models]
        _undo["transformers"] = [_run(function, replacement) for function, replacement in functions]
    return models


def unpatch_transformers() -> None:
    """Give transformers' models their own code back."""
    for undo in _undo.pop("transformers", ()):
        undo()


def patch_mmcv() -> None:
    """Make mmcv's ``MultiScaleDeformableAttention``, and with it mmdet's and mmdet3d's models, sample with
    :func:`icf.ops.ms_deform_attn`, whether built, or imported under other names, before or after the call. Outputs and
    gradients stay the same up to rounding; :func:`unpatch_mmcv` undoes it. An export to ONNX keeps its own code.

    An mmcv without compiled operators (mmcv-lite), whose ``mmcv.ops`` cannot be imported, can be after the call; there,
    each of its other compiled operators raises when it is called.

    Raises:
        RuntimeError: mmcv is missing, or in a form that is not known.
    """
    if find_spec("mmcv") is None:
        raise RuntimeError("patch_mmcv: mmcv is not installed; pip install mmcv, or mmcv-lite")
    if "mmcv" in _undo:
        return
    if find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = _NotCompiled()
    module = "mmcv.ops.multi_scale_deform_attn"
    function = _function_of(module, "multi_scale_deformable_attn_pytorch", _sample)
    kernel = getattr(import_module(module), "MultiScaleDeformableAttnFunction", None)
    if kernel is None:
        raise RuntimeError(f"patch_mmcv: {module} has no MultiScaleDeformableAttnFunction; this release is not known")
    kernel.apply = staticmethod(ms_deform_attn)  # the same arguments
    _undo["mmcv"] = [_run(*function), partial(delattr, kernel, "apply")]


def unpatch_mmcv() -> None:
    """Give mmcv its own code back. An ``mmcv.ops`` that only the patch could import stays imported."""
    for undo in _undo.pop("mmcv", ()):
        undo()


def _function_of(module, path, replacement):
    """The function to be replaced, and its replacement, if that takes the same arguments."""
    function = reduce(lambda owner, name: getattr(owner, name, None), path.split("."), import_module(module))
    code, arguments = getattr(function, "__code__", None), _arguments(replacement.__code__)
    if code is None or code.co_freevars or _arguments(code) != arguments:
        raise RuntimeError(f"{module}: expected {path}({', '.join(arguments)}); this release is not known")
    return function, replacement


def _arguments(code):
    return code.co_varnames[:code.co_argcount]


def _run(function, replacement):
    """Give a function the code of another. Returns what undoes it."""
    code = function.__code__
    own[function.__module__] = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    function.__code__ = replacement.__code__
    return partial(setattr, function, "__code__", code)


class _NotCompiled(ModuleType):
    """Stands for mmcv's compiled operators where there are none: each can be asked for, none can be called."""

    def __init__(self):
        super().__init__("mmcv._ext")
        self.__spec__ = ModuleSpec("mmcv._ext", None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise RuntimeError(f"mmcv was installed without its compiled operators, {name} among them")

        return missing


def _forward(self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, sampling_locations,
             attention_weights, im2col_step):
    from icf.patch import keeps_own_code, ms_deform_attn, own
    if keeps_own_code():
        return own[__name__](self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index,
                             sampling_locations, attention_weights, im2col_step)
    return ms_deform_attn(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)


def _sample(value, value_spatial_shapes, sampling_locations, attention_weights):
    from icf.patch import keeps_own_code, ms_deform_attn, own
    if keeps_own_code():
        return own[__name__](value, value_spatial_shapes, sampling_locations, attention_weights)
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def _sample_v2(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"):
    from icf.patch import by_level, keeps_own_code, ms_deform_attn, own
    if keeps_own_code(method):
        return own[__name__](value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list,
                             method)
    locations = by_level(sampling_locations, num_points_list)
    weights = by_level(attention_weights[..., None], num_points_list)[..., 0]
    return ms_deform_attn(value, value_spatial_shapes, None, locations, weights)


def keeps_own_code(method: str = "default") -> bool:
    """What the operator does not do, and what is exported to ONNX, which has `grid_sample` but not our operator."""
    return method != "default" or torch.onnx.is_in_onnx_export()


def by_level(points: Tensor, numbers: list[int]) -> Tensor:
    """``[B, Q, M, sum(numbers), n]`` as ``[B, Q, M, L, max(numbers), n]``: levels of fewer points get points of zeros,
    and so of no weight."""
    most = max(numbers)
    return torch.stack([pad(level, (0, 0, 0, most - level.shape[3])) for level in points.split(numbers, 3)], 3)


# Models of transformers: their sampling function and its replacement.
_MODELS = {
    **dict.fromkeys(("deformable_detr", "grounding_dino", "mm_grounding_dino", "rt_detr", "omdet_turbo", "lw_detr",
                     "rf_detr", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4"),
                    ("MultiScaleDeformableAttention.forward", _forward)),
    **dict.fromkeys(("mask2former", "oneformer"), ("multi_scale_deformable_attention", _sample)),
    **dict.fromkeys(("rt_detr_v2", "d_fine", "deimv2"), ("multi_scale_deformable_attention_v2", _sample_v2)),
}
