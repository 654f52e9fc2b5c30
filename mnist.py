"""A first training loop: one network learns to read handwritten digits, another to draw them.

    python mnist.py                                the course's network, five epochs
    python mnist.py --optimizer adam --epochs 15   another optimizer, or --loss, --schedule
    python mnist.py --compare optimizer            all of them, their curves in one picture
    python mnist.py --recipe fast                  a convolutional network: 99.4 % in a minute
    python mnist.py --diffusion                    learn to draw, in half an hour
    python mnist.py --draw "3 1 4"                 a picture of these digits

A run writes mnist.pt, loss.svg and pictures to out/mnist, out/mnist-fast or out/mnist-diffusion (a
second run to out/mnist-2, and so on). "The course" is waylandzhang/Transformer-from-scratch.

The first three chapters hold the data, the network and the training loop. Then come a report, a
better network, a transformer that turns noise into digits, and the command line. Nothing here is a
language model: from model.py come only the checkpoints and, for drawing, the transformer's blocks.

Shapes in comments: B batch, T patches of an image, C channels.
"""

import argparse
import math
import re
import time
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import model as lm
from data.cli import Parser, StopSignal, UserError, at_least, between, positive, quoted, run_cli
from data.files import write_json
from data.idx import FILES, download_idx, read_folder_idx
from data.machine import choose_device, random_state, set_random_state
from data.plot import line_svg, png, sheet, write_png
from data.runs import OUT, Log, new_run

# --------------------------------------------------------------------------------------------
# The data: 60,000 training images and 10,000 test images
# --------------------------------------------------------------------------------------------

MEAN, STD = 0.1307, 0.3081  # mean and standard deviation of the training pixels, in [0, 1]


def load_mnist(device="cpu", folder=None):
    """Return ((images, labels), (test images, test labels)) on `device`: images (N, 28, 28) float,
    normalised by MNIST's training mean and standard deviation, and labels (N,) int64. Reads from
    `folder` or downloads. All are converted at once (220 MB), so indexing them gives a batch."""
    read = partial(read_folder_idx, folder) if folder else download_idx

    def tensors(x, y):
        if x.shape != (len(y), 28, 28) or len(y) == 0 or y.max() > 9:
            raise UserError(
                f"found {len(y):,} labels up to {max(y, default=0)} and images of shape "
                f"{x.shape}; needed are N labels from 0 to 9 and N images of 28 x 28"
            )
        x = torch.tensor(x, dtype=torch.float32, device=device)
        return x.div_(255).sub_(MEAN).div_(STD), torch.tensor(y, dtype=torch.int64, device=device)

    images, labels, test_images, test_labels = (read(name) for name in FILES)
    return tensors(images, labels), tensors(test_images, test_labels)


# --------------------------------------------------------------------------------------------
# The network: from 784 pixels to ten log probabilities
# --------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """A multilayer perceptron, 784-256-128-64-10, with ReLU and dropout between its layers."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(256, 128), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(128, 64), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, images):  # (B, 28, 28) -> (B, 10)
        return F.log_softmax(self.layers(images.flatten(1)), dim=-1)


# Losses: each takes log probabilities (B, 10) and labels (B,), and returns a mean, a scalar.
LOSSES = {
    "nll": F.nll_loss,  # cross-entropy, since the network ends with log_softmax
    "mse": lambda log_p, labels: F.mse_loss(log_p.exp(), F.one_hot(labels, 10).float()),
    "euclidean": lambda log_p, labels: (log_p.exp() - F.one_hot(labels, 10)).norm(dim=-1).mean(),
    "cosine": lambda log_p, labels: F.cosine_embedding_loss(
        log_p.exp(), F.one_hot(labels, 10).float(), torch.ones_like(labels)
    ),
}

# {name: (class, learning rate, other arguments)}; SGD's rate depends on the loss (SGD_LR)
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, None, {}),
    "momentum": (torch.optim.SGD, None, dict(momentum=0.9)),
    "rprop": (torch.optim.Rprop, 0.01, {}),
    "rmsprop": (torch.optim.RMSprop, 0.001, {}),
    "adagrad": (torch.optim.Adagrad, 0.01, {}),
    "adadelta": (torch.optim.Adadelta, 1.0, {}),
    "adam": (torch.optim.Adam, 0.001, {}),
    "adamw": (torch.optim.AdamW, 0.001, dict(weight_decay=0.05)),
    "lbfgs": (torch.optim.LBFGS, 1.0, dict(max_iter=5, line_search_fn="strong_wolfe")),
}
# L-BFGS estimates curvature and Rprop compares gradient signs: small batches are too noisy.
BATCH_SIZES = {"lbfgs": 2000, "rprop": 6000}  # others: the recipe's, or 64

# Learning rate schedules of an optimizer `o`, for flags `a` (peak `a.lr`) and a number of steps
SCHEDULES = {
    "constant": lambda o, a, steps: torch.optim.lr_scheduler.ConstantLR(o, factor=1.0),
    "step": lambda o, a, steps: torch.optim.lr_scheduler.StepLR(o, steps // a.epochs, a.gamma),
    "cosine": lambda o, a, steps: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    "onecycle": lambda o, a, steps: torch.optim.lr_scheduler.OneCycleLR(  # up, then almost to 0
        o, a.lr, max(4, steps), anneal_strategy="linear", cycle_momentum=False,
        pct_start=max(0.2, 2 / max(4, steps)),  # torch requires two steps or more of warmup
    ),
}


# --------------------------------------------------------------------------------------------
# The loop: every training run of this file
# --------------------------------------------------------------------------------------------


def fit(run, images, labels, batch_loss, evaluate):
    """Train the model of `run`, a `Run` (below), for `run.args.epochs` epochs, minimising
    batch_loss(model, images, labels). What `evaluate()` returns after each epoch is written to
    `run.log`. Ctrl-C or SIGTERM saves the run and stops it. Returns the exit code."""
    a, model, optimizer = run.args, run.model, run.optimizer

    def closure(rows):
        optimizer.zero_grad()
        loss = batch_loss(model, images[rows], labels[rows])
        loss.backward()
        return loss

    model.train()
    with StopSignal("finishing the step" + ", then saving" * bool(run.out)) as stop:
        for epoch in range(run.step // run.per_epoch, a.epochs):
            # as in the course, images are not shuffled by default; --shuffle learns better
            order = torch.arange(len(images))
            if a.shuffle:
                generator = torch.Generator().manual_seed(1000 * a.seed + epoch)
                order = torch.randperm(len(images), generator=generator)
            # a resumed run skips the batches of this epoch that it has seen
            for rows in order.split(a.batch_size)[run.step % run.per_epoch :]:
                if stop.number:
                    run.save()
                    if run.out:
                        print(f"stopped at step {run.step}: --resume {quoted(run.out)} continues")
                    return 128 + stop.number
                start = time.perf_counter()
                # most optimizers call the closure once and then step; lbfgs calls it several times
                loss = optimizer.step(partial(closure, rows.to(images.device))).item()
                run.log_step(loss, time.perf_counter() - start)
                run.schedule.step()
            run.log.write(step=run.step, **evaluate())
            run.save()
    return 128 + stop.number if stop.number else 0


class Run:
    """A training run: its model, optimizer and progress. `saved` is the content of the mnist.pt
    to resume from.

    `log.rows` has the mean loss of every hundred steps (of each epoch, if shorter), and what
    `evaluate` gave for every epoch, as metrics.jsonl has. Without `out` nothing is written."""

    def __init__(self, model, args, n_images, out=None, saved=None):
        self.model, self.args, self.out = model, args, out
        make, lr, settings = OPTIMIZERS[args.optimizer]
        args.lr = args.lr or lr or parse_loss(args.loss or "nll")[1]
        args.batch_size = args.batch_size or BATCH_SIZES.get(args.optimizer, 64)
        self.n_images, self.per_epoch = n_images, math.ceil(n_images / args.batch_size)
        self.optimizer = make(model.parameters(), lr=args.lr, **settings)
        steps = args.epochs * self.per_epoch
        self.schedule = SCHEDULES[args.schedule](self.optimizer, args, steps)
        self.step, self.seconds, self.recent, rows = 0, 0.0, [], []
        if saved:
            if (n := saved["images"]) != n_images:
                raise UserError(f"{out} was trained on {n:,} images, this data has {n_images:,}")
            lm.load_weights(model, saved["model"], str(out))
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.step, self.seconds, self.recent, rows = saved["progress"]
            set_random_state(saved["random"])
        self.log = Log(out, quiet=out is None)
        for row in rows:
            self.log.write(**row)

    def log_step(self, loss, seconds):
        """Count and log a step; print every hundredth loss, as in the course. UserError for NaN."""
        if not math.isfinite(loss):
            kept = "the last checkpoint, if there is one, is kept"
            raise UserError(f"step {self.step}: the loss is {loss}; {kept}. Try a lower --lr")
        epoch, batch = divmod(self.step, self.per_epoch)
        if batch % 100 == 0 and self.out:
            seen = batch * self.args.batch_size
            done = f"{seen}/{self.n_images} ({seen / self.n_images:.0%})"
            print(f"Train Epoch: {epoch + 1} [{done}]\tLoss: {loss:.4f}", flush=True)
        self.step, self.seconds = self.step + 1, self.seconds + seconds
        self.recent.append(loss)
        if self.step % min(100, self.per_epoch) == 0:
            lr = self.optimizer.param_groups[0]["lr"]
            self.log.write(step=self.step, loss=np.mean(self.recent).item(), lr=lr)
            self.recent = []

    def save(self):
        """Write mnist.pt, which has everything that resuming needs, and draw loss.svg."""
        if self.out is None:
            return
        content = {n: getattr(self, n).state_dict() for n in ("model", "optimizer", "schedule")}
        content |= {"config": {"recipe": self.args.recipe}, "args": vars(self.args)}
        content |= {"progress": (self.step, self.seconds, self.recent, self.log.rows)}
        content |= {"images": self.n_images, "random": random_state()}
        lm.save_checkpoint(self.out / "mnist.pt", content)
        self.log.draw((("train", "loss"), ("validation", "val_loss")), "loss")


# --------------------------------------------------------------------------------------------
# The report: accuracy beside the course's results, and the misclassified images
# --------------------------------------------------------------------------------------------

# The course's log of the default run: right of 10,000, and test loss, after each epoch
COURSE = ((8522, 0.5133), (9035, 0.3203), (9262, 0.2456), (9388, 0.2007), (9461, 0.1718))


def log_probabilities(model, images):
    """The classifier's log probabilities for all images, (N, 10)."""
    with lm.evaluating(model):
        return torch.cat([model(batch) for batch in images.split(1000)])


def score(model, loss, images, labels, name=None):
    """Return the row of an evaluation for the log; with a `name`, print it as the course does."""
    log_p, total = log_probabilities(model, images), len(labels)
    right, mean = (log_p.argmax(-1) == labels).sum().item(), loss(log_p, labels).item()
    if name:
        accuracy = f"Accuracy: {right}/{total} ({right / total:.2%})"
        print(f"{name} set: Average loss: {mean:.4f}, {accuracy}", flush=True)
    return {"val_loss": mean, "right": right, "accuracy": right / total}


def grey(images):
    """Normalised images as uint8: ink white, paper black."""
    return (images * STD + MEAN).clamp(0, 1).mul(255).round().byte().cpu().numpy()


def write_pictures(out, model, images, labels):
    """Write confusion.png (a row for each true digit, a column for each digit read, the brighter
    the more errors), wrong.png (the most confident errors) and weights.png (what each unit of the
    first layer responds to: white for ink, black for paper). Prints the most frequent errors."""
    confidence, read = log_probabilities(model, images).max(-1)
    errors = torch.bincount(10 * labels + read, minlength=100).view(10, 10).fill_diagonal_(0).cpu()
    shades = 255 * (errors / errors.max().clamp(min=1)).sqrt()[..., None, None]
    write_png(out / "confusion.png", sheet(shades.byte().view(100, 1, 1).numpy(), 10, 32))
    found = torch.stack(errors.flatten().topk(5)).T.tolist()
    texts = [f"{i // 10} read as {i % 10} ({n} times)" for n, i in found if n]
    print("Most frequent errors:", ", ".join(texts) or "none")
    wrong = (read != labels).nonzero()[:, 0]
    wrong = wrong[confidence[wrong].argsort(descending=True)][:60]
    if len(wrong):
        write_png(out / "wrong.png", sheet(grey(images[wrong]), 12, 2))
    first = next(p for p in model.parameters() if p.dim() > 1).detach()  # (units, 784 or 1, h, w)
    size = 28 if first.dim() == 2 else first.shape[-1]
    first = first.reshape(-1, size, size).cpu()
    first = first[first.square().sum((1, 2)).argsort(descending=True)[:64]]  # the largest weights
    first = 128 + 127 * first / first.abs().amax(dim=(1, 2), keepdim=True)
    write_png(out / "weights.png", sheet(first.byte().numpy(), 16, max(1, 56 // size)))


# --------------------------------------------------------------------------------------------
# A better network: convolutions and data augmentation
# --------------------------------------------------------------------------------------------


def convolution(inputs, outputs, size, stride=1):
    """Convolution, normalised over the batch, ReLU."""
    convolve = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolve, nn.BatchNorm2d(outputs), nn.ReLU())


class ConvNet(nn.Module):
    """Three convolutions, from 28 x 28 pixels to 14 x 14 x 16 and 7 x 7 x 64 features, and a linear
    layer. A convolution applies the same few weights at every position."""

    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.Sequential(
            convolution(1, width, 5, stride=2),
            convolution(width, 2 * width, 3),
            nn.MaxPool2d(2),
            convolution(2 * width, 4 * width, 3),
            nn.Flatten(),
            nn.Linear(49 * 4 * width, 10),
        ).to(memory_format=torch.channels_last)  # the order in which a CPU convolves fastest

    def forward(self, images):  # (B, 28, 28) -> (B, 10)
        images = images[:, None].contiguous(memory_format=torch.channels_last)
        return F.log_softmax(self.layers(images), dim=-1)


def distort(images):
    """Rotate, stretch, shear and shift each of the images (B, 28, 28) at random, by a little: the
    pixel at (x, y) comes from A (x, y) + b, where A is nearly 1 and b nearly 0."""
    most = torch.tensor([[0.15, 0.25, 0.15], [0.25, 0.15, 0.15]], device=images.device)
    noise = torch.rand(len(images), 2, 3, device=images.device) * 2 - 1
    transforms = torch.eye(2, 3, device=images.device) + most * noise
    grid = F.affine_grid(transforms, (len(images), 1, 28, 28), align_corners=False)
    # pixels from beyond the edge are those of the edge, which is empty
    return F.grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


# --------------------------------------------------------------------------------------------
# Pictures from words: a transformer that turns noise into the digit it is asked for
# --------------------------------------------------------------------------------------------

NULL_LABEL = 10  # the label "any digit", for guidance: it replaces one label in ten in training
PATCH = 7  # a patch is 7 x 7 pixels, an image 4 x 4 patches: the transformer's 16 tokens


class Denoiser(nn.Module):
    """Predicts the clean image from an image that is partly noise, the time t and a label.

    A small DiT (Peebles & Xie 2022) out of the language model's own blocks, here without the causal
    mask: patches of pixels are the tokens, and the label and the time are added to each of them
    before each block."""

    def __init__(self, width=192, layers=4, heads=4):
        super().__init__()
        shape = dict(n_layer=layers, n_head=heads, d_model=width)
        config = lm.Config(norm="layernorm", activation="relu2", qk_norm=True, **shape)
        self.patch = nn.Linear(PATCH**2, width)
        self.position = nn.Parameter(0.02 * torch.randn((28 // PATCH) ** 2, width))
        self.label = nn.Embedding(11, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("times", lm.sinusoid_table(1001, width), persistent=False)
        self.blocks = nn.ModuleList(lm.Block(config, causal=False) for _ in range(layers))
        self.condition = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, PATCH**2)
        for block in self.blocks:  # as in the language model, blocks begin by adding nothing
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.feed_forward.down.weight)

    def forward(self, images, t, labels):  # (B, 28, 28), (B,) in [0, 1], (B,) -> (B, 28, 28)
        x = F.pixel_unshuffle(images[:, None], PATCH).flatten(2).mT  # (B, T, 49)
        x = self.patch(x) + self.position  # (B, T, C)
        asked = self.time(self.times[(1000 * t).long()]) + self.label(labels)  # (B, C)
        for condition, block in zip(self.condition, self.blocks):
            x = block(x + condition(asked)[:, None])
        x = self.pixels(self.norm(x)).mT.unflatten(2, (28 // PATCH, -1))  # (B, 49, 4, 4)
        return F.pixel_shuffle(x, PATCH)[:, 0]


def flow_loss(denoiser, images, labels):
    """Flow matching (Lipman et al. 2022; Liu et al. 2022). Mix each image with noise,

        t = 0  noise ---- x = (1 - t) noise + t image ---->  image  t = 1

    and let the denoiser predict the image. This also gives the velocity along the line, image -
    noise = (image - x) / (1 - t), whose squared error is the loss: errors near the end of the line
    weigh more (Li & He 2025). One label in ten is hidden, for the guidance in `draw`.
    """
    B, device = len(images), images.device
    t = torch.randn(B, device=device).sigmoid()  # mostly the middle, where predicting is hard
    x = torch.lerp(torch.randn_like(images), images, t[:, None, None])
    labels = labels.masked_fill(torch.rand(B, device=device) < 0.1, NULL_LABEL)
    error = denoiser(x, t, labels) - images
    return (error / (1 - t[:, None, None]).clamp(min=0.05)).square().mean()


def drawing(denoiser, labels, seed=0, steps=30, guidance=2.0):
    """Draw the digits `labels` (N,) from noise. Yields images (N, 28, 28) after each step, which
    goes along the straight line from x to what the denoiser predicts, the last one all the way.

    The prediction is an average of possible images at first, and then one of them. Classifier-free
    guidance (Ho & Salimans 2022) goes further in the direction in which the label makes a
    difference: 1 is the plain prediction, more is clearer and less varied.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 28, 28, generator=generator).to(labels.device)
    for step in range(steps):
        images, share = [], 1 / (steps - step)
        with lm.evaluating(denoiser):
            for part, asked in zip(x.split(250), labels.split(250)):
                both = torch.cat((asked, torch.full_like(asked, NULL_LABEL)))
                t = torch.full(both.shape, step / steps, device=x.device)
                label, unlabelled = denoiser(torch.cat((part, part)), t, both).chunk(2)
                images.append(torch.lerp(part, torch.lerp(unlabelled, label, guidance), share))
        yield (x := torch.cat(images))


def pictures(denoiser, text, *settings):
    """An iterator over PNGs of the digits in a text, one for each step of `drawing`."""
    digits, device = digits_of(text), denoiser.position.device
    labels = torch.tensor([digit for digit in digits if digit is not None], device=device)

    def row(images):
        pixels = np.zeros((len(digits), 28, 28), np.uint8)
        pixels[[digit is not None for digit in digits]] = grey(images)
        return png(np.kron(np.hstack(pixels), np.ones((4, 4), np.uint8)))

    return map(row, drawing(denoiser, labels, *settings))


def digits_of(text):
    """The digits in a text, None for a space: "3 1" and "三 １" are [3, None, 1]."""
    digits = [None if c.isspace() else unicodedata.numeric(c, -1) for c in text]
    wrong = [c for c, digit in zip(text, digits) if digit not in (None, *range(10))]
    if wrong or not text.strip():
        raise UserError(f"{(wrong or [text])[0]!r} is not a digit to draw; try 3 1 4")
    return [None if digit is None else int(digit) for digit in digits]


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------

# fmt: off (one line a recipe, one line a flag)
NETWORKS = {"course": MLP, "fast": ConvNet, "diffusion": Denoiser}
ADAMW = dict(optimizer="adamw", schedule="onecycle", batch_size=128, shuffle=True)
RECIPES = {  # defaults of flags; those of "fast" were tuned on the validation images
    "course": dict(optimizer="sgd", schedule="constant", epochs=5, loss="nll", shuffle=False),
    "fast": dict(epochs=4, loss="nll", lr=0.01, **ADAMW),
    "diffusion": dict(epochs=16, lr=0.002, **ADAMW),
}
SWITCHES = {"optimizer": OPTIMIZERS, "loss": LOSSES, "schedule": SCHEDULES}
SGD_LR = {"nll": 0.01, "mse": 0.5, "euclidean": 0.05, "cosine": 0.1}  # to suit gradient sizes


def parse_loss(text):
    """(function, learning rate that suits SGD) of a loss or a sum like "mse+0.5*cosine"."""
    terms = [term.rpartition("*") for term in text.split("+")]
    terms = [(float(weight or 1), LOSSES[name], SGD_LR[name]) for weight, _, name in terms]
    lr = 1 / sum(weight / lr for weight, _, lr in terms)
    return lambda log_p, labels: sum(w * loss(log_p, labels) for w, loss, _ in terms), lr


def plain(text):
    """Our names in a text like "L-BFGS", "StepLR", "ce" or "MSE + 0.5 * cosine_similarity"."""
    text = re.sub(r"\s|(?<=[a-z])[-_ ](?=[a-z])", "", text.lower())
    text = re.sub(r"(embedding|annealing|similarity|distance|loss|lr)+\b", "", text)
    return re.sub(r"\b(ce|crossentropy)\b", "nll", text)


def build_parser():
    p = Parser(description="Train a network to read, or to draw, digits.")
    group = p.add_argument_group("what to do")
    add = group.add_mutually_exclusive_group().add_argument
    add("--recipe", choices=("course", "fast"), help="which reader to train (default: course)")
    add("--diffusion", dest="recipe", action="store_const", const="diffusion", help="learn to draw")
    add = group.add_mutually_exclusive_group().add_argument
    add("--compare", choices=tuple(SWITCHES), help="train the course's network with each of these")
    add("--draw", metavar="TEXT", help='write a picture of these digits, e.g. "3 1 4"')
    add("--judge", type=at_least(1), metavar="N", help="classify N drawn digits with the fast net")
    add("--resume", nargs="?", const="", metavar="RUN", help="continue a run (default: newest)")
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=at_least(1), help="default 5, fast 4, diffusion 16")
    add("--batch_size", type=at_least(1), help="images per step (64; other recipes 128)")
    add("--optimizer", type=plain, choices=tuple(OPTIMIZERS), help="sgd; other recipes adamw")
    add("--lr", type=positive, help="largest learning rate (default: what suits the optimizer)")
    add("--schedule", type=plain, choices=tuple(SCHEDULES), help="constant; other recipes onecycle")
    add("--gamma", type=positive, help="factor after each epoch of --schedule step (default 0.9)")
    add("--loss", type=plain, help=f"{', '.join(LOSSES)} or a sum, mse+0.5*cosine (default nll)")
    add("--shuffle", action=argparse.BooleanOptionalAction, help="shuffle the images every epoch")
    add("--seed", type=between(0, 2**50, int), help="random seed (default 42; drawing: 0)")
    add("--data", metavar="DIR", help="a folder with four IDX files (default: download MNIST)")
    add("--out", metavar="DIR", help="folder of the run (default: out/mnist..., numbered if taken)")
    add("--device", help="auto (default), cpu, cuda, mps")
    add = p.add_argument_group("drawing").add_argument
    add("--steps", type=at_least(1), help="number of sampling steps (default 30)")
    add("--guidance", type=positive, help="1: none; larger values: clearer digits (default 2)")
    return p


# fmt: on


def newest_run(recipe=None):
    """The folder under out/ of the newest run, of that recipe if one is given."""
    for path in sorted(OUT.glob("*/mnist.pt"), key=lambda path: -path.stat().st_mtime):
        if recipe in (None, lm.load_checkpoint(path)["config"]["recipe"]):
            return path.parent
    flag = {"fast": " --recipe fast", "diffusion": " --diffusion"}.get(recipe, "")
    raise UserError(f"no such run in {OUT}/: train it first, python mnist.py{flag}")


def load_run(recipe, device):
    """(trained network on `device`, folder) of the newest run of a recipe."""
    folder, model = newest_run(recipe), NETWORKS[recipe]()
    lm.load_weights(model, lm.load_checkpoint(folder / "mnist.pt")["model"], str(folder))
    return model.to(device), folder


def check_flags(args, given):
    """UserError for a flag, among the set of those that were `given`, that would have no effect."""
    task, drawing = args.recipe, {"steps", "guidance"}
    task = next((t for t in ("draw", "judge", "compare") if t in given), task)
    unused = {"compare": {"recipe", "out", args.compare, *drawing}, "diffusion": {"loss"}}
    unused = unused.get(task, drawing)
    for term in (args.loss or "nll").split("+"):
        if not re.fullmatch(rf"((?=.*[1-9])\d*\.?\d+\*)?({'|'.join(LOSSES)})", term):
            raise UserError(f"--loss: {term!r} is not one of {', '.join(LOSSES)} or like 0.5*mse")
    if "gamma" in given and args.schedule != "step" and args.compare != "schedule":
        raise UserError("--gamma is for --schedule step")
    if task in ("draw", "judge"):
        unused = given - {task, "seed", "device", *drawing}
    if given & unused:
        raise UserError(f"--{min(given & unused)} has no effect with {task}")


def settle(args):
    """Fill in the flags that were not given, from the run to resume or from the recipe. Returns the
    checkpoint to resume, or None."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    if args.resume is None:
        recipe = args.recipe or "course"
        if args.out and any(Path(args.out).glob("*.pt")):
            raise UserError(f"{args.out} already holds a run: --resume it, or another --out")
        settings = dict(recipe=recipe, seed=42, gamma=0.9) | RECIPES[recipe]
        if args.optimizer not in (None, settings["optimizer"]):  # the recipe's rate suits that one
            size = BATCH_SIZES.get(args.optimizer, settings.get("batch_size"))
            settings |= {"lr": None, "batch_size": size}
        vars(args).update(settings | given)
        return None
    folder = Path(args.resume) if args.resume else newest_run(args.recipe)
    if not (folder / "mnist.pt").exists():
        raise UserError(f"--resume {folder}: there is no {folder / 'mnist.pt'}")
    saved = lm.load_checkpoint(folder / "mnist.pt", resuming=True)
    old = saved["args"] | {"out": str(folder)}  # the folder may have been moved
    free = {"resume", "epochs", "data", "device"}
    if args.epochs not in (None, old["epochs"]) and old["schedule"] not in ("constant", "step"):
        free.remove("epochs")  # such a schedule depends on the number of epochs
    if changed := [k for k in given if k not in free and given[k] != old.get(k)]:
        raise UserError(f"--{changed[0]} cannot change when resuming {folder}")
    vars(args).update(old | given)
    return saved


def start(args, saved, device, images):
    """Seed, and return the run with these settings; write settings.json, print the first line."""
    torch.manual_seed(args.seed)
    model = NETWORKS[args.recipe]().to(device)
    if args.optimizer == "lbfgs":  # torch's takes weights in no other order
        model.to(memory_format=torch.contiguous_format)
    args.out = args.out or str(new_run(f"mnist-{args.recipe}".removesuffix("-course")))
    run = Run(model, args, images, Path(args.out), saved)
    size = sum(p.numel() for p in model.parameters())
    write_json(run.out / "settings.json", vars(args) | {"parameters": size})
    how = f"{args.optimizer} with lr {args.lr:g} ({args.schedule}), {args.epochs} epochs"
    print(f"{args.out}: {args.recipe}, {size:,} parameters, {how} of {images:,} images, {device}")
    return run


def train_reader(args, saved, device):
    """Train the course's network or the fast one, and report. Returns the exit code."""
    (images, labels), test = load_mnist(device, args.data)
    eval_set, name, augment = test, "Test", lambda x: x
    if args.recipe == "fast":  # tuned, and evaluated, on validation images, not on the test set
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(device)
        held_out, order = order.split([n := -(-len(order) // 12), len(order) - n])
        if len(order) == 0:
            raise UserError("--recipe fast holds out images for validation: one is too few")
        eval_set, name, augment = (images[held_out], labels[held_out]), "Validation", distort
        images, labels = images[order], labels[order]
    loss = parse_loss(args.loss)[0]
    run = start(args, saved, device, len(images))
    evaluate = partial(score, run.model, loss, *eval_set, name)
    if code := fit(run, images, labels, lambda m, x, y: loss(m(augment(x)), y), evaluate):
        return code
    if eval_set is not test:
        score(run.model, loss, *test, "Test")
    if args.recipe == "course":
        print("epoch   right  the course's    test loss  the course's")
        for i, row in enumerate(row for row in run.log.rows if "right" in row):
            right, mean = COURSE[i] if i < len(COURSE) else ("", "")
            print(f"{i + 1:5} {row['right']:7} {right:13} {row['val_loss']:12.4f} {mean:13}")
    write_pictures(run.out, run.model, *test)
    print(f"{run.seconds:.1f} s of training; loss.svg, confusion.png ... are in {run.out}")
    return 0


def compare(args, device):
    """Train the course's network with each optimizer, loss or schedule. Prints a table and draws an
    SVG of the test error. Returns the exit code."""
    switch, (images, labels), test = args.compare, *load_mnist(device, args.data)
    curves, code = {}, 0
    print(f"{switch:10} {'lr':>6} {'seconds':>8} {'right':>6}  after each of {args.epochs} epochs")
    for value in SWITCHES[switch]:
        a = argparse.Namespace(**vars(args) | {switch: value})
        torch.manual_seed(a.seed)
        run, loss = Run(MLP().to(device), a, len(images)), parse_loss(a.loss)[0]
        evaluate = partial(score, run.model, loss, *test)
        try:
            if code := fit(run, images, labels, lambda m, x, y, loss=loss: loss(m(x), y), evaluate):
                break
        except UserError as e:  # this one diverged; the others may not
            print(f"{value:10} {a.lr:6g} {e}")
            continue
        rights = [row["right"] for row in run.log.rows if "right" in row]
        print(f"{value:10} {a.lr:6g} {run.seconds:8.1f} ", *(f"{n:6}" for n in rights), flush=True)
        curves[value] = [(i + 1, 100 - 100 * n / len(test[1])) for i, n in enumerate(rights)]
    if curves:
        path = new_run("mnist-compare") / f"{switch}.svg"
        svg = line_svg(switch, curves, "epochs", "% of test images read wrong")
        path.write_text(svg, encoding="utf-8")
        print(f"curves: {path}")
    return code


def train_denoiser(args, saved, device):
    """Train the denoiser, then draw a sheet of digits. Returns the exit code."""
    (images, labels), test = load_mnist(device, args.data)
    run = start(args, saved, device, len(images))

    def evaluate():
        before = random_state()
        torch.manual_seed(0)  # the same noise every time
        with lm.evaluating(run.model):
            batches = zip(*(tensor[:2000].split(500) for tensor in test))
            loss = np.mean([flow_loss(run.model, *batch).item() for batch in batches]).item()
        set_random_state(before)
        print(f"Test set: Average loss: {loss:.4f}  ({run.seconds / 60:.1f} min)", flush=True)
        return {"val_loss": loss}

    if code := fit(run, images, labels, flow_loss, evaluate):
        return code
    labels = torch.arange(100, device=device) // 10
    *_, drawn = drawing(run.model, labels, args.seed, args.steps, args.guidance)
    write_png(run.out / "sheet.png", sheet(grey(drawn), 10, 2))
    print(f"{run.out / 'sheet.png'} has ten of each digit; python mnist.py --draw \"3 1 4\"")
    return 0


def draw_text(args, device):
    """Draw the digits of --draw into one PNG. Returns the exit code."""
    name = "".join("-" if digit is None else str(digit) for digit in digits_of(args.draw))
    denoiser, folder = load_run("diffusion", device)
    path = folder / f"draw-{name[:50]}.png"
    *_, content = pictures(denoiser, args.draw, args.seed or 0, args.steps, args.guidance)
    path.write_bytes(content)
    print(f"{path}: {len(name) - name.count('-')} digits")
    return 0


def judge(args, device):
    """Draw --judge digits, 0 to 9 in turn, and count how many the fast reader, which has never
    seen a drawn one, reads as the digit that was asked for. Returns the exit code."""
    (reader, _), (denoiser, _) = load_run("fast", device), load_run("diffusion", device)
    labels, start = torch.arange(args.judge, device=device) % 10, time.perf_counter()
    *_, drawn = drawing(denoiser, labels, args.seed or 0, args.steps, args.guidance)
    seconds = time.perf_counter() - start
    right = log_probabilities(reader, drawn).argmax(-1) == labels
    share = f"{right.sum()} of {len(labels)} ({right.float().mean():.1%})"
    print(f"{share} are read as the requested digit; {seconds / len(labels):.3f} s per digit")
    return 0


def main(argv=None):
    args = build_parser().parse_args(argv)
    given, device = {k for k, v in vars(args).items() if v is not None}, choose_device(args.device)
    draws = args.draw is not None or args.judge
    saved = None if draws else settle(args)
    check_flags(args, given)
    args.steps, args.guidance = args.steps or 30, args.guidance or 2.0
    if draws:
        return judge(args, device) if args.judge else draw_text(args, device)
    if args.compare:
        return compare(args, device)
    return (train_denoiser if args.recipe == "diffusion" else train_reader)(args, saved, device)


if __name__ == "__main__":
    run_cli(main)
