"""data/idx.py: MNIST's files, from mirrors and folders."""

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, idx, serve_folder, toy_files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist
from data.cli import UserError
from data.idx import FILES, MIRRORS, download_idx, parse_idx

pytestmark = pytest.mark.usefixtures("elsewhere")

REAL = SHARED / "mnist"
needs_mnist = pytest.mark.skipif(not REAL.is_dir(), reason=f"no MNIST files in {REAL}")
NAMES = list(FILES)


def test_an_idx_file_is_read_as_its_format_says():
    content = bytes.fromhex("00000803 00000002 00000001 00000003 010203 0405ff")
    assert parse_idx(content, 3, "x").tolist() == [[[1, 2, 3]], [[4, 5, 255]]]
    assert parse_idx(bytes.fromhex("00000801 00000002 0709"), 1, "x").tolist() == [7, 9]


GOOD = idx(np.zeros((2, 28, 28)))

DAMAGE = {
    "empty": (b"", "begins with nothing"),
    "half a header": (GOOD[:7], "cut short"),
    "truncated": (GOOD[:-1], "has 1,567 values, its header says 2 x 28 x 28"),
    "too long": (GOOD + b"x", "has 1,569 values"),
    "wrong magic": (b"\x1f" + GOOD[1:], "begins with 1f 00 08 03"),
    "wrong type": (b"\0\0\x0d\x03" + GOOD[4:], "begins with 00 00 0d 03"),
    "labels": (idx(np.zeros(3)), "begins with 00 00 08 01, not with 00 00 08 03"),
    "a page": (b"<html>no such bucket</html>", "begins with 3c 68 74 6d"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_none_says_what_it_is_instead(damage):
    content, words = DAMAGE[damage]
    with pytest.raises(UserError, match=words) as e:
        parse_idx(content, 3, "a/train-images-idx3-ubyte.gz")
    assert "a/train-images" in str(e.value) and "\n" not in str(e.value)


@pytest.fixture
def mirrors(tmp_path, monkeypatch):
    """Two mirrors on this machine with the toy's files; the folders that they serve."""
    files = toy_files()
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr("data.idx.FILES", sums)
    folders = []
    for url in MIRRORS:
        folder = tmp_path / "web" / url.split("://")[1]
        folder.mkdir(parents=True)
        for level, (name, content) in enumerate(files.items()):
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, level + 1))
        folders.append(folder)
    with serve_folder(tmp_path / "web") as url:
        monkeypatch.setenv("SCRATCHLM_MIRROR", url)
        yield folders


def kept():
    return {p: p.read_bytes() for p in Path("data").rglob("*") if p.is_file()}


def test_the_images_are_one_tensor_of_mean_0_and_std_1(mirrors):
    (x, y), (test_x, _) = mnist.load_mnist()
    assert x.shape == (300, 28, 28) and test_x.shape == (100, 28, 28)
    assert x.dtype == torch.float32 and y.tolist() == [i % 10 for i in range(300)]
    raw = parse_idx(toy_files()["t10k-images-idx3-ubyte"], 3, "x")
    want = (torch.tensor(raw.copy()) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(test_x, want)
    assert (mnist.grey(test_x) == raw).all()


@pytest.mark.parametrize("fault", ["gone", "truncated", "re-ordered", "wrong magic", "bit-flipped"])
def test_the_second_mirror_helps_where_the_first_is_damaged(mirrors, fault):
    spoil(mirrors[0] / f"{NAMES[0]}.gz", fault)
    (x, _), _ = mnist.load_mnist()
    assert len(x) == 300


def spoil(path, fault):
    """Damage a .gz file, or what is in it."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    if fault == "gone":
        return path.unlink()
    if fault == "truncated":
        del content[-1]
    elif fault == "re-ordered":
        content[16:] = content[-784:] + content[16:-784]
    elif fault == "wrong magic":
        content[2] = 9
    elif fault == "bit-flipped":
        content[5000] ^= 1
    elif fault == "cut .gz":
        return path.write_bytes(path.read_bytes()[:-9])
    elif fault == "flipped .gz":
        packed = bytearray(path.read_bytes())
        packed[len(packed) // 2] ^= 16
        return path.write_bytes(packed)
    path.write_bytes(gzip.compress(content))


FAULTS = ["truncated", "re-ordered", "wrong magic", "bit-flipped", "cut .gz", "flipped .gz", "gone"]


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_damaged_on_both_mirrors_is_one_line_and_nothing_is_lost(mirrors, fault, name):
    if "label" in name and fault in ("re-ordered", "bit-flipped"):
        pytest.skip("too few bytes")
    download_idx(NAMES[1])
    before = kept()
    for folder in mirrors:
        spoil(folder / f"{name}.gz", fault)
    with pytest.raises(UserError, match="Delete a damaged file") as e:
        mnist.load_mnist()
    assert "\n" not in str(e.value) and name in str(e.value)
    assert len(before) == 1 and before.items() <= kept().items()


def test_a_download_that_was_damaged_later_is_kept_and_replaced_from_the_other(mirrors):
    mnist.load_mnist()
    (path,) = Path("data").rglob(f"{NAMES[0]}.gz")
    path.write_bytes(b"\0" * 50)
    (x, _), _ = mnist.load_mnist()
    assert len(x) == 300 and path.read_bytes() == b"\0" * 50


@needs_mnist
def test_the_real_files_are_the_ones_whose_sums_are_in_the_source(capsys):
    (x, _), (_, test_y) = mnist.load_mnist(folder=REAL)
    assert capsys.readouterr().err == ""
    assert x.mean().item() == pytest.approx(0, abs=1e-3)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
    want = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.bincount(test_y).tolist() == want


def test_a_folder_of_ones_own_may_hold_another_data_set(toy, capsys):
    assert len(mnist.load_mnist(folder=toy)[0][0]) == 300
    assert "is not MNIST's own" in capsys.readouterr().err
    (Path(toy) / NAMES[1]).write_bytes(idx(np.arange(299) % 10))
    with pytest.raises(UserError, match="299 labels up to 9 do not go with"):
        mnist.load_mnist(folder=toy)
    (Path(toy) / NAMES[1]).write_bytes(idx(np.arange(300) % 11))
    with pytest.raises(UserError, match="300 labels up to 10"):
        mnist.load_mnist(folder=toy)
    (Path(toy) / NAMES[1]).unlink()
    with pytest.raises(UserError, match=f"has no {NAMES[1]}"):
        mnist.load_mnist(folder=toy)
