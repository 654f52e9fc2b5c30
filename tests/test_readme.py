"""Every command of the READMEs runs, in their order, at toy size; both languages show the same."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import urllib.request

import pytest
from conftest import ROOT, serve_folder
from conftest import SHARED as REAL
from test_hf_commands import QWEN_TOKENS, SMALL, save_model

from data.sources import CROSSWOZ, LAB, REVIEWS, SOURCES

# appended to a command of each script: argparse takes the last value of a flag
SHORT = "--batch_size 2 --grad_accum 1 --max_steps 3 --eval_every 2 --eval_tokens 64 --log_every 1"
TUNE = "--max_steps 2 --eval_every 2 --eval_rows 2 --batch_tokens 256 --log_every 1"
TOY = {
    "train.py": f"--n_layer 1 --n_head 2 --d_model 32 --context 16 {SHORT}",
    "--ckpt gpt2 --data": f"--context 16 {SHORT}",
    "--resume": "--max_steps 4",
    "sample.py": "--max_new_tokens 5",
    "mnist.py": "--data toy --epochs 1",
    "--diffusion": "--data toy --epochs 1 --steps 2",
    "--draw": "--steps 2",
    "--judge": "--steps 2",
    "--augment": f"{TUNE} --max_rows 20",
    "finetune.py": TUNE,
}


def commands(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    parts = re.findall(r"```bash\n.*?```|^\| [^\n]*", text, re.S | re.M)  # blocks, rows of tables
    found = (re.findall(r"`((?:python \w|torchrun --)[^`]*)`|^([^`|].*)", p, re.M) for p in parts)
    return [a or b for pairs in found for a, b in pairs]


def test_both_languages_show_the_same_commands():
    def plain(lines):  # a prompt may be in the reader's language
        return [re.sub(r'--prompt "[^"]*"', "--prompt", line) for line in lines]

    assert plain(commands("README.md")) == plain(commands("README.zh-CN.md"))
    assert len(commands("README.md")) > 15


def test_the_scripts_know_every_flag_of_the_readme():
    for line in commands("README.md"):
        if script := re.search(r"(?<![/\w])(\w+)\.py\b(.*)", line):
            parser = importlib.import_module(script[1]).build_parser()
            parser.parse_args(shlex.split(script[2]))  # a wrong one ends in SystemExit


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """The public hosts' files under their paths, on this machine."""
    if not (REAL / "sales_textbook.txt").exists():
        pytest.skip(f"needs the real texts in {REAL} (or SCRATCHLM_DATA)")
    folder = tmp_path_factory.mktemp("mirror")
    files = {"sales": "sales_textbook.txt", "shakespeare": "tinyshakespeare.txt"}
    for name, file in (files | {"dpo-zh": "instruct/dpo_zh_demo.json"}).items():
        path = folder / SOURCES[name].fetch.keywords["train"].split("://")[1]
        path.parent.mkdir(parents=True)
        path.symlink_to(REAL / file)
    if (REAL / "hotel").exists():
        lab = folder / LAB.split("://")[1]
        lab.mkdir(parents=True)
        for split, source in (("train", "train"), ("dev", "dev"), ("test", "dev")):
            write_hotel_rows(REAL / "hotel" / f"{source}.jsonl", lab / f"{split}.full.jsonl")
        crosswoz = folder / CROSSWOZ.split("://")[1]
        crosswoz.mkdir(parents=True)
        (crosswoz / "hotel_db.json").symlink_to(REAL / "hotel" / "hotel_db.json")
        reviews = folder / REVIEWS.split("://")[1]
        reviews.parent.mkdir(parents=True)
        with tarfile.open(reviews, "w:gz") as archive:
            archive.add(REAL / "rotten_tomatoes", "rt-polaritydata")
    save_hub(folder / "huggingface.co")
    with serve_folder(folder) as url:
        yield url


def save_hub(folder):
    """Tiny models under the names of the READMEs' large ones, and the rows that tune them."""
    import transformers

    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32)
    save_model(folder / "openai-community/gpt2/resolve/main", gpt2, QWEN_TOKENS[:1])
    shape = SMALL | dict(head_dim=8, max_position_embeddings=256, tie_word_embeddings=True)
    qwen = transformers.Qwen3Config(**shape)
    for size in ("0.6B", "8B"):
        save_model(folder / f"Qwen/Qwen3-{size}/resolve/main", qwen, QWEN_TOKENS)
    bert = folder / "google-bert/bert-base-chinese/resolve/main"
    vocab = ["[PAD]", *dict.fromkeys("皇后女人男王骑士国巴黎法中北京上海南")]
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.BertConfig(vocab_size=len(vocab), **size)
    transformers.BertModel(config).save_pretrained(bert)
    (bert / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    stories = folder / "datasets/roneneldan/TinyStories/resolve/main"
    stories.mkdir(parents=True)
    for split in ("train", "valid"):
        text = "".join(f"Once upon a time {n}.\n<|endoftext|>\n" for n in range(200))
        (stories / f"TinyStoriesV2-GPT4-{split}.txt").write_text(text, encoding="utf-8")
    rows = folder / "datasets/shibing624/alpaca-zh/resolve/main/alpaca_gpt4_data_zh.json"
    rows.parent.mkdir(parents=True)
    rows.symlink_to(REAL / "instruct" / "alpaca_zh_demo.json")


def write_hotel_rows(dialogues, path):
    """The first 60 dialogues as the public file has them: a row of context and response for each
    turn that is the assistant's."""
    talks = map(json.loads, dialogues.read_text(encoding="utf-8").splitlines()[:60])
    rows = [{"context": json.dumps(talk[:i]), "response": json.dumps(turn)} for talk in talks
            for i, turn in enumerate(talk) if turn["role"] in ("search", "assistant")]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def toy(line):
    """The command at toy size, run from any folder; None for what is not ours to run here."""
    if line.startswith(("pip ", "pytest", "lm_eval")):
        return None
    script = re.search(r"[\w/]+\.py", line)[0]
    flag = next((f for f in TOY if not f.endswith(".py") and f in line), script)
    extra = TOY[flag] if script in TOY else ""
    line = re.sub(r"--(max_minutes|rows) \S+", "", line)  # the toy is limited by its flags
    line = line.replace(script, shlex.quote(str(ROOT / script)))
    processes = r"(--nnodes 2 )?--nproc_per_node 8( .* HOST:29500)?"
    line = re.sub(processes, "--nproc_per_node 2", line)
    line = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
    return re.sub(r"(?<![/\w])python ", f"{sys.executable} ", line) + " " + extra


def check_server(command, common):
    """A server answers, and ends when it is asked to."""
    shell = ["bash", "-c", "exec " + re.sub(r"--serve( \d+)?", "--serve 0", command)]
    with subprocess.Popen(shell, **common, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(url + "page/info") as answer:
            assert json.load(answer)["kind"] in ("chat", "base", "classifier")
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM


# Runs scripts in forks of one process, since importing torch takes longer than most of them.
FORKS = """
import json, os, runpy, signal, sys
import numpy, requests, tiktoken, torch._dynamo
for line in sys.stdin:
    sys.argv, log = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    signal.alarm(120)
    sys.stdin, output = open(os.devnull), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_every_command_of_the_readme_runs(mirror, tmp_path):
    words = ["我们", "学习", "a", "model", "from", "scratch", "。", "\n"]
    (tmp_path / "my_novel.txt").write_text(" ".join(words * 400), encoding="utf-8")
    vocabularies = {"TIKTOKEN_CACHE_DIR": str(REAL / "tiktoken")}
    env = {**os.environ, "SCRATCHLM_MIRROR": mirror, "OMP_NUM_THREADS": "1", **vocabularies}
    log, pipe = tmp_path / "log.txt", subprocess.PIPE
    common, forked = dict(cwd=tmp_path, env=env), [sys.executable, "-c", FORKS]
    with subprocess.Popen(forked, **common, stdin=pipe, stdout=pipe, text=True) as forks:
        toys = {toy(line): line for line in commands("README.md")}  # some differ only in size
        for command, line in toys.items():
            if command is None:
                continue
            if "--serve" in line:
                check_server(command, common)
                continue
            if "|" in line or "torchrun" in line:
                with open(log, "w", encoding="utf-8") as file:
                    streams = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=file)
                    shell = ["bash", "-c", command]
                    code = subprocess.run(shell, **common, **streams, timeout=120).returncode
            else:
                argv = shlex.split(command)[1:]
                print(json.dumps([argv, str(log)]), file=forks.stdin, flush=True)
                code = int(forks.stdout.readline())
            output = log.read_text(encoding="utf-8")
            assert code == 0 and "Traceback" not in output, f"{line}\n{output}"
