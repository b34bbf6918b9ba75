"""Audio-visual segmentation composed of public data: photographs or videos with masks, and sounds of the same classes.

As VPO (Chen et al., CVPR 2024, arXiv 2304.02970) does it: picture and sound are paired by class and were not recorded
together. A photograph becomes a clip by a pan and zoom; objects of one or two of the classes in sight sound. What
stands out in a picture is the class with the largest single object. In the training split it sounds more often than by
chance (`bias`), in the others by chance: a model that does not listen fails there.

Every clip is drawn from (seed, split, index) alone, and every picture, recording, and what is nearly the same, is in
one split only. What cannot be used is counted by its reason, and left out.
"""
from icf.data.compose.write import ensure, generate, show

__all__ = ["ensure", "generate", "show"]
