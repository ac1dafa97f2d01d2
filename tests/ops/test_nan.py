"""How far a NaN reaches, as docs/how-to/cpu-backend.md and gpu-backends.md say: no other head and no other sequence on any
backend, no earlier token token by token, and no earlier chunk where whole chunks are multiplied."""

import pytest
import torch

from palimpsest import backends, kda
from palimpsest.ops.backends import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AT, T = 100, 130  # in the middle of a chunk, of 32 tokens as of 64
FIRST = {"reference": AT, "cpu": AT, "chunked": 96, "triton": 64, "hopper": 64}  # the first output that may be NaN
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
PROBLEM = Problem("kda", "kda", DEVICE, DTYPE, 64, 64, T, 2, 2, 2)
if DEVICE == "cuda":
    PROBLEM = PROBLEM._replace(capability=torch.cuda.get_device_capability())
ABLE = [b.name for b in backends._BACKENDS if b.kda is not None and b.refuses(PROBLEM) is None and b.name in FIRST]


def drawn():
    rng = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=rng)
    q, k, v = new(2, T, 2, 64), torch.nn.functional.normalize(new(2, T, 2, 64), dim=-1), new(2, T, 2, 64)
    inputs = {"q": q, "k": k, "v": v, "log_decay": -new(2, T, 2, 64).abs() / 8, "beta": new(2, T, 2).sigmoid()}
    return {name: x.to(DEVICE, DTYPE if name in "qkv" else torch.float32) for name, x in inputs.items()}


@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "beta"])
@pytest.mark.parametrize("backend", ABLE)
def test_a_nan_reaches_what_the_documentation_says(backend, name):
    inputs = drawn()
    without = kda(**inputs, backend=backend).output
    inputs[name] = inputs[name].clone()
    inputs[name][0, AT, 0] = torch.nan
    output, state = kda(**inputs, backend=backend)
    assert output[0, : FIRST[backend], 0].equal(without[0, : FIRST[backend], 0])
    assert output[0, AT, 0].isnan().all()
    assert output[1].equal(without[1])
    assert output[:, :, 1].equal(without[:, :, 1])
    assert state[0, 0].isnan().any() == (name != "q")
    if FIRST[backend] == AT:
        assert output[0, :AT].isfinite().all()


@pytest.mark.skipif("chunked" not in ABLE, reason="says what a backend does")
def test_a_nan_does_show_in_earlier_outputs_of_its_chunk_of_the_chunked_form():
    """Should this hold one day, the documentation may say so."""
    inputs = drawn()
    inputs["v"][0, AT, 0] = torch.nan
    earlier = kda(**inputs, backend="chunked").output[0, 96:AT, 0]
    assert earlier.isnan().any()
