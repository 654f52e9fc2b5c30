"""Tools: Python functions that a model may call, their JSON schemas, and how they are called."""
import asyncio
import enum
import inspect
import json
import re
import runpy
import sys
import textwrap
import types
import typing
from pathlib import Path

from data.chat import parse_call
from data.cli import UserError, user_code
from data.schema import fits

NAMED = {"hotel": Path(__file__).with_name("hotel.py")}
JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array",
              types.NoneType: "null", tuple: "array", dict: "object"}  # fmt: skip


def load_tools(source):
    """{name: function} of --tools, a Python file or one of NAMED: what its `get_tools()` returns,
    or else its public functions.

    To add a tool of your own, write a file with a function. Its parameters and their types become
    the schema, and the model reads what it returns, any JSON value.
    """
    path, where = str(NAMED.get(source, source)), f"--tools {source}"
    if not Path(path).is_file():
        raise UserError(f"{where}: no such file; name a .py file, or {', '.join(NAMED)}")

    def is_defined_here(f):
        f = inspect.unwrap(f) if callable(f) else f  # look into a decorator's wrapper
        return inspect.isfunction(f) and f.__code__.co_filename == path

    with user_code(f"{where} cannot be loaded"):
        names = runpy.run_path(path)
        tools = {n: f for n, f in names.items() if n[0] != "_" and is_defined_here(f)}
        tools = tools["get_tools"]() if "get_tools" in tools else tools
    if not tools or not isinstance(tools, dict):
        raise UserError(f"{where} has no function, or get_tools() returns no {{name: function}}")
    for name, function in tools.items():
        wanted = "write it with types of JSON, such as str, int, list[str], Literal"
        with user_code(f"{where}: the signature of {name} cannot be read: {wanted}"):
            function_schema(name, function)
        if database := getattr(function, "database", None):
            print(f"[{name} knows {database}]", file=sys.stderr)
    return tools


def split_hint(hint):
    """(list, (str,)) for list[str]: a type and its parameters. TypeError for an Enum."""
    if isinstance(hint, enum.EnumMeta):
        raise TypeError(f"{hint.__name__} is an Enum: write a Literal of its values")
    kind = typing.get_origin(hint) or hint
    return typing.Union if kind is types.UnionType else kind, typing.get_args(hint)


def type_schema(hint):
    """The JSON schema of a type hint; {} for a type that JSON does not know."""
    kind, options = split_hint(hint)
    if kind is typing.Union:
        schemas = [type_schema(option) for option in options if option is not types.NoneType]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        return schema | ({"nullable": True} if types.NoneType in options else {})
    if kind is typing.Literal:
        names = list(dict.fromkeys(JSON_TYPES[type(value)] for value in options))
        return {"type": names if len(names) > 1 else names[0], "enum": list(options)}
    schema = {"type": JSON_TYPES[kind]} if kind in JSON_TYPES else {}
    if kind is list and options:
        schema["items"] = type_schema(options[0])
    elif kind is dict and options:
        schema["additionalProperties"] = type_schema(options[1])
    return schema


def known_by_training(tools):
    """The names of those of the tools {name: function} that our models call without a schema."""
    return {name for name, f in tools.items() if getattr(f, "needs_no_schema", False)}


def function_schema(name, function):
    """The JSON schema by which a model is told of a function: its parameters, their types, and what
    its docstring, in Google's style, says of them, as transformers.utils.get_json_schema does."""
    doc = "\n" + (inspect.getdoc(getattr(function, "func", function)) or "")
    head, *rest = re.split(r"\n\s*(Args|Returns|Raises):[ \t]*\n", doc)
    sections, descriptions, key = dict(zip(rest[::2], rest[1::2])), {}, None
    for line in textwrap.dedent(sections.get("Args", "")).splitlines():
        match = re.match(r"(\w+)(?:[ \t]*\([^()]*\))?:(.*)", line)
        key, line = match.groups() if match else (key, line)
        descriptions[key] = f"{descriptions.get(key, '')} {line.strip()}".strip()
    signature = inspect.signature(function, eval_str=True)
    properties, required = {}, []
    for key, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"{key} is taken by position only, and models give arguments by name")
        schema, description = type_schema(parameter.annotation), descriptions.get(key, "")
        match = re.search(r"\(choices:\s*(.*?)\)\s*$", description, re.IGNORECASE)
        if match and "anyOf" not in schema:  # choices of a union stay in the description
            choices = [choice.strip(" \"'`") for choice in match[1].strip("[]").split(",")]
            chosen = schema.setdefault("items", {}) if schema.get("type") == "array" else schema
            parsed = chosen.get("type") in ("integer", "number", "boolean")
            chosen["enum"] = list(map(json.loads, choices)) if parsed else choices
            description = description[: match.start()].strip()
        properties[key] = schema | {"description": description}
        required += [key] if parameter.default is parameter.empty else []
    parameters = {"type": "object", "properties": properties}
    parameters |= {"required": required} if required else {}
    schema = {"name": name, "description": head.strip(), "parameters": parameters}
    return {"type": "function", "function": schema}


def call_tool(tools, call):
    """What a tool returns for an entry of `tool_calls`, as JSON text. A call that does not fit the
    function's parameters never reaches it: the model reads {"error": ...} instead."""
    name = call["function"]["name"]
    try:
        _, arguments = parse_call(call)
        if name not in tools:
            raise ValueError(f"no such tool, only {', '.join(tools)}")
        inspect.signature(tools[name]).bind(**arguments)
        properties = function_schema(name, tools[name])["function"]["parameters"]["properties"]
        for key in arguments.keys() & properties.keys():  # **others take any value
            if not fits(arguments[key], properties[key]):
                raise ValueError(f"{key} cannot be {arguments[key]!r}")
    except (TypeError, ValueError) as e:
        return json.dumps({"error": f"{name}: {e}"}, ensure_ascii=False)
    try:
        result = tools[name](**arguments)
        result = asyncio.run(result) if inspect.iscoroutine(result) else result
        result = json.dumps(result, ensure_ascii=False, allow_nan=False)
    except Exception as e:  # the model reads of a tool's failure and goes on
        error = f"{name} failed: {type(e).__name__}: {e}"
        result = json.dumps({"error": error}, ensure_ascii=False)
    return result.encode("utf-8", "replace").decode()  # a lone surrogate, \ud83d, is not valid text
