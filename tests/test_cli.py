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

from data.cli import FOREIGN, SCRIPTS, Parser, UserError, at_least, between, positive, run_cli

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
    (at_least(0, float), "inf", "--n inf must be at least 0"),
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
gradient_accumulation_steps = 5 * 8
eval_iters = 200
n_embd = 384 # baby GPT
wandb_log = False
"""
YAML = """### LLaMA-Factory's
model_name_or_path: gpt2
lora_target:
  - q_proj
  - v_proj
dataset: identity, alpaca
bf16: true  # where it can
resume_from_checkpoint: null
warmup_ratio: 0.1
cutoff_len: 512
"""
JSON = '{"lora_target": ["q", "v"], "max_steps": 200, "warmup_ratio": 0.1, "stage": "pt"}'


def parser_of(script):
    parser = importlib.import_module(script).build_parser()
    parser.prog = f"{script}.py"
    return parser


@pytest.mark.parametrize("line, values", [
    ("train --max-iters 7 --lr 1 --dtype bfloat16", dict(max_steps=7, lr=1, dtype="bf16")),
    ("train --max-steps=7 --no-tied --data=--n", dict(max_steps=7, tied=False, data="--n")),
    ("train --compile=False --decay_lr=False", dict(compile=False, warmup_steps=0)),
    ("sample --compile=False --eval_iters 3 --n 1", dict(num_samples=1)),
    ("train --dataset shakespeare_char --bias True", dict(data="shakespeare", ff_bias=True)),
    ("train --init_from=gpt2-xl --decay_lr=True", dict(ckpt="gpt2-xl", schedule=None)),
    ("train --init_from=resume --bias=False", dict(resume="", ckpt=None, out_bias=False)),
    ("sample --init_from=resume --start=FILE:a.txt", dict(ckpt=None, prompt=["@a.txt"])),
    ("sample --do_sample false --num_beams 3 --port 80", dict(temperature=0, serve=80)),
    ("sample --load_in_8bit --temp 1 --max_tokens 5", dict(dtype="int8", max_new_tokens=5)),
    ("finetune --fp16 true --bf16 false --load_in_4bit", dict(dtype="fp16", quantize="nf4")),
    ("finetune --lora_r 4 --use_peft --stage rm", dict(lora_rank=4, objective="reward")),
    ("finetune --target_modules q_proj v_proj --do_train", dict(lora_targets="q_proj,v_proj")),
    ("finetune --num_train_epochs 2 --resume_from_checkpoint True", dict(epochs=2, resume="")),
    ("finetune --gradient_checkpointing --cutoff_len 9", dict(grad_checkpoint=True, context=9)),
    ("lora merge --ckpt a --adapter_name_or_path b --template t --export_dir o", dict(out="o")),
    ("finetune --finetuning_type full --overwrite_output_dir", dict(lora_rank=0)),
    ("prepare_data a.txt --test_size 0.2", dict(source=["a.txt"], val_fraction=0.2)),
])
def test_flags_may_be_called_as_elsewhere(line, values):
    script, *words = line.split()
    parsed = vars(parser_of(script).parse_args(words))
    assert {name: parsed[name] for name in values} == values


@pytest.mark.parametrize("line, said", [
    ("train --lrr 3", "unknown argument --lrr: did you mean --lr?"),
    ("sample --block_siz 3", "unknown argument --block_siz (see --help)"),
    ("train --warmup_ratio 0.03 --seed 3", "counts steps: this ratio of --max_steps"),
    ("finetune --train_batch_size=4", "finetune.py has --batch_tokens, rows times --context"),
    ("finetune --stage pt --use_vllm", "--stage: train.py pretrains, --ckpt MODEL --data TEXT"),
    ("finetune --adapter_name_or_path x", "_path: merge it first (lora.py merge)"),
    ("train --wandb --use_dora", "the curves; --use_dora: the only adapters"),
    ("train --tokenizer gpt2", "--tokenizer: it is a flag of prepare_data.py"),
    ("model --num_layers 2", "--num_layers: --n_layer is a flag of train.py"),
    ("train config/no.py", "config/no.py does not exist; settings are given as flags here"),
    ("train nano.py --max_iters 9", "--grad_accum=40 --d_model=384 --max_steps 9"),
    ("finetune --config lf.yml", ": python finetune.py --dtype=bf16 --ckpt=gpt2 --lora"),
    ("finetune train lf.yml", "--lora_targets=q_proj,v_proj --data=identity,alpaca"),
    ("finetune train hf.json", "--max_steps; --stage: train.py pretrains"),
    ("finetune rows.json", "unknown argument rows.json: did you mean --data?"),
    ("lora merge lf.yml", "): python lora.py merge --ckpt=gpt2"),
    ("finetune --finetuning_type full --lora_rank 8", "full goes without --lora_rank: leave"),
    ("sample run", "unknown argument run: did you mean --ckpt?"),
    ("sample Once upon", "unknown argument Once: did you mean --prompt?"),
    ("lora merge", "the following arguments are required: --ckpt, --adapter, --out"),
])
def test_a_wrong_flag_is_one_line(line, said, capsys):
    Path("nano.py").write_text(CONFIG)
    Path("lf.yml").write_text(YAML)
    Path("hf.json").write_text(JSON)
    Path("rows.json").write_text("{}")
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
    ours = {option for script in SCRIPTS for option in parser_of(script)._option_string_actions}
    words = {part.split("=")[0] for name in FOREIGN.values() for part in re.split("[|+]", name)}
    assert {f"--{word}".replace("--no_", "--no-") for word in words if word} <= ours


BUSY = """
import time
from data.progress import waiting, watched
for _ in watched(range(3), "row"):
    time.sleep(0.6)
with waiting("asking"):
    time.sleep(0.8)
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
