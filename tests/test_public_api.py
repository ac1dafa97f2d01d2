"""The public names, pinned: adding or removing one is a decision, seen in review."""

import pytest

import palimpsest

PUBLIC = """
    DeltaOutput KimiDeltaAttention KimiLinearConfig KimiLinearForCausalLM ModelState MultiHeadLatentAttention
    backends delta_rule dplr gated_delta gated_linear_attention gates gdn2 kda kda_from_logits kda_step_
    linear_attention softmax_lookup trace
""".split()


def test_the_public_names_are_these():
    assert sorted(palimpsest.__all__) == sorted(PUBLIC)


def test_every_public_name_is_there_and_explains_itself():
    for name in PUBLIC:
        assert getattr(palimpsest, name).__doc__, f"{name} has no docstring"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="kda_step_"):
        palimpsest.kda_step  # noqa: B018
