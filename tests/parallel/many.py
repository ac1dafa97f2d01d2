"""Run as a program: a model trained for a few steps by one process and by groups of them, each group by several plans.

    python many.py FOLDER

Torch is loaded once; each group is forked from here, meets over gloo, and leaves in FOLDER what it found.
"""

import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from palimpsest.layers.moe import busiest_shares, gather_loads, update_router_bias
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.parallel import Plan, make_mesh, parallelize
from palimpsest.parallel.gradients import Gradients, copies
from palimpsest.parallel.pieces import create, official_stretches, pieces, write_rows
from palimpsest.train import Optim
from palimpsest.train.optim import build_optimizer

ROWS, LENGTH, STEPS = 24, 12, 3
CONFIG = KimiLinearConfig.tiny(
    "KM", hidden_size=20, intermediate_size=24, linear_head_dim=8, moe_intermediate_size=8, num_experts=12, vocab_size=61,
    bos_token_id=None, eos_token_id=None, pad_token_id=None, kv_lora_rank=10,
)  # fmt: skip
PLANS = {
    1: {"alone": {}},
    2: {
        "ddp": {},
        "fsdp": {"kind": "fsdp"},
        "experts": {"expert": 2},
        "context": {"context": 2},
        "sharded experts": {"kind": "fsdp", "expert": 2},
    },
    3: {"experts": {"expert": 3}, "fsdp": {"kind": "fsdp"}},
    4: {
        "experts and data": {"expert": 2},
        "sharded experts and data": {"kind": "fsdp", "expert": 2},
        "hsdp": {"kind": "hsdp", "shard": 2},
        "experts and context": {"expert": 2, "context": 2},
        "sharded context": {"kind": "fsdp", "context": 2},
        "hsdp, experts": {"kind": "hsdp", "shard": 2, "expert": 2},
    },
}
BY_ADAMW = ("1 alone", "2 fsdp", "4 hsdp, experts")  # whose rule knows no rows: a few plans are enough


def model_of(config=CONFIG):
    torch.manual_seed(0)
    return KimiLinearForCausalLM(config).double().train()


def trained(plan, kind="muon", recompute=False):
    """What a run by a plan comes to: losses, norms, loads of each step; the model and its spread."""
    model = model_of()
    mesh = make_mesh(plan, "cpu") if dist.is_initialized() else None
    spread = parallelize(model, mesh, plan, recompute=recompute)
    gradients = Gradients(model, spread)
    optimizer = build_optimizer(model, Optim(kind=kind, lr=1e-2, clip=0.5), copies=copies(model, spread))
    index, count = spread.rows
    told = []
    for step in range(STEPS):
        rng = torch.Generator().manual_seed(step)
        rows = torch.randint(61, (ROWS, LENGTH), generator=rng)
        parts = rows.chunk(2)  # as accumulated
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            mine = part.chunk(count)[index]
            loss = model(mine, labels=mine).loss
            (loss / len(parts)).backward()
            total += loss.detach() / len(parts)
        gradients.sum_()
        norm = gradients.clip_(0.5)
        if mesh is not None:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        optimizer.step()
        gather_loads(model)
        told.append([float(total), float(norm), *busiest_shares(model).tolist()])
        update_router_bias(model, 1e-2, gathered=True)
        if gradients.keeps:
            gradients.zero_()
        else:
            optimizer.zero_grad()
    return told, model, spread


def write(model, spread, file):
    """The official file, each process its rows."""
    stretches = list(official_stretches(pieces(model, spread)))
    if not dist.is_initialized() or dist.get_rank() == 0:
        create(file, stretches, {"format": "pt"})
    if dist.is_initialized():
        dist.barrier()
    write_rows(file, stretches, {"format": "pt"})
    if dist.is_initialized():
        dist.barrier()


def group(folder, size, rank):
    """One process of a group."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
    for name, fields in PLANS[size].items():
        for kind in ("muon", "adamw") if f"{size} {name}" in BY_ADAMW else ("muon",):
            told, model, spread = trained(Plan(**fields), kind)
            write(model, spread, folder / f"{size} {name} {kind}.safetensors")
            if rank == 0:
                torch.save(told, folder / f"{size} {name} {kind}.pt")
    if size == 4:
        told, *_ = trained(Plan(expert=2), recompute=True)
        again, *_ = trained(Plan(expert=2))
        if rank == 0:
            torch.save([told, again], folder / "repeated.pt")
    if size > 1:
        dist.destroy_process_group()


def main(folder):
    for size in PLANS:
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    group(folder, size, rank)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        failed = [size for child in children if os.waitpid(child, 0)[1]]
        assert not failed, f"a process of {size} failed"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
