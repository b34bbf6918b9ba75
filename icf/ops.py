"""The operators, as users and the model see them: ``from icf.ops import ms_deform_attn``."""
from icf_kernels._common.backend import set_backend, use_backend
from icf_kernels.gram_schmidt import gram_schmidt, orthogonal_blend, orthogonal_directions
from icf_kernels.gw_contrast import (
    contrast_positives,
    gaussian_entropy,
    gaussian_wasserstein,
    gw_contrast,
    gw_text_contrast,
)
from icf_kernels.info import fastest
from icf_kernels.ms_deform_attn import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused

__all__ = ["MSDeformAttn", "contrast_positives", "fastest", "gaussian_entropy", "gaussian_wasserstein", "gram_schmidt",
           "gw_contrast", "gw_text_contrast", "ms_deform_attn", "ms_deform_attn_fused", "orthogonal_blend",
           "orthogonal_directions", "set_backend", "use_backend"]
