"""A server and the clients of the OpenAI API, with a small model."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import openai
import pytest
import torch
import uvicorn

from tests.distributed import TIME_LIMIT
from tests.trainer.export.test_transformers import model_with
from tests.trainer.serve.test_text import tokenizer
from trainer.export.loaded_model import LoadedModel
from trainer.serve.application import LARGEST_BODY, Service, application
from trainer.serve.engine import Engine
from trainer.serve.requests import RequestError
from trainer.serve.sampling import Sampling
from trainer.serve.text import AnswerText
from trainer.telemetry.prometheus import parse

BATCH, QUEUE, WINDOW = 3, 4, 24
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}"
    "{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
)


@dataclass
class Server:
    """A server in a thread of its own."""

    engine: Engine
    service: Service
    address: str
    loaded: LoadedModel

    def client(self, key: str = "secret") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=TIME_LIMIT)

    def complete(self, **settings: Any) -> Any:
        given = {"model": "small", "prompt": "def size", "temperature": 0, "max_tokens": 6} | settings
        return self.client().completions.create(**given)

    def generated(self, prompt: str, tokens: int) -> str:
        """What `generate` continues a prompt with."""
        ids = torch.tensor([tokenizer()(prompt)["input_ids"]])
        made = self.loaded.model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
        return str(tokenizer().decode(made, skip_special_tokens=True))

    def get(self, path: str) -> Any:
        return self.client()._client.get(self.address + path)

    @contextmanager
    def paused(self, step: int) -> Iterator[threading.Event]:
        """The engine waits before this step of its computation, from 1 on, until the event is set, or until the end."""
        go_on, steps = threading.Event(), itertools.count(1)

        def wait(*_: Any) -> None:
            if next(steps) >= step:
                go_on.wait(TIME_LIMIT)

        hook = self.loaded.model.register_forward_pre_hook(wait)
        try:
            yield go_on
        finally:
            go_on.set()
            hook.remove()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    model = model_with(seed=2, vocab_size=270, max_position_embeddings=WINDOW)
    chat = tokenizer()
    chat.bos_token = chat.eos_token = chat.decode([0])
    chat.chat_template = TEMPLATE
    loaded = LoadedModel(Path("small"), model, chat, None)
    engine = Engine(loaded, BATCH, QUEUE)
    service = Service(engine, chat, "small", "secret")
    listener = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(application(service), log_level="warning", timeout_graceful_shutdown=int(TIME_LIMIT))
    http = uvicorn.Server(settings)
    engine.start()
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield Server(engine, service, f"http://127.0.0.1:{listener.getsockname()[1]}", loaded)
    http.should_exit = True
    thread.join(2 * TIME_LIMIT)
    engine.stop()
    assert not thread.is_alive() and not engine.alive


def test_parallel_requests_give_what_generate_gives(server: Server) -> None:
    """Seven at once, where three are computed together: answers are those of `generate` one after the other."""
    prompts = ["def size", "return", "size def return", "d", "\n\n", "return size\n", "e"]
    with ThreadPoolExecutor(len(prompts)) as clients:
        answers = list(clients.map(lambda prompt: server.complete(prompt=prompt, max_tokens=9), prompts))
    assert [answer.choices[0].text for answer in answers] == [server.generated(prompt, 9) for prompt in prompts]
    assert len({answer.choices[0].text for answer in answers}) > 4
    together = server.complete(prompt=prompts[:3], max_tokens=9)
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in answers[:3]]
    lengths = [len(tokenizer()(prompt)["input_ids"]) for prompt in prompts[:3]]
    assert together.usage.prompt_tokens == sum(lengths) and together.usage.completion_tokens == 27


def test_attention_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where transformers has flash attention, for which a model in fp32 is none."""
    from transformers.generation.continuous_batching import continuous_api

    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: True)
    model = model_with(seed=2, vocab_size=270, max_position_embeddings=WINDOW)
    before = model.config._attn_implementation
    engine = Engine(LoadedModel(Path("small"), model, tokenizer(), None), BATCH, QUEUE)
    engine.start()
    try:
        assert model.config._attn_implementation == before == "sdpa"
        assert not any(engine._manager.continuous_batching_config.cuda_graph_booleans)
    finally:
        engine.stop()  # the interpreter would wait for its thread


def test_a_full_queue(server: Server) -> None:
    """Of thirty at once, seven fit; the others are told so, and nothing is left behind.

    They come before the first answer is complete, which would make room for more.
    """

    def status(_: int) -> tuple[int, bool]:
        """The status, and whether it says that the server is overloaded."""
        try:
            server.complete(max_tokens=12)
        except openai.InternalServerError as error:
            body: Any = error.body
            assert (body["type"], body["code"], body["param"]) == ("server_error", "queue_full", None)
            return error.status_code, "overloaded" in error.message and error.response.headers["retry-after"] == "1"
        return 200, False

    fit = BATCH + QUEUE
    with ThreadPoolExecutor(30) as clients, server.paused(1) as go_on:
        asked = [clients.submit(status, number) for number in range(30)]
        refused = [future.result() for future in itertools.islice(as_completed(asked), 30 - fit)]
        assert refused == [(503, True)] * (30 - fit)
        go_on.set()
    assert Counter(future.result() for future in asked) == {(200, False): fit, (503, True): 30 - fit}
    assert (server.engine.running, server.engine.waiting) == (0, 0)
    assert server.complete().choices[0].text == server.generated("def size", 6)


def test_streams(server: Server) -> None:
    with server.paused(2):
        stream = iter(server.complete(stream=True, max_tokens=9, stream_options={"include_usage": True}))
        chunks = [next(stream)]
    chunks += stream
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == server.generated("def size", 9)
    assert len(chunks) > 3 and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 9
    with server.paused(2):
        left = server.complete(stream=True, max_tokens=15)
        next(iter(left))
        left.close()
        deadline = time.monotonic() + TIME_LIMIT
        while server.engine.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (server.engine.running, server.engine.waiting) == (0, 0), "a client that goes away ends its answer"


def test_stop_sequences_and_echo(server: Server) -> None:
    whole = server.generated("def size", 12)
    stop = whole[len(whole) // 2 :][:2]
    cut = server.complete(max_tokens=12, stop=[stop, "never"], echo=True).choices[0]
    assert cut.text == "def size" + whole[: whole.find(stop)] and cut.finish_reason == "stop"
    streamed = server.complete(max_tokens=12, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole[: whole.find(stop)]


def test_seeds(server: Server) -> None:
    """The answer follows from the seed, whatever is computed beside it; top_k=1 and a tiny top_p are greedy."""
    first = server.complete(temperature=1, seed=5, n=3, max_tokens=12)
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert server.complete(temperature=1, seed=6, max_tokens=12).choices[0].text == texts[1]
    for narrow in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"temperature": 1e-40}):
        answer = server.complete(**{"temperature": 1, "seed": 5, "max_tokens": 9} | narrow)
        assert answer.choices[0].text == server.generated("def size", 9)
    assert server.complete(temperature=1, max_tokens=12).choices[0].text != texts[0], "without a seed it is another"


def test_a_top_k_beyond_every_vocabulary(server: Server) -> None:
    """It is that of all tokens, and above all no error in the computation, which would end that of all requests."""
    texts = [server.complete(temperature=1, seed=3, extra_body={"top_k": k}).choices[0].text for k in (0, 2**70)]
    assert texts[0] == texts[1] and server.engine.alive


def test_chat(server: Server) -> None:
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "def"}]}]
    settings: Any = {"model": "small", "messages": messages, "temperature": 0, "max_completion_tokens": 5}
    answer = server.client().chat.completions.create(**settings)
    expected = server.generated("s: be\nu: def\n", 5)
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    chunks = list(server.client().chat.completions.create(**settings, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    del settings["max_completion_tokens"]
    rest = server.client().chat.completions.create(**settings)
    assert rest.usage.total_tokens == WINDOW or rest.choices[0].finish_reason == "stop"
    settings["messages"] = [{"role": "assistant", "content": "hello"}]
    with pytest.raises(openai.BadRequestError, match="no answers"):
        server.client().chat.completions.create(**settings)


def test_null_is_the_default(server: Server) -> None:
    """As in the API; clients that pass on what they were not given send it."""
    nulls: dict[str, Any] = dict.fromkeys(("top_p", "n", "seed", "stop", "stream", "echo", "logprobs", "user"))
    assert server.complete(**nulls).choices[0].text == server.generated("def size", 6)
    assert server.complete(max_tokens=None, temperature=None).usage.completion_tokens <= 16


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "large"}, 404, "model", "model_not_found"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": WINDOW}, 400, "prompt", "context_length_exceeded"),
    ({"temperature": "hot"}, 400, "temperature", "invalid_value"),
    ({"top_p": 0}, 400, "top_p", "invalid_value"),
    ({"stop": ["a"] * 5}, 400, "stop", ""),
    ({"stop": ""}, 400, "stop", ""),
    ({"frequency_penalty": 1}, 400, "frequency_penalty", "invalid_value"),
    ({"logprobs": 3}, 400, "logprobs", "invalid_value"),
    ({"prompt": [[1, 270]]}, 400, "prompt", ""),
    ({"prompt": []}, 400, "prompt", ""),
    ({"extra_body": {"beams": 2}}, 400, "beams", "unknown_parameter"),
    ({"extra_body": {"beams": None}}, 400, "beams", "unknown_parameter"),
    ({"n": BATCH + QUEUE + 1}, 400, None, ""),
]


@pytest.mark.parametrize(("settings", "status", "param", "code"), REFUSED, ids=lambda value: str(value)[:30])
def test_bad_requests(server: Server, settings: dict[str, Any], status: int, param: str | None, code: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        server.complete(**settings)
    body: Any = caught.value.body
    assert (caught.value.status_code, body["param"], body["code"] or "") == (status, param, code)
    assert body["message"] and body["type"] == "invalid_request_error"
    assert (server.engine.running, server.engine.waiting) == (0, 0)


def test_what_is_no_request(server: Server) -> None:
    http = server.client()._client
    headers = {"authorization": "Bearer secret", "content-type": "application/json"}
    bodies = [b"{", b"[]", b'{"model": "small", "prompt": "\\ud800"}']
    bodies += [b'{"\\ud800": 1, "model": "small"}', b"x" * (LARGEST_BODY + 1)]
    answers = [http.post(f"{server.address}/v1/completions", content=body, headers=headers) for body in bodies]
    assert [answer.status_code for answer in answers] == [400, 400, 400, 400, 413]
    assert all(json.loads(answer.text)["error"]["type"] == "invalid_request_error" for answer in answers)
    assert "must be a JSON object" in answers[1].text
    assert server.get("/v2").status_code == 404 and "error" in json.loads(server.get("/v2").text)
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        server.client("wrong").models.list()
    assert [model.id for model in server.client().models.list()] == ["small"]
    assert server.client().models.retrieve("small").id == "small"


def test_too_many_prompts_are_refused_before_they_are_encoded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service, "prompt", None)
    monkeypatch.setattr(server.service, "chat_prompt", None)
    reason = "asks for 8 answers; this server takes at most 7"
    with pytest.raises(openai.BadRequestError, match=reason):
        server.complete(prompt=["def"] * (BATCH + QUEUE + 1))
    chat: list[Any] = [{"role": "user", "content": "def"}]
    with pytest.raises(openai.BadRequestError, match=reason):
        server.client().chat.completions.create(model="small", messages=chat, n=BATCH + QUEUE + 1)


def test_an_unexpected_error_leaves_no_client_waiting(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(AnswerText, "add", lambda *_: 1 // 0)
        with pytest.raises(openai.InternalServerError) as caught:
            server.complete()
    assert caught.value.status_code == 500
    assert server.complete().choices[0].text == server.generated("def size", 6)


def test_a_model_that_has_stopped_leaves_no_client_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one whose request came just after the end."""
    monkeypatch.setattr("trainer.serve.engine._LOOK_SECONDS", 0.01)
    model = model_with(seed=2, vocab_size=270, max_position_embeddings=WINDOW)
    stopped = Engine(LoadedModel(Path("small"), model, tokenizer(), None), BATCH, QUEUE)
    stopped._manager = Mock(is_running=lambda: False)

    async def ask() -> None:
        async for _ in stopped.tokens([1, 2], Sampling(3, 1.0, 0, 1.0, 0)):
            pass

    with pytest.raises(RequestError, match="the model has stopped computing") as caught:
        asyncio.run(asyncio.wait_for(ask(), TIME_LIMIT))
    assert caught.value.status == 503 and stopped.running == 0


def test_health_and_metrics(server: Server) -> None:
    """Only these two need no key, and the page counts what was done."""
    assert server.get("/openapi.json").status_code == 404
    before = parse(server.get("/metrics").text)
    server.complete(max_tokens=5)
    after = parse(server.get("/metrics").text)
    for name, grown in (("new_tokens_total", 5), ("first_text_seconds_count", 1), ("request_seconds_count", 1)):
        assert after[f"unipool_serve_{name}"][0][1] - before[f"unipool_serve_{name}"][0][1] == grown
    done = {tuple(labels.values()): number for labels, number in after["unipool_serve_requests_total"]}
    assert done["/v1/completions", "200"] > 0 and after["unipool_serve_running"] == [({}, 0)]
    assert json.loads(server.get("/health").text) == {"status": "ok"}
