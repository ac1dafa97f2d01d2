"""What stands beside the memory, called right and wrong: the law's number, or a sentence; and each row of its table."""

import itertools

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from benchmarks.faults.bad_calls import Draw, outcome
from benchmarks.faults.calls_beside import DRAWS, FUNCTIONS_BESIDE, bad_calls_beside, spoiled_beside
from palimpsest.ops import arguments, decode, short_conv
from palimpsest.ops.arguments import BESIDE, TABLES
from palimpsest.ops.cpu import decode_calls
from palimpsest.ops.gpu import decode_ops, neighbours
from tests.ops.test_calls import EVERY_DTYPE, ReachedError, right

SIZES = {"H": 2, "K": 4, "W": 3, "D": 8, "S": 5, "R": 4, "C": 6, "O": 10, "X": 5}


@st.composite
def draws(draw):
    """Right sizes, of none and of some tokens."""
    sizes = {letter: draw(st.integers(1, 5)) for letter in "HKV"} | {
        "B": draw(st.integers(0, 6)),
        "T": draw(st.integers(0, 9)),
    }
    if draw(st.booleans()):
        inner = sorted(draw(st.lists(st.integers(0, sizes["T"]), max_size=3)))
        sizes |= {"B": 1, "borders": (0, *inner, sizes["T"])}
    return Draw(**sizes, dtype=draw(st.sampled_from([d.dtype for d in DRAWS.values()])), seed=draw(st.integers(0, 3)))


@settings(max_examples=max(300, settings().max_examples))
@given(st.sampled_from(list(FUNCTIONS_BESIDE)), draws(), st.data())
def test_a_call_gives_the_laws_number_or_a_sentence(name, draw, data):
    call = FUNCTIONS_BESIDE[name].draw(draw)
    wrong = list(spoiled_beside(call))
    for at in data.draw(st.lists(st.integers(0, len(wrong) - 1), max_size=2)):
        what, changed, value = wrong[at]
        call[changed] = value
        note(what)
    assert outcome(name, call, functions=FUNCTIONS_BESIDE) is None


def test_some_of_the_campaigns_calls():
    wrong = [f"{t.name}: {found}" for t in itertools.islice(bad_calls_beside(), 0, None, 11) if (found := t.run())]
    assert wrong == []


@pytest.mark.parametrize("name", FUNCTIONS_BESIDE)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_right_call_is_answered(name, draw):
    function = FUNCTIONS_BESIDE[name]
    call = function.draw(draw)
    copies = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    assert all(x.isfinite().all() for x in function.call(copies))


# ---- mutants: with a part of a row taken out of the table, what it refuses is let through ----


def right_beside(op):
    """Right tensors of an operator, by its rows; a letter that no size is named for is 3."""
    sizes = dict.fromkeys("ABCDEHIJKMNORSTVWXk", 3) | SIZES
    tensors = []
    for row in BESIDE[op]:
        shape = [arguments._size(letter, sizes) for letter in row.shape.removeprefix(arguments.NUMBERS).split()]
        like = {"the dtype of weights[0]": torch.float32, "the dtype of a memory": torch.float32}
        dtype = (
            row.dtypes[-1]
            if isinstance(row.dtypes, tuple)
            else like.get(row.dtypes, tensors[0].dtype if tensors else None)
        )
        tensors.append(torch.zeros(shape, dtype=torch.float32 if dtype == torch.float64 else dtype))
    return tensors


PARTS = {
    "shape": lambda x: x[None],
    "dtypes": lambda x: x.to(torch.complex64),
    "optional": lambda x: None,
    "order": lambda x: torch.stack((x, x), -1)[..., 0],
    "device": lambda x: x.to("meta"),
    "layout": lambda x: x.to_sparse(),
}


def parts_of(row):
    in_order = row.in_order or row.in_place
    return [
        part for part in PARTS if not (part == "optional" and row.optional) and not (part == "order" and not in_order)
    ]


def weaken_beside(op, i, part, monkeypatch):
    row = BESIDE[op][i]
    monkeypatch.setattr(arguments, "_FITTED", {})
    check = {"shape": "_expect_letters", "device": "_expect_device", "layout": "_expect_dense"}.get(part)
    if check:
        before = getattr(arguments, check)
        if part == "layout":  # what is not dense has no order either
            monkeypatch.setattr(arguments, "_expect_order", lambda *_: None)
        return monkeypatch.setattr(arguments, check, lambda of, *rest: None if of is row else before(of, *rest))
    weaker = {
        "dtypes": {"dtypes": EVERY_DTYPE},
        "optional": {"optional": True},
        "order": {"in_order": False, "in_place": False},
    }
    rows = (*BESIDE[op][:i], row._replace(**weaker[part]), *BESIDE[op][i + 1 :])
    monkeypatch.setitem(arguments.BESIDE, op, rows)
    monkeypatch.setitem(arguments._LIE, op, [n for n, x in enumerate(rows) if x.in_order or x.in_place])


ROWS = [(op, i, part) for op, rows in BESIDE.items() for i, row in enumerate(rows) for part in parts_of(row)]


def test_each_part_of_each_row_beside_is_what_refuses(monkeypatch):
    for op, i, part in ROWS:
        tensors, row = right_beside(op), BESIDE[op][i]
        for _ in range(2):  # known the second time
            arguments.fit(op, tensors)
        many = part == "shape" and row.shape.startswith(arguments.NUMBERS)
        changed = [*tensors[:i], torch.cat((tensors[i],) * 2) if many else PARTS[part](tensors[i]), *tensors[i + 1 :]]
        with pytest.raises((ValueError, TypeError)) as refusal:
            arguments.fit(op, changed)
        assert arguments.fits(op, changed) is None
        leads = i == 0 or any(f"the dtype of {row.name}" == other.dtypes for other in BESIDE[op])
        if not leads:
            assert row.name in str(refusal.value), (op, row.name, part)
        if leads or (part == "optional" and row.shape == "B H K K"):
            continue  # the others follow it: all rows then disagree
        with monkeypatch.context() as patched:
            weaken_beside(op, i, part, patched)
            said = ""
            try:
                arguments.fit(op, changed)
            except (ValueError, TypeError) as error:  # of a row that took a letter from this one
                said = str(error)
            assert not said.startswith(f"{row.name} "), (op, row.name, part, said)


@pytest.mark.parametrize("op", TABLES)
def test_places_layouts_order_and_heads_of_the_memorys_rows_are_what_refuses(op, monkeypatch):
    tensors = right(op)
    of_row = {"_expect_device": lambda x: x.to("meta"), "_expect_dense": lambda x: x.to_sparse()}
    for i, row in enumerate(TABLES[op].rows):
        for check, change in of_row.items():
            changed = [*tensors[:i], change(tensors[i]), *tensors[i + 1 :]]
            with pytest.raises(ValueError, match=row.name):
                arguments.check(op, changed, kept=1)
            if i == 0:
                continue  # q says where the others must be
            with monkeypatch.context() as patched:
                before = getattr(arguments, check)
                patched.setattr(arguments, "_RIGHT", set())
                if check == "_expect_dense":  # what is not dense has no order either
                    patched.setattr(arguments, "_expect_order", lambda *_: None)
                patched.setattr(
                    arguments, check, lambda of, *rest, row=row, run=before: None if of is row else run(of, *rest)
                )
                arguments.check(op, changed, kept=1)
    sizes = {"B": 1, "T": 3, "H": 3, "K": 5, "HV": 4, "V": 7, "N": 1, "P": 1, "HV*K": 20}
    uneven = [torch.zeros([sizes[x] for x in row.shape.removeprefix("numbers ").split()]) for row in TABLES[op].rows]
    with pytest.raises(ValueError, match="must be a multiple"):
        arguments.check(op, uneven, kept=1)
    monkeypatch.setattr(arguments, "_expect_heads", lambda *_: None)
    arguments.check(op, uneven, kept=1)


# ---- every door asks the table ----


DOORS = {
    "gpu_grouped_product": (neighbours, lambda m, r, e: neighbours._grouped_product(r, m, e)),
    "gpu_grouped_outer": (neighbours, neighbours._grouped_outer),
    "gpu_row_losses_": (neighbours, lambda z, t: neighbours._row_losses_(z, t, -100, True)),
    "gpu_short_conv": (neighbours, lambda x, w, s, a, r: neighbours._short_conv([x], [w], [s], a, r)),
    "gpu_project": (decode_ops, lambda x, w: decode_ops._project([x], [w], torch.float32)),
    "gpu_add_norm": (decode_ops, lambda *x: decode_ops._add_norm(*x, 1e-5)),
    "gpu_memory_layer_step_": (
        decode_ops,
        lambda q, k, v, *x: decode_ops._memory_layer_step_(q, k, v, x[:3], x[3:6], *x[6:], 1e-5, 1.0, 1, 0.0, False),
    ),
    "gpu_latent_step": (decode_ops, lambda *x: decode_ops._latent_step(*x, 2)),
    "gpu_latent_layer_step_": (decode_ops, lambda *x: decode_ops._latent_layer_step_(*x, 1e-6)),
    "gpu_route": (decode_ops, lambda *x: decode_ops._route(*x, 2, 1.0, True, False)),
    "gpu_experts": (decode_ops, lambda *x: decode_ops._experts_step(*x[:6], list(x[6:]))),
    "cpu_project": (decode_calls, lambda x, w: decode_calls.project([x], [w], torch.float32)),
    "cpu_add_norm": (decode_calls, lambda *x: decode_calls.add_norm(*x, 1e-5)),
    "cpu_memory_layer_step_": (
        decode_calls,
        lambda q, k, v, *x: decode_calls.memory_layer_step_(q, k, v, x[:3], x[3:6], *x[6:], 1e-5, 1.0, 1, 0.0, False),
    ),
    "cpu_route": (decode_calls, lambda *x: decode_calls.route(*x, 2, 1.0, True, False)),
    "cpu_experts": (decode_calls, lambda *x: decode_calls.experts(*x[:6], list(x[6:]))),
}


def test_no_door_is_left_out():
    assert set(DOORS) == {op for op in BESIDE if op.startswith(("gpu_", "cpu_"))}


@pytest.mark.parametrize("op", DOORS)
def test_every_door_beside_asks_its_rows_before_anything_else(op, monkeypatch):
    def stop(asked, *_, **__):
        assert asked == op
        raise ReachedError

    module, call = DOORS[op]
    if op.startswith("cpu") and decode_calls.jit.refusal() is not None:
        pytest.skip("needs the C kernels")
    monkeypatch.setattr(module, "fits" if op.startswith("cpu") else "fit", stop)
    monkeypatch.setattr(decode_calls.jit, "library", lambda: pytest.fail("a kernel was reached"))
    with pytest.raises(ReachedError):
        call(*right_beside(op))


# ---- numbers that address memory: under Triton's interpreter here, where an address outside is an error of NumPy's ----


@pytest.mark.parametrize("far", [-1, 4, 2**31, -(2**63)])
@pytest.mark.parametrize("form", ["cpu", "torch", "triton"])
def test_an_expert_that_there_is_not_gives_nan_to_its_part_alone(far, form):
    a = FUNCTIONS_BESIDE["decode.experts"].draw(Draw(K=16, V=15))
    tensors = [a[name] for name in ("x", "chosen", "weights", "gate", "up", "down")]
    with torch.no_grad():
        right = decode.experts(*tensors, form="torch")
        tensors[1] = tensors[1].clone()
        tensors[1][1, 0] = far
        parts = decode.experts(*tensors, form=form)
    assert parts[1, 0].isnan().all()
    torch.testing.assert_close(parts[0], right[0])
    torch.testing.assert_close(parts[1, 1], right[1, 1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # below 0 nothing is read, and that is NaN
@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize(("length", "row"), [(-5, 0), (-(2**40), 0), (9, 6), (2**40, 6)])
def test_a_row_beyond_the_cache_is_written_to_its_ends(length, row, form):
    a = FUNCTIONS_BESIDE["decode.latent_layer_step_"].draw(Draw(B=1, K=16, V=4))
    tensors = [a[name] for name in ("q", "latent", "norm", "weights", "rows")]
    before = a["rows"].clone()
    with torch.no_grad():
        decode.latent_layer_step_(*tensors, torch.tensor([length]), form=form)
    changed = (a["rows"] != before).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [row]


@pytest.mark.parametrize("ends", [[9, 9, 9], [-4, 20, 5], [2**31 - 1] * 3, [5, 2, 5], [-(2**31), 0, 5]])
def test_ends_that_make_no_sense_reach_no_row_beyond_the_tensors(ends):
    rows, matrices = torch.randn(5, 8), torch.randn(3, 6, 8)
    given = torch.tensor(ends, dtype=torch.int32)
    guarded = torch.cat((rows, torch.full((64, 8), torch.nan)))[:5]  # what lies behind them would show
    torch.ops.palimpsest_gpu.grouped_product(guarded, matrices, given)
    outer = torch.ops.palimpsest_gpu.grouped_outer(guarded, guarded, given)
    assert not outer.isnan().any()


@pytest.mark.parametrize(
    ("ages", "rows"), [([9] * 6, [7] * 6), ([-3] * 6, [-2] * 6), ([2**31 - 1] * 6, [-(2**31)] * 6)]
)
def test_ages_and_rows_that_make_no_sense_reach_nothing_beyond_the_tensors(ages, rows):
    x = torch.cat((torch.full((1, 9, 4), torch.nan), torch.randn(1, 6, 4), torch.full((1, 9, 4), torch.nan)), 1)[
        :, 9:15
    ]
    state = torch.cat((torch.full((2, 4, 2), torch.nan), torch.randn(2, 4, 2), torch.full((2, 4, 2), torch.nan)))[2:4]
    to = lambda numbers: torch.tensor(numbers, dtype=torch.int32)
    (y,) = torch.ops.palimpsest_gpu.short_conv([x], [torch.randn(4, 3)], [state], to(ages), to(rows))
    assert y.isfinite().all()
    dxs, d_weights = torch.ops.palimpsest_gpu.short_conv_backward(
        [x], [torch.randn(4, 3)], [state], to(ages), to(rows), [torch.ones(1, 6, 4)]
    )
    assert dxs[0].isfinite().all()
    assert d_weights[0].isfinite().all()


GPU = torch.ops.palimpsest_gpu


def mlp_of(x):
    """Two tensors that choose one expert, and that expert's matrices."""
    return torch.zeros(5, 1).long(), torch.ones(5, 1), x[None], x[None], x.mT[None].contiguous()


WRONG = [
    lambda x: GPU.row_losses_(x[:1].expand(5, 8), torch.zeros(5).long(), -100, True),
    lambda x: GPU.row_losses_(x.mT, torch.zeros(8).long(), -100, True),
    lambda x: GPU.short_conv([x[None]] * 4, [x[0, :, None]] * 4, [], None, None),
    lambda x: GPU.short_conv([], [x], [], None, None),
    lambda x: GPU.short_conv_backward([x[None]], [torch.ones(8, 2)], [], None, None, []),
    lambda x: GPU.short_conv_backward([x[None]], [torch.ones(8, 2)], [], None, None, [x.long()[None]]),
    lambda x: GPU.project([], [x], torch.float32),
    lambda x: GPU.project([x], [x], torch.int32),
    lambda x: GPU.experts_step(x, *mlp_of(x), [x]),
    lambda x: short_conv.short_convs([x[None]] * 3, [torch.ones(8, 1, 4)] * 2),
    lambda x: short_conv.short_convs([x[None]], [torch.ones(8, 1, 4)], cu_seqlens=[0, 5]),  # pyright: ignore
    lambda x: decode.project([x], []),
    lambda x: decode.project([x], [x.bfloat16()]),
    lambda x: decode.experts(x, *mlp_of(x), shared=[x, None, x]),  # pyright: ignore
]


@pytest.mark.parametrize("call", WRONG)
def test_what_rows_cannot_say_is_refused_too(call):
    with pytest.raises((ValueError, TypeError)) as refusal, torch.no_grad():
        call(torch.zeros(5, 8))
    assert len(str(refusal.value).split()) > 4
