"""What every script's command line does: errors as one line, Ctrl-C, flags.

A user's mistake is a `UserError`: `run_cli` prints its one line and ends with exit code 2.
"""

import argparse
import contextlib
import difflib
import importlib
import json
import math
import os
import re
import shlex
import signal
import sys
from pathlib import Path


class UserError(ValueError):
    """A user's mistake: one line that names the thing, the value and the remedy."""


@contextlib.contextmanager
def user_code(what):
    """Turn whatever a user's own code raises within this context into a UserError."""
    try:
        yield
    except (Exception, SystemExit) as e:
        raise UserError(f"{what} ({type(e).__name__}: {e})") from e


def run_cli(main):
    """Run a script's `main` as a program: a UserError or an OSError becomes one line on stderr and
    exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # printing never fails, whatever the encoding
    if hasattr(sys.stdin, "reconfigure"):  # there may be no stdin, or a stand-in
        sys.stdin.reconfigure(encoding="utf-8")
    script, code = Path(sys.argv[0]).name, 2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts' imports do without
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
        advice = "use smaller batches (a larger --grad_accum), --grad_checkpoint or a smaller model"
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


# What others (nanoGPT, nanochat, minimind, transformers, TRL, LLaMA-Factory, llama.cpp, OpenAI)
# call our flags: OURS: THEIRS or THEIRS=VALUE ... OURS may be the first of several that the script
# has (out|ckpt), set a value, or be several flags (a+b); it is empty if none is needed.
FOREIGN = """
ckpt: model_name_or_path model model_name base_model checkpoint_dir init_from from_weight, adapter:
adapter_name_or_path adapter_path lora_path, resume|: init_from=resume, resume:
resume_from_checkpoint resume_from_checkpoint=true resume=true from_resume=1, export: export_dir,
out|ckpt: out_dir output_dir, out: save_dir, data: dataset dataset_name train_file data_path,
data=shakespeare: dataset=shakespeare_char, data=fineweb-edu: dataset=openwebtext, data=alpaca-zh:
dataset=alpaca_zh_demo, val_data: eval_dataset, val|val_fraction: val_size test_size, max_rows:
max_samples, field: dataset_text_field, tokenizer: tokenizer_name tokenizer_path, context:
block_size max_seq_length max_seq_len cutoff_len seq_len n_ctx max_position_embeddings,
context|max_new_tokens: max_length, n_layer: n_layers depth num_layers num_hidden_layers, n_head:
n_heads num_heads num_attention_heads, n_kv_head: num_kv_heads num_key_value_heads, d_model: n_embd
hidden_size dim, d_ff: intermediate_size moe_intermediate_size, eps: rms_norm_eps, tied:
tie_word_embeddings, experts: num_experts, experts_per_token: num_experts_per_tok,
qkv_bias+out_bias+ff_bias: bias, no_qkv_bias+no_out_bias+no_ff_bias: bias=false, lr: learning_rate,
warmup_steps: warmup_iters lr_warmup_steps num_warmup_steps warmup, schedule: lr_scheduler_type
lr_schedule, schedule=constant+warmup_steps=0: decay_lr=false, schedule=constant:
lr_scheduler_type=constant_with_warmup, schedule=wsd: lr_scheduler_type=warmup_stable_decay,
optimizer: optim, optimizer=adamw: optim=adamw_torch, beta1: adam_beta1, beta2: adam_beta2,
grad_clip: max_grad_norm, max_steps: max_iters max_train_steps num_iterations steps, epochs:
num_train_epochs num_epochs max_epochs, batch_size: per_device_train_batch_size micro_batch_size
device_batch_size train_batch_size, total_batch_tokens: total_batch_size, grad_accum:
gradient_accumulation_steps accumulation_steps, eval_every: eval_interval eval_steps, save_every:
save_interval save_steps, log_every: log_interval logging_steps, patience: early_stopping_patience,
best_by: metric_for_best_model, best_by=val_loss: metric_for_best_model=eval_loss, grad_checkpoint:
gradient_checkpointing, compile: torch_compile, shard: fsdp, device=cpu: use_cpu no_cuda, dtype:
torch_dtype, dtype=fp16: fp16 half dtype=float16 torch_dtype=float16, dtype=bf16: bf16
dtype=bfloat16 torch_dtype=bfloat16, dtype=fp32: dtype=float32 torch_dtype=float32, quantize=nf4:
load_in_4bit quantization_bit=4, quantize=int8|dtype=int8: load_in_8bit quantization_bit=8,
lora_rank=8: finetuning_type=lora, lora_rank=0: finetuning_type=full, lora_rank=16: use_peft,
lora_rank: lora_r, lora_targets: target_modules lora_target lora_target_modules, lora_targets=all:
target_modules=all-linear lora_target_modules=all-linear, objective=sft: stage=sft, objective=dpo:
stage=dpo, objective=reward: stage=rm, dpo_beta: pref_beta beta, reward: reward_funcs, samples:
num_generations, prompt: start, max_new_tokens: max_tokens max_completion_tokens n_predict,
num_samples: num_return_sequences n, beams: num_beams, temperature=0: do_sample=false, temperature:
temp, repetition_penalty: repeat_penalty, stop: stop_strings, system: system_prompt, serve: port,
chat: interactive, no_compile|: compile=false, : init_from=scratch from_weight=none from_resume=0
decay_lr report_to=none do_sample do_train do_eval overwrite_output_dir overwrite_cache plot_loss
template always_save_checkpoint save_total_limit save_strategy save_only_model eval_strategy
evaluation_strategy logging_strategy logging_first_step load_best_model_at_end greater_is_better
per_device_eval_batch_size num_workers preprocessing_num_workers dataloader_num_workers disable_tqdm
ddp_timeout local_rank trust_remote_code remove_unused_columns low_cpu_mem_usage flash_attn tf32
backend attn_implementation group_by_length assistant_only_loss quantization_method
bnb_4bit_quant_type device_map eval_iters lr_decay_iters completion_only_loss save_safetensors
"""
FOREIGN = [group.split(":") for group in FOREIGN.split(",")]
FOREIGN = {flag: ours.strip() for ours, theirs in FOREIGN for flag in theirs.split()}

# What to use in place of their flags that have no name here: {sentence: flags}.
ADVICE = {
    "out/NAME/metrics.jsonl and loss.svg record a run, and sample.py --serve shows the curves":
        "report_to wandb_log wandb_project wandb_run_name wandb use_wandb use_swanlab logging_dir",
    "--out out/NAME names a run": "run_name exp_name",
    "--warmup_steps counts steps: this ratio of --max_steps": "warmup_ratio",
    "runs are never overwritten: delete the folder or name another": "overwrite_output_dir",
    "the schedule ends with the run, --max_steps or --max_minutes": "lr_decay_iters",
    "train.py has --max_steps and --max_minutes, finetune.py also --epochs":
        "epochs num_train_epochs num_epochs max_epochs",
    "train.py has --batch_size in rows; finetune.py has --batch_tokens, rows times --context":
        "batch_size per_device_train_batch_size micro_batch_size train_batch_size",
    "an evaluation of train.py reads --eval_tokens, one of finetune.py --eval_rows": "eval_iters",
    "train.py has --total_batch_tokens, finetune.py --grad_accum": "global_batch_size",
    "--lora_rank 8 trains adapters; without it all weights learn": "finetuning_type",
    "--objective dpo, reward and grpo learn from preferences; train.py pretrains": "stage",
    "train.py pretrains, --ckpt MODEL --data TEXT": "stage=pt",
    "single ratings (KTO) cannot be learned from; --objective dpo learns from pairs": "stage=kto",
    "--objective grpo --reward MODEL takes the place of PPO": "stage=ppo",
    "merge it first (lora.py merge), or --resume it": "adapter adapter_name_or_path lora_path",
    "the reference is --ckpt as it was before training": "ref_model ref_model_name_or_path",
    "--objective dpo has the sigmoid loss": "pref_loss loss_type",
    "it is half of --context, at most 160 tokens": "max_completion_length",
    "sample.py's own engine generates the answers": "use_vllm vllm_mode infer_backend",
    "--dropout and --token_dropout regularise": "neftune_noise_alpha label_smoothing_factor",
    "only the assistant's turns are learned": "train_on_prompt train_on_inputs mask_history",
    "--max_rows limits what is read": "streaming",
    "the only adapters are LoRA's, --lora_rank": "use_dora use_rslora pissa_init use_galore",
    "rows are not packed but batched with others of their length": "packing neat_packing",
    "torchrun --nproc_per_node N starts N processes, and --shard splits the model over them":
        "devices num_gpus num_nodes tensor_parallel_size deepspeed fsdp_config",
    "model.py --export writes a folder for transformers": "push_to_hub hub_model_id export_dir",
    "--data takes the path of the file": "dataset_dir data_dir",
    "the environment variable HF_TOKEN holds the token": "hf_token hub_token hf_hub_token",
}  # fmt: skip
ADVICE = {flag: use for use, theirs in ADVICE.items() for flag in theirs.split()}
SCRIPTS = ("train", "finetune", "sample", "prepare_data", "model", "lora", "mnist")
YES, NO = ("true", "1", "yes"), ("false", "0", "no", "none")


def plain(flag):
    """The name of a flag."""
    return flag[2:].replace("-", "_")


def read_settings(path):
    """[(name, value)] of another project's configuration in Python, YAML or JSON, as texts; none if
    a file of JSON is not one mapping."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if path.suffix == ".json":
        with contextlib.suppress(TypeError, ValueError):
            text = "\n".join(f"{name}: {value}" for name, value in dict(json.loads(text)).items())
    text = re.sub(r"\s*\n\s*- +", ",", text)  # YAML: the items of a list
    text = re.sub(r"(\d+) \* (\d+)", lambda m: str(int(m[1]) * int(m[2])), text)  # nanoGPT's batch
    found = re.findall(r"^\s*([\w.]+)\s*[=:][ \t]*([^#\n]*[^#\n\s])", text, re.M)
    pairs = [(name, re.sub(r"[\[\]\"']|(?<=,) ", "", v).strip(",")) for name, v in found]
    return [(name, value) for name, value in pairs if value not in ("null", "None")]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, whose flags may also be called as in FOREIGN."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def translate(self, flag, value):
        """(our words for a flag, or None if there are none; whether they include its value)."""
        names = {o.lstrip("-").replace("-", "_"): o for o in self._option_string_actions}
        name, value = plain(flag), value.lower()
        exact = f"{name}={value}" in FOREIGN
        ours = FOREIGN[f"{name}={value}"] if exact else name if name in names else FOREIGN.get(name)
        for choice in [] if ours is None else ours.split("|"):
            parts = [part.partition("=") for part in choice.split("+") if part]
            if all(part[0] in names for part in parts):
                break
        else:  # a flag that this script lacks can still be left out
            return ([], True) if value in NO and name in ADVICE else (None, False)
        words = [names[own] + equals + setting for own, equals, setting in parts]
        if exact or not words:
            return words, True
        if "=" not in words[0] and self._option_string_actions[words[0]].nargs != 0:
            return words, False  # renamed; the value stays
        if value in NO:
            no = words[0].replace("--", "--no-")
            words = [no] if no in self._option_string_actions else []
        return words, value in YES + NO

    def our_words(self, words):
        """(`words` in this parser's flags, the flags that are not needed). What a foreign flag sets
        comes first, so that a value which is given wins."""
        words, settings, ours, unneeded = list(words), [], [], []
        while words:
            flag, equals, value = (word := words.pop(0)).partition("=")
            apart = not equals and words and not words[0].startswith("--")
            value = words[0] if apart else value
            new, whole = self.translate(flag, value) if flag.startswith("--") else (None, False)
            if flag == "--start" and new:
                new, whole = ["--prompt=" + re.sub("^FILE:", "@", value)], True
            while new == ["--lora_targets"] and words[1:] and not words[1].startswith("--"):
                words[:2] = [f"{words[0]},{words[1]}"]  # peft's are a list
            if new is None:
                ours.append(word)
            elif not new:
                unneeded.append(flag)
            elif "=" in new[0]:
                settings += new
            else:
                ours += [*new[:-1], new[-1] + ("" if whole or apart else equals + value)]
            del words[: bool(whole and apart)]
        if "--lora_rank=0" in settings and any(w.startswith("--lora_rank") for w in ours):
            self.error("--finetuning_type full goes without --lora_rank: leave out one of them")
        return settings + ours, unneeded

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse, after `our_words` has translated the flags of other projects."""
        words = sys.argv[1:] if args is None else args
        sources = any(not p.choices for p in self._get_positional_actions())
        for i, word in enumerate([] if sources else words[:2]):
            if i == 0 or words[0] == "--config" or words[0][:1] != "-":  # merge, train
                is_json = word.endswith(".json") and read_settings(Path(word))
                if is_json or re.search(r"^[^-].*\.(py|ya?ml)$", word):
                    self.error(self.config_hint(Path(word), words[:i], words[i + 1 :]))
        words, unneeded = self.our_words(words)
        args, unknown = super().parse_known_args(words, namespace)
        if unneeded and not unknown:
            notes = (f"{f} ({ADVICE[plain(f)]})" if plain(f) in ADVICE else f for f in unneeded)
            print(f"[not needed here: {', '.join(notes)}]", file=sys.stderr)
        return args, unknown

    def config_hint(self, path, before, after):
        """The command that sets what another project's configuration file sets, and the words that
        stand `after` it; a command such as merge may stand `before` it."""
        message = "settings are given as flags here, not in files"
        if not path.is_file():
            return f"{path} does not exist; {message}"
        words = [f"--{name}={value}" for name, value in read_settings(path)]
        ours, others = [], []
        for word in self.our_words([*words, *after])[0]:
            flag, _, value = word.partition("=")
            known = word[:2] != "--" or flag in self._option_string_actions
            (ours if known else others).append(word if known else self.hint(flag, value))
        without = f" (without {'; '.join(others)})" if others else ""
        choices = [p.choices for p in self._get_positional_actions()]
        commands = [before[0] if before and before[0] in names else names[0] for names in choices]
        command = shlex.join(["python", self.prog, *commands, *ours])
        return f"{path}: {message}{without}: {command}"

    def error(self, message):
        """Print one line, with what to write for unknown flags, and exit with code 2."""
        if message.startswith("unrecognized arguments: "):
            flags = re.findall(r"(?<!\S)(--[^\s=]+)[\s=]?((?!--)\S*)", message)
            message = "; ".join(self.hint(*f) for f in flags or [message.split()[2:3]])
        message = re.sub(r"^argument (\S+): (\S+ must be)", r"\1 \2", message)
        self.exit(2, f"{self.prog}: {message}\n" if first_process() else None)

    def hint(self, flag, value=""):
        """What to write for an unknown flag, or for a word that is none."""
        name = plain(flag) if flag.startswith("--") else ""
        if advice := ADVICE.get(f"{name}={value.lower()}", ADVICE.get(name)):
            return f"{flag}: {advice}"
        ours = "--" + re.split("[|+=]", FOREIGN.get(name, name))[0]
        with contextlib.suppress(ImportError):  # only now: this module knows no script
            parsers = {s: importlib.import_module(s).build_parser() for s in SCRIPTS}
            if having := [s for s, p in parsers.items() if ours in p._option_string_actions]:
                it = "it" if ours[2:] == name else ours
                scripts = ", ".join(f"{script}.py" for script in having)
                return f"unknown argument {flag}: {it} is a flag of {scripts}"
        known = {option[2:]: option for option in self._option_string_actions}
        known |= {them: new[0] for them in FOREIGN if (new := self.translate(f"--{them}", "")[0])}
        alike = [k for k in known if abs(len(k) - len(name)) < 3]
        near = difflib.get_close_matches(name, alike, 1, cutoff=0.85 if len(name) > 4 else 0.8)
        if not flag.startswith("-"):
            run = flag.endswith(".pt") or any(Path(flag).glob("*.pt"))
            near = [n for n in (("ckpt",) if run else ("prompt", "data")) if n in known]
        what = f": did you mean {known[near[0]]}?" if near else " (see --help)"
        return f"unknown argument {flag}{what}"


def number(kind, wanted, accepts):
    """An argparse type: a number of class `kind` that `accepts` allows, described by `wanted`."""

    def parse(text):
        value = float(text) if kind is int and "e" in text.lower() else kind(text)  # as 9e9
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return kind(value)

    parse.__name__ = kind.__name__  # argparse's own error names it: invalid int value
    return parse


def at_least(low, kind=int):
    """An argparse type: a finite number not below `low`."""
    return number(kind, f"at least {low}", lambda v: low <= v <= 2**62)


def between(low, high, kind=float):
    """An argparse type: a number from `low` to `high`, both included."""
    return number(kind, f"from {low} to {high}", lambda v: low <= v <= high)


positive = number(float, "above 0 and finite", lambda v: 0 < v < math.inf)
share = between(0, 1)


class StopSignal:
    """Ctrl-C and SIGTERM, remembered until the step is done; a second one stops at once."""

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
                print("\nfinishing the step, then saving; Ctrl-C again stops now", file=sys.stderr)
        self.number = number
        self.__exit__()

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def printable(text):
    """`text` with control characters other than tab and newline as \\x1b: printed as they are they
    could clear the terminal, or worse."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)
