"""What must hold, as readable examples, in the order of tiny_ldm.py's sections.

    pytest                       every promise once, in two or three minutes
    TINY_LDM_ALL=1 pytest        also what takes long: the compiler, several processes, many damages
"""
import concurrent.futures
import contextlib
import copy
import functools
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import zipfile
import zlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

try:
    import resource           # of Unix only
except ImportError:
    resource = None

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny_ldm
import weights_convert
from tiny_ldm import (COLOURS, SAMPLERS, SD1, SD1_INPAINT, SHAPE_NAMES, SHAPES, InputError,
                      LatentDiffusion, Scene, Thing, Tokenizer, caption_of, draw, is_held_out,
                      place, random_scene)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / ".ci"))
from judge import altered, judge, parse

whole = pytest.mark.skipif(not os.environ.get("TINY_LDM_ALL"), reason="TINY_LDM_ALL=1 runs it")

# A model so small that a test takes no time
TINY = replace(
    SHAPES, name="tiny", image_size=32, scale_factor=0.7,
    text=tiny_ldm.TextConfig(vocab_size=500, max_length=16, width=16, num_layers=1, num_heads=2),
    vae=tiny_ldm.VAEConfig(channels=8, channel_mult=(1, 1, 1, 2), num_res_blocks=1, norm_groups=4),
    unet=tiny_ldm.UNetConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1,
                             transformer_depth=(1, 0), num_heads=2, norm_groups=4))


def some_captions(count: int) -> list[str]:
    return [caption_of(random_scene(random.Random(i))) for i in range(count)]


def small_tokenizer(length: int) -> Tokenizer:
    """At most 500 tokens, learned from captions of the Shapes world."""
    return Tokenizer.train(some_captions(300), 500, length)


def tiny_model(seed: int = 0, **changes) -> LatentDiffusion:
    torch.manual_seed(seed)
    ldm = LatentDiffusion(replace(TINY, **changes), small_tokenizer(16))
    for p in ldm.parameters():          # no branch left at zero, so that a test sees every part
        torch.nn.init.normal_(p, std=0.2)
    return ldm.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.fixture(scope="module")
def built_in():
    return LatentDiffusion.load()


def run(*args, cwd=None, program="tiny_ldm.py", **env) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / program), *map(str, args)]
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


@contextlib.contextmanager
def calls_of(*modules: torch.nn.Module):
    """Collects (inputs, output) of every call of these modules."""
    calls = []

    def keep(module, inputs, output):
        calls.append((inputs, output))

    hooks = [module.register_forward_hook(keep) for module in modules]
    yield calls
    for hook in hooks:
        hook.remove()


# --------------------------------------------------------------------------------------------------
# The judge, on whom much below relies, knows right from wrong.

def random_picture(seed: int) -> tuple[Scene, Image.Image]:
    rng = random.Random(seed)
    scene = random_scene(rng)
    return scene, draw(scene, place(scene, rng), SHAPES.image_size)


def test_judge_accepts_true_pictures_and_rejects_wrong_captions():
    rng = random.Random(1)
    accepted, rejected = 0, 0
    for seed in range(100):
        scene, picture = random_picture(seed)
        assert parse(caption_of(scene)) == scene
        accepted += judge(picture, caption_of(scene)) == ""
        rejected += judge(picture, caption_of(altered(scene, rng))) != ""
    assert accepted >= 99 and rejected >= 98


def test_judge_rejects_noise_and_emptiness():
    noise = Image.effect_noise((64, 64), 100)
    for picture in (noise, Image.new("RGB", (64, 64), "white")):
        assert judge(picture, "a red circle")


# --------------------------------------------------------------------------------------------------
# Part I is a lesson that stands on its own: without what follows, it makes pictures and trains.

@pytest.fixture(scope="module")
def lesson():
    source = (HERE / "tiny_ldm.py").read_text("utf-8")
    part_one = source[: source.index("# %% Part II")]
    module = types.ModuleType("lesson")
    module.__file__ = str(HERE / "tiny_ldm.py")
    sys.modules["lesson"] = module              # dataclasses look their module up there
    exec(compile(part_one, "Part I", "exec"), module.__dict__)
    yield module
    del sys.modules["lesson"]


def test_part_one_alone_makes_the_same_picture(lesson, built_in):
    assert not hasattr(lesson, "InputError")
    ldm = lesson.LatentDiffusion.load(device="cpu")
    made, = ldm.generate("two blue stars", steps=5, progress=False)
    assert built_in.generate("two blue stars", steps=5, progress=False)[0] == made


def test_part_one_alone_trains(lesson):
    captions = some_captions(50)
    tokenizer = lesson.Tokenizer.train(captions, 500, 16)
    torch.manual_seed(0)
    ldm = lesson.LatentDiffusion(lesson.Config.from_dict(asdict(TINY)), tokenizer)
    images = lesson.to_tensor([random_picture(i)[1].resize((32, 32)) for i in range(8)])
    ids = tokenizer(captions[:8])

    def first_loss(step):
        return lesson.vae_loss(ldm.vae, images, randn(8, 4, 4, 4))

    def second_loss(step):                      # the same noise each time, so that it must fall
        return lesson.text_to_image_loss(ldm, ldm.encode_image(images), ids, generator=seeded())

    for part, loss_of in ((ldm.vae, first_loss), (ldm, second_loss)):
        weights = list(part.parameters())
        averages = [p.detach().clone() for p in weights]
        optimizer = torch.optim.AdamW(weights, lr=1e-2)
        losses = dict(lesson.train(weights, averages, optimizer, loss_of, steps=5))
        assert list(losses) == [0, 1, 2, 3, 4] and losses[4] < losses[0]


def test_importing_prints_nothing():
    command = [sys.executable, "-c", "import tiny_ldm"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --------------------------------------------------------------------------------------------------
# 1. Config. The sizes are Stable Diffusion's, and what a config says is the default everywhere.

def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sd1_has_the_published_numbers_of_parameters():
    with torch.device("meta"):
        assert count(tiny_ldm.UNet(SD1.unet, SD1.text.width)) == 859_520_964
        assert count(tiny_ldm.VAE(SD1.vae)) == 83_653_863
        assert count(tiny_ldm.TextEncoder(SD1.text)) == 123_060_480
        inpainting = tiny_ldm.UNet(SD1_INPAINT.unet, 768)
    assert inpainting.down_blocks[0][0].weight.shape == (320, 9, 3, 3)
    assert (SD1.stride, SD1.vae_stride) == (64, 8)


@pytest.mark.parametrize("config", [SHAPES, SD1, SD1_INPAINT])
def test_config_survives_json(config):
    text = json.dumps(asdict(config))
    assert tiny_ldm.Config.from_dict(json.loads(text)) == config


def test_steps_sampler_and_guidance_come_from_the_config(tmp_path):
    for config, scale in ((SD1, 7.5), (SHAPES, 2.0)):
        assert (config.steps, config.sampler, config.guidance_scale) == (25, "euler_a", scale)
    own = dict(steps=3, sampler="plms", guidance_scale=4.0)
    ldm = tiny_model(**own)
    made, = ldm.generate("a red circle", progress=False)
    assert ldm.generate("a red circle", progress=False, **own)[0] == made
    weights, out = str(tmp_path / "m.safetensors"), str(tmp_path / "x.png")
    ldm.save(weights)
    assert tiny_ldm.main(["a red circle", "--weights", weights, "-o", out]) == 0
    assert Image.open(out).tobytes() == made.tobytes()
    assert "Steps: 3, Sampler: plms, CFG scale: 4.0" in Image.open(out).info["parameters"]


# --------------------------------------------------------------------------------------------------
# 2. Diffusion. The formulas are the papers', and the loss is theirs, with uniform timesteps.

ALPHAS_CUMPROD = tiny_ldm.make_alphas_cumprod(SD1.schedule)


def test_schedule_has_the_original_values():
    a = ALPHAS_CUMPROD
    assert a.dtype == torch.float64 and a.shape == (1000,)
    assert a[[0, 1, 999]].tolist() == pytest.approx([0.99915, 0.998296, 0.0046601], rel=1e-5)
    low, high = 0.00085**0.5, 0.012**0.5
    roots = [low + (high - low) * t / 999 for t in range(501)]
    closed = math.prod(1 - root**2 for root in roots)
    assert a[500].item() == pytest.approx(closed, rel=1e-12)


def test_eps_x0_v_and_score_say_the_same():
    x0, eps, mistake = randn(3, 2, 4, 4, 4, dtype=torch.float64)
    for a in (0.999, 0.5, 0.005):
        x = tiny_ldm.add_noise(x0, eps, a)
        v = tiny_ldm.v_target(x0, eps, a)
        torch.testing.assert_close(tiny_ldm.x0_from_eps(x, eps, a), x0)
        torch.testing.assert_close(tiny_ldm.eps_from_v(x, v, a), eps)
        score = -(x - a**0.5 * x0) / (1 - a)
        torch.testing.assert_close(tiny_ldm.score_from_eps(eps, a), score)
        # A mistake in ε is one in v, 1/√ᾱ times as large
        wrong_x0 = tiny_ldm.x0_from_eps(x, eps + mistake, a)
        wrong_v = tiny_ldm.v_target(wrong_x0, eps + mistake, a)
        torch.testing.assert_close(wrong_v - v, mistake / a**0.5)


def recorded_loss(x0, prediction="eps", **given):
    """(loss, xt, t) of a network that answers 0 and remembers what it was asked."""
    asked = []

    def network(xt, t, context):
        asked.append((xt, t))
        return torch.zeros_like(xt)

    loss = tiny_ldm.diffusion_loss(network, x0, None, ALPHAS_CUMPROD, prediction, **given)
    return loss.item(), *asked[0]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_compares_the_guess_with_what_was_mixed_in(prediction):
    x0, eps = randn(2, 3, 4, 2, 2)
    t = torch.tensor([0, 500, 999])
    a = ALPHAS_CUMPROD[t].float().view(3, 1, 1, 1)
    target = {"eps": eps, "v": tiny_ldm.v_target(x0, eps, a)}[prediction]
    loss, xt, told = recorded_loss(x0, prediction, t=t, eps=eps)
    assert loss == pytest.approx(target.square().mean().item(), rel=1e-6)
    torch.testing.assert_close(xt, tiny_ldm.add_noise(x0, eps, a))
    assert torch.equal(told, t)


def test_the_loss_draws_uniform_timesteps_and_normal_noise():
    x0 = torch.zeros(50_000, 1, 1, 1)
    loss, xt, t = recorded_loss(x0, generator=seeded(3))
    assert (t.min(), t.max()) == (0, 999)
    tenths = torch.histc(t.float(), 10, 0, 1000)
    assert (tenths - 5000).abs().max() < 4 * 5000**0.5
    noise = xt.flatten() / (1 - ALPHAS_CUMPROD[t]) ** 0.5
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert recorded_loss(x0, generator=seeded(3))[0] == loss
    assert recorded_loss(x0, generator=seeded(4))[0] != loss
    torch.manual_seed(3)                        # without a generator: PyTorch's own
    assert recorded_loss(x0)[0] == loss


# --------------------------------------------------------------------------------------------------
# 3. Blocks and 4. VAE. Shapes, scaling, the random point of the cloud. (That all networks compute
# what the original's do is tried with the converter, number for number.)

def test_pictures_to_latents_and_back(tiny):
    image = torch.rand(2, 3, 32, 64, generator=seeded()) * 2 - 1
    mean, logvar = tiny.vae.encode(image)
    assert mean.shape == logvar.shape == (2, 4, 4, 8)
    assert tiny.vae.decode(mean).shape == image.shape
    latents, scale = tiny.encode_image(image), tiny.config.scale_factor
    torch.testing.assert_close(latents, mean * scale)
    assert tiny.decode_latents(latents).abs().max() <= 1
    point = mean + (0.5 * logvar).exp() * randn(2, 4, 4, 8)
    torch.testing.assert_close(tiny.encode_image(image, seeded()), point * scale)


# --------------------------------------------------------------------------------------------------
# 5. Text. Prompts become ids as CLIP's do, and a new tokenizer learns as CLIP's did.

def test_ids_begin_and_end_with_marks_and_are_padded_or_cut(tiny):
    bos, eos = tiny.tokenizer.bos, tiny.tokenizer.eos
    ids = tiny.tokenizer(["a red circle", "", "red " * 20])
    assert ids.shape == (3, 16) and ids.dtype == torch.long
    red = ids[0, 2].item()
    assert ids[0, 0] == bos and ids[0, 4:].tolist() == [eos] * 12
    assert ids[1].tolist() == [bos] + [eos] * 15
    assert ids[2].tolist() == [bos] + [red] * 14 + [eos]
    assert torch.equal(tiny.tokenizer("A  RED\ncircle"), ids[:1])
    assert tiny.tokenizer(f"a {tiny_ldm.EOS}")[0, 2] == eos


def test_the_tokenizer_learns_as_section_5_says():
    tokenizer = Tokenizer.train(["low low lower"], 520, 8)
    learned = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    assert learned[:2] == [["l", "o"], ["lo", "w</w>"]]
    assert tokenizer.backend.encode("low").tokens == ["low</w>"]
    assert small_tokenizer(16).backend.to_str() == small_tokenizer(16).backend.to_str()


# --------------------------------------------------------------------------------------------------
# 6. U-Net. Its table in the docstring is true: blocks, sizes and skips.

LAYERS = {"Conv2d": "conv_in", "ResBlock": "R", "SpatialTransformer": "A",
          "Downsample": "Downsample", "Upsample": "then Upsample"}


def test_sd1s_blocks_are_those_in_the_docstring():
    with torch.device("meta"):
        unet = tiny_ldm.UNet(SD1.unet, 768)
        inputs = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    with calls_of(*blocks) as calls:
        unet(*inputs)
    entry = r"(\d+) +(conv_in|R A|R|Downsample) +(\d+) +(\d+) x \d+(?:,( then Upsample))?"
    table = re.findall(entry, tiny_ldm.UNet.__doc__)
    left, right = table[::2], table[1::2]       # down, and up, whose first block is the lowest
    middle = ("12", "R A R", "1280", "8", "")
    rows = [*left, middle, *right[::-1]]
    before = 1280
    for i, (number, what, width, side, then) in enumerate(rows):
        (x, *_), output = calls[i]
        names = [LAYERS[type(layer).__name__] for layer in blocks[i]]
        size = int(side) * (2 if then else 1)
        assert " ".join(names) == what + then and int(number) == i % 13
        assert output.shape == (1, int(width), size, size)
        if i > 12:                              # its own input, and the skip of the same row
            assert x.shape[1] == before + int(left[24 - i][2])
            before = int(width)


# --------------------------------------------------------------------------------------------------
# 7. Samplers. Exact answers where there are some, the papers' order, and diffusers' numbers.

SIGMAS = tiny_ldm.sigma_of(ALPHAS_CUMPROD.numpy())
TO_ZERO = (tiny_ldm.linspace, tiny_ldm.linspace_rounded, tiny_ldm.karras, tiny_ldm.geometric)


def walk(sampler: str, predict_eps, x, steps: int, noise=None, eta: float = 0.0, levels=None):
    """All steps of a sampler, from x at its first noise level."""
    levels = levels or SAMPLERS[sampler].levels(steps, SIGMAS)
    return list(tiny_ldm.sample(SAMPLERS[sampler].step, predict_eps, x, levels, noise, eta))


def toy(x, t, alpha_bar=None):
    """A "network"."""
    return torch.tanh(x * (1 + float(t) / 1000))


@pytest.mark.parametrize("levels", [tiny_ldm.leading, *TO_ZERO])
def test_every_number_of_steps_gives_that_many_steps(levels):
    for steps in range(1, 1001):
        timesteps, alpha_bars = levels(steps, SIGMAS)
        assert len(timesteps) == steps == len(alpha_bars) - 1
        assert 0 <= min(timesteps) and max(timesteps) <= 999
        rises = np.diff(alpha_bars)
        assert rises.min() >= 0 and alpha_bars[-1] <= 1
        if levels in TO_ZERO:
            assert rises.min() > 0
            assert (timesteps[0], alpha_bars[-1]) == (999, 1)


MEAN, DEVIATION = 0.7, 0.4


def ideal(x, t, alpha_bar):
    """E[ε | xₜ] for data ~ N(m, s²): then xₜ ~ N(√ᾱ m, ᾱ s² + 1 − ᾱ)."""
    away = x - alpha_bar**0.5 * MEAN
    return (1 - alpha_bar) ** 0.5 * away / deviation_at(alpha_bar) ** 2


def deviation_at(alpha_bar: float) -> float:
    return (alpha_bar * DEVIATION**2 + 1 - alpha_bar) ** 0.5


@pytest.mark.parametrize("sampler, steps, eta, within", [
    ("ddpm", 200, 0, 0.04), ("ddim", 50, 0, 0.06), ("ddim", 200, 0.5, 0.04),
    ("ddim", 200, 1, 0.04), ("plms", 50, 0, 0.02), ("euler", 50, 0, 0.07),
    ("euler_a", 200, 0, 0.05), ("dpmpp_2m", 50, 0, 0.06), ("dpmpp_2m_karras", 50, 0, 0.02),
    ("langevin", 1000, 0, 0.03)])
def test_samplers_reproduce_a_gaussian(sampler, steps, eta, within):
    """From data noised to the first level, a sampler must arrive at data noised to the last one."""
    noise = partial(torch.randn, 20000, generator=seeded(), dtype=torch.float64)
    alpha_bars = SAMPLERS[sampler].levels(steps, SIGMAS).alpha_bars
    first, last = alpha_bars[0], alpha_bars[-1]
    start = first**0.5 * MEAN + deviation_at(first) * noise()
    x = walk(sampler, ideal, start, steps, noise, eta)[-1].x
    assert x.mean().item() == pytest.approx(last**0.5 * MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(deviation_at(last), rel=within)


def error_of_walk(sampler: str, steps: int) -> float:
    """From σ = 10 to 0.05, even in log σ. The exact flow keeps a point's distance from the mean, in
    standard deviations."""
    sigmas = np.geomspace(10, 0.05, steps + 1)
    levels = tiny_ldm.levels_of(sigmas[:-1], sigmas[:-1], last_sigma=sigmas[-1])
    first, last = levels.alpha_bars[0], levels.alpha_bars[-1]
    away = torch.linspace(-3, 3, 5, dtype=torch.float64)
    start = first**0.5 * MEAN + deviation_at(first) * away
    exact = last**0.5 * MEAN + deviation_at(last) * away
    end = walk(sampler, ideal, start, steps, levels=levels)[-1].x
    return (end - exact).abs().max().item()


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("euler", 1), ("plms", 2),
                                            ("dpmpp_2m", 2)])
def test_deterministic_samplers_converge_with_their_papers_order(sampler, order):
    """(PLMS is "pseudo": of high order in ε, of second order in all.)"""
    coarse, fine, finest = [error_of_walk(sampler, steps) for steps in (40, 80, 160)]
    slopes = math.log2(coarse / fine), math.log2(fine / finest)
    assert min(slopes) > order - 0.25 and slopes[1] < order + 0.8


@pytest.mark.parametrize("sampler, eta", [("euler", 0.0), ("ddpm", 1.0)])
def test_euler_is_ddim_in_other_words_and_ddpm_is_ddim_with_eta_1(sampler, eta):
    levels, start = tiny_ldm.linspace(20, SIGMAS), randn(5, dtype=torch.float64)
    ends = []
    for name in (sampler, "ddim"):
        noise = partial(torch.randn, 5, generator=seeded(1), dtype=torch.float64)
        steps = walk(name, toy, start, 20, noise, eta, levels)
        ends.append(steps[-2].x)
    torch.testing.assert_close(*ends)


def reference_scheduler(sampler: str):
    """What one of our samplers is called in diffusers."""
    import diffusers
    leading = dict(steps_offset=1, timestep_spacing="leading")
    name, settings = {
        "ddpm": ("DDPM", dict(clip_sample=False, **leading)),
        "ddim": ("DDIM", dict(clip_sample=False, set_alpha_to_one=False, **leading)),
        "plms": ("PNDM", dict(skip_prk_steps=True, set_alpha_to_one=False, **leading)),
        "euler": ("EulerDiscrete", {}),
        "euler_a": ("EulerAncestralDiscrete", {}),
        "dpmpp_2m": ("DPMSolverMultistep", {}),
        "dpmpp_2m_karras": ("DPMSolverMultistep", dict(use_karras_sigmas=True))}[sampler]
    kind = getattr(diffusers, f"{name}Scheduler")
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


@pytest.mark.parametrize("steps", [1, 7, 50, 250])
@pytest.mark.parametrize("sampler, extra", [
    ("ddpm", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 0.7}), ("plms", {}), ("euler", {}),
    ("euler_a", {}), ("dpmpp_2m", {}), ("dpmpp_2m_karras", {})])
def test_samplers_equal_those_of_diffusers(sampler, extra, steps):
    """On a fixed "network", with the same noise. diffusers' DDPM ends its last step at ᾱ = 1, the
    original at ᾱ₀, and its Euler's only step of one begins at t = 0: both left out."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    if steps == 1 and sampler in ("euler", "euler_a", "ddpm"):
        pytest.skip("nothing to compare")
    scheduler = reference_scheduler(sampler)
    scheduler.set_timesteps(steps)
    noise = partial(torch.randn, (1, 4, 3, 3), generator=seeded(5))
    start = noise()
    if SAMPLERS[sampler].starts_at_sigma:
        first = SAMPLERS[sampler].levels(steps, SIGMAS).alpha_bars[0]
        start = (1 - first) ** 0.5 * start
    ours = walk(sampler, toy, start, steps, noise, **extra)
    if sampler != "plms":                       # diffusers counts its look-ahead as a step
        assert [step.t for step in ours] == pytest.approx(scheduler.timesteps.tolist())
    generator = seeded(5)
    if sampler in ("ddpm", "ddim", "euler_a"):
        extra = {**extra, "generator": generator}
    x = torch.randn((1, 4, 3, 3), generator=generator) * scheduler.init_noise_sigma
    theirs = []
    for t in scheduler.timesteps:
        eps = toy(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(eps, t, x, **extra).prev_sample
        theirs.append(x)
    last = -2 if sampler == "ddpm" else -1
    x = theirs[last]
    assert (ours[last].x - x).abs().max() <= 1e-5 * x.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_whoever_iterates_may_look_and_change(tiny, sampler):
    def steps():
        return tiny.denoise("a red circle", steps=4, sampler=sampler)

    plain = [step.x for step in steps()]
    for step, x in zip(steps(), plain):
        tiny.decode_latents(step.x)
        assert torch.equal(step.x, x)
    changed = steps()
    next(changed).x.zero_()
    assert not torch.equal(next(changed).x, plain[1])


# --------------------------------------------------------------------------------------------------
# 8. LatentDiffusion. A seed means the same picture everywhere, guidance is a line, a saved model is
# the same, and the built-in one draws what it always drew.

# From commit 8f0b1d8, 25 steps of euler_a, guidance scale 2: the mean colours of 4 x 4 squares
PICTURES = {
    "a small purple heart above a large orange star on a blue background":
        "1e46dc1e46dc393ed12942d71e46dc1e46dc1e46dc1e46dc"
        "384ec38567781e46dc1e46dc294ad2384ec31e46dc1e46dc",
    "three red crosses":
        "fffffffffffffffffffffffffffffffffffff2a9adfffdfd"
        "fffffffef8f9f8d4d5fef9f9fffffff1a3a6fadedff3b4b7",
    "a large green ring on a yellow background":
        "fadc28fadc28fadc28fadc28fadc28a9c22fd0cf2cfadc28"
        "fadc28a4c130cccd2cfadc28fadc28fadc28fadc28fadc28"}


def test_the_built_in_model_draws_what_it_always_drew(built_in):
    images = built_in.generate(list(PICTURES), progress=False)
    for image, (caption, colours) in zip(images, PICTURES.items()):
        assert image.size == (64, 64) and judge(image, caption) == ""
        means = np.asarray(image).reshape(4, 16, 4, 16, 3).mean(axis=(1, 3))
        known = np.frombuffer(bytes.fromhex(colours), np.uint8).reshape(4, 4, 3)
        assert np.abs(means - known).max() <= 1, caption


def pixels_of(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0)])
def test_picture_i_of_a_batch_is_the_picture_made_alone(tiny, sampler, eta):
    settings = dict(steps=5, sampler=sampler, eta=eta, progress=False)
    prompts = ["a red circle", "two blue stars"]
    batch = pixels_of(tiny.generate(prompts, batch_size=2, seed=3, **settings))
    assert len(batch) == 4
    for i, picture in enumerate(batch):
        alone = tiny.generate(prompts[i // 2], seed=3 + i, **settings)
        assert np.abs(picture - pixels_of(alone)).max() <= 1


def test_a_pictures_noise_comes_from_its_own_generator(tiny):
    """Seeded with seed + i: first the start, which is diffusers' start, then one draw per step."""
    generators = [seeded(7), seeded(8)]

    def noise():
        return torch.cat([torch.randn((1, 4, 4, 4), generator=g) for g in generators])

    x = noise()
    alpha_bars = tiny_ldm.leading(3, SIGMAS).alpha_bars
    for i, step in enumerate(tiny.denoise("a", steps=3, sampler="ddpm", seed=7, batch_size=2)):
        x = tiny_ldm.ddpm(x, step.eps, alpha_bars[i], alpha_bars[i + 1], noise=noise)
        torch.testing.assert_close(step.x, x)


def test_latents_in_place_of_the_start_and_other_sizes(tiny):
    settings = dict(steps=3, sampler="ddim", progress=False)
    plain, = tiny.generate("a", seed=7, **settings)
    assert tiny.generate("a", latents=randn(1, 4, 4, 4, seed=7), **settings)[0] == plain
    assert tiny.generate("a", latents=randn(1, 4, 4, 8), **settings)[0].size == (64, 32)
    assert tiny.generate("a", width=64, height=48, **settings)[0].size == (64, 48)


def test_guidance_is_a_line_from_the_negative_prompt_through_the_prompt(tiny):
    def first(prompt="a red circle", scale=4.0, **settings):
        return next(tiny.denoise(prompt, steps=10, guidance_scale=scale, **settings)).eps

    def same(a, b):
        return torch.allclose(a, b, rtol=1e-4, atol=1e-4)

    without, with_prompt = first("", 1.0), first(scale=1.0)
    for scale in (0.0, 4.0, -1.0):
        assert same(first(scale=scale), without + scale * (with_prompt - without))
    assert same(first("a", 0.0, negative_prompt="a red circle"), with_prompt)
    assert torch.equal(first(tiny.encode_text("a red circle")), first())
    one = first(["a", "a"], negative_prompt="a red circle")
    both = first(["a", "a"], negative_prompt=["a red circle", "a star"])
    assert same(both[0], one[0])
    assert not same(both[1], one[1])


def test_prediction_eps_and_v_differ_as_they_should(tiny):
    other = tiny_model(prediction="eps")
    settings = dict(steps=2, sampler="ddim", guidance_scale=1.0)
    a, b = [next(ldm.denoise("a", **settings)) for ldm in (tiny, other)]
    wanted = tiny_ldm.eps_from_v(randn(1, 4, 4, 4), b.eps, ALPHAS_CUMPROD[a.t].item())
    torch.testing.assert_close(a.eps, wanted, rtol=1e-4, atol=1e-3)


def test_saved_and_loaded_is_the_same(tiny, tmp_path):
    path = tmp_path / "m.safetensors"
    tiny.save(path)
    loaded = LatentDiffusion.load(path, device="cpu")
    assert loaded.config == tiny.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    made, = tiny.generate("two stars", steps=3, progress=False)
    assert loaded.generate("two stars", steps=3, progress=False)[0] == made
    assert LatentDiffusion.load(path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_walks_in_float32(tiny, dtype):
    half = copy.deepcopy(tiny).to(dtype)
    for sampler in SAMPLERS:
        for step in half.denoise("a red circle", steps=3, sampler=sampler, image=gradient(32, 32)):
            assert step.x.dtype == step.x0.dtype == step.eps.dtype == torch.float32
    assert half.alphas_cumprod.dtype == torch.float64


@pytest.mark.parametrize("name", ["unet.conv_out.bias", "vae.post_quant_conv.bias"])
def test_non_finite_is_an_error_not_a_black_picture(name):
    ldm = tiny_model()
    ldm.get_parameter(name)[0] = math.inf
    with pytest.raises(InputError, match="not finite"):
        ldm.generate("a", steps=2, progress=False)


def gradient(width: int, height: int) -> Image.Image:
    """A picture in which every place is different."""
    across, down = Image.linear_gradient("L").rotate(90), Image.linear_gradient("L")
    channels = [across, down, Image.new("L", (256, 256), 128)]
    return Image.merge("RGB", channels).resize((width, height))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_goes_from_the_picture_to_noise(tiny, sampler):
    image = gradient(32, 32)
    walks = []
    for strength, steps in ((0, 1), (0.1, 1), (0.5, 5), (0.99, 9), (1, 10)):
        walk = list(tiny.denoise("a", image=image, strength=strength, steps=10, sampler=sampler))
        assert [step.index for step in walk] == list(range(10 - steps, 10))
        walks.append(walk)
    latents = tiny.encode_image(tiny_ldm.to_tensor([image]))
    *_, last = tiny.denoise("a", steps=10, sampler=sampler)
    for walk, end in ((walks[0], latents), (walks[-1], last.x)):
        assert torch.equal(walk[-1].x, end)


def test_image_to_image_starts_at_the_level_of_its_first_step(tiny):
    image = tiny_ldm.to_tensor([gradient(32, 32)])
    with calls_of(tiny.unet) as calls:
        next(tiny.denoise("a", image=image, strength=0.5, steps=10, sampler="ddim", seed=4,
                          guidance_scale=1.0))
    ((x, t, _), _), = calls
    assert t.tolist() == [401]
    a = ALPHAS_CUMPROD[401].item()
    noise = randn(1, 4, 4, 4, seed=4)
    torch.testing.assert_close(x, tiny_ldm.add_noise(tiny.encode_image(image), noise, a))


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m", "plms"])
def test_outside_the_mask_every_pixel_stays(tiny, sampler):
    image, mask = gradient(48, 32), Image.new("L", (48, 32))
    mask.paste(255, (10, 5, 30, 20))
    settings = dict(image=image, mask=mask, strength=1, steps=4, sampler=sampler)
    made, = tiny.generate("a red circle", progress=False, **settings)
    changed = (pixels_of([made]) != pixels_of([image]))[0].any(axis=-1)
    outside = np.asarray(mask) == 0
    assert changed.any() and not changed[outside].any()
    *_, last = tiny.denoise("a red circle", **settings)
    latents = tiny.encode_image(tiny_ldm.to_tensor([image]))
    kept = torch.ones(4, 6, dtype=torch.bool)
    kept[0:3, 1:4] = False                             # the latents that the mask touches
    assert torch.equal(last.x[..., kept], latents[..., kept])


def test_a_model_with_nine_channels_sees_mask_and_rest_of_the_picture():
    ldm = tiny_model(unet=replace(TINY.unet, in_channels=9))
    image, mask = gradient(32, 32), Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    settings = dict(image=image, mask=mask, strength=1, steps=2, progress=False)
    with calls_of(ldm.unet) as calls:
        made, = ldm.generate("a", **settings)
    right_half = (16, 0, 32, 32)
    assert made.crop(right_half) == image.crop(right_half)
    rest = tiny_ldm.to_tensor([image])
    rest[..., :16] = 0
    for seen in calls[0][0][0]:                        # without the prompt, and with it
        assert seen[4].tolist() == [[1, 1, 0, 0]] * 4
        torch.testing.assert_close(seen[5:], ldm.encode_image(rest)[0])
    with pytest.raises(InputError, match="this model repaints: give it an image and a mask"):
        ldm.generate("a", progress=False)


# --------------------------------------------------------------------------------------------------
# Same in, same out, also after long use, an interruption, or from several threads.

def test_same_in_same_out(built_in):
    """To the byte from run to run and in any order within a batch. The size of a batch and the
    number of threads change the order in which PyTorch adds, and it promises nothing there: at most
    one level of 256."""
    prompts, z = np.array(some_captions(4)), randn(4, 4, 8, 8)

    def pixels(*order):
        some = prompts[list(order)].tolist()
        settings = dict(sampler="ddim", steps=2, progress=False)
        return pixels_of(built_in.generate(some, latents=z[list(order)], **settings))

    plain = pixels(0, 1, 2, 3)
    assert np.array_equal(pixels(0, 1, 2, 3), plain)
    assert np.array_equal(pixels(2, 0, 3, 1), plain[[2, 0, 3, 1]])
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    other = pixels(1)
    torch.set_num_threads(threads)
    assert np.abs(other - plain[1]).max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_gpu_makes_the_pictures_of_the_cpu(built_in, sampler):
    """In float32 no pixel differs by more than 1 of 256."""
    pictures = []
    for device in ("cpu", "cuda"):
        ldm = copy.deepcopy(built_in).to(device)
        made = ldm.generate(["a red circle", "two blue stars"], sampler=sampler, progress=False)
        pictures.append(pixels_of(made))
    here, there = pictures
    assert np.abs(here - there).max() <= 1


def test_threads_generate_with_one_model(tiny):
    def make(seed):
        return tiny.generate("a red circle", seed=seed, steps=3, progress=False)[0].tobytes()

    alone = [make(seed) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, range(8))) == alone


def test_imported_twice_under_two_names(built_in, monkeypatch):
    spec = importlib.util.spec_from_file_location("again", HERE / "tiny_ldm.py")
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "again", again)
    spec.loader.exec_module(again)
    made, = again.LatentDiffusion.load(device="cpu").generate("a ring", steps=2, progress=False)
    assert built_in.generate("a ring", steps=2, progress=False)[0] == made


def test_an_interrupted_cell_leaves_nothing_behind(tiny):
    """Ctrl-C in a notebook raises KeyboardInterrupt wherever the kernel is; then one goes on."""
    wanted, = tiny.generate("a red circle", steps=4, progress=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)     # Python has none where & began it
    for step in (1, 3):
        seeds = iter(range(step))

        def interrupt(*args):
            if next(seeds) == step - 1:
                signal.raise_signal(signal.SIGINT)

        handle = tiny.unet.mid_block.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.generate("a red circle", steps=4, progress=False)
        handle.remove()
        assert torch.is_grad_enabled()
        assert tiny.generate("a red circle", steps=4, progress=False)[0] == wanted


# --------------------------------------------------------------------------------------------------
# 9. Training. The losses are the papers', and the loop does what it says: rate, clipping, averages.

def test_vae_loss_by_its_definition(tiny):
    image, noise = torch.rand(4, 3, 32, 32, generator=seeded()), randn(4, 4, 4, 4)
    mean, logvar = tiny.vae.encode(image)
    cloud = torch.distributions.Normal(mean, logvar.exp().sqrt())
    standard = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(cloud, standard).mean()
    decoded = tiny.vae.decode(mean + cloud.stddev * noise)
    errors = F.l1_loss(decoded, image) + F.mse_loss(decoded, image)
    for weight in (0, 1e-4, 1):
        found = tiny_ldm.vae_loss(tiny.vae, image, noise, weight)
        torch.testing.assert_close(found, errors + weight * kl)


def test_captions_are_dropped_as_told_or_one_in_ten(tiny):
    ids = tiny.tokenizer(["a red circle"]).repeat(3000, 1)
    x0, told = randn(3000, 4, 2, 2), torch.arange(3000) < 5
    given = dict(t=torch.arange(3000) % 1000, eps=randn(3000, 4, 2, 2, seed=1))
    with calls_of(tiny.text_encoder) as calls:
        tiny_ldm.text_to_image_loss(tiny, x0, ids, generator=seeded())
        loss = tiny_ldm.text_to_image_loss(tiny, x0, ids, dropped=told, **given)
    empty = tiny.tokenizer("")
    drawn, as_told = [(inputs[0] == empty).all(dim=1) for inputs, _ in calls]
    assert 0.08 < drawn.float().mean() < 0.12
    assert torch.equal(as_told, told)
    context = tiny.encode_text(["a red circle", ""])[told.long()]
    wanted = tiny_ldm.diffusion_loss(tiny.unet, x0, context, ALPHAS_CUMPROD, "v", **given)
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("steps, warm_up, cool_down", [(3000, 100, 1000), (30, 10, 10)])
def test_the_learning_rate_rises_stays_and_falls(steps, warm_up, cool_down):
    factors = [tiny_ldm.learning_rate_factor(step, steps) for step in range(steps)]
    assert factors[:2] == pytest.approx([1 / warm_up, 2 / warm_up])
    assert set(factors[warm_up - 1 : steps - cool_down + 1]) == {1.0}
    assert factors[-2:] == pytest.approx([2 / cool_down, 1 / cool_down])


@pytest.mark.parametrize("slope", [1, 100])         # the longer gradient is cut to length 1
def test_the_loop_follows_rate_clipping_and_average(slope):
    weight = torch.nn.Parameter(torch.zeros(1))
    averages = [torch.zeros(1)]
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def loss_of(step):
        return -slope * weight.sum()

    expected, average = 0.0, 0.0
    walk = tiny_ldm.train([weight], averages, optimizer, loss_of, steps=30, start=3)
    for step, loss in walk:
        assert loss == pytest.approx(-slope * expected, rel=1e-4, abs=1e-6)
        expected += 0.1 * tiny_ldm.learning_rate_factor(step, 30)
        kept = min(0.999, (step + 1) / (step + 10))
        average = kept * average + (1 - kept) * expected
        assert weight.item() == pytest.approx(expected, rel=1e-4)
        assert averages[0].item() == pytest.approx(average, rel=1e-4)
    assert step == 29


# --------------------------------------------------------------------------------------------------
# The converter. What an official file holds arrives under our names, bit for bit, from either
# layout and by whatever spelling; and goes back. All on narrow checkpoints: every name of Stable
# Diffusion 1.x, on layers a tenth as wide.

NARROW = replace(SD1, text=tiny_ldm.TextConfig(small_tokenizer(77).backend.get_vocab_size(),
                                               width=64, num_layers=2, num_heads=1),
                 vae=replace(SD1.vae, channels=32), unet=replace(SD1.unet, channels=32))
NARROW_INPAINT = replace(NARROW, name=SD1_INPAINT.name, unet=replace(NARROW.unet, in_channels=9))
TABLES = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod posterior_variance
    sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod
    sqrt_recipm1_alphas_cumprod posterior_log_variance_clipped posterior_mean_coef1
    posterior_mean_coef2""".split()


def synthetic(name: str, shape: tuple[int, ...], factor: float = 1.0) -> torch.Tensor:
    """Always the same numbers for a name, of a scale that keeps activations sane through the whole
    network; all but the norms' weights times factor."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    n = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
    if name.endswith("bias"):
        return 0.05 * factor * n
    if len(shape) == 1:
        return 1 + 0.1 * n
    return factor * (0.5 if "embedding" in name else math.prod(shape[1:]) ** -0.5) * n


def official_tensors(config=NARROW, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """A whole checkpoint in the official layout, with what else is in there."""
    entries = weights_convert.name_map(config).values()
    tensors = {e.official: synthetic(e.official, e.official_shape, factor) for e in entries}
    tensors.update((name, torch.zeros(1000)) for name in TABLES)
    tensors[f"{weights_convert.TEXT}.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    return tensors


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config=NARROW) -> None:
    """Official tensors as a diffusers folder with a tokenizer."""
    parts = {"unet": {}, "vae": {}, "text_encoder": {}}
    for entry in weights_convert.name_map(config).values():
        part, _, name = entry.diffusers.partition(".")
        parts[part][name] = tensors[entry.official]
    for part, named in parts.items():
        (folder / part).mkdir(parents=True)
        save_file(named, folder / weights_convert.part_files(part)[0])
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(small_tokenizer(77).backend.to_str())


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder with a narrow checkpoint of every kind, and a small vocabulary."""
    d, tensors = tmp_path_factory.mktemp("official"), official_tensors()
    (d / "tokenizer.json").write_text(small_tokenizer(77).backend.to_str())
    (d / "other.json").write_text(Tokenizer.train(["a red circle"], 500, 77).backend.to_str())
    save_file(tensors, d / "plain.safetensors")
    torch.save({"state_dict": tensors, "global_step": 1}, d / "plain.ckpt")
    half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(half, d / "half.safetensors")
    unet = {k: v for k, v in tensors.items() if k.startswith(weights_convert.UNET)}
    ema = {f"model_ema.{k[len('model.'):].replace('.', '')}": v for k, v in unet.items()}
    save_file({**tensors, **ema, **{k: v + 1 for k, v in unet.items()}}, d / "full-ema.safetensors")
    weights_convert.main([str(d / "plain.safetensors"), "-o", str(d / "ours.safetensors"),
                          "--tokenizer", str(d / "tokenizer.json")])
    return d


def convert(source, out, folder, *more) -> int:
    return weights_convert.main([str(source), "-o", str(out), "--tokenizer",
                                 str(folder / "tokenizer.json"), *more])


def last_line(capsys) -> str:
    """The last message on stderr, of one line."""
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return [line for line in lines if line.startswith("tiny_ldm: ")][-1]


def same_tensors(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("config, known", [
    (SD1, "dd0d17c940fbd3a9caaa5c0908f12bcc529c3920a6edcf30fe8eedab2d41b931"),
    (SD1_INPAINT, "1e54cd5f6b14b417c8ba329a678ebcd247819c297b8ad7dffd4871802835bff8")])
def test_the_map_covers_every_official_tensor(config, known):
    """The names and shapes of the published file, sorted, as one hash; with 9 input channels for
    inpainting."""
    entries = weights_convert.name_map(config).values()
    lines = sorted(f"{entry.official} {list(entry.official_shape)}" for entry in entries)
    assert len(lines) == 686 + 248 + 196
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == known


@pytest.mark.parametrize("name", ["plain.safetensors", "plain.ckpt", "half.safetensors",
                                  "full-ema.safetensors"])
def test_there_and_back_gives_the_same_bits(name, official, tmp_path, capsys):
    ours, theirs = tmp_path / "t.safetensors", tmp_path / "o.safetensors"
    assert convert(official / name, ours, official) == 0
    assert ("EMA" in capsys.readouterr().err) == (name == "full-ema.safetensors")
    ldm = LatentDiffusion.load(ours, "cpu")
    assert ldm.config == NARROW
    assert weights_convert.main(["--to", "official", str(ours), "-o", str(theirs)]) == 0
    back, source = load_file(theirs), load_file(official / "plain.safetensors")
    assert len(back) == 686 + 248 + 196 - 16 * 10
    if name == "half.safetensors":
        source = {name: t.half() for name, t in source.items()}
    assert all(torch.equal(t, source[name]) for name, t in back.items())


def test_other_spellings_of_official_names_are_read(official, tmp_path):
    spelled = {}
    for name, t in official_tensors().items():
        name = name.replace("transformer.text_model.", "transformer.")
        for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            name = name.replace(f"mid.attn_1.{ours}.", f"mid.attn_1.{theirs}.")
        spelled[name] = t
    spelled["cond_stage_model.logit_scale"] = torch.tensor(4.6)
    spelled["cond_stage_model.transformer.text_projection.weight"] = torch.zeros(3, 3)
    save_file(spelled, tmp_path / "x.safetensors")
    assert convert(tmp_path / "x.safetensors", tmp_path / "x", official) == 0
    assert (tmp_path / "x").read_bytes() == (official / "ours.safetensors").read_bytes()


def test_an_inpainting_model_converts_from_either_layout(official, tmp_path):
    tensors = official_tensors(NARROW_INPAINT)
    write_folder(tmp_path / "folder", tensors, NARROW_INPAINT)
    save_file(tensors, tmp_path / "official.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert convert(tmp_path / "official.safetensors", a, official) == 0
    assert convert(tmp_path / "folder", b, official) == 0
    assert LatentDiffusion.load(a, "cpu").config == NARROW_INPAINT
    assert load_file(a)["unet.down_blocks.0.0.weight"].shape == (32, 9, 3, 3)
    assert a.read_bytes() == b.read_bytes()


def test_diffusers_folders_of_every_age_convert_to_the_same(official, tmp_path):
    write_folder(tmp_path, official_tensors())
    stem = "diffusion_pytorch_model"
    for part, name, other in (("unet", stem, f"{stem}.bin"),
                              ("vae", stem, f"{stem}.fp16.safetensors"),
                              ("text_encoder", "model", "pytorch_model.bin")):
        file = tmp_path / part / f"{name}.safetensors"
        tensors = load_file(file)
        file.unlink()
        if part == "vae":                     # the attention's names before diffusers 0.15
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                             ("to_out.0", "proj_attn")):
                new, old = f".attentions.0.{new}.", f".attentions.0.{old}."
                tensors = {k.replace(new, old): v for k, v in tensors.items()}
        if part == "text_encoder":    # the names before transformers 5, with old files' buffer
            tensors = {f"text_model.{name}": t for name, t in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save = torch.save if other.endswith("bin") else save_file
        save(tensors, tmp_path / part / other)
    assert weights_convert.main([str(tmp_path), "-o", str(tmp_path / "t.safetensors")]) == 0
    assert same_tensors(tmp_path / "t.safetensors", official / "ours.safetensors")


def test_a_folder_s_scheduler_says_what_the_unet_predicts(tmp_path, capsys):
    """Its tensors can't: a fine-tune to v-prediction has the same. Missing entries are SD 1.x's."""
    write_folder(tmp_path / "f", official_tensors())
    (tmp_path / "f" / "scheduler").mkdir()
    file, out = tmp_path / "f" / "scheduler" / "scheduler_config.json", tmp_path / "t.safetensors"

    def convert_with(**scheduler) -> int:
        file.write_text(json.dumps(scheduler))
        return weights_convert.main([str(tmp_path / "f"), "-o", str(out), "--force"])

    assert convert_with(**SD1_SCHEDULE, num_train_timesteps=1000, trained_betas=None) == 0
    assert LatentDiffusion.load(out, "cpu").config == NARROW
    assert convert_with(prediction_type="v_prediction", beta_end=0.02) == 0
    schedule = replace(NARROW.schedule, beta_end=0.02)
    assert LatentDiffusion.load(out, "cpu").config == replace(NARROW, prediction="v",
                                                              schedule=schedule)
    for name, value in (("prediction_type", "sample"), ("rescale_betas_zero_snr", True),
                        ("beta_schedule", "linear"), ("num_train_timesteps", 500)):
        assert convert_with(**{name: value}) == 2
        assert f"{name} is {value!r}" in last_line(capsys)
    assert convert_with(beta_start="x") == 2 and "scheduler_config.json" in last_line(capsys)


def test_a_known_file_is_named_by_size_and_hash(official, tmp_path, monkeypatch, capsys):
    source = official / "plain.ckpt"
    assert convert(source, tmp_path / "a.safetensors", official) == 0
    assert "in a file that is not on record" in last_line(capsys)
    size, digest = source.stat().st_size, hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(weights_convert, "KNOWN_SIZES", [(size, size)])
    monkeypatch.setitem(weights_convert.KNOWN, digest, "sd-v1-0.ckpt")
    assert convert(source, tmp_path / "b.safetensors", official) == 0
    assert last_line(capsys).endswith("plain.ckpt is sd-v1-0.ckpt")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_another_precision_on_request(dtype, official, tmp_path):
    """Also from a file that mixes them, as fine-tunes do."""
    tensors = load_file(official / "plain.safetensors")
    for name in list(tensors)[::3]:
        tensors[name] = tensors[name].half()
    save_file(tensors, tmp_path / "mixed.safetensors")
    out, mixed = tmp_path / "t.safetensors", tmp_path / "m.safetensors"
    assert convert(tmp_path / "mixed.safetensors", out, official, "--dtype", dtype) == 0
    assert {t.dtype for t in load_file(out).values()} == {getattr(torch, dtype)}
    assert convert(tmp_path / "mixed.safetensors", mixed, official) == 0
    assert {t.dtype for t in load_file(mixed).values()} == {torch.float16, torch.float32}


# Pickles are programs. Nothing in one runs; what training frameworks leave in a checkpoint is put
# up with, anything else refused.

def test_what_lightning_left_in_a_checkpoint_is_inert(official, tmp_path, monkeypatch):
    """And what hangs on a tensor, in place of its methods, is left behind."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = ModelCheckpoint
    callback = ModelCheckpoint()
    callback.best = np.float64(0.5)
    tensors = load_file(official / "plain.safetensors")
    for t in tensors.values():
        t.reshape = t.shape_of = "neither a method nor a number"
    torch.save({"state_dict": tensors, "callbacks": {ModelCheckpoint: callback}},
               tmp_path / "lightning.ckpt")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    assert convert(tmp_path / "lightning.ckpt", tmp_path / "t", official) == 0
    assert (tmp_path / "t").read_bytes() == (official / "ours.safetensors").read_bytes()


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_is_refused_and_nothing_runs(official, tmp_path, capsys):
    tensors = load_file(official / "plain.safetensors")
    torch.save({"state_dict": tensors, "x": Hostile(tmp_path / "ran")}, tmp_path / "h.ckpt")
    assert convert(tmp_path / "h.ckpt", tmp_path / "t.safetensors", official) == 2
    assert "system" in last_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["h.ckpt"]


# Whatever is wrong is said in one line, with exit code 2, and leaves no file.

BIAS, CONV_IN = (f"{weights_convert.UNET}.{name}" for name in ("out.2.bias",
                                                               "input_blocks.0.0.weight"))


@whole
@pytest.mark.parametrize("name, tensor, message", [
    (BIAS, None, f"lacks {BIAS}"), (BIAS, torch.zeros(5), f"{BIAS} is torch.float32 [5]"),
    (BIAS, torch.zeros(4, dtype=torch.int32), f"{BIAS} is torch.int32 [4]"),
    (BIAS, torch.full((4,), math.nan), "unet.conv_out.bias holds values that are not finite"),
    ("more", torch.zeros(1), "holds 1 tensors that such a model has not: more"),
    ("cond_stage_model.transformer.final_layer_norm.bias", torch.ones(64), "norm.bias twice"),
    ("cond_stage_model.model.ln_final.weight", torch.zeros(3), "is Stable Diffusion 2.x"),
    ("conditioner.embedders.0.x", torch.zeros(3), "is Stable Diffusion XL"),
    ("lora_unet_down_blocks_0.lora_up.weight", torch.zeros(3), "is a LoRA"),
    (CONV_IN, None, f"is no Stable Diffusion 1.x (ValueError: it lacks {CONV_IN}"),
    (CONV_IN, torch.zeros(32, 8, 3, 3), "it has 8 input channels rather than 4 (or 9, to repaint)"),
    (CONV_IN, torch.zeros(33, 4, 3, 3), "is no Stable Diffusion 1.x ("),
    ("first_stage_model.encoder.conv_in.weight", torch.zeros(()), "is no Stable Diffusion 1.x ("),
    (f"{weights_convert.TEXT}.embeddings.token_embedding.weight", torch.zeros(3),
     "is no Stable Diffusion 1.x (")])
def test_tensors_that_do_not_fit_are_named(name, tensor, message, official, tmp_path, capsys):
    source, out = tmp_path / "x.safetensors", tmp_path / "t.safetensors"
    tensors = {**load_file(official / "plain.safetensors"), name: tensor}
    save_file({k: t for k, t in tensors.items() if t is not None}, source)
    assert convert(source, out, official) == 2
    assert message in last_line(capsys) and not out.exists()


@pytest.mark.parametrize("source, damage, message", [
    ("plain.ckpt", lambda data: b"version https://git-lfs.github.com/spec/v1\noid", "is a git-LFS"),
    ("plain.ckpt", lambda data: data[:100000], "is neither a whole .safetensors nor a whole .ckpt"),
    ("plain.safetensors", lambda data: data[:100000], "is neither a whole .safetensors nor a"),
    ("plain.safetensors", lambda data: b"", "nor a whole .ckpt (a zip, as torch writes it since 1"),
    ("plain.ckpt", lambda data: data.replace(b"state_dict", b"\xff\xff\xffte_dict", 1), "damaged")])
def test_damaged_files_are_named(source, damage, message, official, tmp_path, capsys):
    (tmp_path / source).write_bytes(damage((official / source).read_bytes()))
    assert convert(tmp_path / source, tmp_path / "t.safetensors", official) == 2
    assert message in last_line(capsys) and not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize("name, tensor, message", [
    ("unet.conv_out.bias", None, "lacks unet.conv_out.bias"),
    ("text_encoder.layers.0.fc1.bias", torch.zeros(2), "fc1.bias is torch.float32 [2]")])
def test_a_damaged_file_is_not_turned_back(name, tensor, message, official, tmp_path, capsys):
    source, out = tmp_path / "bad.safetensors", tmp_path / "o.safetensors"
    tensors = {**load_file(official / "ours.safetensors"), name: tensor}
    with safe_open(official / "ours.safetensors", framework="pt") as file:
        save_file({k: t for k, t in tensors.items() if t is not None}, source, file.metadata())
    assert weights_convert.main(["--to", "official", str(source), "-o", str(out)]) == 2
    assert message in last_line(capsys) and not out.exists()


@pytest.mark.parametrize("part, name, width, message", [
    ("text_encoder", "embeddings.token_embedding.weight", 1024, "is Stable Diffusion 2.x"),
    ("unet", "add_embedding.linear_1.weight", 3, "is Stable Diffusion XL"),
    ("unet", "x", 3, "is no Stable Diffusion 1.x"),
    (None, None, None, "lacks unet/diffusion_pytorch_model.safetensors, so it is no diffusers")])
def test_folders_of_other_models_are_named(part, name, width, message, official, tmp_path, capsys):
    for p in ("unet", "vae", "text_encoder") if part else ():
        (tmp_path / p).mkdir()
        save_file({name if p == part else "x": torch.zeros(3, width or 1)},
                  tmp_path / weights_convert.part_files(p)[0])
    before = sorted(tmp_path.rglob("*"))
    assert convert(tmp_path, tmp_path / "t.safetensors", official) == 2
    assert message in last_line(capsys) and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("args, message", [
    ([], "the following arguments are required: SOURCE"),
    (["plain.ckpt", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["nowhere.ckpt"], "no file nowhere.ckpt"),
    (["plain.ckpt", "--tokenizer", "nowhere"], "no file nowhere"),
    (["plain.ckpt", "--tokenizer", "plain.ckpt"], "plain.ckpt is no CLIP vocabulary"),
    (["plain.ckpt", "--tokenizer", "other.json"], "and plain.ckpt has"),
    (["plain.ckpt", "--tokenizer", "tokenizer.json", "-o", "nowhere/x"], "nowhere/x can't be"),
    (["--to", "official", "plain.safetensors"], "plain.safetensors is an official checkpoint"),
    (["--to", "official", "plain.ckpt"], "plain.ckpt is damaged or no .safetensors file"),
    (["--to", "official", str(tiny_ldm.BUILT_IN)], "is not built like Stable Diffusion 1.x (other: "
     "prediction, scale_factor, guidance_scale, vae, unet)")])
def test_bad_arguments_are_one_line_and_exit_code_2(args, message, official, monkeypatch, capsys):
    monkeypatch.chdir(official)
    before = {path: path.stat().st_mtime_ns for path in official.iterdir()}
    assert weights_convert.main(args) == 2
    assert message in last_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in official.iterdir()} == before


def test_an_output_is_replaced_only_with_force_and_where_there_is_room(official, tmp_path,
                                                                       monkeypatch, capsys):
    source, out = official / "plain.safetensors", tmp_path / "t.safetensors"
    out.write_text("mine")
    assert convert(source, out, official) == 2 and "exists already" in last_line(capsys)
    os.mkfifo(tmp_path / "pipe")                  # nor is what only looks like a file, ever
    assert convert(source, tmp_path / "pipe", official, "--force") == 2
    assert (tmp_path / "pipe").is_fifo() and "exists already" in last_line(capsys)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
        assert convert(source, out, official, "--force") == 2
    assert "make room" in last_line(capsys) and out.read_text() == "mine"
    assert convert(source, out, official, "--force") == 0 and out.stat().st_size > 1000


# --------------------------------------------------------------------------------------------------
# Where a vocabulary comes from: three forms of file, a folder, the hub; the ids are CLIP's.

CLIP = Path(os.environ.get("TINY_LDM_CLIP_DIR", "nowhere"))
CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"


def test_every_form_of_a_vocabulary_gives_the_same(tmp_path):
    """A tokenizer.json, whose merges are pairs or, in older files, strings; and vocab.json with
    merges.txt."""
    text = small_tokenizer(77).backend.to_str()
    tree = json.loads(text)
    merges = [" ".join(pair) for pair in tree["model"]["merges"]]
    old, folder = tmp_path / "old.json", tmp_path / "folder"
    (tmp_path / "tokenizer.json").write_text(text)
    old.write_text(json.dumps({"model": {**tree["model"], "merges": merges}}))
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(tree["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    for source in (tmp_path, tmp_path / "tokenizer.json", old, folder):
        assert weights_convert.read_tokenizer(source).to_str() == text


@pytest.fixture
def clip():
    """CLIP's tokenizer, from OpenAI's file."""
    if not CLIP.is_dir():
        pytest.skip("TINY_LDM_CLIP_DIR names no folder with CLIP's vocabulary")
    return Tokenizer(weights_convert.read_tokenizer(CLIP / CLIP_FILE), 77)


def test_ids_are_those_of_clips_tokenizer(clip):
    for line in (CLIP / "tokens.jsonl").read_text("utf-8").splitlines():
        case = json.loads(line)
        ids = case["ids"][:76] + [49407] * max(1, 77 - len(case["ids"]))
        assert clip([case["text"]])[0].tolist() == ids[:77], case["text"]
    assert clip(["a " * 75 + "red fox"])[0, -2:].tolist() == [320, 49407]


@whole
def test_ids_are_those_of_transformers(clip, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = json.loads(clip.backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *[" ".join(pair) for pair in model["merges"]]]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    words = ["a", "Photo", "THE", "don't", "we'LL", "é", "e\u0301", "ß", "İ", "ﬁ", "日本", "👩\u200d🚀",
             "1234", "3.5", "--", "(((", "<|startoftext|>", "<|endoftext|>", "\t", "\u00a0", "_x_",
             "&amp;", "ǅ", "٣", "x" * 30]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(words) + rng.choice(["", " ", "  "]) for _ in range(30))
        wanted = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert clip([text])[0].tolist() == wanted, text


@pytest.fixture
def hub(tmp_path):
    """A local server that speaks for the hub: one repository, a narrow diffusers folder. Gives a
    function that runs the converter with it."""
    d, sha = tmp_path / "model", "f" * 40
    write_folder(d, official_tensors())
    files = {str(p.relative_to(d)): p.stat().st_size for p in d.rglob("*") if p.is_file()}
    info = {"id": "some/model", "sha": sha, "siblings": [{"rfilename": name} for name in files]}
    tree = [{"type": "file", "path": name, "size": size, "oid": "0"}
            for name, size in files.items()]
    (tmp_path / "info.json").write_text(json.dumps(info))
    (tmp_path / "tree.json").write_text(json.dumps(tree))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            if path.startswith("/api/models/some/model"):
                return str(tmp_path / ("tree.json" if "/tree/" in path else "info.json"))
            return str(d / (path.partition(f"/some/model/resolve/{sha}/")[2] or "nowhere"))

        def end_headers(self):
            self.send_header("X-Repo-Commit", sha)
            self.send_header("ETag", f'"{zlib.crc32(self.path.encode()):x}"')
            super().end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield functools.partial(run, program="weights_convert.py", cwd=tmp_path, HF_HUB_DISABLE_XET="1",
                            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
                            HF_HOME=str(tmp_path / "home"))
    server.shutdown()


@whole
def test_a_hub_repository_is_downloaded_and_converted(hub, official, tmp_path):
    done = hub("some/model")
    assert (done.returncode, done.stdout) == (0, "model.tiny_ldm.safetensors\n"), done.stderr
    assert same_tensors(tmp_path / "model.tiny_ldm.safetensors", official / "ours.safetensors")
    for source, message in (("some/other", "some/other can't be had from the hub"),
                            (official / "plain.ckpt", "pass --tokenizer with bpe_simple_vocab_16")):
        done = hub(source)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# Stable Diffusion 1.x, number for number. The same inputs go through our networks and those of
# transformers and diffusers; GOLDEN is what these gave, for where they are not installed. All in
# float64, where nothing but a difference of meaning can show. With weights a hundredth as large,
# what reaches each norm has a variance near the norm's epsilon: a wrong one shows as 0.1 and more,
# and on ordinary weights as 1e-5.

SD1_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def inputs(dtype) -> dict[str, torch.Tensor]:
    """What all networks are asked with: always the same."""
    random = np.random.RandomState(0)
    ids = torch.from_numpy(random.randint(0, 200, (2, 77)))
    shapes = {"x": (2, 4, 16, 24), "image": (1, 3, 64, 128), "z": (1, 4, 8, 16),
              "start": (1, 4, 16, 24)}
    drawn = {name: torch.from_numpy(random.standard_normal(shape)).to(dtype)
             for name, shape in shapes.items()}
    return {"ids": ids, **drawn, "image": drawn["image"].clamp(-1, 1)}


@torch.no_grad()
def our_outputs(ldm: LatentDiffusion, dtype=torch.float64, steps: int = 10) -> dict:
    i = inputs(dtype)
    context = ldm.text_encoder(i["ids"])
    *_, last = ldm.denoise(context[1:], context[:1], sampler="ddim", steps=steps,
                           guidance_scale=7.5, latents=i["start"])
    return {"text encoder": context,
            "U-Net, t = 1": ldm.unet(i["x"], torch.tensor([1, 1]), context),
            "U-Net, t = 981": ldm.unet(i["x"], torch.tensor([981, 981]), context),
            "VAE, encode": torch.cat(ldm.vae.encode(i["image"]), dim=1),
            "VAE, decode": ldm.vae.decode(i["z"]), "DDIM": last.x}


@torch.no_grad()
def their_outputs(models: tuple, dtype=torch.float64, steps: int = 10) -> dict:
    import diffusers
    (text, unet, vae), i = models, inputs(dtype)
    context = text(i["ids"]).last_hidden_state
    posterior = vae.encode(i["image"]).latent_dist
    scheduler = diffusers.DDIMScheduler(**SD1_SCHEDULE, steps_offset=1, clip_sample=False,
                                        set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    x = i["start"]
    for t in scheduler.timesteps:
        empty, prompt = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = scheduler.step(empty + 7.5 * (prompt - empty), t, x).prev_sample
    return {"text encoder": context, "U-Net, t = 1": unet(i["x"], 1, context).sample,
            "U-Net, t = 981": unet(i["x"], 981, context).sample,
            "VAE, encode": torch.cat([posterior.mean, posterior.logvar], dim=1),
            "VAE, decode": vae.decode(i["z"]).sample, "DDIM": x}


def reference_models(c: tiny_ldm.Config, tensors: dict[str, torch.Tensor]) -> tuple:
    """transformers' text encoder, diffusers' U-Net and VAE, as wide as c says, with official
    tensors in them, renamed by diffusers' own rules."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from diffusers.loaders import single_file_utils as rules
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=c.text.vocab_size, hidden_size=c.text.width, hidden_act="quick_gelu",
        intermediate_size=4 * c.text.width, num_hidden_layers=c.text.num_layers,
        num_attention_heads=c.text.num_heads, bos_token_id=0, eos_token_id=1))
    unet = diffusers.UNet2DConditionModel(
        cross_attention_dim=c.text.width, attention_head_dim=8,
        block_out_channels=tuple(c.unet.channels * mult for mult in c.unet.channel_mult))
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        block_out_channels=tuple(c.vae.channels * mult for mult in c.vae.channel_mult))
    prefix = f"{weights_convert.TEXT}."
    text_tensors = {name.removeprefix(prefix): t for name, t in tensors.items()
                    if name.startswith(prefix) and not name.endswith("position_ids")}
    getattr(text, "text_model", text).load_state_dict(text_tensors, assign=True)
    unet.load_state_dict(rules.convert_ldm_unet_checkpoint(tensors, unet.config), assign=True)
    vae.load_state_dict(rules.convert_ldm_vae_checkpoint(tensors, vae.config), assign=True)
    return tuple(model.eval().requires_grad_(False) for model in (text, unet, vae))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# Six values of each of `their_outputs`, by transformers 5.24 and diffusers 0.42, for the narrow
# checkpoint `official_tensors(factor=...)`
GOLDEN = {
    1.0: {
        "text encoder": [-1.95908064, 0.459222536, -0.411673869, 0.727314733, 0.83116248,
                         -0.725095146],
        "U-Net, t = 1": [0.0287531323, -0.222705155, 0.163893726, -0.106276206, 0.695494123,
                         0.58126671],
        "U-Net, t = 981": [0.0119283241, -0.242865625, 0.230685415, -0.12657128, 0.756475439,
                           0.64293544],
        "VAE, encode": [-0.331881637, -0.718639676, -0.0350717757, -0.26515887, -0.0904472945,
                        0.0956287005],
        "VAE, decode": [-0.155510369, -0.0842387059, 0.0946416495, 0.101547478, 0.116879312,
                        0.891462928],
        "DDIM": [3.35050752, 4.19511023, -9.56790971, 10.6799355, 8.27845551, 11.548071]},
    0.01: {
        "text encoder": [-0.120533875, -0.336852009, 0.0390874062, 0.210487275, 0.101134055,
                         0.234540763],
        "U-Net, t = 1": [-0.000679867348, -0.00102797067, -0.000451912314, -0.00393350119,
                         0.00346159338, -0.00636485595],
        "U-Net, t = 981": [-0.000679865692, -0.00102796825, -0.000451925888, -0.00393350052,
                           0.00346160448, -0.00636485313],
        "VAE, encode": [-0.00139349109, -0.000466821574, 0.00012564734, 0.000248715242,
                        -0.000195638581, -0.000159050153],
        "VAE, decode": [-0.00269819821, -0.00446293318, 0.00253607057, -0.00172857482,
                        -0.000882066579, 0.00285158645],
        "DDIM": [0.772402913, 2.64802019, -4.44713666, 14.9902051, 7.51345329,
                           1.07380891]}}


def check_golden(outputs: dict[str, torch.Tensor], factor: float) -> None:
    for name, t in outputs.items():
        six = t.flatten()[:: t.numel() // 6][:6]
        limit = 1e-5 if name == "DDIM" else 1e-7          # (our walk's latents are float32)
        assert relative_error(six, torch.tensor(GOLDEN[factor][name])) <= limit, name


@pytest.mark.parametrize("factor", [1.0, 1e-2])
def test_networks_give_the_golden_numbers(factor, official, tmp_path):
    save_file(official_tensors(factor=factor), tmp_path / "plain.safetensors")
    assert convert(tmp_path / "plain.safetensors", tmp_path / "t.safetensors", official) == 0
    ldm = LatentDiffusion.load(tmp_path / "t.safetensors", "cpu", torch.float64)
    check_golden(our_outputs(ldm), factor)


@pytest.mark.parametrize("factor", [1.0, 1e-2])
def test_networks_equal_the_reference_implementations(factor, tmp_path):
    """Live, at every value, from a folder that diffusers itself has written."""
    models = reference_models(NARROW, official_tensors(factor=factor))
    for model, name in zip(models, ("text_encoder", "unet", "vae")):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(small_tokenizer(77).backend.to_str())
    assert weights_convert.main([str(tmp_path), "-o", str(tmp_path / "t.safetensors")]) == 0
    ldm = LatentDiffusion.load(tmp_path / "t.safetensors", "cpu", torch.float64)
    theirs = their_outputs([model.double() for model in models])
    for name, ours in our_outputs(ldm).items():
        limit = 1e-5 if name == "DDIM" else 1e-12
        assert relative_error(ours, theirs[name]) <= limit, name
    check_golden(theirs, factor)


# What float32 on a CPU allows: max error over max value.
LIMITS = {"text encoder": 2e-6, "U-Net": 5e-6, "VAE": 3e-6, "DDIM": 5e-6}


def measured(program: str, *args) -> tuple[float, float]:
    """Runs one of the two commands: (its peak memory in bytes, seconds)."""
    status = "open('/proc/self/status').read()"      # ru_maxrss would count this process, too
    code = (f"import sys, {program}; code = {program}.main(sys.argv[1:]); "
            f"print({status}.partition('VmHWM:')[2].split()[0]); sys.exit(code)")
    begin = time.time()
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=HERE, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.split()[-1]), time.time() - begin


def comparison(d: Path, config, vocabulary: Path, steps: int, factor: float = 1.0) -> dict:
    """Writes a checkpoint, converts it by the command, and compares all networks, a whole walk and
    its picture with the references', in float32. One of the two models is in memory at a time."""
    source, out = d / "sd1.safetensors", d / "t.safetensors"
    rows = {e.official: (synthetic(e.official, e.official_shape, factor), e.official_shape)
            for e in weights_convert.name_map(config).values()}
    weights_convert.write_safetensors(source, rows, torch.float32, {})
    del rows
    peak, seconds = measured("weights_convert", source, "-o", out, "--tokenizer", vocabulary)
    found = {"conversion: seconds": seconds, "conversion: GB written": out.stat().st_size / 1e9,
             "conversion: GB of memory at the peak": peak / 1e9}
    assert peak <= 1.2e9          # one tensor at a time: all of them are 4.3 GB

    import diffusers
    models = reference_models(config, load_file(source))
    theirs, vae = their_outputs(models, torch.float32, steps), models[2]
    finish = diffusers.image_processor.VaeImageProcessor().postprocess
    their_picture = finish(vae.decode(theirs["DDIM"] / 0.18215).sample, "pil")[0]
    exact = vae.double().decode(inputs(torch.float64)["z"]).sample
    rounding = relative_error(theirs["VAE, decode"], exact)
    del models, vae
    ldm = LatentDiffusion.load(out, "cpu")
    ours = our_outputs(ldm, torch.float32, steps)
    our_picture = tiny_ldm.to_pil(ldm.decode_latents(ours["DDIM"]))[0]
    for name, t in ours.items():
        found[name] = relative_error(t, theirs[name])
        limit = LIMITS[name.partition(",")[0]]
        if name.startswith("VAE"):    # without AVX-512, oneDNN rounds more: their own is 4.6e-6 off
            limit = max(limit, 1.5 * rounding)
        assert found[name] <= limit, (name, found[name])
    difference = np.abs(np.asarray(our_picture, dtype=int) - np.asarray(their_picture, dtype=int))
    found["diffusers' VAE from its own in float64"] = rounding
    found["picture: differing 8-bit values, %"] = 100 * (difference > 0).mean()
    assert found["picture: differing 8-bit values, %"] <= 0.1 and difference.max() <= 1
    return found


@whole
@pytest.mark.parametrize("factor", [1.0, 1e-2])
def test_single_precision_stays_within_the_limits(factor, official, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    comparison(tmp_path, NARROW, official / "tokenizer.json", steps=50, factor=factor)


@pytest.mark.skipif(not (os.environ.get("TINY_LDM_FULL_SIZE") and CLIP.is_dir()),
                    reason="needs 9 GB of disk, 16 GB of memory, 10 minutes and CLIP's vocabulary: "
                           "set TINY_LDM_FULL_SIZE=1 and TINY_LDM_CLIP_DIR")
def test_full_size_stable_diffusion_equals_the_references(capsys):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    with tempfile.TemporaryDirectory() as d:      # pytest's own would stay for three runs
        found = comparison(Path(d), SD1, CLIP / CLIP_FILE, steps=50)
        peak, seconds = measured("tiny_ldm", "an astronaut", "--weights", Path(d) / "t.safetensors",
                                 "--device", "cpu", "--steps", 1, "-o", Path(d) / "p.png")
    found["one step at 512 x 512 and all around it: seconds"] = seconds
    found["one step at 512 x 512 and all around it: GB of memory at the peak"] = peak / 1e9
    with capsys.disabled():
        print("".join(f"\n    {name}: {value:.3g}" for name, value in found.items()))


# --------------------------------------------------------------------------------------------------
# 10. Shapes. A number and a seed mean one picture and one caption for ever, and a caption says what
# its picture shows.

@pytest.mark.parametrize("size, seed, digest", [       # of commit 8f0b1d8
    (64, 0, "c8f69fb7c7bb3ce7ca0a76a1aa4e526bdaeca40127785ea7d540ae6587349d4f"),
    (64, 7, "a9bb66e02130a85a52c8ab5f7daff9616c8ddd9cccf285f135bd8a4f6f5b2c53"),
    (128, 0, "d28fd9d1fc24b579f09a5670448c583d4a42f8e94ed6e2a61c76af97d2fd479c")])
def test_pictures_and_captions_stay_what_they_were(size, seed, digest):
    data, found = tiny_ldm.ShapesData(size, seed), hashlib.sha256()
    for i in range(100):
        picture, caption = data.item(i)
        found.update(picture.tobytes() + caption.encode())
    assert found.hexdigest() == digest


def test_scenes_are_as_the_grammar_says():
    for i in range(500):
        rng = random.Random(i)
        scene = random_scene(rng)
        spots = place(scene, rng)
        for thing, (x, y, r) in zip(scene.things, spots):
            assert not is_held_out(thing) and thing.colour != (scene.background or "white")
            assert 1.1 * r <= min(x, y) and max(x, y) <= 128 - 1.1 * r
            assert 13 <= r <= 16 or (20 <= r <= 22 if len(spots) == 3 else 21 <= r <= 26)
            assert thing.size is None or (r < 18) == (thing.size == "small")
        if scene.relation:
            (x1, y1, _), (x2, y2, _) = spots
            along = {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}
            assert along[scene.relation] == max(abs(x2 - x1), abs(y2 - y1)) > 0
        assert is_held_out(random_scene(rng, held_out=True).things[0])
    pairs = [Thing(colour, shape) for colour in COLOURS for shape in SHAPE_NAMES]
    assert {f"{pair.colour} {pair.shape}" for pair in pairs if is_held_out(pair)} == {
        "red star", "orange triangle", "yellow square", "green circle", "blue cross",
        "purple ring", "black diamond", "white heart"}


def test_captions_read_well_also_in_free_words():
    ring, star = Thing("orange", "ring", "large"), Thing("red", "star")
    crosses = (Thing("red", "cross", "small"),) * 3
    assert caption_of(Scene((ring,), None, "blue")) == "a large orange ring on a blue background"
    assert caption_of(Scene((star, ring), "left of")) == "a red star left of a large orange ring"
    assert caption_of(Scene(crosses, None, "orange")) == (
        "three small red crosses on an orange background")
    caption = "a small red circle left of an orange star on a blue background"
    texts = {tiny_ldm.rephrase(caption, random.Random(i)) for i in range(50)}
    assert len(texts) > 20
    for text in texts:
        for words in ("red circle", "orange star", "blue background", "left of"):
            assert words in text


# --------------------------------------------------------------------------------------------------
# 11. Files. Pictures of any kind and size come in as the one kind that the lesson takes, and a file
# is written whole or not at all.

def test_pictures_of_every_kind_become_rgb(tmp_path):
    turned = Image.new("RGB", (2, 3), (156, 156, 156))
    exif = turned.getexif()
    exif[0x0112] = 6                                    # "turn me by a quarter to see me upright"
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((2, 3), 40000, np.uint16)).save(tmp_path / "deep.png")
    clear = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    clear.quantize(2).save(tmp_path / "palette.gif", transparency=0)
    Image.new("CMYK", (3, 2), (0, 0, 0, 99)).save(tmp_path / "print.jpg")
    for name, grey in (("turned.png", 156), ("deep.png", 156), ("print.jpg", 156),
                       ("clear.png", 255), ("palette.gif", 255)):
        picture = tiny_ldm.open_image(tmp_path / name)
        assert (picture.mode, picture.size) == ("RGB", (3, 2)), name
        assert np.abs(pixels_of([picture]) - grey).max() <= 1, name


def test_a_mask_is_read_by_its_brightness_next_to_any_image():
    mask = Image.new("RGB", (64, 64))
    mask.paste((0, 255, 0), (0, 0, 64, 16))                # the upper quarter, in green
    picture = gradient(64, 64)
    for image in (picture, tiny_ldm.to_tensor([picture])):
        repaint = tiny_ldm.fit_pictures(TINY, image, mask)["mask"]
        assert repaint[..., :15, :].all() and not repaint[..., 17:, :].any()


@pytest.mark.parametrize("prompts, negatives", [(4, 2), (2, 4), (1, 2)])
def test_negative_prompts_are_one_for_all_or_one_for_each(tiny, prompts, negatives):
    with pytest.raises(InputError, match=f"{prompts} prompts and {negatives} negative prompts"):
        tiny.generate(["a"] * prompts, ["b"] * negatives, steps=1, progress=False)
    with pytest.raises(InputError, match="0 prompts and 1 negative prompts"):
        tiny.generate([], steps=1, progress=False)


@pytest.mark.parametrize("width, height, wanted", [
    (None, None, (48, 48)), (32, None, (48, 32)), (16, 64, (64, 16))])
def test_pictures_are_cropped_to_the_nearest_size_and_their_masks_with_them(width, height, wanted):
    mask = Image.new("L", (25, 20))
    mask.paste(255, (0, 0, 12, 20))                     # the left half, in another resolution
    fitted = tiny_ldm.fit_pictures(TINY, gradient(50, 41), mask, width, height, eta=1)
    image, bits = fitted["image"], fitted["mask"]
    assert image.shape == (1, 3, *wanted) and -1 <= image.min() and image.max() <= 1
    assert bits.shape == (1, 1, *wanted) and bits.dtype == torch.bool
    left = image[:, :1] < (2 * 24 / 50 - 1)             # the gradient's red says where x was
    assert (bits != left).float().mean() < 0.1
    again = tiny_ldm.fit_pictures(TINY, image, bits)
    assert torch.equal(again["image"], image) and torch.equal(again["mask"], bits)


@pytest.mark.parametrize("settings, message", [
    (dict(steps=0), "steps must be from 1 to 1000, not 0"),
    (dict(sampler="magic"), "unknown sampler 'magic'"),
    (dict(width=40), "width 40 is not a multiple of 16 up to 8192; the nearest: 32 or 48"),
    (dict(mask=Image.new("L", (8, 8))), "a mask needs an image")])
def test_python_checks_what_the_command_checks(settings, message, tiny):
    with pytest.raises(InputError, match=message):
        tiny.generate("a", progress=False, **settings)
    with pytest.raises(InputError, match=message):
        next(iter(tiny.denoise("a", **settings)))


def test_a_file_is_written_whole_or_not_at_all(tiny, tmp_path):
    file = tmp_path / "x.txt"

    def breaks(name):
        Path(name).write_text("half")
        # Another process writes the same file meanwhile
        tiny_ldm.write_whole(file, lambda name: Path(name).write_text("whole"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_ldm.write_whole(file, breaks)
    assert file.read_text() == "whole" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(InputError, match="can't be written"):
        tiny.save(tmp_path / "nowhere" / "m.safetensors")


# --------------------------------------------------------------------------------------------------
# 12. Faster. What replaces a piece of the lesson computes the same.

@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_training_steps_gradient_is_that_of_the_lessons_loss(tiny, dtype, within):
    ldm = copy.deepcopy(tiny).requires_grad_(True)
    x0, ids = randn(2, 4, 4, 4), ldm.tokenizer(["a red ring", "two stars"])

    def loss_of(step):
        return tiny_ldm.text_to_image_loss(ldm, x0, ids, generator=seeded(step))

    gradients = []
    for loss in (loss_of(3), tiny_ldm.Objective(ldm, loss_of, dtype)(3)):
        parameters = [p for name, p in ldm.named_parameters() if not name.startswith("vae.")]
        gradients.append(torch.autograd.grad(loss, parameters))
    exact, found = [torch.cat([g.flatten() for g in those]) for those in gradients]
    assert (found - exact).norm() < within * exact.norm()


@whole
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_compiled_networks_make_the_same_pictures():
    """The smallest that have every part, since compiling takes long; within 1 level."""
    unet = replace(TINY.unet, channel_mult=(1,), transformer_depth=(1,))
    ldm = tiny_model(vae=replace(TINY.vae, channel_mult=(1, 2)), image_size=16, unet=unet)
    settings = dict(steps=2, seed=3, progress=False)
    plain = pixels_of(ldm.generate("a circle", **settings))
    tiny_ldm.compile_networks(ldm)
    compiled = pixels_of(ldm.generate("a circle", **settings))
    assert plain.std() > 1 and np.abs(plain - compiled).max() <= 1


@whole
def test_a_missing_compiler_is_one_line(tmp_path):
    done = run("a red circle", "--compile", "-o", tmp_path / "a.png", CXX="no-such-compiler",
               PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 2 and "nothing can be compiled here" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "a.png").exists()


# --------------------------------------------------------------------------------------------------
# 13. Training runs. An interruption changes nothing, several processes train one model, and what
# can't be continued is refused before any work.

def make_folder(folder: Path, count: int = 4) -> Path:
    """Captioned pictures to train on."""
    folder.mkdir()
    for i in range(count):
        scene, picture = random_picture(i)
        picture.resize((40, 36)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption_of(scene))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("train") / "f")


def small_training(source: str | Path, out: Path, **settings) -> LatentDiffusion:
    usual = dict(vae_steps=3, unet_steps=3, vae_batch=4, unet_batch=4, config=TINY, device="cpu")
    tiny_ldm.train_model(str(source), out, **{**usual, **settings})
    return LatentDiffusion.load(out, "cpu")


def same_model(a: LatentDiffusion, b: LatentDiffusion) -> bool:
    """To the bit."""
    equal = map(torch.equal, a.state_dict().values(), b.state_dict().values())
    return a.config == b.config and all(equal)


@pytest.fixture
def one_thread():
    """Sums over several threads are not always added in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def interrupted_in(stage: str, call: int):
    """Ctrl-C when the loss of this stage is asked for so many times."""
    real, calls = getattr(tiny_ldm, stage), []

    def loss(*args, **settings):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **settings)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tiny_ldm, stage, loss)
        yield


def test_interrupted_training_equals_an_uninterrupted_one(pictures, tmp_path, one_thread):
    through = small_training(pictures, tmp_path / "through.safetensors")
    out = tmp_path / "parts.safetensors"
    stages = ("vae_loss", "vae_loss", "text_to_image_loss", "text_to_image_loss")
    for stage, call in zip(stages, (2, 2, 1, 3)):
        with interrupted_in(stage, call):
            small_training(pictures, out, save_minutes=0)
    assert same_model(through, small_training(pictures, out))
    assert len(list(tmp_path.iterdir())) == 4           # two models, two checkpoints
    # Once more, when it is finished: the model stays
    assert same_model(through, small_training(pictures, out, unet_steps=0))


def test_a_resumed_training_keeps_its_tokenizer_and_tidies_up(tmp_path):
    """Also where the captions have changed meanwhile, and a killed run has left half a file."""
    folder, out = make_folder(tmp_path / "f"), tmp_path / "m.safetensors"
    first = small_training(folder, out)
    (folder / "0.txt").write_text("a lime pentagon " * 3)
    left = tmp_path / ".m.safetensors.checkpoint.0123.part"
    left.write_bytes(b"half")
    again = small_training(folder, out, unet_steps=4)
    assert again.tokenizer.backend.get_vocab() == first.tokenizer.backend.get_vocab()
    assert again.config == first.config and not left.exists()


def test_what_can_not_be_trained_or_continued_is_refused(pictures, tmp_path):
    out = tmp_path / "m.safetensors"
    checkpoint = tmp_path / "m.safetensors.checkpoint"
    start = tmp_path / "start.safetensors"
    tiny_model(unet=replace(TINY.unet, in_channels=9)).save(start)
    with pytest.raises(InputError, match="is an inpainting model, which can't be trained"):
        small_training(pictures, out, weights=start)
    small_training(pictures, out)
    for settings in (dict(seed=1), dict(weights=out)):
        with pytest.raises(InputError, match="is of another run .*choose another -o"):
            small_training(pictures, out, **settings)
    good = bytearray(checkpoint.read_bytes())
    flipped = good.copy()
    flipped[len(good) // 2] ^= 1
    for damaged in (good[: len(good) // 2], good[:-1], flipped, b""):
        checkpoint.write_bytes(damaged)
        with pytest.raises(InputError, match="checkpoint is damaged .*remove it to start anew"):
            small_training(pictures, out)
    checkpoint.unlink()
    before = out.read_bytes()
    with pytest.raises(InputError, match="exists, and no checkpoint .*--force"):
        small_training(pictures, out)
    assert out.read_bytes() == before
    small_training(pictures, out, seed=1, force=True)
    assert out.read_bytes() != before


def test_training_goes_on_from_weights_whose_vae_stays(pictures, tmp_path):
    first = small_training(pictures, tmp_path / "a.safetensors")
    second = small_training(pictures, tmp_path / "b.safetensors", dtype=torch.bfloat16,
                            weights=tmp_path / "a.safetensors")
    assert first.config == second.config and not same_model(first, second)
    for name, p in first.vae.state_dict().items():
        assert torch.equal(p, second.vae.state_dict()[name])


def test_a_training_without_stage_2_stores_the_latents_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_ldm.ShapesData, "captions", lambda data: some_captions(300))
    ldm = small_training("shapes", tmp_path / "m.safetensors", unet_steps=0)
    pictures = [tiny_ldm.ShapesData(32, 0).item(i)[0] for i in range(256)]
    latents = ldm.encode_image(tiny_ldm.to_tensor(pictures))
    assert ldm.config.scale_factor != TINY.scale_factor
    assert latents.std().item() == pytest.approx(1, rel=0.01)      # the file has half precision


def test_a_loss_that_is_not_finite_ends_training(pictures, tmp_path):
    ldm = tiny_model()
    ldm.unet.conv_out.weight[:] = math.nan
    ldm.save(tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="the loss is nan at step 0"):
        small_training(pictures, tmp_path / "m.safetensors", weights=tmp_path / "nan.safetensors")
    assert not list(tmp_path.glob("m.*"))


def test_a_folder_is_read_in_both_forms(tmp_path):
    for i, ending in enumerate(("png", "JPG", "jpeg", "webp", "bmp")):
        gradient(50, 40).save(tmp_path / f"{i}.{ending}")
        (tmp_path / f"{i}.txt").write_text(f" caption {i}\n", "utf-8-sig")
    gradient(50, 40).save(tmp_path / "alone.png")
    data = tiny_ldm.FolderData(tmp_path, 32, 0)
    assert data.captions() == [f"caption {i}" for i in range(4)]
    assert data.item(5) == data.item(5) and data.item(5)[0].size == (32, 32)
    assert {data.item(i)[1] for i in range(50)} == set(data.captions())
    entry = json.dumps(dict(file_name="alone.png", text="ein gr\u00fcner Kreis"))
    (tmp_path / "metadata.jsonl").write_text(f"{entry}\n", "utf-8")
    assert "ein gr\u00fcner Kreis" in tiny_ldm.FolderData(tmp_path, 32, 0).captions()


SHARED_TRAINING = """
import sys
import torch
import test_tiny_ldm
import tiny_ldm
torch.set_num_threads(1)
models, losses, folder, name = [], [], *sys.argv[1:]
real_model, real_train = tiny_ldm.new_model, tiny_ldm.train
def new_model(*args):
    models.append(real_model(*args))
    return models[0]
def train(*args):
    for step, loss in real_train(*args):
        losses.append(loss)
        yield step, loss
tiny_ldm.new_model, tiny_ldm.train = new_model, train
test_tiny_ldm.small_training(f"{folder}/f", f"{folder}/{name}.safetensors", vae_steps=60,
                             unet_steps=60, vae_batch=8, unet_batch=32)
torch.save((losses, models[0].half().state_dict()), f"{folder}/{name}.{tiny_ldm.RANK}")
"""


@whole
def test_two_processes_learn_together_what_one_learns(tmp_path):
    make_folder(tmp_path / "f")
    (tmp_path / "go.py").write_text(SHARED_TRAINING)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", []), ("two", torchrun)):
        subprocess.run([sys.executable, *start, tmp_path / "go.py", tmp_path, name], check=True,
                       env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    losses, _ = torch.load(tmp_path / "one.0")
    (ours, a), (theirs, b) = torch.load(tmp_path / "two.0"), torch.load(tmp_path / "two.1")
    assert all(torch.equal(p, b[name]) for name, p in a.items())
    # The same pictures and other noise, on which the VAE's loss depends little
    one, two = np.array(losses), (np.array(ours) + theirs) / 2
    assert one[59] < one[0] / 2
    np.testing.assert_allclose(two[:15], one[:15], rtol=0.03)
    np.testing.assert_allclose(two[:60].mean(), one[:60].mean(), rtol=0.05)
    np.testing.assert_allclose(two[60:].mean(), one[60:].mean(), rtol=0.25)


# --------------------------------------------------------------------------------------------------
# 14. Command line. It writes what it says and says what it writes; its files carry their settings.

def made(*args) -> int:
    return tiny_ldm.main([str(arg) for arg in args])


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command_makes_a_picture_and_says_only_its_name(tmp_path, built_in):
    prompt = "a red circle left of a blue square on a white background"
    done = run(prompt, "--steps", 3, "--film", "f.gif", cwd=tmp_path)
    name = f"{prompt.replace(' ', '-')}-0.png"
    assert (done.returncode, done.stdout) == (0, f"{name}\nf.gif\n"), done.stderr
    assert "tiny_ldm:" not in done.stderr and "denoising: 100%" in done.stderr
    image = Image.open(tmp_path / name)
    wanted, = built_in.generate(prompt, steps=3, progress=False)
    assert image.tobytes() == wanted.tobytes()
    assert image.text["parameters"] == (f"{prompt}\nSteps: 3, Sampler: euler_a, CFG scale: 2.0, "
                                        "Seed: 0, Size: 64x64, Model: shapes")
    assert Image.open(tmp_path / "f.gif").n_frames == 3      # of ten, the ones that differ
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, "f.gif"]


def test_each_of_several_pictures_is_that_of_its_own_command(inside, capsys):
    some = ["two  blue\nstars", "--negative-prompt", "a  ring", "--steps", 4, "--sampler", "ddpm",
            "--width", 128]
    assert made(*some, "-n", 3, "--seed", 5, "-o", "x.png", "--film", "f.png") == 0
    assert capsys.readouterr().out == "x-5.png\nx-6.png\nx-7.png\nf.png\n"
    assert made(*some, "--seed", 6, "-o", "y.png") == 0
    assert Path("y.png").read_bytes() == Path("x-6.png").read_bytes()
    image, film = Image.open("x-6.png"), Image.open("f.png")
    lines = image.text["parameters"].splitlines()
    assert lines[:2] == ["two blue stars", "Negative prompt: a ring"]
    # Three rows of ten frames, the last of which is the picture but for the noise still to come
    assert image.size == (128, 64) and film.size == (1280, 192)
    frame, picture = pixels_of([film.crop((1152, 64, 1280, 128)), image])
    assert np.abs(frame - picture).mean() < 10


def test_command_begins_with_a_picture_as_python_does(inside, built_in):
    gradient(70, 60).save("i.png")
    mask = Image.new("L", (70, 60))
    mask.paste(255, (0, 0, 35, 60))
    mask.save("m.png")
    assert made("a red circle", "--image", "i.png", "--mask", "m.png", "--strength", 0.6,
                "--steps", 5, "--sampler", "ddim", "--eta", 0.5, "-o", "x.png") == 0
    wanted, = built_in.generate("a red circle", image=gradient(70, 60), mask=mask, strength=0.6,
                                steps=5, sampler="ddim", eta=0.5, progress=False)
    assert Image.open("x.png").tobytes() == wanted.tobytes()


def test_the_user_is_told_what_the_model_can_not_know(inside, capsys):
    assert made("An astronaut, and " + "a red ring " * 9, "--steps", 1) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "tiny_ldm: " in line]
    assert len(lines) == 2 and "the prompt is too long; cut off: " in lines[0]
    assert "has never met: astronaut, and; " in lines[1] and "Stable Diffusion" in lines[1]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line_and_other_errors_are_raised(error, capsys):
    def fails(argv):
        raise error

    assert tiny_ldm.main([], fails) == 2
    said = capsys.readouterr().err
    assert said.startswith("tiny_ldm: not enough memory (") and said.count("\n") == 1
    error = RuntimeError("a mistake of this program")
    with pytest.raises(RuntimeError, match="a mistake"):
        tiny_ldm.main([], fails)


@pytest.mark.skipif(sys.platform != "linux", reason="closes and fills stdout as shells there do")
@pytest.mark.parametrize("end, code, said", [
    ("> /dev/full", 2, "No space left"),
    pytest.param(">&- 2>&-", 0, "", marks=whole),
    pytest.param("| true", 2, "Broken pipe", marks=whole),
    pytest.param("> x", 0, "", marks=whole)])           # letters that the terminal can't show
def test_no_stdout_brings_the_command_down(end, code, said, tmp_path):
    call = f"set -o pipefail; '{sys.executable}' '{HERE}/tiny_ldm.py' a --steps 1 -o \u65e5.png"
    done = subprocess.run(["bash", "-c", f"{call} {end}"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == code and said in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert Image.open(tmp_path / "\u65e5.png").size == (64, 64)       # made all the same


@pytest.mark.parametrize("wait", [0, *[pytest.param(i / 10, marks=whole) for i in range(1, 10)]])
def test_ctrl_c_while_it_makes_pictures(wait, tmp_path):
    with subprocess.Popen([sys.executable, HERE / "tiny_ldm.py", "a", "-n", "999"], cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()                      # the first one is there
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130 and "Traceback" not in said
    assert re.findall("^tiny_ldm: .*", said, re.M) == ["tiny_ldm: interrupted"]
    for file in tmp_path.iterdir():                    # those that are there are whole
        assert Image.open(file).convert("RGB").size == (64, 64)


# Bad input is one line that says what to do, exit code 2 and no file.

@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    d = tmp_path_factory.mktemp("bad")
    data = tiny_ldm.BUILT_IN.read_bytes()
    (d / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (d / "page.safetensors").write_text("\n<!DOCTYPE html><html>log in</html>")
    (d / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    save_file({"x": torch.zeros(1)}, d / "other.safetensors")
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, d / "official.safetensors")
    tiny_model().save(d / "tiny.safetensors")
    with safe_open(d / "tiny.safetensors", "pt") as file:
        header = file.metadata()
    tensors = load_file(d / "tiny.safetensors")
    bias = "unet.conv_out.bias"
    without = {name: tensor for name, tensor in tensors.items() if name != bias}
    save_file(without, d / "missing.safetensors", header)
    save_file({**tensors, "extra": torch.zeros(1)}, d / "extra.safetensors", header)
    save_file({**tensors, bias: torch.zeros(5)}, d / "shape.safetensors", header)
    save_file({**tensors, "unet.conv_in.weight": torch.zeros(1)}, d / "old.safetensors", header)
    nine = tiny_model(unet=replace(TINY.unet, in_channels=9))
    nine.save(d / "nine.safetensors")
    Image.new("RGB", (64, 64)).save(d / "p.png")
    for name, file, text in (("empty", "x", ""), ("broken", "p.txt", "a red circle"),
                             ("list", "metadata.jsonl", '{"file_name": "p.png"}\n')):
        (d / name).mkdir()
        (d / name / file).write_text(text)
    (d / "broken" / "p.png").write_bytes(b"\x89PNG\r\n")
    return d


# The words as in a shell, and what the message says
BAD = [
    ("", "the prompt is empty"),
    ("''", "the prompt is empty"),
    ("a --sampler magic", "unknown sampler 'magic'; there are: ddpm, ddim, plms, euler"),
    ("a --steps 0", "steps must be from 1 to 1000, not 0"),
    ("a --steps many", "argument --steps: invalid int value: 'many'; see --help"),
    ("a --width 100", "width 100 is not a multiple of 16 up to 8192; the nearest: 96 or 112"),
    ("a -n 0", "count must be from 1 to 65536, not 0"),
    ("a --seed -1", "seed must be from 0 to"),
    ("a --eta 2", "eta must be from 0 to 1, not 2.0"),
    ("a --guidance-scale nan", "guidance_scale must be from -1000 to 1000, not nan"),
    ("a --strength 1.5", "strength must be from 0 to 1, not 1.5"),
    ("a --image none.png", "no file none.png"),
    ("a -o x.png --film x.png", "-o, --film, --image and --mask must be different files"),
    ("a -n 2 -o x.png --film x-1.png", "-o, --film, --image and --mask must be different files"),
    ("a --image p.png -o ./p.png", "-o, --film, --image and --mask must be different files"),
    ("a --image cut.safetensors", "cut.safetensors can't be read as a picture"),
    ("a --mask p.png", "a mask needs an image that it belongs to"),
    ("a --nonsense", "unrecognized arguments: --nonsense"),
    ("a -o nowhere/x.png", "nowhere/x.png can't be written (FileNotFoundError"),
    ("a -o x.bmp", "x.bmp must end in .png"),
    ("a --film x.mp4", "x.mp4 must end in .png or .gif"),
    ("a --weights ''", "no file ."),
    ("a --weights cut.safetensors", "cut.safetensors is damaged or no .safetensors file"),
    ("a --weights page.safetensors", "page.safetensors is an HTML page, not the file"),
    ("a --weights pointer.safetensors", "is a git-LFS pointer, not the file; fetch it"),
    ("a --weights other.safetensors", "other.safetensors is no tiny_ldm weights file"),
    ("a --weights old.safetensors", "or one of an earlier version; make it"),
    ("a --weights official.safetensors", "an official checkpoint; convert it first: "
     "python weights_convert.py official.safetensors"),
    ("a --weights missing.safetensors", 'Missing key(s) in state_dict: "unet.conv_out.bia'),
    ("a --weights extra.safetensors", 'Unexpected key(s) in state_dict: "extra"'),
    ("a --weights shape.safetensors", "size mismatch for unet.conv_out.bias"),
    ("a --weights nine.safetensors", "this model repaints: give it an image and a mask"),
    ("--train shapes", "--train needs -o FILE"),
    ("--train shapes -o x.png", "x.png must end in .safetensors"),
    ("--train shapes -o nowhere/x.safetensors", "nowhere/x.safetensors can't be written"),
    ("--train shapes -o tiny.safetensors", "exists, and no checkpoint to continue from"),
    ("--train shapes -o x.safetensors --unet-batch 0", "unet_batch must be from 1 to"),
    ("--train nowhere -o x.safetensors", "can't train on the folder nowhere (FileNotFoundError"),
    ("--train empty -o x.safetensors", "the folder empty (ValueError: no captioned pictures)"),
    ("--train broken -o x.safetensors", "broken/p.png can't be read as a picture"),
    ("--train list -o x.safetensors", "the folder list (KeyError: 'text'); it needs name.png"),
]
if not torch.cuda.is_available():
    BAD.append(("a --device cuda", "there is no device 'cuda' here"))


@pytest.mark.parametrize("words, message", BAD)
def test_bad_input_is_one_line_and_exit_code_2(words, message, bad_files, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    before = sorted(bad_files.rglob("*"))
    assert tiny_ldm.main(shlex.split(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tiny_ldm: ") and err.count("\n") == 1
    assert message in err
    assert sorted(bad_files.rglob("*")) == before


def test_a_batch_that_processes_can_not_share_is_refused(inside, monkeypatch):
    monkeypatch.setattr(tiny_ldm, "WORLD", 2)
    with pytest.raises(InputError, match="choose batches that 2 processes can share evenly"):
        small_training("shapes", inside / "m.safetensors", unet_batch=15)


# --------------------------------------------------------------------------------------------------
# It does not break. Hundreds of damaged files and odd calls, each in a process of its own that has
# only so much time and memory: it makes its picture, or ends in one line, exit code 2 and no file.

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


class HostilePickle:
    """Unpickled, it would leave a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


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
         "checkpoints": checkpoint_cases, "calls": call_cases, "full disk": full_disk_cases}


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
    with tempfile.TemporaryDirectory() as d, tempfile.TemporaryFile() as log:
        os.chdir(d)
        for name, content in case.files.items():
            Path(name).parent.mkdir(exist_ok=True)
            if callable(content):
                content(Path(name))
            else:
                Path(name).write_bytes(content)
        before = set(Path(".").rglob("*"))
        argv = [str(word) for word in case.argv]
        code = ended(forked(partial(tiny_ldm.main, argv), log, case.room))
        new = {path.name for path in set(Path(".").rglob("*")) - before}
        os.chdir("/")
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
    # A picture is whole when its name is printed, whatever happens to the film
    lines = [line for line in said.splitlines() if line not in new]
    notes = [line for line in lines if line.startswith("tiny_ldm: ")]
    good = "Traceback" not in said and not any(name.endswith(".part") for name in new)
    if code == 2:
        good = good and notes and notes == lines and new <= set(said.splitlines())
    return code, "" if good and code in (0, 2) else f"exit code {code}, files {new}: {said[-1500:]}"


def make_good_files(folder: Path) -> Path:
    """A small file of each kind that is as it should be. Also makes training small."""
    torch.set_num_threads(1)                       # forking is safe where no other threads are,
    tiny_ldm.tqdm.monitor_interval = 0             # nor that of a progress bar, whose lock must
    tiny_ldm.tqdm.set_lock(threading.RLock())      # not be one that a killed process holds for all
    tiny_ldm.tqdm = partial(tiny_ldm.tqdm, file=io.StringIO())
    tiny_ldm.train_model.__kwdefaults__.update(config=TINY, vae_batch=2, device="cpu")
    gradient(32, 32).save(folder / "p.png")
    make_folder(folder / "f", 1)
    tiny_model().save(folder / "tiny.safetensors")
    small_training(folder / "f", folder / "m.safetensors", unet_batch=2)
    return folder


def try_cases(folder: str, share: int, part: int) -> None:
    """Tries every share-th case of each group, and prints how each ended, as JSON."""
    good, found = make_good_files(Path(folder)), []
    for group, cases in CASES.items():
        for case in itertools.islice(cases(good, random.Random(group)), part, None, share):
            found.append((group, case.name, *tried(case)))
    print(json.dumps(found))


def apart(call: str, *args) -> subprocess.Popen:
    """Calls a function of this file in a Python without threads."""
    code = f"import sys, test_tiny_ldm; test_tiny_ldm.{call}(sys.argv[1], *map(int, sys.argv[2:]))"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=HERE, env=env,
                            stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """How the cases ended: one of thirty, or all of them, shared by two processes."""
    share, parts = (2, (0, 1)) if os.environ.get("TINY_LDM_ALL") else (30, (0,))
    tries = [apart("try_cases", tmp_path_factory.mktemp("good"), share, part) for part in parts]
    return [row for trial in tries for row in json.loads(trial.communicate()[0])]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits memory as Linux does")
@pytest.mark.parametrize("group", CASES)
def test_damaged_files_and_odd_calls_end_in_one_line(group, outcomes):
    rows = [row for row in outcomes if row[0] == group]
    codes = [code for _, _, code, _ in rows]
    print(f"{group}: {len(rows)} cases, {codes.count(2)} refused")
    assert [f"{name}: {wrong}" for _, name, _, wrong in rows if wrong] == []
    assert codes.count(2) >= len(rows) / 4


KILLED = dict(vae_steps=8, vae_batch=2, unet_steps=8, save_minutes=0)


def kill_training(folder: str) -> None:
    """Trains until killed, twenty times, and then to the end. Prints how many of the killed ones
    left a half-written checkpoint."""
    root, rng, left = Path(folder), random.Random(0), 0
    good = make_good_files(root)
    (root / "killed").mkdir()

    def train() -> int:
        small_training(good / "f", root / "killed" / "m.safetensors", **KILLED)
        return 0

    def halves() -> int:
        return len(list(root.glob("killed/.*checkpoint*.part")))

    with open(root / "log", "w") as log:
        for i in range(20):
            known, pid = halves(), forked(train, log)
            if i % 2:                    # every second one dies while a checkpoint is written
                while halves() == known:
                    time.sleep(0.0002)
            else:
                time.sleep(rng.uniform(0, 0.5))
            os.kill(pid, signal.SIGKILL)
            assert ended(pid) in (0, -signal.SIGKILL)
            left += halves() > known
        assert ended(forked(train, log)) == 0
    print(left)


@whole
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_training_killed_at_twenty_moments_equals_an_uninterrupted_one(tmp_path, one_thread):
    output, _ = apart("kill_training", tmp_path).communicate()
    assert int(output) >= 5, (tmp_path / "log").read_text()
    through = small_training(tmp_path / "f", tmp_path / "through.safetensors", **KILLED)
    assert same_model(through, LatentDiffusion.load(tmp_path / "killed" / "m.safetensors", "cpu"))
