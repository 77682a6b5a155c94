"""It does not break. Hundreds of damaged files and odd calls, each in a process of its own that has
only so much time and memory: it makes its picture, or ends in one line, exit code 2 and no file.
And a training that is killed at twenty moments becomes the same model as one that is not.

    python .ci/damage.py                     everything, in two processes: some minutes
    python .ci/damage.py --only weights      one group of cases
    python .ci/damage.py --one-of 30         every thirtieth case, and no kills

Prints a line for each group, and in full every case that failed; exit code 1 where one did. It
forks, and limits memory as Linux does.
"""
import argparse
import io
import itertools
import json
import math
import os
import random
import resource
import shlex
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import tiny_ldm
from test_tiny_ldm import (TINY, HostilePickle, LatentDiffusion, gradient, make_folder, same_model,
                           small_training, tiny_model)


# --------------------------------------------------------------------------------------------------
# The cases: what is in a file, or in a call, and should not be

class Case(NamedTuple):
    """Files to put into an empty folder, as bytes or as what makes them, and a call there."""
    name: str
    files: dict
    argv: list
    room: int | None = None              # bytes that a file may have: a disk that is full


ODD = [None, True, -1, 0, 0.5, 10**9, 10**30, -1e308, math.nan, "x", "", [], [0], [[-1]], {},
       "\ud800\n"]
DEEP = b"[" * 100_000
NO_FILES = {"folder": Path.mkdir, "pipe": getattr(os, "mkfifo", None), "nothing": Path.touch,
            "dangling": partial(Path.symlink_to, target="nowhere"),
            "endless": partial(Path.symlink_to, target="/dev/zero")}


def damages(data: bytes, ends: list[int], rng: random.Random) -> Iterator[tuple[str, object]]:
    """What is no file; and a file cut at its inner ends, with huge lengths there, with bits
    flipped, and doubled."""
    yield from NO_FILES.items()
    yield "doubled", data * 2
    for end in ends:
        for at in (max(0, end - 1), end, end + 1):
            yield f"cut at {at}", data[:at]
        yield f"huge at {end}", data[:end] + b"\xff" * 8 + data[end + 8 :]
    for near in [*ends, *rng.sample(range(len(data)), 8)]:
        at = min(near + rng.randrange(40), len(data) - 1)
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        yield f"bit flipped at {at}", bytes(flipped)


def odd_parts(tree: dict, rng: random.Random) -> Iterator[tuple[str, dict]]:
    """Copies of a dict in which one part, at any depth, is odd or missing."""
    for key, value in tree.items():
        for odd in rng.sample(ODD, 3):
            yield f"{key}={odd!r}", {**tree, key: odd}
        if isinstance(value, dict) and len(value) < 30:
            for name, odd in odd_parts(value, rng):
                yield f"{key}.{name}", {**tree, key: odd}
        yield f"no {key}", {name: other for name, other in tree.items() if name != key}


def odd_headers(header: dict, rng: random.Random) -> Iterator[tuple[str, dict]]:
    """One tensor is not as it should be, or the config, or the tokenizer."""
    meta = header["__metadata__"]
    for name in rng.sample([*header], 2):
        entry = header[name]
        for what, odd in odd_parts(entry, rng):
            yield f"{name}.{what}", {**header, name: odd}
        for dtype in ("I32", "F64", "F8_E4M3", "BOOL"):
            yield f"{name} {dtype}", {**header, name: {**entry, "dtype": dtype}}
    others = [("deep config", "config", DEEP.decode())]
    for what, odd in odd_parts(json.loads(meta["config"]), rng):
        others.append((what, "config", json.dumps(odd)))
    for what, odd in odd_tokenizers(json.loads(meta["tokenizer"])["model"]):
        others.append((what, "tokenizer", json.dumps({"model": odd})))
    for what, key, odd in others:
        yield what, {**header, "__metadata__": {**meta, key: odd}}


def odd_tokenizers(model: dict) -> Iterator[tuple[str, dict]]:
    """Tables that do not fit each other."""
    vocab = model["vocab"]
    for merges in ([["a", "zzz"]], ["a b", "c"], [1, 2], [[]], {"a": "b"}, None):
        yield f"merges {merges}", {"vocab": vocab, "merges": merges}
    for piece in (tiny_ldm.BOS, tiny_ldm.EOS, "a"):
        for number in (-1, 499, 10**6, 2**32, "1", None, 0.5):
            yield f"{piece}={number}", {**model, "vocab": {**vocab, piece: number}}


def weights_cases(good: Path, rng: random.Random) -> Iterator[Case]:
    data = (good / "tiny.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    contents = [*damages(data, [0, 8, end, len(data)], rng)]
    for name, odd in odd_headers(json.loads(data[8:end]), rng):
        head = json.dumps(odd).encode()
        contents.append((name, len(head).to_bytes(8, "little") + head + data[end:]))
    for name, content in contents:
        start = rng.choice(([], ["--image", good / "p.png"]))
        yield Case(name, {"w.safetensors": content}, [
            "a red circle", *start, "--weights", "w.safetensors", "--steps", 1, "-o", "x.png"])


def png_that_says(png: bytes, width: int, height: int, kind: int) -> bytes:
    """A PNG that is of another size or kind than it says."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return png[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png[33:]


def picture_cases(good: Path, rng: random.Random) -> Iterator[Case]:
    png = (good / "p.png").read_bytes()
    contents = [("png", "program", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n")]
    for says in ((30000, 30000, 2), (12000, 9000, 2), (2**31 - 1, 2**31 - 1, 2), (0, 0, 2),
                 (1, 2**20, 2), (32, 32, 3), (32, 32, 9)):
        contents.append(("png", str(says), png_that_says(png, *says)))
    for ending in ("png", "gif", "tiff", "jpeg", "webp", "bmp"):
        file = io.BytesIO()
        gradient(32, 32).save(file, ending)
        data = file.getvalue()
        for name, content in damages(data, [0, 8, 16, 33, len(data) // 2, len(data)], rng):
            contents.append((ending, name, content))
    for ending, name, content in contents:
        flags = rng.choice((["--image"], ["--image", good / "p.png", "--mask"]))
        yield Case(f"{ending} {name} {flags[-1]}", {f"i.{ending}": content}, [
            "a", *flags, f"i.{ending}", "--weights", good / "tiny.safetensors", "--steps", 1,
            "--width", 32, "--height", 32, "-o", "x.png"])


def line(name, text="a red circle") -> bytes:
    return json.dumps({"file_name": name, "text": text}).encode()


def training(good: Path, folder: str | Path) -> list:
    return ["--train", folder, "-o", "m.safetensors", "--weights", good / "tiny.safetensors",
            "--vae-steps", 1, "--unet-steps", 1, "--unet-batch", 2]


def folder_cases(good: Path, rng: random.Random) -> Iterator[Case]:
    png = (good / "p.png").read_bytes()
    folders = []
    for name, content in [*NO_FILES.items(), ("text", b"x"), ("bytes", b"\xff\xfe"), ("nul", b"\0"),
                          ("marked", b"\xef\xbb\xbfa"), ("long", b"red " * 10**6), ("deep", DEEP)]:
        folders.append((f"caption {name}", {"f/p.png": png, "f/p.txt": content}))
        folders.append((f"picture {name}", {"f/p.png": content, "f/p.txt": b"a"}))
        folders.append((f"list {name}", {"f/p.png": png, "f/metadata.jsonl": content}))
    lines = [line(name) for name in ("../f/p.png", "/dev/zero", "/dev/stdin", ".", "", "a" * 10**5,
                                     "\0", 5, ["p.png"], None, "\ud800", "\x1b[2J\n.png")]
    lines += [line("p.png", text) for text in (None, {"a": 1}, "\ud800", "\n\x1b[2J", 10**300)]
    lines += [b"{}", b"[]", b"0", b"null", b'"p.png"', b"{", b"1" * 10**5, b"\r\n\r\n"]
    for content in lines:
        folders.append((f"line {content[:60]}", {"f/p.png": png, "f/metadata.jsonl": content}))
    for name, files in folders:
        yield Case(name, files, training(good, "f"))


def checkpoint_cases(good: Path, rng: random.Random) -> Iterator[Case]:
    data = (good / "m.safetensors.checkpoint").read_bytes()
    state = torch.load(good / "m.safetensors.checkpoint")
    with zipfile.ZipFile(good / "m.safetensors.checkpoint") as archive:
        ends = [entry.header_offset for entry in archive.infolist()][::200]
        ends += [archive.start_dir, len(data) - 22]
    contents = [*damages(data, ends, rng)]
    states = [*odd_parts(state, rng), ("hostile", {**state, "x": HostilePickle()})]
    for part in ("averaged", "model"):
        key = rng.choice([*state[part]])
        for odd in (torch.zeros(3), None, "x"):
            states.append((f"{part}.{key}={odd}", {**state, part: {**state[part], key: odd}}))
    for name, odd in states:
        contents.append((name, partial(torch.save, odd)))
    for name, content in contents:
        yield Case(name, {"m.safetensors.checkpoint": content}, [
            "--train", good / "f", "-o", "m.safetensors", "--vae-steps", 2, "--unet-steps", 2,
            "--unet-batch", 2])


WORDS = ["", " ", "x", "nan", "inf", "-1", "0", "1e400", "1" * 5000, "\u0663", "/", "..", "cpu",
         "\n\x1b[2J", "/dev/null", "/dev/full/x.png", "/proc/x.png", "--", "a\udcff", "\u65e5.png",
         "x" * 300 + ".png", "--steps", "2.5", "meta"]


def call_cases(good: Path, rng: random.Random) -> Iterator[Case]:
    """Every flag with odd words, and without one; and odd prompts."""
    make = ["a red circle", "--weights", good / "tiny.safetensors", "--steps", 1, "-o", "x.png"]
    names = [*vars(tiny_ldm.parse_args(["a"]))]
    names.remove("compile")                        # takes more memory than there is here
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        for given in ([flag], *([flag, word] for word in rng.sample(WORDS, 6))):
            base = make
            if "_steps" in name or rng.random() < 0.3:
                base = training(good, good / "f")
            yield Case(f"{base[0]} {given}"[:60], {}, base + given)
    for prompt in ("\x00", "\x1b[2J", "\u202e\u2066", "\ud800", "\U0001d49c" * 70, "a\u0301" * 100,
                   "\ufeff", "-", "/../x", "{", "%s%n", "a" * 2**20, "red " * 2**18,
                   "<|endoftext|>" * 99):
        yield Case(f"prompt {prompt[:20]!r}", {}, [prompt, *make[1:-2]])
        yield Case(f"not {prompt[:20]!r}", {}, [*make, f"--negative-prompt={prompt}"])


def full_disk_cases(good: Path, rng: random.Random) -> Iterator[Case]:
    make = ["a red circle", "--weights", good / "tiny.safetensors", "--steps", 9, "-o", "x.png"]
    yield Case("picture", {}, [*make, "--width", 256], room=2**12)
    yield Case("film", {}, [*make, "--film", "f.png"], room=2**12)
    yield Case("training", {}, training(good, good / "f"), room=2**16)


CASES = {"weights": weights_cases, "pictures": picture_cases, "folders": folder_cases,
         "checkpoints": checkpoint_cases, "calls": call_cases, "full-disk": full_disk_cases}


# --------------------------------------------------------------------------------------------------
# How they end

def forked(call: Callable[[], int], log, room: int | None = None) -> int:
    """Starts a call in a process of its own, with only so much more memory and time, and files of
    only so many bytes; its output goes to a file. Returns its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (memory + 2**29,) * 2)
        signal.alarm(120)
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Waits for a process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tried(case: Case) -> tuple[int, str]:
    """(exit code, "" or what is wrong with how the call ended)."""
    argv = [str(word) for word in case.argv]
    with tempfile.TemporaryDirectory() as d, tempfile.TemporaryFile() as log:
        os.chdir(d)
        for name, content in case.files.items():
            Path(name).parent.mkdir(exist_ok=True)
            if callable(content):
                content(Path(name))
            else:
                Path(name).write_bytes(content)
        before = set(Path(".").rglob("*"))
        code = ended(forked(partial(tiny_ldm.main, argv), log, case.room))
        new = {path.name for path in set(Path(".").rglob("*")) - before}
        os.chdir("/")
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
    # A picture is whole when its name is printed, whatever happens to the film
    lines = [line for line in said.splitlines() if line not in new]
    notes = [line for line in lines if line.startswith("tiny_ldm: ")]
    good = "Traceback" not in said and not any(name.endswith(".part") for name in new)
    if code == 0:
        good = good and new & set(said.splitlines())
    if code == 2:
        good = good and notes and notes == lines and new <= set(said.splitlines())
    if good and code in (0, 2):
        return code, ""
    return code, f"exit code {code}, new files {new}\n{shlex.join(argv)[:2000]}\n{said}"


def prepare() -> None:
    """Makes this process safe to fork, and training in it small."""
    torch.set_num_threads(1)                       # forking is safe where no other threads are,
    tiny_ldm.tqdm.monitor_interval = 0             # nor that of a progress bar, whose lock must
    tiny_ldm.tqdm.set_lock(threading.RLock())      # not be one that a killed process holds for all
    tiny_ldm.tqdm = partial(tiny_ldm.tqdm, file=io.StringIO())
    tiny_ldm.train_model.__kwdefaults__.update(config=TINY, vae_batch=2, device="cpu")


def make_good_files(folder: Path) -> None:
    """A small file of each kind that is as it should be."""
    gradient(32, 32).save(folder / "p.png")
    make_folder(folder / "f", 1)
    tiny_model().save(folder / "tiny.safetensors")
    small_training(folder / "f", folder / "m.safetensors", unet_batch=2)


def try_some(good: Path, group: str, first: int, every: int) -> list[tuple[str, int, str]]:
    """Every so-many-th case of a group: (name, exit code, what is wrong)."""
    cases = CASES[group](good, random.Random(group))
    return [(case.name, *tried(case)) for case in itertools.islice(cases, first, None, every)]


KILLED = dict(vae_steps=40, vae_batch=2, unet_steps=40, save_minutes=0)


def kill_training(good: Path) -> tuple[str, str]:
    """Trains until killed, twenty times, and then to the end: (what happened, what is wrong)."""
    folder, rng, left = good / "killed", random.Random(0), 0
    folder.mkdir()

    def train() -> int:
        small_training(good / "f", folder / "m.safetensors", **KILLED)
        return 0

    def halves() -> set[Path]:
        return set(folder.glob(".*checkpoint*.part"))

    with open(good / "log", "w") as log:
        for i in range(20):
            known, pid = halves(), forked(train, log)
            if i % 2:                    # every second one dies while a checkpoint is written
                look = os.WEXITED | os.WNOHANG | os.WNOWAIT
                while halves() <= known and not os.waitid(os.P_PID, pid, look):
                    time.sleep(0.0002)
            else:
                time.sleep(rng.uniform(0, 0.5))
            os.kill(pid, signal.SIGKILL)
            assert ended(pid) in (0, -signal.SIGKILL), (good / "log").read_text()
            left += not halves() <= known
        finished = ended(forked(train, log)) == 0
    happened = f"20 of one training, {left} of which left half a checkpoint"
    if not finished or left < 5:
        return happened, (good / "log").read_text()
    through = small_training(good / "f", good / "through.safetensors", **KILLED)
    same = same_model(through, LatentDiffusion.load(folder / "m.safetensors", "cpu"))
    return happened, "" if same else "the model is not that of an uninterrupted training"


def report(line: str, failures: list[str]) -> int:
    """Prints a group's line and its failures; returns how many there are."""
    print(f"{line}, {len(failures)} failed", *failures, sep="\n", flush=True)
    return len(failures)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tries damaged files, odd calls, and kills.")
    parser.add_argument("--only", choices=[*CASES, "kills"], help="one group")
    parser.add_argument("--one-of", type=int, default=1, metavar="N",
                        help="every N-th case of each group, and no kills")
    args = parser.parse_args(argv)
    groups = [group for group in CASES if args.only in (None, group)]
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    with (tempfile.TemporaryDirectory() as d,
          ProcessPoolExecutor(2, get_context("spawn"), initializer=prepare) as pool):
        good, failed, every = Path(d), 0, 2 * args.one_of
        pool.submit(make_good_files, good).result()
        tries = {group: [pool.submit(try_some, good, group, first, every)
                         for first in (0, args.one_of)] for group in groups}
        for intact in (["a", "--weights", good / "tiny.safetensors", "--steps", 1, "-o", "x.png"],
                       training(good, good / "f")):
            ending = pool.submit(tried, Case("intact", {}, intact)).result()
            failed += report("intact", [str(ending)] if ending != (0, "") else [])
        for group, halves in tries.items():
            rows = [row for half in halves for row in half.result()]
            failures = [f"{name}: {wrong}" for name, _, wrong in rows if wrong]
            refused = [code for _, code, _ in rows].count(2)
            if refused < len(rows) / 4:
                failures.append("fewer than a quarter were refused")
            failed += report(f"{group}: {len(rows)} cases, {refused} refused", failures)
        if args.only == "kills" or (args.only is None and args.one_of == 1):
            happened, wrong = pool.submit(kill_training, good).result()
            failed += report(f"kills: {happened}", [wrong] if wrong else [])
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
