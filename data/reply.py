"""Ids to text as they come, and the message that an answer is."""
import codecs
import contextlib
import json
import re
import secrets

from data.chat import MARK, THINK, tool_call
from data.tokenizer import UNKNOWN


class TextStream:
    """Ids to text as they come: `feed` returns what can be shown already.

    An incomplete character (a Chinese one takes three bytes, often two tokens) is held back, and so
    is text that may turn out to begin a stop string. After a stop string `stopped` is True and
    nothing more is returned.
    """

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped = "", False

    def feed(self, i):
        """The text that id `i` completes, perhaps none."""
        hidden = i in self.tokenizer.special.values()
        token = b"" if hidden else self.tokenizer.token_bytes(i) or b""
        return self.push(self.decoder.decode(token))

    def finish(self):
        """What was held back until the end."""
        text, self.held = self.push(self.decoder.decode(b"", final=True)) + self.held, ""
        return text

    def push(self, text):
        """What can be shown once `text` is there, too."""
        if self.stopped:
            return ""
        text, stop, self.held = split_at(self.held + text, self.stops)
        self.stopped = bool(stop)
        self.held = "" if stop else self.held
        return text


def split_at(text, marks, last=False):
    """(text before the first of the marks, that mark, the rest). Without a mark it is "", and the
    rest is the end of the text that may begin one; nothing if the text is the `last`."""
    at, mark = min(((text.find(m), m) for m in marks if m in text), default=(len(text), ""))
    if not mark and not last:
        at -= max((overlap(text, m) for m in marks), default=0)
    return text[:at], mark, text[at + len(mark) :]


def overlap(text, mark):
    """The length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(text), len(mark)), 0, -1) if text.endswith(mark[:n])), 0)


THOUGHT = "reasoning_content"


class Reply:
    """An answer as its ids come. `feed` and `finish` return the text that can be shown now,
    {"content" or "reasoning_content": text}; `ended` says whether the answer is over.

    With a Template the answer is a turn of a chat, whose calls are not shown. `ids` are its first
    ids if the prompt ends with them. `stop_ids` end it, too, and are not shown. Stop strings are
    only looked for after `min_tokens` ids."""

    def __init__(self, tokenizer, template=None, stops=(), ids=(), stop_ids=(), min_tokens=0):
        self.source, self.stream = TextStream(tokenizer), TextStream(tokenizer, stops)
        self.template, self.kind, self.ended, self.calls = template, "content", False, []
        self.tags = template.tags if template else {}
        self.call_tag = self.tags.get(template.call_tag) if template else None
        self.pending, self.begun, self.said = "", set(), {"content": ""}
        self.ends = template.ends if template else {tokenizer.eos_id}
        self.stops, self.wait, self.stop_ids = self.stream.stops, min_tokens + len(ids), ()
        for i in ids:
            self.feed(i)
        self.said, self.stop_ids = {"content": ""}, set(stop_ids)
        self.ends = self.ends | self.stop_ids

    def next_tags(self):
        """{tag that may come next: the kind of the text after it}."""
        if self.kind == THOUGHT:
            return {self.tags[THINK[1]]: "content"}
        tags = {self.call_tag: "call"} if self.call_tag else {}
        think, text = self.tags.get(THINK[0]), self.pending.lstrip()
        if think and not self.begun and (text.startswith(think) or think.startswith(text)):
            tags[think] = THOUGHT
        return tags

    def feed(self, i):
        """The text that can be shown after id `i`."""
        if i in self.stop_ids:
            self.ended = True
            return {}
        self.stream.stops = [] if self.wait > 0 else self.stops
        self.wait -= 1
        tag = self.template.tag_ids.get(i) if self.template else None
        self.pending += tag if tag in self.next_tags() else self.source.feed(i)
        new = self.take()
        self.ended = i in self.ends or self.stream.stopped
        return new

    def take(self, last=False):
        """The part of `pending` that can be shown. What may become a tag is held back. Blanks
        before a tag are dropped."""
        new, bare_calls = {}, self.template is not None and self.template.call_tag == ""
        while self.kind != "call":
            said_nothing = self.kind not in self.begun
            bare = bare_calls and said_nothing and self.kind == "content"
            if bare and self.pending.lstrip().startswith("{"):
                self.kind = "call"
                break
            tags = self.next_tags()
            text, tag, rest = split_at(self.pending, tags, last)
            if self.template:
                ended = last and not tag and self.kind == "content"
                text = text.removesuffix(self.template.blanks[1]) if ended else text.rstrip()
            # the text of calls is kept whole, since it is content if it turns out to be malformed
            to_call = tags.get(tag, "call") == "call"
            self.pending = self.pending[len(text) :] if to_call else rest
            if self.template and said_nothing:
                first = self.kind == "content" and not self.begun
                text = text.removeprefix(self.template.blanks[0]) if first else text.lstrip("\n")
            self.show(new, text)
            if not tag:
                break
            self.show(new, "", self.stream.finish())
            if self.kind == THOUGHT:  # it has begun even if it is empty
                self.begun.add(THOUGHT)
            self.kind = tags[tag]
        return new

    def show(self, new, text, held=""):
        """Add `text`, up to a stop string, and `held` to what is new and to what was said."""
        self.begun |= {self.kind} if text else set()
        if text := self.stream.push(text) + held:
            new[self.kind] = new.get(self.kind, "") + text
            self.said[self.kind] = self.said.get(self.kind, "") + text

    def finish(self):
        """What was held back until the end, without an incomplete character. Malformed calls are
        text; each of the others gets an id."""
        self.pending += self.source.finish().rstrip(UNKNOWN)
        new, held = self.take(last=True), ""
        if self.kind == "call":
            self.kind, self.calls = "content", read_calls(self.pending, self.template)
            text = self.pending.replace(MARK, "").rstrip(UNKNOWN)
            text = text if self.said["content"] else text.lstrip("\n")
            held = "" if self.calls else text
            for n, call in enumerate(self.calls):
                if call.get("id") in (None, *(c["id"] for c in self.calls[:n])):
                    call["id"] = secrets.token_hex(5)[:9]  # the length that Mistral's requires
        self.show(new, "", self.stream.finish() + held)
        return new

    def message(self):
        """The assistant's message; complete after `finish`."""
        calls = {"tool_calls": self.calls} if self.calls else {}
        return {"role": "assistant"} | self.said | calls


def parse(ids, template, prompt=()):
    """The assistant's message that the ids generated after a prompt mean."""
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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def json_call(text):
    """The call at the start of a text, a JSON object with a name and arguments (Llama: parameters)
    that stay as they are written. ValueError if there is none."""
    text = text.lstrip()
    call, _ = json.JSONDecoder().raw_decode(text)
    key = "arguments" if "arguments" in call else "parameters"
    if not isinstance(call["name"], str) or not isinstance(call[key], dict):
        raise ValueError("not a call")
    for found in re.finditer(rf'"{key}"\s*:\s*', text):
        with contextlib.suppress(ValueError):
            value, end = json.JSONDecoder().raw_decode(text, found.end())
            if value == call[key]:
                call_id = call.get("id") if isinstance(call.get("id"), str) else None
                return tool_call(call["name"], text[found.end() : end], call_id)
    raise ValueError("not a call")
