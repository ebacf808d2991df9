"""Weights in .bin files: read without running anything, refused where they hold more than tensors."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
from helpers import safetensors_bytes

from ptqtp_gguf.errors import CheckpointError
from ptqtp_gguf.source.checkpoint import BIN_INDEX, INDEX, check
from ptqtp_gguf.source.pickles import bin_tensors

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "one.safetensors").write_bytes(safetensors_bytes(GOOD, bytes(22)))
    other = {"c": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    (tmp_path / "two.safetensors").write_bytes(safetensors_bytes(other, bytes(8)))
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


class Evil:
    """Pickles to a call of os.system that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def bin_folder(folder: Path) -> Path:
    import torch

    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    shared = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    state = {"a": shared, "b": shared.T, "c": torch.nn.Parameter(torch.zeros(5)), "d": torch.tensor(3)}
    torch.save(OrderedDict(state), folder / "pytorch_model.bin")
    return folder


def test_a_good_bin(bin_folder: Path) -> None:
    assert bin_tensors(bin_folder / "pytorch_model.bin") == {"a": 24, "b": 24, "c": 20, "d": 8}
    assert check(bin_folder).nbytes == 76
    (bin_folder / "pytorch_model.bin").rename(bin_folder / "pytorch_model-1.bin")
    for names, message in (
        ("abcd", ""),
        ("abcde", r"tensor e is named by pytorch_model\.bin\.index\.json but absent"),
        ("abc", "tensor d is not named by pytorch_model"),
    ):
        (bin_folder / BIN_INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "pytorch_model-1.bin")}))
        if message:
            with pytest.raises(CheckpointError, match=message):
                check(bin_folder)
        else:
            assert check(bin_folder).nbytes == 76


def zipped(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, compression: int = 0) -> None:
    with zipfile.ZipFile(path, "w", compression) as z:
        z.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            z.writestr(f"archive/data/{key}", data)


def test_a_malicious_pickle_is_named_and_not_run(bin_folder: Path, tmp_path: Path) -> None:
    import torch

    path, trace = bin_folder / "pytorch_model.bin", tmp_path / "trace"
    torch.save({"a": torch.zeros(3), "b": Evil(trace)}, path)
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: holds 'posix\.system', which could run code .*safetens"
    ):
        check(bin_folder)
    for protocol in range(6):
        zipped(path, pickle.dumps({"b": Evil(trace)}, protocol=protocol))
        with pytest.raises(
            CheckpointError, match=r"holds 'posix\.system'|uses [A-Z_0-9]+, which no file of tensors does"
        ):
            check(bin_folder)
        path.write_bytes(pickle.dumps({"b": Evil(trace)}, protocol=protocol))
        with pytest.raises(CheckpointError, match=r"bare pickle|no whole zip archive"):
            check(bin_folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()  # it would have run


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("
P = b"\x80\x02"


PICKLES = {
    "an allowed call with wrong arguments": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01tR.", "damaged"),
    "memory without end": (b"\x80\x02K\x01r\xff\xff\xff\xff.", "keeps entry 4294967295 after 0 others"),
    "no dictionary": (b"\x80\x02]q\0.", "holds no dictionary of tensors"),
    "a key nested deep": (P + b"})" + b"\x85" * 300_000 + b"K\x01s.", "keys are not names of tensors"),
    "an attribute set": (P + b"ctorch._utils\n_rebuild_parameter\n}b.", "attributes of what has none"),
    "a dictionary of a list": (P + b"ccollections\nOrderedDict\n]\x85R.", "made in an unusual way"),
    "a number for a tensor": (b"\x80\x02}X\x01\0\0\0aK\x01s.", "entry 'a' is not a tensor"),
    "cut": (b"\x80\x02}X\xff", "damaged"),
    "nothing": (b"", "damaged"),
    "a storage that is absent": (P + STORAGE.replace(b"\x000X", b"\x009X") + b".", "storage '9' is missing"),
    "a storage of another size": (P + STORAGE.replace(b"K\x04", b"K\x05") + b".", "has 16 bytes for 5 values"),
    "beyond its storage": (P + REBUILD + STORAGE + b"K\x01K\x04\x85K\x01\x85\x89NtR.", "reaches beyond its storage"),
    "a negative stride": (
        P + REBUILD + STORAGE + b"K\0K\x04\x85J\xff\xff\xff\xff\x85\x89NtR.",
        "damaged shape",
    ),
    "zero-size": (P + REBUILD + STORAGE + b"K\0K\0\x85K\x01\x85\x89NtR.", "which holds nothing"),
    "a class of ours called": (b"\x80\x02ctorch\nFloatStorage\n)R.", "damaged"),
    "eval": (b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R.", "holds 'builtins.eval'"),
    "a name with a line break": (b"\x80\x02X\x03\0\0\0a\nbq\0}h\0K\x01s.", r"entry 'a\\nb' is not a tensor"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles(bin_folder: Path, name: str) -> None:
    raw, message = PICKLES[name]
    zipped(bin_folder / "pytorch_model.bin", raw, {"0": bytes(16)})
    with pytest.raises(CheckpointError, match=message) as e:
        check(bin_folder)
    assert "\n" not in str(e.value) and "pytorch_model.bin" in str(e.value)


def test_mutated_pickles(bin_folder: Path) -> None:
    """Any error but our own would fail the test."""
    path = bin_folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as z:
        members = {n.split("/", 1)[1]: z.read(n) for n in z.namelist()}
    storages = {n.removeprefix("data/"): d for n, d in members.items() if n.startswith("data/")}
    rng, fine = random.Random(2), 0
    for _ in range(500):
        raw = bytearray(members["data.pkl"])
        for _ in range(rng.randint(1, 5)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
        zipped(path, bytes(raw), storages)
        with contextlib.suppress(CheckpointError):
            check(bin_folder)
            fine += 1
    assert fine < 450


def test_damaged_archives(bin_folder: Path) -> None:
    path = bin_folder / "pytorch_model.bin"
    whole = path.read_bytes()
    for n in range(0, len(whole), 37):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match="no whole zip archive"):
            check(bin_folder)
    rng = random.Random(1)
    for _ in range(300):  # any error but our own would fail the test
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        with contextlib.suppress(CheckpointError):
            check(bin_folder)
    zipped(path, b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        check(bin_folder)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("data.pkl", b"")
    with pytest.raises(CheckpointError, match=r"0 members data\.pkl"):
        check(bin_folder)
    with zipfile.ZipFile(path, "w") as z, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z.writestr("a/data.pkl", b"\x80\x02}.")
        z.writestr("a/data.pkl", pickle.dumps(Evil(path), 2))
    with pytest.raises(CheckpointError, match="a member stands twice"):
        check(bin_folder)
