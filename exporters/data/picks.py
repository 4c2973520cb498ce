"""Which samples to take where not all are wanted: by arithmetic alone, so that every machine takes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

Group = TypeVar("Group", int, str)


def pick(groups: Sequence[Group], limit: int | None) -> Sequence[int]:
    """Return the indices of at most ``limit`` samples, ascending, evenly from all groups and evenly spaced in each.

    The groups take turns, in sorted order, until ``limit`` is reached; one that is used up is passed over. A last turn
    that does not reach every group goes to evenly spaced ones.

    Args:
        groups: the group of each sample, such as its class.
        limit: at most so many; None takes all.
    """
    if limit is None or limit >= len(groups):
        return range(len(groups))
    members: dict[Group, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    taken = dict.fromkeys(sorted(members), 0)
    left = limit
    while left:
        waiting = [group for group, number in taken.items() if number < len(members[group])]
        turn = [waiting[place] for place in evenly(len(waiting), min(left, len(waiting)))]
        for group in turn:
            taken[group] += 1
        left -= len(turn)
    return sorted(
        members[group][place] for group, number in taken.items() for place in evenly(len(members[group]), number)
    )


def evenly(count: int, wanted: int) -> list[int]:
    """Return ``wanted`` of ``count`` places, at most all, ascending: the middles of equal stretches."""
    return [(2 * place + 1) * count // (2 * wanted) for place in range(wanted)]
