"""Rows of any shape, as they are fine-tuned on: chats, labelled texts, preference pairs.

An example is {"messages", perhaps "tools"}, the same with "chosen" and "rejected", two lists of
messages that go on from there, or {"text", "label"}.
"""
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

from data.chat import (
    content_text,
    drop_continued,
    normalize_numbers,
    parse_call,
    read_call,
    split_system,
)
from data.cli import UserError, check_limits
from data.hub_rows import hub_name, hub_rows
from data.row_files import is_row_file, read_rows
from data.sources import SOURCES

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("search", "function_call", "call"), "call"),
    **dict.fromkeys(("return", "observation", "tool", "function", "tool_response"), "tool"),
    **{name: name for name in ("system", "developer")},
}
FORMS = (
    "messages or conversations (OpenAI, ShareGPT), instruction and output (Alpaca), question and "
    "answer, prompt and completion, input and target (Firefly), chosen and rejected, "
    "preferred_output and non_preferred_output (OpenAI), text and label"
)


# --------------------------------------------------------------------------------------------
# Turns -> messages
# --------------------------------------------------------------------------------------------


class Fields(dict):
    """A JSON object that is read field by field. `take` removes a field; `close` counts those that
    remain in `unread`, a Counter, so that unused fields can be reported."""

    def take(self, *names, default=None):
        """Remove and return the first of the fields `names` that exists and is not null."""
        found = next((name for name in names if self.get(name) is not None), None)
        return default if found is None else self.pop(found)

    def close(self, unread, where=""):
        """Count the fields that remain, except empty ones."""
        unread.update(f"{where}{name}" for name, value in self.items() if value not in (None, ""))


def read_json(value):
    """JSON inside JSON, or the value as it is."""
    return json.loads(value) if isinstance(value, str) else value


def to_call(call):
    """`read_call` of a call, or of JSON text; ValueError, too, if its arguments are not JSON."""
    new = read_call(read_json(call))
    parse_call(new)
    return new


def to_messages(turn, unread):
    """The messages of one turn of a ShareGPT, OpenAI or hotel conversation, or of a question with
    its answer; ValueError if it is bad."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is not an object but {turn!r:.40}")
    turn = Fields(turn)
    for asked, answered in (("question", "answer"), ("human", "assistant")):
        if asked in turn and answered in turn:
            texts = zip(("user", "assistant"), (turn.take(asked), turn.take(answered)))
            turn.close(unread, "turn.")
            return [{"role": role, "content": required_text(text, role)} for role, text in texts]
    name = turn.take("role", "from")
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"role {name!r} is unknown")
    content, calls = turn.take("content", "value"), []
    if role == "call":
        if "arguments" in turn:  # a search of the hotel dialogues, named after its role
            calls = [{"name": name, "arguments": normalize_numbers(turn.take("arguments"))}]
        elif name == "call" and isinstance(content, str) and content.lstrip()[:1] not in "[{":
            called, _, arguments = content.strip().partition(" ")  # as older versions saved chats
            calls = [{"name": called, "arguments": arguments}]
        else:  # ShareGPT: {"name": ..., "arguments": {...}}, or a list of such
            calls = read_json(content)
            calls = calls if isinstance(calls, list) else [calls]
        role, content = "assistant", None
    elif "records" in turn:
        content = json.dumps(normalize_numbers(turn.take("records")), ensure_ascii=False)
    calls = [*calls, *(read_json(turn.take("tool_calls")) or [])]
    calls += [c for c in [turn.take("function_call")] if c]
    if role != "assistant" and calls:
        raise ValueError(f"a turn of {name} has tool calls")
    if role == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    message = {"role": role, "content": content_text(content)}
    message |= {"tool_calls": list(map(to_call, calls))} if calls else {}
    if thought := content_text(turn.take("reasoning_content", "reasoning")):
        message["reasoning_content"] = thought
    kept = {key: turn.take(key) for key in ("tool_call_id", "name", "weight", "tools")}
    message |= {key: value for key, value in kept.items() if value is not None}
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(f"the weight is {message['weight']!r}, only 0 and 1 are possible")
    if role in ("user", "assistant") and not calls and not message["content"].strip():
        raise ValueError(f"a turn of {name} has no text")
    turn.close(unread, "turn.")
    return [message]


def required_text(text, what):
    """The text of a content; ValueError if it is blank or not text."""
    text = content_text(text)
    if not text.strip():
        raise ValueError(f"a turn of {what} has no text")
    return text


def messages_of(turns, unread):
    """The messages of a text that the user says, or of a list of turns. A call in a turn of its own
    joins what the assistant has said before it, or its other calls."""
    if isinstance(turns, str):
        return [{"role": "user", "content": required_text(turns, "user")}]
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list):
        raise ValueError(f"the conversation is not a list but {turns!r:.40}")
    messages = []
    for turn in turns:
        for m in to_messages(turn, unread):
            last = messages[-1] if messages else {}
            if m.get("tool_calls") and not m["content"] and last.get("role") == "assistant":
                calls = [*last.get("tool_calls", ()), *m["tool_calls"]]
                messages[-1] = m | last | {"tool_calls": calls}
            else:
                messages.append(m)
    return messages


def conversation(messages, system="", tools=None):
    """{"messages", perhaps "tools"} of messages behind a system text; ValueError if nothing in it
    is the assistant's."""
    own, messages = split_system(messages)
    own = dict(own[0]) if own else {"role": "system", "content": ""} if system else {}
    tools = tools or own.get("tools")
    own.pop("tools", None)
    try:
        tools = read_json(tools or None)
    except ValueError:  # a description in words
        own = own or {"role": "system"}
        system, tools = "\n".join(filter(None, (system, tools))), None
    if system:  # two system texts become one
        own["content"] = "\n".join(filter(None, (system, own.get("content"))))
    messages = [own, *messages] if own else messages
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise ValueError("no turn of the assistant, so nothing to learn")
    tools = [tools] if isinstance(tools, dict) else tools
    return {"messages": messages} | ({"tools": tools} if tools else {})


# --------------------------------------------------------------------------------------------
# Rows -> examples
# --------------------------------------------------------------------------------------------


def transcript(text):
    """The messages of a text in the form of Anthropic's HH: "\n\nHuman: ...\n\nAssistant: ...", of
    which the last may be missing; anything else as it is."""
    if not isinstance(text, str):
        return text
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if len(parts) < 5 or parts[0].strip():
        return text
    parts = parts[:-2] if not parts[-1].strip() else parts
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2])]


def whole_conversation(prompt, side):
    """The whole conversation of one side of a pair, which may repeat the prompt or not."""
    (told, asked), (system, said) = split_system(prompt), split_system(side)
    if not said or said[0]["role"] != "user":
        return prompt + side
    if asked and asked[0]["content"].strip() != said[0]["content"].strip():
        raise ValueError("chosen or rejected begins with another question than the prompt")
    return (system or told) + said


def preference(chosen, rejected, prompt, row, unread):
    """A preference pair: {"messages", "chosen", "rejected", perhaps "tools"}, the last two lists of
    messages. Both sides may be whole conversations; then what they share is the prompt."""
    system, tools = content_text(row.take("system")), row.take("tools")
    prompt = messages_of(transcript(prompt), unread) if prompt else []
    sides = []
    for side in (chosen, rejected):
        side = transcript(side)
        if isinstance(side, str):
            side = [{"role": "assistant", "content": required_text(side, "assistant")}]
        sides.append(whole_conversation(prompt, messages_of(side, unread)))
    same = 0
    while same < min(map(len, sides)) and sides[0][same] == sides[1][same]:
        same += 1
    if same == len(sides[0]) == len(sides[1]):
        raise ValueError("chosen and rejected are the same")
    if not same or any(side[same:] == [] or side[-1]["role"] != "assistant" for side in sides):
        raise ValueError("a pair without a prompt, or a side that does not end with an answer")
    example = conversation(sides[0], system, tools)
    more = len(example["messages"]) - len(sides[0])  # the system text in front
    example["messages"] = example["messages"][: same + more]
    return example | {"chosen": sides[0][same:], "rejected": sides[1][same:]}


def to_example(row, unread=None):
    """(kind, example) of a row of any shape we know, kind being chat, label or prefer. `unread`, a
    Counter, gets the names of fields that nothing reads. ValueError says what is wrong with a row.
    """
    # To add a format: recognise its keys here.
    unread = Counter() if unread is None else unread
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ValueError(f"neither an object nor a list of turns but {row!r:.40}")
    keys, row = ", ".join(map(str, row)), Fields(row)
    found = pair_example(row, unread) or chat_example(row, unread) or label_example(row)
    if found is None:
        raise ValueError(f"no known format has the keys {keys:.80}; known are {FORMS}")
    row.close(unread)
    return found


def alpaca_turns(row):
    """The turns of Alpaca's history, instruction and input."""
    text = "\n".join(t for t in (row.take("instruction"), row.take("input")) if t)
    turns, names = read_json(row.take("history") or []), ("question", "answer")
    turns = [dict(zip(names, t)) if isinstance(t, list) and len(t) == 2 else t for t in turns]
    return [*turns, {"role": "user", "content": text}]


def pair_example(row, unread):
    """`to_example` of preference pairs; None for other rows."""
    if {"preferred_output", "non_preferred_output"} <= set(row):  # OpenAI's
        given = Fields(row.take("input"))
        row |= {"tools": given.take("tools")}
        sides = row.take("preferred_output"), row.take("non_preferred_output")
        prompt = given.take("messages")
        given.close(unread, "input.")
        return "prefer", preference(*sides, prompt, row, unread)
    if {"chosen", "rejected"} <= set(row):
        sides = row.take("chosen"), row.take("rejected")
        prompt = row.take("prompt", "question") or ("instruction" in row and alpaca_turns(row))
        prompt = prompt or row.take("conversations", "messages")
        return "prefer", preference(*sides, prompt, row, unread)
    return None


def chat_example(row, unread):
    """`to_example` of conversations; None for other rows."""
    keys = set(row)
    rated = None if "text" in keys else row.get("label", row.get("kto_tag"))
    if isinstance(rated, bool) or (rated is not None and {"prompt", "completion"} <= keys):
        raise ValueError(
            "answers that are labelled good or bad one by one (KTO) cannot be learned from; "
            "pairs of chosen and rejected can"
        )
    if {"prompt", "completion"} <= keys:
        completion = row.take("completion")
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        turns = [*messages_of(row.take("prompt"), unread), *messages_of(completion, unread)]
    elif {"context", "response"} <= keys and not {"instruction"} & keys:
        turns = [*read_json(row.take("context")), read_json(row.take("response"))]
    elif keys & {"messages", "conversations", "conversation", "items"}:
        turns = read_json(row.take("messages", "conversations", "conversation", "items"))
        if "instruction" in row and "system" not in row:  # COIG's
            row["system"] = row.take("instruction")
    elif {"instruction", "output"} <= keys or {"input", "target"} <= keys:  # Alpaca, Firefly
        turns = alpaca_turns(row)
        answer = {"role": "assistant", "content": row.take("output", "target")}
        answer |= {"reasoning_content": row.take("reasoning_content", "reasoning")}
        turns.append(answer)
    elif {"question", "answer"} <= keys:
        turns = [{"question": row.take("question"), "answer": row.take("answer")}]
    elif "chat" in keys and "meta_instruction" in keys:
        raise ValueError("MOSS's plugin format is not read: turn it into messages")
    else:
        return None
    system, tools = content_text(row.take("system")), row.take("tools", "functions")
    return "chat", conversation(messages_of(turns, unread), system, tools)


def label_example(row):
    """`to_example` of labelled texts; None for other rows."""
    if not {"text", "label"} <= set(row):
        return None
    text, label = row.take("text"), normalize_numbers(row.take("label"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the text is empty")
    if not isinstance(label, (str, int)) or label == "":
        raise ValueError(f"the label is {label!r:.40}")
    return "label", {"text": text, "label": str(label)}


def as_chat(example):
    """An example of any kind as a conversation: the preferred answer, or the label, ends it."""
    if "messages" not in example:
        asked = {"role": "user", "content": example["text"]}
        return {"messages": [asked, {"role": "assistant", "content": example["label"]}]}
    if "chosen" not in example:
        return example
    rest = {key: value for key, value in example.items() if key not in ("chosen", "rejected")}
    return rest | {"messages": [*example["messages"], *example["chosen"]]}


MAX_BAD = 0.01  # share of rows that may be bad


def row_slice(text):
    """The slice that --rows START:STOP means, both ends optional."""
    found = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text or ":")
    if not found:
        raise UserError(f"--rows {text} must be START:STOP, as 1000:5001, 1000: or :500")
    return slice(*(int(n) if n else None for n in found.groups()))


def report_bad(bad, total, path):
    """Name the bad ones of `total` rows, a list of messages, on stderr; UserError if more than 1 %
    are bad."""
    for message in bad[:5]:
        print(f"bad row: {message}", file=sys.stderr)
    if len(bad) > MAX_BAD * total:
        raise UserError(f"{path}: {len(bad)} of {total} rows are bad, first {bad[0]}")
    if bad:
        print(f"{path}: {len(bad)} of {total} rows are bad and left out", file=sys.stderr)


def read_examples(path, rows=None, most=None, encoding=None):
    """(kind, examples) of a file, or of `row_slice(rows)` of its first `most` rows. Bad rows are
    named on stderr and left out; UserError if more than 1 % are bad or none is left. Rows that
    continue each other are one conversation again."""
    found, bad, kind, unread = [], [], None, Counter()
    for where, row in list(itertools.islice(read_rows(path, encoding), most))[row_slice(rows)]:
        try:
            if isinstance(row, ValueError):
                bad.append(str(row))
                continue
            this, example = to_example(row, unread)
            kind = kind or this
            if this != kind:
                raise ValueError(f"a row of {this} among rows of {kind}")
            json.dumps(example, ensure_ascii=False).encode()  # no half characters, as \ud83d
            found.append(example)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            reason = f"no {e}" if isinstance(e, KeyError) else str(e)
            if isinstance(e, (TypeError, AttributeError)):
                reason = f"a value of the wrong type ({e})"
            bad.append(f"{where}: {reason}")
    total = len(found) + len(bad)
    if not total:
        raise UserError(f"{path} holds no rows" + (f" at --rows {rows}" if rows else ""))
    report_bad(bad, total, path)
    if unread:
        names = ", ".join(f"{name} ({count:,})" for name, count in unread.most_common(12))
        print(f"{path}: fields that are not used, with their rows: {names}", file=sys.stderr)
    if kind == "chat":  # learning a dialogue's last row teaches the answers of all before it
        found = drop_continued(found, key=lambda e: e["messages"])
    return kind, found


def first_words(example):
    """What conversations are told apart by: the first thing the user says, or the text."""
    if "text" in example:
        return example["text"]
    return next((m["content"] for m in example["messages"] if m["role"] == "user"), "")


def split_off(examples, fraction):
    """(train, val): about `fraction` of the conversations, always the same ones, with all their
    rows: no beginning of one is learned while its continuation is measured."""
    groups = {}
    for e in examples:
        groups.setdefault(first_words(e), []).append(e)
    order = sorted(groups, key=lambda words: hashlib.sha256(words.encode()).digest())
    n = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    if len(groups) < 2:
        raise UserError(f"{len(examples)} row(s) cannot be split, all begin alike: give --val_data")
    val = {id(e) for words in order[:n] for e in groups[words]}
    return [e for e in examples if id(e) not in val], [e for e in examples if id(e) in val]


def row_paths(source, most):
    """{split: path} of what --data or --val_data names; `most`: see `hub_rows`."""
    if source in SOURCES and SOURCES[source].rows:
        return dict(SOURCES[source].fetch())
    found = hub_name(str(source))
    return hub_rows(*found, most) if found else {"train": source}


def load_data(
    source, val_source=None, fraction=0.1, rows=None, max_rows=None, encoding=None, every_row=False
):
    """(kind, {"train", "val", perhaps "test": examples}, {split: sha256}) of --data: a file, a
    named set, or a data set of the Hub. `rows` START:STOP is the part of the training rows to take,
    `max_rows` how many rows a split has at most. `fraction` of the training rows is for validation
    where nothing else is, or, with `every_row`, all rows of a file that was named."""
    check_limits({"max_rows": max_rows})
    part, most = row_slice(rows), dict.fromkeys(("train", "val", "test"), max_rows)
    held = row_paths(val_source, most) if val_source else None
    if part.stop is not None and min(part.start or 0, part.stop) >= 0:
        most["train"] = min(part.stop, max_rows or part.stop)  # no more need be downloaded
    paths = row_paths(source, most)
    if held:
        paths["dev"] = held.get("dev") or held.get("val") or held["train"]
    tidy = SOURCES[source].tidy if source in SOURCES else None
    kinds, parts, hashes = {}, {}, {}
    for split, path in paths.items():
        split = "val" if split == "dev" else split
        wanted = rows if split == "train" else None
        kinds[split], parts[split] = read_examples(path, wanted, max_rows, encoding)
        parts[split] = list(map(tidy, parts[split])) if tidy else parts[split]
        hashes[split] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if len(set(kinds.values())) > 1:
        raise UserError(f"{source} and its validation rows are of different kinds: {kinds}")
    how = dict(rows=rows, max_rows=max_rows, encoding=encoding)  # other rows of the same files
    hashes |= {name: value for name, value in how.items() if value}
    if "val" not in parts and every_row and source not in SOURCES and is_row_file(source):
        parts["val"] = parts["train"]
    elif "val" not in parts:
        parts["train"], parts["val"] = split_off(parts["train"], fraction)
    return kinds["train"], parts, hashes
