"""Seams by hand: what stands before them, and in which order a pass comes by."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from prune_export.calibrate.passes.seams import Step, seams_of, steps
from prune_export.calibrate.streaming.skip import Part, Unit
from tests.arch.tiny_models import arch_of


def found(
    removed: Collection[Unit],
    model_type: str = "llama",
    zero: Collection[tuple[int, Part]] = (),
) -> list[Any]:
    """Of each seam: the block and the kind of its site (or why none), and where its goal is."""
    made = seams_of(
        arch_of(model_type, num_hidden_layers=8), removed, lambda layer, part: (layer, part) in zero
    )
    return [
        (
            (seam.group.layer, seam.group.kind) if seam.group else seam.why,
            (seam.goal.layer, seam.goal.part),
        )
        for seam in made
    ]


def blocks(*layers: int) -> list[Unit]:
    return [Unit(layer) for layer in layers]


def attentions(*layers: int) -> list[Unit]:
    return [Unit(layer, "attention") for layer in layers]


def mlps(*layers: int) -> list[Unit]:
    return [Unit(layer, "mlp") for layer in layers]


NONE = "no projection stands before it"


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        (blocks(3, 4), [((2, "mlp.out"), (4, "block"))]),
        (blocks(1, 3, 4, 7), [((0, "mlp.out"), (1, "block")), ((2, "mlp.out"), (4, "block")),
                              ((6, "mlp.out"), (7, "block"))]),
        (blocks(0, 1), [(NONE, (1, "block"))]),
        (blocks(0, 4), [(NONE, (0, "block")), ((3, "mlp.out"), (4, "block"))]),
        (attentions(3), [((2, "mlp.out"), (3, "attention"))]),
        (attentions(3, 4), [((2, "mlp.out"), (3, "attention")),
                            ((3, "mlp.out"), (4, "attention"))]),
        (attentions(0), [(NONE, (0, "attention"))]),
        (mlps(3, 4), [((3, "attention.out"), (3, "block")), ((4, "attention.out"), (4, "block"))]),
        (mlps(0), [((0, "attention.out"), (0, "block"))]),
        ([], []),
    ],
)  # fmt: skip
def test_the_last_projection_before_a_seam(removed: list[Unit], expected: Any) -> None:
    assert found(removed) == expected


def test_what_is_zero_is_passed_over() -> None:
    assert found(blocks(4), zero={(3, "mlp")}) == [((3, "attention.out"), (4, "block"))]
    assert found(attentions(4), zero={(3, "mlp")}) == [((3, "attention.out"), (4, "attention"))]
    both: set[tuple[int, Part]] = {(3, "mlp"), (3, "attention")}
    assert found(mlps(4), zero={(4, "attention"), *both}) == [((2, "mlp.out"), (4, "block"))]


def test_seams_with_the_same_projection_before_them_are_one() -> None:
    """The attention between two removed blocks adds nothing, and its MLP neither."""
    zero: set[tuple[int, Part]] = {(4, "attention"), (4, "mlp")}
    assert found(blocks(3, 5), zero=zero) == [((2, "mlp.out"), (5, "block"))]


def test_beside_each_other_one_part_makes_good_the_other() -> None:
    for name in ("phi", "gpt_neox"):
        assert found(attentions(3), name) == [((3, "mlp.out"), (3, "block"))]
        assert found(mlps(3), name) == [((3, "attention.out"), (3, "block"))]
        assert found(blocks(3), name) == [((2, "mlp.out"), (3, "block"))]


def test_before_a_seam_with_experts_the_attention_is_refitted() -> None:
    assert found(blocks(3), "mixtral") == [((2, "attention.out"), (3, "block"))]
    zero: set[tuple[int, Part]] = {(2, "attention")}
    assert found(attentions(2, 3), "mixtral") == [
        ((1, "attention.out"), (2, "attention")),
        ("only experts stand before it", (3, "attention")),
    ]  # fmt: skip
    assert found(blocks(3), "mixtral", zero) == [((2, "attention.out"), (3, "block"))]


def test_the_dense_model_goes_ahead_to_the_goal() -> None:
    arch = arch_of("llama", num_hidden_layers=8)
    made = seams_of(arch, blocks(2, 3, 5), lambda *_: False)
    assert steps(8, {2, 3, 5}, made, 1) == [
        Step(0, dense=True),
        Step(1, dense=True, forks=True), Step(2, dense=True), Step(3, dense=True),
        Step(1, edited=True, mends=made[0]),
        Step(4, dense=True), Step(5, dense=True), Step(4, edited=True, mends=made[1]),
        Step(6, edited=True), Step(7, edited=True),
    ]  # fmt: skip


def test_between_seams_both_models_share_a_load() -> None:
    made = seams_of(arch_of("llama", num_hidden_layers=8), blocks(0, 6), lambda *_: False)
    assert steps(8, {0, 6}, [seam for seam in made if seam.group], 0) == [
        Step(1, edited=True, forks=True), *(Step(layer, edited=True) for layer in (2, 3, 4)),
        *(Step(layer, dense=True) for layer in range(7)),
        Step(5, edited=True, mends=made[1]), Step(7, edited=True),
    ]  # fmt: skip
