"""Answers of OpenAI's API, as their ids come: streamed, or whole."""
import codecs
import queue
import secrets
import time
from dataclasses import dataclass, field

from data.reply import Reply
from data.scheduler import Job


class ApiError(Exception):
    """What is answered with an HTTP status of 400 or more, in OpenAI's shape."""

    KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self):
        """The JSON object of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": self.KINDS.get(self.status, kind)}
        return {"error": error | {"param": self.param, "code": self.code}}


@dataclass(eq=False)
class Choice:
    """One of the texts of an answer: its job, what has come of it, what has not been sent yet."""

    job: Job
    reply: Reply
    tokens: list = field(default_factory=list)  # (id, its log probability, the likeliest ids)
    text: str = ""
    count: int = 0  # new ids
    finish: str | None = None
    sent: int = 0  # tokens sent so far
    offset: int = 0  # characters before the next token
    decoder: object = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )


class Answer:
    """What a request asked for, as it is written: `chunks` streams it, `whole` waits for its end.
    `close` ends the jobs, whatever has become of them."""

    def __init__(self, api, body, choices, chat):
        self.api, self.body, self.choices, self.chat = api, body, choices, chat
        kind = "chat.completion" if chat else "text_completion"
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.head = {"id": self.id, "object": kind, "created": int(time.time())}
        self.head |= {"model": body.get("model", api.names[0])}
        api.scheduler.submit([c.job for c in choices])

    def close(self):
        """Nobody wants any more of it."""
        for choice in self.choices:
            choice.job.cancelled = True

    def parts(self):
        """Yield (choice, what is new of its message, whether it was the last) as they come, None
        ten times a second while nothing comes."""
        left, events = len(self.choices), self.choices[0].job.events
        while left:
            try:
                index, value, logprob = events.get(timeout=0.1)
            except queue.Empty:
                yield None
                continue
            choice = self.choices[index]
            if isinstance(value, Exception):
                raise ApiError(500, f"the model failed: {value}") from value
            if isinstance(value, int):
                if choice.finish is None:
                    yield choice, self.add(choice, value, logprob), False
                continue
            if value == "cancelled" and choice.finish is None:
                raise ApiError(503, "the server is closing")
            left, choice.finish = left - 1, choice.finish or value
            new = choice.reply.finish()
            choice.text += new.get("content", "")
            yield choice, new, True

    def add(self, choice, i, logprob):
        """What a new id lets us show."""
        job, text, new = choice.job, "", {}
        if self.body.get("echo") and not self.chat and not choice.count:
            text = self.api.tokenizer.decode(job.prompt)
            scored = zip(job.prompt[1:], job.scored)
            choice.tokens += [(job.prompt[0], None, ()), *((i, *known) for i, known in scored)]
        if job.max_tokens:  # 0 is for the echo alone
            choice.count += 1
            new = choice.reply.feed(i)
            if logprob and not (self.chat and i in choice.reply.ends):
                choice.tokens.append((i, *logprob))
        if choice.reply.ended:
            choice.finish, job.cancelled = "stop", True
        if text:
            new = {"content": text + new.get("content", "")}
        choice.text += new.get("content", "")
        return new

    def usage(self):
        """Tokens read and written."""
        read = sum({id(c.job.prompt): len(c.job.prompt) for c in self.choices}.values())
        written = sum(c.count for c in self.choices)
        usage = {"prompt_tokens": read, "completion_tokens": written}
        cached = {}  # of each prompt: those of several choices are read once
        for c in self.choices:
            cached[id(c.job.prompt)] = max(c.job.cached, cached.get(id(c.job.prompt), 0))
        cached = {"cached_tokens": sum(cached.values())}
        return usage | {"total_tokens": read + written, "prompt_tokens_details": cached}

    def logprobs(self, choice):
        """The log probabilities of the tokens that have not been sent yet; None if nobody asked."""
        if choice.job.settings["top"] is None:
            return None
        new, choice.sent, name = choice.tokens[choice.sent :], len(choice.tokens), self.api.token
        if self.chat:
            return {"content": [
                self.api.scored(i, p) | {"top_logprobs": [self.api.scored(*t) for t in top]}
                for i, p, top in new
            ]}  # fmt: skip
        offsets = []
        for i, _, _ in new:
            offsets.append(choice.offset)
            raw = self.api.tokenizer.token_bytes(i) or b""
            choice.offset += len(choice.decoder.decode(raw))  # a part of a character is 0 long
        return {
            "tokens": [name(i) for i, _, _ in new],
            "token_logprobs": [finite(p) for _, p, _ in new],
            "top_logprobs": [{name(i): finite(p) for i, p in top} or None for _, _, top in new],
            "text_offset": offsets,
        }

    def finish_reason(self, choice):
        """Why it ended."""
        whole = choice.finish == "stop" and "tool_calls" in self.message(choice)
        return "tool_calls" if whole else choice.finish

    def chunks(self):
        """The events of a stream, as dicts; None while nothing comes."""
        head = self.head | ({"object": "chat.completion.chunk"} if self.chat else {})

        def chunk(choice, content, finish=None):
            own = {"index": choice.job.index} | ({"delta": content} if self.chat else content)
            own |= {"logprobs": self.logprobs(choice), "finish_reason": finish}
            return head | {"choices": [own]}

        for choice in self.choices if self.chat else ():
            yield chunk(choice, {"role": "assistant", "content": ""})
        for part in self.parts():
            if part is None:
                yield None
                continue
            choice, new, last = part
            for key, text in new.items():
                yield chunk(choice, {key if self.chat else "text": text})
            if last:
                message = self.message(choice)
                if "tool_calls" in message:
                    calls = [{"index": n} | c for n, c in enumerate(message["tool_calls"])]
                    yield chunk(choice, {"tool_calls": calls})
                yield chunk(choice, {} if self.chat else {"text": ""}, self.finish_reason(choice))
        if self.body.get("stream_options", {}).get("include_usage"):
            yield head | {"choices": [], "usage": self.usage()}

    def message(self, choice):
        """The message of a chat that has been written; {} of a mere text."""
        if not self.chat:
            return {}
        message = choice.reply.message()
        calls = message.get("tool_calls")
        if calls and self.body.get("parallel_tool_calls") is False:
            message["tool_calls"] = calls[:1]
        return message | ({"content": message["content"] or None} if calls else {})

    def whole(self):
        """Yield None until all is written, then the answer as one dict."""
        for part in self.parts():
            if part is None or not part[2]:
                yield None
        choices = []
        for choice in self.choices:
            content = {"message": self.message(choice)} if self.chat else {"text": choice.text}
            own = {"index": choice.job.index} | content | {"logprobs": self.logprobs(choice)}
            choices.append(own | {"finish_reason": self.finish_reason(choice)})
        yield self.head | {"choices": choices, "usage": self.usage()}


def finite(logprob):
    """A log probability that JSON can hold."""
    return None if logprob is None else max(logprob, -9999.0)
