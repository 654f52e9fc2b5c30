"""OpenAI's API: checks requests and turns them into jobs; data/answer.py has the answers.

Chat completions, completions and models as in https://platform.openai.com/docs/api-reference, and
also top_k, min_p, repetition_penalty, loop_penalty, stop_token_ids, min_tokens, ignore_eos, and
`truncation: "auto"`, which leaves out the oldest turns of a conversation that exceeds the context.
A field that would change the answer and is not supported is an error; other fields are ignored.
"""
import json
import queue
import re
import secrets
import time

from data.answer import Answer, ApiError, Choice
from data.chat import content_text, either, get_template, read_call
from data.reply import Reply
from data.scheduler import Job
from data.schema import call_grammar, json_grammar, make_constraint
from data.tools import function_schema, known_by_training

# Fields of OpenAI's, vLLM's, llama.cpp's and Ollama's servers that would change the answer and are
# not supported, unless they have one of the values that change nothing.
UNSUPPORTED = """functions function_call suffix audio prediction modalities web_search_options
reasoning_effort verbosity prompt_logprobs truncate_prompt_tokens guided_json guided_regex grammar
guided_choice guided_grammar structured_outputs use_beam_search allowed_token_ids bad_words
include_stop_str_in_output json_schema mirostat dry_multiplier xtc_probability documents
chat_template lora repeat_penalty num_predict n_predict typical_p top_a tfs_z options"""
HARMLESS = (False, 0, "", [], {}, "none", "medium", ["text"])
PROMPT_FLAGS = ("add_generation_prompt", "continue_final_message")  # where a chat's prompt ends


def parse_body(raw):
    """The JSON object in the body of a request, without its null fields."""
    try:
        body = json.loads(raw.decode("utf-8"))
        json.dumps(body, ensure_ascii=False).encode()  # a lone surrogate, \ud83d, is not text
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON in UTF-8: {e}") from e
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body and body[name] in (None, -1):
            body[name] = 2**31  # no limit; a completion without this field has 16
    return {k: v for k, v in body.items() if v is not None}


def number(low, high, types=(int, float)):
    """A rule of `check_fields`: numbers from `low` to `high`."""
    wanted = f"{'a number' if float in types else 'an integer'} from {low} to {high}"
    return wanted, lambda value: type(value) in types and low <= value <= high


def check_fields(body, chat, size, settings):
    """ApiError for an unsupported or wrong field; `size` is the vocabulary's. `settings` are those
    of the Api: a setting without a rule of its own must be a number of the same type."""
    harmless = dict.fromkeys(UNSUPPORTED.split(), HARMLESS) | {"skip_special_tokens": (True,)}
    harmless |= dict.fromkeys(("repeat_penalty", "typical_p", "tfs_z"), (1,))
    harmless |= {"best_of": (1, body.get("n"))} | ({"echo": (False,)} if chat else {})
    for name, values in harmless.items():
        if name in body and body[name] not in values:
            raise ApiError(400, f"this value of {name} is not supported: leave it out", name)
    flag = "true or false", lambda value: type(value) is bool
    mapping = "an object", lambda value: isinstance(value, dict)
    limit, bias = number(0 if body.get("echo") else 1, 2**31, (int,)), number(-100, 100)[1]
    ids = f"ids from 0 to {size - 1}"

    def is_tool(value):
        function = value.get("function") if isinstance(value, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        return isinstance(name, str) and name.split() == [name]

    rules = {  # field: (what its value must be, whether a value is that)
        **{name: number(-(2**31), 2**31, (int, type(v))) for name, v in settings.items()},
        **dict.fromkeys(("stream", "echo", "ignore_eos", "parallel_tool_calls"), flag),
        **dict.fromkeys(PROMPT_FLAGS, flag),
        **dict.fromkeys(("stream_options", "chat_template_kwargs"), mapping),
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), limit),
        **dict.fromkeys(("frequency_penalty", "presence_penalty"), number(-2, 2)),
        **dict.fromkeys(("top_p", "min_p"), number(0, 1)),
        **dict.fromkeys(("top_k", "min_tokens"), number(0, 2**31, (int,))),
        "tools": ('a list of {"type": "function", "function": {"name": ...}}', lambda value: (
            isinstance(value, list) and all(map(is_tool, value)))),
        "tool_choice": ('"auto" or "none"', lambda value: value in ("auto", "none")),
        "temperature": number(0, 2),
        "repetition_penalty": number(0.01, 100),
        "loop_penalty": number(0, 100),
        "n": number(1, 16, (int,)),
        "seed": number(-(2**63), 2**63 - 1, (int,)),
        "logprobs": flag if chat else number(0, 20, (int,)),
        "top_logprobs": number(0, 20, (int,)),
        "stop": ("a text, or a list of at most 4 texts", lambda value: isinstance(value, str) or (
            isinstance(value, list) and len(value) <= 4 and all(type(s) is str for s in value))),
        "stop_token_ids": (f"a list of {ids}", lambda value: isinstance(value, list) and all(
            type(i) is int and 0 <= i < size for i in value)),
        "logit_bias": (f'{{"ID": bias}}, {ids}, biases from -100 to 100', lambda value: (
            isinstance(value, dict) and all(map(bias, value.values()))
            and all(re.fullmatch("[0-9]{1,9}", i) and int(i) < size for i in value))),
    }  # fmt: skip
    for name, (wanted, is_valid) in rules.items():
        if name in body and not is_valid(body[name]):
            raise ApiError(400, f"{name} must be {wanted}", name)
    if chat and body.get("top_logprobs") and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")


def read_messages(messages):
    """The messages of a request; ApiError if one is malformed. The arguments of a call need not be
    JSON: the model sees what it wrote, and can correct it in its next turn."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", "messages")
    roles, out = ("system", "developer", "user", "assistant", "tool"), []
    for n, message in enumerate(messages):
        try:
            if not isinstance(message, dict):
                raise ValueError(f"it is {message!r:.40}, not an object with role and content")
            role, calls = message.get("role"), message.get("tool_calls") or []
            if role not in roles or (calls and role != "assistant"):
                raise ValueError(f"the role cannot be {role!r:.40}")
            calls = list(map(read_call, calls if type(calls) is list else [calls]))
            if role != "assistant" and message.get("content") is None:
                raise ValueError(f"a message of the role {role} needs content")
            new = {"role": role, "content": content_text(message.get("content"))}
        except (ValueError, RecursionError) as e:
            raise ApiError(400, f"messages[{n}] is malformed: {e}", f"messages[{n}]") from e
        texts = ("reasoning_content", "tool_call_id", "name")
        new |= {k: message[k] for k in texts if isinstance(message.get(k), str)}
        out.append(new | ({"tool_calls": calls} if calls else {}))
    return out


class Api:
    """Answers requests with the model of a Scheduler.

    adapters    {name of a model: name of the Scheduler's adapter}; the first is the default
    context     of the model, in tokens
    allowed     {(chat, may call tools): bools (V,), the ids that may be generated}
    settings    the values of sampling settings that a request does not name
    tools       {name: function} for requests that name none
    """

    def __init__(self, scheduler, tokenizer, adapters, context, allowed, settings, tools):
        self.scheduler, self.tokenizer, self.context = scheduler, tokenizer, context
        self.adapters, self.names, self.allowed = adapters, list(adapters), allowed
        self.settings, self.started = settings, int(time.time())
        self.template = get_template(tokenizer)
        self.tools = [function_schema(name, f) for name, f in tools.items()]
        self.known = known_by_training(tools) if self.template and self.template.ours else ()

    def model(self, name):
        """The description of a model; ApiError if it is not served."""
        if not isinstance(name, str) or name not in self.adapters:
            message = f"there is no model {name!r:.80}, only {', '.join(self.names)}"
            raise ApiError(404, message, "model", "model_not_found")
        return {"id": name, "object": "model", "created": self.started, "owned_by": "scratchlm"}

    def told(self, tools):
        """The tools that a prompt must describe: all but those that the model has learned."""
        return [tool for tool in tools if tool["function"]["name"] not in self.known]

    def list_models(self):
        return {"object": "list", "data": [self.model(name) for name in self.names]}

    def answer(self, body, prompts, limit, top, allowed, constraint=None, chat=False, given=()):
        """The Answer to `prompts`, of at most `limit` new ids each. For `top` see Text, for `given`
        Template.opened."""
        echo, min_tokens = bool(body.get("echo")), body.get("min_tokens", 0)
        stop_ids, stops = set(body.get("stop_token_ids", ())), body.get("stop", ())
        stops = [stops] if isinstance(stops, str) else stops
        settings = {name: body.get(name, value) for name, value in self.settings.items()}
        settings |= {"top": top, "echo": echo and top is not None, "allowed": allowed}
        settings |= {"min_tokens": min_tokens, "constraint": constraint}
        bias = {int(i): value for i, value in body.get("logit_bias", {}).items()}
        seed, template = body.get("seed", secrets.randbits(31)), self.template if chat else None
        events, choices = queue.SimpleQueue(), []
        for prompt in prompts:
            room = min(limit, self.context - len(prompt))
            if room < (not echo):
                message = f"the {len(prompt)} tokens of the prompt leave no room in {self.context}"
                param = "messages" if chat else "prompt"
                raise ApiError(400, message, param, "context_length_exceeded")
            for n in range(body.get("n", 1)):
                reply = Reply(self.tokenizer, template, stops, given, stop_ids, min_tokens)
                ends = frozenset(i for i in reply.ends if i < len(allowed))
                never = dict.fromkeys(ends - stop_ids, -1e9) if body.get("ignore_eos") else {}
                choice = {"seed": (seed + n) % 2**63, "ends": ends, "logit_bias": bias | never}
                adapter, index = self.adapters[body["model"]], len(choices)
                job = Job(prompt, room, settings | choice, adapter, index, events)
                choices.append(Choice(job, reply))
        answer = Answer(body, self.tokenizer, choices, chat)
        self.scheduler.submit(answer.jobs)
        return answer

    def chat(self, body):
        """The Answer to a request for a chat completion."""
        self.model(body.setdefault("model", self.names[0]))
        check_fields(body, True, len(self.allowed[True, True]), self.settings)
        if self.template is None:
            message = "this model has no chat template: use /v1/completions"
            raise ApiError(400, message, "messages", "no_chat_template")
        messages = read_messages(body.get("messages"))
        tools = body.get("tools", self.tools) if body.get("tool_choice") != "none" else []
        constraint = self.response_constraint(body, self.template.ends)
        if tools and not constraint:
            constraint = make_constraint(self.tokenizer, call_grammar(self.template, tools))
        told = self.told(tools)
        limit = body.get("max_completion_tokens", body.get("max_tokens", self.context))
        variables = {name: body[name] for name in PROMPT_FLAGS if name in body}
        variables |= body.get("chat_template_kwargs", {})
        try:
            if body.get("truncation") == "auto":
                room = self.context - min(limit, self.context // 2)
                ids = self.template.fit_prompt(messages, told, room, variables)
            else:
                ids = self.template.prompt_ids(messages, told, variables)
        except (ValueError, RecursionError) as e:  # a template refuses, or nesting is too deep
            raise ApiError(400, str(e), "messages") from e
        top = body.get("top_logprobs", 0) if body.get("logprobs") else None
        allowed, given = self.allowed[True, bool(tools)], self.template.opened(ids)
        return self.answer(body, [ids], limit, top, allowed, constraint, True, given)

    def completion(self, body):
        """The Answer to a request for a completion."""
        self.model(body.setdefault("model", self.names[0]))
        allowed = self.allowed[False, False]
        check_fields(body, False, len(allowed), self.settings)
        prompts = body.get("prompt", "")
        if not isinstance(prompts, list) or all(type(i) is int for i in prompts):
            prompts = [prompts]
        count, most = len(prompts) * body.get("n", 1), self.scheduler.max_waiting
        if count > most:
            raise ApiError(400, f"{count} texts at once, at most {most} are possible", "prompt")
        prompts = [self.prompt_ids(prompt) for prompt in prompts]
        constraint = self.response_constraint(body, [self.tokenizer.eos_id])
        limit = body.get("max_tokens", 16)
        return self.answer(body, prompts, limit, body.get("logprobs"), allowed, constraint)

    def response_constraint(self, body, ends):
        """The Constraint of an answer in the `response_format`, which then ends with one of `ends`;
        None for text."""
        asked = body.get("response_format", {"type": "text"})
        match asked:
            case {"type": "text"}:
                return None
            case {"type": "json_object"}:
                schema = {"type": "object"}
            case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
                pass
            case _:
                kinds = "text, json_object, or json_schema with a json_schema.schema"
                problem = f"response_format must be of the type {kinds}"
                raise ApiError(400, problem, "response_format")
        try:
            return make_constraint(self.tokenizer, json_grammar(schema, ends))
        except ValueError as e:
            raise ApiError(400, f"response_format: {e}", "response_format") from e

    def prompt_ids(self, prompt):
        """The ids of one prompt, which is a text or already a list of ids."""
        t = self.tokenizer
        if isinstance(prompt, str):
            begin = [] if t.bos_id is None else [t.bos_id]
            return begin + t.encode(prompt) or [t.eos_id]
        if not isinstance(prompt, list) or not prompt or not all(type(i) is int for i in prompt):
            raise ApiError(400, "prompt must be a text, a list of ids, or a list of them", "prompt")
        if not all(0 <= i < t.n_vocab and t.token_bytes(i) is not None for i in prompt):
            raise ApiError(400, "the vocabulary lacks some ids of the prompt", "prompt")
        return prompt

    # The same endpoints as vLLM's: lm-eval uses them as its tokenizer.

    def tokenize(self, body):
        """The ids of a text, in which names of special tokens become these tokens."""
        text, special = body.get("prompt"), self.tokenizer.special
        if not isinstance(text, str):
            raise ApiError(400, "prompt must be a text", "prompt")
        pieces = re.split(f"({either(special).pattern})", text)
        ids = self.tokenizer.encode_parts(pieces)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}

    def tokenizer_info(self):
        """The special tokens, for clients that build prompts themselves."""
        t, names = self.tokenizer, {i: name for name, i in self.tokenizer.special.items()}
        info = {"eos_token": names.get(t.eos_id), "bos_token": names.get(t.bos_id)}
        return info | {"pad_token": None, "tokenizer_class": t.name, "chat_template": None}
