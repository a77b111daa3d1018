"""What the project relies on in an engine, held to by vLLM itself and by its stand-in."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.conftest import (
    FLAGS,
    HOSTS,
    IN_FLIGHT_LIMIT,
    KEYS,
    NAMES,
    PROTECTION,
    SLOTS,
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    Engine,
)
from tests.lab.lab import Lab
from tests.lab.wait import wait_for

Json = dict[str, Any]

SCRAPE = Path(__file__).parents[1] / "fixtures" / "vllm-0.32-metrics.txt"
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
# Tokens of a stream whose end is waited for (5 to 10 s), and of one that is still going, however
# busy the machine is, when the test has done with it (35 s at least).
LONG = 2000
ENDLESS = 15_000
ENGINE_DIED = "EngineCore encountered an issue. See stack trace (above) for the root cause."
SHUT_DOWN = "cannot schedule new futures after shutdown"


def chat(tokens: int, **more: Any) -> Json:
    return {"model": NAMES[0], "messages": MESSAGES, "max_tokens": tokens, **more}


class Stream:
    """An open answer; iterating it gives the payloads of its events."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.lines = answer.iter_lines()

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            assert line == "" or line.startswith("data: "), line
            if line:
                yield line.removeprefix("data: ")


@contextmanager
def streaming(client: httpx.Client, body: Json, path: str = CHAT) -> Iterator[Stream]:
    """A stream of which one event has been read, so that it certainly runs (or waits)."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        yield Stream(answer)


def families(text: str) -> dict[str, Metric]:
    return {f.name: f for f in text_string_to_metric_families(text) if f.name.startswith("vllm:")}


def value(client: httpx.Client, sample: str, **labels: str) -> float:
    """A sample of /metrics, summed over the label sets that have these labels."""
    samples = [s for f in families(client.get("/metrics").text).values() for s in f.samples]
    found = [
        s for s in samples if s.name == f"vllm:{sample}" and labels.items() <= s.labels.items()
    ]
    assert found, sample
    return sum(s.value for s in found)


# What it is


def test_models_lists_every_served_name_in_order(client: httpx.Client) -> None:
    """A probe that finds NAME@JOBID knows which job answers on this host and port."""
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == list(NAMES)
    assert {model["max_model_len"] for model in answer["data"]} == {16384}
    assert {model["root"] for model in answer["data"]} == {"/models/tiny"}


def test_health_is_an_empty_200_and_version_is_the_fixtures(client: httpx.Client) -> None:
    health = client.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert client.get("/version").json() == {"version": "0.32.0"}


def test_a_separate_engine_process_belongs_to_the_api_process(engine: Engine) -> None:
    """All are of the group of the process that was started: a signal to the group hits both."""
    api, core = engine.api(), engine.core()
    assert core.parent == api.pid
    assert {api.group, core.group} == {engine.session}


def test_a_taken_port_ends_the_start_with_an_error(
    engine: Engine, command: Callable[[str], list[str]], lab: Lab
) -> None:
    """A second job that chose the same port fails, instead of sharing it silently."""
    argv = [*command(engine.kind), "--port", str(engine.port), *FLAGS, *PROTECTION]
    done = lab.run(HOSTS[engine.kind], argv, check=False, timeout=START_TIMEOUT_S)
    assert done.returncode == 1
    assert "Address already in use" in done.stderr


# To whom it answers


@pytest.mark.parametrize("key", KEYS)
def test_any_of_its_keys_is_taken(engine: Engine, key: str) -> None:
    """Two at a time, so that a rotation has an overlap."""
    with engine.client(key) as client:
        assert client.post(CHAT, json=chat(1)).status_code == 200


@pytest.mark.parametrize("key", [None, "wrong", ""])
def test_without_a_key_nothing_below_v1_is_answered(engine: Engine, key: str | None) -> None:
    """Whatever the path; what else it serves is open to all who reach the port."""
    with engine.client(key) as client:
        refused = [client.post(path, json=chat(1)) for path in (CHAT, COMPLETION, "/v1/nothing")]
        refused.append(client.get("/v1/models"))
        assert {answer.status_code for answer in refused} == {401}
        assert {answer.text for answer in refused} == {'{"error":"Unauthorized"}'}
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200


def test_without_tls_nothing_is_answered(engine: Engine) -> None:
    """A client that speaks plain HTTP gets no answer at all."""
    plain = engine.url.replace("https:", "http:")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{plain}/health", trust_env=False)


def test_R36_keys_are_in_no_log_and_no_argument(engine: Engine) -> None:
    """vLLM writes down which arguments it was given, but for these."""
    said = engine.log.read_text() + str(engine.processes())
    assert "engine.yaml" in said
    assert not any(key in said for key in KEYS)


# What it answers


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_ends_with_its_last_token_and_counts_them(client: httpx.Client, name: str) -> None:
    """Any served name is accepted; the first one is what the answer says."""
    answer = client.post(CHAT, json={**chat(3), "model": name}).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == NAMES[0]
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
    total = answer["usage"]["prompt_tokens"] + 3
    assert answer["usage"]["total_tokens"] == total


def test_a_completion_has_sixteen_tokens_unless_told_otherwise(client: httpx.Client) -> None:
    answer = client.post(COMPLETION, json={"model": NAMES[0], "prompt": "hello"}).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 16


def test_a_chat_stream_is_role_tokens_usage_done(client: httpx.Client) -> None:
    body = chat(4, stream_options={"include_usage": True})
    with streaming(client, body) as stream:
        assert stream.answer.headers["content-type"].startswith("text/event-stream")
        *events, done = stream
    assert done == "[DONE]"
    first, *tokens, last = map(json.loads, events)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {event["object"] for event in (first, *tokens, last)} == {"chat.completion.chunk"}
    assert all(token["choices"][0]["delta"]["content"] for token in tokens)
    reasons = [token["choices"][0]["finish_reason"] for token in tokens]
    # What a busy machine is late to send, vLLM puts into one event: there may be fewer than tokens.
    *early, end = reasons
    assert (set(early) <= {None}, len(early) <= 3, end) == (True, True, "length")
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["system_fingerprint"]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_usage_is_told_to_who_asks_last_and_changes_nothing_else(
    client: httpx.Client, path: str
) -> None:
    """The gateway adds its question behind a client's; of two keys of one name the last holds.

    Without the event that tells it a stream is what it would have been, but for its fingerprint.
    """
    plain = {**chat(4), "stream": True, "temperature": 0}
    if path == COMPLETION:
        plain = {**plain, "prompt": "hello"}
        del plain["messages"]
    refusing = json.dumps({**plain, "stream_options": {"include_usage": False}})
    asking = refusing.removesuffix("}") + ',"stream_options":{"include_usage":true}}'
    told, untold = (
        [
            json.loads(line.removeprefix("data: "))
            for line in client.post(
                path, content=body, headers={"Content-Type": "application/json"}
            ).text.splitlines()
            if line.startswith("data: {")
        ]
        for body in (asking, refusing)
    )
    *told, last = told
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
    differing = {"id", "created", "system_fingerprint"}
    for event in (*told, *untold):
        for key in differing & event.keys():
            del event[key]
    assert told == untold


def test_a_completion_stream_is_tokens_done(client: httpx.Client) -> None:
    body = {"model": NAMES[0], "prompt": "hello", "max_tokens": 3}
    with streaming(client, body, COMPLETION) as stream:
        *events, done = stream
    assert done == "[DONE]"
    tokens = [json.loads(event) for event in events]
    reasons = [token["choices"][0]["finish_reason"] for token in tokens]
    *early, end = reasons
    assert (set(early) <= {None}, len(early) <= 2, end) == (True, True, "length")
    assert all(token["choices"][0]["text"] for token in tokens)
    assert tokens[-1]["system_fingerprint"]


@pytest.mark.parametrize(
    ("path", "body", "code", "error_type", "param", "message"),
    [
        (
            *(CHAT, chat(1) | {"model": "nope"}, 404, "NotFoundError", "model"),
            "The model `nope` does not exist. Valid aliases: tiny, tiny@4711.",
        ),
        (
            *(CHAT, {"model": "tiny"}, 400, "Bad Request", "body.messages"),
            "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages',"
            " 'msg': 'Field required', 'input': '<dict of 1 items>'}",
        ),
        (
            *(COMPLETION, {"model": "tiny"}, 400, "BadRequestError", "prompt"),
            "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)",
        ),
        (
            *(CHAT, chat(0), 400, "BadRequestError", "max_tokens"),
            "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
        ),
        (
            *(CHAT, chat(99999), 400, "BadRequestError", "max_tokens"),
            "max_tokens=99999 cannot be greater than max_model_len=16384. Please request fewer"
            " output tokens. (parameter=max_tokens, value=99999)",
        ),
        (
            *(
                CHAT,
                chat(1, stream_options={"include_usage": True}),
                400,
                "BadRequestError",
                "stream_options",
            ),
            "Stream options can only be defined when `stream=True`. (parameter=stream_options)",
        ),
    ],
    ids=["unknown-model", "no-messages", "no-prompt", "no-tokens", "too-many-tokens", "options"],
)
def test_a_refusal_says_what_is_wrong(
    client: httpx.Client,
    path: str,
    body: Json,
    code: int,
    error_type: str,
    param: str,
    message: str,
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == code
    error = {"message": message, "type": error_type, "param": param, "code": code}
    assert answer.json() == {"error": error}


def test_a_prompt_beyond_the_context_is_refused(client: httpx.Client) -> None:
    body = {"model": NAMES[0], "prompt": "ba " * 50_000, "max_tokens": 1}
    answer = client.post(COMPLETION, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "BadRequestError"
    assert error["message"].startswith("This model's maximum context length is 16384 tokens.")


def test_broken_json_is_refused(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post(CHAT, content=b"{bad", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "Bad Request"
    assert "json_invalid" in answer.json()["error"]["message"]


def test_an_unknown_path_is_a_404_of_another_form(client: httpx.Client) -> None:
    answer = client.get("/v1/nope")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    assert client.get(CHAT).status_code == 405


# What it counts


def test_metrics_have_the_names_types_and_labels_of_the_recorded_scrape(
    client: httpx.Client,
) -> None:
    """The fixture is what all parsers here are tested with, so it has to stay true."""
    recorded, now = families(SCRAPE.read_text()), families(client.get("/metrics").text)
    assert shapes(now) == shapes(recorded)


def shapes(found: dict[str, Metric]) -> dict[str, tuple[str, set[tuple[str, ...]]]]:
    return {
        name: (family.type, {(s.name, *sorted(s.labels)) for s in family.samples})
        for name, family in found.items()
    }


def test_the_first_served_name_labels_the_metrics(client: httpx.Client) -> None:
    named = [s for f in families(client.get("/metrics").text).values() for s in f.samples]
    assert {s.labels["model_name"] for s in named if "model_name" in s.labels} == {NAMES[0]}


def test_tokens_and_requests_are_counted(client: httpx.Client) -> None:
    def counts() -> tuple[float, float]:
        finished = value(client, "request_success_total", finished_reason="length")
        return value(client, "generation_tokens_total"), finished

    tokens, requests = counts()
    assert client.post(CHAT, json=chat(7)).status_code == 200
    wait_for("the request to be counted", lambda: counts() == (tokens + 7, requests + 1))


def test_more_requests_than_slots_wait_and_more_than_the_limit_get_503(
    client: httpx.Client,
) -> None:
    """The limit counts what runs as well as what waits; whoever leaves makes room."""

    def load() -> tuple[float, float]:
        return value(client, "num_requests_running"), value(client, "num_requests_waiting")

    wait_for("the engine to be idle", lambda: load() == (0, 0))
    rejected = value(client, "admission_rejections_total")
    with ExitStack() as streams:
        for _ in range(IN_FLIGHT_LIMIT):
            streams.enter_context(streaming(client, chat(ENDLESS)))
        full = (SLOTS, IN_FLIGHT_LIMIT - SLOTS)
        wait_for("slots and queue to be full", lambda: load() == full)
        answer = client.post(CHAT, json=chat(1))
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "Service Unavailable"
        assert value(client, "admission_rejections_total") == rejected + 1
    wait_for("those who left to be forgotten", lambda: load() == (0, 0))
    assert client.post(CHAT, json=chat(1)).status_code == 200


# How it ends


def test_term_to_the_started_process_lets_the_stream_in_flight_end(victim: Engine) -> None:
    """Meanwhile /health is 200 and new requests fail: out of the gateway first, and only then TERM.

    Through Apptainer, too: its starter hands the signal to the API process only.
    """
    with victim.client() as client:
        with streaming(client, chat(LONG)) as stream:
            events = iter(stream)
            next(events)
            victim.signal(signal.SIGTERM, victim.session)
            refused = wait_for("a refusal", lambda: refusal(victim))
            assert refused == {"message": SHUT_DOWN, "code": 500} | server_error()
            assert health(victim) == 200
            *_, last, done = events
        assert done == "[DONE]"
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
    assert ended(victim) == 0


def test_term_to_the_whole_group_breaks_the_stream_inside_its_200(victim: Engine) -> None:
    """The engine's process dies of it: never signal a step's processes all at once."""
    with victim.client() as client, streaming(client, chat(ENDLESS)) as stream:
        events = iter(stream)
        next(events)
        victim.signal(signal.SIGTERM, -victim.session)
        *_, last, done = events
    assert json.loads(last) == {"error": {"message": ENGINE_DIED, "code": 500} | server_error()}
    assert done == "[DONE]"
    assert ended(victim) == 0


def test_the_death_of_the_engine_process_ends_the_server_with_0(victim: Engine) -> None:
    """The exit code tells nothing: a replica's end is a failure unless somebody asked for it."""
    with victim.client() as client, streaming(client, chat(ENDLESS)) as stream:
        events = iter(stream)
        next(events)
        victim.signal(signal.SIGKILL, victim.core().pid)
        *_, last, done = events
        assert json.loads(last)["error"]["message"] == ENGINE_DIED
        assert done == "[DONE]"
        wait_for("/health to fail", lambda: health(victim) != 200)
    assert ended(victim) == 0


def server_error() -> Json:
    return {"type": "InternalServerError", "param": None}


def refusal(engine: Engine) -> Json | None:
    """The error that a new request gets, if it gets one.

    On a connection of its own: vLLM closes it after such an answer, without having said so.
    """
    with engine.client() as client:
        answer = client.post(CHAT, json=chat(1))
    return answer.json()["error"] if answer.is_error else None


def health(engine: Engine) -> int | None:
    """The code of /health; None if nobody listens."""
    try:
        with engine.client() as client:
            return client.get("/health").status_code
    except httpx.TransportError:
        return None


def ended(engine: Engine) -> int:
    """The exit code of the started process; nothing that it started is left."""
    try:
        code = engine.started.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still there: {engine.processes()}, {engine.tail()}")
    wait_for("its processes to be gone", lambda: not engine.processes())
    return code
