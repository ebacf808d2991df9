"""Checkpoint folders that are incomplete, damaged or hostile: named before a weight is read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from helpers import safetensors_bytes

from ptqtp_gguf.errors import CheckpointError, InputError
from ptqtp_gguf.source.checkpoint import INDEX, check, is_gguf, shard_tensors, stamp

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


def entry(**changes: object) -> dict:
    return {"a": {**GOOD["a"], **changes}}


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


def test_a_good_folder(folder: Path) -> None:
    found = check(folder)
    assert (found.architecture, found.nbytes, [s.name for s in found.shards]) == (
        "LlamaForCausalLM",
        30,
        ["one.safetensors", "two.safetensors"],
    )
    (folder / INDEX).unlink()
    (folder / "one.safetensors").rename(folder / "model.safetensors")
    assert check(folder).nbytes == 22


HEADERS = {
    "2^60 bytes of header": (struct.pack("<Q", 1 << 60) + b"{}", "claims 1152921504606846976 bytes"),
    "four bytes": (b"\x01\0\0\0", "damaged or truncated"),
    "not JSON": (safetensors_bytes(b"{nope"), "not valid JSON"),
    "deep JSON": (safetensors_bytes(b'{"a":' * 200_000), "not valid JSON"),
    "a list": (safetensors_bytes([1]), "not a JSON object"),
    "not UTF-8": (safetensors_bytes(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "name twice": (safetensors_bytes(b'{"a": {}, "a": {}}'), "'a' stands twice"),
    "no entry": (safetensors_bytes({"a": 3}), "tensor a: damaged header entry"),
    "dtype": (safetensors_bytes(entry(dtype="F3"), bytes(16)), "dtype 'F3', which llama.cpp's converter does not read"),
    "dtype is a list": (safetensors_bytes(entry(dtype=[]), bytes(16)), r"dtype \[\], which"),
    "dtype of other machines": (safetensors_bytes(entry(dtype="U32"), bytes(16)), "dtype 'U32', which"),
    "zero-size": (safetensors_bytes(entry(shape=[0, 4], data_offsets=[0, 0])), "tensor a: shape .* holds nothing"),
    "zero hides a product": (
        safetensors_bytes(entry(shape=[1 << 62, 0, 1 << 62], data_offsets=[0, 0])),
        "which holds nothing",
    ),
    "a million dimensions": (safetensors_bytes(entry(shape=[9] * 10**6), bytes(16)), "damaged shape"),
    "99 MB of garbage": (safetensors_bytes(b"{" + b"\x13" * 99_000_000), "not valid JSON"),
    "99 MB of a list": (safetensors_bytes(b"[" + b"1," * 49_000_000), "not a JSON object"),
    "empty": (b"", "damaged or truncated: the header claims 0 bytes, the file has 0"),
    "name of a megabyte": (
        safetensors_bytes({"a\n" * 500_000: {"dtype": "F3"}}),
        r"tensor (a\?)+a\.\.\.: dtype",
    ),
    "name twice, of a megabyte": (
        safetensors_bytes(b'{"%s": 1, "%s": 2}' % (b"a" * 10**6, b"a" * 10**6)),
        r"'a+\.\.\.' stands twice",
    ),
    "negative shape": (safetensors_bytes(entry(shape=[-2, -2]), bytes(16)), "damaged shape"),
    "shape of floats": (safetensors_bytes(entry(shape=[2.0, 2]), bytes(16)), "damaged shape"),
    "shape of bools": (safetensors_bytes(entry(shape=[True, 4]), bytes(16)), "damaged shape"),
    "huge shape": (safetensors_bytes(entry(shape=[1 << 62, 1 << 62]), bytes(16)), "16 bytes for shape"),
    "offsets swapped": (safetensors_bytes(entry(data_offsets=[16, 0]), bytes(16)), "truncated: data at 16..0"),
    "offsets beyond": (safetensors_bytes(entry(data_offsets=[0, 1 << 50]), bytes(16)), "truncated"),
    "cut in the middle": (safetensors_bytes(GOOD, bytes(20)), "tensor b: truncated"),
    "hole": (safetensors_bytes(entry(data_offsets=[4, 20]), bytes(20)), "expected 0"),
    "bytes left over": (safetensors_bytes(GOOD, bytes(40)), "40 bytes of data, 22"),
    "overlap": (
        safetensors_bytes({"a": GOOD["a"], "z": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}, bytes(16)),
        "tensor z starts at byte 8, expected 16",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_safetensors(name: str, tmp_path: Path) -> None:
    raw, message = HEADERS[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as e:
        shard_tensors(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_missing_shard(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard two\.safetensors is missing"):
        check(folder)


def test_index_names_an_absent_tensor(folder: Path) -> None:
    index(folder, {"a": "one.safetensors", "ghost": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor ghost is named by .* but absent"):
        check(folder)


def test_index_of_another_model(folder: Path) -> None:
    index(folder, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"one\.safetensors: tensor b is not named by model\.safetensors\.index"):
        check(folder)


def test_shard_cut_in_the_middle(folder: Path) -> None:
    shard = folder / "one.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(
        CheckpointError, match=r"one\.safetensors: tensor a: truncated: data at 0\.\.16, the file holds 12"
    ):
        check(folder)


def test_weights_beside_the_weights(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / "one.safetensors").rename(folder / "model.safetensors")
    (folder / "two.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors stands beside model\.safetensors"):
        check(folder)


@pytest.mark.parametrize("name", ["config.json", "one.safetensors", INDEX, "tokenizer.json"])
def test_symlink_loop(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: Too many levels of symbolic links"):
        check(folder)
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(InputError, match="loop: Too many levels of symbolic links"):
        is_gguf(folder / "loop")
    with pytest.raises(InputError, match="Too many levels of symbolic links"):
        stamp(folder / "loop")


@pytest.mark.parametrize("name", ["config.json", "one.safetensors", INDEX, "tokenizer.json", "pytorch_model.bin"])
@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_what_is_no_file_does_not_hang(folder: Path, name: str, what: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
        if name in ("tokenizer.json", "pytorch_model.bin"):
            check(folder)  # nobody reads it
            return
    with pytest.raises(CheckpointError, match=f"{name}: no regular file"):
        check(folder)
    if what != "folder":
        with pytest.raises(InputError, match="no regular file"):
            is_gguf(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["config.json", "one.safetensors", INDEX])
def test_unreadable_file(folder: Path, name: str) -> None:
    (folder / name).chmod(0)
    with pytest.raises(CheckpointError, match=f"{name}: Permission denied"):
        check(folder)


def test_stamp(folder: Path) -> None:
    before = stamp(folder)
    names = [name for name, _, _ in before]
    assert names == sorted(["config.json", INDEX, "one.safetensors", "two.safetensors"])
    assert dict((n, s) for n, s, _ in before)["one.safetensors"] == (folder / "one.safetensors").stat().st_size
    (folder / "out.gguf").write_bytes(b"ours")
    (folder / ".hidden.json").write_bytes(b"")
    (folder / "original").mkdir()
    assert stamp(folder) == before
    os.utime(folder / "one.safetensors", ns=(1, 2))
    assert ("one.safetensors", before[2][1], 2) in stamp(folder) and stamp(folder) != before
    (folder / "tokenizer.model").write_bytes(b"x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_bytes(b"x")
    assert len(stamp(folder)) == 6
    assert [n for n, _, _ in stamp(folder / "out.gguf")] == ["out.gguf"]
    with pytest.raises(InputError, match="absent: No such file"):
        stamp(folder / "absent")


def test_tensor_in_two_shards(folder: Path) -> None:
    (folder / "two.safetensors").write_bytes(safetensors_bytes(GOOD, bytes(22)))
    index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor a stands in both one\.safetensors and two\.safetensors"):
        check(folder)


@pytest.mark.parametrize("shard", ["../one.safetensors", "/etc/passwd", "..", "", 7, "x/one.safetensors"])
def test_index_cannot_lead_out_of_the_folder(folder: Path, shard: object) -> None:
    index(folder, {"a": shard})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        check(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no 'weight_map'"),
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"weight_map": []}', "weight_map"),
    ],
)
def test_damaged_index(folder: Path, text: str, message: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        check(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no 'architectures'"),
        ('{"architectures": []}', "no 'architectures'"),
        ("nope", "not valid JSON"),
        ('{"architectures": [3]}', "no 'architectures'"),
    ],
)
def test_damaged_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        check(folder)


def test_folders_that_are_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"found one\.safetensors, but no model\.safetensors\.index\.json"):
        check(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no safetensors and no pytorch_model\.bin"):
        check(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="an empty folder"):
        check(folder)
    (folder / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"config\.json: No such file .*; config.json names the architecture"):
        check(folder)
    with pytest.raises(CheckpointError, match="absent: no such folder"):
        check(tmp_path / "absent")


def test_what_a_path_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"GGUFxxxx")
    assert is_gguf(tmp_path / "a") and not is_gguf(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        is_gguf(tmp_path / "absent")
