from .api import gram_schmidt as gram_schmidt
from .api import orthogonal_blend as orthogonal_blend
from .api import orthogonal_directions as orthogonal_directions
from .api import philox_noise as philox_noise
