"""The gateway finds the model of a long body without reading all of it, and never another one."""

import json
import os
import random
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.lab.base import CHECKOUT, base, cache, enter

SOURCE = "/opt/modelfleet/src"
LONG = "x" * 5000
# What looks like the end or the start of a body, inside of one.
TRAPS = [
    '", "model": "big", "x": "',
    'a", "model": "big"}',
    '{"model": "big",',
    '\\", "model": "big"}',
    '"}, "model": "big", "stream": true}',
    "\\u006dodel",
    'é"model"',
]
# As a client may write it, which no JSON library does by itself.
BY_HAND = [
    f'{{"model": "tiny", "a": "{LONG}", "model": "big"}}',
    f'{{"model": "tiny", "a": "{LONG}", "model": "big", "b": [{{}}]}}',
    f'{{"model":"big","model":"tiny","a":"{LONG}"}}',
    f'{{"model": "tiny", "a": "{LONG}", "\\u006dodel": "big"}}',
    f'{{"model": "tiny", "a": "{LONG}", "mod\\u0065l": "big", "b": [{{}}]}}',
    f'{{"a": "{LONG}", "model": "big", "mod\\u0065l": "tiny"}}',
    f'{{"a": "{LONG}", "model": "\\u0062ig"}}',
    f'{{"a": "{LONG}", "model": "tiny", "b": {{"model": "big"}}}}',
    f'{{"model": "tiny", "a": "{LONG}", "b": {{"model": "big"}}}}',
    f'{{"b": {{"model": "big"}}, "a": "{LONG}"}}',
    f'{{"a": "{LONG}", "x\\"model": "big"}}',
    f'{{"a": "{LONG}", "model": "nobody"}}',
    f'{{"a": "{LONG}", "model": ""}}',
    f'{{"a": "{LONG}", "model": ["tiny"]}}',
    f'[{{"a": "{LONG}", "model": "tiny"}}]',
    f'{{ "model" : "big" , "a" : "{LONG}" }}\n',
    f'{{"a": "{LONG}", "model": "big"}}\r\n\t ',
]


def expected(body: str) -> list[Any]:
    """Who answers, as an engine's JSON reader understands the body."""
    record = json.loads(body)
    name = record.get("model") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        return [400, "model_required"]
    return [200, name] if name in ("tiny", "big") else [404, "model_not_found"]


def drawn(dice: random.Random) -> str:
    """A body as a client's library writes it: what the keys hold, and in which order, is drawn."""
    record: dict[str, Any] = {
        "model": dice.choice(["tiny", "big"]),
        "prompt": LONG + dice.choice(["", *TRAPS]) + dice.choice(["", *TRAPS]),
        "stream": dice.random() < 0.5,
        "stop": dice.choice(["", "model", *TRAPS]),
        "stream_options": {"include_usage": True},
        "metadata": dice.choice([{}, {"model": "big"}, {"a": {"model": "tiny"}}, {"b": "}"}]),
        "tools": dice.choice([[], [{"model": "big"}], ["model"]]),
        "temperature": -1.5e-3,
    }
    keys = list(record)
    dice.shuffle(keys)
    keys = keys[: dice.randrange(1, len(keys))]
    if "prompt" not in keys:
        keys.append("prompt")
    return json.dumps(
        {key: record[key] for key in keys},
        ensure_ascii=dice.random() < 0.5,
        separators=dice.choice([(",", ":"), (", ", ": ")]),
        indent=dice.choice([None, None, 2]),
    )


def answers(bodies: list[str]) -> list[list[Any]]:
    """Ask the real gateway, in a throw-away copy of the base with a loopback of its own."""
    inside = f"ip link set lo up && exec {SOURCE}/../venv/bin/python -m tests.e2e.answering"
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f"in-base-{os.getpid()}-") as upper:
        argv = enter(
            base(),
            ["unshare", "--net", "sh", "-c", inside],
            upper=Path(upper),
            binds={CHECKOUT: SOURCE},
            cwd=SOURCE,
            env={"PYTHONDONTWRITEBYTECODE": "1"},
        )
        lines = "".join(f"{body.encode().hex()}\n" for body in bodies)
        done = subprocess.run(argv, input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A search that gave up would have written the body there.
    assert "regex" not in done.stderr
    found: list[list[Any]] = json.loads(done.stdout)
    return [
        [status, text if status == 200 else json.loads(text)["error"]["code"]]
        for status, text in found
    ]


def test_long_body_reaches_the_model_that_an_engine_would_read() -> None:
    """Whatever order, escapes, nesting and duplicate keys: routed is what the whole JSON names."""
    dice = random.Random(4)
    bodies = [*BY_HAND, *(drawn(dice) for _ in range(600))]
    wrong = [
        (body.replace(LONG, "..."), answer, expected(body))
        for body, answer in zip(bodies, answers(bodies), strict=True)
        if answer != expected(body)
    ]
    assert wrong == []
