"""Ids that may come next in a text: JSON under a schema, or calls of tools that are such JSON.

What may still come is a list of stacks. A stack is (part, rest), () at its end. A part is one of

    bytes           these bytes
    a set or range  one symbol of it: a byte, or 256 + the id of a special token
    a function      any of the tuples of parts that it returns

so that a stack is written out only as far as the text has come.
"""
import json
import re
from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

from data.chat import CALL_ID, KEY, TOOL
from data.cli import MALFORMED

CHARACTER, DIGIT = frozenset(range(32, 256)) - frozenset(b'"\\'), range(48, 58)
HEX, TEXT = frozenset(b"0123456789abcdefABCDEF"), frozenset(range(256))
# The keywords of a schema that `json_parts` reads, and those that restrict nothing
KEYWORDS = {
    "type", "const", "enum", "anyOf", "properties", "required", "additionalProperties", "items",
    "nullable", "$ref", "$defs", "definitions",
    "$schema", "title", "description", "default", "examples",
}  # fmt: skip


def string():
    """The rest of a string."""
    escapes = (b"\\", frozenset(b'"\\/bfnrt'), string), (b"\\u", HEX, HEX, HEX, HEX, string)
    return (b'"',), (CHARACTER, string), *escapes


def digits():
    """Any number of digits."""
    return (), (DIGIT, digits)


def blank():
    """White space, but not endlessly much."""
    return (), (b" ",), *((b"\n" + b" " * n,) for n in range(13))


def optional(*parts):
    """The part that stands for these or none."""
    return lambda: ((), parts)


INTEGER = optional(b"-"), lambda: ((b"0",), (range(49, 58), digits))
EXPONENT = frozenset(b"eE"), optional(frozenset(b"+-")), DIGIT, digits
SCALARS = {
    "string": [(b'"', string)], "boolean": [(b"true",), (b"false",)], "null": [(b"null",)],
    "number": [(*INTEGER, optional(b".", DIGIT, digits), optional(*EXPONENT))],
    "integer": [INTEGER],
}  # fmt: skip


def json_parts(schema, root):
    """The alternatives of a JSON value under a schema within the schema `root`."""
    schemas, known, found = [schema], {id(schema)}, []
    for s in schemas:  # this list grows by those that "$ref" and "anyOf" name, each of them once
        s = {} if s is True else s
        more = s.get("anyOf", ())
        if "$ref" in s:  # such as #/$defs/NAME
            names = (n.replace("~1", "/").replace("~0", "~") for n in s["$ref"].split("/")[1:])
            more = [reduce(dict.__getitem__, names, root)]
        elif "enum" in s or "const" in s:
            values = s.get("enum", [s.get("const")])
            found += [(json.dumps(value, ensure_ascii=False).encode(),) for value in values]
        elif "anyOf" not in s:
            names = s.get("type", [*SCALARS, "array", "object"])
            for name in [names] if isinstance(names, str) else names:
                if name == "object":
                    found.append((b"{", partial(members, s, root)))
                else:
                    found += array(s, root) if name == "array" else SCALARS[name]
        schemas += (new := [other for other in more if id(other) not in known])
        known |= set(map(id, new))
        found += SCALARS["null"] if s.get("nullable") else []
    return found


def array(schema, root):
    """The alternatives of an array."""
    item = partial(json_parts, schema.get("items", {}), root)

    def more():
        return (blank, b"]"), (b",", blank, item, more)

    return [(b"[", blank, b"]"), (b"[", blank, item, more)]


def members(schema, root, left=None, comma=()):
    """The alternatives of the rest of an object, in which the names `left` (None: all) may still
    come. They are those that `properties` names; if it names none, any name may come, unless
    additionalProperties is false."""
    required, others = schema.get("required", []), schema.get("additionalProperties", {})
    named = {name: {} for name in required} | schema.get("properties", {})
    left = frozenset(named) if left is None else left
    keys = [((json.dumps(n, ensure_ascii=False).encode(),), n) for n in named if n in left]
    if not named and others is not False:
        keys, named = [((b'"', string), "")], {"": others}
    options = [] if left.intersection(required) else [(blank, b"}")]
    for key, name in keys:
        value = partial(json_parts, named[name], root)
        more = partial(members, schema, root, left - {name}, [b","])
        options.append((*comma, blank, *key, b":", blank, value, more))
    return options


def json_value(schema, strict=True):
    """The part that is JSON under a schema. ValueError if that is malformed or, if `strict`, has
    keywords that `json_parts` ignores."""

    def check(s):
        try:
            ignored = sorted(s.keys() - KEYWORDS)
            used = sorted(s.keys() & {"$ref", "anyOf", "enum", "const", "properties"})
            possible, _ = json_parts(s, schema), members(s, schema)
            if not isinstance(s.get("required", []), list):
                raise TypeError
            children = [*s.get("anyOf", ()), s.get("items", True)]
            children.append(s.get("additionalProperties") or True)  # false is read by `members`
            for key in ("properties", "$defs", "definitions"):
                children += s.get(key, {}).values()
        except MALFORMED as e:
            raise ValueError(f"{s!r:.60} is malformed, or its $ref names nothing") from e
        if strict and (ignored or len(used) > 1):
            raise ValueError(f"{' beside '.join(ignored[:1] or used[:2])} is not supported")
        if not possible:
            raise ValueError(f"no value fits {s!r:.60}")
        for child in children:
            if child is not True:
                check(child)

    check(schema)
    return partial(json_parts, schema, schema)


def fits(value, schema):
    """Whether a JSON value fits a schema, as far as `json_parts` reads it."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    state = Constraint(lambda i: (i,), [push((json_value(schema, strict=False), {256}), ())])
    for symbol in (*text, 256):  # 256 stands for the end
        state = state and state.after(symbol)
    return bool(state)


def json_grammar(schema, ends):
    """The parts of a text that is JSON under a schema, then one of the ids `ends`. ValueError if
    the schema is not supported."""
    return blank, json_value(schema), blank, {256 + i for i in ends}


def call_grammar(template, tools):
    """The parts of an answer in a chat that may call `tools`: text, then perhaps calls. None if no
    token begins a call, or if the template does not write arguments as JSON."""
    before, _, rest = template.called.partition(TOOL)
    between, _, after = rest.partition(json.dumps({KEY: 0}))
    if not between or CALL_ID in rest or template.call is None:
        return None
    special, calls = template.tokenizer.special, []
    ends, start = {256 + i for i in template.ends}, {256 + template.call}

    def literal(text):
        pieces = filter(None, re.split(f"({template.typed.pattern})", text))
        return [{256 + special[p]} if p in special else p.encode() for p in pieces]

    close = literal(after.split(template.tokenizer.decode([template.end]))[0])
    for function in (tool["function"] for tool in tools):
        try:
            arguments = json_value(function.get("parameters", {}), strict=False)
        except ValueError:  # the model may have been told of any schema
            arguments = json_value({"type": "object"})
        calls.append((*literal(function["name"] + between), arguments, *close))
    first = literal(before)
    first = first[first.index(start) :]
    words = (TEXT | {256 + i for i in special.values()}) - ends - start

    def more():
        return (blank, ends), (blank, *first, lambda: calls, more)

    def answer():
        return (ends,), (words, answer), more()[1]

    return (answer,)


def push(parts, stack):
    """The stack with these parts before it."""
    return reduce(lambda stack, part: (part, stack), reversed(parts), stack)


class Constraint(NamedTuple):
    """What may still come in a text; `symbols(i)` is what the id `i` stands for."""

    symbols: Callable
    stacks: list

    def after(self, i):
        """The Constraint after the id `i`; None if this id does not fit."""
        stacks, symbols = self.stacks, self.symbols(i)
        for symbol in symbols or ():
            todo, stacks = list(stacks), []
            while todo:
                part, rest = todo.pop() or ((), ())
                if callable(part):
                    todo += [push(parts, rest) for parts in part()]
                elif isinstance(part, bytes) and part[0] == symbol:
                    stacks.append((part[1:], rest) if part[1:] else rest)
                elif not isinstance(part, bytes) and symbol in part:
                    stacks.append(rest)
        return self._replace(stacks=stacks) if symbols and stacks else None


def make_constraint(tokenizer, parts):
    """The Constraint of a text with these parts; None without a grammar."""
    if parts is None:
        return None
    special = set(tokenizer.special.values())

    def symbols(i):
        return (256 + i,) if i in special else tokenizer.token_bytes(i)

    return Constraint(symbols, [push(parts, ())])
