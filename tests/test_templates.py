"""Chat templates of the Hub's families, rendered by us and by transformers: the same ids."""

import contextlib
import copy
import functools
import itertools
import json
import re
import tempfile
from collections import Counter, namedtuple

import pytest
from conftest import render_chat

transformers = pytest.importorskip("transformers")
from jinja2 import TemplateError
from test_hf_tokenizer import trained, write
from tokenizers import AddedToken

from data.chat import get_template
from data.hf_tokenizer import hub_tokenizer
from data.tokenizer import Tokenizer

CHATML = r"""{%- set given = messages[0].role == 'system' %}
{%- set own = messages[0].content if given else usual %}
{%- if given or own or tools %}{{- '<|im_start|>system\n' + own }}
{%- if tools %}{{- '\n\n' if given or own }}
{{- '# Tools\n\nYou may call one or more functions:\n<tools>' }}
{%- for t in tools %}{{- '\n' + t | tojson }}{%- endfor %}
{{- '\n</tools>\n\nFor each call, return\n<tool_call>\n{"name": ' }}
{{- '<function-name>, "arguments": <args-json-object>}\n</tool_call>' }}{%- endif %}
{{- '<|im_end|>\n' }}{%- endif %}{%- set last = namespace(query=messages | length - 1) %}
{%- for m in messages %}
{%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}
{%- set last.query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- set text = m.content if m.content is string else '' %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{%- set thought = m.reasoning_content or '' %}
{%- if thinks and m.reasoning_content is not string and '</think>' in text %}
{%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if thinks and loop.index0 > last.query and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}
{%- else %}{{- text }}{%- endif %}
{%- for c in m.tool_calls or [] %}{{- '\n' if text or not loop.first }}
{{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
{{- '\n<tool_response>\n' + text + '\n</tool_response>' }}
{{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"""
QWEN3 = "{% set usual, thinks = '', true %}" + CHATML
QWEN25 = "{% set usual = 'You are a helpful assistant.' %}"
MINIMIND = "{% set usual = '' if tools else 'You are a helpful assistant' %}"
LLAMA3 = r"""{%- macro head(role) %}{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
{%- endmacro %}{{- bos_token }}{%- if date_string is not defined %}
{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- set own = '' %}
{%- if messages[0].role == 'system' %}{%- set own = messages[0].content | trim %}
{%- set messages = messages[1:] %}{%- endif %}
{{- head('system') + ('Environment: ipython\n' if tools is not none else '') }}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + own }}
{{- '<|eot_id|>' }}{%- if tools is not none %}{%- if not messages %}
{{- raise_exception('no user turn') }}{%- endif %}
{{- head('user') + 'Respond in the format {"name": function name, "parameters": ...}.\n\n' }}
{%- for t in tools %}{{- t | tojson(indent=4) + '\n\n' }}
{%- endfor %}{{- messages[0].content | trim + '<|eot_id|>' }}{%- set messages = messages[1:] %}
{%- endif %}{%- for m in messages %}{%- if 'tool_calls' in m %}{%- if m.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}
{%- set c = m.tool_calls[0].function %}{{- head('assistant') + '{"name": "' + c.name }}
{{- '", "parameters": ' + c.arguments | tojson + '}<|eot_id|>' }}{%- elif m.role == 'tool' %}
{{- head('ipython') }}
{{- (m.content | tojson if m.content is iterable else m.content) + '<|eot_id|>' }}{%- else %}
{{- head(m.role) + m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}"""
MISTRAL = r"""{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- set users, ns = turns | selectattr('role', 'equalto', 'user') | list, namespace(n=0) %}
{%- for m in turns %}{%- if m.role != 'tool' and m.tool_calls is not defined %}
{%- if (m.role == 'user') != (ns.n % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate') }}{%- endif %}{%- set ns.n = ns.n + 1 %}
{%- endif %}{%- endfor %}{{- bos_token }}{%- for m in turns %}{%- if m.role == 'user' %}
{%- if tools is not none and m == users[-1] %}{{- '[AVAILABLE_TOOLS] [' }}{%- for t in tools %}
{{- '{"type": "function", "function": {' }}
{%- for key, value in t.function.items() if key != 'return' %}
{{- '"' + key + '": ' + ('"' + value + '"' if value is string else value | tojson) }}
{{- ', ' if not loop.last }}{%- endfor %}{{- '}}' + (']' if loop.last else ', ') }}{%- endfor %}
{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- set own = messages[0].content + '\n\n' if loop.last and turns != messages else '' %}
{{- '[INST] ' + own + m.content + '[/INST]' }}{%- elif m.tool_calls is defined %}
{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}
{%- if c.id is not defined or c.id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}
{{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}
{{- ']' + eos_token if loop.last else ', ' }}{%- endfor %}{%- elif m.role == 'assistant' %}
{{- ' ' + m.content | trim + eos_token }}{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | string }}
{{- ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}{%- else %}
{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}"""
GLM4 = r"""[gMASK]<sop>
{%- if tools %}
<|system|>
# 可用工具
    {%- for t in tools %}
{{ '\n\n## ' + t.function.name + '\n\n' + t.function | tojson(indent=4, ensure_ascii=False) }}
在调用上述函数时，请使用 Json 格式表示调用的参数。
    {%- endfor %}
{%- endif %}
{%- for m in messages %}{% if m.content %}
<|{{ 'observation' if m.role == 'tool' else m.role }}|>
{{ m.content }}{% endif %}
    {%- for c in m.tool_calls or [] %}
<|assistant|>{{ c.function.name + '\n' + c.function.arguments | tojson }}{% endfor %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
GEMMA = r"""{{ bos_token }}{%- if messages[0].role == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}{%- for m in messages %}
{% if (m.role == 'user') != loop.index is odd %}
{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + {'assistant': 'model'}.get(m.role, m.role) + '\n' }}
{{- m.content | trim + '<end_of_turn>\n' }}{%- endfor %}{%- if add_generation_prompt %}
{{ '<start_of_turn>model\n' }}{% endif %}"""
PHI3 = r"""{%- for m in messages if m.role in ('system', 'user', 'assistant') %}
{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}"""

# `special` are further special tokens, `learned` is what is learned of an assistant's text {},
# `words` are added tokens that are not special, `variables` are those of a template.
FIELDS = "template bos eos special learned words variables"
Family = namedtuple("Family", FIELDS, defaults=("{}<|im_end|>", "", ({},)))
START, IM, BEGIN, END = "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|endoftext|>"
CALLS, SIDES = "<tool_call> </tool_call>", "<|system|> <|user|> <|assistant|>"
THINKS = f"{CALLS} <think> </think> <tool_response> </tool_response>"
HEAD, DATES = "<|start_header_id|> <|end_header_id|>", ({}, {"date_string": "1 Jan 2030"})
LLAMA = (BEGIN, "<|eot_id|>", HEAD, "{}<|eot_id|>", "", DATES)
INST = "[INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS]"
FAMILIES = {
    "qwen2.5": Family(QWEN25 + CHATML, None, IM, f"{START} {END}", words=CALLS),
    "qwen3": Family(QWEN3, None, IM, f"{START} {END}", "<think>\n\n</think>\n\n{}<|im_end|>",
                    THINKS, ({}, {"enable_thinking": False}, {"enable_thinking": True})),
    "llama3.1": Family(LLAMA3, *LLAMA),
    "llama3.2": Family(LLAMA3.replace("'26 Jul 2024'", "strftime_now('%d %b %Y')"), *LLAMA),
    "mistral": Family(MISTRAL, "<s>", "</s>", f"{INST} [/TOOL_RESULTS]", " {}</s>"),
    "glm4": Family(GLM4, None, END, f"[gMASK] <sop> {SIDES} <|observation|>", "\n{}"),
    "gemma": Family(GEMMA, "<bos>", "<eos>", "<start_of_turn> <end_of_turn>", "{}<end_of_turn>"),
    "phi3": Family(PHI3, "<s>", END, f"{SIDES} <|end|>", "{}<|end|>"),
    "minimind": Family(MINIMIND + CHATML, START, IM, END, words=CALLS),
}
WITH_TOOLS = [name for name, family in FAMILIES.items() if "tools" in family.template]


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def called(*calls, content=None, **more):
    """An assistant's turn with calls (name, arguments), whose ids have nine characters."""
    calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    calls = [{"id": f"call{i:05}", **call} for i, call in enumerate(calls)]
    return said("assistant", content, tool_calls=calls, **more)


def result(content, i=0):
    return said("tool", content, tool_call_id=f"call{i:05}")


def schema(name, **properties):
    function = {"name": name, "description": f"Look up a {name}; 查询 <b>it's</b> & more"}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": function | {"parameters": parameters}}


TOOLS = [
    schema("hotel", type={"type": "string", "enum": ["豪华型"]}, price={"type": "number"}),
    schema("sky", z={"type": "array", "items": {"type": "number"}}, a={"type": "string"}),
]
MESSY = {"z": [[2, 1.0], {"b": None, "a": True}], "价格": 500.0, "é": 'a "b"\n<c>', "a": []}
USER, BOT = said("user", "Hi there!"), said("assistant", "Hello!")
SYSTEM, CALL = said("system", "Be kind."), called(("hotel", {"type": "豪华型", "price": 500.0}))
THOUGHT = BOT | {"reasoning_content": "One.\nTwo?"}
WRITTEN = said("assistant", "<think>\nOne.\nTwo?\n</think>\n\nHello!")
TALKS = {
    "system": [SYSTEM, USER, BOT],
    "turns": [USER, BOT, USER, said("assistant", "Again?"), USER],
    "a later system": [SYSTEM, USER, BOT, said("system", "Be brief."), USER, BOT],
    "blanks": [said("system", "\n\nA \n"), said("user", "\n  b\n\n"), said("assistant", "c  \n")],
    "empty": [said("system", ""), said("user", ""), said("assistant", "好👩‍👧")],
    "two of a role": [USER, USER, BOT],
    "thoughts": [USER, THOUGHT, USER, THOUGHT],
    "thoughts in the text": [USER, WRITTEN, USER, WRITTEN],
    "a call in the text": [USER, said("assistant", 'So\n<tool_call>\n{"name": "a"}\n</tool_call>')],
    "a call": [SYSTEM, USER, CALL],
    "a result": [USER, CALL, result('{"name": "好"}'), said("assistant", "Found it.")],
    "calls": [USER, called(("hotel", {}), ("sky", MESSY), content=""), result("a b"),
              result("\n", 1), BOT, USER, CALL, result("[]"), BOT],
    "text and a call": [USER, called(("sky", MESSY), content="I look.\nNow."), result("sunny")],
    "thoughts and calls": [
        USER, THOUGHT, USER, called(("sky", {}), reasoning_content="Hm."), result("rain"),
        called(("sky", MESSY), content="More.", reasoning_content="So."), result("1"), THOUGHT],
    "a short id": [USER, said("assistant", "", tool_calls=[CALL["tool_calls"][0] | {"id": "1"}])],
}
# Templates without tools leave calls out, or fail with Jinja's own message: these are no cases.
CALLING = {name for name, messages in TALKS.items() if any("tool_calls" in m for m in messages)}
CASES = [c for c in itertools.product(FAMILIES, TALKS) if c[0] in WITH_TOOLS or c[1] not in CALLING]
every_case = pytest.mark.parametrize("family, talk", CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def both(folder, theirs, **config):
    """(our Tokenizer, transformers') of a tokenizer of theirs. generation_config.json names another
    token that ends answers than the template writes."""
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    other = {"eos_token_id": theirs.get_vocab_size() - 1}
    write(folder, theirs, tokenizer_config=config, generation_config=other)
    ours = Tokenizer(json.loads(json.dumps(hub_tokenizer(folder))))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@functools.cache
def pair(name):
    """The two tokenizers of a family. Mistral's has its eos_token in the old way, as an object."""
    template, bos, eos, special, _, words, _ = FAMILIES[name]
    theirs = trained(behind=list(dict.fromkeys([bos or eos, eos, *special.split()])))
    theirs.add_tokens([AddedToken(word, normalized=False) for word in words.split()])
    eos = {"__type": "AddedToken", "content": eos} if name == "mistral" else eos
    with tempfile.TemporaryDirectory() as folder:
        return both(folder, theirs, chat_template=template, bos_token=bos, eos_token=eos)


def rendered(theirs, messages, tools=None, prompt=False, tokenize=False, **variables):
    """The text or the ids that transformers makes of a conversation, or its TemplateError."""
    how = variables | dict(tools=tools, tokenize=tokenize, return_dict=False)
    try:
        return theirs.apply_chat_template(messages, add_generation_prompt=prompt, **how)
    except TemplateError as e:
        return e


@every_case
def test_ids_are_those_of_transformers(family, talk):
    (ours, theirs), before = pair(family), copy.deepcopy(TALKS[talk])
    options = (None, TOOLS), (False, True), FAMILIES[family].variables
    for tools, prompt, more in itertools.product(*options):
        want = rendered(theirs, TALKS[talk], tools, prompt, True, **more)
        given = {"tools": tools, "add_generation_prompt": prompt, **more}
        if isinstance(want, TemplateError):
            with pytest.raises(ValueError, match=re.escape(str(want))):
                render_chat(TALKS[talk], ours, **given)
        else:
            ids, mask = render_chat(TALKS[talk], ours, **given)
            assert ids == want and len(mask) == len(ids), given
    assert TALKS[talk] == before


def learned(family, ids, mask):
    """The text of each run of ids with mask 1. GLM-4 writes no end of a turn: it may learn the
    token after it as one, which is left out here."""
    ours, runs = pair(family)[0], itertools.groupby(zip(ids, mask), lambda pair: pair[1])
    runs = [[i for i, _ in run] for m, run in runs if m]
    if FAMILIES[family].learned.endswith("{}"):
        runs = [run[:-1] if run[-1] in ours.special.values() else run for run in runs]
    return [ours.decode(run) for run in runs]


def written(theirs, messages, family, tools):
    """(prompt, the text after it up to its end) of each turn of the assistant; None where the
    prompt changes once it is answered, or nothing is written."""
    end = FAMILIES[family].learned.split("{}")[1].strip()
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            before = rendered(theirs, messages[:i], tools, True)
            after = rendered(theirs, messages[: i + 1], tools)
            own = after.removeprefix(before)
            own = own[: own.index(end) + len(end)] if end else own
            yield (before, own) if own and after.startswith(before) else None


@every_case
def test_a_conversation_that_goes_on_has_the_ids_of_the_whole_one(family, talk):
    """Where the template rewrites earlier turns, or ends none, it is refused."""
    template, messages = get_template(pair(family)[0]), TALKS[talk]
    spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    with contextlib.suppress(ValueError):  # the template refuses the conversation
        *rewritten, (whole, mask, _) = template.rows(messages)
        runs = [list(run) for m, run in itertools.groupby(zip(whole, mask), lambda p: p[1]) if m]
        if not spoken[1:]:
            return
        ids = template.prompt_ids(messages[: spoken[0]])
        for run, i, j in zip(runs, spoken, [*spoken[1:], None]):
            ids += [i for i, _ in run]
            ids += template.next_ids(messages[: i + 1], messages[i + 1 : j]) if j else []
        assert not rewritten and ids == whole[: len(ids)] and sum(mask[len(ids) :]) == 0


@every_case
def test_what_is_learned_is_what_the_assistant_wrote(family, talk):
    ours, theirs = pair(family)
    last = max((i for i, m in enumerate(TALKS[talk]) if m["role"] == "assistant"), default=0)
    messages = TALKS[talk][: last + 1]
    for tools in (None, TOOLS):
        text = rendered(theirs, messages, tools)
        if not last or isinstance(text, TemplateError):
            continue
        turns = list(written(theirs, messages, family, tools))
        ids, mask = render_chat(messages, ours, tools=tools)
        got = learned(family, ids, mask)
        if all(turn and text.startswith("".join(turn)) for turn in turns):  # no history rewritten
            assert got == [own for _, own in turns]
        if turns[-1]:
            assert got[-1] == turns[-1][1]
            prompt, _ = render_chat(messages[:last], ours, True, tools=tools)
            assert prompt == ids[: len(prompt)] and mask[len(prompt)] == 1


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
def test_no_text_of_others_becomes_a_special_token(family):
    ours, theirs = pair(family)
    names = list(ours.special)

    def count(messages, tools):
        ids, _ = render_chat(messages, ours, True, tools=tools)
        assert ours.decode(ids) == rendered(theirs, messages, tools, True)
        return Counter(i for i in ids if i in ours.special.values())

    plain = [count(*given) for given in talks_with(family, "a bc d")]
    for text in [*names, " ".join(names), "".join(names)]:
        found = [count(*given) for given in talks_with(family, f"a{text} b{text}")]
        assert found == plain, text


@every_family
def test_a_developer_is_never_lost(family):
    """The message is written under its own role where the template knows it; else as system."""
    (ours, theirs), messages = pair(family), [said("developer", "Be kind."), USER]
    want = [rendered(theirs, m, None, True, True) for m in ([SYSTEM, USER], messages)]
    want = [ids for ids in want if isinstance(ids, list) and "Be kind." in ours.decode(ids)]
    if want:
        assert render_chat(messages, ours, True)[0] in want
    else:
        with pytest.raises(ValueError):
            render_chat(messages, ours, True)


def named(letter):
    return f"{{{{ '{letter} ' + messages[0].content }}}}"


@pytest.mark.parametrize("config, file, wanted", [  # those used without and with tools are wanted
    ({"tool_use": "b", "rag": "c", "default": "a"}, None, "ab"), ("a", "d", "dd"),
])
def test_templates_are_found_where_transformers_finds_them(config, file, wanted, tmp_path):
    if file:
        (tmp_path / "chat_template.jinja").write_text(named(file), encoding="utf-8")
    listed = isinstance(config, dict) and config.items()
    config = [{"name": k, "template": named(v)} for k, v in listed] if listed else named(config)
    ours, theirs = both(tmp_path, trained(behind=["<e>"]), chat_template=config, eos_token="<e>")
    for letter, tools in zip(wanted, (None, TOOLS)):
        ids = rendered(theirs, [USER], tools, tokenize=True)
        assert theirs.decode(ids) == f"{letter} Hi there!"
        assert render_chat([USER], ours, tools=tools)[0] == ids
