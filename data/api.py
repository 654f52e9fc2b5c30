"""OpenAI's API: requests checked and turned into jobs; what becomes of them is in data/answer.py.

Chat completions, completions and models, as https://platform.openai.com/docs/api-reference has
them. Beyond it: top_k, min_p, repetition_penalty, stop_token_ids, min_tokens and ignore_eos;
`truncation: "auto"` leaves the oldest turns out where a conversation exceeds the context. A field
that would change the answer and is not supported is refused; others are ignored.
"""
import json
import queue
import re
import secrets
import time

from data.answer import Answer, ApiError, Choice, finite
from data.chat import content_text, get_template, read_call
from data.reply import Reply
from data.scheduler import Job

# --------------------------------------------------------------------------------------------
# Requests
# --------------------------------------------------------------------------------------------

# field: (its types, the least, the most)
NUMBERS = {
    "temperature": ((int, float), 0, 2),
    "top_p": ((int, float), 0, 1),
    "min_p": ((int, float), 0, 1),
    "top_k": ((int,), 0, 2**31),
    "repetition_penalty": ((int, float), 0.01, 100),
    "frequency_penalty": ((int, float), -2, 2),
    "presence_penalty": ((int, float), -2, 2),
    "max_tokens": ((int,), -1, 2**31),
    "max_completion_tokens": ((int,), -1, 2**31),
    "min_tokens": ((int,), 0, 2**31),
    "n": ((int,), 1, 16),
    "seed": ((int,), -(2**63), 2**63 - 1),
    "top_logprobs": ((int,), 0, 20),
    "logprobs": ((int,), 0, 20),
}
TURNS = ("add_generation_prompt", "continue_final_message")  # where the prompt of a chat ends
FLAGS = ("stream", "echo", "ignore_eos", "parallel_tool_calls", *TURNS)
# Fields of OpenAI's, vLLM's and llama.cpp's servers that would change the answer and are not
# supported: (their names, the values that change nothing).
UNSUPPORTED = (
    ("response_format", {"type": "text"}),
    ("function_call", "none"),
    ("modalities", [], ["text"]),
    ("reasoning_effort verbosity", "medium"),
    ("reasoning_format", "auto", "deepseek"),
    ("include_reasoning skip_special_tokens parse_tool_calls", True),
    ("length_penalty typical_p repeat_penalty", 1),
    ("n_predict thinking_token_budget top_n_sigma", -1),
    ("prompt_logprobs truncate_prompt_tokens guided_json json_schema",),
    (
        "functions suffix audio prediction web_search_options use_beam_search early_stopping "
        "guided_regex guided_choice guided_grammar structured_outputs structural_tag "
        "grammar logits_processors allowed_token_ids bad_words documents chat_template "
        "include_stop_str_in_output prompt_embeds mm_processor_kwargs logprob_token_ids "
        "return_token_ids return_tokens_as_token_ids return_tokens post_sampling_probs n_probs "
        "response_fields mirostat dynatemp_range xtc_probability dry_multiplier min_keep samplers "
        "input_prefix input_suffix input_extra image_data lora t_max_predict_ms",
        False, 0, "", [], {},
    ),
)  # fmt: skip


def parse_body(raw):
    """The JSON object of a request's body; ApiError if it is none."""

    def no_number(name):
        raise ValueError(f"{name} is no JSON")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=no_number)
        json.dumps(body, ensure_ascii=False).encode()  # half of a pair, \ud83d, is no text
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise ApiError(400, f"the body is no JSON in UTF-8: {reason}") from e
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object")
    if "max_tokens" in body and body["max_tokens"] is None:
        body["max_tokens"] = -1  # no limit; a completion that does not name it has 16
    return {k: v for k, v in body.items() if v is not None}


def check_fields(body, chat):
    """ApiError for a number or flag of a wrong type or outside of its limits, and for what is not
    supported. A limit of -1 becomes one that is never reached."""
    own = ("best_of", body.get("n", 1)), ("add_special_tokens", not chat)
    for names, *harmless in (*UNSUPPORTED, *own, ("echo" if chat else "", False)):
        for name in names.split():
            if name in body and body[name] not in harmless:
                raise ApiError(400, f"this value of {name} is not supported: leave it out", name)
    flags = (*FLAGS, "logprobs") if chat else FLAGS
    for name in flags:
        if not isinstance(body.get(name, False), bool):
            raise ApiError(400, f"{name} must be true or false", name)
    for name, (types, low, high) in NUMBERS.items():
        value = body.get(name, low)
        if name in flags:
            continue
        if type(value) not in types or not low <= value <= high:
            kind = "an integer" if types == (int,) else "a number"
            raise ApiError(400, f"{name} must be {kind} from {low} to {high}", name)
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) == 0 and (chat or not body.get("echo")):
            raise ApiError(400, f"{name} must be -1 or at least 1 (0 is for echo alone)", name)
        if body.get(name) == -1:
            body[name] = 2**31
        if body.get("min_tokens", 0) > body.get(name, 2**31):
            raise ApiError(400, f"min_tokens is more than {name}", "min_tokens")
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", "stream_options")


def stop_strings(body):
    """The texts that end an answer."""
    stops = body.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise ApiError(400, "stop must be a text, or up to four of them", "stop")
    if len(stops) > 4:
        raise ApiError(400, f"stop has {len(stops)} texts, at most 4 are possible", "stop")
    return stops


def token_settings(body, size):
    """(`logit_bias` as {id: number}, `stop_token_ids` as a set) for a vocabulary of `size` ids."""
    bias, ends = body.get("logit_bias") or {}, body.get("stop_token_ids") or []
    if not isinstance(bias, dict) or not all(
        re.fullmatch("[0-9]{1,9}", i) and int(i) < size
        and type(value) in (int, float) and -100 <= value <= 100 for i, value in bias.items()
    ):  # fmt: skip
        wanted = f'{{"ID": bias}}, ids from 0 to {size - 1}, biases from -100 to 100'
        raise ApiError(400, f"logit_bias must be {wanted}", "logit_bias")
    if not isinstance(ends, list) or not all(type(i) is int and 0 <= i < size for i in ends):
        wanted = f"a list of ids from 0 to {size - 1}"
        raise ApiError(400, f"stop_token_ids must be {wanted}", "stop_token_ids")
    return {int(i): value for i, value in bias.items()}, set(ends)


def read_messages(messages):
    """The messages of a request; ApiError if one is malformed. Arguments of a call that are not
    JSON stay as the model wrote them, so that it can correct them in its next turn."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", "messages")
    roles, out = ("system", "developer", "user", "assistant", "tool"), []
    for n, m in enumerate(messages):
        where = f"messages[{n}]"
        role = m.get("role") if isinstance(m, dict) else None
        role = "tool" if role == "function" else role
        if role not in roles:
            raise ApiError(400, f"{where} has no role that is known", f"{where}.role")
        try:
            new = {"role": role, "content": content_text(m.get("content"))}
        except (ValueError, AttributeError) as e:
            raise ApiError(400, f"{where}: {e}", f"{where}.content") from e
        kept = ("reasoning_content", "tool_call_id", "name")
        new |= {key: m[key] for key in kept if isinstance(m.get(key), str)}
        calls = m.get("tool_calls") or [{"function": c} for c in [m.get("function_call")] if c]
        try:
            if calls and role != "assistant":
                raise ValueError("only an assistant calls")
            calls = [read_call(call) for call in calls]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise ApiError(400, f"{where} has a bad tool call ({e})", f"{where}.tool_calls") from e
        out.append(new | ({"tool_calls": calls} if calls else {}))
    return out


def read_tools(body, default):
    """(the schemas of `tools`, by default the server's, whether one may be called, and what must
    be: None is nothing, "" any of them, else a name)."""
    tools, choice = body.get("tools", default), body.get("tool_choice", "auto")
    try:
        names = [t["function"]["name"] for t in tools]
        known = {"auto": None, "none": None} | ({"required": ""} if tools else {})
        forced = known[choice] if isinstance(choice, str) else choice["function"]["name"]
        if not isinstance(tools, list) or not all(isinstance(name, str) for name in names):
            raise TypeError
        if not isinstance(choice, str) and forced not in names:
            raise KeyError(forced)
    except (TypeError, KeyError) as e:
        expected = 'tools must be a list of {"type": "function", "function": {"name": ...}}'
        raise ApiError(400, f"{expected}, and tool_choice one of these", "tools") from e
    return tools, bool(tools) and choice != "none", forced


# --------------------------------------------------------------------------------------------
# What is asked of the model
# --------------------------------------------------------------------------------------------


class Api:
    """What a Scheduler's model is asked for.

    names       of the model: the base, then its adapters; `adapters` maps them to the Scheduler's
    context     of the model, in tokens
    allowed     {(chat, may_call): bools (V,), the ids that may come}
    settings    what holds for a request that does not say otherwise
    tools       schemas of what it may call if a request names no tools of its own
    known       names of functions that the model knows, and need not be told of
    """

    def __init__(
        self, scheduler, tokenizer, adapters, context, allowed, settings, tools=(), known=()
    ):
        self.scheduler, self.tokenizer, self.context = scheduler, tokenizer, context
        self.adapters, self.names, self.known = adapters, list(adapters), set(known)
        self.allowed, self.settings, self.tools = allowed, settings, list(tools)
        self.started = int(time.time())
        self.special = {i: name for name, i in tokenizer.special.items()}
        self.template = get_template(tokenizer)

    def token(self, i):
        """What the API calls an id: its text, or bytes:\\xe4 for a part of a character."""
        if i in self.special:
            return self.special[i]
        raw = self.tokenizer.token_bytes(i) or f"<|{i}|>".encode()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def scored(self, i, logprob):
        """An id and its log probability, as a chat's `logprobs` have them."""
        raw = None if i in self.special else self.tokenizer.token_bytes(i)
        text = self.special.get(i, "") if raw is None else raw.decode(errors="replace")
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw or text.encode())}

    def model(self, name):
        """What there is to say of a model."""
        self.check_model(name)
        about = {"object": "model", "created": self.started, "owned_by": "scratchlm"}
        return {"id": name} | about

    def models(self):
        """The answer to /v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.names]}

    def check_model(self, name):
        """ApiError for a model that is not served."""
        if not isinstance(name, str) or name not in self.adapters:
            raise ApiError(
                404, f"there is no model {name!r:.80}, only {', '.join(self.names)}", "model",
                "model_not_found",
            )  # fmt: skip

    def answer(self, body, prompts, room, top, chat, allowed, given=()):
        """The Answer to `prompts`, of at most `room` new ids each."""
        settings = {k: body.get(k, v) for k, v in self.settings.items()}
        echo = bool(body.get("echo")) and not chat
        settings |= {"top": top, "echo": echo and top is not None, "allowed": allowed}
        seed = body.get("seed", secrets.randbits(31)) % 2**63
        adapter, stops = self.adapters[body.get("model", self.names[0])], stop_strings(body)
        bias, stop_ids = token_settings(body, len(allowed))
        template, least = self.template if chat else None, body.get("min_tokens", 0)
        events, choices = queue.SimpleQueue(), []
        for prompt in prompts:
            if len(prompt) > self.context or room(prompt) < (not echo):
                raise ApiError(
                    400, f"this model's context is {self.context} tokens, the prompt has "
                    f"{len(prompt)}", "messages" if chat else "prompt", "context_length_exceeded",
                )  # fmt: skip
            for n in range(body.get("n", 1)):
                reply = Reply(self.tokenizer, template, stops, given, stop_ids, least)
                ends = frozenset(i for i in reply.ends if i < len(allowed))
                never = dict.fromkeys(ends - stop_ids, -1e9) if body.get("ignore_eos") else {}
                job = Job(prompt, room(prompt), ends, adapter=adapter, events=events)
                job.settings, job.index = settings | {"seed": (seed + n) % 2**63}, len(choices)
                job.settings |= {"ends": ends, "min_tokens": least, "logit_bias": bias | never}
                choices.append(Choice(job, reply))
        return Answer(self, body, choices, chat)

    def chat(self, body):
        """The Answer to a request for a chat completion."""
        check_fields(body, chat=True)
        self.check_model(body.get("model", self.names[0]))
        messages, default = read_messages(body.get("messages")), self.tools if self.template else []
        tools, may_call, forced = read_tools(body, default)
        if self.template is None:
            raise ApiError(
                400, "this model has no chat template, so it knows no turns and calls no tools: "
                "ask /v1/completions", "messages", "no_chat_template",
            )  # fmt: skip
        known = self.known if self.template.ours else ()
        told = [t for t in tools if may_call and t["function"]["name"] not in known]
        limit = body.get("max_completion_tokens", body.get("max_tokens", self.context))
        variables = body.get("chat_template_kwargs", {})
        if not isinstance(variables, dict):
            name = "chat_template_kwargs"
            raise ApiError(400, f"{name} must be an object", name)
        variables = variables | {name: body[name] for name in TURNS if name in body}
        try:
            if body.get("truncation") == "auto":
                room = self.context - min(limit, self.context // 2)
                ids = self.template.fit_prompt(messages, told, room, variables)
            else:
                ids = self.template.prompt_ids(messages, told, variables)
        except (ValueError, RecursionError) as e:  # what is nested too deeply cannot be escaped
            raise ApiError(400, str(e), "messages") from e
        given = self.forced_ids(forced)
        ids, given = ids + given, given or self.template.opened(ids)
        top = body.get("top_logprobs", 0) if body.get("logprobs") else None
        allowed = self.allowed[True, may_call]
        limit = min(limit, self.context - len(ids))
        return self.answer(body, [ids], lambda prompt: limit, top, True, allowed, given)

    def forced_ids(self, name):
        """The ids with which a call of that function begins; none for None."""
        if name is None:
            return []
        try:
            return self.template.call_start(name)
        except ValueError as e:
            raise ApiError(400, str(e), "tool_choice") from e

    def completion(self, body):
        """The Answer to a request for a completion."""
        check_fields(body, chat=False)
        self.check_model(body.get("model", self.names[0]))
        prompt = body.get("prompt", "")
        several = isinstance(prompt, list) and not all(type(i) is int for i in prompt)
        count, most = (len(prompt) if several else 1) * body.get("n", 1), self.scheduler.max_waiting
        if count > most:
            raise ApiError(400, f"{count} texts at once, at most {most} are possible", "prompt")
        prompts = [self.prompt_ids(p) for p in (prompt if several else [prompt])]
        limit = body.get("max_tokens", 16)

        def room(ids):
            return min(limit, self.context - len(ids))

        allowed = self.allowed[False, False]
        return self.answer(body, prompts, room, body.get("logprobs"), False, allowed)

    def prompt_ids(self, prompt):
        """The ids of one prompt, which is a text or a list of ids already."""
        t = self.tokenizer
        if isinstance(prompt, str):
            begin = [] if t.bos_id is None else [t.bos_id]
            return begin + t.encode(prompt) or [t.eos_id]
        if not isinstance(prompt, list) or not prompt or not all(type(i) is int for i in prompt):
            raise ApiError(400, "prompt must be a text, ids, or a list of such", "prompt")
        if not all(0 <= i < t.n_vocab and t.token_bytes(i) is not None for i in prompt):
            raise ApiError(400, "prompt has ids that no token has", "prompt")
        return prompt

    # As vLLM has them; lm-eval tokenizes with these.

    def tokenize(self, body):
        """The ids of a text in which special tokens may be spelt out."""
        if "prompt" not in body:
            raise ApiError(400, "a prompt is needed", "prompt")
        text, special = body["prompt"], self.tokenizer.special
        if not isinstance(text, str):
            raise ApiError(400, "prompt must be a text", "prompt")
        parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
        parts = [[special[p]] if p in special else self.tokenizer.encode(p) for p in parts]
        ids = [i for part in parts for i in part]
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}

    def detokenize(self, body):
        """The text of ids."""
        return {"prompt": self.tokenizer.decode(self.prompt_ids(body.get("tokens")))}

    def tokenizer_info(self):
        """What a client must know of the tokenizer."""
        t = self.tokenizer
        names = {"eos_token": self.special.get(t.eos_id), "bos_token": self.special.get(t.bos_id)}
        return {"tokenizer_class": t.name, **names, "pad_token": None, "chat_template": None}
