"""Prints tables of speed and memory, each measured in one run.

    python .ci/bench.py unet      a guided step of Stable Diffusion 1.x, next to diffusers, OpenVINO
    python .ci/bench.py vae       the decoding of a 512 x 512 picture, next to the same
    python .ci/bench.py picture   from the command to the picture: 25 guided steps, LCM, Turbo
    python .ci/bench.py models    what a picture costs with each model, at its own size
    python .ci/bench.py memory    of a 512 x 512 picture, and of loading
    python .ci/bench.py steps     the error against the network calls, next to diffusers' schedulers
    python .ci/bench.py shapes    the built-in model: pictures per second, cold start
    python .ci/bench.py train     pictures per second in training, with one process and two
    python .ci/bench.py train --against FOLDER     next to another commit, checked out in FOLDER

`--device cuda` runs all but picture, models, memory and steps on a GPU, `--rounds N` says how often
each is measured, and `--dtypes float32` limits the precisions. What is not installed (diffusers,
transformers, openvino) is left out. Weights are synthetic, so nothing is downloaded. 8 GB of disk
are used on the way, 27 GB by `picture`. `--narrow` takes a very small model instead, which shows
that the tables work but not what is fast.

Every engine is a process of its own that has loaded its model and waits. The two that are compared
take turns, so that a slow minute of the machine hits both. Figures are medians. A bar is a promise:
what tiny_ldm must not fall behind.
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
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / ".ci")]
GFLOP = {"unet": 1606.5, "vae": 2514.5}      # of one call; a multiplication and an addition count 2
# What tiny_ldm asks of glibc from inside, asked from outside
SAME_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


# --------------------------------------------------------------------------------------------------
# The engines: each is a function that loads a model and returns what is to be timed, a call that
# returns its output

def inputs(folder, part, dtype, device):
    """Of the U-Net: latents of one picture twice, timestep, context. Of the VAE: latents."""
    import torch
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(device, dtype)

    if part == "vae":
        return (normal(1, 4, 64, 64),)
    width = json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    return normal(2, 4, 64, 64), torch.full((2,), 500, device=device), normal(2, 77, width)


def tiny_ldm_engine(folder, part, dtype, device, compiled=False):
    import tiny_ldm
    ldm = tiny_ldm.LatentDiffusion.load(folder / "t.safetensors", device, dtype)
    if compiled:
        tiny_ldm.compile_networks(ldm)
    call = ldm.unet if part == "unet" else ldm.vae.decode
    return partial(call, *inputs(folder, part, dtype, device))


def diffusers_network(folder, part, dtype, device):
    import diffusers
    import torch
    kind = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
    network = kind.from_pretrained(folder / part, torch_dtype=dtype).to(device).eval()
    if part == "vae":
        network.forward = network.decode
    # What is faster, as in tiny_ldm
    plain = device == "cpu" and dtype == torch.float32
    return network.to(memory_format=torch.contiguous_format if plain else torch.channels_last)


def diffusers_engine(folder, part, dtype, device, compiled=False):
    network = diffusers_network(folder, part, dtype, device)
    if compiled:
        network.compile()
    arguments = inputs(folder, part, dtype, device)

    def call():
        return network(*arguments).sample

    return call


def openvino_engine(folder, part, dtype, device):
    import openvino
    import torch
    network = diffusers_network(folder, part, torch.float32, "cpu")
    arguments = inputs(folder, part, torch.float32, "cpu")
    model = openvino.convert_model(network, example_input=arguments)
    del network
    hint = {"INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16"}
    compiled = openvino.Core().compile_model(model, "CPU", hint)
    arrays = [argument.numpy() for argument in arguments]

    def call():
        return torch.from_numpy(compiled(arrays)[0])

    return call


def matrix_product_engine(folder, part, dtype, device):
    """This and the next: what the machine can do at best, in sizes that the networks have."""
    import torch
    a = torch.randn(4096, 4096, device=device, dtype=dtype)

    def call():
        for _ in range(4):
            a @ a

    return call


def convolution_engine(folder, part, dtype, device):
    import torch
    import torch.nn.functional as F
    x = torch.randn(2, 320, 64, 64, device=device, dtype=dtype)
    w = torch.randn(320, 320, 3, 3, device=device, dtype=dtype)
    x, w = (tensor.to(memory_format=torch.channels_last) for tensor in (x, w))

    def call():
        for _ in range(32):
            F.conv2d(x, w, padding=1)

    return call


# GFLOP of one call
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
    "matrix product": Engine(matrix_product_engine),
    "convolution": Engine(convolution_engine)}


class Bar(NamedTuple):
    """The time of `ours` is at most `times` that of `theirs`, on a CPU."""
    ours: str
    theirs: str
    times: float


BARS = {
    ("unet", "float32"): [Bar("tiny_ldm", "diffusers, our allocator settings", 1.03),
                          Bar("tiny_ldm --compile", "OpenVINO", 1.15)],
    ("unet", "bfloat16"): [Bar("tiny_ldm", "diffusers, our allocator settings", 0.95),
                           Bar("tiny_ldm --compile", "OpenVINO", 1.05)],
    ("vae", "float32"): [Bar("tiny_ldm", "diffusers, our allocator settings", 1.05)],
    ("vae", "bfloat16"): [Bar("tiny_ldm", "diffusers, our allocator settings", 1.05)]}
COLD_START_BAR = 2.6         # times `import torch`
TRAINING_BAR = 0.9           # times the pictures per second of the commit in --against


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
        error = 0.0
        answer = folder / f"{part}.{dtype}.pt"
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

def make_models(folder, narrow, version="SD1"):
    """A diffusers folder with random weights of full size (or narrow), and what weights_convert.py
    makes of it."""
    import torch
    import checkpoints
    import reference
    import weights_convert
    config = config_of(version, narrow)
    with torch.no_grad():
        models = reference.references(config, reference.official_tensors(config))
        for name, model in models.items():
            model.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    tables = json.loads(checkpoints.VOCABULARY.to_str())
    vocab = tables["model"]["vocab"]         # filled up to CLIP's size
    vocab.update({f"no word {i}": i for i in range(len(vocab), config.text.vocab_size)})
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

    def end(self):
        self.process.kill()
        self.process.wait()


class Result(NamedTuple):
    seconds: float
    first: float
    error: float
    memory: float


def in_turns(engines, part, dtype, args, folder):
    """{engine: Result}, of engines that take turns."""
    processes = []
    ready = []
    for engine in engines:
        process = Process(engine, part, dtype, args.device, folder)
        processes.append(process)
        ready.append([float(word) for word in process.line().split()[1:]])
    rounds = []
    for _ in range(args.rounds):
        rounds.append([process.seconds() for process in processes])
    for process in processes:
        process.end()
    medians = [statistics.median(column) for column in zip(*rounds)]
    return {engine: Result(middle, *rest) for engine, middle, rest in zip(engines, medians, ready)}


def compare(part, args, folder):
    """tiny_ldm next to one other at a time: all of them at once would need 30 GB of memory."""
    others = [name for name, engine in ENGINES.items()
              if engine.is_there(args.device) and name not in ("tiny_ldm", *CEILINGS)]
    on_gpu = args.device != "cpu"
    for dtype in args.dtypes:
        found = in_turns(["tiny_ldm", *CEILINGS], part, dtype, args, folder)
        speeds = {name: gflop / found[name].seconds for name, gflop in CEILINGS.items()}
        ceiling = ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in speeds.items())
        print(f"\n{part}, {dtype}, {args.device}: medians of {args.rounds}; ceiling: {ceiling}\n")
        print("| | seconds | tiny_ldm's time over this | share of the ceiling | with loading, "
              "the first call | difference from tiny_ldm |" + " GPU memory |" * on_gpu)
        print("|---|---|---|---|---|---|" + "---|" * on_gpu)
        ratios = {}
        for other in ["tiny_ldm", *others]:
            if other != "tiny_ldm":
                found = in_turns(["tiny_ldm", other], part, dtype, args, folder)
            it = found[other]
            ratios["tiny_ldm", other] = found["tiny_ldm"].seconds / it.seconds
            share = GFLOP[part] / it.seconds / max(speeds.values())
            print(f"| {other} | {it.seconds:.3g} | {ratios['tiny_ldm', other]:.2f} | "
                  f"{100 * share:.0f} % | {it.first:.0f} s | {it.error:.1e} |"
                  + f" {it.memory / 1e9:.2f} GB |" * on_gpu, flush=True)
        for bar in [] if on_gpu else BARS[part, dtype]:
            if bar.theirs not in others:
                continue
            if bar.ours != "tiny_ldm":        # these two have not taken turns yet
                found = in_turns([bar.ours, bar.theirs], part, dtype, args, folder)
                ratios[bar.ours, bar.theirs] = found[bar.ours].seconds / found[bar.theirs].seconds
            say_bar(f"{bar.ours} over {bar.theirs}", ratios[bar.ours, bar.theirs], bar.times)


def say_bar(what, found, bar, at_least=False):
    """One line: the figure, and whether it clears its bar."""
    good = found >= bar if at_least else found <= bar
    print(f"\n{what}: {found:.3f} times; bar: at {'least' if at_least else 'most'} {bar}"
          f"{'' if good else '  MISSED'}", flush=True)


# --------------------------------------------------------------------------------------------------
# From the command to the picture: a process for each

class Way(NamedTuple):
    """Of making a picture: what to call it, and its settings."""
    name: str
    version: str                 # whose size the weights have
    sampler: str
    steps: int
    guidance_scale: float
    side: int = 512


WAYS = [Way("Stable Diffusion 1.x, 25 guided steps", "SD1", "euler_a", 25, 7.5),
        Way("LCM (1.x), 4 steps", "SD1", "lcm", 4, 1.0),
        Way("SD-Turbo (2.1), 1 step", "SD2", "euler_a_trailing", 1, 1.0)]
# One or two steps tell what fifty cost. The last number is that of the model's own steps
MODELS = [(Way("1.x", "SD1", "euler_a", 2, 7.5), "float32", 25),
          (Way("2.x, 512", "SD2", "ddim", 2, 9.0), "float32", 50),
          (Way("2.x, 768, v", "SD2_V", "ddim", 2, 9.0, 768), "float32", 50),
          (Way("SD-Turbo", "SD2", "euler_a_trailing", 1, 1.0), "float32", 1),
          (Way("XL", "SDXL", "euler_leading", 1, 5.0, 1024), "bfloat16", 50),
          (Way("XL-Turbo", "SDXL", "euler_a_trailing", 1, 1.0), "bfloat16", 1)]
PICTURE_ENGINES = ["tiny_ldm", "diffusers, our allocator settings", "OpenVINO"]
PICTURE_BAR = 1.03           # times diffusers, the whole process
STAGES = ["import, load", "text", "steps", "decode, save"]


def picture_of_tiny_ldm(folder, way, dtype, clock):
    import tiny_ldm
    ldm = tiny_ldm.LatentDiffusion.load(folder / "t.safetensors", "cpu", dtype)
    picture_by_the_lesson(ldm, folder, way, clock)


def picture_by_the_lesson(ldm, folder, way, clock):
    """With the networks that are in ldm."""
    import tiny_ldm
    clock("import, load")
    context = ldm.encode_text("a red circle")
    without = ldm.encode_text("") if way.guidance_scale != 1 else None
    clock("text")
    for step in ldm.denoise(context, without, steps=way.steps, sampler=way.sampler,
                            guidance_scale=way.guidance_scale, width=way.side, height=way.side):
        pass
    clock("steps")
    tiny_ldm.to_pil(ldm.decode_latents(step.x))[0].save(folder / "picture.png")
    clock("decode, save")


def picture_of_diffusers(folder, way, dtype, clock):
    import diffusers
    import torch
    import transformers
    # (Not `reference_scheduler`, whose module would load tiny_ldm into this process, too)
    name, settings = {"euler_a": ("EulerAncestralDiscrete", {}), "lcm": ("LCM", {}),
                      "euler_a_trailing": ("EulerAncestralDiscrete",
                                           dict(timestep_spacing="trailing"))}[way.sampler]
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype),
        text_encoder=text, tokenizer=None, safety_checker=None, feature_extractor=None,
        scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    if dtype != torch.float32:                # in either precision what is faster, as in tiny_ldm
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    clock("import, load")
    context = text(torch.ones(1, 77, dtype=torch.long)).last_hidden_state
    without = None
    if way.guidance_scale != 1:
        without = text(torch.ones(1, 77, dtype=torch.long)).last_hidden_state
    clock("text")
    latents = pipe(prompt_embeds=context, negative_prompt_embeds=without, output_type="latent",
                   guidance_scale=way.guidance_scale, num_inference_steps=way.steps,
                   height=way.side, width=way.side).images
    clock("steps")
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    pipe.image_processor.postprocess(image)[0].save(folder / "picture.png")
    clock("decode, save")


def picture_of_openvino(folder, way, dtype, clock):
    """Its networks in tiny_ldm's loop; the text encoder is PyTorch's."""
    import openvino
    import tiny_ldm
    import torch
    ldm = tiny_ldm.LatentDiffusion.load(folder / "t.safetensors", "cpu")
    hint = {"INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16"}
    unet, decoder = (openvino.Core().compile_model(folder / f"{part}.xml", "CPU", hint)
                     for part in ("unet", "vae"))

    def guess(x, t, context, vector=None):
        return torch.from_numpy(unet([x.numpy(), t.float().numpy(), context.numpy()])[0])

    def decode(z):
        return torch.from_numpy(decoder([z.numpy()])[0])

    ldm.unet.forward, ldm.vae.decode = guess, decode
    picture_by_the_lesson(ldm, folder, way, clock)


def export_to_openvino(folder):
    """unet.xml and vae.xml, whose inputs may have any number of rows."""
    import openvino
    import torch
    for part in ("unet", "vae"):
        network = diffusers_network(folder, part, torch.float32, "cpu")
        arguments = list(inputs(folder, part, torch.float32, "cpu"))
        if part == "unet":
            arguments[1] = arguments[1].float()
        network.forward = partial(network.forward, return_dict=False)
        with torch.no_grad():
            model = openvino.convert_model(network, example_input=tuple(arguments))
        shapes = {}
        for port, argument in zip(model.inputs, arguments):
            shapes[port] = openvino.PartialShape([-1, *argument.shape[1:]])
        model.reshape(shapes)
        openvino.save_model(model, folder / f"{part}.xml", compress_to_fp16=False)


def picture_work(engine, way, dtype, folder):
    """A process that makes one picture, then says how long its stages took."""
    seconds, last = {}, [float(os.environ["BEGUN"])]

    def clock(stage):
        now = time.time()
        seconds[stage] = now - last[0]
        last[0] = now

    import torch
    make = {"tiny_ldm": picture_of_tiny_ldm, "OpenVINO": picture_of_openvino}
    with torch.no_grad():
        make.get(engine, picture_of_diffusers)(Path(folder), Way(*json.loads(way)),
                                               getattr(torch, dtype), clock)
    peak = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]
    print(json.dumps([*seconds.values(), int(peak) * 1024 / 1e9]))


def picture_seconds(engine, way, dtype, folder):
    """[the whole process, each stage, memory in GB] of a picture."""
    begin = time.time()
    env = {**os.environ, **(SAME_ALLOCATOR if "allocator" in engine else {}), "BEGUN": str(begin)}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--picture", engine,
                           json.dumps(way), dtype, str(folder)], env=env, text=True,
                          capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [time.time() - begin, *json.loads(done.stdout.splitlines()[-1])]


def models(args, folder):
    print("\nA picture with each model: seconds, with random weights\n\n| | side | precision | "
          "load, text, decode | a step | steps | whole, reckoned from these | memory |\n"
          "|---|---|---|---|---|---|---|---|")
    written = None
    for way, dtype, count in MODELS:
        if way.version != written:
            random_model(folder / "t.safetensors", way.version, dtype, args.narrow)
            written = way.version
        whole, _, _, steps, _, memory = picture_seconds("tiny_ldm", way, dtype, folder)
        step, rest = steps / way.steps, whole - steps
        print(f"| {way.name} | {way.side} | {dtype} | {rest:.0f} | {step:.1f} | {count} | "
              f"{rest + count * step:.0f} | {memory:.1f} GB |", flush=True)


def config_of(version, narrow):
    """That of a model, or of a very small one of the same kind."""
    import tiny_ldm
    config = getattr(tiny_ldm, version)
    if not narrow:
        return config
    text = replace(config.text, width=64, num_heads=1, num_layers=3)
    unet = replace(config.unet, channels=config.unet.head_dim or 32)
    if config.text_2:
        config = replace(config, text_2=replace(config.text_2, width=64, num_heads=1, num_layers=3,
                                                pooled_dim=64))
        unet = replace(unet, vector_dim=64 + 6 * 256)
    return replace(config, text=text, unet=unet, vae=replace(config.vae, channels=32))


def random_model(path, version, dtype, narrow):
    """A weights file of a model's size, in a precision."""
    import torch
    import checkpoints
    import tiny_ldm
    config = config_of(version, narrow)
    with torch.device("meta"):
        ldm = tiny_ldm.LatentDiffusion(config, checkpoints.small_tokenizer(77))
    ldm.to(getattr(torch, dtype)).to_empty(device="cpu").requires_grad_(False)
    for p in ldm.parameters():
        p.normal_(std=p[0].numel() ** -0.5)
    ldm.save(path)


def picture(args, folder):
    engines = [name for name in PICTURE_ENGINES if ENGINES[name].is_there("cpu")]
    for version in dict.fromkeys(way.version for way in WAYS):
        (folder / version).mkdir()
        make_models(folder / version, args.narrow, version)
        if "OpenVINO" in engines:
            export_to_openvino(folder / version)
    for dtype in args.dtypes:
        print(f"\nA picture of 512 x 512, {dtype}, the whole process: seconds, medians of "
              f"{args.rounds}\n\n| | | whole | {' | '.join(STAGES)} | memory | tiny_ldm's time "
              f"over this |\n|---|---|---|{'---|' * len(STAGES)}---|---|")
        ratios = {}
        for way in WAYS:
            found = {engine: [] for engine in engines}
            for _ in range(args.rounds):
                for engine in engines:
                    row = picture_seconds(engine, way, dtype, folder / way.version)
                    found[engine].append(row)
            for engine, rows in found.items():
                *seconds, memory = (statistics.median(column) for column in zip(*rows))
                ratio = statistics.median(row[0] for row in found["tiny_ldm"]) / seconds[0]
                ratios[way.name, engine] = ratio
                print(f"| {way.name} | {engine} | "
                      f"{' | '.join(f'{number:.1f}' for number in seconds)} | {memory:.1f} GB | "
                      f"{ratio:.2f} |", flush=True)
        for (way, engine), ratio in ratios.items():
            if engine.startswith("diffusers"):
                say_bar(f"{way}, tiny_ldm over {engine}", ratio, PICTURE_BAR)


# --------------------------------------------------------------------------------------------------
# Memory, errors, the built-in model

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
    """(peak memory in GB, the last number printed) of a program."""
    code += "\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
                          cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    *_, last, peak = ["0", *done.stdout.split()]
    return int(peak) * 1024 / 1e9, float(last)


def memory(args, folder):
    print(f"\nPeak memory of a picture of 512 x 512, guided, 2 steps: medians of {args.rounds}\n\n"
          f"| | {' | '.join(args.dtypes)} |\n|---" + "|---" * len(args.dtypes) + "|")
    way = Way("two steps", "SD1", "euler_a", 2, 7.5)
    for name in ("tiny_ldm", "diffusers as installed"):
        if not ENGINES[name].is_there("cpu"):
            continue
        row = []
        for dtype in args.dtypes:
            peaks = [picture_seconds(name, way, dtype, folder)[-1] for _ in range(args.rounds)]
            row.append(f"{statistics.median(peaks):.2f} GB")
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    size = (folder / "t.safetensors").stat().st_size / 1e9
    base, _ = run_code(IMPORT)
    peaks, loads, reads = [], [], []
    for _ in range(args.rounds):
        peak, seconds = run_code(LOAD, folder, "float32")
        peaks.append(peak)
        loads.append(seconds)
        reads.append(run_code(READ, folder)[1])
    print(f"\nLoading {size:.2f} GB in float32: {statistics.median(peaks) - base:.2f} GB more than "
          f"the import ({base:.2f}), {statistics.median(loads):.2f} s; reading the file: "
          f"{statistics.median(reads):.2f} s")


def steps(args, folder):
    """The distance (root mean square) of a walk's end from that of 1000 steps of DDIM, for eight
    prompts, on the built-in model."""
    import torch
    import reference
    import tiny_ldm
    ldm = tiny_ldm.LatentDiffusion.load(device="cpu")
    prompts = [tiny_ldm.ShapesData(64, 10**6).item(i)[1] for i in range(8)]
    start = torch.cat([torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(i))
                       for i in range(8)])
    context = torch.cat([ldm.encode_text([""] * 8), ldm.encode_text(prompts)])
    scale = ldm.config.guidance_scale

    @torch.no_grad()
    def theirs(scheduler, calls):
        scheduler.set_timesteps(calls)
        x = start
        if "Euler" in type(scheduler).__name__:
            x = start * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([x, x]), t)
            v = tiny_ldm.guide(*ldm.unet(inputs, t.expand(16), context).chunk(2), scale)
            alpha_bar = ldm.alphas_cumprod[t.round().long()].item()
            eps = tiny_ldm.eps_from_v(inputs[:8], v, alpha_bar)
            x = scheduler.step(eps, t, x).prev_sample
        return x

    def ours(sampler, calls):
        *_, last = ldm.denoise(prompts, steps=calls, sampler=sampler, latents=start)
        return last.x

    exact = ours("ddim", 1000)

    def error(x):
        return (x - exact).square().mean().sqrt().item()

    counts = (5, 10, 20, 50)
    print("\nDistance from the end of 1000 steps of DDIM: tiny_ldm / diffusers\n")
    print("| sampler | " + " | ".join(f"{n} calls" for n in counts) + " |\n|---" + "|---" * 4 + "|")
    for name in ("ddim", "plms", "euler", "dpmpp_2m", "dpmpp_2m_karras"):
        scheduler = reference.reference_scheduler(name)
        row = []
        for calls in counts:
            n = calls - 1 if name == "plms" else calls      # its first step calls twice
            row.append(f"{error(ours(name, n)):.3f} / {error(theirs(scheduler, n)):.3f}")
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def shapes(args, folder):
    import torch
    import tiny_ldm
    print("\nThe built-in model, 25 steps of Euler ancestral, guided: pictures per second\n")
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
    print(f"\nFrom the command to the picture: {whole:.2f} s (`import torch`: {torch_alone:.2f} s)")
    if args.device == "cpu":
        say_bar("Cold start over `import torch`", whole / torch_alone, COLD_START_BAR)


# --------------------------------------------------------------------------------------------------
# Training

BATCH = 128                  # pictures per step


def gflop_of_training():
    """What stage 2 computes for one picture, forward and backward, as PyTorch counts it."""
    import torch
    import tiny_ldm
    from torch.utils.flop_counter import FlopCounterMode
    ldm = tiny_ldm.LatentDiffusion.load(device="cpu").requires_grad_(True)
    side = ldm.config.image_size // ldm.config.vae_stride
    with FlopCounterMode(display=False) as counter:
        x0 = torch.randn(2, 4, side, side)
        ids = ldm.tokenizer(["a red circle"] * 2)
        tiny_ldm.text_to_image_loss(ldm, x0, ids).backward()
    return counter.get_total_flops() / 2 / 1e9


def training_speed(checkout, dtype, processes, args, folder):
    """Pictures per second of stage 2, by the command of a checkout, from its own built-in model.

    Its progress bar is watched from the first step that it shows to the last but one. What lies
    between the two is what a long training does over and over. (8f0b1d8 encodes a pool of pictures
    before its first step, and the last step writes the model.)
    """
    total = args.train_steps
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                    str(processes)]
    out = Path(tempfile.mkdtemp(dir=folder)) / "t.safetensors"
    command = [sys.executable, *launcher, str(checkout / "tiny_ldm.py"), "--train", "shapes", "-o",
               str(out), "--weights", str(checkout / "weights" / "shapes.safetensors"),
               "--unet-steps", str(total), "--dtype", dtype, "--device", args.device]
    cores = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // processes))}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=env)
    shown = {}                               # step: when
    said = b""
    while piece := os.read(process.stderr.fileno(), 2**16):
        said += piece
        now = time.perf_counter()
        for step in re.findall(rb" (\d+)/%d \[" % total, piece):
            shown.setdefault(int(step), now)
    if process.wait() or len(shown) < 4:
        sys.exit(said.decode(errors="replace"))
    first = min(step for step in shown if step > 0)
    last = max(step for step in shown if step < total)
    return BATCH * (last - first) / (shown[last] - shown[first])


def train(args, folder):
    print(f"\nTraining the built-in model, {BATCH} pictures per step, {args.device}: pictures per "
          f"second, medians of {args.rounds}\n")
    if args.against is not None:
        print(f"| | this commit | {args.against.name} | ratio |\n|---|---|---|---|")
        ratios = {}
        for dtype in args.dtypes:
            speeds = []
            for _ in range(args.rounds):
                speeds.append([training_speed(checkout, dtype, 1, args, folder)
                               for checkout in (HERE, args.against)])
            ours, theirs = (statistics.median(column) for column in zip(*speeds))
            ratios[dtype] = ours / theirs
            print(f"| {dtype} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |", flush=True)
        for dtype, ratio in ratios.items():
            say_bar(f"Training in {dtype} over {args.against.name}", ratio, TRAINING_BAR,
                    at_least=True)
        return
    import torch
    gflop = gflop_of_training()
    print(f"({gflop:.2f} GFLOP per picture)\n")
    print("| | 1 process | 2 processes | share of the ceiling |\n|---|---|---|---|")
    for dtype in args.dtypes:
        ceiling = 0
        for name, work_done in CEILINGS.items():
            process = Process(name, "unet", dtype, args.device, folder)
            process.line()
            fastest = min(process.seconds() for _ in range(3))
            process.end()
            ceiling = max(ceiling, work_done / fastest)
        row = []
        fastest = 0
        for processes in (1, 2):
            if args.device == "cuda" and processes > torch.cuda.device_count():
                row.append("no GPU")
                continue
            speeds = [training_speed(HERE, dtype, processes, args, folder)
                      for _ in range(args.rounds)]
            fastest = max(fastest, statistics.median(speeds))
            row.append(f"{statistics.median(speeds):.0f}")
        share = 100 * fastest * gflop / ceiling
        print(f"| {dtype} | {' | '.join(row)} | {share:.0f} % |", flush=True)


def main():
    tables = {"unet": compare, "vae": compare, "picture": picture, "models": models,
              "memory": memory, "steps": steps, "shapes": shapes, "train": train}
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("tables", nargs="*", help=", ".join(tables) + " (default: all)")
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    ap.add_argument("--narrow", action="store_true")
    ap.add_argument("--against", type=Path, metavar="FOLDER")
    ap.add_argument("--train-steps", type=int, default=40, help="of each training (default: 40)")
    ap.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    ap.add_argument("--picture", nargs=4, help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.work:
        return work(*args.work)
    if args.picture:
        return picture_work(*args.picture)
    chosen = args.tables or list(tables)
    if unknown := set(chosen) - set(tables):
        ap.error(f"no table {', '.join(unknown)}; there are: {', '.join(tables)}")
    if args.against is not None:
        args.against = args.against.resolve()
    with tempfile.TemporaryDirectory() as folder:
        if {"unet", "vae", "memory"} & {*chosen}:
            make_models(Path(folder), args.narrow)
        for name in chosen:
            parts = (name,) if tables[name] is compare else ()
            tables[name](*parts, args, Path(folder))


if __name__ == "__main__":
    main()
