"""data/cli.py: errors as one line, exit codes, flags of other projects."""

import contextlib
import dataclasses
import importlib
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from data.cli import OURS, SCRIPTS, Parser, UserError, at_least, between, positive, run_cli

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("error, code, line", [
    (UserError("bad thing"), 2, "x.py: bad thing\n"),
    (FileNotFoundError(2, "No such file", "a.txt"), 2, "x.py: a.txt: No such file\n"),
    (OSError(28, "No space left on device"), 2, "x.py: [Errno 28] No space left on device\n"),
    (KeyboardInterrupt(), 130, "\nx.py: interrupted\n"),
    (None, 0, ""),
])
def test_errors_become_exit_codes_and_a_bug_is_not_hidden(error, code, line, monkeypatch, capsys):
    def main():
        if error:
            raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    with pytest.raises(SystemExit) as e:
        run_cli(main)
    assert (e.value.code, capsys.readouterr().err) == (code, line)
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)


@pytest.mark.parametrize("kind, text, line", [
    (at_least(1), "0", "--n 0 must be at least 1"),
    (at_least(0, float), "inf", "--n inf must be at least 0 and finite"),
    (positive, "nan", "--n nan must be above 0 and finite"),
    (between(0, 1), "1.5", "--n 1.5 must be from 0 to 1"),
    (at_least(1), "x", "argument --n: invalid int value: 'x'"),
])
def test_a_number_outside_of_its_limits_is_one_line(kind, text, line, capsys):
    parser = Parser(prog="x.py")
    parser.add_argument("--n", type=kind)
    assert parser.parse_args(["--n", "1"]).n == parser.parse_args(["--n", "1e0"]).n == 1
    with pytest.raises(SystemExit):
        parser.parse_args(["--n", text])
    assert capsys.readouterr().err == f"x.py: {line}\n"


CONFIG = """# nanoGPT's
out_dir = 'out shakespeare'
eval_iters = 200
n_embd = 384 # baby GPT
wandb_log = False
wandb_project = 'owt'
dropout = 0.2
"""
YAML = """### LLaMA-Factory's
model_name_or_path: gpt2
lora_target:
  - q_proj
bf16: true  # where it can
my_own: 0.1
"""
JSON = '{"lora_target": ["q", "v"], "max_steps": 200, "warmup_ratio": 0.1, "stage": "pt"}'


def parser_of(script):
    parser = importlib.import_module(script).build_parser()
    parser.prog = f"{script}.py"
    return parser


@pytest.mark.parametrize("line, said", [
    ("train --lrr 3", "--lrr is unknown: did you mean --lr?"),
    ("train --foo=3", "--foo is unknown (see --help)"),
    ("sample --block_siz 3", "--block_siz is unknown (see --help)"),
    ("train --max-steps 3", "--max-steps is --max_steps here"),
    ("train --max-iters=7 --n_embd 3", "--max-iters is --max_steps here; --n_embd is --d_model"),
    ("train --compile=False", "--compile takes no value: write --compile or --no-compile"),
    ("train --compile False", "False: a switch takes no value, --no-NAME turns it off"),
    ("train --init_from=resume", "--init_from: --ckpt NAME starts from a model, --resume RUN"),
    ("sample --start=FILE:a.txt --n 1", "--start is --prompt here; --n is --num_samples here"),
    ("train --warmup_ratio 0.03 --seed 3", "counts steps: this ratio of --max_steps"),
    ("finetune --train_batch_size=4", "--train_batch_size is unknown"),
    ("finetune --batch_size=4", "finetune.py has --batch_tokens, rows times --context"),
    ("train --epochs 3", "--epochs: train.py has --max_steps and --max_minutes"),
    ("finetune --load_in_4bit --fp16", "is --quantize nf4 here; --fp16 is --dtype fp16 here"),
    ("sample --load_in_4bit", "--load_in_4bit is --quantize nf4, a flag of finetune.py"),
    ("finetune --adapter_name_or_path x", "_path: merge it first (lora.py merge)"),
    ("train --wandb --report_to x", "--wandb, --report_to: out/NAME/metrics.jsonl and loss.svg"),
    ("finetune --do_train --plot_loss", "--do_train, --plot_loss: leave it out"),
    ("train --tokenizer gpt2", "--tokenizer is a flag of prepare_data.py"),
    ("model --num_layers 2", "--num_layers is --n_layer, a flag of train.py"),
    ("train config/no.py", "config/no.py does not exist; settings are given as flags here"),
    ("train nano.py --max_iters 9", "--eval_iters: an evaluation of train.py reads --eval_tokens, "
     "one of finetune.py --eval_rows; --n_embd is --d_model here; --wandb_log, --wandb_project: o"),
    ("finetune --config lf.yml", "lf.yml: settings are given as flags here, not in files: "
     "--model_name_or_path is --ckpt here; --lora_target is --lora_targets here; --bf16 is --dtype "
     "bf16 here; --my_own is unknown (see --help)"),
    ("finetune train hf.json", "--warmup_ratio: --warmup_steps counts steps: this ratio of"),
    ("finetune rows.json", "rows.json is unknown: did you mean --data?"),
    ("sample run", "run is unknown: did you mean --ckpt?"),
    ("sample Once upon", "Once is unknown: did you mean --prompt?"),
    ("lora merge", "the following arguments are required: --ckpt, --adapter, --out"),
])
def test_a_wrong_flag_is_one_line(line, said, capsys):
    Path("nano.py").write_text(CONFIG)
    Path("lf.yml").write_text(YAML)
    Path("hf.json").write_text(JSON)
    Path("rows.json").write_text('[{"text": "a"}]')
    Path("run").mkdir()
    Path("run/last.pt").touch()
    script, *words = line.split()
    with pytest.raises(SystemExit) as e:
        parser_of(script).parse_args(words)
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1


def test_no_flag_of_transformers_is_taken_for_a_slip_and_ours_exist(capsys):
    transformers = pytest.importorskip("transformers")
    for field in dataclasses.fields(transformers.TrainingArguments):
        with contextlib.suppress(SystemExit):
            parser_of("train").parse_args([f"--{field.name}=x"])
    assert "did you mean" not in capsys.readouterr().err
    known = {option for script in SCRIPTS for option in parser_of(script)._option_string_actions}
    assert {flag for use in OURS.values() for flag in re.findall(r"--[\w-]+", use)} <= {
        *known, "--nproc_per_node"}


BUSY = """
import time
from data.progress import waiting, watched
for _ in watched(range(3), "row"):
    time.sleep(0.9)
with waiting("asking"):
    time.sleep(0.9)
"""


def test_what_takes_long_is_shown_on_a_terminal_with_what_is_left_and_not_in_a_file():
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", BUSY]
    subprocess.run(command, cwd=ROOT, stderr=end, check=True)
    said = os.read(terminal, 99999).decode()
    assert re.search(r"row [12] of 3, \d+ s left", said) and "asking; seconds: " in said
    assert "row 0 of 3" in said and "row 0 of 3," not in said
    assert said.endswith("\r\x1b[K")
    subprocess.run(command, cwd=ROOT, stderr=end, check=True, env=os.environ | {"RANK": "1"})
    assert not select.select([terminal], [], [], 0)[0]
    assert not subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, check=True).stderr
