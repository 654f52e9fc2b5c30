"""Answers of OpenAI's API, as their ids arrive: streamed, or complete."""
import queue
import secrets
import time
from dataclasses import dataclass, field

from data.reply import Reply
from data.scheduler import Job


class ApiError(Exception):
    """An error that is sent with an HTTP status of 400 or more and a `body` in OpenAI's form."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = types.get(status, "server_error" if status >= 500 else "invalid_request_error")
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.status, self.body = status, {"error": error}


@dataclass(eq=False)
class Choice:
    """One text of an answer."""

    job: Job
    reply: Reply
    tokens: list = field(default_factory=list)  # (id, log probability, top ids), not sent yet
    count: int = 0  # of new ids
    finish: str | None = None  # why the text ended
    message: dict | None = None  # set when it is complete


class Answer:
    """The answer to a request: `chunks` streams it, `result` waits until it is complete. Both yield
    None at least ten times a second while there is nothing to send, so that the caller can check on
    the client."""

    def __init__(self, body, tokenizer, choices, chat):
        self.body, self.tokenizer, self.choices, self.chat = body, tokenizer, choices, chat
        name, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self.jobs = [choice.job for choice in choices]
        self.head = {"id": f"{name}-{secrets.token_hex(12)}", "object": kind}
        self.head |= {"created": int(time.time()), "model": body["model"]}

    def updates(self):
        """Yield (choice, new parts of its message), or (None, {}) while nothing arrives."""
        running, events = len(self.choices), self.choices[0].job.events
        while running:
            try:
                index, value, scores = events.get(timeout=0.1)
            except queue.Empty:
                yield None, {}
                continue
            choice = self.choices[index]
            if isinstance(value, Exception):
                raise ApiError(500, f"the model failed: {value}") from value
            if value == "cancelled" and choice.finish is None:
                raise ApiError(503, "the server is closing")
            if not isinstance(value, int):
                running -= 1
                yield choice, self.complete(choice, value)
            elif choice.finish is None:
                yield choice, self.add(choice, value, scores)

    def add(self, choice, i, scores):
        """The new parts of the message after id `i`; the prompt comes first if it is echoed."""
        job, new, echoed = choice.job, {}, self.body.get("echo") and not choice.count
        if echoed:
            prompt_scores = [(None, ()), *job.scored]
            choice.tokens += [(i, *scores) for i, scores in zip(job.prompt, prompt_scores)]
        if job.max_tokens:  # with 0 only the prompt is echoed
            choice.count += 1
            new = choice.reply.feed(i)
            if scores and not (self.chat and i in choice.reply.ends):
                choice.tokens.append((i, *scores))
        if choice.reply.ended:
            choice.finish, job.cancelled = "stop", True
        if echoed:
            new["content"] = self.tokenizer.decode(job.prompt) + new.get("content", "")
        return new

    def complete(self, choice, reason):
        """The last parts of the message. Sets `choice.message`, the complete one."""
        new, choice.finish = choice.reply.finish(), choice.finish or reason
        choice.message = choice.reply.message()
        if calls := choice.message.get("tool_calls"):
            calls = calls[:1] if self.body.get("parallel_tool_calls") is False else calls
            choice.message |= {"content": choice.message["content"] or None, "tool_calls": calls}
            choice.finish = "tool_calls" if choice.finish == "stop" else choice.finish
            new = new | {"tool_calls": [{"index": n} | call for n, call in enumerate(calls)]}
        return new

    def usage(self):
        """Counts of tokens. The choices of one prompt share its list of ids, which counts once."""
        # the first one, since the others find the prompt in the cache
        jobs = {id(c.job.prompt): c.job for c in reversed(self.choices)}.values()
        read, new = sum(len(job.prompt) for job in jobs), sum(c.count for c in self.choices)
        usage = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
        return usage | {"prompt_tokens_details": {"cached_tokens": sum(j.cached for j in jobs)}}

    def logprobs(self, choice):
        """The log probabilities of the tokens that were not sent yet; None if not asked for."""
        if choice.job.settings["top"] is None:
            return None
        tokens, choice.tokens = choice.tokens, []

        def entry(i, logprob):
            content = self.tokenizer.token_bytes(i) or b""
            text = content.decode(errors="replace")
            return {"token": text, "logprob": finite(logprob), "bytes": list(content)}

        def name(i):  # "bytes:\xe4" for a part of a character
            content = self.tokenizer.token_bytes(i) or f"<|{i}|>".encode()
            text = content.decode(errors="replace")
            escaped = "".join(f"\\x{byte:02x}" for byte in content)
            return text if text.encode() == content else f"bytes:{escaped}"

        if self.chat:
            best = [{"top_logprobs": [entry(*t) for t in top]} for _, _, top in tokens]
            return {"content": [entry(i, p) | b for (i, p, _), b in zip(tokens, best)]}
        return {
            "tokens": [name(i) for i, _, _ in tokens],
            "token_logprobs": [finite(p) for _, p, _ in tokens],
            "top_logprobs": [{name(i): finite(p) for i, p in top} or None for _, _, top in tokens],
        }

    def chunks(self):
        """Yield the events of a stream as dicts."""
        head = self.head | ({"object": "chat.completion.chunk"} if self.chat else {})

        def chunk(choice, content, finish=None):
            entry = {"index": choice.job.index} | ({"delta": content} if self.chat else content)
            entry |= {"logprobs": self.logprobs(choice), "finish_reason": finish}
            return head | {"choices": [entry]}

        for choice in self.choices if self.chat else ():
            yield chunk(choice, {"role": "assistant", "content": ""})
        for choice, new in self.updates():
            if not new:
                yield None
            for key, value in new.items():
                yield chunk(choice, {key if self.chat else "text": value})
            if choice and choice.message:
                yield chunk(choice, {} if self.chat else {"text": ""}, choice.finish)
        if self.body.get("stream_options", {}).get("include_usage"):
            yield head | {"choices": [], "usage": self.usage()}

    def result(self):
        """Yield None until everything is generated, then the answer as one dict."""
        for _ in self.updates():
            yield None
        entries = []
        for choice in self.choices:
            text = self.tokenizer.decode(choice.job.prompt) if self.body.get("echo") else ""
            text = {"text": text + (choice.message["content"] or "")}
            content = {"message": choice.message} if self.chat else text
            entry = {"index": choice.job.index} | content | {"logprobs": self.logprobs(choice)}
            entries.append(entry | {"finish_reason": choice.finish})
        yield self.head | {"choices": entries, "usage": self.usage()}


def finite(logprob):
    """A log probability that JSON can represent."""
    return None if logprob is None else max(logprob, -9999.0)
