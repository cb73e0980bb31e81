"""The one description of roles, and what is derived from it."""

from __future__ import annotations

from prune_export.arch.roles import OUTPUT_PROJECTIONS, ROLES, role
from prune_export.arch.table import tables
from prune_export.calibrate import LINEAR_GROUPS, OUTPUTS
from prune_export.pruning.rotation import residual_bases


def test_every_role_of_a_family_is_described() -> None:
    used = {row.role for table in tables().values() for row in table.rows()}
    assert {name.removesuffix(".bias") for name in used} == ROLES.keys()


def test_a_bias_has_the_part_of_its_matrix_and_is_none() -> None:
    assert (role("o.bias").part, role("o.bias").writes) == ("attention", True)
    assert role("q.bias").group is role("q.bias").reads is None
    assert role("v.bias").values


def test_what_is_derived() -> None:
    assert {"o", "linear.out", "down", "expert.down", "shared.down"} == OUTPUT_PROJECTIONS
    assert LINEAR_GROUPS["gate_up"] == "mlp.in"
    assert "router" not in LINEAR_GROUPS
    assert OUTPUTS["attention"] == ("o", "o.bias", "linear.out", "linear.out.bias")
    assert residual_bases.READS_BEHIND["router"] == "norm.mlp"
    assert "embed" in residual_bases.WRITES
