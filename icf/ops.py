"""The operators, as users and the model see them: ``from icf.ops import ms_deform_attn``."""
