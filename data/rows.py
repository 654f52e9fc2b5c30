"""Rows of any shape, as they are fine-tuned on: chats, labelled texts, preference pairs.

An example is {"messages"}, {"text", "label"} or {"messages", "chosen", "rejected"}.
"""
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

from data.chat import call_text, drop_continued, parse_call
from data.cli import UserError, check_limits
from data.hotel import tidy_calls
from data.hub_rows import hub_name, hub_rows
from data.row_files import is_row_file, read_rows
from data.sources import SOURCES

# What the field calls the turns, and what render_chat does.
ROLE_NAMES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("search", "function_call", "call"), "call"),
    **dict.fromkeys(("return", "observation", "tool", "function"), "tool"),
    "system": "system",
}


def whole(value):
    """A JSON value with 500.0 as 500, so that the two are learned as one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(v) for v in value]
    return {k: whole(v) for k, v in value.items()} if isinstance(value, dict) else value


def call_message(name, arguments):
    """The message of a call; ValueError if `parse_call` could not read it back."""
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    content = call_text(name, whole(arguments))
    if parse_call(content)[0] != name or not name:
        raise ValueError(f"a tool cannot be called {name!r}")
    return {"role": "call", "content": content}


def to_messages(turn):
    """The messages of one turn of a ShareGPT, OpenAI or hotel conversation; ValueError if bad."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is no object but {turn!r:.40}")
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise ValueError(f"role {name!r} is unknown")
    role, content = ROLE_NAMES[name], turn.get("content", turn.get("value"))
    if role == "call" and "arguments" in turn:  # a hotel search, named after its role
        return [call_message(name, turn["arguments"])]
    if role == "tool" and "records" in turn:
        return [{"role": "tool", "content": json.dumps(whole(turn["records"]), ensure_ascii=False)}]
    out, calls = [], []
    if isinstance(content, str) and content.strip():
        if role == "call" and content.lstrip()[0] not in "[{":  # our own, as /save writes it
            out.append(call_message(*parse_call(content)))
        elif role == "call":  # ShareGPT: {"name": ..., "arguments": {...}}, or a list of such
            calls = json.loads(content)
            calls = calls if isinstance(calls, list) else [calls]
        else:
            out.append({"role": role, "content": content})
    for call in [*calls, *(turn.get("tool_calls") or [])]:
        call = call.get("function", call)  # OpenAI: arguments are JSON inside JSON
        out.append(call_message(call["name"], call.get("arguments", {})))
    if not out:
        raise ValueError(f"a turn of {name} has no text")
    return out


def conversation(turns, before=()):
    """{"messages"} of a list of turns, behind the messages `before` them; ValueError if nothing in
    it is the assistant's."""
    if not isinstance(turns, list):
        raise ValueError("the conversation is no list")
    messages = [m for turn in turns for m in to_messages(turn)]
    if before and messages and messages[0]["role"] == "system":  # two system turns are one
        parts = before[0]["content"], messages.pop(0)["content"]
        before = [before[0] | {"content": "\n".join(filter(None, parts))}]
    messages = [*before, *messages]
    if not any(m["role"] in ("assistant", "call") for m in messages):
        raise ValueError("no turn of the assistant, so nothing to learn")
    return {"messages": messages}


def answer_text(value):
    """The text of a preferred or rejected answer: a string, a turn, or turns that end in it."""
    value = value[-1] if isinstance(value, list) and value else value
    text = value if isinstance(value, str) else to_messages(value)[0]["content"]
    if not text.strip():
        raise ValueError("an answer is empty")
    return text


def to_example(row):
    """(kind, example) of a row of any shape we know, kind being chat, label or prefer. ValueError
    says what is wrong with a row."""
    # To add a format: recognise its keys here.
    if isinstance(row, list):
        return "chat", conversation(row)
    if not isinstance(row, dict):
        raise ValueError(f"neither an object nor a list of turns but {row!r:.40}")
    system, tools = row.get("system") or "", row.get("tools")
    if not isinstance(system, str):
        raise ValueError(f"the system text is no text but {system!r:.40}")
    if isinstance(tools, str):  # JSON inside JSON, or any words
        try:
            tools = json.loads(tools or "[]")
        except ValueError:
            system, tools = "\n".join(filter(None, (system, tools))), None
    before = [{"role": "system", "content": system}] if system or tools else []
    if tools:  # schemas, which each family of templates has its own place for
        before[0]["tools"] = tools if isinstance(tools, list) else [tools]
    if {"chosen", "rejected"} <= set(row):
        turns = row.get("conversations", row.get("messages", row.get("prompt")))
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        pair = {k: answer_text(row[k]) for k in ("chosen", "rejected")}
        if pair["chosen"] == pair["rejected"]:
            raise ValueError("chosen and rejected are the same")
        prompt = [m for turn in turns or [] for m in to_messages(turn)]
        if prompt and prompt[-1]["role"] == "assistant":  # whole conversations as the prompt's end
            prompt.pop()
        if not prompt:
            raise ValueError("a pair without a prompt")
        return "prefer", {"messages": before + prompt, **pair}
    if {"context", "response"} <= set(row):
        context, response = (
            json.loads(v) if isinstance(v, str) else v for v in (row["context"], row["response"])
        )
        return "chat", conversation([*context, response])
    for key in ("messages", "conversations", "items"):  # the last one is openchat's
        if key in row:
            return "chat", conversation(row[key], before)
    if {"instruction", "output"} <= set(row):
        asked = "\n".join(t for t in (row["instruction"], row.get("input")) if t)
        answer = {"role": "assistant", "content": row["output"]}
        return "chat", conversation([{"role": "user", "content": asked}, answer], before)
    if {"text", "label"} <= set(row):
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError("the text is empty")
        label = whole(row["label"])
        if not isinstance(label, (str, int)) or label == "":
            raise ValueError(f"the label is {label!r:.40}")
        return "label", {"text": row["text"], "label": str(label)}
    raise ValueError(f"no known format has the keys {', '.join(map(str, row))[:80]}")


def as_chat(example):
    """An example of any kind as a conversation: the preferred answer, or the label, ends it."""
    if "messages" not in example:
        asked = {"role": "user", "content": example["text"]}
        return {"messages": [asked, {"role": "assistant", "content": example["label"]}]}
    if "chosen" not in example:
        return example
    ending = {"role": "assistant", "content": example["chosen"]}
    return {"messages": [*example["messages"], ending]}


MAX_BAD = 0.01  # share of rows that may be bad


def row_slice(text):
    """The slice that --rows START:STOP means, both ends optional."""
    found = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text or ":")
    if not found:
        raise UserError(f"--rows {text} must be START:STOP, as 1000:5001, 1000: or :500")
    return slice(*(int(n) if n else None for n in found.groups()))


def read_examples(path, rows=None, most=None, encoding=None):
    """(kind, examples) of a file, or of `row_slice(rows)` of its first `most` rows. Bad rows are
    named on stderr and left out; UserError if more than 1 % are bad or none is left. Rows that
    continue each other are one conversation again."""
    found, bad, kind = [], [], None
    for where, row in list(itertools.islice(read_rows(path, encoding), most))[row_slice(rows)]:
        try:
            if isinstance(row, ValueError):
                bad.append(str(row))
                continue
            this, example = to_example(row)
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
    for message in bad[:5]:
        print(f"bad row: {message}", file=sys.stderr)
    total = len(found) + len(bad)
    if not total:
        raise UserError(f"{path} holds no rows" + (f" at --rows {rows}" if rows else ""))
    if not found or len(bad) > MAX_BAD * total:
        first = f", first {bad[0]}" if bad else ""
        raise UserError(f"{path}: {len(bad)} of {total} rows are bad{first}")
    if bad:
        print(f"{path}: {len(bad)} of {total} rows are bad and left out", file=sys.stderr)
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
    source, val_source=None, fraction=0.1, rows=None, max_rows=None, encoding=None, whole=False
):
    """(kind, {"train", "val", perhaps "test": examples}, {split: sha256}) of --data: a file, a
    named set, or a data set of the Hub. `rows` START:STOP is the part of the training rows to take,
    `max_rows` how many rows a split has at most. `fraction` of the training rows is for validation
    where nothing else is, or, with `whole`, all rows of a file that was named."""
    check_limits({"max_rows": max_rows})
    part, most = row_slice(rows), dict.fromkeys(("train", "val", "test"), max_rows)
    held = row_paths(val_source, most) if val_source else None
    if part.stop is not None and min(part.start or 0, part.stop) >= 0:
        most["train"] = min(part.stop, max_rows or part.stop)  # no more need be downloaded
    paths = row_paths(source, most)
    if held:
        paths["dev"] = held.get("dev") or held.get("val") or held["train"]
    kinds, parts, hashes = {}, {}, {}
    for split, path in paths.items():
        split = "val" if split == "dev" else split
        wanted = rows if split == "train" else None
        kinds[split], examples = read_examples(path, wanted, max_rows, encoding)
        parts[split] = [tidy_calls(e) for e in examples] if kinds[split] == "chat" else examples
        hashes[split] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if len(set(kinds.values())) > 1:
        raise UserError(f"{source} and its validation rows are of different kinds: {kinds}")
    how = dict(rows=rows, max_rows=max_rows, encoding=encoding)  # other rows of the same files
    hashes |= {name: value for name, value in how.items() if value}
    if "val" not in parts and whole and source not in SOURCES and is_row_file(source):
        parts["val"] = parts["train"]
    elif "val" not in parts:
        parts["train"], parts["val"] = split_off(parts["train"], fraction)
    return kinds["train"], parts, hashes
