"""The official client: each refusal is its own exception, and its retries outlast a cold start."""

import time
from dataclasses import replace
from typing import Any

import openai
import pytest

from tests.gateway.front import KEYS, NAMES, Front


def client(front: Front, key: str = KEYS["alice"], **options: Any) -> openai.OpenAI:
    url = f"http://127.0.0.1:{front.port}/v1"
    return openai.OpenAI(base_url=url, api_key=key, timeout=30, **options)


def say(one: openai.OpenAI, model: str) -> str:
    return one.chat.completions.create(model=model, messages=[]).model


REFUSALS: list[tuple[str, str, type[openai.APIStatusError], str]] = [
    ("nobody", "tiny", openai.AuthenticationError, "invalid_api_key"),
    (KEYS["bob"], "tiny", openai.PermissionDeniedError, "model_not_found"),
    (KEYS["alice"], "none", openai.NotFoundError, "model_not_found"),
    (KEYS["alice"], "", openai.BadRequestError, "model_required"),
    (KEYS["carol"], "tiny", openai.RateLimitError, "insufficient_quota"),
    (KEYS["alice"], "cold", openai.InternalServerError, "model_not_ready"),
]


@pytest.mark.parametrize(("key", "model", "kind", "code"), REFUSALS)
def test_refusal_is_an_exception_of_its_own(
    front: Front, key: str, model: str, kind: type[openai.APIStatusError], code: str
) -> None:
    """With the code that OpenAI gives, and the id by which the request is found in the log."""
    with pytest.raises(kind) as caught:
        say(client(front, key, max_retries=0), model)
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert caught.value.request_id


def test_list_of_models_is_read(front: Front) -> None:
    """All of them, and each by its name."""
    one = client(front)
    assert [model.id for model in one.models.list()] == ["tiny", *NAMES, "big", "cold", "off"]
    assert one.models.retrieve("org/Tiny-8B").id == "org/Tiny-8B"


def test_used_up_tokens_are_not_asked_for_again(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until midnight nothing changes: the client raises at once."""
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it retries"))
    with pytest.raises(openai.RateLimitError):
        say(client(front, KEYS["carol"]), "tiny")


def test_own_retries_carry_a_caller_through_a_cold_start(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits as long as it was told; the model is ready by then; the caller sees nothing."""
    really_sleep = time.sleep
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        if seconds < 1:
            return really_sleep(seconds)
        waits.append(seconds)
        tiny, big = front.replicas.targets()
        cold = replace(tiny, model="cold", job_id=99)
        front.nginx.change(front.fleet(), [tiny, big, cold], ["carol"])
        return None

    monkeypatch.setattr(time, "sleep", sleep)
    assert say(client(front), "cold") == "tiny"  # which stands for it
    assert waits == [15]
