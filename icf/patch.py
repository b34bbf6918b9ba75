"""Lets the deformable attention of transformers' models run on this package's operator."""
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.nn.functional import pad

from icf.ops import ms_deform_attn

# The models of transformers by the way they call their sampling: as a module, as a function, as RT-DETRv2's function.
_MODULES = ("deformable_detr", "grounding_dino", "mm_grounding_dino", "rt_detr", "omdet_turbo", "lw_detr", "rf_detr")
_FUNCTIONS = ("mask2former", "oneformer")
_FUNCTIONS_V2 = ("rt_detr_v2",)
_originals = []  # (owner, attribute, what stood there)


def patch_transformers() -> list[str]:
    """Make transformers' Deformable DETR, Mask2Former, OneFormer, RT-DETR, RT-DETRv2, Grounding DINO and relatives
    sample with :func:`icf.ops.ms_deform_attn`, in models built before and after the call. Outputs and gradients stay
    the same up to rounding; :func:`unpatch_transformers` undoes it. RT-DETRv2's ``discrete`` method keeps its own code.

    Returns:
        The names of the patched models; those that the installed transformers does not have are left out.

    Raises:
        RuntimeError: transformers is missing, or has one of these models in a form that is not known.
    """
    if find_spec("transformers") is None:
        raise RuntimeError("patch_transformers: transformers is not installed; pip install transformers")
    if _originals:
        return _patched()
    replacements = []
    for models, attribute in ((_MODULES, "MultiScaleDeformableAttention"),
                              (_FUNCTIONS, "multi_scale_deformable_attention"),
                              (_FUNCTIONS_V2, "multi_scale_deformable_attention_v2")):
        for name in models:
            if find_spec(f"transformers.models.{name}") is None:
                continue
            module = import_module(f"transformers.models.{name}.modeling_{name}")
            if not hasattr(module, attribute):
                raise RuntimeError(f"patch_transformers: {module.__name__} has no {attribute}; this release of "
                                   "transformers is not known")
            original = getattr(module, attribute)
            if models is _MODULES:
                replacements.append((original, "forward", _forward))
            elif models is _FUNCTIONS:
                replacements.append((module, attribute, _function))
            else:
                replacements.append((module, attribute, _function_v2(original)))
    for owner, attribute, new in replacements:
        _originals.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, new)
    return _patched()


def unpatch_transformers() -> None:
    """Give transformers' models their own code back."""
    while _originals:
        setattr(*_originals.pop())


def _patched():
    modules = [owner.__module__ if isinstance(owner, type) else owner.__name__ for owner, _, _ in _originals]
    return [module.split(".")[2] for module in modules]  # transformers.models.<name>.modeling_<name>


def _forward(self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, sampling_locations,
             attention_weights, im2col_step):
    return ms_deform_attn(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)


def _function(value, value_spatial_shapes, sampling_locations, attention_weights):
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def _function_v2(original):
    def sample(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"):
        if method != "default":
            return original(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)
        most = max(num_points_list)  # levels of fewer points are filled up with points of no weight

        def by_level(tensor):  # [B, Q, M, sum of points] -> [B, Q, M, L, most]
            levels = tensor.split(num_points_list, -1)
            return torch.stack([pad(level, (0, most - level.shape[-1])) for level in levels], 3)

        locations = torch.stack([by_level(xy) for xy in sampling_locations.unbind(-1)], -1)
        return ms_deform_attn(value, value_spatial_shapes, None, locations, by_level(attention_weights))

    return sample
