"""On a GPU: a captured step is the plain one, nothing waits for the host, and the same step gives the same bits."""

import pytest
import torch

from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.train import Optim
from palimpsest.train.captured import CapturedGradients
from palimpsest.train.data import Batch
from palimpsest.train.late import LateNumbers
from palimpsest.train.optim import build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONFIG = KimiLinearConfig.tiny("KM", hidden_size=128, linear_num_heads=2, linear_head_dim=64, moe_intermediate_size=64)


class Autocast(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        with torch.autocast("cuda", torch.bfloat16):
            return self.model(*args, **kwargs)


def built():
    torch.manual_seed(0)
    return Autocast(KimiLinearForCausalLM(CONFIG).cuda().train())


def batch(seed, packed):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(257, (1, 256) if packed else (2, 128), generator=rng)
    cu_seqlens = torch.tensor([0, 3 + seed, 100, 256], dtype=torch.int32) if packed else None
    return Batch(tokens, tokens, cu_seqlens, 0.5)


@pytest.mark.parametrize("packed", [False, True])
def test_captured_gradients_are_the_plain_ones(packed):
    plain, captured = built(), built()
    run = CapturedGradients(captured, share=0.5)
    for step in range(3):
        parts = [batch(2 * step, packed), batch(2 * step + 1, packed)]
        for i, part in enumerate(parts):
            found = run(part, first=i == 0)
            assert found is not None
            tokens, labels, cu_seqlens, weight = part.to(torch.device("cuda"))
            loss = plain(tokens, labels=labels, cu_seqlens=cu_seqlens).loss * weight
            (loss * 0.5).backward()
            torch.testing.assert_close(found, loss.detach(), rtol=1e-5, atol=1e-6)
        for (name, a), b in zip(captured.named_parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-2, atol=2e-3 * float(b.grad.abs().max()), msg=name)
        moes = [[m for m in model.modules() if hasattr(m, "total_load")] for model in (captured, plain)]
        assert all(a.total_load.equal(b.total_load) for a, b in zip(*moes))
        for model in (captured, plain):
            for p in model.parameters():
                p.grad.zero_()


def test_a_step_never_waits_and_gives_the_same_bits_twice(never_waiting):
    def run():
        model, results = built(), []
        optimizer = build_optimizer(model, Optim(), fused=True)
        for step in range(3):
            with never_waiting() if step == 2 else torch.enable_grad():
                part = batch(step, packed=True)
                part = Batch(*(x.cuda() for x in part[:3]), part.weight) if step < 2 else pinned
                tokens, labels, cu_seqlens, weight = part
                loss = model(tokens, labels=labels, cu_seqlens=cu_seqlens).loss * weight
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.found_inf = (~(loss.isfinite() & norm.isfinite())).float()
                optimizer.step()
                optimizer.zero_grad()
            results.append(loss.detach())
        return [*results, *(p.detach() for p in model.parameters())]

    pinned = Batch(*(x.cuda() for x in batch(2, packed=True)[:3]), 0.5)
    assert all(a.equal(b) for a, b in zip(run(), run()))


def test_numbers_come_late_and_in_order():
    late = LateNumbers(torch.device("cuda"))
    for i in range(5):
        late.push(i, torch.full((2,), float(i), device="cuda"))
    assert list(late.ready()) == [(i, [float(i)] * 2) for i in range(3)]
    assert list(late.all()) == [(i, [float(i)] * 2) for i in (3, 4)]
