"""Runs from before flags and settings got their present names (old_runs.zip, written by commit
84d032b) load, go on as they would have then, and answer.

What they were trained on is made again here: the text of `TEXT` by bytes, and `CHATS`.
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune
import prepare_data
import sample
import train

TEXT = "hello world, this is a small text for a small model. 你好，世界。\n" * 200
CHATS = [{"instruction": f"say {i}", "output": f"it is {i}"} for i in range(20)]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """out/adamw and out/muon after 6 steps, and out/adapter, QLoRA over out/adamw, after 4."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(ROOT / "tests" / "old_runs.zip") as archive:
        archive.extractall()
    Path("tiny.txt").write_text(TEXT, encoding="utf-8")
    text = "".join(json.dumps(row) + "\n" for row in CHATS)
    Path("chats.jsonl").write_text(text, encoding="utf-8")
    prepare_data.main(["tiny.txt", "--tokenizer", "byte", "--name", "tiny"])


# the losses that the commit which wrote the runs itself got by going on with them
@pytest.mark.parametrize(
    "script, run, steps, loss",
    [
        (train, "adamw", 9, 5.72473159376493),
        (train, "muon", 9, 5.724794505784046),
        (finetune, "adapter", 8, 5.752356136546416),
    ],
)
def test_an_old_run_goes_on_as_it_would_have(runs, script, run, steps, loss):
    script.main(["--resume", f"out/{run}", "--max_steps", str(steps)])
    last = Path("out", run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last)["step"] == steps
    assert json.loads(last)["val_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("run", ["adamw", "adapter"])
def test_an_old_run_writes_what_it_would_have(runs, run, capsys):
    flags = ["--temperature", "0", "--max_tokens", "12", "--print_ids"]
    sample.main(["--ckpt", f"out/{run}", "--prompt", "hello", *flags])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "114,149,100,44,100,44,100,44,100,44,100,44"


def test_an_old_run_chats(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("say 3\n/save said.json\n"))
    sample.main(["--ckpt", "out/adapter", "--chat", "--seed", "1", "--max_tokens", "8"])
    assert "saved to said.json" in capsys.readouterr().out
    turns = json.loads(Path("said.json").read_text(encoding="utf-8"))["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
