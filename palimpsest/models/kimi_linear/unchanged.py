"""Whether a model is still what it was when somebody noted the addresses of its weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Seen(NamedTuple):
    """Where a tensor was found, to see whether it is still there."""

    of: dict
    name: str
    tensor: Tensor
    address: int
    size: int


class Parts(NamedTuple):
    """The modules and tensors of a model, as they were found."""

    modules: list[tuple[dict, str, nn.Module]]
    tensors: list[Seen]
    watched: bool  # by hooks, which may go

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        """What there is now."""
        modules, tensors = [], []
        for parent in model.modules():
            modules += [(parent._modules, name, child) for name, child in parent.named_children()]
            passing = (
                parent._non_persistent_buffers_set
            )  # results, such as a mixture's loads: nobody computes with them
            for found in (parent._parameters, parent._buffers):
                held = {name: t for name, t in found.items() if t is not None and name not in passing}
                tensors += [Seen(found, name, t, t.data_ptr(), t.numel()) for name, t in held.items()]
        return cls(modules, tensors, any(m._forward_hooks or m._forward_pre_hooks for _, _, m in modules))

    def unchanged(self) -> bool:
        """Nothing was replaced, moved, or is watched; numbers may have changed where they lie."""
        if self.watched:
            return False
        for of, name, module in self.modules:
            if of.get(name) is not module or module._forward_hooks or module._forward_pre_hooks:
                return False
        for of, name, tensor, address, size in self.tensors:
            if of.get(name) is not tensor or tensor.data_ptr() != address or tensor.numel() != size:
                return False
        return True

    def linears(self) -> list[nn.Module]:
        """The projections, and what was made of one."""
        return [m for _, _, m in self.modules if isinstance(m, nn.Linear) or type(m).__name__.endswith("Linear")]
