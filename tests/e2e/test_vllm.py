"""The whole system with real vLLM: on the CPU, in a SIF, in a Slurm job, behind NGINX."""

import asyncio
from collections.abc import Iterable, Iterator

import openai
import pytest

from reconciler.hostlist import expand
from tests.lab import Lab
from tests.lab.fleet import Fleet, engine_binds
from tests.lab.load import Load, in_flight
from tests.lab.wait import wait_for

WIDE = "resources: {nodes: 2, gpus: 1"


@pytest.fixture(scope="module")
def vllm_fleet() -> Iterator[Fleet]:
    """One replica of the tiny model by real vLLM, ready and routed."""
    with Lab.start("vllm-e2e", binds=engine_binds("vllm")) as lab:
        fleet = Fleet(lab, "vllm")
        fleet.edit("replicas: 2", "replicas: 1")
        fleet.run("apply", "--wait", "--timeout", "4m")
        yield fleet


def test_real_vllm_answers_through_nginx_by_model_name(vllm_fleet: Fleet) -> None:
    """A chat completion and a stream, by an official client, with both served names."""
    with openai.OpenAI(base_url=f"{vllm_fleet.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="demo/tiny-llama", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
        )
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=8, stream=True)
        endings = [choice.finish_reason for chunk in stream for choice in chunk.choices]
        assert endings[-1] == "length"


def test_real_vllm_drains_by_usr1_with_its_streams_whole(vllm_fleet: Fleet) -> None:
    """USR1 to the batch shell: through Apptainer, only the API process gets the TERM."""
    (replica,) = vllm_fleet.replicas()

    async def go() -> Load:
        async with in_flight(vllm_fleet.url, "tiny", plain=0, streams=4, tokens=1500) as load:
            usr1 = ["scancel", "--batch", "--signal=USR1", str(replica["job_id"])]
            await asyncio.to_thread(vllm_fleet.lab.run, "login", usr1)
        return load

    load = asyncio.run(go())
    assert [(r.done, r.finish, r.error) for r in load.requests] == [(True, "length", "")] * 4


def test_real_vllm_on_two_nodes_serves_drains_and_leaves_nothing(vllm_fleet: Fleet) -> None:
    """Tensor parallel over two hosts: one address; USR1 lets streams end, then no rank is left."""
    ranks = "args: {tensor-parallel-size: 2, dtype: bfloat16"
    vllm_fleet.edit("args: {dtype: bfloat16", ranks)
    # The image has no compiler, and on the CPU this part of vLLM would want one.
    vllm_fleet.edit("resources: {gpus: 1", 'env: {TORCHDYNAMO_DISABLE: "1"}\n    ' + WIDE)
    vllm_fleet.run("apply", "--wait", "--timeout", "4m")
    (replica,) = [replica for replica in vllm_fleet.replicas() if replica["routed"]]
    nodes = expand(replica["node"])
    assert len(nodes) == 2

    async def go() -> Load:
        async with in_flight(vllm_fleet.url, "tiny", plain=0, streams=4, tokens=300) as load:
            usr1 = ["scancel", "--batch", "--signal=USR1", str(replica["job_id"])]
            await asyncio.to_thread(vllm_fleet.lab.run, "login", usr1)
        return load

    load = asyncio.run(go())
    assert [(r.done, r.finish, r.error) for r in load.requests] == [(True, "length", "")] * 4
    wait_for("every process to leave both", lambda: not _processes(vllm_fleet, nodes), timeout_s=60)


def _processes(fleet: Fleet, nodes: Iterable[str]) -> str:
    look = ["pgrep", "-a", "-u", "fleet"]
    return "".join(fleet.lab.run(node, look, user="root", check=False).stdout for node in nodes)
