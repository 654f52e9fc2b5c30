"""Conversations in our own template, prompts cut to a length, and answers parsed again.

test_templates.py compares other templates with transformers.
"""

import json

import pytest
from conftest import ASSISTANT, BYTE, CHAT, END, USER, calls, prompt_ids, render_chat, turn
from test_templates import FAMILIES, TOOLS, pair

import prepare_data
from data.chat import CHAT_TOKENS, get_template
from data.cli import UserError
from data.reply import parse
from data.tokenizer import Tokenizer

TRICKY = "Say <|end|> and <|assistant|><|call|> <|endoftext|> naïve 你好，世界 👩‍👩‍👧 \n\n x"


def test_a_broken_call_is_text_and_arguments_stay_as_they_were_written():
    ours, _ = pair("qwen2.5")
    template, mark = get_template(ours), ours.special["<tool_call>"]
    written = '{"n": 1e3,  "n2": "\\u4f60"}'
    said = ours.encode('\n{"name": "f", "arguments": ' + written + "}\n")
    (call,) = parse([mark, *said], template)["tool_calls"]
    assert call["function"]["arguments"] == written
    again = turn("assistant", "") | {"tool_calls": [call]}
    ids, mask = render_chat([turn("user", "hi"), again], ours)
    assert [i for i, m in zip(ids, mask) if m][: len(said) + 1] == [mark, *said]
    for broken in ("{", '{"name": 3, "arguments": {}}', '{"name": "f"}', "[]", "[" * 100_000):
        got = parse([mark, *ours.encode(broken)], template)
        assert got == turn("assistant", "<tool_call>" + broken)
    template = get_template(pair("qwen3")[0])
    wanted = turn("assistant", "") | {"reasoning_content": "Hm"}
    assert parse(template.encode("<think>Hm"), template) == wanted  # the thought is cut off
    prompt = template.encode("<think>\n")  # DeepSeek-R1's template begins the thought
    assert parse(template.encode("Hm\n</think>Hi"), template, prompt) == wanted | {"content": "Hi"}


def test_a_row_that_begins_with_the_assistant_learns_its_words_alone():
    ((ids, mask, _),) = get_template(CHAT).rows([calls("f {}")], TOOLS)
    assert CHAT.decode([i for i, m in zip(ids, mask) if m]) == "<|call|>f {}<|end|>"
    messages = [turn("assistant", "Hello!"), turn("user", "hi"), turn("assistant", "Yes?")]
    rows = get_template(pair("qwen2.5")[0]).rows(messages)  # it refuses an empty conversation
    assert [turns for _, _, turns in rows] == [[2]]


def test_a_tokenizer_without_a_template_has_none_and_our_tokens_win():
    assert get_template(BYTE) is None
    assert get_template(pair("qwen2.5")[0].with_special(CHAT_TOKENS)).ours
    for source, says in (("{% if %}", "cannot be read .*: Expected an expression"),
                         ("{{ raise_exception('no') }}", "cannot be used .* conversation: no")):
        with pytest.raises(UserError, match=f"chat template {says}"):
            get_template(Tokenizer(BYTE.spec | {"chat_template": source}))


@pytest.mark.parametrize("family", ["ours", *FAMILIES])
def test_a_prompt_that_is_too_long_keeps_its_frame(family):
    ours = CHAT if family == "ours" else pair(family)[0]
    talk = [t for n in range(4) for t in (turn("user", f"q{n} " * 9), turn("assistant", "a"))]
    talk.append(turn("user", "x" * 300 + "!"))
    frame = len(prompt_ids([turn("user", "")], ours))
    for room in (frame + 20, frame + 200, 2000):
        ids = prompt_ids(talk, ours, room=room)
        assert len(ids) <= room and prompt_ids([turn("user", "!")], ours)[-2:] == ids[-2:]
        assert ids[:1] == prompt_ids(talk[:1], ours)[:1]
    assert ids == prompt_ids(talk, ours)


@pytest.fixture(params=["byte", "char", "bpe:300"])
def plain(request):
    return prepare_data.make_tokenizer(request.param, [("", [TRICKY * 9])], 9)


def test_a_prompt_is_the_beginning_of_the_row_with_its_answer(plain):
    chat = plain.with_special(CHAT_TOKENS)
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    talk = [turn(role, TRICKY[i:]) for i, role in enumerate(roles)]
    talk[2]["tool_calls"] = calls("f " + json.dumps({TRICKY: TRICKY}), "g {}")["tool_calls"]
    ids, mask = render_chat(talk, chat)
    parts = [render_chat([m], chat) for m in talk]
    assert [ids, mask] == [[x for part in column for x in part] for column in zip(*parts)]
    for i, m in enumerate(talk):
        if m["role"] == "assistant":
            prompt, nothing = render_chat(talk[:i], chat, add_generation_prompt=True)
            assert prompt == ids[: len(prompt)] and mask[len(prompt)] == 1
            assert sum(nothing) == sum(mask[: len(prompt)])
    specials = [chat.decode([i]) for i in ids if i in chat.special.values()]
    names = ("system", "user", "assistant call call", "tool", "assistant", "user", "assistant")
    wanted = [f"<|{name}|>" for turn in names for name in f"{turn} end".split()]
    assert specials == wanted  # and none from the text, whatever it spells
    assert chat.decode(parts[1][0][1:-1]) == talk[1]["content"]


def test_a_prompt_drops_its_oldest_turns_and_keeps_the_system_message():
    talk = [turn("system", "be kind"), turn("user", "a" * 9), turn("assistant", "b" * 9),
            turn("user", "c" * 9)]
    full = prompt_ids(talk, CHAT)
    shorter = prompt_ids([talk[0], *talk[2:]], CHAT)
    last = prompt_ids([talk[0], talk[3]], CHAT)
    cut = prompt_ids([talk[0], turn("user", "c" * 6)], CHAT)
    alone = [USER, *CHAT.encode("c" * 9), END, ASSISTANT]
    rooms = (len(full), full), (len(full) - 1, shorter), (len(shorter) - 1, last), (18, cut)
    for room, ids in (*rooms, (len(alone), alone)):
        assert prompt_ids(talk, CHAT, room=room) == ids
