"""Damaged GGUF files through the patched llama.cpp: loader with --check-tensors, context, two tokens.

    python tools/fuzz/fuzz_loader.py [--seconds S] [--seed N] [--corpus FOLDER] [--replay FILE]

A tiny sound model of ours is damaged at random, in its header or in its data, and loaded in a child process of its own
with limits on memory and time. It must be refused or run; a signal or more than 5 s is a finding, and so are rows that
no packer writes and that are taken. Where upstream ends the process by an assertion of its own, in a file that is not
ours, it is counted by itself: a hostile file can end the process there, but not go on in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.types import TYPES
from ptqtp_gguf.files.gguf import KV, OutTensor, Reader, kv_list, kv_scalar, kv_string, kv_u32, write_stream
from ptqtp_gguf.files.gguf_values import ARRAY, FLOAT32, INT32, STRING

SECONDS, MEMORY = 5, 6 << 30
LOADED, REFUSED = 0, 3
WIDTH, VOCAB = 128, 40
SPECIAL = [0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0x80000000, (1 << 63) - 1, (1 << 64) - 1]


def model(path: Path, block_type: int) -> None:
    """A random Llama of one layer whose matrices are of our type."""
    rng = np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *(chr(65 + i) for i in range(VOCAB - 3))]
    raw = b"".join(struct.pack("<Q", len(t)) + t.encode("ascii") for t in tokens)
    kvs = [
        kv_string("general.architecture", "llama"),
        kv_u32("ptqtp.format_version", TYPES[block_type].since),
        *(
            kv_u32(f"llama.{k}", v)
            for k, v in (
                ("context_length", 64),
                ("embedding_length", WIDTH),
                ("block_count", 1),
                ("feed_forward_length", WIDTH),
                ("attention.head_count", 2),
                ("attention.head_count_kv", 2),
                ("rope.dimension_count", 64),
            )
        ),
        kv_scalar("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        kv_string("tokenizer.ggml.model", "llama"),
        KV("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, VOCAB) + raw),
        KV("tokenizer.ggml.scores", ARRAY, struct.pack(f"<IQ{VOCAB}f", FLOAT32, VOCAB, *[-1.0] * VOCAB)),
        kv_list("tokenizer.ggml.token_type", INT32, [2, 3, 3, *[1] * (VOCAB - 3)]),
        kv_u32("tokenizer.ggml.bos_token_id", 1),
        kv_u32("tokenizer.ggml.eos_token_id", 2),
    ]
    matrices = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    rows = {f"blk.0.{name}.weight": WIDTH for name in matrices} | {"token_embd.weight": VOCAB, "output.weight": VOCAB}
    tensors = [OutTensor(name, (WIDTH, n), block_type) for name, n in rows.items()]
    norms = [
        OutTensor(n, (WIDTH,), 0) for n in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    ]

    def data() -> list[np.ndarray]:
        made = []
        for t in tensors:
            w = rng.normal(0, 0.1, (t.shape[1], WIDTH)).astype(np.float32)
            made.append(native.quantize(TYPES[block_type], "search", w))
        return made + [np.ones((1, WIDTH), np.float32).view(np.uint8) for _ in norms]

    with open(path, "wb") as f:
        for _ in write_stream(f, kvs, [*tensors, *norms], 32, iter(data())):
            pass


def load(path: Path) -> int:
    """LOADED or REFUSED. Runs in the child."""
    import llama_cpp as llama

    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.check_tensors, params.load_mode, params.n_gpu_layers = True, llama.LLAMA_LOAD_MODE_NONE, 0
    loaded = llama.llama_model_load_from_file(str(path).encode(), params)
    if not loaded:
        return REFUSED
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = 32, 32, 1, 1
    context = llama.llama_init_from_model(loaded, settings)
    if not context:
        return REFUSED
    tokens = (llama.llama_token * 2)(1, 3)
    return LOADED if llama.llama_decode(context, llama.llama_batch_get_one(tokens, 2)) == 0 else REFUSED


def child(path: Path, log: Path) -> int:
    """Load in a process of its own. Returns its exit code, or minus a signal; -SIGALRM for too long."""
    pid = os.fork()
    if pid == 0:
        try:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(24 * SECONDS)
            os._exit(load(path))
        except BaseException:
            os._exit(REFUSED)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def damage(rng: random.Random, raw: bytes, header: int) -> tuple[bytes, bool]:
    """(a damaged copy, whether only tensors' bytes were touched)."""
    data = bytearray(raw)
    in_data = rng.random() < 0.3
    first, last = (header, len(data)) if in_data else (0, header)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(first, last)
        choice = rng.randrange(5)
        if choice == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif choice == 1:
            data[at] = rng.randrange(256)
        elif choice == 2:
            width = rng.choice([1, 2, 4, 8])
            value = rng.choice(
                [0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0x80000000, (1 << 63) - 1, (1 << 64) - 1, rng.getrandbits(64)]
            )
            data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif choice == 3 and not in_data:
            del data[at : at + rng.randint(1, 9)]
        elif not in_data:
            data[at:at] = data[at : at + rng.randint(1, 40)]
        else:
            data[at : at + 14] = rng.randbytes(len(data[at : at + 14]))
    if rng.random() < 0.1:
        del data[rng.randrange(first, len(data)) :]
        in_data = False
    return bytes(data[: len(raw)] if in_data else data), in_data


def sound_rows(path: Path) -> bool:
    """Whether every row of our types is one that a packer writes."""
    with Reader(path) as reader:
        return all(
            native.first_bad_block(TYPES[t.type], reader.bytes_of(t)) is None for t in reader.tensors if t.type in TYPES
        )


def reason(code: int, log: Path) -> str:
    text = log.read_text(errors="replace")
    asserted = re.findall(r"[^\s/]+\.(?:cpp|c|h):\d+: [^\n]{1,120}", text)
    name = "too long" if -code in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL) else signal.Signals(-code).name
    return f"{name}: {asserted[-1] if asserted else 'no word'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="of computing (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz/corpus"))
    parser.add_argument("--replay", type=Path, help="load this file, and say what came of it")
    args = parser.parse_args()
    import llama_cpp  # noqa: F401  # once, in the parent

    findings_folder = args.corpus.parent / "findings"
    findings_folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    ended: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    upstream: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        path, log = Path(scratch, "x.gguf"), Path(scratch, "log")
        if args.replay:
            code = child(args.replay.resolve(), log)
            print(log.read_text(errors="replace")[-3000:], reason(code, log) if code < 0 else code)
            return int(code < 0)
        models = []
        for block_type in TYPES:
            model(path, block_type)
            if (code := child(path, log)) != LOADED:
                print(f"error: the sound model does not load: {code}", log.read_text(errors="replace")[-2000:])
                return 2
            with Reader(path) as reader:
                models.append((path.read_bytes(), reader.header.data_offset))
        end = cpu() + args.seconds
        while cpu() < end:
            raw, only_data = damage(rng, *rng.choice(models))
            path.write_bytes(raw)
            code = child(path, log)
            what = ""
            if code < 0:
                what = reason(code, log)
                if code == -signal.SIGABRT and not what.endswith("no word") and "ptqtp" not in what:
                    upstream[what.removeprefix("SIGABRT: ")] += 1
                    what = ""
            elif code == LOADED and only_data and not sound_rows(path):
                what = "loaded rows that no packer writes"
            ended["loaded" if code == LOADED else "refused" if code > 0 else "killed"] += 1
            if what:
                if what not in findings:
                    (findings_folder / f"loader-{len(findings)}.gguf").write_bytes(raw)
                findings[what] += 1
    found = [f"{what} ({n} times)" for what, n in findings.most_common()]
    result = {"target": "loader", "runs": ended.total(), **ended, "findings": found, "upstream_aborts": upstream}
    print(json.dumps(result), flush=True)
    return 1 if found else 0


def cpu() -> float:
    """Seconds that this process and its children computed."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


if __name__ == "__main__":
    sys.exit(main())
