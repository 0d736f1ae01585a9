"""The server backend against a server that misbehaves; a real one is in test_real_server.py."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.cli import main
from megatron_longpo.config.backends import BackendConfig, ServerConfig
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends import endpoints
from megatron_longpo.generation.backends.base import BackendError, Completion, Request, Sampling
from megatron_longpo.generation.backends.factory import make_backend
from megatron_longpo.generation.backends.server import ServerBackend
from tests.generation.backends.loopback import Loopback, loopback, refusing_port

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=50)
SECRET = "sk-very-secret-4711"
GOOD = Completion(text="A fine answer.", finished=True)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_WAIT", 0.01)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with loopback() as state:
        yield state


def request(content: str = "Why?", seed: int = 7) -> Request:
    return Request(messages=({"role": "user", "content": content},), sampling=SAMPLING, seed=seed)


def config(folder: str, *urls: str, **changes: Any) -> BackendConfig:
    settings: dict[str, Any] = {"retries": 2, "timeout_seconds": 20.0, **changes}
    server = ServerConfig(endpoints=list(urls), **settings)
    return BackendConfig(model=folder, backend="server", server=server)


def make(folder: str, *urls: str, **changes: Any) -> ServerBackend:
    backend = make_backend(config(folder, *urls, **changes))
    assert isinstance(backend, ServerBackend)
    return backend


def complete(backend: ServerBackend, *requests: Request) -> list[Completion | BackendError]:
    async def run() -> list[Completion | BackendError]:
        try:
            return await backend.complete(requests)
        finally:
            await backend.close()

    return asyncio.run(run())


def ask(backend: ServerBackend) -> Completion | BackendError:
    return complete(backend, request())[0]


def test_chat_requests(model: str, server: Loopback) -> None:
    backend = make(model, server.url, extra_body={"chat_template_kwargs": {"thinking": False}})
    assert backend.context_length == 2048
    assert backend.documents_at_once == 16
    assert complete(backend, request("One?", 1), request("Two?", 2)) == [GOOD, GOOD]
    by_seed = sorted(server.bodies, key=lambda body: body["seed"])
    assert by_seed[0] == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "One?"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 50,
        "seed": 1,
        "chat_template_kwargs": {"thinking": False},
    }
    assert by_seed[1]["seed"] == 2
    assert set(server.paths) == {"/v1/models", "/v1/chat/completions"}
    assert not any("secret" in key for key in server.keys)


def test_completion_requests_send_the_exact_ids(model: str, server: Loopback) -> None:
    backend = make(model, server.url, api="completions")
    content = "A document with <|im_end|> in it.\n\nWhy?"
    assert complete(backend, request(content)) == [GOOD]
    (body,) = server.bodies
    ids = prompt_ids(backend.tokenizer, [{"role": "user", "content": content}])
    assert body["prompt"] == ids
    assert server.paths[-1] == "/v1/completions"


def test_answers_that_were_cut_are_unfinished(model: str, server: Loopback) -> None:
    server.finish_reason = "length"
    assert ask(make(model, server.url)) == Completion(text=GOOD.text, finished=False)
    server.behaviours = ["thinks"]
    assert ask(make(model, server.url)) == Completion(text="", finished=False)


@pytest.mark.parametrize(
    "behaviour", ["500", "503", "408", "garbage", "page", "empty", "strange", "break"]
)
def test_failures_are_tried_again(model: str, server: Loopback, behaviour: str) -> None:
    server.behaviours = [behaviour] * 2
    assert ask(make(model, server.url)) == GOOD
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("500", "server that answered 500, 3 times"),
        ("garbage", "server that sent no valid answer, 3 times"),
        ("page", "server that sent no valid answer, 3 times"),
        ("empty", "server that sent no valid answer, 3 times"),
        ("strange", "server that sent no valid answer, 3 times"),
        ("break", "server that broke the connection off, 3 times"),
        ("400", "server that answered 400"),
        ("422", "server that answered 422"),
    ],
)
def test_a_request_fails_for_good(
    model: str, server: Loopback, behaviour: str, reason: str
) -> None:
    backend = make(model, server.url, concurrency=1)
    server.behaviours = [behaviour] * (3 if "3 times" in reason else 1)

    async def one_after_the_other() -> list[Completion | BackendError]:
        return [*await backend.complete([request()]), *await backend.complete([request()])]

    failed, good = asyncio.run(one_after_the_other())
    assert isinstance(failed, BackendError)
    assert str(failed) == reason
    assert good == GOOD


@pytest.mark.parametrize("behaviour", ["hang", "drip"])
def test_servers_that_hang_are_left(model: str, server: Loopback, behaviour: str) -> None:
    server.always = behaviour
    started = time.monotonic()
    answer = ask(make(model, server.url, timeout_seconds=0.3, retries=1))
    assert str(answer) == "server that did not answer in server.timeout_seconds, 2 times"
    assert 0.6 <= time.monotonic() - started < 5


def test_a_rate_limit_is_kept(model: str, server: Loopback) -> None:
    server.behaviours = ["429 0.2"] * 4  # more often than a failure may happen
    started = time.monotonic()
    assert ask(make(model, server.url)) == GOOD
    assert time.monotonic() - started >= 0.8
    server.always = "429 0.01"
    with pytest.raises(UserError, match=r"no answer for 0.0 minutes \(429: .*the same command"):
        ask(make(model, server.url, outage_minutes=0.002))


def test_concurrency_is_bounded(model: str, server: Loopback) -> None:
    server.seconds = 0.05
    backend = make(model, server.url, concurrency=3)
    assert complete(backend, *[request(str(n), n) for n in range(12)]) == [GOOD] * 12
    assert server.most_at_once == 3


def test_several_endpoints_share_the_work(model: str) -> None:
    with loopback(seconds=0.02) as one, loopback(seconds=0.02) as two:
        backend = make(model, one.url, two.url, concurrency=4)
        assert complete(backend, *[request(str(n), n) for n in range(12)]) == [GOOD] * 12
        assert min(len(one.bodies), len(two.bodies)) >= 4


@pytest.fixture
def dead_url() -> Iterator[str]:
    with refusing_port() as port:
        yield f"http://127.0.0.1:{port}/v1"


def test_a_dead_endpoint_is_left_out(
    model: str, server: Loopback, dead_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = make(model, dead_url, server.url, retries=0)
    told = f"warning: server endpoints not reached, tried later: {dead_url}"
    assert told in capsys.readouterr().err
    assert complete(backend, *[request(str(n), n) for n in range(20)]) == [GOOD] * 20


def test_an_endpoint_that_dies_midway_is_left(model: str, server: Loopback) -> None:
    with loopback() as dying:
        backend = make(model, dying.url, server.url, retries=0)
        server.behaviours = ["500"]  # a failure is no outage, and counts
        dying.die()
        answers = complete(backend, *[request(str(n), n) for n in range(10)])
    assert sum(answer == GOOD for answer in answers) == 9


def test_a_server_that_stays_away_ends_the_run(model: str) -> None:
    with loopback() as dying:
        backend = make(model, dying.url, retries=0, outage_minutes=0.005)
        dying.die()
        started = time.monotonic()
        with pytest.raises(UserError) as caught:
            complete(backend, request(), request())
    assert time.monotonic() - started >= 0.3
    assert str(caught.value).startswith(f"server ({dying.url}): no answer for 0.0 minutes (")
    assert "finished samples are kept, and the same command resumes" in str(caught.value)


def test_requests_that_fail_together_are_one_failure(model: str) -> None:
    with loopback() as dying:
        backend = make(model, dying.url, retries=0, outage_minutes=0.001)
        dying.die()
        with pytest.raises(UserError, match="no answer for"):
            complete(backend, *[request(str(n), n) for n in range(16)])
    # Waits double from a hundredth of a second; sixteen in a row would be a minute.
    assert backend._pool.endpoints[0].num_unreachable < 10


def test_an_endpoint_at_work_is_no_outage(model: str, server: Loopback, dead_url: str) -> None:
    server.seconds = 0.5
    backend = make(model, dead_url, server.url, retries=0, outage_minutes=0.003, concurrency=2)
    assert complete(backend, request("One?"), request("Two?")) == [GOOD, GOOD]


def test_a_server_that_comes_back_is_used(model: str) -> None:
    async def run(backend: ServerBackend) -> list[Completion | BackendError]:
        task = asyncio.create_task(backend.complete([request()]))
        await asyncio.sleep(0.1)
        assert not task.done()
        with loopback() as second:
            for endpoint in backend._pool.endpoints:
                endpoint.client.base_url = second.url
            return await task

    with loopback() as first:
        backend = make(model, first.url, retries=0)
        first.die()
        assert asyncio.run(run(backend)) == [GOOD]


def test_stopping_leaves_nothing_under_way(model: str, server: Loopback) -> None:
    server.always = "hang"
    backend = make(model, server.url)

    async def run() -> int:
        task = asyncio.create_task(backend.complete([request(), request()]))
        await asyncio.sleep(0.2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1


# ---------------------------------------------------------------- before work


def test_no_endpoint_reached(model: str, dead_url: str) -> None:
    other = dead_url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(
        UserError, match=rf"server \({dead_url}: .*; {other}: .*\): cannot be reached"
    ):
        make(model, dead_url, other)


def test_which_model_is_served(model: str, server: Loopback) -> None:
    server.models = ("tiny", "large")
    with pytest.raises(UserError, match=r"server.model \(null\): say which .* \(large, tiny\)"):
        make(model, server.url)
    assert ask(make(model, server.url, model="large")) == GOOD
    assert server.bodies[0]["model"] == "large"


# ---------------------------------------------------------------- the API key


def test_the_key_is_sent_and_never_told(
    model: str,
    server: Loopback,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_KEY", SECRET)
    backend = make(model, server.url, api_key_env="MY_KEY", retries=0)
    server.behaviours = ["500", "400", "401"]
    answers = complete(backend, request()) + complete(make(model, server.url), request())
    assert set(server.keys[:2]) == {f"Bearer {SECRET}"}
    assert SECRET not in server.keys[2]
    backend = make(model, server.url, api_key_env="MY_KEY")
    with pytest.raises(UserError, match=r"refuses the API key \(401: .*Bearer \*\*\*") as caught:
        ask(backend)
    server.always = "401"
    with pytest.raises(UserError, match="check the key in the environment variable MY_KEY") as too:
        make(model, server.url, api_key_env="MY_KEY")
    told = capsys.readouterr()
    assert "the server answered 500: " in told.err
    everything = (*map(str, answers), str(caught.value), str(too.value), told.out, told.err)
    assert not any(SECRET in text for text in (*everything, caplog.text))


def test_generate_without_a_server_is_one_line(
    model: str, tmp_path: Path, dead_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "documents.txt").write_text("Words. " * 500)
    options = [
        f"--model={model}",
        f"--documents={tmp_path / 'documents.txt'}",
        f"--output={tmp_path / 'out.jsonl'}",
        "--backend=server",
        f"--server.endpoints=[{dead_url}]",
    ]
    assert main(["generate", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be reached; start it, or correct server.endpoints" in error
    assert not (tmp_path / "out.jsonl").exists()
