"""mnist.py: the loop beside the course's log, resuming, pictures, and drawn digits."""

import functools
import itertools
import os
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import test_train
import torch
import torch.nn.functional as F
from conftest import SHARED, toy_files
from PIL import Image
from torch import nn

import mnist
import model as lm
from data.cli import UserError
from data.runs import read_run, run_list

pytestmark = pytest.mark.usefixtures("elsewhere")
run = functools.partial(test_train.run, main=mnist.main)
refused = functools.partial(test_train.refused, main=mnist.main)


@pytest.fixture
def small_denoiser(monkeypatch):
    small = functools.partial(mnist.Denoiser, width=16, layers=1, heads=2)
    monkeypatch.setitem(mnist.NETWORKS, "diffusion", small)


def settled(*flags):
    args = mnist.build_parser().parse_args(["--out", "run", *flags])
    mnist.settle(args)
    return args


def saved(folder):
    return lm.load_checkpoint(f"{folder}/mnist.pt")


def same_weights(one, other):
    one, other = saved(one)["model"], saved(other)["model"]
    return all(value.equal(other[name]) for name, value in one.items())


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="no MNIST files")
@pytest.mark.parametrize("epochs", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_the_default_run_is_the_courses_within_a_hundredth_and_fifty_digits(epochs):
    done = run("--data", SHARED / "mnist", "--epochs", epochs)
    assert "is not MNIST's own" not in done.stderr  # its checksums are those of the source
    output = done.stdout
    rows = [line.split() for line in output.split("epoch   right")[1].splitlines()[1 : epochs + 1]]
    assert [int(r[0]) for r in rows] == list(range(1, epochs + 1))
    for row, (right, loss) in zip(rows, mnist.COURSE):
        assert (int(row[2]), float(row[4])) == (right, loss)
        assert abs(int(row[1]) - right) <= 50 and abs(float(row[3]) - loss) <= 0.01
    assert f"Train Epoch: {epochs} [57600/60000 (96%)]\tLoss: " in output
    for name in ("confusion", "wrong", "weights"):
        assert Image.open(f"out/mnist/{name}.png").size[0] > 300
    ElementTree.parse("out/mnist/loss.svg")


def test_losses_by_hand():
    p = torch.tensor([[0.7, 0.2, *[0.0125] * 8], [0.1, 0.6, *[0.0375] * 8]])
    losses = {name: f(p.log(), torch.tensor([0, 1])).item() for name, f in mnist.LOSSES.items()}
    squares = 0.3**2 + 0.2**2 + 8 * 0.0125**2, 0.1**2 + 0.4**2 + 8 * 0.0375**2
    cosine = 1 - (0.7 / p[0].norm().item() + 0.6 / p[1].norm().item()) / 2
    by_hand = {"nll": -(np.log(0.7) + np.log(0.6)) / 2, "mse": sum(squares) / 20, "cosine": cosine}
    by_hand["euclidean"] = (squares[0] ** 0.5 + squares[1] ** 0.5) / 2
    assert losses == pytest.approx(by_hand)
    loss, lr = mnist.parse_loss(settled("--loss", "MSE + 0.5 * Cosine-Embedding_Loss").loss)
    found = loss(p.log(), torch.tensor([0, 1])).item()
    assert found == pytest.approx(by_hand["mse"] + 0.5 * cosine)
    assert lr == pytest.approx(1 / (1 / 0.5 + 0.5 / 0.1)) and mnist.parse_loss("nll")[1] == 0.01


def rates(schedule, steps=8, *flags):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    args = settled("--epochs", "4", "--lr", "1", "--schedule", schedule, *flags)
    schedule, group = mnist.SCHEDULES[schedule](optimizer, args, steps), optimizer.param_groups[0]
    return [(group["lr"], optimizer.step(), schedule.step())[0] for _ in range(steps)]


def test_schedules_by_hand():
    assert rates("constant") == [1.0] * 8
    assert rates("step") == pytest.approx([0.9 ** (i // 2) for i in range(8)])  # the course's
    assert rates("step", 8, "--gamma", "0.5") == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert rates("cosine") == pytest.approx([(1 + np.cos(np.pi * i / 8)) / 2 for i in range(8)])
    cycle = rates("onecycle", 100)
    assert max(cycle) == pytest.approx(1) and 17 <= np.argmax(cycle) <= 21
    assert cycle[0] == pytest.approx(0.04) and cycle[-1] < 1e-3
    assert min(rates("onecycle", 1)) >= 0  # no error of torch's
    assert settled("--recipe", "fast").lr and not settled("--recipe", "fast", "--optimizer=sgd").lr


def test_shuffling_takes_every_image_once_and_in_another_order_each_epoch(toy):
    args = settled("--shuffle", "--batch_size", "7", "--epochs", "2")
    (x, _), _ = mnist.load_mnist(folder=toy)
    net, seen = nn.Linear(1, 1), []

    def batch_loss(model, images, labels):
        assert images.equal(x[labels])
        seen.extend(labels.tolist())
        return model(torch.ones(1)).sum()

    assert mnist.fit(mnist.Run(net, args, 300), x, torch.arange(300), batch_loss, dict) == 0
    assert sorted(seen[:300]) == sorted(seen[300:]) == list(range(300))
    assert seen[:300] != seen[300:] and seen[:300] != list(range(300))


@pytest.mark.usefixtures("small_denoiser")
@pytest.mark.parametrize("kind", [
    "--optimizer momentum --schedule cosine", "--optimizer adam --schedule step --shuffle",
    "--optimizer lbfgs --recipe fast", "--recipe fast", "--diffusion",
])
def test_a_run_stopped_anywhere_resumes_to_the_last_bit(kind, toy, monkeypatch, capsys):
    flags = kind.split() + f"--data {toy} --epochs 2 --batch_size 50 --seed 3".split()
    assert mnist.main([*flags, "--out", "straight"]) == 0
    count, stops = mnist.Run.log_step, [2, 5, 6, 9]

    def stop_at(self, *rest):
        count(self, *rest)
        if stops and self.step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGINT if len(stops) % 2 else signal.SIGTERM)

    monkeypatch.setattr(mnist.Run, "log_step", stop_at)
    codes = [mnist.main([*flags, "--out", "halting"])]
    while codes[-1]:
        torch.rand(7)  # what else the process draws does not matter
        codes.append(mnist.main(["--resume", "halting"]))
    assert codes == [130, 143, 130, 143, 0]
    assert capsys.readouterr().out.count("--resume halting") == 4
    assert same_weights("straight", "halting")
    a, b = (saved(folder)["progress"] for folder in ("straight", "halting"))
    assert a[0] == b[0] and a[3] == b[3]


def test_a_run_may_get_more_epochs_or_move_but_not_change_its_images(toy, tmp_path):
    flags = ["--data", toy, "--batch_size", "50"]
    mnist.main([*flags, "--epochs", "3", "--out", "straight"])
    with pytest.raises(UserError, match="straight already holds a run"):
        mnist.main([*flags, "--out", "straight"])
    mnist.main([*flags, "--epochs", "1", "--out", "before"])
    Path("before").rename("after")
    mnist.main(["--resume", "after", "--out", "after", "--epochs", "3"])
    with pytest.raises(UserError, match="--batch_size cannot change when resuming after"):
        mnist.main(["--resume", "after", "--batch_size", "10"])
    assert same_weights("straight", "after") and not Path("before").exists()
    mnist.main([*flags, "--epochs", "1", "--schedule", "cosine", "--out", "ended"])
    for changed in ("--epochs", "--steps"):
        with pytest.raises(UserError, match=f"{changed} cannot change"):
            mnist.main(["--resume", "ended", changed, "2"])
    for name, content in toy_files(train=400).items():
        (tmp_path / "toy" / name).write_bytes(content)
    with pytest.raises(UserError, match="after was trained on 300 images, this data has 400"):
        mnist.main(["--resume", "after", "--epochs", "4"])


def test_without_a_name_the_newest_run_resumes_with_its_own_settings(toy, small_denoiser):
    mnist.main(["--data", toy, "--epochs", "1"])  # older
    flags = ["--diffusion", "--steps", "3", "--guidance", "1.5", "--data", toy, "--epochs", "1"]
    mnist.main(flags)
    args, sheet = saved("out/mnist-diffusion")["args"], Path("out/mnist-diffusion/sheet.png")
    assert (args["steps"], args["guidance"]) == (3, 1.5)
    (recent, older), rows = run_list(), read_run("mnist")["rows"]  # what the page shows
    assert (recent["name"], older["name"], older["step"]) == ("mnist-diffusion", "mnist", 5)
    assert [" ".join(row) for row in rows] == ["step loss lr", "step val_loss right accuracy"]
    assert read_run("mnist-diffusion")["settings"]["recipe"] == "diffusion"
    sheet.unlink()
    assert mnist.main(["--resume"]) == 0 and sheet.exists()  # of any recipe
    with pytest.raises(UserError, match="--steps cannot change"):
        mnist.main(["--diffusion", "--resume", "--steps", "4"])


def test_compare_trains_each_of_a_kind_and_draws_them(toy, monkeypatch):
    score = mnist.score
    for n, (switch, table) in enumerate(mnist.SWITCHES.items()):
        flags = ["--data", toy, "--epochs", "3", "--batch_size", "30"]
        rows = run("--compare", switch, *flags).stdout.splitlines()[1:-1]
        assert [row.split()[0] for row in rows] == list(table)
        learned = {row.split()[0] for row in rows if int(row.split()[-1]) > 50}
        assert switch != "optimizer" or learned >= set(table) - {"sgd"}  # it takes longer
        tree = ElementTree.parse(f"out/mnist-compare{f'-{n + 1}' * (n > 0)}/{switch}.svg")
        assert len([e for e in tree.iter() if e.tag.endswith("polyline")]) == len(table)
    assert not list(Path("out").rglob("mnist.pt"))
    monkeypatch.setattr(mnist, "score", lambda *a: os.kill(os.getpid(), 2) or score(*a))
    done = run("--compare", "loss", "--data", toy, "--epochs", "1", check=False)
    assert done.returncode == 130 and "saving" not in done.stderr and "curves" not in done.stdout
    monkeypatch.undo()
    output = run("--compare", "loss", "--lr", "1e9", "--data", toy, "--epochs", "1").stdout
    assert "the loss is nan" in output and "curves: " in output
    with pytest.raises(UserError, match="Try a lower --lr"):
        mnist.main(["--lr", "1e9", "--data", toy, "--epochs", "3"])


@pytest.mark.parametrize("flags, words", [
    *(([f"--draw={text}"], f"'{text[-1]}' is not a digit") for text in ("3 x", "½", "十")),
    (["--optimizer", "adamm"], "--optimizer: invalid choice: 'adamm' (choose from"),
    (["--loss", "mse+2*l1"], "--loss: '2*l1' is not one of nll, mse, euclidean, cosine"),
    (["--gamma", "0.5"], "--gamma is for --schedule step"),
    (["--draw", "7"], "no such run in out/: train it first, python mnist.py --diffusion"),
    (["--resume", "nowhere"], "--resume nowhere: there is no nowhere/mnist.pt"),
    (["--data", "nowhere"], "--data nowhere has no train-images-idx3-ubyte"),
    (["--compare", "loss", "--recipe", "fast"], "--recipe has no effect with compare"),
    (["--compare", "loss", "--loss", "mse"], "--loss has no effect with compare"),
    (["--recipe", "fast", "--diffusion"], "--diffusion: not allowed with argument --recipe"),
    (["--shuffle", "--seed", "1e18"], "--seed 1e18 must be from 0 to"),
])
def test_a_mistake_is_one_line_and_exit_code_2(flags, words):
    assert words in refused(*flags)


class Fixed(nn.Linear):
    """Reads every image as the number in its first pixel, as surely as its second one says."""

    def forward(self, images):
        return F.one_hot(images[:, 0, 0].long(), 10) * images[:, 0, 1, None]


def test_the_pictures_show_what_was_read_as_what(tmp_path, capsys):
    labels, read = torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 7, 5, 5, 9])
    images = torch.zeros(6, 28, 28)
    images[:, 0, 0], images[:, 0, 1] = read, torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 2.0])
    mnist.write_pictures(tmp_path, Fixed(784, 4), images, labels)
    assert "errors: 2 read as 5 (2 times), " in capsys.readouterr().out
    picture = np.array(Image.open(tmp_path / "confusion.png"))
    assert picture.shape == (340, 340)
    shades = {(1, 7): 180, (2, 9): 180, (2, 5): 255}  # the square root of the share
    cells = itertools.product(range(10), repeat=2)
    assert all(picture[34 * i, 34 * j] == shades.get((i, j), 0) for i, j in cells)
    picture = np.array(Image.open(tmp_path / "wrong.png"))
    assert (picture[:56:2, :56:2] == mnist.grey(images[[4]])[0]).all()  # the surest first
    (tmp_path / "wrong.png").unlink()
    mnist.write_pictures(tmp_path, Fixed(784, 4), images, read)
    assert not (tmp_path / "wrong.png").exists() and "errors: none" in capsys.readouterr().out


def test_distorted_digits_stay_near_where_they_were():
    torch.manual_seed(0)
    x = torch.full((500, 28, 28), -0.4)
    x[:, 13:15, 13:15] = 2.0
    moved = mnist.distort(x) + 0.4
    cx = (moved.clamp(min=0).sum(1) * torch.arange(28.0)).sum(1)
    cx = cx / moved.clamp(min=0).sum((1, 2)) - 13.5
    assert cx.abs().max() < 0.15 * 14 / 0.85 + 0.5 and cx.abs().mean() > 0.5
    assert cx.mean().abs() < 0.2  # as often to the left as to the right
    assert moved[:, 0].abs().max() < 1e-5  # nothing comes in from outside


def test_the_test_images_are_read_once_and_never_while_training(toy, monkeypatch):
    names, score = [], mnist.score
    monkeypatch.setattr(mnist, "score", lambda *a: names.append((a[-1], len(a[2]))) or score(*a))
    mnist.main(["--recipe", "fast", "--data", toy, "--epochs", "2", "--out", "run"])
    assert names == [("Validation", 25), ("Validation", 25), ("Test", 100)]


def test_the_denoiser_sees_the_whole_image_the_time_and_the_label():
    torch.manual_seed(0)
    net = mnist.Denoiser(width=32, layers=2, heads=2).eval()
    for block in net.blocks:
        nn.init.normal_(block.attention.out.weight, std=0.2)
    x, t, y = torch.randn(1, 28, 28), torch.tensor([0.5]), torch.tensor([3])
    base, last = net(x, t, y), x.clone()
    last[0, 27, 27] += 1
    for other in (net(last, t, y), net(x, t + 0.1, y), net(x, t, y + 1)):
        assert (other[0, :4, :4] - base[0, :4, :4]).abs().max() > 1e-4


class Perfect(nn.Embedding):
    """Knows the images: one for each label, and one for nobody."""

    def forward(self, x, t, labels):
        return super().forward(labels).view(-1, 28, 28)


@pytest.mark.parametrize("steps, guidance", [(1, 1), (40, 1), (9, 3)])
def test_a_perfect_denoiser_draws_exactly_its_image(steps, guidance):
    net, labels = Perfect(11, 784), torch.tensor([3, 9, 3])
    images = net.weight.detach().view(11, 28, 28)
    wanted = images[10] + guidance * (images[labels] - images[10])
    drawn = list(mnist.drawing(net, labels, 5, steps, guidance))[-1]
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=1e-4)


def test_the_flow_loss_is_the_squared_error_of_the_velocity():
    images, seen = torch.randn(28, 28).expand(2000, 28, 28), {}
    labels = torch.zeros(2000, dtype=torch.long)

    def guess(x, t, labels, error=0.0):
        seen.update(x=x, t=t[:, None, None], labels=labels)
        return images + error

    assert mnist.flow_loss(guess, images, labels).item() == 0
    x, t = seen["x"], seen["t"]
    noise = ((x - t * images) / (1 - t))[t.flatten() < 0.9]
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    assert t.mean() == pytest.approx(0.5, abs=0.03) and t.min() > 0 and t.max() < 1
    assert (seen["labels"] == mnist.NULL_LABEL).float().mean() == pytest.approx(0.1, abs=0.03)
    loss = mnist.flow_loss(functools.partial(guess, error=0.5), images, labels).item()
    velocities = ((image - seen["x"]) / (1 - seen["t"]).clamp(min=0.05)
                  for image in (images + 0.5, images))  # fmt: skip
    assert loss == pytest.approx(F.mse_loss(*velocities).item(), rel=1e-4)


def test_learning_to_draw_and_drawing(toy, small_denoiser):
    small = ["--data", toy, "--epochs", "1", "--batch_size", "100"]
    output = run("--diffusion", *small, "--steps", "2").stdout
    assert "Test set: Average loss" in output and "sheet.png" in output
    assert Image.open("out/mnist-diffusion/sheet.png").size == (10 * 58, 10 * 58)
    output = run("--draw", "三　１〇", "--steps", "2").stdout  # digits in any script
    assert "out/mnist-diffusion/draw-3-10.png" in output
    assert Image.open("out/mnist-diffusion/draw-3-10.png").size == (4 * 112, 112)
    run("--recipe", "fast", *small)
    assert " of 20 (" in run("--judge", "20", "--steps", "2").stdout


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [[], ["--recipe", "fast"], ["--diffusion"]])
def test_every_recipe_runs_on_a_gpu(toy, flags):
    flags = [*flags, "--data", toy, "--epochs", "2", "--batch_size", "50", "--device", "cuda"]
    assert mnist.main([*flags, "--out", "gpu"]) == 0
    assert mnist.main(["--resume", "gpu"]) == 0
