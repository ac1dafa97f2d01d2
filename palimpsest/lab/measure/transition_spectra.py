"""What a trained layer does to its memory: transition matrices, their eigenvalues, what its gates learned, warnings.

    S_t = M_t S_{t-1} + beta_t k_t v_t^T,     M_t = (I - beta_t k_t k_t^T) Diag(alpha_t)

M has the eigenvalues of the symmetric Diag(alpha)^(1/2) (I - beta k k^T) Diag(alpha)^(1/2): they are real. With unit keys,
alpha in (0, 1] and beta in [0, 2] they lie in [-1, 1] and no M lengthens a vector.

Letters  B sequences, T tokens, H heads, K key channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from palimpsest.checks import check, check_fields
from palimpsest.lab.framework.experiment import Progress, Row
from palimpsest.lab.tasks.task import Key
from palimpsest.lab.training import TEST_SEED, Training, learn
from palimpsest.layers.kimi_delta_attention import RecurrenceInputs
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.watched_layers import delta_rule_layers
from palimpsest.ops.trace import trace

CLOSE = 1e-4  # to 1, in float32
LOOKS = 256  # at most so many tokens of a sequence are measured: eigenvalues take milliseconds each


def transition_matrix(k: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """M of every token, [..., K, K], from k and log_decay [..., K] and beta [...].

    >>> transition_matrix(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]).log(), torch.tensor(1.0))
    tensor([[0.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return (eye - beta[..., None, None] * k[..., :, None] * k[..., None, :]) * log_decay.exp()[..., None, :]


def eigenvalues(k: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Of M of every token, [..., K], ascending; real, because M is similar to a symmetric matrix.

    >>> eigenvalues(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]).log(), torch.tensor(2.0))
    tensor([-0.5000,  0.5000])
    """
    root = (log_decay / 2).exp()
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    inner = eye - beta[..., None, None] * k[..., :, None] * k[..., None, :]
    return torch.linalg.eigvalsh(root[..., :, None] * inner * root[..., None, :])


class Spectrum(NamedTuple):
    """What one layer did on some text: at N of its tokens, evenly spaced, the last one included. Tensors on the CPU."""

    tokens: Tensor  # [N], how many were read: all of 1, ..., T up to LOOKS
    eigenvalues: Tensor  # [B, N, H, K]
    largest_stretch: Tensor  # [B, N, H], the spectral norm of M
    carried: Tensor  # [B, N, H], the spectral norm of M_t ... M_1: how much of an early write can be left
    memory_norm: Tensor  # [B, N, H], Frobenius
    timescale: Tensor  # [H, K], tokens until a channel has faded to 1/e, by its mean log decay
    log_decay: Tensor  # [B, T, H, K]
    beta: Tensor  # [B, T, H]


@torch.no_grad()
def spectrum(inputs: RecurrenceInputs) -> Spectrum:
    """Measures what a layer does to its memory; see `layer_inputs`."""
    q, k, v, log_decay, beta = (x.double().cpu() for x in inputs)
    B, T, H, K = k.shape
    at = torch.linspace(0, T - 1, min(T, LOOKS), dtype=torch.float64).round().long()
    looks, carried = set(at.tolist()), []
    product = torch.eye(K, dtype=k.dtype).expand(B, H, K, K)
    for t in range(T):
        product = transition_matrix(k[:, t], log_decay[:, t], beta[:, t]) @ product
        if t in looks:
            carried.append(_norm(product))
    seen = k[:, at], log_decay[:, at], beta[:, at]
    norms = torch.cat(  # a sequence at a time: every token's memory is held
        [trace(*(x[i : i + 1] for x in (q, k, v, log_decay, beta))).written.flatten(-2).norm(dim=-1) for i in range(B)]
    )[:, at]
    timescale = -1 / log_decay.mean((0, 1)).clamp(max=-1e-12)
    stretch = _norm(transition_matrix(*seen))
    return Spectrum(at + 1, eigenvalues(*seen), stretch, torch.stack(carried, 1), norms, timescale, log_decay, beta)


def _norm(M: Tensor) -> Tensor:
    """The spectral norm, by the eigenvalues of M^T M: several times faster than by singular values."""
    return torch.linalg.eigvalsh(M.mT @ M)[..., -1].clamp(min=0).sqrt()


@torch.no_grad()
def layer_inputs(model: KimiLinearForCausalLM, tokens: Tensor) -> dict[int, RecurrenceInputs]:
    """What every delta-rule layer of the model tells its memory about tokens [B, T]: layer -> its recurrence inputs."""
    inputs: dict[int, Tensor] = {}
    watched = delta_rule_layers(model)

    def watch(i: int):
        def note(module, args) -> None:
            inputs[i] = args[0]

        return note

    hooks = [mixer.register_forward_pre_hook(watch(i)) for i, mixer in watched.items()]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return {i: watched[i].recurrence_inputs(x) for i, x in inputs.items()}


def warnings(layer: int, measured: Spectrum, length: int) -> list[str]:
    """What looks unstable or wasted, in sentences.

    length: of the sequences that the model was trained on.
    """
    said = []
    where = f"layer {layer}"
    if not all(x.isfinite().all() for x in measured):
        return [f"{where}: numbers that are not finite"]
    stretch = measured.largest_stretch.max().item()
    if stretch > 1 + CLOSE:
        said.append(
            f"{where}: a transition lengthens vectors by {stretch:.4f}; keys are not of unit length or beta is beyond 2"
        )
    if measured.eigenvalues.min() < -1 - CLOSE:
        said.append(f"{where}: an eigenvalue of {measured.eigenvalues.min():.3f}, below -1")
    half = measured.memory_norm.shape[1] // 2
    early, late = (
        measured.memory_norm[:, half // 2 : half].mean((0, 1)),
        measured.memory_norm[:, half + half // 2 :].mean((0, 1)),
    )
    for head in (late > 2 * early).nonzero().flatten().tolist():
        said.append(
            f"{where}, head {head}: the memory still grows, {early[head]:.2g} to {late[head]:.2g} within the sequence"
        )
    endless = (measured.timescale > 100 * length).double().mean().item()
    if endless > 0.5:
        said.append(f"{where}: {endless:.0%} of the channels hardly ever fade; what is not erased stays")
    if (gone := (measured.timescale < 1).double().mean().item()) > 0.5:
        said.append(f"{where}: {gone:.0%} of the channels forget within a token; they hold nothing")
    if (idle := (measured.beta < 0.01).double().mean().item()) > 0.5:
        said.append(f"{where}: beta is below 0.01 for {idle:.0%} of the tokens; the layer hardly writes")
    return said


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """A point: a contestant learns a task, then its layers are measured on held-out sequences.

    Attributes: training, what is learned; sequences, how many are looked at.
    """

    training: Training
    sequences: int = 4

    def label(self) -> Row:
        label = self.training.label()
        return {name: label[name] for name in ("contestant", "task", "seed")}

    def to_dict(self) -> Row:
        return {"kind": "spectra", "training": self.training.to_dict(), "sequences": self.sequences}

    def prepare(self) -> None:
        check_fields(self, "spectra: ")
        check(self.sequences >= 1, f"spectra: sequences is {self.sequences}; give at least 1")
        self.training.prepare()

    def work(self) -> float:
        return self.training.work()

    def bytes_needed(self) -> int:
        return self.training.bytes_needed()

    def run(self, device: str, progress: Progress, unfinished: Path | None = None) -> Row:
        learned, model = learn(self.training, device, lambda share, word: progress(0.9 * share, word), unfinished)
        model.eval()
        task = self.training.asked[0]
        batch = task.draw(self.sequences, Key("test", TEST_SEED, 0))
        rows, details, said = [], [], []
        for layer, inputs in layer_inputs(model, batch.tokens.to(device)).items():
            measured = spectrum(inputs)
            said += warnings(layer, measured, task.length)
            rows += [
                {"layer": layer, "head": head} | _summary(measured, head) for head in range(measured.beta.shape[2])
            ]
            details.append({"layer": layer, **_details(measured)})
            progress(0.95, f"layer {layer}")
        return {
            "rows": [{**row, "accuracy": learned["rows"][0]["accuracy"]} for row in rows],
            "details": details,
            "warnings": said,
            "curve": learned["curve"],
        }


def _summary(measured: Spectrum, head: int) -> Row:
    values = measured.eigenvalues[:, :, head]
    return {
        "smallest_eigenvalue": round(values.min().item(), 9) + 0.0,
        "negative_share": (values < -1e-6).double().mean().item(),
        "largest_stretch": measured.largest_stretch[:, :, head].max().item(),
        "carried_to_the_end": measured.carried[:, -1, head].mean().item(),
        "memory_norm_at_the_end": measured.memory_norm[:, -1, head].mean().item(),
        "median_timescale": measured.timescale[head].median().item(),
        "shortest_timescale": measured.timescale[head].min().item(),
        "longest_timescale": measured.timescale[head].max().item(),
        "mean_beta": measured.beta[:, :, head].mean().item(),
    }


def _details(measured: Spectrum) -> Row:
    """For the plots: histograms and curves, rounded."""
    edges = torch.linspace(-1, 1, 41, dtype=torch.float64)
    histogram = lambda x, edges: torch.histogram(x.flatten().clamp(edges[0], edges[-1]).contiguous(), edges).hist
    share = lambda x, edges: [round(v, 5) for v in (histogram(x, edges) / x.numel()).tolist()]
    decades = torch.linspace(-6, 3, 37, dtype=torch.float64)  # log10 of -log_decay
    curve = lambda x: [[round(v, 5) for v in head] for head in x.mean(0).T.tolist()]
    return {
        "eigenvalues": share(measured.eigenvalues, edges),
        "beta": share(measured.beta, torch.linspace(0, 2, 41, dtype=torch.float64)),
        "decay": share((-measured.log_decay).clamp(min=1e-6).log10(), decades),
        "timescale": [sorted(round(v, 3) for v in head) for head in measured.timescale.tolist()],
        "memory_norm": curve(measured.memory_norm),
        "carried": curve(measured.carried.clamp(min=1e-12)),
        "tokens": measured.tokens.tolist(),
    }
