"""Turns ids into text as they are generated, and the text of an answer into a message."""
import codecs
import contextlib
import json
import re
import secrets

from data.chat import MARK, THINK, tool_call
from data.cli import MALFORMED
from data.tokenizer import UNKNOWN


class TextStream:
    """Ids to text as they come: `feed` returns what can be shown already. An incomplete character
    and text that may begin a stop string are held back. Nothing follows a stop string."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped = "", False

    def feed(self, i):
        """The text that id `i` completes, perhaps none; special tokens have none."""
        special = i in self.tokenizer.special.values()
        token = b"" if special else self.tokenizer.token_bytes(i) or b""
        return self.push(self.decoder.decode(token))

    def finish(self):
        """What was held back until the end."""
        text, self.held = self.push(self.decoder.decode(b"", final=True)) + self.held, ""
        return text

    def push(self, text):
        """What can be shown after a further `text`."""
        if self.stopped:
            return ""
        text, stop, rest = split_at(self.held + text, self.stops)
        self.stopped, self.held = bool(stop), "" if stop else rest
        return text


def split_at(text, marks, last=False):
    """(text before the first of the marks, that mark, the rest). If there is none, the mark is "",
    and the rest is the end of the text that may begin one, or "" if the text is complete."""
    at, mark = min(((text.find(m), m) for m in marks if m in text), default=(len(text), ""))
    if not mark and not last:
        starts = range(max(0, at - max(map(len, marks), default=0)), at)
        at = next((n for n in starts for m in marks if m.startswith(text[n:])), at)
    return text[:at], mark, text[at + len(mark) :]


class Reply:
    """An answer as its ids come. `feed` and `finish` return the text that can be shown now,
    {"content" or "reasoning_content": text}; `ended` says whether the answer is over.

    With a Template the answer is a turn of a chat, whose calls are not shown. `ids` are its first
    ids if the prompt ends with them. `stop_ids` end it, too, and are not shown. Stop strings count
    only after `min_tokens` ids."""

    def __init__(self, tokenizer, template=None, stops=(), ids=(), stop_ids=(), min_tokens=0):
        self.source, self.stream = TextStream(tokenizer), TextStream(tokenizer, stops)
        self.template, self.kind, self.ended, self.calls = template, "content", False, []
        self.stops, self.stop_ids, self.wait = self.stream.stops, set(stop_ids), min_tokens
        self.ends = self.stop_ids | (template.ends if template else {tokenizer.eos_id})
        self.tags = template.tag_ids if template else {}
        self.text = "".join(self.tags.get(i) or self.source.feed(i) for i in ids)
        self.shown, self.said = {}, {"content": ""}

    def feed(self, i):
        """The text that can be shown after id `i`."""
        if i in self.stop_ids:
            self.ended = True
            return {}
        self.stream.stops = [] if self.wait > 0 else self.stops
        self.wait -= 1
        self.text += self.tags.get(i) or self.source.feed(i)
        new = self.show(split_answer(self.text, self.template))
        self.ended = i in self.ends or self.stream.stopped
        return new

    def show(self, parts):
        """The text in `parts` that was not shown before, up to a stop string."""
        new = {}
        for kind, text in parts.items():
            if self.shown.get(kind) == text:
                continue
            if kind != self.kind:
                self.add(new, self.stream.finish())
                self.kind = kind
            if kind != "call":
                self.add(new, self.stream.push(text[len(self.shown.get(kind, "")) :]))
            self.shown[kind] = text
        return new

    def add(self, new, text):
        """Add a text of the current kind to what is new and to what was said."""
        for texts in (new, self.said) if text else ():
            texts[self.kind] = texts.get(self.kind, "") + text

    def finish(self):
        """What was held back until the end, without an incomplete character. Malformed calls are
        text; each of the others gets an id."""
        self.text += self.source.finish().rstrip(UNKNOWN)
        parts = split_answer(self.text, self.template, last=True)
        if call := parts.pop("call", ""):
            self.calls = read_calls(call, self.template)
            content, text = parts.get("content", ""), call.replace(MARK, "").rstrip(UNKNOWN)
            parts["content"] = content if self.calls else content + text
        for n, call in enumerate(self.calls):
            if call.get("id") in (None, *(c["id"] for c in self.calls[:n])):
                call["id"] = secrets.token_hex(5)[:9]  # the length that Mistral's requires
        new = self.show(parts)
        self.add(new, self.stream.finish())
        return new

    def message(self):
        """The assistant's message; complete after `finish`."""
        calls = {"tool_calls": self.calls} if self.calls else {}
        return {"role": "assistant"} | self.said | calls


def split_answer(text, template, last=False):
    """{"reasoning_content", "content", "call": text} of an answer, or of its beginning if it is not
    the `last`: then what may become a tag is left out. Blanks before a tag are dropped. A call
    includes its tag, since it is content if it turns out to be malformed."""
    if template is None:
        return {"content": text}
    parts, (think, end_think) = {}, map(template.tags.get, THINK)
    call_tag = template.tags.get(template.call_tag)

    def plain(part, kept=None):  # the tokens of other tags mean nothing in a part
        for tag in template.tag_ids.values() if MARK in part else ():
            part = part if tag == kept else part.replace(tag, "")
        return part

    start = text.lstrip()
    if think and start.startswith(think):
        thought, tag, text = split_at(start[len(think) :], [end_think], last)
        parts["reasoning_content"] = plain(thought).lstrip("\n").rstrip()
        if not tag:
            return parts
    elif think and think.startswith(start) and not last:
        return {}
    if template.call_tag == "" and text.lstrip().startswith("{"):
        return parts | {"call": plain(text)}
    content, tag, _ = split_at(text, [call_tag] if call_tag else [], last)
    content = content.removesuffix(template.blanks[1]) if last and not tag else content.rstrip()
    call = {"call": plain(text[len(content) :], call_tag)} if tag else {}
    content = plain(content)
    if not parts and not last and template.blanks[0].startswith(content):
        content = ""
    content = content.lstrip("\n") if parts else content.removeprefix(template.blanks[0])
    return parts | {"content": content} | call


def parse(ids, template, prompt=()):
    """The assistant's message that the ids generated after a prompt spell."""
    reply = Reply(template.tokenizer, template, ids=template.opened(prompt))
    for i in ids:
        reply.feed(i)
    reply.finish()
    return reply.message()


def read_calls(text, template):
    """The calls in the text that ends an answer; none if one of them is malformed."""
    tag = template.tags.get(template.call_tag)
    parts = text.split(tag)[1:] if tag else [text]
    if template.ours:  # `name {arguments}`, as the model wrote them, so that it sees its mistakes
        parts = [part.strip().partition(" ") for part in parts]
        return [tool_call(name, arguments) for name, _, arguments in parts]
    try:
        if template.call_tag == "[TOOL_CALLS]":
            parts = [json.dumps(call, ensure_ascii=False) for call in json.loads(parts[0])]
        if not tag:
            json.loads(text)  # nothing may follow a call without a tag
        return list(map(json_call, parts))
    except MALFORMED:
        return []


def json_call(text):
    """The call at the start of a text, a JSON object with a name and arguments (Llama: parameters)
    that stay as they are written. ValueError if there is none."""
    text = text.lstrip()
    call, _ = json.JSONDecoder().raw_decode(text)
    name, key = call["name"], "arguments" if "arguments" in call else "parameters"
    for match in re.finditer(rf'"{key}"\s*:\s*', text):
        with contextlib.suppress(ValueError):
            value, end = json.JSONDecoder().raw_decode(text, match.end())
            if value == call[key] and isinstance(value, dict) and isinstance(name, str):
                return tool_call(name, text[match.end() : end], call.get("id"))
    raise ValueError("not a call")
