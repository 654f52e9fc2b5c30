"""sample.py --serve: OpenAI's API as its own client sees it, and what must not bring it down."""

import base64
import contextlib
import functools
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from conftest import BYTE, CHAT, ROOT, render_chat, turn
from test_sample_chat import save

import data.server
import data.service
import lora
import mnist
import model as lm
import sample
from data.cli import UserError
from data.rows import load_data

openai = pytest.importorskip("openai", reason="the openai package is not installed")
pytestmark = pytest.mark.usefixtures("elsewhere")  # an empty folder, in which out/ would be

INNS = '[{"name": "Inn", "price": 500}]'
CALLED = turn("call", 'search {"name": "Inn"}')
TALK = [turn("user", "find an inn"), CALLED, turn("tool", INNS), turn("assistant", "Inn: 500")]
HELLO, GREETING, SAYING = [turn("user", "hello")], "hi 你好，请坐。", "学而时习之，不亦说乎？"
LONG = {"prompt": "it", "max_tokens": 300, "temperature": 0, "model": "tiny"}


def search(name: str = ""):
    return [{"name": name, "price": 500}]


search.needs_no_schema = True  # as data/hotel.py's: the model knows it by training


def trained(rows, steps=70, context=320):
    """A model that says rows [(ids, mask)] by heart, in about a second."""
    torch.manual_seed(0)
    shape = dict(vocab_size=320, context=context, n_layer=2, n_head=2, d_model=32)
    model = lm.Transformer(lm.Config(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    goals = [torch.tensor([i if m else -100 for i, m in zip(*row)][1:]) for row in rows]
    for _ in range(steps):
        for (ids, _), goal in zip(rows, goals):
            torch.nn.functional.cross_entropy(model(torch.tensor([ids]))[0, :-1], goal).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


class Serving:
    """A service in threads of this process: with it, `port`, and OpenAI's chat() and write()."""

    def __init__(self, model, tokenizer, tools=None, **defaults):
        args = sample.build_parser().parse_args(["--slots", "4", "--temperature", "0.8"])
        where = Path("out/tiny/best.pt")
        self.model, self.service = model, sample.make_service(model, tokenizer, where, args, tools)
        self.scheduler, self.engine = self.service.api.scheduler, self.service.api.scheduler.engine
        self.server = data.server.Server(("127.0.0.1", 0), self.service)
        self.port = self.server.server_port
        self.client, defaults = client(self.port), {"model": "tiny"} | defaults
        # without tools unless a test names some: else the model is told of the server's
        self.chat = functools.partial(self.client.chat.completions.create, tools=[], **defaults)
        self.write = functools.partial(self.client.completions.create, **defaults)

    def __enter__(self):
        for target in self.scheduler.run, lambda: self.server.serve_forever(0.02):
            threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.scheduler.close(0)
        self.server.shutdown()
        self.server.server_close()


def client(port, key="none"):
    url = f"http://127.0.0.1:{port}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def chat():
    """A chat model that searches for an inn and greets in Chinese."""
    rows = [render_chat(t, CHAT) for t in (TALK, [*HELLO, turn("assistant", GREETING)])]
    tools = {"search": search, "wait": lambda seconds: seconds}
    with Serving(trained(rows), CHAT, tools, temperature=0) as serving:
        yield serving


@pytest.fixture(scope="module")
def text():
    """A base model with two adapters."""
    ids = BYTE.encode(SAYING + " it is. " + SAYING)
    model = trained([(ids, [1] * len(ids))])
    for name in ("poet", "clerk"):
        lora.add_lora(model, "attention", rank=4, alpha=8, name=name)
    for layer in lora.adapted(model).values():
        for p in (*layer.a.values(), *layer.b.values()):
            torch.nn.init.normal_(p, std=0.3)
    lora.set_adapter(model, "poet")  # as `sample.load` leaves it
    with Serving(model, BYTE, seed=1) as serving:
        yield serving


def tool(name):
    parameters = {"type": "object", "properties": {"name": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def both(create, **request):
    """What create(**request) returns complete, after it was the same as a stream."""
    whole = create(**request)
    *chunks, last = create(**request, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        parts = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert {p.finish_reason for p in parts[:-1]} <= {None}
        assert parts[-1].finish_reason == choice.finish_reason
        if hasattr(choice, "text"):
            assert "".join(p.text for p in parts) == choice.text
        else:  # calls are those of test_answer.py
            content = "".join(p.delta.content or "" for p in parts)
            assert content == (choice.message.content or "")
        for name, value in choice.logprobs.model_dump().items() if choice.logprobs else ():
            sent = [p.logprobs.model_dump()[name] or [] for p in parts if p.logprobs]
            # numbers differ by rounding: caches are filled in other passes
            value = json.loads(
                json.dumps(value or []), parse_float=lambda n: pytest.approx(float(n), abs=1e-4)
            )
            assert list(itertools.chain(*sent)) == value
    return whole


def test_a_model_calls_a_tool_reads_its_result_and_speaks(chat):
    tools = [tool("search")]
    first = both(chat.chat, messages=TALK[:1], tools=tools).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.content is None
    (call,) = first.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("search", '{"name": "Inn"}')
    asked = {"name": "search", "arguments": call.function.arguments}
    answer = {"role": "tool", "tool_call_id": call.id}
    answer |= fetch(chat.port, post("/page/tool", asked))[2]
    messages = [TALK[0], first.message.model_dump(exclude_none=True), answer]
    second = both(chat.chat, messages=messages, tools=tools).choices[0]
    assert (second.message.content, second.finish_reason) == ("Inn: 500", "stop")
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    third = both(chat.chat, messages=[turn("user", parts)], logprobs=True, top_logprobs=2)
    assert third.choices[0].message.content == GREETING
    scores = third.choices[0].logprobs.content
    assert bytes(b for s in scores for b in s.bytes).decode() == GREETING
    assert all(s.top_logprobs[0].token == s.token and len(s.top_logprobs) == 2 for s in scores)


def test_nothing_is_called_without_tools_or_with_a_tool_choice_of_none(chat):
    tools = [tool("search"), tool("wait")]
    for request in ({}, {"tools": tools, "tool_choice": "none"}):
        choice = both(chat.chat, messages=TALK[:1], **request, max_tokens=40).choices[0]
        assert not choice.message.tool_calls
    cut = both(chat.chat, messages=TALK[:1], tools=tools[:1], max_tokens=5).choices[0]
    assert cut.finish_reason == "length"  # nobody is to run half a call
    # a call that is no JSON can be sent back: the conversation goes on, as it does in the terminal
    call = {"id": "a", "type": "function", "function": {"name": "search", "arguments": '{"na'}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "a", "content": '{"error": "no JSON"}'}
    assert chat.chat(messages=[TALK[0], called, result], max_tokens=2).choices


def test_an_answer_in_a_format_is_json_of_it(chat, text):
    shape = {"ok": {"type": "boolean"}, "kind": {"enum": ["inn", "旅馆"]}}
    schema = {"type": "object", "properties": shape, "required": [*shape]}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    hot = dict(response_format=asked, n=3, seed=4, temperature=1.5, max_tokens=250)
    spoken = [c.message.content for c in both(chat.chat, messages=HELLO, **hot).choices]
    for content in spoken + [c["text"] for c in fetch(text.port, post(WRITE, hot))[2]["choices"]]:
        answer = json.loads(content)
        assert set(answer) == set(shape) and answer["kind"] in shape["kind"]["enum"]
    with pytest.raises(openai.BadRequestError, match="minLength"):
        schema["minLength"] = 3
        chat.chat(messages=HELLO, **hot)


def test_lengths_ends_seeds_penalties_and_biases_that_a_request_names(chat, text):
    said, count = {"messages": HELLO, "temperature": 0}, len(GREETING.encode()) + 20
    for extra, content, reason in (
        ({"max_completion_tokens": 4}, "hi ", "length"),  # the fourth byte is a third of 你
        ({"max_tokens": -1}, GREETING, "stop"),
        ({"max_completion_tokens": None}, GREETING, "stop"),
        ({"stop": ["，请", "never"]}, "hi 你好", "stop"),
        ({"stop_token_ids": BYTE.encode("，")[:1]}, "hi 你好", "stop"),
        ({"stop": ["你", "坐"], "min_tokens": 8}, "hi 你好，请", "stop"),
    ):
        choice = both(chat.chat, **said, extra_body=extra).choices[0]
        assert (choice.message.content, choice.finish_reason) == (content, reason)
    for extra in {"min_tokens": count}, {"ignore_eos": True, "max_tokens": count}:
        answer = both(chat.chat, **said, extra_body=extra)
        assert answer.choices[0].message.content.startswith(GREETING)
        assert answer.usage.completion_tokens >= count
    answer = text.write(prompt="it", temperature=0, extra_body={"max_tokens": None})
    assert answer.usage.completion_tokens > 100
    hot = dict(prompt="it", max_tokens=24, temperature=1.5)
    several = both(text.write, **hot, n=3).choices  # seeds 1 to 3
    assert len({c.text for c in several}) == 3
    assert text.write(**hot, seed=3).choices[0].text == several[2].text
    greedy = dict(prompt=SAYING[:4], max_tokens=60, temperature=0)
    plain = text.write(**greedy).choices[0].text
    assert plain.startswith(SAYING[4:])
    assert text.write(**greedy, frequency_penalty=2).choices[0].text != plain
    assert text.write(**hot, presence_penalty=2, seed=3).choices[0].text != several[2].text
    for extra in {"top_k": 1}, {"top_p": 0}, {"min_p": 1}:
        request = greedy | {"temperature": 1.5, "extra_body": extra}
        assert text.write(**request).choices[0].text == plain
    biases = {"89": 100, "310": 100}  # no token has the id 310
    assert text.write(prompt="it", max_tokens=5, logit_bias=biases).choices[0].text == "YYYYY"


def test_logprobs_are_the_models_own_and_its_sums_a_scoring_clients(text):
    """What lm-eval's local-completions sends, up to prompts as long as the context."""
    names = {chr(i) if i < 128 else f"bytes:\\x{i:02x}": i for i in range(256)}
    names["<|endoftext|>"] = 256
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(256, (n,), generator=g).tolist() for n in (2, 320, 17, 300, 2, 1)]
    asked = dict(prompt=prompts, echo=True, max_tokens=1, logprobs=4, seed=1234)
    for choice, prompt in zip(both(text.write, **asked).choices, prompts):
        logprobs, ids = choice.logprobs, [names[token] for token in choice.logprobs.tokens]
        assert ids[: len(prompt)] == prompt and len(ids) == min(320, len(prompt) + 1)
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        with torch.no_grad():
            rows = text.model(torch.tensor([ids]))[0].log_softmax(-1)
        wanted = rows[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
        assert logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
        for row, best in zip(rows, logprobs.top_logprobs[1:]):
            assert list(best.values()) == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
    alone = text.write(prompt=prompts[2], echo=True, max_tokens=0, logprobs=0)
    assert len(alone.choices[0].logprobs.tokens) == 17 and alone.usage.completion_tokens == 0
    echoed = both(text.write, prompt=["a", "bc", [100, 101]], echo=True, n=2, max_tokens=3).choices
    assert [c.index for c in echoed] == list(range(6))
    starts = ["a", "a", "bc", "bc", "de", "de"]
    assert all(c.text.startswith(start) for c, start in zip(echoed, starts))


def test_models_keys_and_errors(chat, text, monkeypatch):
    assert [m.id for m in text.client.models.list()] == ["poet", "clerk", "tiny"]
    assert text.client.models.retrieve("clerk").id == "clerk"
    with pytest.raises(openai.NotFoundError) as e:
        chat.chat(messages=HELLO, model="gpt-4")
    assert (e.value.code, e.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        text.chat(messages=HELLO)
    long = [turn("user", f"{n}" + "x" * 70) for n in range(5)]
    cases = (chat.chat, dict(messages=long)), (text.write, dict(prompt="x" * 400))
    for (create, asked), stream in itertools.product(cases, (False, True)):
        with pytest.raises(openai.BadRequestError) as e:
            create(**asked, stream=stream)
        assert e.value.code == "context_length_exceeded"
    assert chat.chat(messages=long, extra_body={"truncation": "auto"}, max_tokens=2).choices
    bad = dict(temperature=3, n=0, max_tokens=0, stop=["a"] * 5, seed="x", top_p=7, min_tokens=-1)
    bad |= dict(logit_bias={"a": 1}, stop_token_ids=[320], ignore_eos=1, best_of=2, suffix="x")
    bad |= dict(response_format={"type": "xml"}, functions=[tool("f")], guided_json={"a": 1})
    bad |= dict(function_call="auto", modalities=["text", "audio"], prompt_logprobs=1)
    bad |= dict(parallel_tool_calls="no", logit_bias={"1": float("nan")}, stream_options=[])
    bad |= dict(repeat_penalty=1.1, num_predict=9, typical_p=0.9, top_a=0.1, epsilon="bad")
    for settings in (chat.service.api.settings, sample.DECODING):  # as a new filter would
        monkeypatch.setitem(settings, "epsilon", 0.0)
    fine = dict(response_format={"type": "text"}, functions=[], function_call="none", best_of=1)
    fine |= dict(modalities=["text"], audio=None, suffix="", logit_bias={}, stop_token_ids=[])
    fine |= dict(parallel_tool_calls=False, repeat_penalty=1.0, user="me", store=True, new=[1])
    for path, asked in (ASK, GOOD), (WRITE, {"prompt": "a", "max_tokens": 2}):
        plain = fetch(chat.port, post(path, asked | {"seed": 1}))[2]["choices"]
        assert fetch(chat.port, post(path, asked | {"seed": 1} | fine))[2]["choices"] == plain
        assert fetch(chat.port, post(path, asked | {"n": 2, "best_of": 2}))[0] == 200
        for name, value in bad.items():
            status, _, answer = fetch(chat.port, post(path, asked | {name: value}))
            assert (status, answer["error"]["param"]) == (400, name) and name in str(answer)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}
    for name, value in (
        *[("messages", m) for m in ([], "x", [5], [{"role": "x"}], [turn("user", 5)], [call],
                                    [{"role": "user"}], [{"role": "assistant", "tool_calls": 5}])],
        ("top_logprobs", 2),
        *[("tools", t) for t in (5, "x", [5], [{"function": {}}])],
        *[("tool_choice", c) for c in ("x", 5, "required", tool("f"))],
    ):
        assert fetch(chat.port, post(ASK, GOOD | {"tools": [tool("f")], name: value}))[0] == 400
    for prompt in [], [[]], [300], [-1], [[1.5]], {"a": 1}:
        assert fetch(text.port, post(WRITE, {"prompt": prompt}))[0] == 400
    monkeypatch.setattr(chat.service, "key", "k1")
    with pytest.raises(openai.AuthenticationError):
        chat.client.models.list()
    for status, given in (200, "Bearer k1"), (401, "Bearer k"), (401, "k1"), (401, "Bearer ü"):
        assert get(chat.port, "/v1/models", f"Authorization: {given}")[0] == status
    open_to_all = {path for path in data.service.ROUTES if get(chat.port, path)[0] == 200}
    assert open_to_all == {"/", "/health"}


def test_sixteen_at_once_get_what_each_gets_alone(text):
    def write(request):
        return both(text.write, **request).choices[0].text

    rng, models = random.Random(5), itertools.cycle(["tiny", "poet", "clerk"])
    asked = [
        dict(prompt="".join(rng.choices("ab 学", k=rng.randint(1, 60))), model=next(models),
             seed=n, temperature=n % 2, max_tokens=rng.randint(1, 40))
        for n in range(16)
    ]  # fmt: skip
    alone = [write(request) for request in asked]
    assert len(set(alone)) > 12
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(write, asked)) == alone


def raw(port, content, end=False):
    """All that the server answers to these bytes, behind which `end` says there are no more."""
    answer, s = b"", socket.create_connection(("127.0.0.1", port), timeout=20)
    with s, contextlib.suppress(ConnectionError):
        s.sendall(content)
        if end:
            s.shutdown(socket.SHUT_WR)
        while part := s.recv(1 << 16):
            answer += part
    return answer


def request(line, *headers, body=b""):
    """The bytes of a request; `headers` replace what is usual."""
    usual = {"host": "Host: localhost"}
    usual |= {"content-length": LENGTH + str(len(body))} if body else {}
    for header in headers:
        usual.pop(header.partition(":")[0].lower(), None)
    return "\r\n".join([line, *usual.values(), *headers, "", ""]).encode() + body


def post(path, body, *headers):
    """A request to write; what is no bytes yet is sent as JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(f"POST {path} HTTP/1.1", *headers, body=body)


def fetch(port, content, end=False):
    """(status, headers, JSON or text) of the answer; status 0 for a connection that was closed. Our
    errors must have OpenAI's shape; http.server's own have no headers for HTTP/0.9 and unknown."""
    head, _, body = raw(port, content, end).decode().partition("\r\n\r\n")
    if not head.startswith("HTTP/1.1 "):
        return int(([0, *re.findall(r"Error code: (\d+)", head)])[-1]), {}, ""
    line, *headers = head.split("\r\n")
    status, headers = int(line.split()[1]), dict(h.split(": ", 1) for h in headers)
    if headers.get("Content-Type") == "application/json":
        body = json.loads(body, parse_constant=pytest.fail)
    if status >= 400 and isinstance(body, dict):
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"] and ("Retry-After" in headers) == (status in (429, 503))
    return status, headers, body


def get(port, path, *headers):
    return fetch(port, request(f"GET {path} HTTP/1.1", *headers))


def wait_until(true, seconds=5):
    """Wait until true() is; how long it took."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds
        time.sleep(0.01)
    return time.monotonic() - start


ASK, WRITE, LENGTH = "/v1/chat/completions", "/v1/completions", "Content-Length: "
GOOD = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
CHOICE = {"prompt": HELLO, "chosen": "hi 你好", "rejected": "no"}
POSTS = [path for path, (method, *_) in data.service.ROUTES.items() if method == "POST"]
HOSTS = "evil.example", "localhost.evil.example", "127.0.0.1@evil.example", "", "127.0.0.2"
SITES = "http://evil.example", "null", "http://localhost:1", "localhost", ""
CHUNKED = request(f"POST {ASK} HTTP/1.1", "Transfer-Encoding: chunked")
BEGINNINGS = b"GET / HT", post(ASK, GOOD)[:-9]
REFUSED = [  # (request, its status, perhaps that no more is sent)
    *[(post(ASK, body), 400) for body in (
        b"{", b"[]", b"\xff\xfe", b"[" * 10**5, b"{}", b'{"a": "\\ud83d"}',
        b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"seed": %s}' % (b"9" * 9999),
    )],
    (post(ASK, GOOD, LENGTH + "5000"), 400, True), (post(ASK, GOOD)[:-9], 400, True),
    *[(post(ASK, GOOD, LENGTH + n), 411) for n in ("-1", "0x10", "٣", "9" * 40)],
    (post(ASK, GOOD, LENGTH + "1048577"), 413), (post(ASK, b"x" * (1 << 20) + b"y"), 413),
    (post(ASK, GOOD, LENGTH + "67", LENGTH + "67"), 411), (request(f"POST {ASK} HTTP/1.1"), 411),
    (post(ASK, GOOD, "Transfer-Encoding: chunked", LENGTH + "67"), 411),
    (request(f"POST {ASK} HTTP/1.1", "Transfer-Encoding: gzip, chunked"), 411),
    (CHUNKED + b"zz\r\n", 400), (CHUNKED + b"5\r\nab", 400, True), (CHUNKED + b"1\r\nabc", 400),
    (CHUNKED + b"fffffff\r\n", 413),
    *[(post(path, GOOD, f"Host: {host}"), 403) for path in POSTS for host in HOSTS],
    *[(post(path, GOOD, f"Origin: {site}"), 403) for path in POSTS for site in SITES],
    (b"GET / HTTP/1.1\r\n\r\n", 403), (request("GET / HTTP/1.1", "Host: evil.example"), 403),
    *[(request(f"GET {path} HTTP/1.1"), 405) for path in POSTS],
    *[(request(f"{verb} / HTTP/1.1"), 405) for verb in ("POST", "PUT", "DELETE", "PATCH")],
    *[(request(f"GET {path} HTTP/1.1"), 404) for path in (
        "/nothing", "/../model.py", "/..%2fmodel.py", "//etc/passwd", "/v1/models/", "http://[",
        *[f"/page/run{n}" for n in ("", "?name=../..", "?name=..%2f..", "?name=%00", "?name=/etc")],
    )],
    (request("GET / HTTP/1.1", *["X: y"] * 200), 431), (b"GET /" + b"x" * 70000, 414),
    (request("GET / HTTP/1.1", "X: " + "y" * 66000), 431), (bytes(range(256)) * 4, 400, True),
    (b"\r\n\r\n", 0), (b"", 0, True), (b"POST / HT", 400, True), (post(ASK, GOOD)[:60], 411, True),
]  # fmt: skip


def test_bad_requests_are_refused_and_change_nothing(chat, monkeypatch):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda case: fetch(chat.port, case[0], *case[2:])[0], REFUSED))
    assert [(c[0][:200], c[1], s) for c, s in zip(REFUSED, found) if c[1] != s] == []
    assert b"not served here" in raw(chat.port, b"GET /health\r\n\r\n")  # HTTP/0.9 has no Host
    two = post(ASK, GOOD, "Host: [::1]:80") + post("/page/choose", CHOICE)
    assert fetch(chat.port, two)[0] == 200  # the second one is not read
    body = json.dumps(GOOD).encode()
    parts = b"".join(b"%x;a=b\r\n%s\r\n" % (len(part), part) for part in (body[:9], body[9:]))
    assert fetch(chat.port, CHUNKED + parts + b"0\r\nTrailer: x\r\n\r\n")[0] == 200
    assert get(chat.port, "/health")[2] == {"status": "ok"} and not Path("out").exists()
    monkeypatch.setattr(data.server, "SECONDS", 0.3)
    began = time.monotonic()  # what is not sent in time is not waited for
    assert all(raw(chat.port, start) == b"" for start in (b"", *BEGINNINGS))
    assert time.monotonic() - began < 5


def test_requests_that_are_much_work_are_refused_or_soon_done(chat, text):
    start, turns = time.monotonic(), [turn("user", "a")] * 20_000
    assert fetch(text.port, post(WRITE, {"prompt": [""] * 200_000, "n": 16}))[0] == 400
    assert fetch(chat.port, post(ASK, GOOD | {"messages": turns, "truncation": "auto"}))[0] == 200
    deep = [tool("wait") | {"deep": json.loads("[" * 900 + "]" * 900)}]
    assert fetch(chat.port, post(ASK, GOOD | {"tools": deep}))[0] in (200, 400)
    assert time.monotonic() - start < 30  # seconds if the machine is busy, minutes if quadratic


@pytest.mark.parametrize("start", [*BEGINNINGS, b"X / HTTP/1.1\r\n\r\n"])
def test_200_slow_clients_do_not_keep_out_a_real_one(chat, start):
    slow, over = [], threading.Event()

    def drip():
        while not over.wait(0.1):
            for s in list(slow):
                with contextlib.suppress(OSError):
                    s.send(b"a")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(drip)
        try:
            for _ in range(200):
                slow.append(socket.create_connection(("127.0.0.1", chat.port)))
                slow[-1].send(start)
            for _ in range(3):
                began = time.monotonic()
                assert chat.chat(messages=HELLO, max_tokens=3).choices[0].message.content == "hi "
                assert time.monotonic() - began < 3
        finally:
            over.set()
            for s in slow:
                s.close()
    wait_until(lambda: not chat.server.open)


@pytest.fixture
def slowly(text, monkeypatch):
    """Each step of the base model takes longer."""
    step = text.engine.step
    monkeypatch.setattr(text.engine, "step", lambda: (time.sleep(0.02), step())[1])
    yield
    monkeypatch.setattr(text.engine, "step", step)
    wait_until(lambda: not text.engine.busy)


def test_a_client_that_goes_frees_its_slot_and_its_place_in_the_queue(text, slowly):
    def asking(body, rest=b""):
        s = socket.create_connection(("127.0.0.1", text.port))
        s.sendall(post(WRITE, LONG | body) + rest)
        return s

    for stream, rest in (False, b""), (True, post(WRITE, LONG)):
        with asking({"n": 2, "stream": stream}, rest):
            wait_until(lambda: text.engine.busy == 2)
        assert wait_until(lambda: not text.engine.busy) < 2  # of six seconds
    with asking({"n": 4}):
        wait_until(lambda: text.engine.busy == 4)
        with asking({"n": 3}):
            wait_until(lambda: len(text.scheduler.waiting) == 3)
        assert wait_until(lambda: not text.scheduler.waiting) < 2
        assert text.engine.busy == 4


def test_a_full_queue_and_too_many_connections(text, slowly, monkeypatch):
    monkeypatch.setattr(text.scheduler, "max_waiting", 5)
    with text.write(**LONG, n=4, stream=True):
        wait_until(lambda: text.engine.busy == 4)
        with text.write(**LONG, n=5, stream=True):
            with pytest.raises(openai.RateLimitError) as e:
                text.write(**LONG)
            assert e.value.response.headers["Retry-After"] == "1"
            # one is open at least, even if this test is so late that the first answer is complete
            monkeypatch.setattr(data.server, "MAX_CONNECTIONS", 1)
            with pytest.raises(openai.APIConnectionError):
                text.client.models.list()
        monkeypatch.setattr(data.server, "MAX_CONNECTIONS", 64)
        assert get(text.port, "/health")[0] == 200


def test_a_step_that_fails_ends_its_answers_and_not_the_server(text, monkeypatch, capfd):
    def fail(*_, **settings):
        raise RuntimeError("broken 好")

    request = dict(prompt="it", max_tokens=9)
    expected, engine = text.write(**request).choices[0].text, text.engine
    cases = (engine, "step", "tiny"), (engine, "add", "tiny"), (text.scheduler, "activate", "poet")
    for (owner, name, model), stream in itertools.product(cases, (False, True)):
        with monkeypatch.context() as m, pytest.raises(openai.APIError, match="broken 好"):
            m.setattr(owner, name, fail)
            list(text.write(**request | {"model": model}, stream=stream))
        assert text.write(**request).choices[0].text == expected
    assert text.engine.busy == 0 and capfd.readouterr().err.count("RuntimeError: broken 好") == 2


def test_closing_finishes_what_is_written_and_cuts_what_never_ends(capfd):
    with Serving(trained([([1, 2], [1, 1])], 1), BYTE) as serving, ThreadPoolExecutor(2) as pool:
        step, serving.engine.draft = serving.engine.step, False
        serving.engine.step = lambda: (time.sleep(0.05), step())[1]
        asked = [LONG | {"max_tokens": n, "stream": True} for n in (20, 300, 300, 300)]
        streams = [serving.write(**each) for each in asked]
        wait_until(lambda: serving.engine.busy == 4)
        late = pool.submit(fetch, serving.port, post(WRITE, LONG))
        wait_until(lambda: serving.scheduler.waiting)
        closing = pool.submit(serving.scheduler.close, 2.5)
        wait_until(lambda: serving.scheduler.closing)
        with pytest.raises(openai.InternalServerError):
            serving.write(**LONG)
        assert late.result()[0] in (429, 503) and not closing.done()
        assert [c.choices[0].finish_reason for c in streams[0]][-1] == "length"
        for stream in streams[1:]:
            with pytest.raises(openai.APIError, match="closing"):
                list(stream)
        closing.result()
        assert get(serving.port, "/health")[0] == 503
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_signal_lets_the_process_end_its_answers_and_a_key_is_needed():
    site = "https://site.example"
    shape = dict(vocab_size=320, context=1 << 16, n_layer=1, n_head=2, d_model=16, head_bias=True)
    model = lm.Transformer(lm.Config(**shape))
    with torch.no_grad():  # it writes letters and never ends
        model.head.bias.fill_(-50)[list(b"abcdefghijklmnop")] = 0
    save("run/best.pt", model, CHAT)
    command = [sys.executable, str(ROOT / "sample.py"), "--ckpt", "run", "--serve", "0"]
    command += ["--slots", "3", "--cors", site, "--host", "0.0.0.0", "--api_key", "k1"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, **pipes) as p, contextlib.ExitStack() as stack:
        stack.callback(p.kill)  # when an assertion fails: leaving Popen waits for the end
        port = int(re.fullmatch(r"http://[\d.]+:(\d+)/\n", p.stdout.readline())[1])
        assert [get(port, path)[0] for path in ("/v1/models", "/", "/health")] == [401, 200, 200]
        key, origin, body = "Authorization: Bearer k1", f"Origin: {site}", GOOD | {"model": "run"}
        status, headers, _ = fetch(port, post(ASK, body, key, origin))
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, site)
        status, headers, _ = fetch(port, request(f"OPTIONS {ASK} HTTP/1.1", origin))
        assert status == 200 and "Access-Control-Allow-Headers" in headers
        create = functools.partial(client(port, "k1").chat.completions.create, **body)
        stream = create(max_tokens=600, stream=True)
        chunks = [next(stream)]
        p.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            create()
        chunks += stream
        assert sum(len(c.choices[0].delta.content or "") for c in chunks) == 600
        assert chunks[-1].choices[0].finish_reason == "length"
        assert p.wait(10) == 143 and p.stderr.read() == ""


def test_what_cannot_be_served_is_one_line(chat, monkeypatch):
    monkeypatch.delenv("SCRATCHLM_API_KEY", raising=False)
    loaded = chat.model, CHAT, Path("tiny.pt")
    monkeypatch.setattr(sample, "load", lambda *args: loaded)
    taken, bare = [str(chat.port)], ["0", "--host", "0.0.0.0"]
    for flags, words in (taken, "cannot be used"), (bare, "give it an --api_key"):
        with pytest.raises(UserError, match=words) as e:
            sample.main(["--no_fast", "--ckpt", "tiny.pt", "--serve", *flags])
        assert "\n" not in str(e.value)
    args = sample.build_parser().parse_args(["--host", "::1"])  # local: needs no key
    assert sample.make_service(*loaded, args, None).key is None
    monkeypatch.setenv("SCRATCHLM_API_KEY", "k1")
    assert sample.make_service(*loaded, args, None).key == "k1"


def test_choices_are_rows_that_finetune_reads(chat):
    assert get(chat.port, "/page/info")[2]["choices"]["count"] == 0
    call = {"function": {"name": "search", "arguments": "{}"}}
    talk = [*HELLO, {"role": "assistant", "tool_calls": [call]}, turn("tool", "[]")]
    good = [CHOICE, CHOICE | {"prompt": talk}, {"prompt": "学", "chosen": "a", "rejected": "b"}]
    for n, row in enumerate(good, start=1):
        assert fetch(chat.port, post("/page/choose", row))[::2] == (200, {"count": n})
    bad = {"rejected": "hi 你好"}, {"chosen": " "}, {"prompt": []}, {"prompt": [turn("x", "y")]}
    for row in ({}, *(CHOICE | wrong for wrong in bad)):
        assert fetch(chat.port, post("/page/choose", row))[0] == 400
    info, file = get(chat.port, "/page/info")[2]["choices"], Path("out/choices.jsonl")
    assert info == info | {"count": 3, "file": str(file)}
    kind, splits, _ = load_data(info["file"])
    assert kind == "prefer" and len(splits["train"]) + len(splits["val"]) == 3


def test_digits_are_drawn_step_by_step_where_a_model_learned_to(chat, toy, monkeypatch):
    assert fetch(chat.port, post("/page/draw", {"text": "3"}))[0] == 404
    small = functools.partial(mnist.Denoiser, width=16, layers=1, heads=2)
    monkeypatch.setitem(mnist.NETWORKS, "diffusion", small)
    mnist.main(["--diffusion", "--data", toy, "--epochs", "1", "--steps", "2"])
    with Serving(chat.model, CHAT) as serving, serving.write(**LONG, stream=True) as writing:
        assert get(serving.port, "/page/info")[2]["draws"]
        drawn = fetch(serving.port, post("/page/draw", {"text": "3 一", "seed": 5}))[2]
        *events, end = re.findall(r"data: (.+)\n\n", drawn)
        pngs = mnist.pictures(mnist.load_run("diffusion", "cpu")[0], "3 1", 5)
        urls = ["data:image/png;base64," + base64.b64encode(png).decode() for png in pngs]
        assert [json.loads(event)["image"] for event in events] == urls and len(urls) == 30
        assert end == "[DONE]"
        assert list(writing)[-1].choices[0].finish_reason in ("stop", "length")
        bad = [{"text": text} for text in (None, 3, "1" * 21, " ", "x")]
        bad += [{"text": "3", "seed": seed} for seed in (-1, 2**50, True, "1")]
        assert {fetch(serving.port, post("/page/draw", body))[0] for body in bad} == {400}


def test_runs_and_their_figures(chat):
    assert get(chat.port, "/page/runs")[2] == {"runs": []}
    rows = [{"step": n, "loss": 1 / n, "lr": 0.1} for n in range(1, 2001)]
    rows.insert(1000, {"step": 1000, "val_loss": 2.0})
    texts = {"long": "".join(json.dumps(r) + "\n" for r in rows)}
    texts["cut 好"] = '{"step": 1, "loss": NaN}\n5\n[1]\n{"step": 2, "loss": Infinity}\n{"step": 3'
    for n, (name, content) in enumerate(texts.items()):
        folder = Path("out", name)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(content, encoding="utf-8")
        (folder / "settings.json").write_text(('{"lr": 0.1}', "{")[n], encoding="utf-8")
        os.utime(folder / "metrics.jsonl", (time.time() - n, time.time() - n))
    Path("out/no run").mkdir()
    with data.runs.lock_folder("out/long"):
        runs = get(chat.port, "/page/runs")[2]["runs"]
    assert [(r["name"], r["step"], r["live"]) for r in runs] == [
        ("long", 2000, True), ("cut 好", 2, False)]
    found = {n: get(chat.port, "/page/run?name=" + quote(n))[2] for n in texts}
    long = found["long"]["rows"]
    assert found["long"]["settings"] == {"lr": 0.1} and 500 < len(long) < 800
    assert rows[1000] in long and long[-1] == rows[-1] and all(r in rows for r in long)
    cut = {"settings": {}, "rows": [{"step": 1, "loss": None}, {"step": 2, "loss": None}]}
    assert found["cut 好"] == {"name": "cut 好"} | cut
