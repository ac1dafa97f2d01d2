import pytest
import torch

from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM


@pytest.fixture(scope="session")
def model():
    """Small, but with logits far enough apart that rounding does not choose the token."""
    torch.manual_seed(0)
    return KimiLinearForCausalLM(KimiLinearConfig.tiny("KKM", initializer_range=0.2)).eval()
