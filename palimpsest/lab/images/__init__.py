"""Images with labels: drawn with exact answers, shipped with packages, or by name where there is a network."""

from palimpsest.lab.images.digits import Digits
from palimpsest.lab.images.image_task import ImageBatch, ImageTask
from palimpsest.lab.images.named import NamedImages
from palimpsest.lab.images.scenes import Scenes

__all__ = ["Digits", "ImageBatch", "ImageTask", "NamedImages", "Scenes"]
