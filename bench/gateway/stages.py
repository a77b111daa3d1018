"""The four stages: one connection, sixteen, streams, and many requests of about a second."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from bench.gateway.figures import (
    Goal,
    Run,
    Spread,
    added_ms,
    paired,
    rate_ratio,
    spread,
    turns,
    void,
)
from bench.gateway.load import TOKEN, Stream, Ticks, wrk
from bench.gateway.paths import RUN, body

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
SIZES_KIB = (1, 32, 256)
CROWDS = (100, 500, 1000)
# What the paper's own bridge adds, in ms (arXiv's summary in its table).
PAPER_MS = {100: 450, 500: 480, 1000: 520}
# Of the issue that asked for it.
MOST_ADDED_MS = Goal(limit=0.3)
LEAST_OF_NGINX = Goal(limit=0.40, at_least=True)
LEAST_OF_ROUTER = Goal(limit=1.5, at_least=True)
MOST_FIRST_BYTE_MS = Goal(limit=1.0)
MOST_CROWD_MS = Goal(limit=10.0)
