"""Conversations as token ids: the one template for training, evaluation and talking.

`messages` are {"role", "content"} dicts, roles as in ROLES.
"""
import contextlib
import itertools
import json
import re

from data.cli import UserError

# --------------------------------------------------------------------------------------------
# Templates
# --------------------------------------------------------------------------------------------

# Each turn is a role token, text, and <|end|>. A tool call is a turn of the assistant, too: whether
# it speaks or calls is decided by the first token after its role.
ROLES = {
    "system": ("<|system|>",),
    "user": ("<|user|>",),
    "assistant": ("<|assistant|>",),
    "call": ("<|assistant|>", "<|call|>"),  # content: name {"argument": value, ...}
    "tool": ("<|tool|>",),  # what a call returned
}
TURN_END = "<|end|>"
CHAT_TOKENS = (*dict.fromkeys(name for names in ROLES.values() for name in names), TURN_END)


class Template:
    """How a tokenizer's family writes a conversation: ours, ChatML (Qwen) or Llama 3's.

        ours      <|user|>hi<|end|><|assistant|>hello<|end|>
        chatml    <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n
        llama3    <|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>...

    start   ids before the first turn
    generation_prompt  ids that open the assistant's turn
    end     the id that closes a turn
    call    the id with which a call begins, None if the family has no such token
    spoken  the special tokens that an answer may hold

    UserError if the tokenizer has the special tokens of none of them.
    """

    def __init__(self, tokenizer):
        self.tokenizer, special = tokenizer, tokenizer.special
        kinds = {"ours": CHAT_TOKENS, "chatml": ("<|im_start|>", "<|im_end|>")}
        kinds["llama3"] = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        self.kind = next((k for k, names in kinds.items() if set(names) <= set(special)), None)
        if self.kind is None:
            raise UserError(f"the tokenizer {tokenizer.name} has no special tokens for a chat")
        ends = {"ours": TURN_END, "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
        self.end = special[ends[self.kind]]
        self.call = special.get({"ours": "<|call|>", "chatml": "<tool_call>"}.get(self.kind))
        self.start = [tokenizer.bos_id] if self.kind == "llama3" and tokenizer.bos_id else []
        self.generation_prompt = self.opening("assistant")
        names = ("<|call|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
        self.spoken = [self.end, *(special[name] for name in names if name in special)]

    def opening(self, role):
        """The ids that open a turn of that role."""
        special, encode = self.tokenizer.special, self.tokenizer.encode
        if self.kind == "ours":
            return [special[ROLES[role][0]]]
        if self.kind == "chatml":
            return [special["<|im_start|>"], *encode({"tool": "user"}.get(role, role) + "\n")]
        role = {"tool": "ipython"}.get(role, role)
        names = special["<|start_header_id|>"], special["<|end_header_id|>"]
        return [names[0], *encode(role), names[1], *encode("\n\n")]

    def turns(self, messages):
        """[(role, ids, mask)] of a conversation's turns, mask 1 where the assistant's own words are
        to be learned. The system message may have "tools", a list of JSON schemas: they stand where
        the family puts them. In ChatML calls in a row are one turn, and so are their results."""
        if self.kind == "llama3":
            messages = llama3_tools([m | {"content": m["content"].strip()} for m in messages])
        merged = []
        for m in messages:
            if self.kind == "chatml" and m["role"] in ("call", "tool"):
                if merged and merged[-1]["role"] == m["role"]:
                    merged[-1]["content"].append(m["content"])
                    continue
                m = m | {"content": [m["content"]]}
            merged.append(m)
        return [(m["role"], *self.turn(m)) for m in merged]

    def turn(self, message):
        """(ids, mask) of one message, as `turns` has it."""
        encode, said, tools = self.tokenizer.encode, message["content"], message.get("tools")
        role = "assistant" if message["role"] == "call" else message["role"]
        behind = encode("\n") if self.kind == "chatml" else []
        if message["role"] == "call":
            own = self.call_ids(said)
        elif message["role"] == "tool" and self.kind == "chatml":
            own = self.tagged("tool_response", said)
        elif tools and self.kind == "chatml":
            told = "".join(f"\n{json.dumps(t, ensure_ascii=False)}" for t in tools)
            text = (said + "\n\n" if said else "") + CHATML_TOOLS[0] + told + CHATML_TOOLS[1]
            marks = [n for n in ("<tool_call>", "</tool_call>") if n in self.tokenizer.special]
            parts = re.split(f"({'|'.join(marks)})", text) if marks else [text]
            own = [[self.tokenizer.special[p]] if p in marks else encode(p) for p in parts]
            own = list(itertools.chain.from_iterable(own))
        elif tools:
            own = encode("\n".join(filter(None, (said, json.dumps(tools, ensure_ascii=False)))))
        else:
            own = encode(said)
        before, own = self.opening(role), [*own, self.end]
        learned = int(role == "assistant")
        return before + own + behind, [0] * len(before) + [learned] * len(own) + [0] * len(behind)

    def tagged(self, tag, texts):
        """The ids of each text between <tag> and </tag>, which are tokens in some vocabularies."""
        encode, special = self.tokenizer.encode, self.tokenizer.special
        if f"<{tag}>" not in special:
            return encode("\n".join(f"<{tag}>\n{text}\n</{tag}>" for text in texts))
        ids = []
        for text in texts:
            ids += encode("\n") if ids else []
            ids += [special[f"<{tag}>"], *encode(f"\n{text}\n"), special[f"</{tag}>"]]
        return ids

    def call_ids(self, content):
        """The ids of a call, whose content is as `call_text` writes it (in ChatML of several)."""
        if self.kind == "ours":
            return [self.call, *self.tokenizer.encode(content)]
        if self.kind == "llama3":
            return self.tokenizer.encode(json_call(content, "parameters"))
        return self.tagged("tool_call", [json_call(c, "arguments") for c in content])

    def is_call(self, ids):
        """Whether generated ids are a call: ours begins with its token, elsewhere words, or a
        thought, may come before it."""
        return self.call in (ids[:1] if self.kind == "ours" else ids)

    def parse(self, ids):
        """The message that generated ids mean: {"role": "assistant" or "call", "content"}, without
        the thought before it."""
        special, decode = self.tokenizer.special, self.tokenizer.decode
        if (end := special.get("</think>")) in ids:
            ids = ids[len(ids) - ids[::-1].index(end) :]
        elif special.get("<think>", -1) in ids:  # it never came to an end
            ids = []
        hidden = set(special.values())
        text = decode([i for i in ids if i not in hidden])
        if self.kind == "ours":
            return {"role": "call" if self.is_call(ids) else "assistant", "content": text}
        text = text.lstrip("\n") if end is not None else text
        called = ids[ids.index(self.call) :] if self.is_call(ids) else ids
        inner = decode([i for i in called if i not in hidden]).strip()
        inner = inner.removeprefix("<tool_call>").removesuffix("</tool_call>")
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            call = json.loads(inner)
            arguments = call.get("arguments", call.get("parameters"))
            if isinstance(call.get("name"), str) and isinstance(arguments, dict):
                return {"role": "call", "content": call_text(call["name"], arguments)}
        return {"role": "assistant", "content": text}


def find_template(tokenizer):
    """The Template of a tokenizer's family; None if it has none, as of a base model."""
    with contextlib.suppress(UserError):
        return Template(tokenizer)
    return None


# How Qwen's template tells a model of its tools: what comes before and after the schemas.
CHATML_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\n</tool_call>",
)

# And Llama 3.1's: the system turn begins with the first, the user's first turn with the second.
LLAMA3_TOOLS = (
    "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    "Given the following functions, please respond with a JSON for a function call with its proper "
    "arguments that best answers the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n",
)


def llama3_tools(messages):
    """The messages with the tools of the first one written out, as Llama 3.1's template does."""
    if not (messages and messages[0].get("tools")):
        return messages
    system, *rest = messages
    schemas = (json.dumps(t, ensure_ascii=False, indent=4) + "\n\n" for t in system["tools"])
    told, given = LLAMA3_TOOLS[0], LLAMA3_TOOLS[1] + "".join(schemas)
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    if first is None:
        told += given
    else:
        rest[first] = rest[first] | {"content": given + rest[first]["content"]}
    return [{"role": "system", "content": told + system["content"]}, *rest]


def json_call(content, key):
    """A call's content as a JSON object, its arguments under `key`."""
    name, _, arguments = content.partition(" ")
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {arguments}}}'


# --------------------------------------------------------------------------------------------
# Conversations, labels and calls
# --------------------------------------------------------------------------------------------


def render_chat(messages, tokenizer, add_generation_prompt=False):
    """(ids, mask) of a conversation, mask 1 where the assistant's own words are to be learned.

    `messages` are {"role", "content"} dicts, roles as in ROLES, the system's perhaps with "tools";
    how they are written follows from the tokenizer's special tokens (see Template). With
    `add_generation_prompt` the row ends where an answer begins, a prefix of the row with it.

        <|user|> hi <|end|> <|assistant|> hello <|end|>
        0        0  0       0             1     1
    """
    template = Template(tokenizer)
    ids, mask = list(template.start), [0] * len(template.start)
    for _, more, learned in template.turns(messages):
        ids, mask = ids + more, mask + learned
    if add_generation_prompt:
        ids, mask = ids + template.generation_prompt, mask + [0] * len(template.generation_prompt)
    return ids, mask


def chat_prompt(messages, tokenizer, room):
    """Ids of a conversation up to where the answer begins, at most `room`: the oldest turns are
    left out first, never the system's. If the last one is still too long, a system turn of more
    than half of the room is left out, too, and the last one loses its beginning."""
    template, messages = Template(tokenizer), list(messages)
    room -= len(template.start) + len(template.generation_prompt)
    oldest = 1 if messages and messages[0]["role"] == "system" else 0
    while True:
        rendered = [ids for _, ids, _ in template.turns(messages)]
        if sum(map(len, rendered)) <= room or len(messages) <= oldest + 1:
            break
        messages.pop(oldest)
    too_long = sum(map(len, rendered)) > room
    system = rendered.pop(0) if oldest else []
    if too_long and len(system) > (room + 1) // 2:
        system = []
    rest = [i for ids in rendered for i in ids]
    rest = rest[max(0, len(system) + len(rest) - room) :]
    return template.start + system + rest + template.generation_prompt


def drop_continued(rows, key=lambda turns: turns):
    """The rows without those that the next one only continues: their turns, key(row), begin its."""
    following = [key(row) for row in rows[1:]] + [[]]

    def continued(turns, longer):
        return len(longer) > len(turns) and longer[: len(turns)] == turns

    return [row for row, longer in zip(rows, following) if not continued(key(row), longer)]


def label_token(label):
    """The special token that stands for a label of a classifier."""
    return f"<|label:{label}|>"


def labels_of(tokenizer):
    """The labels that a classifier's tokenizer knows; none for other models."""
    begin, end = label_token("\0").split("\0")
    return [n[len(begin) : -len(end)] for n in tokenizer.special if n.startswith(begin)]


def call_text(name, arguments):
    """The content of a call turn: the tool's name and its arguments as JSON on one line."""
    return f"{name} {json.dumps(arguments, ensure_ascii=False)}"


def parse_call(content):
    """(name, arguments) of a call turn; ValueError if it is not a name and a JSON object."""
    name, _, arguments = content.strip().partition(" ")
    try:
        arguments = json.loads(arguments)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the arguments are no JSON ({e})") from e
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no JSON object")
    return name, arguments
