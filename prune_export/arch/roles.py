"""The roles that tensors have in a model: one line each says all that the package knows of it.

A family's table gives each tensor a role (`q`, `down`, `norm.attn` …). What shares an input, what
reads or writes the residual stream, what belongs to attention: whoever needs to know derives it
from here, so a new role is one line. The bias of a matrix has its role and `.bias`.

`linear.…` is what mixes tokens in a block without attention over all of them (gated delta nets,
Mamba, short convolutions): `linear.in` … and `linear.out` are its projections; a convolution,
decays, step sizes and what makes these from the states (`linear.a`, `linear.ba`, `linear.x` …)
control a recurrence, hold few of the weights, and belong to no group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

Half = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Role:
    """What a tensor of a role does.

    `part` is the half of a block that it belongs to, None outside of both. `group` is the kind of
    linear group (linear layers with one input) of a matrix that methods prune. `reads` is the role
    of the norm behind which it reads the residual states; `writes` says that its outputs are added
    to them. `values` marks what makes attention's values.
    """

    part: Half | None = None
    group: str | None = None
    reads: str | None = None
    writes: bool = False
    values: bool = False


ROLES: Final[Mapping[str, Role]] = {
    "q": Role("attention", "attention.in", reads="norm.attn"),
    "k": Role("attention", "attention.in", reads="norm.attn"),
    "v": Role("attention", "attention.in", reads="norm.attn", values=True),
    "qkv": Role("attention", "attention.in", reads="norm.attn", values=True),
    "q_a": Role("attention", "attention.in", reads="norm.attn"),
    "kv_a": Role("attention", "attention.in", reads="norm.attn"),
    "q_b": Role("attention", "attention.queries"),
    "kv_b": Role("attention", "attention.latent"),
    "o": Role("attention", "attention.out", writes=True),
    "linear.in": Role("attention", "linear.in", reads="norm.attn"),
    "linear.z": Role("attention", "linear.in", reads="norm.attn"),
    "linear.qkv": Role("attention", "linear.in", reads="norm.attn"),
    "linear.qkvz": Role("attention", "linear.in", reads="norm.attn"),
    "linear.out": Role("attention", "linear.out", writes=True),
    "linear.a": Role("attention", reads="norm.attn"),
    "linear.b": Role("attention", reads="norm.attn"),
    "linear.ba": Role("attention", reads="norm.attn"),
    "linear.x": Role("attention"),
    "linear.dt": Role("attention"),
    "linear.conv": Role("attention"),
    "linear.decay": Role("attention"),
    "linear.skip": Role("attention"),
    "linear.step": Role("attention"),
    "gate": Role("mlp", "mlp.in", reads="norm.mlp"),
    "up": Role("mlp", "mlp.in", reads="norm.mlp"),
    "gate_up": Role("mlp", "mlp.in", reads="norm.mlp"),
    "down": Role("mlp", "mlp.out", writes=True),
    "expert.gate": Role("mlp", "experts.in", reads="norm.mlp"),
    "expert.up": Role("mlp", "experts.in", reads="norm.mlp"),
    "expert.in": Role("mlp", "experts.in", reads="norm.mlp"),
    "expert.down": Role("mlp", "experts.out", writes=True),
    "experts.gate_up": Role("mlp", reads="norm.mlp"),
    "experts.down": Role("mlp", writes=True),
    "experts.router": Role("mlp"),
    "experts.router.scale": Role("mlp"),
    "experts.scale": Role("mlp"),
    "norm.mlp.dense": Role("mlp"),
    "norm.experts": Role("mlp"),
    "norm.experts.out": Role("mlp"),
    "shared.gate_up": Role("mlp", "shared.in", reads="norm.mlp"),
    "shared.gate": Role("mlp", "shared.in", reads="norm.mlp"),
    "shared.up": Role("mlp", "shared.in", reads="norm.mlp"),
    "shared.down": Role("mlp", "shared.out", writes=True),
    "shared.router": Role("mlp", reads="norm.mlp"),
    "router": Role("mlp", reads="norm.mlp"),
    "act.alpha_p": Role("mlp"),
    "act.alpha_n": Role("mlp"),
    "buffer.beta": Role("mlp"),
    "buffer.eps": Role("mlp"),
    "buffer.correction": Role("mlp"),
    "buffer.scale": Role(),
    "sinks": Role("attention"),
    "norm.q": Role("attention"),
    "norm.k": Role("attention"),
    "norm.q_a": Role("attention"),
    "norm.kv_a": Role("attention"),
    "norm.linear": Role("attention"),
    "norm.linear.dt": Role("attention"),
    "norm.linear.b": Role("attention"),
    "norm.linear.c": Role("attention"),
    "norm.embed": Role(),
    "norm.attn": Role(),
    "norm.attn.out": Role(),
    "norm.mlp": Role(),
    "norm.mlp.out": Role(),
    "norm.final": Role(),
    "shortcut.attn": Role(),
    "shortcut.mlp": Role(),
    "embed": Role(writes=True),
    "embed.in": Role(),
    "embed.out": Role(),
    "position": Role(),
    "head": Role(reads="norm.final"),
}

_BIAS: Final = ".bias"


def role(name: str) -> Role:
    """What a role means; of a bias, what it has of its matrix. Nothing is known of others."""
    if name in ROLES:
        return ROLES[name]
    own = ROLES.get(name.removesuffix(_BIAS), Role())
    return replace(own, group=None, reads=None)


def roles(which: Callable[[Role], object], *, biases: bool = False) -> tuple[str, ...]:
    """Lists the roles that something is true of, with `biases` those of their biases too."""
    found: list[str] = []
    for name, own in ROLES.items():
        if which(own):
            found += [name, f"{name}{_BIAS}"] if biases and own.part else [name]
    return tuple(found)


def is_expert(name: str) -> bool:
    """Whether a role is of a weight of one expert of a mixture."""
    return name.partition(".")[0] == "expert"


def is_fused(name: str) -> bool:
    """Whether a role is of a tensor that holds all experts of a block, on disk too."""
    return name.partition(".")[0] == "experts"


OUTPUT_PROJECTIONS: Final = frozenset(roles(lambda own: own.writes and own.group))
"""The roles of matrices whose outputs are added to the residual stream: `o`, `down` …"""

STACKED_ALONE: Final = frozenset({"expert.in", "expert.down"})
"""The roles of experts' matrices of which transformers stacks nothing else in one tensor; gates and
ups share one. `expert.in` is that of experts without gate."""

CONTROLS: Final = frozenset(
    name for name, own in ROLES.items() if name.startswith("linear.") and own.part and not own.group
)
"""The roles of what controls a recurrence: rounding it, or adapting it, moves the whole state."""
