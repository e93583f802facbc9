"""Damage for hypothesis to do: to what JSON holds, and to bytes."""

from __future__ import annotations

import copy
import math
from typing import Any

from hypothesis import strategies as st

_ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    10**9,
    10**400,
    0.5,
    math.nan,
    math.inf,
    "",
    "a",
    "\ud800",
    [],
    {},
]
JUNK = st.recursive(
    st.sampled_from(_ODD) | st.integers() | st.floats() | st.text(max_size=8),
    lambda some: (
        st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated_values(draw: st.DrawFn, values: Any) -> Any:
    """Replace, take out or repeat one to three parts of what JSON can hold."""
    root = [copy.deepcopy(values)]
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = root
        key: Any = 0
        # Down from the root, so that what is small is hit as often as what is large.
        while isinstance(holder[key], list | dict) and holder[key] and draw(st.integers(0, 4)):
            holder = holder[key]
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            key = draw(st.sampled_from(keys))
        action = draw(st.sampled_from(["replace", "replace", "take out", "repeat"]))
        if action == "replace" or holder is root:
            holder[key] = draw(JUNK)
        elif action == "take out":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[f"{key}s"] = copy.deepcopy(holder[key])
    return root[0]


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes, most: int | None = None) -> bytes:
    """Change, insert, take out or cut one to four bytes among the first ``most``."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(min(most or len(changed), len(changed)) - 1, 0)))
        action = draw(st.sampled_from(["flip", "set", "insert", "take out", "cut"]))
        if action == "flip":
            changed[place : place + 1] = bytes(
                byte ^ (1 << draw(st.integers(0, 7))) for byte in changed[place : place + 1]
            )
        elif action == "set":
            changed[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif action == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif action == "take out":
            del changed[place : place + draw(st.integers(1, 8))]
        elif draw(st.booleans()):  # not often: little else can happen to what is short
            del changed[place:]
    return bytes(changed)
