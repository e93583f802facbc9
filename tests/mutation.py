"""Strategies of hypothesis that damage JSON values and bytes."""

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
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated_values(draw: st.DrawFn, values: Any) -> Any:
    """Replace, remove or repeat one to three parts of a JSON value."""
    root = [copy.deepcopy(values)]
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = root
        key: Any = 0
        # Descends from the root, so that small parts are hit as often as large ones.
        while isinstance(holder[key], list | dict) and holder[key] and draw(st.integers(0, 4)):
            holder = holder[key]
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            key = draw(st.sampled_from(keys))
        action = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if action == "replace" or holder is root:
            holder[key] = draw(JUNK)
        elif action == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[f"{key}s"] = copy.deepcopy(holder[key])
    return root[0]


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes, most: int | None = None) -> bytes:
    """Change, insert, remove or cut off one to four bytes among the first ``most``."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.integers(0, max(min(most or len(changed), len(changed)) - 1, 0)))
        action = draw(st.sampled_from(["flip", "set", "insert", "remove", "cut"]))
        if action == "flip":
            changed[offset : offset + 1] = bytes(
                byte ^ (1 << draw(st.integers(0, 7))) for byte in changed[offset : offset + 1]
            )
        elif action == "set":
            changed[offset : offset + 1] = bytes([draw(st.integers(0, 255))])
        elif action == "insert":
            changed[offset:offset] = draw(st.binary(min_size=1, max_size=8))
        elif action == "remove":
            del changed[offset : offset + draw(st.integers(1, 8))]
        elif draw(st.booleans()):  # rarely: short data leaves little else to change
            del changed[offset:]
    return bytes(changed)
