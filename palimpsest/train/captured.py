"""Forward and backward of a part of a step as one CUDA graph: the host launches once where it launched thousands of times."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from palimpsest.train.data import Batch

MOST = 4  # shapes captured; each holds its activations
BORDERS = 64  # cu_seqlens are filled up to a multiple, with empty documents at the end: few shapes


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    weight: Tensor
    loss: Tensor


class CapturedGradients:
    """Adds the gradient of a part's loss to the parameters' `grad`, by replaying what was recorded for its shape.

    Args:
        model: called with tokens, labels and cu_seqlens; its output has a `loss`. It must not wait for the GPU, and its
            parameters' `grad` must be kept between steps: `zero_grad(set_to_none=False)`.
        share: of each part in a step, 1 over their number.

    Raises:
        ValueError: the model is not on a GPU.
    """

    def __init__(self, model: nn.Module, *, share: float = 1.0):
        self.model, self.share = model, share
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        if self.device.type != "cuda":
            raise ValueError(f"a CUDA graph was asked for and the model is on {self.device}; set capture=false there")
        self._graphs: dict[tuple, _Graph] = {}
        self._pool = None

    def __call__(self, part: Batch, *, first: bool) -> Tensor | None:
        """The part's weighted loss.

        Args:
            part: on the host or the device.
            first: whether this is the first part of a step: only then, while gradients are zero, can a shape be recorded.

        Returns:
            A scalar on the device, good until the next call; None if the shape is not recorded and cannot be now.
        """
        borders = None if part.cu_seqlens is None else -(-len(part.cu_seqlens) // BORDERS) * BORDERS
        key = (part.tokens.shape, part.labels is part.tokens, borders)
        if key not in self._graphs:
            if not first or len(self._graphs) == MOST:
                return None
            self._graphs[key] = self._record(part, borders)
        recorded = self._graphs[key]
        _fill(recorded, part)
        recorded.graph.replay()
        return recorded.loss

    def _record(self, part: Batch, borders: int | None) -> _Graph:
        empty = lambda x: torch.empty(x.shape, dtype=x.dtype, device=self.device)
        tokens = empty(part.tokens)
        labels = tokens if part.labels is part.tokens else empty(part.labels)
        cu_seqlens = None
        if borders is not None and part.cu_seqlens is not None:
            cu_seqlens = torch.empty(borders, dtype=part.cu_seqlens.dtype, device=self.device)
        weight = torch.empty((), device=self.device)
        graph = torch.cuda.CUDAGraph()
        inputs = _Graph(graph, tokens, labels, cu_seqlens, weight, weight)
        _fill(inputs, part)
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # what is compiled or allocated once happens here, and leaves no trace
            for _ in range(2):
                self._run(inputs)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        # NCCL's own thread asks for events while this one records: only this one's calls are judged then.
        mode = "thread_local" if dist.is_available() and dist.is_initialized() else "global"
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode):
            loss = self._run(inputs)
        self._pool = self._pool or graph.pool()
        with torch.no_grad():
            torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
            for buffer, before in buffers:
                buffer.copy_(before)
        return inputs._replace(loss=loss)

    def _run(self, inputs: _Graph) -> Tensor:
        loss = self.model(inputs.tokens, labels=inputs.labels, cu_seqlens=inputs.cu_seqlens).loss * inputs.weight
        (loss * self.share).backward()
        return loss.detach()


def _fill(graph: _Graph, part: Batch) -> None:
    graph.tokens.copy_(part.tokens, non_blocking=True)
    if graph.labels is not graph.tokens:
        graph.labels.copy_(part.labels, non_blocking=True)
    if graph.cu_seqlens is not None and part.cu_seqlens is not None:
        graph.cu_seqlens[: len(part.cu_seqlens)].copy_(part.cu_seqlens, non_blocking=True)
        graph.cu_seqlens[len(part.cu_seqlens) :].fill_(part.tokens.shape[1])
    graph.weight.fill_(part.weight)
