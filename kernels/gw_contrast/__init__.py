from .api import contrast_positives as contrast_positives
from .api import gaussian_entropy as gaussian_entropy
from .api import gaussian_w2 as gaussian_w2
from .api import gaussian_wasserstein as gaussian_wasserstein
from .api import gw_contrast as gw_contrast
from .api import gw_text_contrast as gw_text_contrast
