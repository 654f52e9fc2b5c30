"""Conversations in the families' own templates: the texts that their model cards show."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample
from prepare_data import (
    CHAT_TOKENS,
    DataError,
    Template,
    Tokenizer,
    call_text,
    render_chat,
)

BYTE = Tokenizer({"kind": "byte"})
QWEN = BYTE.with_special(
    ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
)
SMOL = BYTE.with_special(["<|im_start|>", "<|im_end|>"])
LLAMA = BYTE.with_special(
    ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
)
LLAMA.begin = LLAMA.special["<|begin_of_text|>"]
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
            assert sample.chat_prompt(TALK[:i], tokenizer, 10_000) == prompt


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
        ids = sample.chat_prompt(TALK[:4], tokenizer, room)
        assert len(ids) <= room and tokenizer.decode(ids).endswith(f"A room?{end(template)}{begin}")
        assert ids[: len(template.start)] == template.start


def end(template):
    after = "\n" if template.kind == "chatml" else ""
    return template.tokenizer.decode([template.end]) + after


def test_our_own_tokens_win_and_a_tokenizer_without_any_is_refused():
    assert Template(QWEN.with_special(CHAT_TOKENS)).kind == "ours"
    with pytest.raises(DataError, match="no special tokens for a chat"):
        Template(BYTE)
