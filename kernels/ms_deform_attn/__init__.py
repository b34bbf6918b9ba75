from .api import MSDeformAttn as MSDeformAttn
from .api import ms_deform_attn as ms_deform_attn
from .api import ms_deform_attn_fused as ms_deform_attn_fused
