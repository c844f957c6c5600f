"""Exhaustive search: every valid action sequence up to a horizon, scored once per shared prefix.

With A actions and horizon H the tree of prefixes has A + A^2 + ... + A^H nodes, where scoring each of the A^H sequences
alone takes H * A^H steps. At 7 actions and 3 bars that is 399 steps and exact; a sampling planner with 512 candidates
(CEM in PETS, arXiv:1805.12114) takes 1,536 per iteration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from masking import HOLD, validate_action_masks
from planner.protocol import PlanningModel, StateT


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Best sequence of each row. Letters: N rows, A actions, H horizon; values are float64 discounted sums."""

    action: torch.Tensor
    """Best first action, int64 [N]."""
    value: torch.Tensor
    """Value of the best sequence, [N]; -inf in a fallback row."""
    sequence: torch.Tensor
    """Best sequence, int64 [N, H]; Hold from column `length` on."""
    length: torch.Tensor
    """Planned steps, int64 [N]: H, fewer where the best sequence terminates, 0 in a fallback row."""
    action_values: torch.Tensor
    """Value of the best sequence that begins with each action, [N, A]; -inf where masked or never finite."""
    fallback: torch.Tensor
    """bool [N]: no sequence has a finite value, so the row holds."""
    non_finite: torch.Tensor
    """Rewards, terminal values and discounted sums that were NaN or infinite and counted as -inf, int64 [N]."""
    nodes: int
    """Imagined steps evaluated, all rows together."""


@dataclass(frozen=True)
class _Level:
    # The valid actions ("edges") out of the n nodes of one depth, ordered by node and then by action.
    num_nodes: int
    node: torch.Tensor  # [K], the node an edge leaves
    action: torch.Tensor  # [K]
    root: torch.Tensor  # [K], the row of the batch it belongs to
    reward: torch.Tensor  # [K], float64
    goes_on: torch.Tensor  # [K] bool; the i-th True leads to node i of the next level


def exhaustive_search(
    model: PlanningModel[StateT], state: StateT, horizon: int, discount: float, *, max_nodes: int = 1_000_000
) -> Plan:
    """Find the best valid action sequence of each row.

    A sequence is worth sum_t discount^t * reward_t + discount^H * value(last state). Where it terminates, nothing
    follows: no further reward and no terminal value. Masks come from every imagined state, so no step of a returned
    sequence is invalid. Every step is the best of its own node; equal values go to the lowest action, Hold first. A
    NaN or infinite number makes every sequence through it worth -inf, at any discount; a row with nothing else holds
    and sets `fallback`.

    Args: model; state of N rows, none terminated; horizon H >= 1 bars; discount in [0, 1]; max_nodes, the largest
        number of imagined steps allowed. The limit is held against the tree without masks, N * (A + ... + A^H), so
        that whether a call is refused depends on shapes and never on the market.
    Raises: ValueError for an argument out of range or a tensor of wrong shape or dtype; InvalidMaskError (a
        ValueError) for masks that are not bool [N, A] with Hold valid.
    """
    if horizon < 1:
        raise ValueError(f"horizon: expected >= 1, was {horizon}")
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount: expected a number in [0, 1], was {discount}")
    with torch.no_grad():
        masks = _root_masks(model.action_masks(state))
        num_rows, num_actions = masks.shape
        _check_budget(num_rows, num_actions, horizon, max_nodes)
        levels, leaf_values = _expand(model, state, masks, horizon)
        action_values, non_finite = _back_up(levels, leaf_values, num_actions, discount)
        value = action_values[0].amax(dim=1)
        fallback = torch.isneginf(value)
        sequence, length = _best_sequences(levels, action_values, fallback, horizon)
    return Plan(
        action=sequence[:, 0].clone(),
        value=value,
        sequence=sequence,
        length=length,
        action_values=action_values[0],
        fallback=fallback,
        non_finite=non_finite,
        nodes=sum(len(level.action) for level in levels),
    )


def _expand(
    model: PlanningModel[StateT], state: StateT, masks: torch.Tensor, horizon: int
) -> tuple[list[_Level], torch.Tensor]:
    # Forward pass, one batched step per depth. Returns the levels and the value of the nodes below the last one.
    roots = torch.arange(masks.shape[0], device=masks.device)
    levels: list[_Level] = []
    while True:
        node, action = masks.nonzero(as_tuple=True)
        state, reward, terminated = model.step(model.take(state, node), action)
        _check_vector("reward", reward, len(node), floating=True)
        _check_vector("terminated", terminated, len(node), floating=False)
        # Below a non-finite reward every sequence is worth -inf already, and its state is not to be trusted.
        goes_on = ~terminated & torch.isfinite(reward)
        # In float64 sums of float32 rewards of like size are exact, so that equal sequences tie in any order.
        levels.append(_Level(masks.shape[0], node, action, roots[node], reward.to(torch.float64), goes_on))
        alive = goes_on.nonzero(as_tuple=True)[0]
        if len(alive) == 0:
            return levels, torch.zeros(0, dtype=torch.float64, device=masks.device)
        state, roots = model.take(state, alive), roots[node[alive]]
        if len(levels) >= horizon:
            values = model.value(state)
            _check_vector("value", values, len(alive), floating=True)
            return levels, values.to(torch.float64)
        masks = _checked_masks(model.action_masks(state), masks.shape[1], len(alive))


def _back_up(
    levels: list[_Level], leaf_values: torch.Tensor, num_actions: int, discount: float
) -> tuple[list[torch.Tensor], torch.Tensor]:
    # Backward pass. Returns the action values [n, A] of every level and the count of non-finite numbers [N].
    num_rows = levels[0].num_nodes
    minus_inf = float("-inf")
    bad_leaves = ~torch.isfinite(leaf_values)
    leaf_roots = levels[-1].root[levels[-1].goes_on]
    non_finite = torch.bincount(leaf_roots[bad_leaves], minlength=num_rows)
    values = leaf_values.masked_fill(bad_leaves, minus_inf)
    action_values: list[torch.Tensor] = []
    for level in reversed(levels):
        # Zero where the sequence ends: nothing follows.
        child = torch.zeros_like(level.reward)
        child[level.goes_on] = values
        # Asked before multiplying: 0 * -inf is NaN.
        lost = torch.isneginf(child)
        total = level.reward + discount * child
        bad = ~lost & ~torch.isfinite(total)
        non_finite += torch.bincount(level.root[bad], minlength=num_rows)
        table = total.new_full((level.num_nodes, num_actions), minus_inf)
        table[level.node, level.action] = total.masked_fill(lost | bad, minus_inf)
        values = table.amax(dim=1)
        action_values.append(table)
    return action_values[::-1], non_finite


def _best_sequences(
    levels: list[_Level], action_values: list[torch.Tensor], fallback: torch.Tensor, horizon: int
) -> tuple[torch.Tensor, torch.Tensor]:
    # Walk down from the roots along the best edges; `row` are the rows still on their way, `node` where they are.
    sequence = torch.full((len(fallback), horizon), HOLD, dtype=torch.int64, device=fallback.device)
    length = torch.zeros(len(fallback), dtype=torch.int64, device=fallback.device)
    row = (~fallback).nonzero(as_tuple=True)[0]
    node = row
    for depth, (level, table) in enumerate(zip(levels, action_values, strict=True)):
        # argmax returns the first of equal values: the lowest action.
        action = table.argmax(dim=1)[node]
        sequence[row, depth] = action
        length[row] = depth + 1
        edge_of = level.node.new_full(table.shape, -1)
        edge_of[level.node, level.action] = torch.arange(len(level.node), device=fallback.device)
        edge = edge_of[node, action]
        next_node = level.goes_on.cumsum(dim=0) - 1
        goes_on = level.goes_on[edge]
        row, node = row[goes_on], next_node[edge[goes_on]]
    return sequence, length


def _check_budget(num_rows: int, num_actions: int, horizon: int, max_nodes: int) -> None:
    nodes, width = 0, num_rows
    for depth in range(1, horizon + 1):
        width *= num_actions
        nodes += width
        # Stops at the first depth over the limit: A^H itself may have millions of digits.
        if nodes > max_nodes:
            raise ValueError(
                f"max_nodes: expected >= {nodes} for {num_rows} rows, {num_actions} actions and {depth} of "
                f"{horizon} steps, was {max_nodes}"
            )


def _root_masks(masks: torch.Tensor) -> torch.Tensor:
    # At least one action, so that an empty table is reported as a wrong shape.
    _checked_masks(masks, max((1, *masks.shape[-1:])), None)
    if len(masks) == 0:
        raise ValueError("state: expected at least one row, was 0")
    return masks


def _checked_masks(masks: torch.Tensor, num_actions: int, batch: int | None) -> torch.Tensor:
    validate_action_masks(masks, num_actions=num_actions, batch=batch)
    return masks


def _check_vector(name: str, vector: torch.Tensor, length: int, *, floating: bool) -> None:
    if vector.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}], was {list(vector.shape)}")
    if not (vector.is_floating_point() if floating else vector.dtype == torch.bool):
        raise ValueError(f"{name}: expected dtype {'floating' if floating else 'bool'}, was {vector.dtype}")
