"""Checkpoints from one layout to another, and whether a folder is what it should be."""

from palimpsest.convert.conversion import Report, convert
from palimpsest.convert.layouts import LAYOUTS
from palimpsest.convert.validate import Finding, detect, validate

__all__ = ["LAYOUTS", "Finding", "Report", "convert", "detect", "validate"]
