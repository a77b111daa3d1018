"""The JSON of a plan as text for people, made from the JSON only, so they can't disagree."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

# With one of these notes the plan shows no replicas because none could be seen.
_BLIND = {"no listing", "suspicious listing"}
_SIGNS = {"submit": "+", "route": "~", "drain": "-", "cancel": "x"}

Record = Mapping[str, Any]


def plan_text(plan: Record) -> str:
    """Return what would be done and why, and what is held back and why."""
    parts = [_headline(plan)]
    if plan["actions"]:
        parts.append(columns([_action_row(action) for action in plan["actions"]]))
    if plan["notes"]:
        rows = [("", note["subject"], f"{note['kind']}:", _note(note)) for note in plan["notes"]]
        parts.append("Not done now:\n" + columns(rows))
    return "\n\n".join(parts)


def status_text(plan: Record) -> str:
    """Return each model and each replica in a table."""
    models = [("MODEL", "REVISION", "WANTED", "READY")]
    models += [
        (view["name"], view["revision"] or "unknown", str(view["wanted"]), str(view["ready"]))
        for view in plan["models"]
    ]
    replicas: list[tuple[str, ...]] = [
        ("REPLICA", "JOB", "STATUS", "ROUTED", "NODE", "ADDRESS", "DETAIL")
    ]
    replicas += [_replica_row(view) for view in plan["replicas"]]
    parts = [_headline(plan), columns(models)]
    parts.append(columns(replicas) if plan["replicas"] else "No replica is live.")
    held = [note for note in plan["notes"] if note["subject"] not in _names(plan)]
    parts += [f"{note['subject']}: {note['kind']}: {_note(note)}" for note in held]
    return "\n\n".join(parts)


def changes(before: Record | None, after: Record) -> list[str]:
    """Return one line for each replica that does something else than in the plan before.

    A plan made without a listing says nothing of any replica, so it changes nothing.
    """
    if any(note["kind"] in _BLIND for note in after["notes"]):
        return []
    old = {view["job_id"]: view for view in before["replicas"]} if before else {}
    new = {view["job_id"]: view for view in after["replicas"]}
    lines = []
    for job_id, view in new.items():
        was, now = _doing(old.get(job_id)), _doing(view)
        if was != now:
            detail = f" ({_plain(view['detail'])})" if view["detail"] else ""
            arrow = f"{was} -> " if was else ""
            lines.append(f"{replica_name(view['name'])} job {job_id}: {arrow}{now}{detail}")
    gone = [view for job_id, view in old.items() if job_id not in new]
    return lines + [
        f"{replica_name(v['name'])} job {v['job_id']}: {_doing(v)} -> gone" for v in gone
    ]


def waiting_text(plan: Record) -> str:
    """Return in one line what the fleet is not yet."""
    ready = [f"{view['name']} {view['ready']}/{view['wanted']} ready" for view in plan["models"]]
    notes = [f"{note['subject']}: {_note(note)}" for note in plan["notes"]]
    return "; ".join(ready + notes)


def _doing(view: Record | None) -> str:
    if view is None:
        return ""
    return f"{view['status']}, routed" if view["routed"] else str(view["status"])


def replica_name(name: Record) -> str:
    """Return a replica's name as its Slurm job bears it."""
    return f"{name['fleet']}.{name['model']}.{name['revision']}.{name['ordinal']}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns, two spaces apart, without trailing spaces."""
    cells = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _plain(text: str) -> str:
    """Return text without what would move a terminal's cursor: some of it comes from outside."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _headline(plan: Record) -> str:
    kinds = [action["kind"] for action in plan["actions"]]
    counts = [f"{kinds.count(kind)} to {kind}" for kind in _SIGNS if kind in kinds]
    what = ", ".join(counts) if counts else "nothing to do"
    return f"fleet {plan['fleet']}: {what}; {plan['gpus_held']} of {plan['gpus_budget']} GPUs held"


def _action_row(action: Record) -> tuple[str, str, str, str]:
    kind = action["kind"]
    if kind == "submit":
        what = f"{action['reason']} ({_count(action['gpus'], 'GPU')})"
        return (f"  {_SIGNS[kind]}", kind, replica_name(action["name"]), what)
    if kind == "route":
        changes = [f"+{job}" for job in action["added"]] + [f"-{job}" for job in action["removed"]]
        jobs = f", jobs {' '.join(changes)}" if changes else ""
        what = f"{_count(len(action['targets']), 'replica')}{jobs}"
        return (f"  {_SIGNS[kind]}", kind, ", ".join(action["gateways"]), what)
    what = f"{action['reason']} (job {action['job']['id']})"
    return (f"  {_SIGNS[kind]}", kind, replica_name(action["job"]["name"]), what)


def _replica_row(view: Record) -> tuple[str, ...]:
    return (
        replica_name(view["name"]),
        str(view["job_id"]),
        view["status"],
        "yes" if view["routed"] else "no",
        view["node"] or "-",
        view["address"] or "-",
        view["detail"] or ("" if view["current"] else "another revision"),
    )


def _names(plan: Record) -> set[str]:
    return {replica_name(view["name"]) for view in plan["replicas"]}


def _note(note: Record) -> str:
    if note["until"] is None:
        return _plain(note["text"])
    until = datetime.fromtimestamp(note["until"], UTC)
    return f"{_plain(note['text'])}, until {until:%H:%M:%S} UTC"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
