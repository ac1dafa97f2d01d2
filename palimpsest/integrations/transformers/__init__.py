"""Hugging Face transformers: its native delta-rule models on our kernels.

from palimpsest.integrations import transformers as ours

print(ours.enable())      # then load the model as always
"""

from palimpsest.integrations.transformers.patches import Enabled, disable, enable, enabled

__all__ = ["Enabled", "disable", "enable", "enabled"]
