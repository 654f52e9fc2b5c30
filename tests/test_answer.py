"""Answers of the API, streamed and whole, of a model that writes what a test says."""

import json

import pytest
from conftest import BYTE, CHAT, calls, prompt_ids, render_chat, turn
from test_templates import CHATML, TOOLS, pair

from data.answer import ApiError
from data.api import Api
from data.chat import THINK, get_template
from data.tokenizer import Tokenizer

HELLO = [turn("user", "hi")]
SPOKEN = {
    "text": turn("assistant", "Hello!"),
    "a call": calls('sky {"z": [1, 500.0], "a": "好"}'),
    "calls": calls("f {}", 'sky {"z": {"b": null}}'),
    "text and a call": calls('sky {"a": "x"}', content="I look."),
    "a thought": turn("assistant", "Hello!") | {"reasoning_content": "Hm.\n<b>"},
    "a thought and a call": calls("f {}") | {"reasoning_content": "Hm."},
}


class Script:
    """Stands for the Scheduler: each text is `ids`, up to where it ends."""

    def __init__(self, ids=()):
        self.ids, self.prompts = list(ids), []

    def submit(self, jobs):
        for job in jobs:
            self.prompts.append(job.prompt)
            last = next((n for n, i in enumerate(self.ids) if i in job.settings["ends"]), None)
            for i in self.ids[: None if last is None else last + 1]:
                job.events.put((job.index, i, None))
            job.events.put((job.index, "length" if last is None else "stop", None))


def serve(tokenizer, ids=(), **fields):
    """(message, finish_reason, prompt) of an answer, which is the same streamed as complete."""
    allowed = dict.fromkeys([(True, True), (True, False)], [True] * tokenizer.n_vocab)
    api = Api(Script(ids), tokenizer, {"m": None}, 4096, allowed, {}, {})
    body = {"messages": HELLO, "tools": TOOLS, **fields}
    *_, answer = api.chat(dict(body)).result()
    answer, streamed = answer["choices"][0], {"content": ""}
    for chunk in filter(None, api.chat(dict(body)).chunks()):
        choice = chunk["choices"][0]
        for name, value in choice["delta"].items():
            streamed[name] = streamed[name] + value if name in streamed else value
    calls = streamed.get("tool_calls", [])
    assert [call.pop("index") for call in calls] == list(range(len(calls)))
    names = {call["id"] for call in calls}
    assert len(names) == len(calls) and all(len(name) == 9 for name in names)
    message = answer["message"] | {"content": answer["message"]["content"] or ""}
    other = [call | {"id": c["id"]} for call, c in zip(message.get("tool_calls", ()), calls)]
    assert streamed == message | ({"tool_calls": other} if calls else {})
    assert choice["finish_reason"] == answer["finish_reason"]
    return streamed, answer["finish_reason"], api.scheduler.prompts[0]


def written(messages, tokenizer):
    """(what is read, what is written) of the last message, ids."""
    ids, mask = render_chat(messages, tokenizer, tools=TOOLS)
    prompt = prompt_ids(messages[:-1], tokenizer, TOOLS)
    return prompt, ids[len(prompt) : len(mask) - mask[::-1].index(1)]


def tokenizer_of(family):
    """Its tokenizer; those of test_templates.py have another end of texts, to be told from it. That
    of "words" has no token for a tag, that of "opened" begins a thought in the prompt."""
    if family in ("words", "opened"):
        begin = "{% set usual, thinks = '', true %}" + CHATML
        if family == "opened":
            begin = begin.replace("prompt %}{{- '<|im_start|>assistant\\n",
                                  "prompt %}{{- '<|im_start|>assistant\\n<think>\\n")
        plain = BYTE.with_special(["<|im_start|>", "<|im_end|>", *(THINK * (family == "opened"))])
        return Tokenizer(plain.spec | {"chat_template": begin})
    ours = CHAT.with_special(THINK) if family == "ours" else pair(family)[0]
    return Tokenizer(ours.spec | {"end": get_template(ours).end, "ends": []})


WRITTEN = {  # what a family's template can write
    "ours": SPOKEN, "qwen3": SPOKEN, "words": SPOKEN,
    "opened": [w for w in SPOKEN if "thought" in w], "llama3.1": ["text", "a call"],
    "qwen2.5": ["text", "a call", "calls", "text and a call"],
    "mistral": ["text", "a call", "calls"], "gemma": ["text"], "phi3": ["text"],
}  # fmt: skip


@pytest.mark.parametrize("family, what", [(f, what) for f in WRITTEN for what in WRITTEN[f]])
def test_an_answer_is_the_message_that_it_means_and_can_be_sent_back(family, what):
    tokenizer, message = tokenizer_of(family), dict(SPOKEN[what])
    calls = [c | {"id": f"call{n:05}"} for n, c in enumerate(message.pop("tool_calls", ()))]
    given = message | ({"tool_calls": calls} if calls else {})
    prompt, ids = written([*HELLO, given], tokenizer)
    got, reason, read = serve(tokenizer, ids)
    assert read == prompt and reason == ("tool_calls" if calls else "stop")
    functions = [call["function"] for call in got.get("tool_calls", ())]
    functions = [f | {"arguments": json.loads(f["arguments"])} for f in functions]
    assert functions == [call["function"] for call in calls]
    assert {k: v for k, v in got.items() if k != "tool_calls"} == message
    template = get_template(tokenizer)
    assert ids[-1] == template.end and {*ids} & {*tokenizer.special.values()} <= {*template.spoken}
    if calls:
        results = [turn("tool", "1") | {"tool_call_id": c["id"]} for c in got["tool_calls"]]
        _, _, read = serve(tokenizer, messages=[*HELLO, got, *results])
        assert read == prompt_ids([*HELLO, given, *results], tokenizer, TOOLS)
        # before a result, Qwen3's template leaves out the empty thought that it has written
        rewritten = family in ("qwen3", "words") and "thought" not in what
        assert rewritten or read[: len(prompt) + len(ids)] == prompt + ids


@pytest.mark.parametrize("family, text, content, thought", [
    ("qwen2.5", 'So\n<tool_call>\n{"name": 5}', 'So\n<tool_call>\n{"name": 5}', None),
    ("words", '<tool_call>\n{"name": "f", ', '<tool_call>\n{"name": "f", ', None),
    ("words", "<think>\nHm", "", "Hm"),
    ("words", "<think> Hm \n</think>\n\n  Hi\n\nyou  <too", "  Hi\n\nyou  <too", " Hm"),
    ("words", "<think>Hm STOP</think>Hi", "", "Hm "),
    ("qwen3", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', None),
    ("mistral", " Hi ", "Hi ", None),
    ("ours", "a <think> b", "a <think> b", None),
])
def test_what_is_no_call_is_text_and_thoughts_end_where_they_end(family, text, content, thought):
    ours, wanted = tokenizer_of(family), turn("assistant", content)
    ids = get_template(ours).encode(text) if family != "ours" else ours.encode(text)
    got, _, _ = serve(ours, ids, stop="STOP")
    assert got == wanted | ({"reasoning_content": thought} if thought else {})


def test_templates_get_the_variables_of_a_request_and_refuse_in_their_own_words():
    def text(family="qwen3", **fields):
        tokenizer = tokenizer_of(family)
        return tokenizer.decode(serve(tokenizer, tools=[], **fields)[2])

    user, begin = "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>assistant\n"
    no_thought = begin + "<think>\n\n</think>\n\n"
    continued = {"messages": [*HELLO, turn("assistant", "Once")], "continue_final_message": True}
    for fields, prompt in (
        ({}, begin),
        ({"chat_template_kwargs": {"enable_thinking": False}}, no_thought),
        ({"add_generation_prompt": False}, ""),
        (continued, no_thought + "Once"),
        (continued | {"truncation": "auto"}, no_thought + "Once"),
    ):
        assert text(**fields) == user + prompt
    for name, value in ("add_generation_prompt", "no"), ("chat_template_kwargs", [1]):
        with pytest.raises(ApiError, match=name):
            text(**{name: value})
    system = [turn("system", "Be kind."), *HELLO]
    for truncation in ("disabled", "auto"):
        with pytest.raises(ApiError, match="System role not supported") as e:
            text("gemma", messages=system, truncation=truncation)
        assert e.value.status == 400
