"""launch/serve.py as its users meet it: OpenAI's own client, plain HTTP, signals and flags."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import jax
import numpy as np
import openai
import pytest
import tiny_runs
from serving_process import KEY, ServingProcess

import cooper_jax
from cooper_jax.serving.device_loop import DeviceLoop

# A server with two models starts for them; it takes half a minute.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
MESSAGES = [{"role": "system", "content": "You help."}, {"role": "user", "content": "What is 3 plus 10?"}]
ASK = {"model": "policy", "messages": MESSAGES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def shared_server(folder):
    server = ServingProcess(
        folder, serve__max_waiting=8, serve__max_waiting_scores=40, serve__max_body_mb=0.5
    )
    try:
        yield server.wait_until_ready()
    finally:
        server.close()


@pytest.fixture
def server(shared_server):
    yield shared_server
    shared_server.close_clients()


@pytest.fixture
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


# --- chat completions --------------------------------------------------------------------------------------


def test_models_are_listed(server):
    assert [model.id for model in server.client().models.list()] == ["policy", "verifyrm"]
    assert server.client().models.retrieve("policy").owned_by == "cooper-jax"
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gpt")


def test_a_reply_is_that_of_the_python_api(server, folder, one_device):
    """The same seed and settings: the same texts, log-probabilities and ends."""
    sampler = cooper_jax.Sampler.load(folder / "policy" / "hf")
    for settings in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}):
        reply = server.client().chat.completions.create(
            **ASK, n=3, seed=7, max_tokens=12, logprobs=True, **settings
        )
        samples = sampler.chat(MESSAGES, n=3, seed=7, max_new_tokens=12, **settings)
        assert [choice.message.content for choice in reply.choices] == [sample.text for sample in samples]
        ends = ["length" if sample.truncated else "stop" for sample in samples]
        assert [choice.finish_reason for choice in reply.choices] == ends
        assert reply.usage.completion_tokens == sum(len(sample.tokens) for sample in samples)
        if settings == {"temperature": 1.0}:
            for choice, sample in zip(reply.choices, samples, strict=True):
                found = [token.logprob for token in choice.logprobs.content]
                np.testing.assert_allclose(found, sample.logprobs[: len(found)], atol=1e-4)
                assert len(found) == len(sample.tokens) - (not sample.truncated)


def test_a_stream_is_the_reply_in_pieces(server):
    ask = ASK | {"n": 2, "seed": 3, "max_tokens": 40, "logprobs": True}
    whole = server.client().chat.completions.create(**ask)
    texts, tokens, ends, usage = ["", ""], [[], []], [None, None], None
    chunks = list(
        server.client().chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    for found, choice in zip(tokens, whole.choices, strict=True):
        wanted = choice.logprobs.content
        assert [token.token for token in found] == [token.token for token in wanted]
        # The two were decoded beside other rows of the cache.
        np.testing.assert_allclose([t.logprob for t in found], [t.logprob for t in wanted], atol=1e-4)
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert len(chunks) > 8 and len({chunk.id for chunk in chunks}) == 1


def test_a_stop_text_ends_the_reply(server):
    ask = ASK | {"seed": 5, "max_tokens": 60}
    whole = server.client().chat.completions.create(**ask).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    cut = server.client().chat.completions.create(**ask, stop=["never there", stop])
    assert cut.choices[0].message.content == whole.partition(stop)[0] and stop
    assert cut.choices[0].finish_reason == "stop" and cut.usage.completion_tokens < 60
    stream = server.client().chat.completions.create(**ask, stop=stop, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.partition(stop)[0]
    server.wait_for("cooper_slots_busy", 0)


def test_concurrent_requests_do_not_change_each_other(server):
    """Eight at a time on four slots, whole and streamed, each as it is alone."""

    def ask(seed: int, client) -> str:
        request = ASK | {"seed": seed, "max_tokens": 10 + 3 * seed, "temperature": 0.5 + 0.1 * seed}
        if seed % 2:
            return client.chat.completions.create(**request).choices[0].message.content
        stream = client.chat.completions.create(**request, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    client = server.client()
    alone = [ask(seed, client) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda seed: ask(seed, client), range(8)))
    assert together == alone


def test_the_asynchronous_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
            replies = (client.chat.completions.create(**ASK, seed=i, max_tokens=5) for i in range(6))
            return await asyncio.gather(*replies)

    replies = asyncio.run(ask())
    assert len({reply.id for reply in replies}) == 6
    assert all(reply.usage.completion_tokens <= 5 for reply in replies)


def test_a_client_that_goes_frees_its_slots(folder):
    """In the middle of a stream, and while it waits: what it asked for is not sampled to the end."""
    # A segment is one token, so that a reply takes many of them.
    sizes = {"serve__max_new_tokens": 380, "serve__segment": 1, "serve__max_waiting": 8}
    server = ServingProcess(folder, models=("policy",), **sizes).wait_until_ready()
    try:
        streamed, waiting = (ASK | {"n": n, "seed": n, "max_tokens": 380} for n in (4, 8))
        replies = [server.client().chat.completions.create(**ask) for ask in (streamed, waiting)]
        whole = sum(reply.usage.completion_tokens for reply in replies)
        assert whole > 1000, "long enough to be cut off"

        before = server.metric("cooper_sampled_tokens_total")
        stream = server.client().chat.completions.create(**streamed, stream=True)
        next(iter(stream))
        behind = http.client.HTTPConnection(server.address.removeprefix("http://"))
        headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
        behind.request("POST", "/v1/chat/completions", json.dumps(waiting), headers)
        while not server.metric("cooper_replies_waiting"):
            assert server.metric("cooper_slots_busy"), "both have ended"
        behind.close()
        stream.close()
        server.wait_for("cooper_slots_busy", 0)
        server.wait_for("cooper_replies_waiting", 0)
        assert server.metric("cooper_sampled_tokens_total") - before < 0.7 * whole
    finally:
        server.close()


# --- what is refused ---------------------------------------------------------------------------------------


def test_an_over_long_conversation_is_refused(server):
    long = [{"role": "user", "content": "1 2 3 4 " * 100}]
    with pytest.raises(openai.BadRequestError, match="but this server takes 128") as error:
        server.client().chat.completions.create(model="policy", messages=long)
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="above this server's limit of 64 tokens"):
        server.client().chat.completions.create(**ASK, max_tokens=65)


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", "k\u00e9y"])
def test_a_wrong_key_is_refused(server, key):
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    for path in ("/v1/chat/completions", "/v1/score"):
        refused = httpx.post(server.address + path, json=ASK, headers=headers)
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in refused.text
    assert httpx.get(server.url + "/models", headers=headers).status_code == 401
    if key == "wrong":
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key=key).models.list()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff\xfe\x00", "the body is not JSON"),
        (b"[" * 200_000, "the body is not JSON"),
        (b"[]", "not a JSON object"),
        (b"", "the body is not JSON"),
        (json.dumps(ASK | {"temperature": 3}).encode(), "temperature"),
        (b'{"model": "policy", "messages": [{"role": "user", "content": "x"}], "seed": NaN}', "seed"),
    ],
)
def test_a_malformed_request_is_refused(server, body, words):
    refused = server.http().post("/v1/chat/completions", content=body)
    assert refused.status_code == 400 and words in refused.json()["error"]["message"]
    assert server.http().get("/health").json() == {"status": "ok"}


def test_other_models_paths_and_methods_are_refused(server):
    with pytest.raises(openai.NotFoundError, match="the models are policy, verifyrm"):
        server.client().chat.completions.create(**(ASK | {"model": "verifyrm"}))
    http = server.http()
    assert http.post("/v1/score", json={"model": "policy"}).status_code == 404
    assert http.post("/v1/nothing").json()["error"]["message"] == "POST /v1/nothing: Not Found"
    assert http.get("/v1/score").status_code == 405


def test_a_large_body_is_refused(server):
    """By its declared length, and by its bytes where none is declared."""
    large = json.dumps(ASK | {"messages": [{"role": "user", "content": "x" * 600_000}]}).encode()
    pieces = (large[i : i + 50_000] for i in range(0, len(large), 50_000))
    for content in (large, pieces):
        refused = server.http().post("/v1/chat/completions", content=content)
        assert refused.status_code == 413 and "larger than 0.5 MB" in refused.json()["error"]["message"]


def test_a_full_queue_is_refused(server):
    """Twelve replies fit: four slots and eight that wait."""
    with pytest.raises(openai.BadRequestError, match="13 is not from 1 to 12"):
        server.client().chat.completions.create(**ASK, n=13)
    stream = server.client().chat.completions.create(**ASK, n=12, max_tokens=64, stream=True, seed=1)
    with pytest.raises(openai.RateLimitError) as error:
        server.client().chat.completions.create(**ASK, n=12, max_tokens=5)
    assert error.value.code == "queue_full" and error.value.response.headers["Retry-After"] == "1"
    assert sum(bool(chunk.choices and chunk.choices[0].finish_reason) for chunk in stream) == 12
    # The client's own retries succeed.
    assert server.client(max_retries=2).chat.completions.create(**ASK, n=12, max_tokens=5).choices


@contextlib.contextmanager
def slow_uploads(server, path: str, body: bytes, count: int):
    """Connections that have sent the first bytes of a request."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += f"Authorization: Bearer {server.key}\r\n\r\n"
    address = ("127.0.0.1", int(server.address.rpartition(":")[2]))
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(count)
        ]
        for connection in connections:
            connection.sendall(head.encode() + body[:5])
        yield connections


def test_requests_that_still_arrive_are_counted(server):
    """Twelve slow bodies are waited for; a thirteenth request is refused until one of them is there."""
    short = ASK | {"max_tokens": 2}
    body = json.dumps(short).encode()
    with slow_uploads(server, "/v1/chat/completions", body, 12) as slow:
        refused = server.http().post("/v1/chat/completions", json=short)
        # The server may not have read all heads yet.
        while refused.status_code == 200:
            refused = server.http().post("/v1/chat/completions", json=short)
        assert refused.status_code == 429 and "arrive at once" in refused.json()["error"]["message"]
        for connection in slow:
            connection.sendall(body[5:])
        for connection in slow:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert server.http().post("/v1/chat/completions", json=short).status_code == 200

    # Scores that arrive slowly take none of these places.
    with slow_uploads(server, "/v1/score", json.dumps(ROWS).encode(), 20):
        server.http().get("/v1/models")
        assert server.http().post("/v1/chat/completions", json=short).status_code == 200


# --- scores ------------------------------------------------------------------------------------------------

ROWS = {"questions": "What is 3 plus 10?", "references": "13", "completions": ["It is 13.", "14", "13"]}


def test_scores_are_those_of_the_python_api(server, folder, one_device):
    model = cooper_jax.VerifyRM.load(folder / "reward" / "hf", max_tokens=512)
    wanted = model.score([ROWS["questions"]] * 3, ["13"] * 3, ROWS["completions"])
    answer = server.http().post("/v1/score", json=ROWS | {"model": "verifyrm"}).json()
    assert [row["index"] for row in answer["data"]] == [0, 1, 2]
    np.testing.assert_allclose([row["score"] for row in answer["data"]], wanted, atol=1e-6)
    assert len(set(wanted.tolist())) == 3


def test_a_ranking_is_sorted_by_score(server):
    scores = [row["score"] for row in server.http().post("/v1/score", json=ROWS).json()["data"]]
    query = {"query": ROWS["questions"], "reference": "13", "documents": ROWS["completions"]}
    for path in ("/v1/rerank", "/rerank"):
        results = server.http().post(path, json=query | {"top_n": 2}).json()["results"]
        order = sorted(range(3), key=lambda i: -scores[i])[:2]
        assert [row["index"] for row in results] == order
        assert [row["relevance_score"] for row in results] == [scores[i] for i in order]
        assert [row["document"]["text"] for row in results] == [ROWS["completions"][i] for i in order]
    without = server.http().post("/rerank", json=query | {"return_documents": False}).json()["results"]
    assert len(without) == 3 and "document" not in without[0]


def test_scores_that_cannot_be_given_are_refused(server):
    http = server.http()
    long = http.post("/v1/score", json=ROWS | {"references": "9" * 2000})
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
    many = http.post("/v1/score", json=ROWS | {"completions": ["1"] * 41})
    assert many.status_code == 400 and "give from 1 to 40" in many.json()["error"]["message"]


def test_many_rows_are_scored_in_batches(server):
    """As each is scored alone; more than wait at a time are refused, and nothing is lost."""
    texts = [f"The answer is {i}" * (1 + i % 5) for i in range(40)]
    http = server.http()
    together = http.post("/v1/score", json=ROWS | {"completions": texts}).json()["data"]
    for i in (0, 13, 39):
        alone = http.post("/v1/score", json=ROWS | {"completions": texts[i : i + 1]}).json()["data"][0]
        assert alone["score"] == pytest.approx(together[i]["score"], abs=1e-6)


# --- metrics, start and end --------------------------------------------------------------------------------


def test_metrics_are_prometheus_text(server):
    parser = pytest.importorskip("prometheus_client.parser")
    answer = httpx.get(server.address + "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in parser.text_string_to_metric_families(answer.text)}
    assert families["cooper_slots"].samples[0].value == 4
    counted = {tuple(s.labels.values()): s.value for s in families["cooper_requests"].samples}
    assert counted["/v1/chat/completions", "200"] > 0 and counted["/v1/chat/completions", "400"] > 0
    assert families["cooper_first_token_seconds"] and families["cooper_scores"].samples[0].value > 0


def test_sigterm_lets_requests_finish(folder):
    """A stream that has begun ends as it should, new requests are refused, and the exit code is 0."""
    server = ServingProcess(folder, models=("policy",), serve__segment=1, key="").wait_until_ready()
    try:
        stream = iter(server.client(api_key="any").chat.completions.create(**ASK, max_tokens=64, stream=True))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert server.process.wait(60) == 0, server.text
        assert "stopping" in server.text and "stopped" in server.text and "Traceback" not in server.text
        with pytest.raises(openai.APIConnectionError):
            server.client(api_key="any").models.list()
    finally:
        server.close()


def test_requests_that_outlast_the_end_fail(folder):
    """After SIGTERM and `shutdown_timeout`: the last event of a stream is an error, and the exit code is 0."""
    sizes = {"serve__max_new_tokens": 300, "serve__segment": 1, "serve__shutdown_timeout": 0}
    server = ServingProcess(folder, models=("policy",), **sizes).wait_until_ready()
    try:
        stream = server.client().chat.completions.create(**ASK, n=64, max_tokens=300, stream=True)
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        assert server.process.wait(60) == 0, server.text
    finally:
        server.close()


def test_requests_that_take_too_long_fail(folder):
    """After `timeout`: 504, or an error in the stream.  A body that does not come: 408."""
    limits = {"serve__timeout": 0.01, "serve__body_timeout": 0.2, "serve__max_waiting": 400}
    server = ServingProcess(folder, models=("policy",), **limits).wait_until_ready()
    try:
        with pytest.raises(openai.InternalServerError, match="took longer than 0.01 seconds") as error:
            server.client().chat.completions.create(**ASK, n=64, max_tokens=64)
        assert error.value.status_code == 504
        with pytest.raises(openai.APIError, match="took longer than 0.01 seconds"):
            list(server.client().chat.completions.create(**ASK, n=64, max_tokens=64, stream=True))
        server.wait_for("cooper_slots_busy", 0)

        host, _, port = server.address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            connection.sendall(f"{head}Content-Length: 10\r\n\r\n{{".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
    finally:
        server.close()


def test_an_error_of_a_worker_ends_the_devices_thread():
    """Everything that waits is answered with an error, and the server is told."""

    class Worker:
        steps = failures = 0

        def step(self):
            self.steps += 1
            if self.steps == 3:
                raise FloatingPointError("not finite")
            return self.steps == 1

        def fail(self):
            self.failures += 1

    workers, told = [Worker(), Worker()], []
    loop = DeviceLoop(workers, lambda: told.append(True))
    loop.start()
    while not loop.failed:
        loop.wake()
    loop.stop()
    assert told == [True] and [worker.failures for worker in workers] == [1, 1]


def run_refused(*flags: str, **environment: str) -> str:
    """The message of a server that does not start."""
    command = [sys.executable, str(ROOT / "launch/serve.py"), *flags]
    done = subprocess.run(
        command, env=tiny_runs.environment() | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_what_cannot_be_served_is_one_line(server, folder):
    weights = f"--config.policy.weights={folder / 'policy' / 'hf'}"
    assert "there is no model to serve: give --run_dir=RUN" in run_refused("--config.serve.port=0")
    port = server.address.rpartition(":")[2]
    taken = run_refused(weights, f"--config.serve.port={port}")
    assert f"serve.port={port}: Address already in use: choose another" in taken
    wide = run_refused(weights, "--config.serve.host=0.0.0.0", COOPER_API_KEY="")
    assert "other machines reach this server" in wide and "COOPER_API_KEY contains no key" in wide
    long = run_refused(weights, "--config.serve.port=0", "--config.serve.max_new_tokens=600")
    assert "serve.max_prompt_tokens=1024 + serve.max_new_tokens=600" in long
    both = run_refused(weights, "--run_dir=runs/none")
    assert "policy.weights names other weights than those of --run_dir" in both
