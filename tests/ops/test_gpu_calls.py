"""On a GPU: the wrong calls of `benchmarks.faults.bad_calls`, each the law's number or a sentence. Skipped without one.

Under `compute-sanitizer --tool memcheck python -m pytest tests/ops/test_gpu_calls.py` no kernel may leave its tensors.
"""

import pytest
import torch

from benchmarks.faults.bad_calls import FUNCTIONS, Draw, _moved, outcome, spoiled

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON = [("triton", torch.float32, 17, 24), ("triton", torch.bfloat16, 64, 40), ("auto", torch.float16, 96, 33)]
ON += [("hopper", torch.bfloat16, 64, 128), ("hopper", torch.float16, 128, 64)] if HOPPER else []
DRAWS = [{"B": 2, "T": 70}, {"B": 1, "T": 83, "borders": (0, 6, 6, 70, 83)}, {"B": 1, "T": 1, "with_state": False}]
NAMES = [name for name, function in FUNCTIONS.items() if function.has_backends and name != "softmax_lookup"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype", "K", "V"), ON, ids=str)
def test_a_call_gives_the_laws_number_or_a_sentence(name, backend, dtype, K, V):
    wrong = []
    for n, sizes in enumerate(DRAWS):
        draw = Draw(**sizes, K=K, V=V, dtype=dtype, seed=n)
        right = FUNCTIONS[name].draw(draw) | {"backend": backend}
        calls = [("as it is", right), *((what, right | {changed: x}) for what, changed, x in spoiled(right))]
        calls = calls[:1] + calls[1 + n :: 13]  # a few hundred in all
        wrong += [f"{what}: {found}" for what, call in calls if (found := outcome(name, call, "cuda"))]
    assert wrong == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype", "K", "V"), ON, ids=str)
def test_a_tensor_that_was_left_on_the_cpu_is_named(name, backend, dtype, K, V):
    right = FUNCTIONS[name].draw(Draw(K=K, V=V, dtype=dtype)) | {"backend": backend}
    for left in (x for x, value in right.items() if isinstance(value, torch.Tensor)):
        call = {x: value if x == left else _moved(value, "cuda") for x, value in right.items()}
        with pytest.raises(ValueError, match="on cpu|on cuda|needs|has no kernel"):
            FUNCTIONS[name].call(call)


@pytest.mark.parametrize(("backend", "dtype", "K", "V"), ON, ids=str)
def test_second_derivatives_name_the_form_that_has_them(backend, dtype, K, V):
    call = FUNCTIONS["kda"].draw(Draw(K=K, V=V, dtype=dtype)) | {"backend": backend}
    call = {x: _moved(value, "cuda") for x, value in call.items()}
    q, k = call["q"].requires_grad_(), call["k"].requires_grad_()
    (d_q,) = torch.autograd.grad(FUNCTIONS["kda"].call(call).output.float().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(d_q.float().sum(), k)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch itself, at its first
def test_forward_mode_derivatives_are_those_of_the_torch_form():
    call = {x: _moved(value, "cuda") for x, value in FUNCTIONS["kda"].draw(Draw(K=16, V=16)).items()}
    run = lambda backend: torch.func.jvp(
        lambda v: FUNCTIONS["kda"].call(call | {"v": v, "backend": backend}).output, (call["v"],), (call["v"],)
    )[1]
    torch.testing.assert_close(run("auto"), run("chunked"))


def test_autograd_hears_that_a_step_edited_a_state_that_it_kept():
    call = {x: _moved(value, "cuda") for x, value in FUNCTIONS["kda_step_"].draw(Draw(K=16, V=16)).items()}
    before = call["state"]._version
    FUNCTIONS["kda_step_"].call(call)
    assert call["state"]._version > before
