"""Compare our logits of a model with those of transformers, or of a file.

    python tests/check_logits.py Qwen/Qwen3-0.6B
    python tests/check_logits.py gpt2 --against theirs.pt

Exit code 0 if they are equal but for rounding, 1 if not.
"""

import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import Parser, UserError, run_cli
from model import find_checkpoint, load_checkpoint, load_hf, model_from_checkpoint


def recorded_logits(path):
    """(ids (B, T), logits (B, T, V)) from a file that torch.save wrote of {"ids", "logits"}; a
    single row may lack its B."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        ids, logits = torch.as_tensor(content["ids"]), torch.as_tensor(content["logits"])
        assert logits.is_floating_point() and not ids.is_floating_point()
        ids, logits = (t[None] if ids.dim() == 1 else t for t in (ids, logits))
        assert ids.dim() == 2 and ids.shape == logits.shape[:-1] and ids.numel()
    except Exception as e:
        want = 'torch.save of {"ids": (B, T), "logits": (B, T, V)}'
        raise UserError(f"{path} holds no ids and logits: {want}") from e
    return ids.long(), logits


def transformers_logits(folder, ids):
    """The logits that transformers computes from a folder in its layout, if it is installed."""
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"{folder} is neither a file of ids and logits nor a folder with a model")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as e:
        raise UserError("transformers is not installed: name a file by --against") from e
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


def check(name, against=None, ids=None):
    """(a report of how far our logits are from those in the file `against`, or from those that
    transformers computes for that model, by default the same; whether they are equal but for
    rounding)."""
    folder = find_checkpoint(name)
    hub = (folder / "config.json").exists()
    if not hub and against is None:
        raise UserError(f"{name} is no Hugging Face model: name a reference with --against")
    content = load_hf(folder) if hub else load_checkpoint(folder)
    model = model_from_checkpoint(content, where=str(name))
    vocab, length = model.config.vocab_size, min(64, model.config.context)
    if ids is None:  # any ids will do
        ids = torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(0))
    against, theirs = find_checkpoint(against or folder), None
    if against.is_file():
        ids, theirs = recorded_logits(against)
    if ids.numel() == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise UserError(f"the ids must be from 0 to {vocab - 1}")
    with torch.no_grad():
        ours = model(ids)
    theirs = transformers_logits(against, ids) if theirs is None else theirs
    if ours.shape != theirs.shape:
        raise UserError(f"our logits are {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
    error, top1 = (ours.double() - theirs.double()).abs(), ours.argmax(-1) == theirs.argmax(-1)
    same = error.max() <= 1e-3 * max(1.0, float(theirs.abs().max()))
    return [
        f"{ids.numel()} places, {vocab} logits each, in float32:",
        f"largest difference {error.max():.2e}, mean {error.mean():.2e}",
        f"the same best token at {float(top1.double().mean()):.2%} of the places",
        "equal but for rounding" if same else "NOT EQUAL: this is more than rounding",
    ], same


def main(argv=None):
    p = Parser(description="Compare our logits with a reference's.")
    p.add_argument("model", help="a model of the Hub, a folder like one, or a checkpoint")
    p.add_argument("--against", help="a model, for transformers (default: the same), or a file, "
                   "torch.save of {'ids', 'logits'}")
    p.add_argument("--ids", help="token ids, e.g. 464,3290 (default: 64 random ones)")
    args = p.parse_args(argv)
    try:
        ids = args.ids and torch.tensor([[int(i) for i in args.ids.split(",")]])
    except ValueError as e:
        raise UserError(f"--ids {args.ids!r} must be numbers with commas") from e
    lines, same = check(args.model, args.against, ids)
    print("\n".join(lines))
    return 0 if same else 1


if __name__ == "__main__":
    run_cli(main)
