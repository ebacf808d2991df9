#!/usr/bin/env python3
"""How fast conversions are, and how much memory they take, on this machine.

    bench_convert.py SOURCE.gguf [--rounds 3] [--threads N]     methods; end to end against llama-quantize
    bench_convert.py --memory [--layers 80]                     peak memory on a sharded checkpoint made for it

The first: Mweights/s of one core by method on a real matrix; then ptqtp-gguf convert and llama-quantize to Q4_0, Q4_K_M
and IQ4_XS on the same file in turn, best of the rounds, and what reading, quantizing and writing take by themselves.
The second makes a Llama checkpoint of random weights larger than the bound of 6 x largest tensor (F32) + 600 MB, and
samples the memory of all processes of a conversion.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.files.gguf import FLOAT_IDS, Reader
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.quantize.pieces import to_float

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))
import demo_model

console = Console(highlight=False)
STOCK = ("Q4_0", "Q4_K_M", "IQ4_XS")
GROUPS = 1 << 22  # weights of the matrix that methods are timed on


def best(call, rounds: int) -> float:  # type: ignore[no-untyped-def]
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def methods(source: Path, rounds: int) -> None:
    """Mweights/s of one thread, on the largest block matrix of a file."""
    with Reader(source) as r:
        t = max((t for t in r.tensors if t.name.startswith("blk.") and t.type in FLOAT_IDS), key=lambda t: t.n_weights)
        raw = r.bytes_of(t)
        w = to_float(raw, t.type)
        w = np.ascontiguousarray(w[: max(1, GROUPS // w.shape[1])])
        raw = np.ascontiguousarray(raw[: len(w)])
    table = Table("one thread", "Mweights/s", title=f"{t.name}, {w.shape[0]} x {w.shape[1]}")
    packed = native.quantize(TP2_1, "search", w, threads=1)
    calls = {
        "TP2_1 search": lambda: native.quantize_stats(TP2_1, "search", w, threads=1),
        "TP2_0 search": lambda: native.quantize_stats(TP2_0, "search", w, threads=1),
        "TP2_0 paper": lambda: native.quantize_stats(TP2_0, "paper", w, threads=1),
        "Q8_0": lambda: native.to_q8_0(w, 1),
        f"{t.type_name} to float": lambda: native.to_float(t.type, raw, 1),
        "look at values": lambda: native.scan(w.reshape(-1), 32, 1e-4, 1),
        "checksum": lambda: native.float_hash(w.reshape(-1), 0, 1),
        "check TP2_1 (second decoder)": lambda: native.check(TP2_1, packed, 0, 1),
    }
    for name, call in calls.items():
        if w.shape[1] % 128 == 0 or "TP2_0" not in name:
            table.add_row(name, f"{w.size / 1e6 / best(call, rounds + 2):.1f}")
    console.print(table)


def timed(command: list[str]) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak memory in bytes of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, peak, _, _ = peak_of(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def end_to_end(source: Path, rounds: int, threads: int) -> None:
    convert = str(Path(sys.executable).with_name("ptqtp-gguf"))
    with tempfile.TemporaryDirectory(dir=source.parent) as name:
        out = Path(name) / "out.gguf"
        commands = {"TP2_1 search": [convert, "convert", str(source), str(out), "-q", "-f", "-j", str(threads)]}
        for kind in STOCK:
            commands[kind] = [str(install.tool("llama-quantize")), str(source), str(out), kind, str(threads)]
        results: dict[str, list[tuple[float, float, int]]] = {k: [] for k in commands}
        sizes = {}
        for _ in range(rounds):
            for kind, command in commands.items():
                results[kind].append(timed(command))
                sizes[kind] = out.stat().st_size
                out.unlink()
        alone = parts(source, Path(name), rounds, threads)
    table = Table("", "s", "CPU s", "peak MB", "file MB", title=f"{source.name}, {threads} threads, best of {rounds}")
    for kind, runs in results.items():
        fastest = min(runs)
        peak = max(r[2] for r in runs)
        table.add_row(kind, f"{fastest[0]:.2f}", f"{fastest[1]:.1f}", f"{peak / 1e6:.0f}", f"{sizes[kind] / 1e6:.1f}")
    console.print(table)
    ours = min(results["TP2_1 search"])[0]
    bound = alone["read"] + alone["write"] + 1.5 * alone["quantize"]
    text = ", ".join(f"{k} {v:.2f} s" for k, v in alone.items())
    console.print(
        f"by themselves: {text}; read + write + 1.5 x quantize = {bound:.2f} s; whole conversion {ours:.2f} s"
    )


def parts(source: Path, folder: Path, rounds: int, threads: int) -> dict[str, float]:
    """Seconds of reading the source, of quantizing in memory, and of writing and syncing as many bytes as come out."""

    def read() -> None:
        with open(source, "rb", buffering=0) as f:
            buffer = np.empty(1 << 24, np.uint8)
            while f.readinto(buffer.data):
                pass

    def quantize() -> None:
        with Reader(source) as r:
            for t in r.tensors:
                if len(t.shape) > 1 and t.shape[0] % 32 == 0:
                    data = r.bytes_of(t)
                    for first in range(0, len(data), step := max(1, GROUPS // t.shape[0])):
                        w = to_float(np.ascontiguousarray(data[first : first + step]), t.type, threads)
                        started = time.perf_counter()
                        if t.name.startswith("blk."):
                            out = native.quantize(TP2_1, "search", w, threads=threads)
                        else:
                            out = native.to_q8_0(w, threads)
                        total[0] += time.perf_counter() - started
                        total[1] += out.nbytes

    quantized = []
    for _ in range(rounds):
        total = [0.0, 0]
        quantize()
        quantized.append(total[0])
    block = np.zeros(1 << 24, np.uint8)

    def write() -> None:
        with open(folder / "w", "wb", buffering=0) as f:
            for _ in range(0, int(total[1]), block.size):
                f.write(block.data)
            os.fsync(f.fileno())

    return {"read": best(read, rounds), "quantize": min(quantized), "write": best(write, rounds)}


# ---- memory ----


def checkpoint(folder: Path, layers: int) -> Path:
    """A sharded Llama checkpoint of random bf16 weights with the demo model's tokenizer, written shard by shard."""
    import torch
    import transformers
    from safetensors.torch import save_file

    demo = demo_model.ensure(Path("build/demo"))
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    shapes.pop("lm_head.weight", None)
    generator = torch.Generator().manual_seed(1)
    names = {k: f"layer {k.split('.')[2]}" if ".layers." in k else "rest" for k in shapes}
    order = list(dict.fromkeys(names.values()))
    weight_map: dict[str, str] = {}
    for i, group in enumerate(order):
        shard = f"model-{i + 1:05d}-of-{len(order):05d}.safetensors"
        tensors = {}
        for k in (k for k, g in names.items() if g == group):
            shape = shapes[k]
            tensors[k] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            tensors[k] = tensors[k].to(torch.bfloat16)
            weight_map[k] = shard
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def rss_of_tree(pid: int) -> dict[int, tuple[int, int]]:
    """Resident bytes of a process and its children, in all and without mapped files, by process id."""
    found: dict[int, tuple[int, int]] = {}
    waiting = [pid]
    while waiting:
        p = waiting.pop()
        try:
            status = dict(x.split(":", 1) for x in Path(f"/proc/{p}/status").read_text().splitlines())
            waiting += [int(c) for c in Path(f"/proc/{p}/task/{p}/children").read_text().split()]
            found[p] = (int(status["VmRSS"].split()[0]) << 10, int(status["RssAnon"].split()[0]) << 10)
        except (OSError, KeyError):
            continue
    return found


def peak_of(command: list[str]) -> tuple[float, int, int, dict[int, int]]:
    """Runs a command. Seconds; peak bytes of all its processes together, the same without files; peak of each."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = [0, 0]
    each: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            now = rss_of_tree(process.pid)
            peak[0] = max(peak[0], sum(a for a, _ in now.values()))
            peak[1] = max(peak[1], sum(b for _, b in now.values()))
            for p, (a, _) in now.items():
                each[p] = max(each.get(p, 0), a)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    code = process.wait()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}")
    return seconds, peak[0], peak[1], each


def memory(layers: int) -> None:
    convert = str(Path(sys.executable).with_name("ptqtp-gguf"))
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoint(Path(name) / "model", layers)
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        largest = 49152 * 1024 * 4
        bound = 6 * largest + 600e6
        shards = len(list(folder.glob("*.safetensors")))
        console.print(f"checkpoint: {size / 1e6:.0f} MB in {shards} shards; bound {bound / 1e6:.0f} MB")
        table = Table("", "s", "peak MB, all processes", "without mapped files", "peak MB of each")
        out = Path(name) / "out.gguf"
        bf16 = Path(name) / "bf16.gguf"
        for title, command in {
            "checkpoint, one pass": [convert, "convert", str(folder), str(out)],
            "the same, --max-memory 1500M": [convert, "convert", str(folder), str(out), "--max-memory", "1500M"],
            "checkpoint, by way of a bf16 GGUF": [convert, "convert", str(folder), str(out), "--keep-bf16", str(bf16)],
            "that bf16 GGUF": [convert, "convert", str(bf16), str(out)],
            "the same, --max-memory 200M": [convert, "convert", str(bf16), str(out), "--max-memory", "200M"],
        }.items():
            seconds, peak, anon, each = peak_of([*command, "-q"])
            out.unlink()
            processes = " + ".join(f"{p / 1e6:.0f}" for p in each.values())
            table.add_row(title, f"{seconds:.1f}", f"{peak / 1e6:.0f}", f"{anon / 1e6:.0f}", processes)
        console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--layers", type=int, default=80)
    args = parser.parse_args()
    if not args.memory and not args.source:
        parser.error("give a GGUF file, or --memory")
    if args.source:
        methods(args.source, args.rounds)
        end_to_end(args.source, args.rounds, args.threads)
    if args.memory:
        memory(args.layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
