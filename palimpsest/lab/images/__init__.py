"""Images with labels: drawn with exact answers, shipped with packages, or by name where there is a network."""

from palimpsest.lab.images.digits import Digits
from palimpsest.lab.images.drawn_scenes import Scenes
from palimpsest.lab.images.image_task import ImageBatch
from palimpsest.lab.images.named import NamedImages

__all__ = ["Digits", "ImageBatch", "NamedImages", "Scenes"]
