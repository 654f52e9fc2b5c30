"""Tools: Python functions that a model may call, their JSON schemas, and the calls."""
import asyncio
import contextlib
import enum
import inspect
import json
import re
import runpy
import types
import typing
from pathlib import Path

from data.chat import parse_call
from data.cli import UserError

NAMED = {"hotel": Path(__file__).with_name("hotel.py")}


def load_tools(source):
    """{name: function} of --tools, a Python file or one of NAMED: what its `get_tools()` returns,
    or else its public functions.

    To add a tool of your own: a file with a function; its parameters and their types are the
    schema, what it returns (anything that JSON has) is what the model reads.
    """
    path = str(NAMED.get(source, source))
    if not Path(path).is_file():
        raise UserError(f"--tools {source}: no such file; name a .py file, or {', '.join(NAMED)}")
    try:
        found = runpy.run_path(path)
        own = {n: f for n, f in found.items() if n[0] != "_" and is_function_of(path, f)}
        if "get_tools" in own:
            own = own["get_tools"]()
    except UserError:
        raise
    except (Exception, SystemExit) as e:  # the user's own code can fail in any way
        raise UserError(f"--tools {source} cannot be loaded ({type(e).__name__}: {e})") from e
    if not isinstance(own, dict):
        raise UserError(f"--tools {source}: get_tools() must return a dict {{name: function}}")
    if not own:
        raise UserError(f"--tools {source} defines no function")
    for name, f in own.items():
        check_tool(f"--tools {source}: {name}", f)
    return own


def is_function_of(path, f):
    """Whether `f` is a function that the file defines, maybe in a decorator's wrapper."""
    f = inspect.unwrap(f) if callable(f) else f
    return inspect.isfunction(f) and f.__code__.co_filename == path


def check_tool(where, function):
    """UserError, which begins with `where`, for what a model cannot be told of or cannot call."""
    if inspect.isclass(function) or not callable(function):
        raise UserError(f"{where} is no function: write a function that uses it")
    try:
        function_schema("", function)
        parameters = inspect.signature(function).parameters.values()
    except Exception as e:  # annotations are the user's own code
        raise UserError(
            f"{where} has a signature that cannot be read ({type(e).__name__}: {e}): write a "
            "function whose parameters have types of JSON, such as str, int, list[str], Literal"
        ) from e
    if bad := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]:
        raise UserError(
            f"{where} takes {bad[0]} by position only, and models give arguments by name: write a "
            "function without / among its parameters"
        )


JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array",
              types.NoneType: "null", tuple: "array", dict: "object"}  # fmt: skip


def kind_of(hint):
    """(list, (str,)) of list[str]: a type and its parameters. Annotated is what it annotates, an
    Enum the Literal of its members."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = hint.__origin__
    if isinstance(hint, enum.EnumMeta):
        return typing.Literal, tuple(hint)
    return typing.get_origin(hint) or hint, typing.get_args(hint)


def json_value(choice):
    """What JSON has for a choice of a Literal: itself, or the value of an Enum's member."""
    return choice.value if isinstance(choice, enum.Enum) else choice


def type_schema(hint):
    """The JSON schema of a type hint; {} for a type that JSON does not know."""
    kind, parts = kind_of(hint)
    if kind in (typing.Union, types.UnionType):
        schemas = [type_schema(p) for p in parts if p is not types.NoneType]
        schema = {"anyOf": schemas}
        if len(schemas) == 1:
            schema = schemas[0]
        elif all(s.keys() == {"type"} and isinstance(s["type"], str) for s in schemas):
            names = sorted({s["type"] for s in schemas})
            schema = {"type": names if len(names) > 1 else names[0]}
        return schema | ({"nullable": True} if types.NoneType in parts else {})
    if kind is typing.Literal:
        values = [json_value(p) for p in parts]
        names = list(dict.fromkeys(JSON_TYPES[type(v)] for v in values))
        return {"type": names if len(names) > 1 else names[0], "enum": values}
    schema = {"type": JSON_TYPES[kind]} if kind in JSON_TYPES else {}
    if kind is list and parts:
        schema["items"] = type_schema(parts[0])
    elif kind is tuple and parts:
        schema["prefixItems"] = [type_schema(p) for p in parts]
    elif kind is dict and parts:
        schema["additionalProperties"] = type_schema(parts[1])
    return schema


def read_choices(text, kind):
    """The list in a docstring's (choices: ...): JSON, or texts between commas. `kind` is the type
    in the parameter's schema: 1, 2 are numbers unless that is "string"."""
    for written in (text, f"[{text}]" if kind != "string" else ""):
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(written), list):
                return [c.strip() if isinstance(c, str) else c for c in found]
    return [c.strip().strip("\"'`") for c in text.strip("[]").split(",")]


def function_schema(name, function):
    """The JSON schema by which a model is told of a function: its parameters, their types, and what
    its docstring says in Google's style; the same as transformers.utils.get_json_schema makes."""
    text = "\n" + (inspect.getdoc(getattr(function, "func", function)) or "")
    head, *rest = re.split(r"\n\s*(Args|Returns|Raises):[ \t]*\n", text)
    sections, about, known = dict(zip(rest[::2], rest[1::2])), {}, None
    lines = [line for line in sections.get("Args", "").split("\n") if line.strip()]
    margin = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    for line in lines:
        found = re.match(rf"\s{{{margin}}}(\w+)(?:[ \t]*\([^()]*\))?:(.*)", line)
        known = found[1] if found else known
        about[known] = f"{about.get(known, '')} {(found[2] if found else line).strip()}".strip()
    signature = inspect.signature(function, eval_str=True)
    properties, required = {}, []
    for key, p in signature.parameters.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        schema, said = type_schema(p.annotation), about.get(key, "")
        if choices := re.search(r"\(choices:\s*(.*?)\)\s*$", said, re.IGNORECASE):
            schema["enum"] = read_choices(choices[1], schema.get("type"))
            said = said[: choices.start()].strip()
        properties[key] = schema | {"description": said}
        required += [key] if p.default is p.empty else []
    parameters = {"type": "object", "properties": properties}
    parameters |= {"required": required} if required else {}
    schema = {"name": name, "description": head.strip(), "parameters": parameters}
    if signature.return_annotation is not signature.empty:
        schema["return"] = type_schema(signature.return_annotation)
        if "Returns" in sections:
            schema["return"]["description"] = sections["Returns"].strip()
    return {"type": "function", "function": schema}


def suits(value, annotation):
    """Whether a JSON value may be given for a parameter of that type. Types that JSON does not know
    are not checked."""
    kind, parts = kind_of(annotation)  # list[str]: its items are not looked at
    if kind in (typing.Union, types.UnionType):
        return any(suits(value, p) for p in parts)
    if kind is typing.Literal:
        return value in map(json_value, parts)
    if kind not in (str, int, float, bool, list, dict, types.NoneType):
        return True
    if isinstance(value, bool):  # for Python an int, too
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def to_argument(value, annotation):
    """What the function gets for a JSON value that suits: the Enum's member for its value."""
    kind, parts = kind_of(annotation)
    if kind in (typing.Union, types.UnionType):
        return next((to_argument(value, p) for p in parts if suits(value, p)), value)
    if kind is typing.Literal:
        return next((p for p in parts if json_value(p) == value), value)
    if kind is list and parts:
        return [to_argument(v, parts[0]) for v in value]
    return value


def call_tool(tools, call):
    """What a tool returns for an entry of `tool_calls`, as JSON text. A call that does not fit the
    function's parameters never reaches it: the model reads {"error": ...} instead."""
    try:
        name, arguments = parse_call(call)
        if name not in tools:
            raise ValueError(f"there is no tool {name!r}, only {', '.join(tools)}")
        signature = inspect.signature(tools[name], eval_str=True)
        try:
            signature.bind(**arguments)
        except TypeError as e:
            raise ValueError(f"{name}: {e}") from e
        for key, value in arguments.items():
            parameter = signature.parameters.get(key)  # none if **others take it
            if parameter and not suits(value, parameter.annotation):
                raise ValueError(f"{name}: {key} cannot be {value!r}")
            arguments[key] = to_argument(value, parameter.annotation) if parameter else value
    except ValueError as e:
        return json.dumps({"error": str(e)}, ensure_ascii=False)
    try:
        result = tools[name](**arguments)
        result = asyncio.run(result) if inspect.iscoroutine(result) else result
        result = json.dumps(result, ensure_ascii=False, allow_nan=False)
    except Exception as e:  # a tool that fails is news for the model, no reason to stop talking
        error = f"{name} failed: {type(e).__name__}: {e}"
        result = json.dumps({"error": error}, ensure_ascii=False)
    return result.encode("utf-8", "replace").decode()  # half of a pair, \ud83d, is no text
