"""Chat templates of the Hub's families, rendered by us and by transformers: the same ids."""

import copy
import functools
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

transformers = pytest.importorskip("transformers")
from jinja2 import TemplateError
from test_hf_tokenizer import trained, write
from tokenizers import AddedToken

from data.chat import render_chat
from data.hf_tokenizer import hub_tokenizer
from data.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------
# Twelve families: templates that write what the public ones do
# --------------------------------------------------------------------------------------------

ALTERNATE = "{{- raise_exception('Conversation roles must alternate user/assistant/...') }}"
CHATML_TOOLS = r"""{{- '# Tools\n\nYou may call one or more functions to assist with the user ' }}
{{- 'query.\n\nYou are provided with function signatures within <tools></tools> XML tags:' }}
{{- '\n<tools>' }}{%- for t in tools %}{{- '\n' + t | tojson }}{%- endfor %}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and ' }}
{{- 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": ' }}
{{- '<function-name>, "arguments": <args-json-object>}\n</tool_call>' }}"""
THOUGHTS = r"""{{- '<|im_start|>assistant\n' }}{%- set thought = m.reasoning_content or '' %}
{%- if m.reasoning_content is not string and '</think>' in text %}
{%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{%- if loop.index0 > last.query and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}
{%- else %}{{- text }}{%- endif %}"""
CHATML = r"""{%- set given = messages[0].role == 'system' %}
{%- set own = messages[0].content if given else DEFAULT %}
{%- if given or own or tools %}{{- '<|im_start|>system\n' + own }}
{%- if tools %}{{- '\n\n' if given or own }}TOOLS{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}
{%- set last = namespace(query=messages | length - 1) %}
{%- for m in messages %}
{%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}
{%- set last.query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- set text = m.content if m.content is string else '' %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}ASSISTANT
{%- for c in m.tool_calls or [] %}{{- '\n' if text or not loop.first }}
{{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
{{- '\n<tool_response>\n' + text + '\n</tool_response>' }}
{{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"""


def chatml(default, assistant=r"{{- '<|im_start|>assistant\n' + text }}"):
    """ChatML with tools; `default` is Jinja for the system's text where there is none."""
    parts = {"DEFAULT": default, "TOOLS": CHATML_TOOLS, "ASSISTANT": assistant}
    return functools.reduce(lambda text, part: text.replace(*part), parts.items(), CHATML)


LLAMA3 = r"""
{%- macro head(role) %}{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{%- endmacro %}
{{- bos_token }}{%- if date_string is not defined %}{%- set date_string = DATE %}{%- endif %}
{%- set own = '' %}{%- if messages[0].role == 'system' %}
{%- set own = messages[0].content | trim %}{%- set messages = messages[1:] %}{%- endif %}
{{- head('system') + ('Environment: ipython\n' if tools is not none else '') }}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + own }}
{{- '<|eot_id|>' }}
{%- if tools is not none %}{%- if not messages %}{{- raise_exception('no user turn') }}{%- endif %}
{{- head('user') + 'Given the following functions, please respond with a JSON for a function ' }}
{{- 'call with its proper arguments that best answers the given prompt.\n\nRespond in the ' }}
{{- 'format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{{- 'Do not use variables.\n\n' }}{%- for t in tools %}{{- t | tojson(indent=4) + '\n\n' }}
{%- endfor %}{{- messages[0].content | trim + '<|eot_id|>' }}
{%- set messages = messages[1:] %}{%- endif %}
{%- for m in messages %}{%- if 'tool_calls' in m %}{%- if m.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}
{%- set c = m.tool_calls[0].function %}{{- head('assistant') + '{"name": "' + c.name }}
{{- '", "parameters": ' + c.arguments | tojson + '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{- head('ipython') }}
{{- (m.content | tojson if m.content is iterable else m.content) + '<|eot_id|>' }}
{%- else %}{{- head(m.role) + m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}"""

SMOLLM2 = r"""{% for m in messages %}{% if loop.first and m.role != 'system' %}
{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face' }}
{{- '<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA2 = r"""{%- set own = '' %}{%- set turns = messages %}{%- if messages[0].role == 'system' %}
{%- set own = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- set turns = messages[1:] %}{%- endif %}{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}ALTERNATE{%- endif %}
{%- if m.role == 'user' %}{%- set text = (own if loop.first else '') + m.content %}
{{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + m.content.strip() + ' ' + eos_token }}{%- endif %}{%- endfor %}"""

MISTRAL = r"""{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- set users, ns = turns | selectattr('role', 'equalto', 'user') | list, namespace(n=0) %}
{%- for m in turns %}{%- if m.role != 'tool' and m.tool_calls is not defined %}
{%- if (m.role == 'user') != (ns.n % 2 == 0) %}ALTERNATE{%- endif %}
{%- set ns.n = ns.n + 1 %}{%- endif %}{%- endfor %}
{{- bos_token }}{%- for m in turns %}{%- if m.role == 'user' %}
{%- if tools is not none and m == users[-1] %}{{- '[AVAILABLE_TOOLS] [' }}{%- for t in tools %}
{{- '{"type": "function", "function": {' }}
{%- for key, value in t.function.items() if key != 'return' %}
{{- '"' + key + '": ' + ('"' + value + '"' if value is string else value | tojson) }}
{{- ', ' if not loop.last }}{%- endfor %}{{- '}}' + (']' if loop.last else ', ') }}{%- endfor %}
{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- set own = messages[0].content + '\n\n' if loop.last and turns != messages else '' %}
{{- '[INST] ' + own + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}
{%- if c.id is not defined or c.id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}
{{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}
{{- ']' + eos_token if loop.last else ', ' }}{%- endfor %}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {"content": ' + m.content | string }}
{{- ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}
{%- endif %}{%- endfor %}"""

GLM4 = """[gMASK]<sop>
{%- if tools %}
<|system|>
# 可用工具
    {%- for t in tools %}
{{ '\\n\\n## ' + t.function.name + '\\n' }}
{{ t.function | tojson(indent=4, ensure_ascii=False) }}
在调用上述函数时，请使用 Json 格式表示调用的参数。
    {%- endfor %}
{%- endif %}
{%- for m in messages %}
    {%- if m.content %}
<|{{ 'observation' if m.role == 'tool' else m.role }}|>
{{ m.content }}
    {%- endif %}
    {%- for c in m.tool_calls or [] %}
<|assistant|>{{ c.function.name }}
{{ c.function.arguments | tojson }}
    {%- endfor %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

MINICPM = """{% for m in messages %}
{% if m.role == 'user' %}{{ '<用户>' + m.content.strip() + '<AI>' }}
{%- else %}{{ m.content.strip() }}{% endif %}{% endfor %}"""

GEMMA = r"""{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != loop.index is odd %}ALTERNATE{% endif %}
{{- '<start_of_turn>' + {'assistant': 'model'}.get(m.role, m.role) + '\n' }}
{{- m.content | trim + '<end_of_turn>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

PHI3 = r"""{%- for m in messages if m.role in ('system', 'user', 'assistant') %}
{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}"""


class Family(NamedTuple):
    """A template, the names of bos (None: none) and eos, more special tokens, what is learned of an
    assistant's {}, tokens that are not special, variables to try."""

    template: str
    bos: str
    eos: str
    special: str
    learned: str
    words: str = ""
    variables: tuple = ({},)


DATES, END, IM, EOT = ({}, {"date_string": "1 Jan 2030"}), "<|endoftext|>", "<|im_end|>", "<|eot_id|>"
HEADS, CALL_WORDS = "<|start_header_id|> <|end_header_id|>", "<tool_call> </tool_call>"
THINK_WORDS = CALL_WORDS + " <think> </think> <tool_response> </tool_response>"
ALIBABA = "'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'"
NOW, HELPFUL = "strftime_now('%d %b %Y')", "('' if tools else 'You are a helpful assistant')"
INST = "[INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS]"
GLM_WORDS = "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>"
PHI_WORDS = "<|system|> <|user|> <|assistant|> <|end|>"
FAMILIES = {
    name: Family(template.replace("ALTERNATE", ALTERNATE), *rest)
    for name, template, *rest in (
        ("qwen2.5", chatml(ALIBABA), None, IM, f"<|im_start|> {END}", "{}<|im_end|>", CALL_WORDS),
        (
            "qwen3", chatml("''", THOUGHTS), None, IM, f"<|im_start|> {END}",
            "<think>\n\n</think>\n\n{}<|im_end|>", THINK_WORDS,
            ({}, {"enable_thinking": False}, {"enable_thinking": True}),
        ),
        ("smollm2", SMOLLM2, "<|im_start|>", IM, END, "{}<|im_end|>"),
        (
            "llama3.1", LLAMA3.replace("DATE", "'26 Jul 2024'"), "<|begin_of_text|>", EOT, HEADS,
            "{}<|eot_id|>", "", DATES,
        ),
        (
            "llama3.2", LLAMA3.replace("DATE", NOW), "<|begin_of_text|>", EOT, HEADS,
            "{}<|eot_id|>", "", DATES,
        ),
        ("llama2", LLAMA2, "<s>", "</s>", "<unk>", " {} </s>"),
        ("mistral", MISTRAL, "<s>", "</s>", f"{INST} [/TOOL_RESULTS]", " {}</s>"),
        ("glm4", GLM4, None, END, GLM_WORDS, "\n{}"),
        ("minicpm", MINICPM, "<s>", "</s>", "<用户> <AI>", "{}"),
        ("gemma", GEMMA, "<bos>", "<eos>", "<start_of_turn> <end_of_turn>", "{}<end_of_turn>"),
        ("phi3", PHI3, "<s>", END, PHI_WORDS, "{}<|end|>"),
        ("minimind", chatml(HELPFUL), "<|im_start|>", IM, END, "{}<|im_end|>", CALL_WORDS),
    )
}
WITH_TOOLS = [name for name, family in FAMILIES.items() if "tools" in family.template]

# --------------------------------------------------------------------------------------------
# Conversations
# --------------------------------------------------------------------------------------------


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def called(*calls, content=None, **more):
    """An assistant's turn with calls (name, arguments), whose ids have nine characters."""
    calls = [
        {"id": f"call{i:05}", "type": "function", "function": {"name": name, "arguments": a}}
        for i, (name, a) in enumerate(calls)
    ]
    return said("assistant", content, tool_calls=calls, **more)


def result(content, i=0):
    return said("tool", content, tool_call_id=f"call{i:05}")


def schema(name, **properties):
    function = {"name": name, "description": f"Look up a {name}; 查询 <b>it's</b> & more"}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": function | {"parameters": parameters}}


TOOLS = [
    schema("hotel", type={"type": "string", "enum": ["豪华型", "经济型"]}, price={"type": "number"}),
    schema("sky", z={"type": "array", "items": {"type": "number"}}, a={"type": "string"}),
]
MESSY = {"z": [[2, 1.0], {"b": None, "a": True}], "价格": 500.0, "é": 'a "b"\n<c>', "a": [], "n": {}}
USER, BOT = said("user", "Hi there!"), said("assistant", "Hello!")
SYSTEM, CALL = said("system", "Be kind."), called(("hotel", {"type": "豪华型", "price": 500.0}))
THOUGHT = BOT | {"reasoning_content": "One.\nTwo?"}
WRITTEN = said("assistant", "<think>\nOne.\nTwo?\n</think>\n\nHello!")
TALKS = {
    "plain": [USER],
    "answered": [USER, BOT],
    "system": [SYSTEM, USER, BOT],
    "turns": [USER, BOT, USER, said("assistant", "Again?"), USER],
    "a later system": [SYSTEM, USER, BOT, said("system", "Be brief."), USER, BOT],
    "chinese": [said("system", "你是助手。"), said("user", "你好，👩‍👧！"), said("assistant", "您好！")],
    "blanks": [said("system", "\n\nA \n"), said("user", "\n  b\n\n"), said("assistant", "c  \n")],
    "empty": [said("system", ""), said("user", ""), said("assistant", "")],
    "two of a role": [USER, USER, BOT],
    "thoughts": [USER, THOUGHT, USER, THOUGHT],
    "a thought": [USER, BOT, USER, THOUGHT, USER, BOT],
    "thoughts in the text": [USER, WRITTEN, USER, WRITTEN],
    "a call": [SYSTEM, USER, CALL],
    "a result": [USER, CALL, result('{"name": "好"}'), said("assistant", "Found it.")],
    "calls": [
        USER, called(("hotel", {}), ("sky", MESSY), content=""), result("a b"), result("\n", 1),
        BOT, USER, CALL, result("[]"), BOT,
    ],
    "text and a call": [USER, called(("sky", MESSY), content="I look.\nNow."), result("sunny")],
    "thoughts and calls": [
        USER, THOUGHT, USER, called(("sky", {}), reasoning_content="Hm."), result("rain"),
        called(("sky", MESSY), content="More.", reasoning_content="So."), result("1"), THOUGHT,
    ],
    "a short id": [USER, said("assistant", "", tool_calls=[CALL["tool_calls"][0] | {"id": "1"}])],
}
# Templates without tools leave calls out, or fail in Jinja's own words: these are no cases.
CASES = [
    (family, talk)
    for family, (talk, messages) in itertools.product(FAMILIES, TALKS.items())
    if family in WITH_TOOLS or not any("tool_calls" in m for m in messages)
]
every_case = pytest.mark.parametrize("family, talk", CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    return functools.cache(lambda family: make_folder(tmp_path_factory.mktemp("family"), family))


def make_folder(folder, name):
    """A family's tokenizer. One end of text is an object, as in older files. Answers end with
    generation_config.json's token, but templates write tokenizer_config.json's."""
    family = FAMILIES[name]
    names = dict.fromkeys([*filter(None, (family.bos, family.eos)), *family.special.split()])
    theirs = trained(behind=list(names))
    theirs.add_tokens([AddedToken(w, normalized=False) for w in family.words.split()])
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    eos = {"__type": "AddedToken", "content": family.eos, **flags}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": family.template}
    config |= {"bos_token": family.bos, "eos_token": eos if name == "llama2" else family.eos}
    other = {"eos_token_id": theirs.token_to_id(family.special.split()[-1])}
    return write(folder, theirs, tokenizer_config=config, generation_config=other)


def both(folder):
    """Our Tokenizer and transformers' of a folder; our spec has been through JSON."""
    ours = Tokenizer(json.loads(json.dumps(hub_tokenizer(folder))))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def pair(folder_of, family):
    return both(folder_of(family))


def rendered(theirs, messages, tools=None, prompt=False, tokenize=False, **variables):
    """The text or the ids that transformers makes of a conversation, or its TemplateError."""
    try:
        return theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=tokenize,
            return_dict=False, **variables,
        )
    except TemplateError as e:
        return e


# --------------------------------------------------------------------------------------------
# The same ids, and what is learned of them
# --------------------------------------------------------------------------------------------


@every_case
def test_ids_are_those_of_transformers(family, talk, pair):
    (ours, theirs), before = pair, copy.deepcopy(TALKS[talk])
    for tools, prompt, more in itertools.product(
        (None, TOOLS), (False, True), FAMILIES[family].variables
    ):
        want = rendered(theirs, TALKS[talk], tools, prompt, True, **more)
        given = {"tools": tools, "add_generation_prompt": prompt, **more}
        if isinstance(want, TemplateError):
            with pytest.raises(ValueError) as e:
                render_chat(TALKS[talk], ours, **given)
            assert str(want) in str(e.value)
        else:
            ids, mask = render_chat(TALKS[talk], ours, **given)
            assert ours.decode(ids) == theirs.decode(want), given
            assert ids == want and len(mask) == len(ids), given
    assert TALKS[talk] == before


def learned(ours, ids, mask):
    """The text of each run of ids with mask 1."""
    runs = itertools.groupby(zip(ids, mask), lambda pair: pair[1])
    return [ours.decode([i for i, _ in run]) for m, run in runs if m]


def endings(family, own):
    """What may be learned of a turn: GLM-4 and MiniCPM write no end, so the next turn's first token
    or the end of text may be learned as one."""
    f = FAMILIES[family]
    return [own] + [own + end for end in f"{f.eos} {f.special}".split() if f.learned.endswith("{}")]


def turns(theirs, messages, family, tools, **variables):
    """(prompt, what the assistant writes behind it up to its end) of each of its turns, as text;
    None where the prompt is written otherwise once it is answered, or nothing is."""
    end = FAMILIES[family].learned.split("{}")[1].strip()
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            before = rendered(theirs, messages[:i], tools, True, **variables)
            after = rendered(theirs, messages[: i + 1], tools, **variables)
            own = after.removeprefix(before)
            own = own[: own.index(end) + len(end)] if end else own
            yield (before, own) if own and after.startswith(before) else None


@every_case
def test_what_is_learned_is_what_the_assistant_wrote(family, talk, pair):
    ours, theirs = pair
    last = max((i for i, m in enumerate(TALKS[talk]) if m["role"] == "assistant"), default=0)
    messages = TALKS[talk][: last + 1]
    for tools, more in itertools.product((None, TOOLS), FAMILIES[family].variables):
        whole = rendered(theirs, messages, tools, **more)
        if not last or isinstance(whole, TemplateError):
            continue
        wrote = list(turns(theirs, messages, family, tools, **more))
        ids, mask = render_chat(messages, ours, tools=tools, **more)
        got = learned(ours, ids, mask)
        if all(turn and whole.startswith("".join(turn)) for turn in wrote):  # no history rewritten
            assert len(got) == len(wrote), more
            assert all(g in endings(family, own) for g, (_, own) in zip(got, wrote)), more
        if wrote[-1]:
            assert got[-1] in endings(family, wrote[-1][1]), more
            prompt, nothing = render_chat(messages[:last], ours, True, tools=tools, **more)
            assert prompt == ids[: len(prompt)] and mask[len(prompt)] == 1
            assert len(nothing) == len(prompt)


IM, HEAD = "<|im_start|>{}\n{}<|im_end|>\n", "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
ASKED, TOLD = IM.format("user", "Hi there!") + IM.format("assistant", "Hello!"), "<|begin_of_text|>"
TOLD += HEAD.format("system", "Cutting Knowledge Date: December 2023\nToday Date: 1 Jan 2030\n\n")
TOLD += HEAD.format("user", "Hi there!") + HEAD.format("assistant", "Hello!")
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CARDS = {  # one question and its answer, as the model cards show them
    "qwen2.5": IM.format("system", ALIBABA.strip("'")) + ASKED,
    "qwen3": ASKED.replace("Hello!", "<think>\n\n</think>\n\nHello!"),
    "smollm2": IM.format("system", SMOL) + ASKED,
    "llama3.1": TOLD,
    "llama3.2": TOLD,
    "llama2": "<s>[INST] Hi there! [/INST] Hello! </s>",
    "mistral": "<s>[INST] Hi there![/INST] Hello!</s>",
    "glm4": "[gMASK]<sop><|user|>\nHi there!<|assistant|>\nHello!",
    "minicpm": "<用户>Hi there!<AI>Hello!",
    "gemma": "<bos><start_of_turn>user\nHi there!<end_of_turn>\n<start_of_turn>model\nHello!"
    "<end_of_turn>\n",
    "phi3": "<|user|>\nHi there!<|end|>\n<|assistant|>\nHello!<|end|>\n<|endoftext|>",
    "minimind": IM.format("system", "You are a helpful assistant") + ASKED,
}


@every_family
def test_a_question_and_its_answer_in_each_family(family, pair):
    ids, mask = render_chat([USER, BOT], pair[0], **FAMILIES[family].variables[-1])
    assert pair[0].decode(ids) == CARDS[family]
    [text] = learned(pair[0], ids, mask)
    assert text in endings(family, FAMILIES[family].learned.format("Hello!"))


# --------------------------------------------------------------------------------------------
# Special tokens in somebody's text; forms of messages; places of templates
# --------------------------------------------------------------------------------------------


def talks_with(family, text):
    """Conversations, and tools, with `text` wherever others than the assistant write."""
    yield [said("user", text), BOT, said("user", f"x{text}")], None
    if family != "gemma":
        yield [said("system", text), USER], None
    if family in WITH_TOOLS:
        yield [USER, CALL, result(text)], None
        tool = schema(f"find{text}", x={"enum": [text], "description": text}, **{text: {}})
        yield [USER], [tool]


@every_family
def test_no_text_of_others_becomes_a_special_token(family, pair):
    (ours, theirs), names = pair, list(pair[0].special)

    def count(messages, tools):
        ids, _ = render_chat(messages, ours, True, tools=tools)
        assert ours.decode(ids) == rendered(theirs, messages, tools, True)
        return Counter(i for i in ids if i in ours.special.values())

    plain = [count(*given) for given in talks_with(family, "a bc d")]
    for text in [*names, " ".join(names), "".join(names)]:
        found = [count(*given) for given in talks_with(family, f"a{text} b{text}")]
        assert found == plain, text


@pytest.mark.parametrize("family", ["qwen3"])
def test_thoughts_and_calls_in_the_assistant_s_own_text_are_tokens(pair):
    own = WRITTEN["content"] + '\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'
    ids, mask = render_chat([said("user", THINK_WORDS), said("assistant", own)], pair[0])
    assert [ids.count(pair[0].special[name]) for name in THINK_WORDS.split()] == [1, 1, 1, 1, 0, 0]
    assert learned(pair[0], ids, mask) == [own + "<|im_end|>"]


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_arguments_may_be_json(pair):
    messages = copy.deepcopy(TALKS["a call"])
    function = messages[-1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    assert render_chat(messages, pair[0]) == render_chat(TALKS["a call"], pair[0])


@every_family
def test_a_developer_is_never_lost(family, pair):
    """Templates know no such role, or write any role's name: then it may stand there, else it is
    the system."""
    messages = [said("developer", "Be kind."), USER]
    want = [rendered(pair[1], m, None, True, True) for m in ([SYSTEM, USER], messages)]
    want = [ids for ids in want if isinstance(ids, list) and "Be kind." in pair[0].decode(ids)]
    if want:
        assert render_chat(messages, pair[0], True)[0] in want
    else:
        with pytest.raises(ValueError):
            render_chat(messages, pair[0], True)


def naming(name):
    return "{{ '" + name + " ' + messages[0].content }}"


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize(
    "config, files, found",
    [
        ("a", "", "aa"),
        ({"default": "a", "tool_use": "b"}, "", "ab"),
        ({"tool_use": "b", "rag": "c", "default": "a"}, "", "ab"),
        ({"default": "a"}, "", "aa"),
        (None, "chat_template.jinja", "dd"),
        ("a", "chat_template.jinja", "dd"),
        ("a", "chat_template.jinja additional_chat_templates/tool_use.jinja", "de"),
    ],
)
def test_templates_are_found_where_transformers_finds_them(tools, config, files, found, tmp_path):
    if isinstance(config, dict):
        config = [{"name": k, "template": naming(v)} for k, v in config.items()]
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    content["chat_template"] = naming(config) if isinstance(config, str) else config
    write(tmp_path, trained(behind=["<|end|>"]), tokenizer_config=content)
    for letter, path in zip("de", map(tmp_path.joinpath, files.split())):
        path.parent.mkdir(exist_ok=True)
        path.write_text(naming(letter), encoding="utf-8")
    ours, theirs = both(tmp_path)
    want = rendered(theirs, [USER], tools, tokenize=True)
    assert theirs.decode(want) == f"{found[bool(tools)]} Hi there!"
    assert render_chat([USER], ours, tools=tools)[0] == want
