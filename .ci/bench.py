"""Prints tables of speed and memory, each measured in one run.

    python .ci/bench.py unet      a guided step of Stable Diffusion 1.x, beside diffusers, OpenVINO
    python .ci/bench.py vae       the decoding of a 512 x 512 picture, beside the same
    python .ci/bench.py memory    of a 512 x 512 picture, and of loading
    python .ci/bench.py steps     the error against the network calls, beside diffusers' schedulers
    python .ci/bench.py shapes    the built-in model: pictures a second, cold start
    python .ci/bench.py train     pictures a second in training, with one process and two

`--device cuda` runs all but memory and steps on a GPU, `--rounds N` says how often each is measured,
and `--dtypes float32` limits the precisions. What is not installed (diffusers, transformers,
openvino) is left out. Weights are synthetic, so nothing is downloaded; 8 GB of disk are used on the
way.

Every engine is a process of its own that has loaded its model and waits. tiny_ldm and another take
turns, so that a slow minute of the machine hits both. Given are medians.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
GFLOP = {"unet": 1606.5, "vae": 2514.5}      # of one call; a multiplication and an addition count 2
# What tiny_ldm asks of glibc from inside, asked from outside
SAME_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


# --------------------------------------------------------------------------------------------------
# The engines: each a function that loads a model and returns what is to be timed, a call that
# returns its output

def inputs(part, dtype, device):
    """Of the U-Net: latents of one picture twice, timestep, context. Of the VAE: latents."""
    import torch
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=g).to(device, dtype)
    if part == "vae":
        return (normal(1, 4, 64, 64),)
    return normal(2, 4, 64, 64), torch.full((2,), 500, device=device), normal(2, 77, 768)


def tiny_ldm_engine(folder, part, dtype, device, compiled=False):
    import tiny_ldm
    ldm = tiny_ldm.LatentDiffusion.load(folder / "t.safetensors", device, dtype)
    if compiled:
        ldm.compile_networks()
    call = ldm.unet if part == "unet" else ldm.vae.decode
    arguments = inputs(part, dtype, device)
    return lambda: call(*arguments)


def diffusers_network(folder, part, dtype, device):
    import diffusers
    import torch
    kind = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
    network = kind.from_pretrained(folder / part, torch_dtype=dtype).to(device).eval()
    if part == "vae":
        network.forward = network.decode
    return network.to(memory_format=torch.channels_last if dtype != torch.float32
                      else torch.contiguous_format)


def diffusers_engine(folder, part, dtype, device, compiled=False):
    network = diffusers_network(folder, part, dtype, device)
    if compiled:
        network.compile()
    arguments = inputs(part, dtype, device)
    return lambda: network(*arguments).sample


def openvino_engine(folder, part, dtype, device):
    import openvino
    import torch
    network = diffusers_network(folder, part, torch.float32, "cpu")
    arguments = inputs(part, torch.float32, "cpu")
    model = openvino.convert_model(network, example_input=arguments)
    del network
    hint = {"INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16"}
    compiled = openvino.Core().compile_model(model, "CPU", hint)
    arrays = [a.numpy() for a in arguments]
    return lambda: torch.from_numpy(compiled(arrays)[0])


def ceiling_engine(shape):
    """A convolution or a matrix product of a size that the networks have: what this machine can."""
    def make(folder, part, dtype, device):
        import torch
        import torch.nn.functional as F
        if shape == "matrix product":
            a = torch.randn(4096, 4096, device=device, dtype=dtype)
            return lambda: [a @ a for _ in range(4)]
        x = torch.randn(2, 320, 64, 64, device=device, dtype=dtype)
        w = torch.randn(320, 320, 3, 3, device=device, dtype=dtype)
        x, w = (y.to(memory_format=torch.channels_last) for y in (x, w))
        return lambda: [F.conv2d(x, w, padding=1) for _ in range(32)]
    return make


CEILINGS = {"matrix product": 4 * 2 * 4096**3 / 1e9,
            "convolution": 32 * 2 * 2 * 64 * 64 * 320 * 320 * 9 / 1e9}


class Engine(NamedTuple):
    load: Callable
    devices: tuple = ("cpu", "cuda")
    needs: tuple = ()                # packages

    def is_there(self, device):
        return device in self.devices and all(map(find_spec, self.needs))


ENGINES = {
    "tiny_ldm": Engine(tiny_ldm_engine),
    "tiny_ldm --compile": Engine(partial(tiny_ldm_engine, compiled=True)),
    "diffusers as installed": Engine(diffusers_engine, needs=("diffusers",)),
    "diffusers, our allocator settings": Engine(diffusers_engine, ("cpu",), ("diffusers",)),
    # (on a CPU this would compile for an hour)
    "diffusers, compiled": Engine(partial(diffusers_engine, compiled=True), ("cuda",),
                                  ("diffusers",)),
    "OpenVINO": Engine(openvino_engine, ("cpu",), ("diffusers", "openvino")),
    **{name: Engine(ceiling_engine(name)) for name in CEILINGS}}


def work(engine, part, dtype, device, folder):
    """A process of an engine: says how long its first call took; then, for each line that comes in,
    how long one takes."""
    import torch
    from tiny_ldm import keep_freed_memory
    folder = Path(folder)
    with torch.no_grad():
        begin = time.perf_counter()
        call = ENGINES[engine].load(folder, part, getattr(torch, dtype), device)
        if engine in CEILINGS:
            keep_freed_memory()

        def seconds():
            begin = time.perf_counter()
            out = call()
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin, out

        _, out = seconds()
        first = time.perf_counter() - begin
        error, answer = 0.0, folder / f"{part}.{dtype}.pt"
        if engine == "tiny_ldm":
            torch.save(out.float().cpu(), answer)
        elif engine not in CEILINGS:          # everyone must compute the same
            wanted = torch.load(answer)
            error = ((out.float().cpu() - wanted).abs().max() / wanted.abs().max()).item()
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        print(f"ready {first} {error} {memory}", flush=True)
        for _ in sys.stdin:
            print(seconds()[0], flush=True)


# --------------------------------------------------------------------------------------------------
# The tables

def make_models(folder):
    """A diffusers folder with random weights of full size, and what weights_convert.py makes of
    it."""
    import torch
    import test_tiny_ldm as tests
    import weights_convert
    torch.manual_seed(0)
    with torch.no_grad():
        for model, name in zip(tests.reference_models(tests.SD1), ("text_encoder", "unet", "vae")):
            model.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    tables = json.loads(tests.small_tokenizer(77).backend.to_str())
    vocab = tables["model"]["vocab"]         # filled up to CLIP's size
    vocab.update({f"no word {i}": i for i in range(len(vocab), tests.SD1.text.vocab_size)})
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tables))
    if weights_convert.main([str(folder), "-o", str(folder / "t.safetensors")]):
        sys.exit("the conversion failed")


class Process:
    """An engine in its process."""

    def __init__(self, engine, *arguments):
        env = {**os.environ, **(SAME_ALLOCATOR if "allocator" in engine else {})}
        self.engine = engine
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--work", engine, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=env)

    def line(self):
        while line := self.process.stdout.readline():
            if re.match(r"ready |\d", line):
                return line
        sys.exit(f"{self.engine} failed:\n{self.process.stderr.read()}")

    def seconds(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.line())


class Result(NamedTuple):
    seconds: float
    first: float
    error: float
    memory: float


def in_turns(engines, part, dtype, args, folder):
    """{engine: Result}, of engines that take turns."""
    processes = []
    for engine in engines:
        processes.append(p := Process(engine, part, dtype, args.device, folder))
        p.ready = map(float, p.line().split()[1:])
    rounds = [[p.seconds() for p in processes] for _ in range(args.rounds)]
    for p in processes:
        p.process.kill()
        p.process.wait()
    return {p.engine: Result(statistics.median(column), *p.ready)
            for p, column in zip(processes, zip(*rounds))}


def compare(part, args, folder):
    """tiny_ldm beside one other at a time: all of them at once would need 30 GB of memory."""
    for dtype in args.dtypes:
        found = in_turns(["tiny_ldm", *CEILINGS], part, dtype, args, folder)
        speeds = {name: gflop / found[name].seconds for name, gflop in CEILINGS.items()}
        print(f"\n{part}, {dtype}, {args.device}: medians of {args.rounds}; ceiling: " + ", ".join(
            f"{name} {speed:.0f} GFLOP/s" for name, speed in speeds.items()) + "\n")
        on_gpu = args.device != "cpu"
        print("| | seconds | tiny_ldm's time over this | share of the ceiling | with loading, "
              "the first call | difference from tiny_ldm |" + " GPU memory |" * on_gpu)
        print("|---|---|---|---|---|---|" + "---|" * on_gpu)
        others = [name for name, e in ENGINES.items()
                  if e.is_there(args.device) and name not in ("tiny_ldm", *CEILINGS)]
        for other in ["tiny_ldm", *others]:
            if other != "tiny_ldm":
                found = in_turns(["tiny_ldm", other], part, dtype, args, folder)
            it = found[other]
            print(f"| {other} | {it.seconds:.3g} | {found['tiny_ldm'].seconds / it.seconds:.2f} | "
                  f"{100 * GFLOP[part] / it.seconds / max(speeds.values()):.0f} % | {it.first:.0f} "
                  f"s | {it.error:.1e} |" + f" {it.memory / 1e9:.2f} GB |" * on_gpu, flush=True)


PICTURE = {"tiny_ldm": """
import sys, torch, tiny_ldm
file, dtype = sys.argv[1] + "/t.safetensors", getattr(torch, sys.argv[2])
ldm = tiny_ldm.LatentDiffusion.load(file, "cpu", dtype)
ldm.generate("", "", steps=2, progress=False)
""", "diffusers": """
import sys, torch, diffusers, transformers
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
text = transformers.CLIPTextModel.from_pretrained(folder + "/text_encoder", torch_dtype=dtype)
pipe = diffusers.StableDiffusionPipeline(
    vae=diffusers.AutoencoderKL.from_pretrained(folder + "/vae", torch_dtype=dtype),
    unet=diffusers.UNet2DConditionModel.from_pretrained(folder + "/unet", torch_dtype=dtype),
    text_encoder=text, tokenizer=None, safety_checker=None, feature_extractor=None,
    scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False)
context = text(torch.ones(1, 77, dtype=torch.long)).last_hidden_state
pipe.set_progress_bar_config(disable=True)
pipe(prompt_embeds=context, negative_prompt_embeds=context, num_inference_steps=2,
     height=512, width=512)
"""}
LOAD = """
import sys, time, torch, tiny_ldm
begin = time.perf_counter()
tiny_ldm.LatentDiffusion.load(sys.argv[1] + "/t.safetensors", "cpu", getattr(torch, sys.argv[2]))
print(time.perf_counter() - begin)
"""
READ = """
import sys, time, torch, tiny_ldm
begin = time.perf_counter()
open(sys.argv[1] + "/t.safetensors", "rb").read()
print(time.perf_counter() - begin)
"""
IMPORT = "import torch, tiny_ldm\nprint(0)"


def run_code(code, *arguments):
    """(peak memory in GB, the last line printed) of a program."""
    code += "\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
                          cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    *_, last, peak = ["", *done.stdout.split()]
    return int(peak) * 1024 / 1e9, last


def memory(args, folder):
    print(f"\nPeak memory of a picture of 512 x 512, guided, 2 steps: medians of {args.rounds}\n\n"
          "| | float32 | bfloat16 |\n|---|---|---|")
    names = [name for name in PICTURE if name == "tiny_ldm" or find_spec("diffusers")]
    rounds = [[run_code(PICTURE[name], folder, dtype)[0] for name in names
               for dtype in ("float32", "bfloat16")] for _ in range(args.rounds)]
    peaks = [f"{statistics.median(column):.2f} GB" for column in zip(*rounds)]
    for name, pair in zip(names, zip(peaks[::2], peaks[1::2])):
        print(f"| {name} | {' | '.join(pair)} |", flush=True)
    size, base = (folder / "t.safetensors").stat().st_size / 1e9, run_code(IMPORT)[0]
    loads, reads = [], []
    for _ in range(args.rounds):
        loads.append(run_code(LOAD, folder, "float32"))
        reads.append(run_code(READ, folder))
    middle = lambda column: statistics.median(float(seconds) for _, seconds in column)
    print(f"\nLoading {size:.2f} GB in float32: {loads[0][0] - base:.2f} GB more than the import "
          f"({base:.2f}), {middle(loads):.2f} s; reading the file: {middle(reads):.2f} s")


def steps(args, folder):
    """The distance (root mean square) of a walk's end from that of 1000 steps of DDIM, for eight
    prompts, on the built-in model."""
    import torch
    import test_tiny_ldm as tests
    import tiny_ldm
    ldm = tiny_ldm.LatentDiffusion.load(device="cpu")
    prompts = [tiny_ldm.ShapesData(64, 10**6).item(i)[1] for i in range(8)]
    start = torch.cat([torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(i))
                       for i in range(8)])
    context = torch.cat([ldm.encode_text([""] * 8), ldm.encode_text(prompts)])
    scale = ldm.config.guidance_scale

    @torch.no_grad()
    def walk(scheduler, calls):
        scheduler.set_timesteps(calls)
        x = start * (scheduler.init_noise_sigma if "Euler" in type(scheduler).__name__ else 1)
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([x, x]), t)
            without, with_prompt = ldm.unet(inputs, t.expand(16), context).chunk(2)
            eps = tiny_ldm.eps_from_v(inputs[:8], without + scale * (with_prompt - without),
                                      ldm.alphas_cumprod[t.round().long()].item())
            x = scheduler.step(eps, t, x).prev_sample
        return x

    def ours(sampler, calls):
        *_, last = ldm.denoise(prompts, steps=calls, sampler=sampler, latents=start)
        return last.x

    exact, counts = ours("ddim", 1000), (5, 10, 20, 50)
    error = lambda x: (x - exact).square().mean().sqrt().item()
    print("\nDistance from the end of 1000 steps of DDIM: tiny_ldm / diffusers\n")
    print("| sampler | " + " | ".join(f"{n} calls" for n in counts) + " |\n|---" + "|---" * 4 + "|")
    for name in ("ddim", "plms", "euler", "dpmpp_2m", "dpmpp_2m_karras"):
        scheduler = tests.reference_scheduler(name)
        less = name == "plms"              # its first step calls twice
        row = [f"{error(ours(name, n - less)):.3f} / {error(walk(scheduler, n - less)):.3f}"
               for n in counts]
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def shapes(args, folder):
    import torch
    import tiny_ldm
    print("\nThe built-in model, 25 steps of Euler ancestral, guided: pictures a second\n")
    print("| | one by one | 8 together | 32 together |\n|---|---|---|---|")
    for dtype in args.dtypes:
        ldm = tiny_ldm.LatentDiffusion.load(device=args.device, dtype=getattr(torch, dtype))
        row = []
        for batch in (1, 8, 32):
            times = []
            for _ in range(args.rounds + 1):
                begin = time.perf_counter()
                ldm.generate(["a red circle"] * batch, steps=25, sampler="euler_a", progress=False)
                times.append(time.perf_counter() - begin)
            row.append(f"{batch / statistics.median(times[1:]):.1f}")
        print(f"| {dtype} | " + " | ".join(row) + " |", flush=True)
    with tempfile.TemporaryDirectory() as d:
        commands = [[sys.executable, str(HERE / "tiny_ldm.py"), "a red circle", "-o", f"{d}/a.png"],
                    [sys.executable, "-c", "import torch"]]
        times = []
        for _ in range(args.rounds + 1):
            times.append([])
            for command in commands:
                begin = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                times[-1].append(time.perf_counter() - begin)
    whole, torch_alone = (statistics.median(column) for column in zip(*times[1:]))
    print(f"\nFrom the command to the picture: {whole:.2f} s, {whole / torch_alone:.2f} times "
          f"`import torch` ({torch_alone:.2f} s)")


def gflop_of_training():
    """What stage 2 computes for one picture, forward and backward, as PyTorch counts it."""
    import torch
    import tiny_ldm
    from torch.utils.flop_counter import FlopCounterMode
    ldm = tiny_ldm.LatentDiffusion.load(device="cpu").requires_grad_(True)
    side = ldm.config.image_size // ldm.config.latent_stride
    with FlopCounterMode(display=False) as counter:
        x0, t = torch.randn(2, 4, side, side), torch.tensor([100, 900])
        context = ldm.text_encoder(ldm.tokenizer(["a red circle"] * 2))
        tiny_ldm.diffusion_loss(ldm.unet, x0, context, ldm.alphas_cumprod, ldm.config.prediction,
                                t, torch.randn_like(x0)).backward()
    return counter.get_total_flops() / 2 / 1e9


def train(args, folder):
    """Parses what the command itself shows."""
    import torch
    gflop = gflop_of_training()
    print(f"\nTraining the built-in model, 128 pictures a step, {gflop:.2f} GFLOP a picture: "
          "pictures a second\n")
    print("| | 1 process | 2 processes | share of the ceiling |\n|---|---|---|---|")
    for dtype in args.dtypes:
        row, ceiling = [], 0
        for name, work_done in CEILINGS.items():
            p = Process(name, "unet", dtype, args.device, folder)
            p.line()
            ceiling = max(ceiling, work_done / min(p.seconds() for _ in range(3)))
            p.process.kill()
        for processes in (1, 2):
            if args.device == "cuda" and processes > torch.cuda.device_count():
                row.append("no GPU")
                continue
            speeds = []
            for n in range(args.rounds):
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", str(processes), str(HERE / "tiny_ldm.py"), "--train",
                           "shapes", "-o", str(folder / f"{dtype}{processes}{n}.safetensors"),
                           "--weights", str(HERE / "weights/shapes.safetensors"), "--unet-steps",
                           "60", "--dtype", dtype, "--device", args.device]
                threads = str(max(1, os.cpu_count() // processes))
                done = subprocess.run(command, capture_output=True, text=True,
                                      env={**os.environ, "OMP_NUM_THREADS": threads})
                # The first steps fill the pool of encoded pictures; the bar's last 30 count
                at = {int(step): float(images) for step, images in re.findall(
                    r" (\d+)/60 .*?images_s=([\d.]+)", done.stderr)}
                if 60 not in at:
                    sys.exit(done.stderr)
                half = max(step for step in at if step <= 30)
                seconds = 60 * 128 / at[60] - half * 128 / at[half]
                speeds.append((60 - half) * 128 / seconds)
            row.append(f"{statistics.median(speeds):.0f}")
        share = max(float(cell) for cell in row if cell != "no GPU") * gflop / ceiling
        print(f"| {dtype} | " + " | ".join(row) + f" | {100 * share:.0f} % |", flush=True)


def main():
    tables = {"unet": compare, "vae": compare, "memory": memory, "steps": steps, "shapes": shapes,
              "train": train}
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("tables", nargs="*", help=", ".join(tables) + " (default: all)")
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    ap.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.work:
        return work(*args.work)
    chosen = args.tables or list(tables)
    with tempfile.TemporaryDirectory() as folder:
        if {"unet", "vae", "memory"} & {*chosen}:
            make_models(Path(folder))
        for name in chosen:
            parts = (name,) if tables[name] is compare else ()
            tables[name](*parts, args, Path(folder))


if __name__ == "__main__":
    main()
