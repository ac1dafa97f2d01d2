"""What a memory layer is made of, as values: the official layer is the default, the rest is for comparison."""

from dataclasses import asdict, dataclass, fields

from palimpsest.checks import check_fields, shown

CHOICES = {
    "decay": ("channel", "head", "constant", "none"),
    "gate": ("softplus", "sigmoid"),
    "gate_rank": ("low", "full"),
    "output_gate": ("sigmoid", "silu", "none"),
}


@dataclass(frozen=True)
class MixerOptions:
    """The options of a memory layer. The defaults are Kimi Delta Attention as released.

    Attributes:
        decay: one rate per "channel" and token, per "head" and token, a learned "constant" per channel, or "none".
        gate: "softplus" (unbounded, the released weights) or "sigmoid" (bounded below by `floor`).
        floor: the lowest log decay of the sigmoid gate.
        gate_rank: the projection to a channel-wise gate, "low" (through head_dim channels) or "full".
        beta_max: 1.0, or 2.0 to allow negative eigenvalues.
        output_gate: "sigmoid", "silu" or "none".
        conv: a short convolution on q, k and v.
        qk_norm: q and k at unit length.
        num_householder: erase-and-write sub-steps a token of Gated DeltaProduct; other layers have one.

    >>> MixerOptions(decay="head").changes()
    {'decay': 'head'}
    """

    decay: str = "channel"
    gate: str = "softplus"
    floor: float = -5.0
    gate_rank: str = "low"
    beta_max: float = 1.0
    output_gate: str = "sigmoid"
    conv: bool = True
    qk_norm: bool = True
    num_householder: int = 2

    def __post_init__(self):
        check_fields(self)
        if self.num_householder < 1:
            raise ValueError(f"num_householder is {self.num_householder}; a token has at least 1 sub-step")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {shown(getattr(self, name))}; choose one of {', '.join(map(repr, choices))}"
                )
        if not self.floor < 0:
            raise ValueError(f"floor is {self.floor}; a log decay is negative, so give a number below 0, such as -5.0")
        if not 0 < self.beta_max <= 2:
            raise ValueError(f"beta_max is {self.beta_max}; beyond 2 the memory grows without bound: give 1.0 or 2.0")

    def changes(self) -> dict:
        """The options that differ from the released layer."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def to_dict(self) -> dict:
        return asdict(self)


OFFICIAL = MixerOptions()
