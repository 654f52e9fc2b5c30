"""What every script's command line does: errors as one line, Ctrl-C, flags.

A user's mistake is a `UserError`: `run_cli` prints its one line and ends with exit code 2.
"""

import argparse
import contextlib
import difflib
import importlib
import math
import os
import re
import shlex
import signal
import struct
import sys
from pathlib import Path


class UserError(ValueError):
    """A user's mistake: one line that names the thing, the value and the remedy."""


# Exceptions that reading malformed content raises
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError,
             struct.error)  # fmt: skip


@contextlib.contextmanager
def explained(what, *kinds):
    """Turn an exception of one of these `kinds` (default: MALFORMED) into a UserError: `what`."""
    kinds = kinds or MALFORMED
    try:
        yield
    except UserError:
        raise
    except kinds as e:
        raise UserError(f"{what} ({type(e).__name__}: {' '.join(str(e).split())})") from e


def user_code(what):
    """`explained`, for whatever a user's own code raises."""
    return explained(what, Exception, SystemExit)


def run_cli(main):
    """Run a script's `main` as a program: a UserError or an OSError becomes one line on stderr and
    exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # printing never fails, whatever the encoding
    if hasattr(sys.stdin, "reconfigure"):  # there may be no stdin, or a stand-in
        sys.stdin.reconfigure(encoding="utf-8")
    script, code = Path(sys.argv[0]).name, 2
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # closed by `| head`; keep the interpreter from flushing again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (UserError, OSError) as e:
        name = getattr(e, "filename", None)
        print(f"{script}: {f'{name}: {e.strerror}' if name else e}", file=sys.stderr)
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        advice = "use smaller batches, --grad_checkpoint in training, or a smaller model"
        print(f"{script}: out of memory: {advice}", file=sys.stderr)
    except KeyboardInterrupt as e:
        print(f"\n{script}: {e.args[0] if e.args else 'interrupted'}", file=sys.stderr)
        code = 130
    raise SystemExit(code)


def first_process():
    """Whether this process is the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_out_of_memory(error):
    """Whether torch had too little memory: on a CPU it raises a mere RuntimeError."""
    return any(words in str(error) for words in ("allocate memory", "out of memory"))


# What nanoGPT, transformers and LLaMA-Factory call our flags, {ours or a sentence: theirs}
FOREIGN = {
    "--ckpt": "model_name_or_path model_name base_model",
    "--data": "dataset dataset_name dataset_dir train_file",
    "--max_rows": "max_samples",
    "--context": "block_size max_seq_length max_seq_len cutoff_len",
    "--n_layer": "n_layers num_layers num_hidden_layers",
    "--n_head": "n_heads num_heads num_attention_heads",
    "--d_model": "n_embd hidden_size dim",
    "--lr": "learning_rate",
    "--warmup_steps": "warmup_iters num_warmup_steps",
    "--schedule": "lr_scheduler_type",
    "--optimizer": "optim",
    "--grad_clip": "max_grad_norm",
    "--max_steps": "max_iters max_train_steps num_iterations",
    "--total_batch_tokens": "total_batch_size",
    "--grad_accum": "gradient_accumulation_steps accumulation_steps",
    "--eval_every": "eval_interval eval_steps",
    "--save_every": "save_interval save_steps",
    "--log_every": "log_interval logging_steps",
    "--patience": "early_stopping_patience",
    "--grad_checkpoint": "gradient_checkpointing",
    "--dtype": "torch_dtype",
    "--dtype fp16": "fp16 half",
    "--dtype bf16": "bf16",
    "--quantize nf4": "load_in_4bit",
    "--lora_rank": "lora_r",
    "--samples": "num_generations",
    "--temperature": "temp",
    "--lora_targets": "target_modules lora_target lora_target_modules",
    "--prompt": "start",
    "--max_new_tokens": "max_tokens n_predict",
    "--num_samples": "num_return_sequences n",
    "--beams": "num_beams",
    "--serve": "port",
    "--resume": "resume_from_checkpoint",
    "--export": "export_dir push_to_hub",
    "--ckpt NAME starts from a model, --resume RUN continues a run": "init_from",
    "--out names the folder of a run; sample.py takes it as --ckpt": "out_dir output_dir run_name",
    "out/NAME/metrics.jsonl and loss.svg record a run, and sample.py --serve shows the curves":
        "report_to wandb wandb_log wandb_project wandb_run_name use_swanlab logging_dir",
    "finetune.py has --val, prepare_data.py --val_fraction": "val_size test_size",
    "--context limits a row, sample.py --max_new_tokens an answer": "max_length",
    "--qkv_bias, --out_bias and --ff_bias, or --no-qkv_bias and so on": "bias",
    "--warmup_steps counts steps: this ratio of --max_steps": "warmup_ratio",
    "--dpo_beta is DPO's, --kl is GRPO's": "beta pref_beta",
    "answers have half of --context, at most 160 tokens, and prompts are cut to the rest":
        "max_completion_length max_prompt_length",
    "the schedule ends with the run, --max_steps or --max_minutes": "lr_decay_iters",
    "--schedule constant --warmup_steps 0 keeps the rate": "decay_lr",
    "train.py has --max_steps and --max_minutes, finetune.py also --epochs":
        "epochs num_epochs num_train_epochs",
    "train.py has --batch_size in rows; finetune.py has --batch_tokens, rows times --context":
        "batch_size per_device_train_batch_size micro_batch_size",
    "an evaluation of train.py reads --eval_tokens, one of finetune.py --eval_rows": "eval_iters",
    "finetune.py has --quantize int8, sample.py --dtype int8": "load_in_8bit quantization_bit",
    "--lora_rank 8 trains adapters; without it all weights learn": "finetuning_type use_peft",
    "merge it first (lora.py merge), or --resume it": "adapter adapter_name_or_path",
    "--objective is sft, dpo, reward or grpo; train.py --ckpt MODEL pretrains": "stage",
    "rows are not packed but batched with others of their length": "packing",
    "torchrun --nproc_per_node N starts N processes, and --shard splits the model over them":
        "devices num_gpus deepspeed fsdp",
    "--temperature 0 takes the likeliest token, otherwise it is drawn": "do_sample",
    "leave it out, it is not needed here":
        "do_train do_eval template plot_loss overwrite_cache overwrite_output_dir eval_strategy "
        "save_strategy save_total_limit always_save_checkpoint load_best_model_at_end backend "
        "per_device_eval_batch_size preprocessing_num_workers trust_remote_code ddp_timeout "
        "flash_attn",
}  # fmt: skip
OURS = {f"--{name}": use for use, names in FOREIGN.items() for name in names.split()}
# FILE, --config FILE or SCRIPT FILE
CONFIG_FILE = re.compile(r"(?:--config[ =]|[^-]\S* )?([^-]\S*\.(?:py|ya?ml|json))(?!\S)")
SETTING = re.compile(r'(?:^|[{,])\s*"?(\w+)"?\s*[=:]', re.MULTILINE)  # of Python, YAML, JSON
SCRIPTS = ("train", "finetune", "sample", "prepare_data", "model", "lora", "mnist")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, which says what others' flags are called here."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args=None, namespace=None):
        """As in argparse, but one line says what to write in place of what is unknown."""
        args, unknown = self.parse_known_args(args, namespace)
        if file := CONFIG_FILE.match(" ".join(unknown)):
            self.refuse_file(Path(file[1]))
        if unknown:
            flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
            self.error(self.explain(flags or unknown[:1]))
        for name in ("ckpt", "data", "out", "name", "source"):  # perhaps of an empty variable
            value = getattr(args, name, None)
            if "" in (value if isinstance(value, (list, tuple)) else [value]):
                self.error(f"{name} is empty: name one, or leave it out")
        return args

    def refuse_file(self, path):
        """Exit with our names for the settings in a file, unless it is JSON without settings."""
        if not path.is_file():
            self.error(f"{path} does not exist; settings are given as flags here, not in files")
        text = path.read_text(encoding="utf-8", errors="replace")
        names = [] if text.lstrip().startswith("[") else SETTING.findall(text)
        flags = [f"--{name}" for name in names if f"--{name}" not in self._option_string_actions]
        if names or path.suffix != ".json":
            said = self.explain(flags) or "see --help"
            self.error(f"{path}: settings are given as flags here, not in files: {said}")

    def error(self, message):
        """Print one line, and exit with code 2."""
        message = re.sub(r"^argument (\S+): (\S+ must be)", r"\1 \2", message)
        ignored = r"^argument (\S+)/(\S+): ignored explicit argument .*"  # --compile=False
        message = re.sub(ignored, r"\1 takes no value: write \1 or \2", message)
        self.exit(2, f"{self.prog}: {message}\n" if first_process() else None)

    def explain(self, words):
        """What to write in place of words that this script does not know."""
        hints = {}
        for word in dict.fromkeys(words):
            hints.setdefault(self.hint(word), []).append(word)
        return "; ".join(", ".join(words) + hint for hint, words in hints.items())

    def hint(self, word):
        """The rest of a line that begins with an unknown flag, or with a word that is no flag."""
        known = self._option_string_actions
        if word.startswith("--"):
            name = "--" + word[2:].replace("-", "_")
            use = OURS.get(name, name)
            ours, is_sentence = use.split()[0], use.count(" ") > 1
            if is_sentence or ours in known:
                return f": {use}" if is_sentence else f" is {use} here"
            parsers = {s: importlib.import_module(s).build_parser() for s in SCRIPTS}
            scripts = [f"{s}.py" for s, p in parsers.items() if ours in p._option_string_actions]
            if scripts:
                is_ours = "" if use == name else f" {use},"
                return f" is{is_ours} a flag of {', '.join(scripts)}"
            near = difflib.get_close_matches(name, known, 1, 0.85)
        elif word.lower() in ("true", "false"):
            off = any(flag.startswith("--no-") for flag in known)
            return f": a switch takes no value, {'--no-NAME turns it off' * off or 'leave it out'}"
        else:
            run = word.endswith(".pt") or any(Path(word).glob("*.pt"))
            near = [f for f in (("--ckpt",) if run else ("--prompt", "--data")) if f in known]
        return " is unknown" + (f": did you mean {near[0]}?" if near else " (see --help)")


def number(kind, wanted, accepts):
    """An argparse type: a number of class `kind` that `accepts` allows, described by `wanted`."""

    def parse(text):
        value = float(text) if kind is int and "e" in text.lower() else kind(text)  # as 9e9
        if not accepts(value) or value != kind(value):
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return kind(value)

    parse.__name__ = kind.__name__  # argparse's own error names it: invalid int value
    return parse


def at_least(low, kind=int):
    """An argparse type: a finite number not below `low`; integers are at most 2**62."""
    wanted, high = f"at least {low}", 2**62
    if kind is float:
        wanted, high = f"{wanted} and finite", sys.float_info.max
    return number(kind, wanted, lambda v: low <= v <= high)


def between(low, high, kind=float):
    """An argparse type: a number from `low` to `high`, both included."""
    return number(kind, f"from {low} to {high}", lambda v: low <= v <= high)


positive = number(float, "above 0 and finite", lambda v: 0 < v < math.inf)
share = between(0, 1)


class StopSignal:
    """Remembers Ctrl-C or SIGTERM so that a step can end first; a second one stops at once. `words`
    are printed after the first Ctrl-C."""

    def __init__(self, words="finishing the step, then saving"):
        self.words = words

    def __enter__(self):
        self.number, self.old = 0, {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for s in (signal.SIGINT, signal.SIGTERM):
                self.old[s] = signal.signal(s, self.handle)
        return self

    def handle(self, number, frame):
        """Remember the signal, and give the next one its usual effect."""
        if number == signal.SIGINT and first_process():
            with contextlib.suppress(RuntimeError):  # this thread may just be printing
                print(f"\n{self.words}; Ctrl-C again stops now", file=sys.stderr)
        self.number = number
        self.restore()

    def restore(self):
        """Give signals the effect again that they had before."""
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def __exit__(self, *_):
        self.restore()


def quoted(path):
    """`path` as a word of a command that a user may copy into a shell."""
    return shlex.quote(str(path))


def printable(text):
    """`text` with control characters other than tab and newline escaped, such as \\x1b, since they
    could clear the terminal, or worse."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)
