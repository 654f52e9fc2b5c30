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
        return self._release(self.decoder.decode(token))

    def finish(self):
        """What was still held back at the end."""
        text, self.held = self._release(self.decoder.decode(b"", final=True)) + self.held, ""
        return text

    def _release(self, text):
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


class Reply:
    """An answer as its ids come: `feed` returns what can be shown, `ended` says whether it is over,
    `message` what it was. With a Template it is a turn of a chat: a call is not shown, `thinking`
    says whether the last id belongs to a thought. `ids` are what the prompt says of it already."""

    def __init__(self, tokenizer, template=None, stops=(), ids=()):
        self.stream, self.template = TextStream(tokenizer, stops), template
        self.ends = template.ends if template else {tokenizer.eos_id}
        self.thought, self.spoken = map(tokenizer.special.get, ("<think>", "</think>"))
        self.ids, self.text, self.ended = list(ids), "", False

    @property
    def calls(self):
        """Whether a call has begun."""
        return bool(self.template and self.template.begins_call(self.ids))

    @property
    def thinking(self):
        """Whether it is a thought so far."""
        return self.thought in self.ids and self.spoken not in self.ids

    def feed(self, i):
        """The text that id `i` lets us show, maybe none."""
        self.ids.append(i)
        text = "" if self.calls else self.stream.feed(i)
        self.ended = i in self.ends or self.stream.stopped
        self.text += text
        return text

    def finish(self):
        """The text held back until the end; a character that was cut off is nothing to show."""
        text = self.stream.finish().rstrip(UNKNOWN)
        self.text += text
        return text

    def message(self):
        """The assistant's message, see `Template.parse`; calls get an id each."""
        if self.template is None:
            return {"role": "assistant", "content": self.text}
        message = self.template.parse(self.ids)
        for call in message.get("tool_calls") or ():
            call["id"] = secrets.token_hex(5)[:9]  # the length that Mistral's template wants
        return message | {"content": message["content"].rstrip(UNKNOWN)}
