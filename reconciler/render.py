"""The JSON of plans and events as text for people, made from the JSON only: they can't disagree."""

from collections.abc import Mapping, Sequence, Set
from datetime import UTC, datetime
from typing import Any

# With one of these notes the plan shows no replicas because none could be seen.
_BLIND = {"no listing", "suspicious listing", "no keys"}
_SIGNS = {"submit": "+", "route": "~", "drain": "-", "cancel": "x"}
_EVENTS_EXPLAINED = 10

Record = Mapping[str, Any]


def plan_text(plan: Record) -> str:
    """Return what would be done and why, and what is held back and why."""
    parts = [_headline(plan)]
    if plan["actions"]:
        parts.append(columns([_action_row(action) for action in plan["actions"]]))
    if plan["notes"]:
        parts.append(_notes(plan))
    return "\n\n".join(parts)


def status_text(plan: Record) -> str:
    """Return each model and each replica in a table."""
    known = any(view.get("traffic") for view in plan["models"])
    head = ("REQUESTS", "REFUSED", "FIRST BYTE P50/P95/P99") if known else ()
    models = [("MODEL", "REVISION", "WANTED", "READY", *head)]
    for view in plan["models"]:
        counts = (view["revision"] or "unknown", str(view["wanted"]), str(view["ready"]))
        models.append((view["name"], *counts, *(_traffic_row(view["traffic"]) if known else ())))
    parts = [_headline(plan), columns(models), _replicas(plan["replicas"])]
    held = [note for note in plan["notes"] if note["subject"] not in _names(plan)]
    parts += [f"{note['subject']}: {note['kind']}: {_note(note, plan['at'])}" for note in held]
    return "\n\n".join(parts)


def usage_text(record: Record) -> str:
    """Return what was used as a table, its sum last."""
    if not record["rows"]:
        return "Nothing is counted for that: no request, or no log was read yet."
    head = ("DAY (UTC)", "TENANT", "MODEL", "REQUESTS", "ERRORS", "PROMPT", "COMPLETION")
    rows = [
        (row["day"], row["tenant"] or "-", row["model"] or "-", *_usage_row(row))
        for row in record["rows"]
    ]
    total = ("all", "", "", *_usage_row(record["total"]))
    return columns([(*head, "FIRST BYTE P50/P95/P99"), *rows, total])


def _usage_row(row: Record) -> tuple[str, ...]:
    names = ("requests", "errors", "prompt_tokens", "completion_tokens")
    return (*(f"{row[name]:,}" for name in names), _times(row["first_byte_s"]))


def _traffic_row(traffic: Record | None) -> tuple[str, str, str]:
    if traffic is None:
        return ("unknown", "unknown", "unknown")
    return (str(traffic["requests"]), str(traffic["refused"]), _times(traffic["first_byte_s"]))


def _times(seconds: Sequence[float] | None) -> str:
    """Return p50, p95 and p99; two digits are what the histogram knows."""
    return "-" if seconds is None else " / ".join(f"{time:.2g}" for time in seconds) + " s"


def events_text(record: Record) -> str:
    """Return the journal as a table, the latest event last."""
    if not record["events"]:
        return "No events yet: nothing was done for this fleet from this host."
    head = ("TIME (UTC)", "ACTION", "SUBJECT", "REASON", "OUTCOME")
    return columns([head, *map(_event_row, record["events"])])


def images_text(record: Record) -> str:
    """Return the images that must stay, and who names each."""
    rows = [(program, ", ".join(who)) for program, who in record["images"].items()]
    return columns([("IMAGE", "NAMED BY"), *rows])


def explanation(plan: Record, events: Sequence[Record], name: str) -> Record | None:
    """Return the part of plan and journal that is about the model or replica `name`.

    None if neither knows it. What keeps everything from being seen is about each of them.
    """
    model = next((view for view in plan["models"] if view["name"] == name), None)

    def ours(subject: str) -> bool:
        return subject == name or subject.startswith(f"{plan['fleet']}.{name}.")

    replicas = [view for view in plan["replicas"] if ours(replica_name(view["name"]))]
    if model is None and not replicas and not any(ours(event["subject"]) for event in events):
        return None
    jobs = {str(view["job_id"]) for view in replicas}
    told = [event for event in events if ours(event["subject"]) or _routes(event["action"], jobs)]
    return {
        "name": name,
        "at": plan["at"],
        "model": model,
        "replicas": replicas,
        "actions": [a for a in plan["actions"] if ours(_subject(a)) or _routes(a, jobs)],
        "notes": [n for n in plan["notes"] if ours(n["subject"]) or n["kind"] in _BLIND],
        "events": told[-_EVENTS_EXPLAINED:],
    }


def explain_text(record: Record) -> str:
    """Return an `explanation` for people."""
    parts = [record["name"]]
    if model := record["model"]:
        revision = model["revision"] or "unknown"
        counts = f"{model['ready']} of {_count(model['wanted'], 'replica')} ready"
        parts = [f"{model['name']}: {counts}; revision {revision}"]
        if since := model.get("wanted_since"):
            parts[0] += f"\nso many are wanted since {_moment(since, record['at'])}"
        if traffic := model.get("traffic"):
            asked, refused, times = _traffic_row(traffic)
            parts[0] += (
                f"\nlast {traffic['minutes']} minutes: {asked} requests, {refused} of them refused "
                f"for want of a replica; first byte p50/p95/p99: {times}"
            )
    parts.append(_replicas(record["replicas"]))
    if record["actions"]:
        rows = [_action_row(action) for action in record["actions"]]
        parts.append("To be done now:\n" + columns(rows))
    if record["notes"]:
        parts.append(_notes(record))
    parts.append("Last events:\n" + events_text(record) if record["events"] else "No events.")
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


def backend_keys_text(record: Record) -> str:
    """Return the backend keys, oldest first, as a table."""
    if not record["keys"]:
        return "No keys are made yet."
    rows = [
        (key["id"], key["made"], str(key["jobs"]), " ".join(key["gateways"]) or "-")
        for key in record["keys"]
    ]
    return columns([("KEY", "MADE (UTC)", "JOBS", "SHOWN BY"), *rows])


def waiting_text(plan: Record) -> str:
    """Return in one line what the fleet is not yet."""
    ready = [f"{view['name']} {view['ready']}/{view['wanted']} ready" for view in plan["models"]]
    notes = [f"{note['subject']}: {_note(note, plan['at'])}" for note in plan["notes"]]
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


def log_text(text: str) -> str:
    """Return a log's text with its lines and tabs, and nothing else that moves a cursor."""
    return "".join(c if c in "\n\t" else _plain(c) for c in text)


def _plain(text: str) -> str:
    """Return text without what would move a terminal's cursor: some of it comes from outside."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _headline(plan: Record) -> str:
    kinds = [action["kind"] for action in plan["actions"]]
    counts = [f"{kinds.count(kind)} to {kind}" for kind in _SIGNS if kind in kinds]
    what = ", ".join(counts) if counts else "nothing to do"
    return f"fleet {plan['fleet']}: {what}; {plan['gpus_held']} of {plan['gpus_budget']} GPUs held"


def _notes(record: Record) -> str:
    notes, at = record["notes"], record["at"]
    rows = [("", note["subject"], f"{note['kind']}:", _note(note, at)) for note in notes]
    return "Not done now:\n" + columns(rows)


def _action_row(action: Record) -> tuple[str, str, str, str]:
    kind = action["kind"]
    return (f"  {_SIGNS[kind]}", kind, _subject(action), _why(action))


def _subject(action: Record) -> str:
    if action["kind"] == "route":
        return ", ".join(action["gateways"])
    return replica_name(action["name"] if action["kind"] == "submit" else action["job"]["name"])


def _why(action: Record) -> str:
    if action["kind"] == "submit":
        return f"{action['reason']} ({', '.join(_options(action))})"
    if action["kind"] == "route":
        # The journal keeps what changed, not all the targets.
        targets = [_count(len(action["targets"]), "replica")] if "targets" in action else []
        jobs = [f"+{job}" for job in action["added"]] + [f"-{job}" for job in action["removed"]]
        trust = action.get("trust")
        if not jobs and trust:
            return ", ".join([*targets, f"key {trust['key']}"])
        return ", ".join(targets + ([f"jobs {' '.join(jobs)}"] if jobs else []))
    return f"{action['reason']} (job {action['job']['id']})"


def _options(submit: Record) -> list[str]:
    """Return what a reviewer would ask of a submission; journals of older versions have less."""
    options = [_count(submit["gpus"], "GPU")]
    if submit.get("exclude"):
        options.append(f"not on {' '.join(submit['exclude'])}")
    if submit.get("succeeds"):
        options.append(f"succeeds job {submit['succeeds'][0]}")
    return options


def _routes(action: Record | None, jobs: Set[str]) -> bool:
    """Whether an action begins or ends to route one of these jobs."""
    if not action or action.get("kind") != "route":
        return False
    return not jobs.isdisjoint([*action.get("added", ()), *action.get("removed", ())])


def _event_row(event: Record) -> tuple[str, str, str, str, str]:
    at = datetime.fromtimestamp(event["at"], UTC)
    try:
        why = _why(event["action"])
    except (KeyError, TypeError):
        why = event["reason"]  # another version's action may have other fields
    outcome = ": ".join(filter(None, (event["result"], event["detail"])))
    return (f"{at:%Y-%m-%d %H:%M:%S}", event["kind"], event["subject"], why, outcome)


def _replicas(views: Sequence[Record]) -> str:
    if not views:
        return "No replica is live."
    head = ("REPLICA", "JOB", "STATUS", "ROUTED", "NODE", "ADDRESS", "DETAIL")
    return columns([head, *map(_replica_row, views)])


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


def _note(note: Record, at: float) -> str:
    """Return a note's text and until when, with the date if that is another day than `at`."""
    if note["until"] is None:
        return _plain(note["text"])
    return f"{_plain(note['text'])}, until {_moment(note['until'], at)}"


def _moment(time: float, at: float) -> str:
    """Return a time, with its date if that is another day than `at`."""
    then, now = (datetime.fromtimestamp(one, UTC) for one in (time, at))
    return f"{then:%H:%M:%S} UTC" if then.date() == now.date() else f"{then:%Y-%m-%d %H:%M:%S} UTC"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
