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
# Twelve families: what their public templates write, in our own words
# --------------------------------------------------------------------------------------------

ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."
CHATML_TOOLS = r"""{{- '# Tools\n\nYou may call one or more functions to assist with the user query.
\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
{%- for t in tools %}{{- '\n' + t | tojson }}{%- endfor %}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments
 within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments":
 <args-json-object>}\n</tool_call>' }}""".replace("\n\\", "\\").replace("\n ", " ")
SPOKEN = "{{- '<|im_start|>assistant\\n' + text }}"
THOUGHTS = r"""{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if m.reasoning_content is not string and '</think>' in text %}
  {%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
  {%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > last.query and (loop.last or thought) %}
  {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}
{%- else %}{{- text }}{%- endif %}"""


def qwen(default, assistant=SPOKEN):
    """ChatML with tools. `default`: Jinja for the system's text where there is none."""
    return r"""
{%- set given = messages[0].role == 'system' %}
{%- set own = messages[0].content if given else DEFAULT %}
{%- if given or own or tools %}
  {{- '<|im_start|>system\n' + own }}
  {%- if tools %}{{- '\n\n' if given or own }}TOOLS{%- endif %}
  {{- '<|im_end|>\n' }}
{%- endif %}
{%- set last = namespace(query=messages | length - 1) %}
{%- for m in messages if m.role == 'user' %}{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'user' and not (m.content.startswith('<tool_response>')
                                   and m.content.endswith('</tool_response>')) %}
    {%- set last.query = loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- set text = m.content if m.content is string else '' %}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}
  {%- elif m.role == 'assistant' %}
    ASSISTANT
    {%- for c in m.tool_calls or [] %}
      {{- '\n' if text or not loop.first }}
      {{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
      {{- c.function.arguments | tojson + '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif m.role == 'tool' %}
    {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
    {{- '\n<tool_response>\n' + text + '\n</tool_response>' }}
    {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\n\n</think>\n\n' }}
  {%- endif %}
{%- endif %}""".replace("DEFAULT", default).replace("TOOLS", CHATML_TOOLS).replace(
        "ASSISTANT", assistant
    ).replace("{%- for m in messages if m.role == 'user' %}{%- endfor %}\n", "")


def llama3(date):
    """Llama 3.1 and 3.2, which differ in the date that they assume."""
    return r"""
{%- macro head(role) %}{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{%- endmacro %}
{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = DATE %}{%- endif %}
{%- set own = '' %}
{%- if messages[0].role == 'system' %}
  {%- set own = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- endif %}
{{- head('system') + ('Environment: ipython\n' if tools is not none else '') }}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + own }}
{{- '<|eot_id|>' }}
{%- if tools is not none %}
  {%- if not messages %}{{- raise_exception("there's no first user message!") }}{%- endif %}
  {{- head('user') + 'Given the following functions, please respond with a JSON for a function ' }}
  {{- 'call with its proper arguments that best answers the given prompt.\n\nRespond in the ' }}
  {{- 'format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
  {{- 'Do not use variables.\n\n' }}
  {%- for t in tools %}{{- t | tojson(indent=4) + '\n\n' }}{%- endfor %}
  {{- messages[0].content | trim + '<|eot_id|>' }}
  {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
  {%- if 'tool_calls' in m %}
    {%- if m.tool_calls | length != 1 %}
      {{- raise_exception('This model only supports single tool-calls at once!') }}
    {%- endif %}
    {%- set c = m.tool_calls[0].function %}
    {{- head('assistant') + '{"name": "' + c.name + '", "parameters": ' }}
    {{- c.arguments | tojson + '}<|eot_id|>' }}
  {%- elif m.role == 'tool' %}
    {{- head('ipython') }}
    {{- (m.content | tojson if m.content is iterable else m.content) + '<|eot_id|>' }}
  {%- else %}
    {{- head(m.role) + m.content | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}""".replace("DATE", date)


SMOLLM2 = r"""
{%- for m in messages %}
  {%- if loop.first and m.role != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, ' }}
    {{- 'trained by Hugging Face<|im_end|>\n' }}
  {%- endif %}
  {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

LLAMA2 = r"""
{%- set own = '' %}{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
  {%- set own = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
  {%- set turns = messages[1:] %}
{%- endif %}
{%- for m in turns %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('ALTERNATE') }}
  {%- endif %}
  {%- if m.role == 'user' %}
    {{- bos_token + '[INST] ' + ((own if loop.first else '') + m.content).strip() + ' [/INST]' }}
  {%- else %}{{- ' ' + m.content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}""".replace("ALTERNATE", ALTERNATE)

MISTRAL = r"""
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- set users, ns = turns | selectattr('role', 'equalto', 'user') | list, namespace(n=0) %}
{%- for m in turns %}
  {%- if m.role != 'tool' and not (m.tool_calls is defined and m.tool_calls is not none) %}
    {%- if (m.role == 'user') != (ns.n % 2 == 0) %}
      {{- raise_exception('After the optional system message, conversation roles must alternate') }}
    {%- endif %}
    {%- set ns.n = ns.n + 1 %}
  {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in turns %}
  {%- if m.role == 'user' %}
    {%- if tools is not none and m == users[-1] %}
      {{- '[AVAILABLE_TOOLS] [' }}
      {%- for t in tools %}
        {{- '{"type": "function", "function": {' }}
        {%- for key, value in t.function.items() if key != 'return' %}
          {{- '"' + key + '": ' + ('"' + value + '"' if value is string else value | tojson) }}
          {{- ', ' if not loop.last }}
        {%- endfor %}
        {{- '}}' + (']' if loop.last else ', ') }}
      {%- endfor %}
      {{- '[/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {%- set own = messages[0].content + '\n\n' if loop.last and turns != messages else '' %}
    {{- '[INST] ' + own + m.content + '[/INST]' }}
  {%- elif m.tool_calls is defined and m.tool_calls is not none %}
    {{- '[TOOL_CALLS] [' }}
    {%- for c in m.tool_calls %}
      {%- if c.id is not defined or c.id | length != 9 %}
        {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
      {%- endif %}
      {{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}
      {{- ']' + eos_token if loop.last else ', ' }}
    {%- endfor %}
  {%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
  {%- elif m.role == 'tool' %}
    {{- '[TOOL_RESULTS] {"content": ' + m.content | string + ', "call_id": "' }}
    {{- m.tool_call_id + '"}[/TOOL_RESULTS]' }}
  {%- else %}{{- raise_exception('Only user and assistant roles are supported') }}
  {%- endif %}
{%- endfor %}"""

GLM4 = r"""[gMASK]<sop>
{%- if tools %}
<|system|>
# 可用工具
    {%- for t in tools %}


## {{ t.function.name }}

{{ t.function | tojson(indent=4, ensure_ascii=False) }}
在调用上述函数时，请使用 Json 格式表示调用的参数。
    {%- endfor %}
{%- endif %}
{%- for m in messages %}
    {%- if m.content and m.role in ('system', 'user', 'assistant') %}
<|{{ m.role }}|>
{{ m.content }}
    {%- elif m.role == 'tool' %}
<|observation|>
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
{%- for m in messages %}
  {%- if (m.role == 'user') != loop.index is odd %}{{ raise_exception('ALTERNATE') }}{% endif %}
  {{- '<start_of_turn>' + {'assistant': 'model'}.get(m.role, m.role) + '\n' }}
  {{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""".replace(
    "ALTERNATE", ALTERNATE
)

PHI3 = r"""
{%- for m in messages if m.role in ('system', 'user', 'assistant') %}
  {{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}
{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}"""


class Family(NamedTuple):
    """A template, the names of bos and eos (None: none), the special tokens besides them, what an
    assistant who says {} is to learn, tokens that are no special ones, variables to try."""

    template: str
    bos: str
    eos: str
    special: str
    learned: str
    words: str = ""
    variables: tuple = ({},)


HEADS = "<|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>"
INST = "[INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
CALLS, DATE = "<tool_call> </tool_call>", {"date_string": "1 Jan 2030"}
IM, END = "<|im_start|> <|endoftext|>", "<|im_end|>"
ALIBABA = "'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'"
BEGIN = "<|begin_of_text|>"
FAMILIES = {
    "qwen2.5": Family(qwen(ALIBABA), None, END, IM, "{}<|im_end|>", CALLS),
    "qwen3": Family(
        qwen("''", THOUGHTS), None, END, IM, "<think>\n\n</think>\n\n{}<|im_end|>",
        CALLS + " <think> </think> <tool_response> </tool_response>",
        ({}, {"enable_thinking": False}, {"enable_thinking": True}),
    ),
    "smollm2": Family(SMOLLM2, "<|im_start|>", END, "<|endoftext|>", "{}<|im_end|>"),
    "llama3.1": Family(
        llama3("'26 Jul 2024'"), BEGIN, "<|eot_id|>", HEADS, "{}<|eot_id|>", "", ({}, DATE)
    ),
    "llama3.2": Family(
        llama3("strftime_now('%d %b %Y')"), BEGIN, "<|eot_id|>", HEADS, "{}<|eot_id|>", "",
        ({}, DATE),
    ),
    "llama2": Family(LLAMA2, "<s>", "</s>", "<unk>", " {} </s>"),
    "mistral": Family(MISTRAL, "<s>", "</s>", INST + " [TOOL_CALLS]", " {}</s>"),
    "glm4": Family(
        GLM4, None, "<|endoftext|>",
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", "\n{}",
    ),
    "minicpm": Family(MINICPM, "<s>", "</s>", "<用户> <AI>", "{}"),
    "gemma": Family(
        GEMMA, "<bos>", "<eos>", "<start_of_turn> <end_of_turn>", "{}<end_of_turn>"
    ),
    "phi3": Family(
        PHI3, "<s>", "<|endoftext|>", "<|system|> <|user|> <|assistant|> <|end|>", "{}<|end|>"
    ),
    "minimind": Family(
        qwen("('' if tools else 'You are a helpful assistant')"), "<|im_start|>", END,
        "<|endoftext|>", "{}<|im_end|>", CALLS,
    ),
}
WITH_TOOLS = {"qwen2.5", "qwen3", "llama3.1", "llama3.2", "mistral", "glm4", "minimind"}

# --------------------------------------------------------------------------------------------
# Conversations
# --------------------------------------------------------------------------------------------


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def called(*calls, content=None, **more):
    """An assistant's turn with calls (name, arguments); every id has nine characters."""
    calls = [
        {"id": f"call{i:05}", "type": "function", "function": {"name": name, "arguments": a}}
        for i, (name, a) in enumerate(calls)
    ]
    return said("assistant", content, tool_calls=calls, **more)


def result(content, i=0):
    return said("tool", content, tool_call_id=f"call{i:05}")


def schema(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    told = f"Look up a {name}; 查询 <b>it's</b> & more"
    function = {"name": name, "description": told, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    schema("hotel", type={"type": "string", "enum": ["豪华型", "经济型"]}, price={"type": "number"}),
    schema("sky", z={"type": "array", "items": {"type": "number"}}, a={"type": "string"}),
]
MESSY = {"z": [[2, 1.0], {"b": None, "a": True}], "价格": 500.0, "é": 'a "b"\n<c>', "a": [], "n": {}}
USER, BOT = said("user", "Hi there!"), said("assistant", "Hello!")
SYSTEM, CALL = said("system", "Be kind."), called(("hotel", {"type": "豪华型", "price": 500.0}))
THOUGHT, ANSWER = "One.\nTwo?", said("assistant", "Hello!", reasoning_content="One.\nTwo?")
TALKS = {
    "plain": [USER],
    "answered": [USER, BOT],
    "system": [SYSTEM, USER, BOT],
    "turns": [USER, BOT, USER, said("assistant", "Again?"), USER],
    "a system turn later": [SYSTEM, USER, BOT, said("system", "Be brief."), USER, BOT],
    "chinese": [said("system", "你是助手。"), said("user", "你好，👩‍👧！"), said("assistant", "您好！")],
    "blanks": [said("system", "\n\nBe \n"), said("user", "\n\n  a\n\n\n"), said("assistant", "b  \n")],
    "empty": [said("system", ""), said("user", ""), said("assistant", "")],
    "two of a role": [USER, USER, BOT],
    "thoughts": [USER, ANSWER, USER, ANSWER],
    "thoughts of one turn": [USER, said("assistant", "A"), USER, ANSWER, USER, BOT],
    "thoughts in the text": [USER, said("assistant", f"<think>\n{THOUGHT}\n</think>\n\nHello!")] * 2,
    "a call": [SYSTEM, USER, CALL],
    "a call and its result": [USER, CALL, result('{"name": "好"}'), said("assistant", "Found it.")],
    "calls": [
        USER, called(("hotel", {}), ("sky", MESSY), content=""), result("a b"), result("\n", 1),
        BOT, USER, CALL, result("[]"), BOT,
    ],
    "text and a call": [USER, called(("sky", MESSY), content="I look.\nNow."), result("sunny")],
    "thoughts and calls": [
        USER, ANSWER, USER, called(("sky", {}), reasoning_content="Hm."), result("rain"),
        called(("sky", MESSY), content="More.", reasoning_content="So."), result("1"), ANSWER,
    ],
}
BAD_ID = [USER, said("assistant", None, tool_calls=[CALL["tool_calls"][0] | {"id": "short"}])]
TALKS["an id of five characters"] = BAD_ID
SPOKEN_TALKS = {k: v for k, v in TALKS.items() if not any("tool_calls" in m for m in v)}

# --------------------------------------------------------------------------------------------
# The same ids
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return functools.cache(lambda name: make_folder(tmp_path_factory.mktemp(name), name))


def make_folder(folder, name):
    """A family's tokenizer. Its end of text is also an object, as older files have it, and
    generation_config.json ends answers with another token: templates write tokenizer_config's."""
    family = FAMILIES[name]
    special = dict.fromkeys([*filter(None, (family.bos, family.eos)), *family.special.split()])
    theirs = trained(behind=list(special))
    theirs.add_tokens([AddedToken(w, normalized=False) for w in family.words.split()])
    eos = {"__type": "AddedToken", "content": family.eos, "lstrip": False, "normalized": False}
    eos |= {"rstrip": False, "single_word": False}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": family.template}
    config |= {"bos_token": family.bos, "eos_token": eos if name == "llama2" else family.eos}
    other = theirs.token_to_id(family.special.split()[-1])
    return write(folder, theirs, tokenizer_config=config, generation_config={"eos_token_id": other})


@pytest.fixture
def pair(folders, family):
    """(our Tokenizer, transformers' tokenizer) of a family."""
    folder = folders(family)
    ours = Tokenizer(json.loads(json.dumps(hub_tokenizer(folder))))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def rendered(theirs, messages, tools=None, prompt=False, tokenize=False, **variables):
    """What transformers makes of a conversation: text or ids; its TemplateError is returned."""
    try:
        return theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=tokenize,
            return_dict=False, **variables,
        )
    except TemplateError as e:
        return e


def options(family, tools):
    """All (tools, add_generation_prompt, variables) to try."""
    return itertools.product(tools, (False, True), FAMILIES[family].variables)


def talks(family):
    """Templates without tools drop calls, or fail in words of Jinja's: no case for us."""
    return TALKS if family in WITH_TOOLS else SPOKEN_TALKS


every_family = pytest.mark.parametrize("family", FAMILIES)
every_talk = pytest.mark.parametrize(
    "family, talk", [(family, talk) for family in FAMILIES for talk in talks(family)]
)


@every_talk
def test_ids_are_those_of_transformers(family, talk, pair):
    (ours, theirs), messages = pair, TALKS[talk]
    before = copy.deepcopy(messages)
    for tools, prompt, variables in options(family, (None, TOOLS)):
        want = rendered(theirs, messages, tools, prompt, True, **variables)
        given = {"tools": tools, "add_generation_prompt": prompt, **variables}
        if isinstance(want, TemplateError):
            with pytest.raises(ValueError) as e:
                render_chat(messages, ours, **given)
            assert str(want) in str(e.value) or "has no attribute" in str(want)
            continue
        ids, mask = render_chat(messages, ours, **given)
        assert ours.decode(ids) == theirs.decode(want), given
        assert list(ids) == want and len(mask) == len(ids), given
    assert messages == before


@every_family
def test_a_short_conversation_in_each_family(family, pair):
    """The templates above, as their model cards show them."""
    im, head = "<|im_start|>{}\n{}<|im_end|>\n", "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    chatml = im.format("user", "Hi there!") + im.format("assistant", "Hello!")
    date = "Cutting Knowledge Date: December 2023\nToday Date: 1 Jan 2030\n\n<|eot_id|>"
    llama = BEGIN + head.format("system", date) + head.format("user", "Hi there!<|eot_id|>")
    llama += head.format("assistant", "Hello!<|eot_id|>")
    want = {
        "qwen2.5": im.format("system", ALIBABA[1:-1]) + chatml,
        "qwen3": chatml.replace("Hello!", "<think>\n\n</think>\n\nHello!"),
        "smollm2": im.format(
            "system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        ) + chatml,
        "llama3.1": llama,
        "llama3.2": llama,
        "llama2": "<s>[INST] Hi there! [/INST] Hello! </s>",
        "mistral": "<s>[INST] Hi there![/INST] Hello!</s>",
        "glm4": "[gMASK]<sop><|user|>\nHi there!<|assistant|>\nHello!",
        "minicpm": "<用户>Hi there!<AI>Hello!",
        "gemma": "<bos><start_of_turn>user\nHi there!<end_of_turn>\n"
        "<start_of_turn>model\nHello!<end_of_turn>\n",
        "phi3": "<|user|>\nHi there!<|end|>\n<|assistant|>\nHello!<|end|>\n<|endoftext|>",
        "minimind": im.format("system", "You are a helpful assistant") + chatml,
    }[family]
    ours, theirs = pair
    variables = FAMILIES[family].variables[-1]
    assert rendered(theirs, [USER, BOT], **variables) == want
    ids, mask = render_chat([USER, BOT], ours, **variables)
    assert ours.decode(ids) == want
    [text] = learned(ours, ids, mask)
    assert text in endings(family, FAMILIES[family].learned.format("Hello!"))


# --------------------------------------------------------------------------------------------
# What is learned
# --------------------------------------------------------------------------------------------


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
    None where the template writes the prompt otherwise once it is answered."""
    end = FAMILIES[family].learned.split("{}")[1].strip()
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            before = rendered(theirs, messages[:i], tools, True, **variables)
            after = rendered(theirs, messages[: i + 1], tools, **variables)
            own = after.removeprefix(before)
            own = own[: own.index(end) + len(end)] if end else own
            yield (before, own) if after.startswith(before) else None


@every_talk
def test_what_is_learned_is_what_the_assistant_wrote(family, talk, pair):
    (ours, theirs), messages = pair, TALKS[talk]
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    for tools, _, variables in options(family, (None, TOOLS)):
        whole = rendered(theirs, messages, tools, **variables) if messages else TemplateError()
        if isinstance(whole, TemplateError):
            continue
        parts = list(turns(theirs, messages, family, tools, **variables))
        ids, mask = render_chat(messages, ours, tools=tools, **variables)
        got = learned(ours, ids, mask)
        if all(part and part[1] and whole.startswith("".join(part)) for part in parts):
            assert len(got) == len(parts), variables
            assert all(g in endings(family, own) for g, (_, own) in zip(got, parts)), variables
        if not parts[-1] or not parts[-1][1]:
            continue
        assert got[-1] in endings(family, parts[-1][1]), variables
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        prompt, nothing = render_chat(
            messages[:last], ours, tools=tools, add_generation_prompt=True, **variables
        )
        assert prompt == ids[: len(prompt)] and mask[len(prompt)] == 1
        assert len(nothing) == len(prompt)


# --------------------------------------------------------------------------------------------
# Special tokens in somebody's text
# --------------------------------------------------------------------------------------------


def talk_with(family, text):
    """Conversations and tools that hold `text` where others than the assistant write."""
    yield [said("user", text), BOT, said("user", f"x{text}")], None
    if family != "gemma":
        yield [said("system", text), USER], None
    if family in WITH_TOOLS:
        yield [USER, CALL, result(text)], None
        tool = schema(f"find{text}", x={"enum": [text], "description": text}, **{text: {}})
        yield [USER], [tool]


@every_family
def test_no_text_of_others_becomes_a_special_token(family, pair):
    ours, theirs = pair
    special, names = set(ours.special.values()), list(ours.special)
    assert len(names) >= 3

    def count(messages, tools):
        found = render_chat(messages, ours, tools=tools, add_generation_prompt=True)[0]
        assert ours.decode(found) == rendered(theirs, messages, tools, True)
        return Counter(i for i in found if i in special)

    plain = [count(*given) for given in talk_with(family, "a bc d")]
    for name in [*names, " ".join(names), "".join(names)]:
        for i, given in enumerate(talk_with(family, f"a{name} b{name}")):
            assert count(*given) == plain[i], (name, given)


@pytest.mark.parametrize("family", ["qwen3"])
def test_thoughts_and_calls_in_the_assistant_s_own_text_are_tokens(family, pair):
    ours, _ = pair
    own = '<think>\nHm.\n</think>\n\nSo:\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'
    messages = [said("user", "</think> <tool_call>"), said("assistant", own)]
    ids, mask = render_chat(messages, ours)
    names = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    assert [ids.count(ours.special[name]) for name in names] == [1, 1, 1, 1]
    assert learned(ours, ids, mask) == [own + "<|im_end|>"]


# --------------------------------------------------------------------------------------------
# Forms of messages, places of templates
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(WITH_TOOLS))
def test_arguments_may_be_json(family, pair):
    texts, messages = copy.deepcopy(TALKS["a call"]), TALKS["a call"]
    function = texts[-1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    assert render_chat(texts, pair[0], tools=TOOLS) == render_chat(messages, pair[0], tools=TOOLS)


@every_family
def test_a_developer_is_the_system_where_a_template_has_no_such_role(family, pair):
    """Templates that write any role's name may write it, too; the text never gets lost."""
    ours, theirs = pair
    messages = [said("developer", "Be kind."), USER, BOT]
    want = [rendered(theirs, m, None, False, True) for m in ([SYSTEM, *messages[1:]], messages)]
    want = [ids for ids in want if not isinstance(ids, TemplateError)]
    if not want:
        with pytest.raises(ValueError):
            render_chat(messages, ours)
        return
    ids, _ = render_chat(messages, ours)
    assert ids in want and ("Be kind." in ours.decode(ids) or family == "mistral")


def template(text):
    return "{{ '" + text + " ' + messages[0].content }}"


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize(
    "config, files, found",
    [
        (template("a"), {}, "aa"),
        ([("default", "a"), ("tool_use", "b")], {}, "ab"),
        ([("tool_use", "b"), ("rag", "c"), ("default", "a")], {}, "ab"),
        ([("default", "a")], {}, "aa"),
        (None, {"chat_template.jinja": "a"}, "aa"),
        (template("b"), {"chat_template.jinja": "a"}, "aa"),
        (
            None,
            {"chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "b"},
            "ab",
        ),
    ],
)
def test_templates_are_found_where_transformers_finds_them(tools, config, files, found, tmp_path):
    if isinstance(config, list):
        config = [{"name": name, "template": template(text)} for name, text in config]
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    content |= {"chat_template": config} if config else {}
    write(tmp_path, trained(behind=["<|end|>"]), tokenizer_config=content)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(template(text), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer(hub_tokenizer(tmp_path))
    want = rendered(theirs, [USER], tools, tokenize=True)
    assert theirs.decode(want) == f"{found[bool(tools)]} Hi there!"
    assert render_chat([USER], ours, tools=tools)[0] == want
