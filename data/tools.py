"""Tools: Python functions that a model may call, their JSON schemas, and the calls."""
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
        own = {n: f for n, f in found.items() if inspect.isfunction(f) and n[0] != "_"}
        own = {n: f for n, f in own.items() if f.__code__.co_filename == path}
        if "get_tools" in own:
            own = own["get_tools"]()
        for f in own.values():
            inspect.signature(f, eval_str=True)  # as call_tool will want it
    except UserError:
        raise
    except (Exception, SystemExit) as e:  # the user's own code can fail in any way
        raise UserError(f"--tools {source} cannot be loaded ({type(e).__name__}: {e})") from e
    if not own:
        raise UserError(f"--tools {source} defines no function")
    return own


JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array",
              types.NoneType: "null", tuple: "array", dict: "object"}  # fmt: skip


def type_schema(hint):
    """The JSON schema of a type hint; {} for a type that JSON does not know."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    kind = origin or hint
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
        names = list(dict.fromkeys(JSON_TYPES[type(p)] for p in parts))
        return {"type": names if len(names) > 1 else names[0], "enum": list(parts)}
    schema = {"type": JSON_TYPES[kind]} if kind in JSON_TYPES else {}
    if kind is list and parts:
        schema["items"] = type_schema(parts[0])
    elif kind is tuple and parts:
        schema["prefixItems"] = [type_schema(p) for p in parts]
    elif kind is dict and parts:
        schema["additionalProperties"] = type_schema(parts[1])
    return schema


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
            schema["enum"] = [c.strip() for c in json.loads(choices[1])]
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
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(suits(value, p) for p in parts)
    if origin is typing.Literal:
        return value in parts
    kind = origin or annotation  # list[str]: its items are not looked at
    if kind not in (str, int, float, bool, list, dict, types.NoneType):
        return True
    if isinstance(value, bool):  # for Python an int, too
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


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
    except ValueError as e:
        return json.dumps({"error": str(e)}, ensure_ascii=False)
    try:
        result = json.dumps(tools[name](**arguments), ensure_ascii=False, allow_nan=False)
    except Exception as e:  # a tool that fails is news for the model, no reason to stop talking
        error = f"{name} failed: {type(e).__name__}: {e}"
        result = json.dumps({"error": error}, ensure_ascii=False)
    return result.encode("utf-8", "replace").decode()  # half of a pair, \ud83d, is no text
