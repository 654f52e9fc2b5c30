"""Conversations in the families' own templates: the texts that their model cards show."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ASSISTANT, BYTE, CALL, CHAT, END, SYSTEM, TOOL, USER, real, turn
from test_tools import look_up, mixed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import itertools
import random
import sys
from pathlib import Path

import prepare_data
from data.chat import (
    CHAT_TOKENS,
    ROLES,
    Template,
    call_text,
    chat_prompt,
    label_token,
    labels_of,
    render_chat,
)
from data.cli import UserError
from data.hf_tokenizer import tokenizer_config, tokenizer_json
from data.tokenizer import Tokenizer
from data.tools import function_schema

QWEN = BYTE.with_special(
    ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
)

SMOL = BYTE.with_special(["<|im_start|>", "<|im_end|>"])

LLAMA = BYTE.with_special(
    ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
)

LLAMA.bos_id = LLAMA.special["<|begin_of_text|>"]

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "A room?"},
    {"role": "call", "content": call_text("search", {"type": "豪华型"})},
    {"role": "tool", "content": "[]"},
    {"role": "assistant", "content": "None, sorry."},
]

CHATML = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
    "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nA room?<|im_end|>\n"
    '<|im_start|>assistant\n<tool_call>\n{"name": "search", "arguments": {"type": "豪华型"}}\n'
    "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n[]\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\nNone, sorry.<|im_end|>\n"
)


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


LLAMA3 = (
    f"<|begin_of_text|>{header('system')}Be kind.<|eot_id|>{header('user')}你好<|eot_id|>"
    f"{header('assistant')}Hello!<|eot_id|>{header('user')}A room?<|eot_id|>"
    f'{header("assistant")}{{"name": "search", "parameters": {{"type": "豪华型"}}}}<|eot_id|>'
    f"{header('ipython')}[]<|eot_id|>{header('assistant')}None, sorry.<|eot_id|>"
)

FAMILIES = {
    "qwen": (QWEN, CHATML, "<|im_start|>assistant\n"),
    "smol": (SMOL, CHATML, "<|im_start|>assistant\n"),
    "llama": (LLAMA, LLAMA3, header("assistant")),
}

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_a_conversation_is_written_as_the_family_does(family):
    tokenizer, text, begin = FAMILIES[family]
    ids, mask = render_chat(TALK, tokenizer)
    assert tokenizer.decode(ids) == text
    prompt, nothing = render_chat(TALK, tokenizer, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == text + begin and not any(nothing[len(ids) :])
    learned = [
        tokenizer.decode([i for i, m in zip(run, [1] * len(run))]) for run in runs(ids, mask)
    ]
    end = "<|eot_id|>" if family == "llama" else "<|im_end|>"
    key = "parameters" if family == "llama" else "arguments"
    call = f'{{"name": "search", "{key}": {{"type": "豪华型"}}}}'
    call = call if family == "llama" else f"<tool_call>\n{call}\n</tool_call>"
    assert learned == [f"Hello!{end}", f"{call}{end}", f"None, sorry.{end}"]


def runs(ids, mask):
    found, last = [], 0
    for i, m in zip(ids, mask):
        if m and not last:
            found.append([])
        if m:
            found[-1].append(i)
        last = m
    return found


@every_family
def test_a_prompt_is_a_prefix_of_what_was_learned(family):
    tokenizer = FAMILIES[family][0]
    whole = render_chat(TALK, tokenizer)[0]
    for i, m in enumerate(TALK):
        if m["role"] in ("assistant", "call"):
            prompt = render_chat(TALK[:i], tokenizer, add_generation_prompt=True)[0]
            assert prompt == whole[: len(prompt)]
            assert chat_prompt(TALK[:i], tokenizer, 10_000) == prompt


@every_family
def test_what_was_learned_is_understood_again(family):
    tokenizer = FAMILIES[family][0]
    template, (ids, mask) = Template(tokenizer), render_chat(TALK, tokenizer)
    said = [m for m in TALK if m["role"] in ("assistant", "call")]
    assert [template.parse(run) for run in runs(ids, mask)] == said
    strange = tokenizer.encode('{"name": 3, "arguments": {}} {')
    assert template.parse(strange)["role"] == "assistant"


@every_family
def test_a_prompt_that_is_too_long_keeps_its_frame(family):
    tokenizer, _, begin = FAMILIES[family]
    template = Template(tokenizer)
    for room in (60, 90, 200):
        ids = chat_prompt(TALK[:4], tokenizer, room)
        assert len(ids) <= room and tokenizer.decode(ids).endswith(f"A room?{end(template)}{begin}")
        assert ids[: len(template.start)] == template.start


def end(template):
    after = "\n" if template.kind == "chatml" else ""
    return template.tokenizer.decode([template.end]) + after


def test_our_own_tokens_win_and_a_tokenizer_without_any_is_refused():
    assert Template(QWEN.with_special(CHAT_TOKENS)).kind == "ours"
    with pytest.raises(UserError, match="no special tokens for a chat"):
        Template(BYTE)


# ---- tools: what the model is told, against transformers ------------------------------------


QWEN3 = QWEN.with_special(["<tool_response>", "</tool_response>"])
OURS = BYTE.with_special(CHAT_TOKENS)
TOLD = {"qwen": QWEN, "qwen3": QWEN3, "smol": SMOL, "llama": LLAMA, "ours": OURS}

TWO = [
    *TALK,
    {"role": "user", "content": "  Two?"},
    {"role": "call", "content": call_text("search", {"type": "a"})},
    {"role": "call", "content": call_text("look_up", {"city": "北京", "days": 2})},
    {"role": "tool", "content": '[{"x": 1}]'},
    {"role": "tool", "content": "sunny"},
]


def openai(messages, merge):
    """As other programs have them; ChatML's calls in a row are those of one turn."""
    found = []
    for m in messages:
        if m["role"] == "call":
            name, arguments = m["content"].split(" ", 1)
            call = {"type": "function", "function": {"name": name,
                                                     "arguments": json.loads(arguments)}}
            if merge and found[-1].get("tool_calls"):
                found[-1]["tool_calls"].append(call)
            else:
                found.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            found.append(m)
    return found


@pytest.mark.parametrize("system", ["Be kind.", "", None])
@pytest.mark.parametrize("tools", [0, 1, 2])
@pytest.mark.parametrize("family", TOLD)
def test_what_a_model_is_told_is_what_transformers_renders_of_our_export(
    family, tools, system, tmp_path
):
    transformers = pytest.importorskip("transformers")
    tokenizer = TOLD[family]
    schemas = [function_schema(f.__name__, f) for f in (look_up, mixed)[:tools]]
    talk = TWO[1:] if system is None else [{"role": "system", "content": system}, *TWO[1:]]
    if system == "" and not (tools and family != "ours"):
        pytest.skip("an empty system turn is for tools")
    for name, make in (("tokenizer.json", tokenizer_json), ("tokenizer_config.json",
                                                           tokenizer_config)):
        (tmp_path / name).write_text(json.dumps(make(tokenizer)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    told = talk
    if schemas:
        told = talk if system is not None else [{"role": "system", "content": ""}, *talk]
        told = [told[0] | {"tools": schemas}, *told[1:]]
    for prompt in (False, True):
        want = theirs.apply_chat_template(
            openai(talk, "qwen" in family or family == "smol"), tools=schemas or None,
            add_generation_prompt=prompt, tokenize=True, return_dict=False,
        )
        ids = render_chat(told, tokenizer, prompt)[0]
        assert tokenizer.decode(ids) == tokenizer.decode(want)
        assert ids == want


def test_tools_stand_where_the_families_have_them():
    schema = function_schema("look_up", look_up)
    talk = [{"role": "system", "content": "Be kind.", "tools": [schema]}, *TALK[1:2]]
    text = QWEN.decode(render_chat(talk, QWEN)[0])
    assert text == (
        "<|im_start|>system\nBe kind.\n\n# Tools\n\nYou may call one or more functions to assist "
        "with the user query.\n\nYou are provided with function signatures within "
        f"<tools></tools> XML tags:\n<tools>\n{json.dumps(schema)}\n</tools>\n\nFor each function "
        "call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
    )
    text = LLAMA.decode(render_chat(talk, LLAMA)[0])
    assert text == (
        f"<|begin_of_text|>{header('system')}Environment: ipython\nCutting Knowledge Date: "
        f"December 2023\nToday Date: 26 Jul 2024\n\nBe kind.<|eot_id|>{header('user')}Given the "
        "following functions, please respond with a JSON for a function call with its proper "
        "arguments that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.'
        f"Do not use variables.\n\n{json.dumps(schema, indent=4)}\n\n你好<|eot_id|>"
    )
    room = len(render_chat(talk, LLAMA, True)[0])  # the oldest turns go, the tools stay
    long = [talk[0], {"role": "user", "content": "x" * 50}, TALK[2], talk[1]]
    assert chat_prompt(long, LLAMA, room) == render_chat(talk, LLAMA, True)[0]


def test_a_thought_is_no_part_of_the_message_and_a_call_after_it_is_one():
    template = Template(QWEN3)

    def ids(*parts):
        special = QWEN3.special
        return [i for p in parts for i in ([special[p]] if p in special else QWEN3.encode(p))]

    think = "<think>", "\nHm. <b>\n", "</think>", "\n\n"
    assert template.parse(ids(*think, "Hello!", "<|im_end|>")) == TALK[2]
    call = "<tool_call>", '\n{"name": "search", "arguments": {"type": "豪华型"}}\n', "</tool_call>"
    assert template.parse(ids(*think, *call)) == TALK[4]
    assert template.parse(ids(*think, "I look.\n", *call)) == TALK[4]
    assert template.parse(ids("<think>", "\nHm")) == {"role": "assistant", "content": ""}
    assert template.is_call(ids(*think, *call)) and not template.is_call(ids(*think, "Hello!"))
    result = render_chat(TALK[4:6], QWEN3)[0]
    assert result.count(QWEN3.special["<tool_response>"]) == 1
    for name in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        assert QWEN3.special[name] in template.spoken


TRICKY = "Say <|end|> and <|assistant|><|call|> <|endoftext|> naïve 你好，世界 👩‍👩‍👧 \n\n x"


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


# ---- the chat template ---------------------------------------------------------------------


@pytest.fixture(params=["byte", "char", "bpe:300", "gpt2", "cl100k_base"])
def plain(request, monkeypatch):
    if request.param in ("gpt2", "cl100k_base"):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(real("tiktoken")))
    return prepare_data.make_tokenizer(request.param, [("", [TRICKY * 9])], 9)


def test_special_tokens_stand_behind_the_vocabulary_and_the_spec_travels_as_json(plain):
    chat = plain.with_special(CHAT_TOKENS)
    assert [chat.special[n] for n in CHAT_TOKENS] == list(range(plain.n_vocab, plain.n_vocab + 6))
    assert (chat.n_vocab, chat.eos_id) == (plain.n_vocab + 6, plain.eos_id)
    assert chat.encode(TRICKY) == plain.encode(TRICKY) and chat.name == plain.name
    again = Tokenizer(json.loads(json.dumps(chat.spec)))
    assert again.special == chat.special and again.encode(TRICKY) == chat.encode(TRICKY)
    assert chat.with_special(CHAT_TOKENS).spec == chat.spec == again.spec
    more = chat.with_special([CHAT_TOKENS[0], "<|label:a|(*b|>"])
    assert more.special["<|label:a|(*b|>"] == chat.n_vocab == more.n_vocab - 1


def test_a_prompt_is_the_beginning_of_the_row_with_its_answer(plain):
    chat = plain.with_special(CHAT_TOKENS)
    roles = ["system", "user", "call", "tool", "assistant", "user", "assistant"]
    talk = [turn(role, TRICKY[i:]) for i, role in enumerate(roles)]
    ids, mask = render_chat(talk, chat)
    parts = [render_chat([m], chat) for m in talk]
    assert [ids, mask] == [joined(column) for column in zip(*parts)]
    for i, m in enumerate(talk):
        if m["role"] in ("assistant", "call"):
            prompt, nothing = render_chat(talk[:i], chat, add_generation_prompt=True)
            assert prompt == ids[: len(prompt)] and mask[len(prompt)] == 1
            assert sum(nothing) == sum(mask[: len(prompt)])
    specials = [chat.decode([i]) for i in ids if i in chat.special.values()]
    wanted = joined([*ROLES[m["role"]], "<|end|>"] for m in talk)
    assert specials == wanted  # and none from the text, whatever it spells
    assert chat.decode(parts[1][0][1:-1]) == talk[1]["content"]


def rendered(*messages):
    return render_chat(messages, CHAT)[0]


# ---- prompts and answers -------------------------------------------------------------------


def test_a_prompt_drops_whole_turns_from_the_oldest_on_and_keeps_the_system_s():
    talk = [turn("system", "be kind"), turn("user", "a" * 9), turn("assistant", "b" * 9),
            turn("user", "c" * 9)]
    whole = [*rendered(*talk), ASSISTANT]
    assert chat_prompt(talk, CHAT, len(whole)) == whole
    left = [*rendered(talk[0], *talk[2:]), ASSISTANT]
    assert chat_prompt(talk, CHAT, len(whole) - 1) == left
    assert chat_prompt(talk, CHAT, len(left)) == left
    last = [*rendered(talk[0], talk[3]), ASSISTANT]
    assert chat_prompt(talk, CHAT, len(left) - 1) == last
    assert chat_prompt(talk, CHAT, 18) == [
        *rendered(talk[0]), *CHAT.encode("c" * 7), END, ASSISTANT
    ]


def test_no_prompt_is_longer_than_its_room_and_all_end_where_the_answer_begins():
    rng = random.Random(0)
    for _ in range(300):
        talk = [turn(rng.choice(("user", "assistant", "call", "tool")), "x" * rng.randrange(30))
                for _ in range(rng.randint(1, 6))]
        talk = [turn("system", "s" * rng.randrange(20))] * rng.randint(0, 1) + talk
        room = rng.randint(1, 120)
        ids = chat_prompt(talk, CHAT, room)
        assert len(ids) <= room and ids[-1] == ASSISTANT
        body, whole = ids[:-1], rendered(*talk)
        head = rendered(talk[0]) if talk[0]["role"] == "system" else []
        if body[: len(head)] == head:
            body = body[len(head) :]
        else:  # the question needs the system's place
            assert len(head) > room // 2 and len(head) + len(rendered(talk[-1])) + 1 > room
            whole = rendered(talk[-1])
        assert whole[len(whole) - len(body) :] == body  # the newest, word for word
        one = len(rendered(talk[-1]))
        if len(head) + one + 1 <= room:  # then only whole turns are missing
            assert len(body) >= one and body[0] in (USER, ASSISTANT, TOOL, SYSTEM)


def test_ids_are_read_as_an_answer_or_as_a_call():
    spoken = Template(CHAT).parse([*CHAT.encode("你好 <|call|>"), END])
    assert spoken == turn("assistant", "你好 <|call|>")
    ids = [CALL, *CHAT.encode('search {"name": "x"}'), END]
    assert Template(CHAT).parse(ids) == turn("call", 'search {"name": "x"}')
    assert Template(CHAT).parse([104, CALL, 105]) == turn("assistant", "hi")
    assert Template(CHAT).parse([]) == turn("assistant", "")


def test_labels_come_from_the_tokenizer_alone():
    names = ["neg", "a b", "<|x|>", "好"]
    tokenizer = CHAT.with_special([label_token(n) for n in names])
    assert labels_of(tokenizer) == names and labels_of(CHAT) == []


def names(found):
    return [h["name"] for h in found]
