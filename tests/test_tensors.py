"""data/tensors.py: safetensors beside the safetensors library."""

import json
import random
import struct
from functools import partial

import pytest
import torch

from data.cli import UserError
from data.tensors import Safetensors, write_safetensors

safetensors = pytest.importorskip("safetensors.torch")
same_tensors = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
TENSORS = {
    "a.weight": torch.randn(5, 7),
    "b": torch.randn(3, 2, 4).to(torch.bfloat16),
    "é half": torch.randn(9).half(),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "none": torch.empty(0, 4),
}


def test_the_safetensors_library_reads_ours_and_we_read_its(tmp_path):
    write_safetensors(tmp_path / "ours", TENSORS)
    same_tensors(safetensors.load_file(tmp_path / "ours"), TENSORS)
    safetensors.save_file(TENSORS, tmp_path / "its", {"format": "pt"})
    for name in ("ours", "its"):
        file = Safetensors(tmp_path / name)
        same_tensors({n: file[n] for n in file.entries}, TENSORS)


def mutate(content, rng):
    """A damaged copy of a good file: its bytes, or its header's numbers and names."""
    length, kind = int.from_bytes(content[:8], "little"), rng.randrange(4)
    if kind < 2:  # at most 8 bytes are exchanged for others, of the header's length if it is 0
        at = rng.randrange(len(content) if kind else 9)
        return content[:at] + rng.randbytes(rng.randrange(9)) + content[at + rng.randrange(9) :]
    header = json.loads(content[8 : 8 + length])
    tensor = header[rng.choice([n for n in header if n != "__metadata__"])]
    field, strange = rng.choice(["dtype", "shape", "data_offsets"]), [-1, 0, 1, 3, 2**31, 2**63]
    strange += [2**64, 1e300, 1.5, True, None, "4", [], {}, [1, 2], "F32", -4, 4, 8, 16, 1000]
    if kind == 2 and field != "dtype" and tensor[field]:
        tensor[field][rng.randrange(len(tensor[field]))] = rng.choice(strange)
    else:
        tensor[field] = rng.choice(strange)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def test_damaged_files_raise_or_load_as_the_library_reads_them(tmp_path):
    path, rng = tmp_path / "x", random.Random(0)
    write_safetensors(path, TENSORS)
    good, refused = path.read_bytes(), 0
    for _ in range(400):
        damaged = mutate(good, rng)
        path.write_bytes(damaged)
        try:
            file = Safetensors(path)
        except UserError as e:
            assert "\n" not in str(e) and str(path) in str(e)
            refused += 1
        else:
            same_tensors({n: file[n] for n in file.entries}, safetensors.load(damaged))
    assert 240 < refused < 400


@pytest.mark.parametrize("depth", [10, 100_000])
def test_deep_json_in_a_header_is_no_crash(tmp_path, depth):
    text = b"[" * depth + b"]" * depth
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(UserError, match="not a safetensors file"):
        Safetensors(tmp_path / "x")
    safetensors.save_file({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "x")
    with pytest.raises(UserError, match="'w' is 'F8_E4M3', not F64, F32"):
        Safetensors(tmp_path / "x")
