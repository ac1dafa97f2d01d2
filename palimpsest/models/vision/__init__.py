"""A vision transformer whose layers mix patches with a memory that scans the image: one way, both ways, four ways."""

from palimpsest.models.vision.memory_left import memory_left
from palimpsest.models.vision.scans import SCANS, scan_order
from palimpsest.models.vision.vision_config import VisionConfig
from palimpsest.models.vision.vision_transformer import VisionTransformer

__all__ = ["SCANS", "VisionConfig", "VisionTransformer", "memory_left", "scan_order"]
