"""Ids to text, as they come: what may be shown already, and what message it was in the end."""
import codecs
import secrets

from data.tokenizer import UNKNOWN


class TextStream:
    """Ids to text, as they come: `feed` returns what can be shown already.

    A character that is not complete yet (Chinese ones take three bytes, often two tokens) waits,
    and so does text that may turn out to be the beginning of a stop string. After a stop string
    `stopped` is True and nothing more comes.
    """

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped = "", False

    def feed(self, i):
        """The text that id `i` completes, maybe none."""
        hidden = i in self.tokenizer.special.values()
        token = b"" if hidden else self.tokenizer.token_bytes(i) or b""
        return self.push(self.decoder.decode(token))

    def finish(self):
        """What was still held back at the end."""
        text, self.held = self.push(self.decoder.decode(b"", final=True)) + self.held, ""
        return text

    def push(self, text):
        """What more text lets us show."""
        if self.stopped:
            return ""
        self.held += text
        ends = [at for s in self.stops if (at := self.held.find(s)) >= 0]
        if ends:
            out, self.held, self.stopped = self.held[: min(ends)], "", True
            return out
        wait = max((overlap(self.held, s) for s in self.stops), default=0)
        out, self.held = self.held[: len(self.held) - wait], self.held[len(self.held) - wait :]
        return out


def overlap(text, stop):
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


THOUGHT = "reasoning_content"


class Reply:
    """An answer as its ids come: `feed` and `finish` return what can be shown, {"content" or
    "reasoning_content": text}, `ended` says whether it is over, `message` what it was.

    With a Template it is a turn of a chat, whose calls are not shown. `ids` are its first ids if
    the prompt ends with them. It also ends with `stop_ids`, which are not shown, and stop strings
    are only looked for after `min_tokens` ids."""

    def __init__(self, tokenizer, template=None, stops=(), ids=(), stop_ids=(), min_tokens=0):
        self.source, self.stream = TextStream(tokenizer), TextStream(tokenizer, stops)
        self.template, self.kind, self.ended, self.calls = template, "content", False, []
        self.ends = template.ends if template else {tokenizer.eos_id}
        self.own, self.tags = (template.own, template.tags) if template else ({}, {})
        self.ids, self.pending, self.begun, self.said = [], "", [], {"content": ""}
        self.stops, self.left, self.stop_ids = self.stream.stops, min_tokens + len(ids), ()
        for i in ids:
            self.feed(i)
        self.said, self.stop_ids = {"content": ""}, set(stop_ids)
        self.ends = self.ends | self.stop_ids

    def next_tags(self):
        """{tag: kind of the text after it} of the tags that can come next."""
        if self.kind == THOUGHT:
            return {self.tags["</think>"]: "content"}
        tags = self.tags.items()
        calls = {tag: "call" for name, tag in tags if name != "<think>" and name[:2] != "</"}
        think, text = self.tags.get("<think>", ""), self.pending.lstrip()
        begins = think and not self.begun and (text.startswith(think) or think.startswith(text))
        return calls | ({think: THOUGHT} if begins else {})

    def feed(self, i):
        """What can be shown after id `i`, maybe nothing."""
        if i in self.stop_ids:
            self.ended = True
            return {}
        self.stream.stops = [] if self.left > 0 else self.stops
        self.left -= 1
        self.ids.append(i)
        tag = self.tags.get(self.own.get(i))
        self.pending += tag if tag in self.next_tags() else self.source.feed(i)
        new = self.take()
        self.ended = i in self.ends or self.stream.stopped
        return new

    def take(self, last=False):
        """What can be shown of the `pending` text. What may become a tag is held back; blanks
        around an answer, a thought or calls are dropped."""
        new = {}
        while self.kind != "call":
            tags, thinking, text = self.next_tags(), self.kind == THOUGHT, self.pending
            at, tag = min(((text.find(t), t) for t in tags if t in text), default=(-1, ""))
            wait = 0 if last else max((overlap(text, t) for t in tags), default=0)
            text = text[:at] if tag else text[: len(text) - wait]
            if self.template and (thinking or tag):
                text = text.rstrip("\n")
            elif self.template:
                text = text.removesuffix(self.template.blanks[1]) if last else text.rstrip()
            self.pending = self.pending[at + len(tag) if tag else len(text) :]
            if self.template and self.kind not in self.begun:
                text = text.lstrip("\n") if self.begun or thinking else text
                text = text if thinking else text.removeprefix(self.template.blanks[0])
                bare = self.template.bare_calls and not thinking
                if bare and text.lstrip().startswith("{"):
                    self.kind = "call"
                    break
            self.show(new, text)
            if not tag:
                break
            self.show(new, "", self.stream.finish())
            self.begun += [THOUGHT] * thinking
            self.kind = tags[tag]
        return new

    def show(self, new, text, held=""):
        """Add `text`, up to a stop string, and `held` to what is new and to what was said."""
        if text and self.kind not in self.begun:
            self.begun.append(self.kind)
        if text := self.stream.push(text) + held:
            new[self.kind] = new.get(self.kind, "") + text
            self.said[self.kind] = self.said.get(self.kind, "") + text

    def finish(self):
        """What was held back until the end, without an incomplete character. A broken call is text;
        the others get an id each."""
        self.pending += self.source.finish().rstrip(UNKNOWN)
        new = self.take(last=True)
        if self.kind != "call":
            self.show(new, "", self.stream.finish())
            return new
        message, self.kind = self.template.parse(self.ids), "content"
        self.calls = message.get("tool_calls") or []
        for n, call in enumerate(self.calls):
            if call.get("id") in (None, *(c["id"] for c in self.calls[:n])):
                call["id"] = secrets.token_hex(5)[:9]  # the length that Mistral's template wants
        if not self.calls:
            text = message["content"].removeprefix(self.said["content"])
            self.show(new, "", text.rstrip(UNKNOWN))
        return new

    def message(self):
        """The assistant's message; complete after `finish`."""
        calls = {"tool_calls": self.calls} if self.calls else {}
        return {"role": "assistant"} | self.said | calls
