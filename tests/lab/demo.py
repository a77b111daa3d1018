"""The main job, shown step by step: spec, plan, apply, requests, a power cut, and the way back.

python -m tests.lab.demo [--engine vllm|standin] [--keep]
"""

import argparse
import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import openai

from tests.lab import Lab, LabError, base
from tests.lab.fleet import Fleet, engine_binds, gateway_log
from tests.lab.load import Load, Request, in_flight

# Half streams, half plain requests, as the healing step promises at least 20 in flight.
PLAIN, STREAMS = 12, 12
# So many tokens that a request takes some seconds, as the engine's own pace allows.
TOKENS = {"vllm": 400, "standin": 100}


@dataclass
class Show:
    """Prints steps, each with the time since the start."""

    began: float
    step: int = 0

    def title(self, text: str) -> None:
        self.step += 1
        print(f"\n=== {self.step}. {text}  [{self.elapsed()}]", flush=True)

    def say(self, text: str) -> None:
        print(f"    {text}", flush=True)

    def elapsed(self) -> str:
        minutes, seconds = divmod(time.monotonic() - self.began, 60)
        return f"{minutes:.0f}:{seconds:04.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Show the main job on the lab.")
    parser.add_argument("--engine", choices=("vllm", "standin"), default="vllm")
    parser.add_argument("--keep", action="store_true", help="leave the lab up at the end")
    options = parser.parse_args()
    show = Show(time.monotonic())
    # A terminated demo takes its lab down as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _demo(show, options.engine, options.keep)
    except KeyboardInterrupt:
        print("\ninterrupted; the lab is down", file=sys.stderr)
        return 130
    except LabError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    return 0


def _demo(show: Show, engine: str, keep: bool) -> None:
    show.title("The lab's base and the engine's image (built once, then cached)")
    base(say=show.say)
    binds = engine_binds(engine, say=show.say)
    show.title("A real Slurm cluster of six hosts on this machine")
    lab = Lab.start("demo", detached=keep, binds=binds, say=show.say)
    try:
        fleet = Fleet(lab, engine)
        key = _serve(show, lab, fleet)
        _heal(show, lab, fleet, TOKENS[engine], key)
        if keep:
            _explain_how_to_go_on(show, lab, key)
            return
        _take_down(show, fleet)
    except BaseException:
        lab.stop()
        raise
    lab.stop()
    show.say(f"the lab is down; all of it took {show.elapsed()}")


def _serve(show: Show, lab: Lab, fleet: Fleet) -> str:
    """Bring the fleet up and use it; return the key of its one tenant."""
    show.title(f"What is wanted: {fleet.spec}/fleet.yaml")
    print(fleet.spec_file.read_text())
    show.title("fleet tenant add: who may use it; the key is shown once, the spec gets its hash")
    key = fleet.add_tenant("scientist")
    print((fleet.spec_file.parent / "tenants/scientist.yaml").read_text())
    show.title("fleet plan: what would be done, and why")
    _aloud(lab, fleet.command("plan"))
    show.title("fleet apply --wait: PENDING -> RUNNING -> starting -> ready")
    _aloud(lab, fleet.command("apply", "--wait", "--timeout", "10m"))
    show.title("A chat completion and a stream, through NGINX, by model name")
    url = f"{fleet.url}/v1"
    client = openai.OpenAI(base_url=url, api_key=key, timeout=60, max_retries=0)
    answer = client.chat.completions.create(
        model="demo/tiny-llama",
        messages=[{"role": "user", "content": "Say something."}],
        max_tokens=24,
    )
    show.say(f"model {answer.model}: {answer.choices[0].message.content!r}")
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Go on."}],
        max_tokens=24,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    show.say(f"streamed in {len(pieces)} pieces: {''.join(pieces)!r}")
    try:
        client.with_options(api_key="another").models.list()
    except openai.AuthenticationError as error:
        show.say(f"with another key: {error.status_code}, {error.code}")
    show.title("fleet status")
    _aloud(lab, fleet.command("status"))
    return key


def _heal(show: Show, lab: Lab, fleet: Fleet, tokens: int, key: str) -> None:
    victim = fleet.replicas()[0]
    node = str(victim["node"])
    show.title(f"{node} loses its power with {PLAIN + STREAMS} requests in flight")
    show.say("fleet run keeps the fleet as its spec says; its lines follow")
    service = _Service(lab, fleet)
    try:
        load = asyncio.run(_cut_under_load(show, lab, fleet, node, tokens, key))
        _count(show, load, gateway_log(lab), dead=str(victim["address"]))
        began = time.monotonic()
        fleet.wait_until_healed(without=node, say=show.say, timeout_s=300)
        show.say(f"healed {time.monotonic() - began:.1f} s later")
    finally:
        service.stop()
    _aloud(lab, fleet.command("status"))


async def _cut_under_load(
    show: Show, lab: Lab, fleet: Fleet, node: str, tokens: int, key: str
) -> Load:
    async with in_flight(
        fleet.url, "tiny", plain=PLAIN, streams=STREAMS, tokens=tokens, key=key
    ) as load:
        running = sum(1 for request in load.requests if not request.done)
        await asyncio.to_thread(lab.power_cut, node)
        show.say(f"{node} is dead: link cut, then its first process killed; {running} in flight")
    return load


def _count(show: Show, load: Load, log: dict[str, list[str]], *, dead: str) -> None:
    plain, streams = load.of(stream=False), load.of(stream=True)
    slowest = max(request.seconds for request in plain)
    failed = [request for request in plain if not request.succeeded or request.seconds > 30]
    cut = [request for request in streams if not request.succeeded]
    unexplained = [request for request in cut if log.get(request.id, [""])[-1] != dead]
    retried = [request for request in load.requests if len(log.get(request.id, [])) > 1]
    show.say(f"plain requests: {len(plain) - len(failed)} of {len(plain)} succeeded")
    show.say(f"  slowest {slowest:.1f} s; {len(retried)} requests were retried on another replica")
    show.say(f"streams: {len(streams) - len(cut)} of {len(streams)} ran to [DONE]")
    show.say(f"  {len(cut)} had begun on the dead node and ended with it")
    for request in [*failed, *unexplained]:
        show.say(f"  unexpected: {_shown(request)}, via {log.get(request.id)}")
    if failed or unexplained:
        raise LabError(f"{len(failed)} plain requests and {len(unexplained)} streams were lost")


def _shown(request: Request) -> str:
    ending = request.error or request.finish or "no end"
    return f"{request.id}: status {request.status}, {request.seconds:.1f} s, {ending}"


def _take_down(show: Show, fleet: Fleet) -> None:
    show.title("Everything down: replicas: 0 in the spec, then the lab")
    fleet.edit("replicas: 2", "replicas: 0")
    _aloud(fleet.lab, fleet.command("apply", "--wait", "--timeout", "3m"))


def _explain_how_to_go_on(show: Show, lab: Lab, key: str) -> None:
    show.title("The lab stays up")
    url = f"http://{lab.address('gateway')}:8080/v1/models"
    show.say(f"models: curl -H 'Authorization: Bearer {key}' {url}")
    show.say("a shell: .venv/bin/python -m tests.lab exec --name demo login bash")
    show.say("stop:    .venv/bin/python -m tests.lab down --name demo")


class _Service:
    """`fleet run` on the login host, its lines printed as they come."""

    def __init__(self, lab: Lab, fleet: Fleet) -> None:
        self._process = lab.popen(
            "login",
            fleet.command("run", "--interval", "2"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._print, daemon=True)
        self._reader.start()

    def _print(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"    fleet run: {line}", end="", flush=True)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _aloud(lab: Lab, argv: Sequence[str]) -> None:
    """Run a command on the login host and show its output as it comes."""
    print(f"    $ {' '.join(argv)}", flush=True)
    with lab.popen("login", argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"    {line}", end="", flush=True)
    if process.returncode != 0:
        raise LabError(f"{' '.join(argv)} ended with {process.returncode}")


if __name__ == "__main__":
    sys.exit(main())
