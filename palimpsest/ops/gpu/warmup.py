"""Pay for compiling and loading before the first request, not during it."""

import torch

from palimpsest.ops import gates
from palimpsest.ops.backends import Problem, choose
from palimpsest.ops.variants import kda, kda_from_logits, kda_step_


def warmup(
    heads: int,
    *,
    value_heads: int | None = None,
    key_dim: int = 128,
    value_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    training: bool = False,
    backend: str = "auto",
) -> None:
    """Run KDA once in every form a model calls it: dense and packed, from gates and from logits, and a step.

    Lengths, batch sizes and numbers of sequences never compile anything; heads, channels and dtype may.

    Args:
        heads, value_heads, key_dim, value_dim, dtype: of the calls to come; value_heads are `heads` if None.
        device: where the calls will be.
        training: the backward, too.
        backend: as of `kda`; a step with "hopper" runs as with "auto".
    """
    HV = heads if value_heads is None else value_heads

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=training)

    q, v, log_decay = (
        zeros(1, 2, heads, key_dim),
        zeros(1, 2, HV, value_dim),
        zeros(1, 2, HV, key_dim, dtype=torch.float32),
    )
    logits, beta = zeros(1, 2, HV, key_dim), zeros(1, 2, HV)
    borders = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    parameters = zeros(HV, dtype=torch.float32), zeros(HV, key_dim, dtype=torch.float32)
    with torch.set_grad_enabled(training):
        for cu_seqlens in (None, borders):
            options = {"cu_seqlens": cu_seqlens, "backend": backend}
            results = [kda(q, q, v, log_decay, beta, **options)]
            for gate in (gates.SoftplusDecay(*parameters), gates.SigmoidDecay(*parameters)):
                results.append(kda_from_logits(q, q, v, logits, beta, gate=gate, **options))
            if training:
                torch.stack([result.output.float().sum() for result in results]).sum().backward()
    with torch.no_grad():
        state = torch.zeros(1, HV, key_dim, value_dim, device=device)
        steps = "auto" if backend == "hopper" else backend  # which has no kernel for a step
        kda_step_(q[:, 0], q[:, 0], v[:, 0], log_decay[:, 0], beta[:, 0], state, backend=steps)
    if torch.device(device).type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        problem = Problem("kda", "kda", "cuda", dtype, key_dim, value_dim, 2, 1, heads, HV, capability=capability)
        if choose(problem, backend).name == "hopper":  # which of its kernels run depends on the length
            from palimpsest.ops.gpu.hopper import delta_memory

            delta_memory.load(dtype, key_dim, value_dim, q.get_device())
        torch.cuda.synchronize(device)
