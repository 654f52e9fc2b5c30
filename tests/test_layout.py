"""The rules of structure and style that a reader relies on, read off the syntax trees."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ("mnist", "model", "sample", "train", "finetune", "lora", "prepare_data")
PACKAGES = {"torch", "tiktoken", "numpy", "requests"}
# A module imports from those in its line, and from what these may import from.
IMPORTS = {
    "data.cli": "",
    "data.plot": "",
    "data.progress": "data.cli",
    "data.graphs": "",
    "data.matches": "",
    "data.costs": "data.cli",
    "data.machine": "data.cli",
    "data.matmul": "data.cli",
    "data.files": "data.cli",
    "data.runs": "data.files data.plot",
    "data.tables": "data.plot",
    "data.download": "data.files data.progress",
    "data.idx": "data.download",
    "data.text": "data.files",
    "data.tensors": "data.files",
    "data.sentencepiece": "data.cli",
    "data.tokenizer": "data.download data.sentencepiece",
    "data.chat": "data.cli",
    "data.analogy": "data.hf_weights",
    "data.tools": "data.schema",
    "data.reply": "data.chat data.tokenizer",
    "data.schema": "data.chat",
    "data.drafts": "data.chat",
    "data.scores": "data.chat",
    "data.hotel": "data.download data.scores",
    "data.facts": "data.hotel data.scores",
    "data.hotel_env": "data.facts data.tools",
    "data.sources": "data.hotel_env",
    "data.row_files": "data.sources data.text",
    "data.hub_rows": "data.row_files",
    "data.rows": "data.hub_rows",
    "data.terminal": "data.reply data.tools",
    "data.rewards": "data.sources",
    "data.batches": "data.chat data.tokenizer",
    "data.scheduler": "data.cli",
    "data.answer": "data.reply data.scheduler",
    "data.api": "data.answer data.rows data.schema data.tools",
    "data.service": "data.api data.runs",
    "data.server": "data.service",
    "data.hf_tokenizer": "data.chat data.tokenizer",
    "data.rope": "",
    "data.hf_config": "data.cli",
    "data.hf_weights": "data.hf_config data.hf_tokenizer data.tensors",
    "data.gguf": "data.hf_weights data.rope",
    "prepare_data": "data.hf_tokenizer data.sources data.text",
    "model": "data.costs data.gguf data.machine data.matches data.rope data.runs data.tables",
    "mnist": "model data.idx data.plot data.runs",
    "lora": "model",
    "sample": "lora data.analogy data.drafts data.graphs data.matmul data.runs data.schema "
    "data.terminal",
    "train": "model prepare_data data.runs",
    "finetune": "train sample data.batches data.rewards data.rows",
}
# What only one function needs, once all else is done: train.py's closing sample, the server.
LATE = {"train": {"sample"}}
LATE["sample"] = {"data.scheduler", "data.server", "data.service", "mnist"}
WITHOUT_TORCH = {m for m in IMPORTS if m.startswith("data.")} | {"prepare_data"}
WITHOUT_TORCH -= {"data.analogy", "data.graphs", "data.machine", "data.matches", "data.matmul"}
WITHOUT_TORCH -= {"data.tensors"}
WITHOUT_TORCH -= {"data.batches", "data.gguf", "data.hf_weights", "data.rope"}
PATHS = [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]
if (ROOT / ".git").exists():  # a reader's own scripts and tools beside ours have other rules
    ours = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    PATHS = [p for p in PATHS if p.relative_to(ROOT).as_posix() in ours.split("\n")]
PATHS = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in PATHS}
MODULES = sorted(set(PATHS) - {"data.__init__"})

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SOURCE = {name: PATHS[name].read_text(encoding="utf-8") for name in MODULES}
TREE = {name: ast.parse(SOURCE[name]) for name in MODULES}

every_script = pytest.mark.parametrize("name", MODULES)


def nodes(name, *kinds):
    return [node for node in ast.walk(TREE[name]) if isinstance(node, kinds)]


def calls(name):
    """(what is called as written, the call) for every call of a script."""
    return [(ast.unparse(node.func), node) for node in nodes(name, ast.Call)]


def imported(name, late=True):
    """The modules that a module imports, those of data/ in full; without `late` only those that it
    imports at its top."""
    modules = set()
    tops = [n for n in TREE[name].body if isinstance(n, (ast.Import, ast.ImportFrom))]
    for node in nodes(name, ast.Import, ast.ImportFrom) if late else tops:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} is a relative import"
            names = [f"data.{a.name}" for a in node.names] if node.module == "data" else []
            modules |= set(names or [node.module])
        else:
            modules |= {alias.name for alias in node.names}
    return {m if m.startswith("data.") else m.split(".")[0] for m in modules}


def reachable(name):
    """The modules that a module may import from."""
    direct = set(IMPORTS[name].split())
    return direct.union(*(reachable(other) for other in direct))


def test_the_list_of_scripts_is_closed():
    assert {name for name in MODULES if "." not in name} == set(SCRIPTS)
    assert set(MODULES) == set(IMPORTS)
    packages = [p.parent.name for p in ROOT.glob("*/__init__.py")]
    assert packages == ["data"]


@every_script
def test_imports_only_point_down(name):
    ours = imported(name) & set(IMPORTS)
    assert ours - LATE.get(name, set()) <= reachable(name)
    assert imported(name, late=False) & set(IMPORTS) <= reachable(name)


@every_script
def test_only_the_four_packages_are_imported(name):
    allowed = PACKAGES | {"regex", "jinja2"}  # these come with tiktoken and with torch
    allowed -= {"torch"} if name in WITHOUT_TORCH else set()
    outside = imported(name) - set(IMPORTS) - {"data"}
    assert outside - set(sys.stdlib_module_names) - allowed == set()


def test_requirements_hold_the_four_packages_with_torch_pinned():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in lines) == sorted(PACKAGES)
    assert "torch==2.13.0" in lines


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@every_script
def test_no_script_does_work_when_imported(name):
    quiet = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.ClassDef, *FUNCTIONS)
    assert ast.get_docstring(TREE[name]), f"{name} opens without a docstring"
    rest = TREE[name].body[1:]
    loud = [n.lineno for n in rest if not isinstance(n, quiet) and not is_main_guard(n)]
    assert loud == []
    assert is_main_guard(rest[-1]) or name.startswith("data."), "a script can be run"


@every_script
def test_functions_stay_short(name):
    lengths = [(f.name, f.end_lineno - f.lineno + 1) for f in nodes(name, *FUNCTIONS)]
    assert [(f, n) for f, n in lengths if n > 80] == []


def wants_docstring(name):
    """Public functions and classes at top level, and the latter's public methods that take
    arguments. What torch or http.server calls by its own name is described there, and what a class
    overrides in one above it."""
    overridden = {"forward", "backward", "log_message"}
    for node in TREE[name].body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if node.name in ("main", "build_parser"):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for method in (n for n in node.body if isinstance(n, FUNCTIONS)):
                a = method.args
                takes = len(a.posonlyargs + a.args + a.kwonlyargs) > 1 or a.vararg or a.kwarg
                override = node.bases and method.name in overridden
                if takes and not method.name.startswith("_") and not override:
                    yield f"{node.name}.{method.name}", method
            overridden |= {n.name for n in node.body if isinstance(n, FUNCTIONS)}


@every_script
def test_what_is_public_has_a_docstring(name):
    assert [n for n, node in wants_docstring(name) if not ast.get_docstring(node)] == []


@every_script
def test_every_flag_has_a_help_text(name):
    # build_parser may call add_argument by a shorter name: add = p.add_argument
    flags = [c for what, c in calls(name) if what == "add" or what.endswith("add_argument")]
    if any(f.name == "build_parser" for f in nodes(name, *FUNCTIONS)):
        assert flags, "build_parser without flags?"
    mute = [c.lineno for c in flags if "help" not in {k.arg for k in c.keywords}]
    assert mute == []


@every_script
def test_nothing_is_unpickled(name):  # ruff checks the standard library
    for what, call in calls(name):
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert what != "torch.load" or keywords["weights_only"] == "True"
        assert what != "np.load" or "allow_pickle" not in keywords


def opens_text_without_encoding(call):
    """Whether a call opens, reads or writes text and leaves the encoding to the machine."""
    name = ast.unparse(call.func)
    if "encoding" in {k.arg for k in call.keywords}:
        return False
    if name not in ("open", "os.fdopen", "gzip.open", "lzma.open"):
        return name.endswith((".read_text", ".write_text", "Path.open"))
    mode = ast.unparse(call.args[1]) if len(call.args) > 1 else "'rb'" if "." in name else "'r'"
    modes = re.findall(r"'(\w+\+?\w*)'", mode)  # also those of: "ab" if resumed else "wb"
    return not all("b" in m for m in modes)


@every_script
def test_text_files_are_opened_with_an_encoding(name):
    assert [c.lineno for _, c in calls(name) if opens_text_without_encoding(c)] == []
