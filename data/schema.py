"""Ids that may come next in a text: JSON under a schema, or calls of tools that are such JSON.

What may still come is a list of stacks (part, rest), () at the end. A part is one of

    bytes           these bytes
    a set or range  one symbol of it: a byte, or 256 + the id of a special token
    a function      any of the tuples of parts that it returns

so that a stack is written out only as far as the text has come.
"""
import json
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from data.chat import CALL_ID, KEY, TOOL

CHARACTER, DIGIT = frozenset(range(32, 256)) - frozenset(b'"\\'), range(48, 58)
HEX, TEXT = frozenset(b"0123456789abcdefABCDEF"), frozenset(range(256))
# The keywords of a schema that `json_parts` reads, and those that restrict nothing
KINDS = {
    "type": (str, list), "const": object, "nullable": bool, "$ref": str, "$schema": str,
    **dict.fromkeys(("enum", "anyOf", "required"), list),
    **dict.fromkeys(("properties", "$defs", "definitions"), dict),
    **dict.fromkeys(("items", "additionalProperties"), (dict, bool)),
    **dict.fromkeys(("title", "description", "default", "examples"), object),
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
    "string": ((b'"', string),), "boolean": ((b"true",), (b"false",)), "null": ((b"null",),),
    "number": ((*INTEGER, optional(b".", DIGIT, digits), optional(*EXPONENT)),),
    "integer": (INTEGER,),
}  # fmt: skip
TYPES = (*SCALARS, "array", "object")


def json_parts(schema, root):
    """The alternatives of a JSON value under a schema within the schema `root`. An object has the
    members that `properties` names; any, if it names none and additionalProperties is not false."""
    schema = schema if isinstance(schema, dict) else {}
    if "$ref" in schema:
        return json_parts(resolve(schema["$ref"], root), root)
    null = SCALARS["null"] if schema.get("nullable") else ()
    if values := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return *((json.dumps(v, ensure_ascii=False).encode(),) for v in values), *null
    if "anyOf" in schema:
        return *(parts for s in schema["anyOf"] for parts in json_parts(s, root)), *null
    names = schema.get("type", TYPES)
    names = [names] if isinstance(names, str) else names
    return *(parts for name in names for parts in typed(name, schema, root)), *null


def resolve(reference, root):
    """The schema that a $ref such as #/$defs/NAME names."""
    for key in reference.split("/")[1:]:
        root = root[key]
    return root


def typed(name, schema, root):
    """The alternatives of a value of the type of this name."""
    if name == "array":
        item = partial(json_parts, schema.get("items"), root)

        def more():
            return (blank, b"]"), (b",", blank, item, more)

        return (b"[", blank, b"]"), (b"[", blank, item, more)
    if name != "object":
        return SCALARS[name]
    named = dict.fromkeys(schema.get("required", ())) | schema.get("properties", {})
    free = not named and schema.get("additionalProperties") is not False
    return ((b"{", partial(members, schema, root, named, None if free else frozenset(named), ())),)


def members(schema, root, named, left, comma):
    """The alternatives of the rest of an object. `left`: the names that may still come, or None."""
    keys = [((b'"', string), schema.get("additionalProperties"), None)] if left is None else []
    for name in (name for name in named if name in left):
        key = json.dumps(name, ensure_ascii=False).encode()
        keys.append(((key,), named[name], left - {name}))
    options = []
    for key, value, others in keys:
        more = partial(members, schema, root, named, others, (b",",))
        value = partial(json_parts, value, root)
        options.append((*comma, blank, *key, b":", blank, value, more))
    if not left or not left & set(schema.get("required", ())):
        options.append((blank, b"}"))
    return options


def check_schema(schema, strict=True):
    """ValueError for a malformed schema, or if `strict` for keywords that `json_parts` ignores."""
    todo = [schema]
    for s in todo:  # which grows
        if not isinstance(s, dict | bool):
            raise ValueError(f"{s!r:.60} is not a schema")
        s = s if isinstance(s, dict) else {}
        if strict and (unknown := set(s) - set(KINDS)):
            raise ValueError(f"{min(unknown)} is not supported")
        used = sorted(set(s) & {"$ref", "anyOf", "enum", "const", "properties"})
        if strict and len(used) > 1:
            raise ValueError(f"{used[0]} beside {used[1]} is not supported")
        for key, value in ((key, value) for key, value in s.items() if key in KINDS):
            names = [value] if isinstance(value, str) else value
            unknown = key == "type" and not all(name in TYPES for name in names)
            if not isinstance(value, KINDS[key]) or unknown or (value == [] and key != "required"):
                raise ValueError(f"{key} cannot be {value!r:.60}")
        try:
            json_parts(s, schema)
        except (KeyError, TypeError, RecursionError) as e:
            raise ValueError(f"the $ref {s.get('$ref')!r:.60} names no schema") from e
        todo += s.get("anyOf", [])
        todo += [s[key] for key in ("items", "additionalProperties") if key in s]
        for key in ("properties", "$defs", "definitions"):
            todo += s.get(key, {}).values()


def json_grammar(schema, ends):
    """The parts of a text that is JSON under a schema, then one of the ids `ends`. ValueError if
    the schema is not supported."""
    check_schema(schema)
    return blank, partial(json_parts, schema, schema), blank, {256 + i for i in ends}


def call_grammar(template, tools, forced=None):
    """The parts of an answer in a chat that may call `tools`: text, then perhaps calls. If `forced`
    is not None, it calls the tool of this name, or any if it is "". None if the template writes no
    calls in JSON, or without `forced` if no token begins one: then nothing is known of the ids."""
    before, _, rest = template.called.partition(TOOL)
    between, _, after = rest.partition(json.dumps({KEY: 0}))
    if not between or CALL_ID in rest or (forced is None and template.call is None):
        return None
    special, end = template.tokenizer.special, template.tokenizer.decode([template.end])
    names, calls = "|".join(map(re.escape, special)), []

    def literal(text):
        pieces = filter(None, re.split(f"({names})", text))
        return [{256 + special[p]} if p in special else p.encode() for p in pieces]

    for function in (tool["function"] for tool in tools):
        schema = function.get("parameters", {})
        try:
            check_schema(schema, strict=False)
        except ValueError:  # the model may have been told of any
            schema = {"type": "object"}
        if forced in (None, "", function["name"]):
            arguments = partial(json_parts, schema, schema)
            name, close = literal(function["name"] + between), literal(after.split(end)[0])
            calls.append((*name, arguments, *close))
    ends, first = {256 + i for i in template.ends}, literal(before)
    start = {256 + template.call} if template.call is not None else first[0]
    words = (TEXT | {256 + i for i in special.values()}) - ends - start

    def more():
        return (blank, ends), (blank, *first[first.index(start) :], lambda: calls, more)

    def answer():
        return (ends,), (words, answer), more()[1]

    return (answer,) if forced is None else (*first, lambda: calls, more)


def push(parts, stack):
    """The stack with these parts before it."""
    for part in reversed(parts):
        stack = part, stack
    return stack


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
