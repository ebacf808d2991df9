#!/usr/bin/env python3
"""How much memory loading takes, and how long, on this machine.

    bench_load.py MODEL.gguf ... [--rounds 5] [--python OTHER/bin/python ...] [--rpc HOST:PORT] [--mode MODE]

Each round opens each file once with each interpreter (this one, unless told: those of a build before and one after),
once with the file in the system's cache and once without. Of the rounds the table has the shortest time to load, and
the largest peak (VmHWM) of a process that imports the bindings alone: after loading, and after a context of 2048
tokens and two batches. A split file is told by its first part. --rpc gives all layers to that server. --mode is
llama.cpp's --load-mode: auto, none, mmap, mlock, mmap+mlock, dio.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONTEXT, THREADS = 2048, 2


def peak() -> int:
    """Bytes at the peak of this process, mapped files counted."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10


def child(path: str, server: str, mode: str) -> dict[str, float]:
    """Opens the file and evaluates nine tokens: load_s, first_s (seconds), loaded, used, kv (bytes)."""
    import llama_cpp as lib

    if server:
        from ptqtp_gguf.llamacpp import model

        model.use_servers([server])
    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 99 if server else 0
    params.load_mode = lib.llama_load_mode_from_str(mode.encode())
    start = time.perf_counter()
    model = lib.llama_model_load_from_file(path.encode(), params)
    loaded, after = time.perf_counter(), peak()
    if not model:
        sys.exit(f"cannot load {path}")
    how = lib.llama_context_default_params()
    how.n_ctx, how.n_threads, how.n_threads_batch = CONTEXT, THREADS, THREADS
    context = lib.llama_init_from_model(model, how)
    begin = time.perf_counter()
    for count in (8, 1):
        tokens = (ctypes.c_int32 * count)(*range(100, 100 + count))
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, count)):
            sys.exit(f"cannot evaluate {path}")
    end, used = time.perf_counter(), peak()
    row = lib.llama_model_n_embd(model) // lib.llama_model_n_head(model) * lib.llama_model_n_head_kv(model)
    kv = 2 * 2 * CONTEXT * row * lib.llama_model_n_layer(model)  # K and V, fp16
    lib.llama_free(context)
    lib.llama_model_free(model)  # an rpc-server must hear that its client ends
    return {"load_s": loaded - start, "first_s": end - begin, "loaded": after, "used": used, "kv": kv}


def parts(first: Path) -> list[Path]:
    """The file, or all parts of a split one."""
    found = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", first.name)
    return sorted(first.parent.glob(f"{found[1]}-?????-of-{found[2]}.gguf")) if found else [first]


def forget(files: list[Path]) -> None:
    """Take the files out of the system's cache, as far as nobody has them mapped."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*json.loads(sys.argv[2]))))
        return
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", action="append", default=[], help="an interpreter whose llama_cpp loads")
    parser.add_argument("--rpc", default="", metavar="HOST:PORT")
    parser.add_argument("--mode", default="auto")
    args = parser.parse_args()
    pythons = args.python or [sys.executable]
    runs: dict[tuple[Path, bool, str], list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for path in args.files:
            for cold in (False, True):
                for python in pythons:
                    if cold:
                        forget(parts(path))
                    what = json.dumps([str(path), args.rpc, args.mode])
                    command = [python, __file__, "--child", what]
                    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                    runs.setdefault((path, cold, python), []).append(json.loads(done.stdout))
    columns = "file", "MB", "cache", "runtime", "load s", "first batches s", "peak MB, loaded", "in use", "KV MB"
    print(f"| {' | '.join(columns)} | (peak - KV) / file |")
    print("|" + "---|" * (len(columns) + 1))
    for (path, cold, python), rows in runs.items():
        size = sum(p.stat().st_size for p in parts(path))
        load, first = (min(r[k] for r in rows) for k in ("load_s", "first_s"))
        loaded, used, kv = (max(r[k] for r in rows) for k in ("loaded", "used", "kv"))
        megabytes = " | ".join(f"{n / 1e6:.0f}" for n in (loaded, used, kv))
        print(
            f"| {path.name} | {size / 1e6:.0f} | {'cold' if cold else 'warm'} | {pythons.index(python) + 1} "
            f"| {load:.2f} | {first:.2f} | {megabytes} | {(used - kv) / size:.2f} |"
        )


if __name__ == "__main__":
    main()
