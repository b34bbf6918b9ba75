"""Pages that need no server: Jinja2 templates in the `templates` folders of the rooms, pictures as data URIs."""
from __future__ import annotations

import base64
import io

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from icf.data.audio import RATE
from icf.engine.score_tables import format_value


def render(template: str, *packages: str, **values: object) -> str:
    """The text of a page; every value is escaped.

    Args:
        template: a file's name in the `templates` of a package, or of `icf.engine`, which has the common ones.
        packages: where else to look for templates, first of all.
        values: what the template names.
    """
    loaders = [PackageLoader(package) for package in (*packages, "icf.engine")]
    pages = Environment(loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                        keep_trailing_newline=True)
    pages.filters |= {"shown": format_value, "png_uri": png_uri, "jpeg_uri": jpeg_uri, "mp3_uri": mp3_uri}
    return pages.get_template(template).render(values)


def png_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def jpeg_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def mp3_uri(sound: Tensor) -> str:
    """A sound [n], float32 in [-1,1] at 16 kHz: about 8 kB a second, and every browser plays it."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, sound.clamp(-1, 1).numpy(), RATE, format="MP3")
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
