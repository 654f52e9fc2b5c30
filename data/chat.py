"""Conversations as token ids, written by the model's own chat template.

Messages are OpenAI's: {"role": system | developer | user | assistant | tool, "content": text}. An
assistant's message may have "tool_calls" and "reasoning_content". The schemas of tools stand beside
the messages. The arguments of a call are a dict, or the JSON text in which they were written.
"""
import contextlib
import json
import re
from datetime import datetime
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.cli import explained

# --------------------------------------------------------------------------------------------
# Messages and tool calls
# --------------------------------------------------------------------------------------------


def content_text(content, name="content"):
    """The text of a content: a text, None, or a list of text parts. For anything else, a ValueError
    that calls it `name`."""
    parts = content if isinstance(content, list) else [content or ""]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {content!r:.60}, not text")
    return "".join(texts)


def tool_call(name, arguments, call_id=None):
    """An entry of a message's `tool_calls`."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call | ({"id": call_id} if call_id else {})


def read_call(call):
    """The `tool_call` of an entry of `tool_calls`, or of {"name", "arguments"}, in any of the forms
    that others write. ValueError if it is malformed."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise ValueError(f"a tool call is {function!r:.40}, not an object with name and arguments")
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if not isinstance(name, str) or name.split() != [name]:
        raise ValueError(f"a tool cannot be called {name!r}")
    return tool_call(name, arguments or {}, call.get("id"))


def parse_call(call):
    """(name, arguments as a dict) of a `tool_call`. ValueError if they are not a JSON object."""
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

    def number(text):
        return int(float(text)) if float(text).is_integer() else float(text)

    return json.loads(json.dumps(value), parse_float=number)


def split_system(messages):
    """(the system message at the start of the messages as a list, perhaps empty; the others)."""
    n = int(bool(messages) and messages[0]["role"] in ("system", "developer"))
    return messages[:n], messages[n:]


def message_text(message):
    """A message as text for people: its content, then a line `name {arguments}` for each call."""
    lines = [message["content"]] if message.get("content") else []
    for call in message.get("tool_calls") or ():
        text = call["function"]["arguments"]
        text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
        lines.append(f"{call['function']['name']} {text}")
    return "\n".join(lines)


def common_length(a, b):
    """The length of the common prefix of two texts or lists."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def drop_continued(rows, key=lambda turns: turns):
    """The rows without those whose turns, key(row), are the beginning of the next row's."""
    kept = []
    for row in rows:
        turns, last = key(row), key(kept[-1]) if kept else None
        if kept and turns != last and turns[: len(last)] == last:
            kept.pop()
        kept.append(row)
    return kept


# --------------------------------------------------------------------------------------------
# Templates in Jinja
# --------------------------------------------------------------------------------------------

OURS = Path(__file__).with_name("chat_templates") / "ours.jinja"
# The special tokens of our own template: one for each role, one that ends a turn, and one that
# begins a call. <think> and </think> are added where rows have thoughts.
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|call|>", "<|tool|>", "<|end|>")
THINK = ("<think>", "</think>")
# Tags in an assistant's content that become special tokens if the vocabulary has them.
ASSISTANT_TAGS = (*THINK, "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
# Escapes the name of a special token in a message, so that it is encoded as plain text. It is a
# Unicode noncharacter; a text that contains it has it doubled.
MARK = "\ufdd0"
CONTINUE_HERE = "\ufdd1 "  # appended to a message that is to be continued, to find its end
# probes that are easy to find in a template's output
CONTENT, TOOL, KEY, CALL_ID = "Zq7", "Zq8", "Zq9", "call00000"


class Arguments(dict):
    """A call's arguments for a template. If they came as text, `tojson` writes that `text`."""

    text = None


def to_json(value, indent=None, ensure_ascii=False, **options):
    """Jinja's `tojson` as transformers has it: without escapes for HTML."""
    if isinstance(value, Arguments) and value.text and indent is None:
        return value.text
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=64)
def compile_template(source):
    """A chat template in Jinja, with what transformers provides. UserError if it is malformed."""
    loops = "jinja2.ext.loopcontrols"
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loops])

    def raise_exception(message):
        raise TemplateError(message)

    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # {% generation %} marks the assistant's text in some templates: the mask does not need it
    source = re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", source)
    with explained("the model's chat template cannot be read", TemplateError):
        return env.from_string(source)


def either(names):
    """A pattern that finds each of the names, the longest one if several share a prefix."""
    names = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def escape(value, names):
    """The value with a MARK inside each match of the pattern `names`, in all texts in it."""
    if isinstance(value, str):
        return names.sub(lambda m: m[0][0] + MARK + m[0][1:], value.replace(MARK, 2 * MARK))
    if isinstance(value, list | tuple):
        return [escape(v, names) for v in value]
    if isinstance(value, dict):
        return {escape(k, names): escape(v, names) for k, v in value.items()}
    return value


class Template:
    """The chat template of a tokenizer: the Jinja that its model came with, or ours, which writes
    <|user|>hi<|end|><|assistant|>hello<|end|>.

    end       the id that closes an assistant's turn; `ends` are all ids that end one
    call_tag  the tag with which a call begins, "" if calls are bare JSON, None if there are none;
              `call` is the id of that tag, None if it is not a token
    tags      {tag of a thought or a call: its spelling in `Reply`}, with a MARK if it is one token,
              to tell it from the same text; `tag_ids` is {id: that spelling}
    blanks    the white space that it writes before and after an answer, as Llama 2's does
    spoken    the ids of the special tokens that an answer may contain
    """

    def __init__(self, tokenizer):
        self.tokenizer, special = tokenizer, tokenizer.special
        self.ours = set(CHAT_TOKENS) <= set(special)
        sources = OURS.read_text(encoding="utf-8") if self.ours else tokenizer.spec["chat_template"]
        self.sources = sources if isinstance(sources, dict) else {"default": sources}
        special_ids = set(special.values())
        self.variables = {"add_generation_prompt": False, "documents": None}
        self.variables |= tokenizer.spec.get("template_tokens", {})
        self.typed = either(special)
        self.typed_by_assistant = either(set(special) - set(ASSISTANT_TAGS))
        self.supports_tools = "tools" in self.source_for(tools=True)
        call = tool_call(TOOL, {KEY: 0}, CALL_ID)
        with explained("the model's chat template cannot be used"):
            said, self.called = self.probe({"content": CONTENT}), ""
            with contextlib.suppress(ValueError):
                self.called = self.probe({"content": "", "tool_calls": [call]})
        before, _, after = said.rpartition(CONTENT)
        self.end = next((i for i in self.encode(after) if i in special_ids), tokenizer.eos_id)
        # SentencePiece may put a space of its own in front of what follows a special token
        alone, within = (tokenizer.encode(CONTENT, place) for place in (self.place, "text"))
        before = " " * (alone != within) + before
        blanks = before, after.split(tokenizer.decode([self.end]))[0]
        self.blanks = [text if text.isspace() else "" for text in blanks]
        self.ends = {self.end, tokenizer.eos_id, *tokenizer.spec.get("ends", ())}
        tags = CHAT_TOKENS[3:4] if self.ours else ("<tool_call>", "[TOOL_CALLS]")
        tag = next((tag for tag in tags if tag in self.called), None)
        self.call_tag = "" if tag is None and self.called.lstrip().startswith("{") else tag
        self.call = special.get(tag)
        tags = [t for t in (*THINK, tag) if t and (t in special or not self.ours)]
        self.tags = {t: (MARK if t in special else "") + t for t in tags}
        self.tag_ids = {special[t]: self.tags[t] for t in tags if t in special}
        spoken = special_ids & set(self.encode(said + self.called))
        spoken |= {special[t] for t in ASSISTANT_TAGS if t in special}
        self.spoken = sorted(spoken | ({self.end} if self.ours else self.ends))

    def probe(self, message):
        """What the template writes for an assistant's message that answers a question."""
        messages = [{"role": "user", "content": CONTENT}, {"role": "assistant"} | message]
        schema = {"name": TOOL, "description": "", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": schema}] if "tool_calls" in message else None
        text, start = self.write_answer(*self.escaped(messages, tools))
        self.place = self.place_after(text[:start])
        return text[start:]

    def opened(self, prompt):
        """The ids of <think> if a prompt ends with it, as DeepSeek-R1's does; else none."""
        begins = self.tokenizer.decode(prompt[-9:]).rstrip().endswith(THINK[0])
        return self.encode(THINK[0]) if begins and THINK[0] in self.tags else []

    def source_for(self, tools):
        """The Jinja for conversations with or without tools."""
        named = self.sources.get("tool_use") if tools else None
        return named or self.sources.get("default") or next(iter(self.sources.values()))

    def escaped(self, messages, tools):
        """The messages and schemas for the template: special tokens in them escaped, calls'
        arguments as `Arguments` if they are an object."""
        has_developer = "developer" in self.source_for(tools)
        result = []
        for m in messages:
            names = self.typed_by_assistant if m["role"] == "assistant" else self.typed
            new = {k: escape(v, names) for k, v in m.items() if k != "tool_calls"}
            new["content"] = new.get("content") or ""
            if m["role"] == "developer" and not has_developer:  # OpenAI's name for system
                new["role"] = "system"
            if calls := escape(m.get("tool_calls"), self.typed):
                new["tool_calls"] = calls
            for call in calls or ():
                text = call["function"]["arguments"]
                with contextlib.suppress(ValueError):
                    arguments = Arguments(parse_call(call)[1])
                    arguments.text = text if isinstance(text, str) else None
                    call["function"]["arguments"] = arguments
            result.append(new)
        return result, escape(tools, self.typed) or None

    def write(self, messages, tools, variables=None):
        """The text of an `escaped` conversation. ValueError if the template refuses it."""
        variables = self.variables | (variables or {}) | {"messages": messages, "tools": tools}
        try:
            return compile_template(self.source_for(tools)).render(variables)
        except Exception as e:  # a template is a program that someone else wrote
            raise ValueError(f"the chat template refuses the conversation: {e}") from e

    def write_answer(self, messages, tools):
        """(text of an `escaped` conversation, where its last message begins: the prompt's end)."""
        text = self.write(messages, tools)
        prompt = self.write(messages[:-1], tools, {"add_generation_prompt": True})
        # the prompt may end with what the text lacks
        return text, len(prompt) if text.startswith(prompt) else common_length(text, prompt)

    def place_after(self, text):
        """The `follows` argument of `encode` for what comes after `text`: "special" if it ends with
        a special token, "text" after other text, "" at the start."""
        return text and ("special" if text.endswith(tuple(self.tokenizer.special)) else "text")

    def encode(self, text, follows=None):
        """The ids of a text that the template wrote; names of special tokens become the tokens."""
        parts = re.split(f"({self.typed.pattern})", text)
        parts = [re.sub(f"{MARK}({MARK}?)", r"\1", part) for part in parts]
        return self.tokenizer.encode_parts(parts, follows)

    def rows(self, messages, tools=None, learned=lambda i: True):
        """[(ids, mask, numbers of the messages that are learned)] of a conversation: one row with
        all turns of the assistant for which learned(i) holds, or several if the template writes
        earlier turns differently once there are later ones, as Qwen3's does with thoughts.

        <|user|> hi <|end|> <|assistant|> hello <|end|>
        0        0  0       0             1     1
        """
        (messages, tools), end = self.escaped(messages, tools), self.tokenizer.decode([self.end])
        rows = []  # (text, where each turn that is learned starts and stops, their numbers)
        for i, m in enumerate(messages):
            if m["role"] != "assistant" or not learned(i):
                continue
            try:
                text, start = self.write_answer(messages[: i + 1], tools)
            except ValueError:
                if i:
                    raise
                continue  # many templates refuse an empty conversation: there is no prompt
            if any(c["function"]["name"] not in text[start:] for c in m.get("tool_calls", ())):
                raise ValueError("the chat template writes no tool calls")
            before, mark, _ = text[start:].partition(end)
            borders, numbers = [start, start + len(before + mark)], [i]
            if rows and text[:start].startswith(rows[-1][0][: rows[-1][1][-1]]):
                _, earlier, turns = rows.pop()
                borders, numbers = earlier + borders, turns + numbers
            rows.append((text, borders, numbers))
        return [(*self.encode_row(text, borders), numbers) for text, borders, numbers in rows]

    def encode_row(self, text, borders):
        """(ids, mask) of a text that is learned between borders 0 and 1, 2 and 3, and so on. No
        token crosses a border, since the model reads the prompt before it writes."""
        ids, mask = [], []
        for n, (start, stop) in enumerate(pairwise([0, *borders, len(text)])):
            part = self.encode(text[start:stop], self.place_after(text[:start]))
            if part and n % 2 == 0 and mask and mask[-1] and ids[-1] not in self.ends:
                mask += [int(part[0] in self.ends)] + [0] * (len(part) - 1)  # GLM ends with a role
            else:
                mask += [n % 2] * len(part)
            ids += part
        return ids, mask

    def prompt_ids(self, messages, tools=None, variables=None):
        """Ids of a conversation up to where the answer begins. The template's `variables` may have
        add_generation_prompt=False, so that they end with the last turn, and
        continue_final_message=True, so that they end within it. ValueError if the template refuses
        the conversation, or does not write the message that is to be continued."""
        variables = variables or {}
        continued = variables.get("continue_final_message", False)
        variables = {"add_generation_prompt": not continued} | variables
        if continued:
            last = messages[-1]
            if variables["add_generation_prompt"] or last.get("tool_calls"):
                excluded = "add_generation_prompt, or tool calls in the last message"
                raise ValueError(f"continue_final_message is not possible with {excluded}")
            messages = [*messages[:-1], last | {"content": last["content"] + CONTINUE_HERE}]
        text = self.write(*self.escaped(messages, tools), variables)
        if continued:
            text, mark, after = text.rpartition(CONTINUE_HERE.strip())
            if not mark:
                raise ValueError("the chat template does not write the message to be continued")
            text = text if after.startswith(" ") else text.rstrip()  # some trim messages
        return self.encode(text)

    def next_ids(self, messages, new):
        """The ids that `new` messages and the start of the next answer add to a conversation whose
        last message is an answer that `end` has ended. ValueError if the template then writes that
        conversation differently: no ids could be added to those that were drawn."""
        end = self.tokenizer.decode([self.end])
        before, mark, _ = self.write(*self.escaped(messages, None)).rpartition(end)
        text = self.write(*self.escaped(messages + new, None), {"add_generation_prompt": True})
        if not mark or not text.startswith(before + mark):
            raise ValueError("the chat template writes a turn differently once others follow")
        return self.encode(text[len(before + mark) :], self.place_after(before + mark))

    def fit_prompt(self, messages, tools, room, variables=None):
        """`prompt_ids`, at most `room`: the oldest turns are dropped first, but not the system
        message. If the last turn is still too long, a system message of more than half of the room
        is dropped, then the tools, then the start of that turn."""
        system, turns = split_system(messages)
        sizes = accumulate(len(self.tokenizer.encode(message_text(m))) for m in turns[::-1])
        most = max(1, sum(size <= room for size in sizes))  # turns that may fit
        attempts = [([*system, *turns[-n:]], tools) for n in range(most, 0, -1)]
        if turns and room < 3 + 2 * sum(len(self.tokenizer.encode(m["content"])) for m in system):
            system = []
        attempts += [([*system, *turns[-1:]], tools), ([*system, *turns[-1:]], None)]
        for attempt in attempts[:-1]:
            with contextlib.suppress(ValueError):  # some templates require a user turn first
                ids = self.prompt_ids(*attempt, variables)
                if len(ids) <= room:
                    return ids
        ids = self.prompt_ids(*attempts[-1], variables)
        while len(ids) > room and turns and (said := self.tokenizer.encode(turns[-1]["content"])):
            text = self.tokenizer.decode(said[len(ids) - room :]).lstrip("\ufffd")
            turns = [turns[-1] | {"content": text}]
            ids = self.prompt_ids([*system, *turns], None, variables)
        return ids[-room:]


@lru_cache(maxsize=16)
def get_template(tokenizer):
    """The Template of a tokenizer; None for the tokenizer of a base model, which has none."""
    ours = set(CHAT_TOKENS) <= set(tokenizer.special)
    return Template(tokenizer) if ours or tokenizer.spec.get("chat_template") else None
