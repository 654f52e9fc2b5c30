"""Conversations as token ids, written by the model's own chat template, and answers read back.

Messages are OpenAI's: {"role": system | developer | user | assistant | tool, "content": text}, an
assistant's perhaps with "tool_calls" and "reasoning_content"; the schemas of tools stand beside
them. The arguments of a call are a dict, or the JSON text in which they were written.
"""
import contextlib
import json
import re
from collections import deque
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.cli import UserError

# --------------------------------------------------------------------------------------------
# Tool calls
# --------------------------------------------------------------------------------------------


def tool_call(name, arguments, call_id=None):
    """An entry of a message's `tool_calls`."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call | ({"id": call_id} if call_id else {})


def read_call(call):
    """An entry of `tool_calls` from one of somebody else's, or from {"name", "arguments"}: the
    arguments stay as they are written. ValueError if the name or the arguments cannot be any."""
    function = call.get("function", call)
    name, arguments = function["name"], function.get("arguments", function.get("parameters"))
    if not isinstance(name, str) or name.split() != [name]:
        raise ValueError(f"a tool cannot be called {name!r}")
    if not isinstance(arguments or {}, dict | str):
        raise ValueError("the arguments are not a JSON object")
    return tool_call(name, arguments or {}, call.get("id"))


def parse_call(call):
    """(name, arguments as a dict) of an entry of `tool_calls`; ValueError if they are no JSON
    object. An empty text is no arguments."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as e:
            raise ValueError(f"the arguments are not JSON ({e})") from e
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not a JSON object")
    return name, arguments


def normalize_numbers(value):
    """A JSON value with 500.0 written as 500, so that the two are the same text."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [normalize_numbers(v) for v in value]
    if isinstance(value, dict):
        return {k: normalize_numbers(v) for k, v in value.items()}
    return value


def split_system(messages):
    """(the system message that the messages begin with, as a list, perhaps empty; the others)."""
    n = int(bool(messages) and messages[0]["role"] in ("system", "developer"))
    return messages[:n], messages[n:]


def message_text(message):
    """A message as text for people: what it says, then a line `name {arguments}` for each call."""
    lines = [message["content"]] if message.get("content") else []
    for call in message.get("tool_calls") or ():
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        lines.append(f"{name} {arguments}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------
# Jinja
# --------------------------------------------------------------------------------------------

TEMPLATES = Path(__file__).with_name("chat_templates")
# The special tokens of our own template: one for each role, one that ends a turn, and the one
# that begins a call. <think> and </think> are added where rows have thoughts.
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|call|>", "<|tool|>", "<|end|>")
THINK = ("<think>", "</think>")
# Tags in an assistant's content that become special tokens where the vocabulary has them
OWN_TAGS = (*THINK, "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>")


class Escaped(dict):
    """A message that `Template.for_template` returned, in which special tokens are escaped."""


class Arguments(dict):
    """The arguments of a call as templates receive them. If they came as JSON text, `text` holds
    it, and `tojson` writes it unchanged."""

    text = None


def to_json(value, indent=None, ensure_ascii=False, separators=None, sort_keys=False):
    """Jinja's `tojson` as transformers has it: without escapes for HTML."""
    if isinstance(value, Arguments) and value.text and indent is None:
        return value.text
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
        sort_keys=sort_keys)  # fmt: skip


def raise_exception(message):
    """Refuse a conversation: templates call this."""
    raise TemplateError(message)


@lru_cache(maxsize=64)
def compile_template(source):
    """A chat template in Jinja, with what transformers gives to one. UserError if it is broken."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = to_json
    env.globals |= {"raise_exception": raise_exception}
    env.globals |= {"strftime_now": lambda form: datetime.now().strftime(form)}
    # {% generation %} marks the assistant's text in some templates: the mask does not need it
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
    try:
        return env.from_string(source)
    except TemplateError as e:
        raise UserError(f"the model's chat template cannot be read: {e}") from e


# --------------------------------------------------------------------------------------------
# Templates
# --------------------------------------------------------------------------------------------

# Escapes the name of a special token in a message, so that it is encoded as plain text. It is a
# Unicode noncharacter; a text that contains it has it doubled.
MARK = "\ufdd0"
CONTINUE_HERE = "\ufdd1 "  # appended to a message that is to be continued, to find its end
PROBE = "Zq7"  # message content that is easy to find in a template's output


def escape(value, names):
    """The value with MARK inside each match of the pattern `names`, in all texts that it holds."""
    if isinstance(value, str):
        return names.sub(lambda m: m[0][0] + MARK + m[0][1:], value.replace(MARK, 2 * MARK))
    if isinstance(value, list | tuple):
        return [escape(v, names) for v in value]
    if isinstance(value, dict):
        return {escape(k, names): escape(v, names) for k, v in value.items()}
    return value


def either(names):
    """A pattern that finds each of the names, the longest one if several share a beginning."""
    names = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


class Template:
    """The chat template of a tokenizer: the Jinja that its model came with, or ours.

    ours    whether it is ours: <|user|>hi<|end|><|assistant|>hello<|end|>
    end     the id that closes an assistant's turn; `ends` are all ids that do
    call    the id with which a call begins, None if calls are plain text; `bare_calls` says
            whether they are mere JSON, as Llama's
    spoken  the special tokens that an answer may hold, ids
    tags    {name: how it stands in an answer} of what begins and ends thoughts and calls; `own` are
            the names of those that are tokens, by id
    supports_tools  whether it writes the schemas of tools

    UserError if the tokenizer has no template.
    """

    def __init__(self, tokenizer):
        self.tokenizer, special = tokenizer, tokenizer.special
        self.ours = set(CHAT_TOKENS) <= set(special)
        given = None if self.ours else tokenizer.spec.get("chat_template")
        if not self.ours and not given:
            raise UserError(f"the tokenizer {tokenizer.name} has no chat template")
        given = given or {"default": (TEMPLATES / "ours.jinja").read_text(encoding="utf-8")}
        given = given if isinstance(given, dict) else {"default": given}
        self.sources = {name: (source, compile_template(source)) for name, source in given.items()}
        names = {i: name for name, i in special.items()}
        marks = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self.variables = {key: names[i] for key, i in marks.items() if i in names}
        self.variables = tokenizer.spec.get("template_tokens", self.variables)
        self.split = re.compile(f"({either(special).pattern})")
        self.typed = either(special)
        self.typed_by_assistant = either(set(special) - set(OWN_TAGS))
        own = ["<|call|>", *(n for n in THINK if n in special)] if self.ours else OWN_TAGS
        self.own = {special[name]: name for name in own if name in special}
        # a tag that is a token counts only as one; MARK goes before it
        self.tags = {name: (MARK if name in special else "") + name for name in own}
        try:
            self.probe()
        except ValueError as e:
            raise UserError(f"the model's chat template cannot be used: {e}") from e

    def probe(self):
        """Find `ends`, `call` and `spoken` in what the template writes."""
        special = self.tokenizer.special
        asked = [{"role": "user", "content": PROBE}]
        said = self.answer(asked, {"role": "assistant", "content": PROBE})
        behind = self.encode(said.rpartition(PROBE)[2])
        known = set(special.values())
        self.end = next((i for i in behind if i in known), self.tokenizer.eos_id)
        blanks = said.split(self.tokenizer.decode([self.end]))[0].split(PROBE)
        self.blanks = [text if text.isspace() else "" for text in (blanks[0], blanks[-1])]
        self.ends = {self.end, self.tokenizer.eos_id, *self.tokenizer.spec.get("ends", ())}
        plain, calling = known & set(self.encode(said)), ""
        with contextlib.suppress(ValueError):
            calling = self.call_turn(PROBE)
        called = [i for i in self.encode(calling) if i in known]
        self.call = next((i for i in called if i not in plain | self.ends), None)
        self.bare_calls = self.call is None and calling.lstrip().startswith("{")
        tags = (special[name] for name in OWN_TAGS if name in special)
        ends = {self.end} if self.ours else self.ends
        self.spoken = sorted({*ends, *plain, *called, *tags})
        tools = [{"type": "function", "function": {"name": 2 * PROBE, "parameters": {}}}]
        self.supports_tools = False
        with contextlib.suppress(ValueError):
            self.supports_tools = 2 * PROBE in self.render(asked, tools, True)

    def call_turn(self, name):
        """What a template writes for a call of the tool `name` with the argument PROBE."""
        call = tool_call(name, {PROBE: 0}, "call00000")
        schema = {"name": name, "description": "", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": schema}]
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return self.answer([{"role": "user", "content": PROBE}], message, tools)

    def call_start(self, name):
        """The ids with which a call of the tool `name` begins, up to its arguments; "" is any tool.
        ValueError if the template writes no calls."""
        turn = self.call_turn(name or PROBE)
        if not name and self.call is not None:
            ids = self.encode(turn)
            return ids[: ids.index(self.call) + 1]
        start, found, _ = turn.partition(f'{{"{PROBE}"' if name else PROBE)
        if not found:
            raise ValueError("this model's chat template writes no calls")
        # a blank belongs to the next token; in our template it is what ends the name
        return self.encode(start if self.ours else start.rstrip())

    def source_for(self, tools):
        """(source, compiled template) of the template for conversations with or without tools."""
        which = "tool_use" if tools and "tool_use" in self.sources else "default"
        return self.sources.get(which) or next(iter(self.sources.values()))

    def for_template(self, message, source):
        """A message as the template is given it: the names of special tokens in it are escaped."""
        if isinstance(message, Escaped):
            return message
        names = self.typed_by_assistant if message["role"] == "assistant" else self.typed
        out = {k: v for k, v in message.items() if k != "tool_calls"}
        out = Escaped(escape(out, names))
        out["content"] = content_text(out.get("content"))
        if out["role"] == "developer" and "developer" not in source:  # OpenAI's name for system
            out["role"] = "system"
        calls = message.get("tool_calls") or []
        if calls:
            out["tool_calls"] = [self.call_for_template(call) for call in calls]
        return out

    def call_for_template(self, call):
        """An entry of `tool_calls`, escaped, its arguments as `Arguments` if they are an object."""
        call = escape(call, self.typed)
        text = call["function"]["arguments"]
        with contextlib.suppress(ValueError):
            arguments = Arguments(parse_call(call)[1])
            arguments.text = text if isinstance(text, str) else None
            call["function"] |= {"arguments": arguments}
        return call

    def render(self, messages, tools=None, add_generation_prompt=False, **variables):
        """The text of a conversation, what people typed escaped. ValueError, with the template's
        own words, if it refuses the conversation."""
        source, template = self.source_for(tools)
        variables = self.variables | variables | {"documents": None}
        try:
            messages = [self.for_template(m, source) for m in messages]
            variables["tools"] = escape(tools, self.typed) or None
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as e:  # a template is a program of somebody's
            raise ValueError(f"the chat template refuses the conversation: {e}") from e

    def encode(self, text):
        """The ids of a text of `render`: names of special tokens are these tokens."""
        special, ids = self.tokenizer.special, []
        for n, part in enumerate(self.split.split(text)):
            plain = re.sub(f"{MARK}({MARK}?)", r"\1", part) if MARK in part else part
            ids += [special[part]] if n % 2 else self.tokenizer.encode(plain)
        return ids

    def answer(self, before, message, tools=None):
        """What the template writes for an answer behind the prompt for it."""
        return self.turn([*before, message], len(before), tools)[1]

    def turn(self, messages, i, tools=None, **variables):
        """(prompt, answer), two texts: what the model reads before it writes message i, and what
        it is to write then. Where the prompt says more than comes before the answer in the whole,
        they part where the two differ."""
        whole = self.render(messages[: i + 1], tools, **variables)
        try:
            prompt = self.render(messages[:i], tools, True, **variables)
        except ValueError:  # many templates refuse an empty conversation
            if i:
                raise
            prompt = whole[: whole.find(content_text(messages[0].get("content")))]
        if not whole.startswith(prompt):
            same = (n for n, (a, b) in enumerate(zip(whole, prompt)) if a != b)
            prompt = whole[: next(same, min(len(whole), len(prompt)))]
        return prompt, whole[len(prompt) :]

    def rows(self, messages, tools=None, learned=None, **variables):
        """[(text, [(start, stop) of what is learned in it], [the messages that these are])] of a
        conversation: one, with all turns of the assistant for which learned(i) holds, or several if
        the template writes earlier turns otherwise when there are later ones, as Qwen3's does with
        thoughts."""
        rows, end = [], self.tokenizer.decode([self.end])
        source, _ = self.source_for(tools)
        messages = [self.for_template(m, source) for m in messages]
        for i, m in enumerate(messages):
            if m["role"] != "assistant" or not (learned is None or learned(i)):
                continue
            prompt, answer = self.turn(messages, i, tools, **variables)
            if any(c["function"]["name"] not in answer for c in m.get("tool_calls") or ()):
                raise ValueError("the chat template writes no tool calls")
            own, found, _ = answer.partition(end)
            span = len(prompt), len(prompt) + len(own + found)
            if rows and prompt.startswith(rows[-1][0][: rows[-1][1][-1][1]]):
                rows[-1] = prompt + answer, [*rows[-1][1], span], [*rows[-1][2], i]
            else:
                rows.append((prompt + answer, [span], [i]))
        return rows

    def encode_row(self, text, spans):
        """(ids, mask) of one of `rows`; the borders of spans are borders of tokens, too, since the
        model reads the prompt before it writes."""
        cuts, ids, mask = [0, *(at for span in spans for at in span), len(text)], [], []
        for n, (start, stop) in enumerate(pairwise(cuts)):
            part = self.encode(text[start:stop])
            if part and n % 2 == 0 and mask and mask[-1] and ids[-1] not in self.ends:
                mask += [int(part[0] in self.ends)] + [0] * (len(part) - 1)  # GLM: the next role
            else:
                mask += [n % 2] * len(part)
            ids += part
        return ids, mask

    def opened(self, prompt):
        """The ids of <think> if a prompt ends with it, as DeepSeek-R1's does; else none."""
        begins = self.tokenizer.decode(prompt[-9:]).rstrip().endswith(THINK[0])
        return self.encode(THINK[0]) if begins and THINK[0] in self.tags else []

    def parse(self, ids):
        """The assistant's message that generated ids mean, with `tool_calls` and
        `reasoning_content` where it has some."""
        hidden, text, run = set(self.tokenizer.special.values()), "", []
        for i in [*ids, None]:
            if i is None or i in self.own:
                text += self.tokenizer.decode(run).replace(MARK, "")
                text += self.tags[self.own[i]] if i in self.own else ""
                run = []
            elif i not in hidden:
                run.append(i)
        tag = self.tags
        message = {"role": "assistant", "content": ""}
        if THINK[0] in tag:
            before, closed, after = text.rpartition(tag[THINK[1]])
            opened = text.lstrip().startswith(tag[THINK[0]])
            if closed or opened:
                thought = (before if closed else text).partition(tag[THINK[0]])
                message["reasoning_content"] = (thought[2] or thought[0]).strip("\n")
                text = after.lstrip("\n") if closed else ""
                if not message["reasoning_content"].strip():
                    del message["reasoning_content"]
        before, after = self.blanks
        said, calls = self.parse_calls(text.removeprefix(before).removesuffix(after), tag)
        if calls:
            message["tool_calls"] = calls
        return message | {"content": said.replace(MARK, "")}

    def parse_calls(self, text, tag):
        """(text before the calls, calls) of an answer without its thought; no calls, and all of the
        text, if one of them is broken."""
        try:
            if self.ours:
                said, *parts = text.split(tag["<|call|>"])
                calls = [name_and_json(part) for part in parts]
            elif tag["<tool_call>"] in text:
                said, *parts = text.split(tag["<tool_call>"])
                parts = [part.partition(tag["</tool_call>"])[0] for part in parts]
                calls = [json_call(part) for part in parts]
            elif tag["[TOOL_CALLS]"] in text:
                said, _, inner = text.partition(tag["[TOOL_CALLS]"])
                calls = [json_call(json.dumps(c, ensure_ascii=False)) for c in json.loads(inner)]
            elif not self.bare_calls:
                return text, []
            else:
                said, inner = "", text.replace(tag["<|python_tag|>"], "")
                calls = [json_call(inner)]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return text, []
        return said.rstrip("\n") if calls else said, calls


def name_and_json(text):
    """The call that `name {arguments}` is, as our template writes it: what follows the name stays
    as the model wrote it, so that it can see what was wrong with it."""
    name, _, arguments = text.strip().partition(" ")
    return tool_call(name, arguments)


def json_call(text):
    """The call that a JSON object with a name and arguments (Llama: parameters) is, the arguments
    as they are written there; ValueError if it is none."""
    text = text.strip()
    call = json.loads(text)
    key = "arguments" if "arguments" in call else "parameters"
    if not isinstance(call["name"], str) or not isinstance(call[key], dict):
        raise ValueError("no call")
    for found in re.finditer(rf'"{key}"\s*:\s*', text):
        with contextlib.suppress(ValueError):
            value, end = json.JSONDecoder().raw_decode(text, found.end())
            if value == call[key]:
                call_id = call.get("id") if isinstance(call.get("id"), str) else None
                return tool_call(call["name"], text[found.end() : end], call_id)
    raise ValueError("no call")


def content_text(content):
    """The text of a message's content: a text, None, or a list of parts of text. ValueError for
    parts of another kind."""
    if isinstance(content, list):
        parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
        for part in parts:
            if not isinstance(part.get("text"), str):
                raise ValueError(f"a part of kind {part.get('type')!r:.40}, only text is known")
        return "".join(part["text"] for part in parts)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"the content is not text but {content!r:.40}")
    return content or ""


@lru_cache(maxsize=16)
def find_template(tokenizer):
    """The Template of a tokenizer; None if it has none, as that of a base model."""
    ours = set(CHAT_TOKENS) <= set(tokenizer.special)
    return Template(tokenizer) if ours or tokenizer.spec.get("chat_template") else None


def get_template(tokenizer):
    """The Template of a tokenizer; UserError if it has none."""
    return find_template(tokenizer) or Template(tokenizer)


# --------------------------------------------------------------------------------------------
# Conversations
# --------------------------------------------------------------------------------------------


def render_chat(messages, tokenizer, add_generation_prompt=False, tools=None, **variables):
    """(ids, mask) of a conversation, mask 1 where the assistant's own words are to be learned.

    With `add_generation_prompt` the row ends where an answer begins, a prefix of the row with it.
    `variables` are the template's own (enable_thinking=False). ValueError if it refuses.

        <|user|> hi <|end|> <|assistant|> hello <|end|>
        0        0  0       0             1     1
    """
    template = get_template(tokenizer)
    text = template.render(messages, tools, add_generation_prompt, **variables)
    for row, spans, _ in template.rows(messages, tools, **variables)[-1:]:
        if text.startswith(row[: spans[-1][1]]):
            return template.encode_row(text, spans)
    return template.encode_row(text, [])


def prompt_ids(
    messages, tokenizer, tools=None, add_generation_prompt=None, continue_final_message=False,
    **variables,
):  # fmt: skip
    """Ids of a conversation up to where the answer begins. With add_generation_prompt=False they
    end with the last turn, with continue_final_message=True within it. ValueError if the template
    refuses the conversation, or does not write the message that is to be continued."""
    template, going_on = get_template(tokenizer), continue_final_message
    if add_generation_prompt is None:
        add_generation_prompt = not going_on
    if going_on:
        last = messages[-1]
        if add_generation_prompt or last.get("tool_calls"):
            reason = "tool calls in the last message"
            reason = "add_generation_prompt" if add_generation_prompt else reason
            raise ValueError(f"continue_final_message is not possible with {reason}")
        last = last | {"content": content_text(last.get("content")) + CONTINUE_HERE}
        messages = [*messages[:-1], last]
    text = template.render(messages, tools, add_generation_prompt, **variables)
    if going_on:
        text, found, after = text.rpartition(CONTINUE_HERE.strip())
        if not found:
            raise ValueError("continue_final_message: the chat template does not write the message")
        text = text if after.startswith(" ") else text.rstrip()  # as the template trims messages
    return template.encode(text)


def chat_prompt(messages, tokenizer, room, tools=None, **variables):
    """`prompt_ids`, at most `room`: the oldest turns are left out first, never the system's. If
    the last one is still too long, a system turn of more than half of the room is left out, too,
    then the tools, and the last one loses its beginning. ValueError if the template refuses."""
    system, rest = split_system(list(messages))
    kept, left = deque(), room
    for m in reversed(rest):  # earlier ones cannot fit: do not render them
        left -= len(tokenizer.encode(message_text(m)))
        if left < 0 and kept:
            break
        kept.appendleft(m)

    def ids():
        with contextlib.suppress(ValueError):  # some templates require a user turn first
            return prompt_ids([*system, *kept], tokenizer, tools, **variables)
        return None

    found = ids()
    while len(kept) > 1 and (found is None or len(found) > room):
        kept.popleft()
        found = ids() or found
    if found is None:  # raises the template's own error
        return prompt_ids([*system, *kept], tokenizer, tools, **variables)
    if len(found) > room and system:
        alone = len(tokenizer.encode(content_text(system[0].get("content")))) + 2
        system = [] if alone > (room + 1) // 2 else system
        found = ids() or found
    if len(found) > room and tools:
        tools = None
        found = ids() or found
    while len(found) > room and kept and (said := tokenizer.encode(kept[-1]["content"] or "")):
        text = tokenizer.decode(said[len(found) - room :]).lstrip("\ufffd")
        kept[-1] = kept[-1] | {"content": text}
        found = ids() or found
    if len(found) > room and system:
        system = []
        found = ids() or found
    return found[-room:] if len(found) > room else found


def drop_continued(rows, key=lambda turns: turns):
    """The rows without those that the next one only continues: their turns, key(row), begin its."""
    following = [key(row) for row in rows[1:]] + [[]]

    def continued(turns, longer):
        return len(longer) > len(turns) and longer[: len(turns)] == turns

    return [row for row, longer in zip(rows, following) if not continued(key(row), longer)]


# --------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------


def label_token(label):
    """The special token that stands for a label of a classifier."""
    return f"<|label:{label}|>"


def labels_of(tokenizer):
    """The labels that a classifier's tokenizer knows; none for other models."""
    begin, end = label_token("\0").split("\0")
    return [n[len(begin) : -len(end)] for n in tokenizer.special if n.startswith(begin)]
