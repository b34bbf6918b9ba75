"""The operators, as users and the model see them: ``from icf.ops import ms_deform_attn``."""
from icf_kernels.ms_deform_attn import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused

__all__ = ["MSDeformAttn", "ms_deform_attn", "ms_deform_attn_fused"]
