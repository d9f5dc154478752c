"""Whether an experiment is good enough: its scores against the thresholds that its recipe sets beforehand."""

from __future__ import annotations

from typing import Any

from fastflower.recipe.schema import Accept

Row = dict[str, Any]


def check(summary: Row, events: list[Row], accept: Accept) -> list[Row]:
    """A row for each threshold that is set: name, got, n with its interval where there is one, wanted, passed.

    What a threshold asks for and was not measured is None and not passed. Scores are judged by their value; the
    interval says how sure that is.
    """
    fused, rows = summary["fused"], []
    for name, wanted, block in (
        ("clean top-1", accept.clean_min, fused["clean"]),
        ("corrupted top-1", accept.corrupted_min, fused["corrupted"]),
    ):
        if wanted is not None:
            got = block["top1"] if block else None
            known = {key: block[key] if block else None for key in ("n", "top1_low", "top1_high")}
            passed = got is not None and got >= wanted
            rows.append(
                {"name": name, "got": got, **known, "bound": "at least", "wanted": wanted, "passed": passed}
            )
    if accept.macro_drop_max is not None:
        falls = [macro_fall(member, events) for member in summary["members"]]
        known_falls = [fall for fall in falls if fall is not None]
        got = max(known_falls) if known_falls and len(known_falls) == len(falls) else None
        none = {"n": None, "top1_low": None, "top1_high": None}
        passed = got is not None and got <= accept.macro_drop_max
        name, wanted = "fall of macro F1, worst member", accept.macro_drop_max
        rows.append(
            {"name": name, "got": got, **none, "bound": "at most", "wanted": wanted, "passed": passed}
        )
    return rows


def macro_fall(member: Row, events: list[Row]) -> float | None:
    """How far a member's macro F1 lies below the best of its run at the same image size; None: not in the events."""
    keys = ("backbone", "fold", "seed")
    own = [
        row for row in events if row.get("event") == "epoch" and all(row.get(k) == member[k] for k in keys)
    ]
    chosen = next((row for row in own if row["epoch"] == member["epoch"]), None)
    name = f"macro_f1_{member['weights']}"
    if chosen is None or chosen.get(name) is None:
        return None
    course = [
        value
        for row in own
        if row["size"] == chosen["size"]
        for key, value in row.items()
        if key.startswith("macro_f1_") and value is not None
    ]
    return max(course) - float(chosen[name])


def lines(rows: list[Row]) -> list[str]:
    """The rows for the console."""
    return [
        f"{'accepted' if row['passed'] else 'REFUSED '}  {row['name']}: "
        f"{'not measured' if row['got'] is None else format(row['got'], '.4f')}, {row['bound']} {row['wanted']:g}"
        + (f" (95%: {row['top1_low']:.3f}-{row['top1_high']:.3f}, n = {row['n']})" if row["n"] else "")
        for row in rows
    ]
