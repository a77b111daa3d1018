"""The fleet that these tests ask, and its tenants' keys."""

import hashlib
import http.client
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from reconciler.spec import Fleet
from tests.gateway.nginx import Nginx, free_port
from tests.gateway.recorder import Got, Recorder
from tests.unit.build import fleet, model_record

CHAT = "/v1/chat/completions"
# Every character that means something to NGINX, JavaScript, JSON, YAML, a shell or an address.
NAMES = [
    *("org/Tiny-8B", 'a"b', "a'b", "a\\b", "\\", "$uri", "${x}", "`id`", "</script>", "a;b", "}"),
    *("*/", "//", "é", "日本語", "🙂", "__proto__", "constructor", "hasOwnProperty", "a b", "?x"),
    *("@GENERATION@", "@LISTEN@", "%s", "%2e", "{0}", "\\u0000", "\\n", "null", "tiny;", "Tiny"),
]
# alice may use all, bob only big, carol's tokens of the day are used up.
KEYS = {"alice": "key-of-alice", "bob": "key-of-bob", "carol": "key-of-carol"}
MAY_USE = {"bob": ["big"]}


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def tenants(**changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tenants' records, with changes by name."""
    return [
        {
            "name": name,
            "key_sha256": [digest(key)],
            **({"models": MAY_USE[name]} if name in MAY_USE else {}),
            **changes.get(name, {}),
        }
        for name, key in KEYS.items()
    ]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, its body read as JSON if it has one."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def code(self) -> str | None:
        """The error's code; an error of any other shape than OpenAI's is a mistake."""
        if self.status < 400:
            return None
        error = self.body["error"]
        assert self.body == {"error": error}
        assert set(error) == {"message", "type", "param", "code"}, error
        assert self.headers["Content-Type"] == "application/json"
        return str(error["code"])


@dataclass(slots=True)
class Front:
    """A gateway for a fleet: tiny and big are ready, cold starts, off has no replicas."""

    nginx: Nginx
    replicas: Recorder
    port: int = field(default_factory=free_port)

    def fleet(self, gateway: Mapping[str, Any] | None = None, **keys: Any) -> Fleet:
        sizes = {"body_max": "1m", "upload_max": "2m"}
        whole = {"hosts": [{"name": "gateway"}], "listen": self.port, **sizes, **(gateway or {})}
        return fleet(
            model_record(served_names=NAMES),
            *(model_record(name=name) for name in ("big", "cold")),
            model_record(name="off", replicas=0),
            **{"gateway": whole, "tenants": tenants(), **keys},
        )

    def change(self, exhausted: Collection[str] = ("carol",), **keys: Any) -> None:
        """Change the spec's keys, as a commit and a cycle would."""
        self.nginx.change(self.fleet(**keys), self.replicas.targets(), exhausted)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | Mapping[str, Any] | None = None,
        *,
        key: str | None = KEYS["alice"],
        **headers: str,
    ) -> Answer:
        """Send one request on a connection of its own; a mapping is sent as JSON.

        In the names of `headers` an underscore is a hyphen.
        """
        data = json.dumps(body).encode() if isinstance(body, Mapping) else body
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **sent})
            answer = connection.getresponse()
            text = answer.read()
            body = json.loads(text) if text else None
            return Answer(answer.status, dict(answer.getheaders()), body)
        finally:
            connection.close()

    def passed(self, *args: Any, **keys: Any) -> Got:
        """Send a request that must reach one replica; return what came there."""
        before = len(self.replicas.got)
        answer = self.ask(*args, **keys)
        assert answer.status == 200, answer
        [got] = self.replicas.got[before:]
        return got

    def refused(self, *args: Any, **keys: Any) -> tuple[int, str | None]:
        """Send a request that must reach no replica; return status and code of the answer."""
        before = len(self.replicas.got)
        answer = self.ask(*args, **keys)
        assert self.replicas.got[before:] == []
        return answer.status, answer.code
