"""What must hold, as readable examples, in the order of tiny_ldm.py's sections.

    pytest                       every promise once, in two or three minutes
    TINY_LDM_ALL=1 pytest        also what takes long: the compiler, several processes, many damages
"""
import argparse
import collections
import concurrent.futures
import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Callable
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny_ldm
import weights_convert
from tiny_ldm import (COLOURS, SAMPLERS, SD1, SD1_INPAINT, SD2, SD2_INPAINT, SDXL, SHAPE_NAMES,
                      SHAPES, InputError, LatentDiffusion, Scene, Thing, Tokenizer, caption_of,
                      draw, is_held_out, place, random_scene)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / ".ci"))
from checkpoints import (NARROW, NARROW_2, NARROW_INPAINT, NARROW_XL, VOCABULARY, a_lora,
                         as_cache, as_shards, as_variant, as_years_ago, averaged, local_hub,
                         small_tokenizer, some_captions, split_unet, write_folder, write_vocabulary)
from judge import KINDS, altered, judge, parse, prompt_following
from reference import (SD1_SCHEDULE, comparison, official_tensors, our_outputs, references,
                       relative_error, their_outputs, their_walk, with_lora)

whole = pytest.mark.skipif(not os.environ.get("TINY_LDM_ALL"), reason="TINY_LDM_ALL=1 runs it")

# A model so small that a test takes no time
TINY = replace(
    SHAPES, name="tiny", image_size=32, scale_factor=0.7,
    text=tiny_ldm.TextConfig(vocab_size=500, max_length=16, width=16, num_layers=1, num_heads=2),
    vae=tiny_ldm.VAEConfig(channels=8, channel_mult=(1, 1, 1, 2), num_res_blocks=1, norm_groups=4),
    unet=tiny_ldm.UNetConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1,
                             transformer_depth=(1, 0), num_heads=2, norm_groups=4))


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
    return LatentDiffusion.load(device="cpu")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A test's own folder, as the one to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(*args, cwd=HERE, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **env})


def run(*args, cwd=None, program="tiny_ldm.py", **env) -> subprocess.CompletedProcess:
    return python(HERE / program, *args, cwd=cwd, **env)


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


def test_judge_accepts_true_pictures_and_rejects_wrong_captions_noise_and_emptiness():
    rng = random.Random(1)
    accepted, rejected = 0, 0
    for seed in range(100):
        scene, picture = random_picture(seed)
        assert parse(caption_of(scene)) == scene
        accepted += judge(picture, caption_of(scene)) == ""
        rejected += judge(picture, caption_of(altered(scene, rng))) != ""
    assert accepted >= 99 and rejected >= 98
    for picture in (Image.effect_noise((64, 64), 100), Image.new("RGB", (64, 64), "white")):
        assert judge(picture, "a red circle")


@whole
def test_the_built_in_model_follows_its_prompts(built_in):
    """README's table is of 300 captions of each kind, of which 96 % and more are right."""
    for kind in KINDS:
        judged = prompt_following(built_in, kind, 25)
        assert sum(one.wrong == "" for one in judged) >= 21, kind
    assert tiny_ldm.BUILT_IN.stat().st_size <= 20e6


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


def test_each_section_of_the_lesson_ends_with_a_look():
    part_one = (HERE / "tiny_ldm.py").read_text("utf-8").partition("# %% Part II")[0]
    heads = re.findall(r"^# %% (Look|\d)", part_one, re.M)
    assert heads == [head for number in "123456789" for head in (number, "Look")]


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
    done = python("-c", "import tiny_ldm")
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


def test_steps_sampler_and_guidance_come_from_the_config(tmp_path):
    for config, scale in ((SD1, 7.5), (SHAPES, 2.0)):
        assert (config.steps, config.sampler, config.guidance_scale) == (25, "euler_a", scale)
    own = dict(steps=3, sampler="plms", guidance_scale=4.0)
    ldm = tiny_model(**own)
    made, = ldm.generate("a red circle", progress=False)
    assert ldm.generate("a red circle", progress=False, **own)[0] == made
    weights, out = str(tmp_path / "m.safetensors"), str(tmp_path / "x.png")
    ldm.save(weights)
    assert tiny_ldm.main(["a red circle", "--weights", weights, "-o", out, "--device", "cpu"]) == 0
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
TO_ZERO = (tiny_ldm.linspace, tiny_ldm.linspace_rounded, tiny_ldm.karras, tiny_ldm.geometric,
           tiny_ldm.trailing)


def walk(sampler: str, predict_eps, x, steps: int, noise=None, eta: float = 0.0, levels=None):
    """All steps of a sampler, from x at its first noise level."""
    levels = levels or SAMPLERS[sampler].levels(steps, SIGMAS)
    return list(tiny_ldm.sample(SAMPLERS[sampler].step, predict_eps, x, levels, noise, eta))


def toy(x, t, alpha_bar=None):
    """A "network"."""
    return torch.tanh(x * (1 + float(t) / 1000))


@pytest.mark.parametrize("levels", [tiny_ldm.leading, tiny_ldm.leading_to_zero, *TO_ZERO])
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


def point_at(alpha_bar: float, away: torch.Tensor) -> torch.Tensor:
    """A point of xₜ's distribution, so many standard deviations away from its mean."""
    return alpha_bar**0.5 * MEAN + deviation_at(alpha_bar) * away


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
    x = walk(sampler, ideal, point_at(first, noise()), steps, noise, eta)[-1].x
    assert x.mean().item() == pytest.approx(last**0.5 * MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(deviation_at(last), rel=within)


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("euler", 1), ("plms", 2),
                                            ("dpmpp_2m", 2)])
def test_deterministic_samplers_converge_with_their_papers_order(sampler, order):
    """From σ = 10 to 0.05, even in log σ. The exact flow keeps a point's distance from the mean, in
    standard deviations. (PLMS is "pseudo": of high order in ε, of second order in all.)"""
    away, errors = torch.linspace(-3, 3, 5, dtype=torch.float64), []
    for steps in (40, 80, 160):
        sigmas = np.geomspace(10, 0.05, steps + 1)
        levels = tiny_ldm.levels_of(sigmas[:-1], sigmas[:-1], last_sigma=sigmas[-1])
        start, exact = [point_at(levels.alpha_bars[i], away) for i in (0, -1)]
        end = walk(sampler, ideal, start, steps, levels=levels)[-1].x
        errors.append((end - exact).abs().max().item())
    slopes = math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])
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


def test_lcm_with_a_network_that_names_the_end_of_its_path_needs_one_step():
    """Such a network is what a consistency model is trained to be. For a Gaussian the end is known:
    a point keeps its distance from the mean, in standard deviations."""
    def consistent(x, t, alpha_bar):
        away = (x - alpha_bar**0.5 * MEAN) / deviation_at(alpha_bar)
        return (x - alpha_bar**0.5 * point_at(1.0, away)) / (1 - alpha_bar) ** 0.5

    noise = partial(torch.randn, 20000, generator=seeded(), dtype=torch.float64)
    for steps in (1, 2, 4):
        first = tiny_ldm.lcm_timesteps(steps, SIGMAS).alpha_bars[0]
        x = walk("lcm", consistent, point_at(first, noise()), steps, noise)[-1].x
        assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert x.std().item() == pytest.approx(DEVIATION, rel=0.02)


def test_lcm_stops_where_its_networks_are_trained():
    """Of the 50 timesteps 19, 39 ... 999, and at most at all of them."""
    for steps in range(1, 51):
        timesteps, alpha_bars = tiny_ldm.lcm_timesteps(steps, SIGMAS)
        assert len(set(timesteps)) == steps and timesteps[0] == 999 and alpha_bars[-1] == 1
        assert all(t % 20 == 19 for t in timesteps)
    assert tiny_ldm.lcm_timesteps(4, SIGMAS).timesteps == [999, 759, 499, 259]


@pytest.mark.parametrize("steps", [1, 7, 50, 250])
@pytest.mark.parametrize("sampler, extra", [
    ("ddpm", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 0.7}), ("plms", {}), ("euler", {}),
    ("euler_a", {}), ("euler_leading", {}), ("euler_trailing", {}), ("euler_a_trailing", {}),
    ("dpmpp_2m", {}), ("dpmpp_2m_karras", {}), ("lcm", {})])
def test_samplers_equal_those_of_diffusers(sampler, extra, steps):
    """On a fixed "network", with the same noise. diffusers' DDPM ends its last step at ᾱ = 1, the
    original at ᾱ₀, and its Euler's only step of one begins at t = 0: both left out."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    if steps == 1 and sampler in ("euler", "euler_a", "ddpm") or steps > 50 and sampler == "lcm":
        pytest.skip("nothing to compare")
    start, more = randn(1, 4, 3, 3), {}
    if sampler in ("ddpm", "ddim", "euler_a", "euler_a_trailing", "lcm"):
        more = {"generator": seeded(5)}
    timesteps, theirs = their_walk(sampler, toy, start, steps, **extra, **more)
    noise = partial(torch.randn, (1, 4, 3, 3), generator=seeded(5))
    if SAMPLERS[sampler].starts_at_sigma:
        first = SAMPLERS[sampler].levels(steps, SIGMAS).alpha_bars[0]
        start = (1 - first) ** 0.5 * start
    ours = walk(sampler, toy, start, steps, noise, **extra)
    if sampler != "plms":                       # diffusers counts its look-ahead as a step
        assert [step.t for step in ours] == pytest.approx(timesteps)
    last = -2 if sampler == "ddpm" else -1
    assert relative_error(ours[last].x, theirs[last]) <= 1e-5


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

# When the weights came: 25 steps of euler_a, guidance scale 2, the mean colours of 4 x 4 squares
PICTURES = {
    "a small purple heart above a large orange star on a blue background":
        "1e46dc343fd33040d41e46dc1e46dc2245da2045db1e46dc"
        "1e46dc2649d45e5a9e1f46db1e46dc1f46db6f5f8d1e46dc",
    "three red crosses":
        "fdf2f3f3b3b7fae1e2fffffffffefefbe6e7e86d72f8d4d5"
        "fdf5f5f6c6c9fffffffffffff9d6d7ed898effffffffffff",
    "a large green ring on a yellow background":
        "fadc28efd929f8db28fadc28fadc2891bb31a5c130fadc28"
        "fadc28b9c72ed4d02bfadc28fadc28fadc28fadc28fadc28"}


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


def test_guidance_1_asks_the_network_once_and_needs_no_negative_prompt(tiny):
    for scale, rows, texts in ((1.0, 1, 1), (2.0, 2, 2)):
        with calls_of(tiny.unet, tiny.text_encoder) as calls:
            list(tiny.denoise("a", "b", steps=3, guidance_scale=scale))
        asked = [output.shape[0] for inputs, output in calls if output.ndim == 4]
        assert asked == [rows] * 3 and len(calls) == 3 + texts
    long = torch.cat([tiny.encode_text("a red"), tiny.encode_text("circle")], dim=1)
    assert len(tiny.generate(long, guidance_scale=1.0, steps=1, progress=False)) == 1


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
    ((x, t, *_), _), = calls
    assert t.tolist() == [401]
    a = ALPHAS_CUMPROD[401].item()
    noise = randn(1, 4, 4, 4, seed=4)
    torch.testing.assert_close(x, tiny_ldm.add_noise(tiny.encode_image(image), noise, a))


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m", "plms"])
def test_outside_the_mask_every_pixel_stays(tiny, sampler):
    image, mask = gradient(48, 32), Image.new("L", (48, 32))
    mask.paste(255, (10, 5, 30, 20))
    settings = dict(image=image, mask=mask, width=48, height=32, strength=1, steps=4,
                    sampler=sampler)
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
# Diffusion 1.x, 2.x and XL, on layers a tenth as wide.

CONFIGS = {"plain": NARROW, "small": NARROW, "sd2": NARROW_2, "xl": NARROW_XL}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder with a narrow checkpoint of every kind, and a small vocabulary."""
    d = tmp_path_factory.mktemp("official")
    (d / "tokenizer.json").write_text(VOCABULARY.to_str())
    (d / "other.json").write_text(Tokenizer.train(["a red circle"], 500, 77).backend.to_str())
    for name, config in CONFIGS.items():
        factor = 0.01 if name == "small" else 1.0
        save_file(official_tensors(config, factor), d / f"{name}.safetensors")
    torch.save({"state_dict": official_tensors(NARROW), "global_step": 1}, d / "plain.ckpt")
    assert convert(d / "plain.safetensors", d / "ours.safetensors", d) == 0
    return d


@pytest.fixture(scope="module")
def plain(official):
    return load_file(official / "plain.safetensors")


@pytest.fixture
def folder(plain, tmp_path):
    """The narrow checkpoint as diffusers would write it."""
    write_folder(tmp_path / "f", plain)
    return tmp_path / "f"


def convert(source, out, official, *more) -> int:
    return weights_convert.main([str(source), "-o", str(out), "--tokenizer",
                                 str(official / "tokenizer.json"), *map(str, more)])


def converted(source, out, official, *more, dtype=torch.float64) -> LatentDiffusion:
    assert convert(source, out, official, "--force", *more) == 0
    return LatentDiffusion.load(out, "cpu", dtype)


def gives_ours(source, out, official, *more) -> bool:
    """Whether a source becomes the same weights file as the plain narrow checkpoint."""
    assert convert(source, out, official, *more) == 0
    return out.read_bytes() == (official / "ours.safetensors").read_bytes()


def turned_back(ours: Path) -> Path:
    """A weights file in the official layout again."""
    back = ours.with_name("back.safetensors")
    assert weights_convert.main(["--to", "official", str(ours), "-o", str(back)]) == 0
    return back


def with_one_changed(source: Path, out: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """A weights file in which one tensor is this one, or is missing."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(source), name: tensor}
    save_file({k: t for k, t in tensors.items() if t is not None}, out, metadata)
    return out


def last_line(capsys) -> str:
    """The last message on stderr, of one line."""
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return [line for line in lines if line.startswith("tiny_ldm: ")][-1]


@pytest.fixture
def refuses(official, tmp_path, capsys):
    """Asserts that the converter ends with this message and no output: on a file or folder, or on
    a file with these tensors."""
    def check(source, message, *more):
        out = tmp_path / "refused.safetensors"
        if isinstance(source, dict):
            tensors = {name: t for name, t in source.items() if t is not None}
            source = tmp_path / "source.safetensors"
            save_file(tensors, source)
        assert convert(source, out, official, *more) == 2
        assert message in last_line(capsys) and not out.exists()

    return check


@pytest.mark.parametrize("config, known", [
    (SD1, "dd0d17c940fbd3a9caaa5c0908f12bcc529c3920a6edcf30fe8eedab2d41b931"),
    (SD1_INPAINT, "1e54cd5f6b14b417c8ba329a678ebcd247819c297b8ad7dffd4871802835bff8"),
    (SD2, "956d15375c050c3c70babf57396a466ddbf85c29f8360a7b4a415df06427f0e6"),
    (SD2_INPAINT, "260818949f62d1048e87e9c409eda0217cb6a159e007e285f8dca1270233b6cb"),
    (SDXL, "e8b4f0d1a190ee22bad61a944b38814e1f2a07fcd7d7261a5d06512eba767fe3")])
def test_the_map_covers_every_official_tensor(config, known):
    """The names and shapes of the published file, sorted, as one hash; with 9 input channels for
    inpainting. (Without what nothing is computed with, as the last projection in 2.x.)"""
    entries = weights_convert.name_map(config).values()
    lines = {f"{entry.official} {list(entry.official_shape)}" for entry in entries}
    text = {SD1.text: 196, SD2.text: 292, SDXL.text: 196 + 389}[config.text]
    unet = 1680 if config is SDXL else 686
    lines = sorted(lines)
    assert len(lines) == unet + 248 + text
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == known


@pytest.mark.parametrize("name", ["plain", "sd2", "xl"])
def test_mixed_precision_comes_back_bit_for_bit(name, official, tmp_path):
    attention = r"in_proj|\.to_k\.|k_proj"
    source = {key: t.half() if re.search(attention, key) else t
              for key, t in load_file(official / f"{name}.safetensors").items()}
    save_file(source, tmp_path / "x.safetensors")
    assert convert(tmp_path / "x.safetensors", tmp_path / "t", official) == 0
    back = load_file(turned_back(tmp_path / "t"))
    entries = weights_convert.name_map(CONFIGS[name]).values()
    assert back.keys() == {entry.official for entry in entries}
    for key, t in back.items():
        assert t.dtype == source[key].dtype and torch.equal(t, source[key])


def test_other_spellings_of_official_names_are_read(plain, official, tmp_path):
    spelled = {}
    for name, t in plain.items():
        name = name.replace("transformer.text_model.", "transformer.")
        for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            name = name.replace(f"mid.attn_1.{ours}.", f"mid.attn_1.{theirs}.")
        spelled[name] = t
    spelled["cond_stage_model.logit_scale"] = torch.tensor(4.6)
    spelled["cond_stage_model.transformer.text_projection.weight"] = torch.zeros(3, 3)
    save_file(spelled, tmp_path / "x.safetensors")
    assert gives_ours(tmp_path / "x.safetensors", tmp_path / "t", official)


def test_an_inpainting_model_converts_from_either_layout(official, tmp_path):
    tensors = official_tensors(NARROW_INPAINT)
    write_folder(tmp_path / "f", tensors, NARROW_INPAINT)
    save_file(tensors, tmp_path / "official.safetensors")
    ldm = converted(tmp_path / "official.safetensors", tmp_path / "a", official)
    assert ldm.config == NARROW_INPAINT
    assert ldm.unet.down_blocks[0][0].weight.shape == (32, 9, 3, 3)
    assert convert(tmp_path / "f", tmp_path / "b", official) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_a_folder_says_is_followed_or_refused(folder, official, tmp_path, refuses, capsys):
    """The tensors don't tell what the U-Net predicts: those of a fine-tune to v are the same.
    Missing entries are SD 1.x's."""
    (folder / "scheduler").mkdir()

    @contextlib.contextmanager
    def saying(part, **said):
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(said))
        yield
        (folder / part / name).unlink()

    def found(part, **said):
        with saying(part, **said):
            return converted(folder, tmp_path / "o", official).config

    usual = dict(SD1_SCHEDULE, num_train_timesteps=1000, trained_betas=None)
    assert found("scheduler", **usual) == NARROW
    schedule = replace(NARROW.schedule, beta_end=0.02)
    assert found("scheduler", prediction_type="v_prediction", beta_end=0.02) == replace(
        NARROW, prediction="v", schedule=schedule)
    assert found("unet", attention_head_dim=8, in_channels=4, norm_num_groups=32) == NARROW
    found_scale = found("vae", scaling_factor=0.13, act_fn="silu")
    assert found_scale == replace(NARROW, scale_factor=0.13)
    assert "its scale_factor is 0.13" in capsys.readouterr().err
    assert found("scheduler", timestep_spacing="trailing") == NARROW          # alone no Turbo
    for kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        turbo = found("scheduler", timestep_spacing="trailing", _class_name=kind)
        assert (turbo.sampler, turbo.steps) == ("euler_a_trailing", 1)
    lcm = found("scheduler", _class_name="LCMScheduler")
    assert (lcm.sampler, lcm.steps, lcm.guidance_scale) == ("lcm", 4, 1)
    with saying("scheduler", _class_name="FlowMatchEulerDiscreteScheduler"):
        refuses(folder, "it is of kind FlowMatch")
    for part, key, value in (("scheduler", "prediction_type", "sample"),
                             ("scheduler", "rescale_betas_zero_snr", True),
                             ("scheduler", "beta_schedule", "linear"),
                             ("scheduler", "num_train_timesteps", 500),
                             ("text_encoder", "hidden_act", "gelu"),
                             ("text_encoder", "num_attention_heads", 3),
                             ("text_encoder", "layer_norm_eps", 1e-6), ("unet", "freq_shift", 1),
                             ("unet", "attention_head_dim", [5, 10, 20, 20]),
                             ("unet", "time_cond_proj_dim", 256), ("vae", "shift_factor", 0.1)):
        with saying(part, **{key: value}):
            refuses(folder, f"{key} is {value!r}")
    with saying("scheduler", beta_start="x"):
        refuses(folder, "scheduler_config.json")


def test_a_whole_file_is_taken_before_its_shards():
    whole = [weights_convert.part_files(part)[0] for part in ("unet", "vae", "text_encoder")]
    shards = [whole[0].replace(".", f"-0000{i}-of-00002.") for i in (1, 2)]
    assert weights_convert.best_files("a", [*shards, *whole])["unet"] == whole[:1]


def test_a_known_file_is_named_by_size_and_hash(official, tmp_path, monkeypatch, capsys):
    source = official / "plain.ckpt"
    assert convert(source, tmp_path / "a.safetensors", official) == 0
    assert "in a file that is not on record" in last_line(capsys)
    size, digest = source.stat().st_size, hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(weights_convert, "KNOWN_SIZES", [round(size / 1e9, 2)])
    monkeypatch.setitem(weights_convert.KNOWN, digest, "sd-v1-0.ckpt")
    assert convert(source, tmp_path / "b.safetensors", official) == 0
    assert last_line(capsys).endswith("plain.ckpt is sd-v1-0.ckpt; it predicts eps (as is known)")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_another_precision_on_request(dtype, plain, official, tmp_path):
    """Also from a file that mixes them, as fine-tunes do."""
    mixed = {name: t.half() if i % 3 == 0 else t for i, (name, t) in enumerate(plain.items())}
    save_file(mixed, tmp_path / "x.safetensors")
    for more, dtypes in ((["--dtype", dtype], {getattr(torch, dtype)}),
                         ([], {torch.float16, torch.float32})):
        assert convert(tmp_path / "x.safetensors", tmp_path / "t", official, "--force", *more) == 0
        made = load_file(tmp_path / "t")
        assert {t.dtype for t in made.values()} == dtypes
        assert relative_error(made["unet.conv_out.bias"], plain[BIAS]) < 0.005


# What a file says of itself is followed, or refused by name, and the output says what was taken.

BIAS, CONV_IN = (f"{weights_convert.UNET}.{name}" for name in ("out.2.bias",
                                                               "input_blocks.0.0.weight"))


def config_from(tensors: dict, folder: Path, official: Path, *more, metadata=None):
    """What a lone file with these tensors becomes."""
    save_file(tensors, folder / "x.safetensors", metadata)
    return converted(folder / "x.safetensors", folder / "o.safetensors", official, *more).config


def test_what_a_lone_file_says_it_predicts(plain, official, tmp_path, capsys):
    def found(*more, metadata=None, **tensors):
        config = config_from({**plain, **tensors}, tmp_path, official, *more, metadata=metadata)
        said = re.search(r"it predicts (\w+) \((.*)\)", capsys.readouterr().err)
        assert said[1] == config.prediction
        return said[1], said[2]

    v_pred = torch.zeros(0)
    by_metadata = ("v", "its metadata say so")
    assert found() == ("eps", "nothing says otherwise; --prediction v would")
    assert found("--prediction", "v") == ("v", "--prediction says so")
    assert found(v_pred=v_pred) == ("v", "it holds a tensor v_pred")
    for entry in ({"modelspec.prediction_type": "v"}, {"ss_v_parameterization": "True"},
                  {"modelspec.architecture": "stable-diffusion-v1-v"}):
        assert found(metadata=entry) == by_metadata
    said_eps = {"modelspec.prediction_type": "epsilon"}
    assert found(v_pred=v_pred, metadata=said_eps) == ("eps", "its metadata say so")
    (tmp_path / "x.yaml").write_text('# parameterization: "eps"\nnotes: none\n')
    assert found(v_pred=v_pred) == ("v", "it holds a tensor v_pred")
    (tmp_path / "x.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert found(metadata=said_eps)[0] == "v"
    # And back: the official layout says it in its metadata
    (tmp_path / "x.yaml").unlink()
    with safe_open(turned_back(tmp_path / "o.safetensors"), "pt") as file:
        assert found(metadata=file.metadata()) == by_metadata


def tables(betas: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}


def test_a_lone_files_schedule_is_followed_or_refused(plain, official, tmp_path, refuses, capsys):
    def scaled(start, end):
        return torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2

    others = {k: v for k, v in plain.items() if k not in ("betas", "alphas_cumprod")}
    own = tables(scaled(0.0004, 0.006))
    for kept in (("betas", "alphas_cumprod"), ("betas",), ("alphas_cumprod",)):
        tensors = {**others, **{name: own[name] for name in kept}}
        schedule = config_from(tensors, tmp_path, official).schedule
        assert (schedule.beta_start, schedule.beta_end) == (0.0004, 0.006)
        assert "its beta_end is 0.006" in capsys.readouterr().err
    zero = scaled(0.00085, 0.012)
    zero[-1] = 1
    for changes, message in (
            (tables(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
             "has betas of another kind, from 0.00010 to 0.02000"),
            (tables(torch.logspace(-3, -2, 1000).double()), "has betas of another kind"),
            (dict(betas=torch.ones(500), alphas_cumprod=torch.ones(500)), "has 500 timesteps"),
            (tables(zero), "of another kind, from 0.00085 to 1.00000"),
            ({"ztsnr": torch.zeros(0)}, "has a zero terminal")):
        refuses({**plain, **changes}, message)
    # In 16 bits it is recognised, and CompVis' own scale of the latents is followed
    rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in plain.items()}
    rounded["scale_factor"] = torch.tensor(0.18215).bfloat16()
    assert config_from(rounded, tmp_path, official) == NARROW
    rounded["scale_factor"] = torch.tensor(0.13)
    assert config_from(rounded, tmp_path, official) == replace(NARROW, scale_factor=0.13)


def test_which_of_two_unets_is_taken(plain, official, tmp_path, refuses, capsys, monkeypatch):
    """The averaged one of a file on record, else the plain one, unless the user says."""
    unet, rest = split_unet(plain)
    ema = averaged({name: t + 1 for name, t in unet.items()})
    part = dict([*ema.items()][:50])
    for tensors, more, is_averaged, said in (
            ({**plain, **ema}, [], False, "taking the plain one"),
            ({**plain, **ema}, ["--ema"], True, "taking the averaged U-Net"),
            ({**plain, **ema}, ["--no-ema"], False, "taking the plain one"),
            ({**rest, **ema}, [], True, "taking the averaged U-Net"),
            ({**plain, **part}, [], False, "holds 50 of the 686 tensors of an averaged")):
        config_from(tensors, tmp_path, official, *more)
        assert said in capsys.readouterr().err
        taken, names = load_file(tmp_path / "o.safetensors"), weights_convert.name_map(NARROW)
        assert all(torch.equal(taken[ours].flatten(), unet[e.official].flatten() + is_averaged)
                   for ours, e in names.items() if e.official in unet)
    refuses(plain, "holds 0 of the 686 tensors of an averaged U-Net; leave out --ema", "--ema")
    refuses({**rest, **ema}, "holds the averaged U-Net alone", "--no-ema")
    refuses(rest, "it lacks model.diffusion_model", "--no-ema")
    refuses({**rest, **part}, "holds 50 of the 686 tensors of an averaged U-Net")
    monkeypatch.setattr(weights_convert, "recognised", lambda path: "v1-5-pruned.ckpt")
    config_from({**plain, **ema}, tmp_path, official)
    assert "taking the averaged U-Net" in capsys.readouterr().err


# Good files are not refused, whatever else is in them and whatever they are called.

def test_tensors_of_no_network_are_ignored_and_counted(plain, official, tmp_path, capsys):
    names = """logvar ddim_sigmas global_step lora_te_text_model.alpha
        first_stage_model.loss.logvar conditioner.embedders.0.x
        embedding_manager.embedder.transformer.text_model.final_layer_norm.bias
        safety_checker.vision_model.vision_model.post_layernorm.bias
        cond_stage_model.transformer.vision_model.post_layernorm.bias""".split()
    extra = {name: torch.ones(3) for name in names}
    twice = {name.replace("transformer.text_model.", "transformer."): t.clone()
             for name, t in plain.items() if "text_model" in name}
    save_file({**plain, **extra, **twice}, tmp_path / "x.safetensors")
    assert gives_ours(tmp_path / "x.safetensors", tmp_path / "t", official)
    assert f"ignored {len(extra)} tensors that are of no network: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["m.ckpt", "M.SAFETENSORS", "m.bin", "6ce0161689b3853acaa0"])
def test_the_kind_of_a_file_is_told_by_its_bytes(name, official, tmp_path):
    for source in ("plain.safetensors", "plain.ckpt"):
        shutil.copy(official / source, tmp_path / name)
        assert gives_ours(tmp_path / name, tmp_path / "t", official, "--force")


@pytest.mark.parametrize("change", [as_shards, partial(as_variant, "bf16"), as_cache, as_years_ago,
                                    partial(as_variant, "non_ema")])
def test_folders_of_every_shape_and_age_are_read(change, folder, official, tmp_path):
    change(folder)
    assert weights_convert.main([str(folder), "-o", str(tmp_path / "t")]) == 0
    assert (tmp_path / "t").read_bytes() == (official / "ours.safetensors").read_bytes()


def test_a_word_added_by_textual_inversion_comes_along(folder, official, tmp_path):
    """Also next to an embedding that some trainer has padded."""
    file = folder / "text_encoder" / "model.safetensors"
    tensors, table = load_file(file), json.loads((official / "tokenizer.json").read_text())
    key = next(name for name in tensors if "token_embedding" in name)
    size = len(tensors[key])
    tensors[key] = F.pad(tensors[key], (0, 0, 0, 5), value=1.0)
    save_file(tensors, file)
    table["added_tokens"].append({**table["added_tokens"][0], "id": size, "content": "<my-cat>",
                                  "special": False})
    (tmp_path / "with.json").write_text(json.dumps(table))
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<my-cat>": size}))
    for more in ([], ["--tokenizer", str(tmp_path / "with.json")]):
        args = [str(folder), "-o", str(tmp_path / "o"), "--force", *more]
        assert weights_convert.main(args) == 0
        ldm = LatentDiffusion.load(tmp_path / "o", "cpu")
        ids = ldm.tokenizer("a <my-cat> in red")[0].tolist()
        assert ids[2] == size and ldm.config.text.vocab_size == size + 5
        assert ids[:2] + ids[3:] == ldm.tokenizer("a in red")[0].tolist()[:-1]


# Pickles are programs. Nothing in one runs: any class becomes a stand-in that does nothing, and
# what means harm is refused.

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
    assert gives_ours(tmp_path / "lightning.ckpt", tmp_path / "t", official)


class Odd(list):
    """A list of a kind of its own, with attributes."""

    class Inner:
        pass


@pytest.mark.parametrize("extra", [
    argparse.Namespace(lr=1), collections.defaultdict(list, a=[1]), Callable, int, Path("a/b"),
    torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.zeros(1))}), Odd([1, Odd()]), np.ones(3),
    torch.optim.AdamW([torch.zeros(1)]), torch.bfloat16, slice(3), {1, 2}, range(3), Odd.Inner(),
    torch.zeros(2, dtype=torch.complex64), [].append], ids=repr)
def test_whatever_else_a_checkpoint_holds_is_put_up_with(extra, plain, official, tmp_path):
    torch.save({"state_dict": plain, "extra": extra}, tmp_path / "m.ckpt")
    assert gives_ours(tmp_path / "m.ckpt", tmp_path / "t", official)


@pytest.mark.parametrize("place", ["model", "module", "ema", "state_dict", "a prefix",
                                   "parameters"])
def test_weights_are_found_wherever_they_are(place, plain, official, tmp_path):
    found = {place: plain, "epoch": 3}
    if place == "a prefix":
        found = {f"module.{name}": t for name, t in plain.items()}
    elif place == "parameters":
        found = {name: torch.nn.Parameter(t, False) for name, t in plain.items()}
    torch.save(found, tmp_path / "m.ckpt", pickle_protocol=4 if place == "state_dict" else 2)
    assert gives_ours(tmp_path / "m.ckpt", tmp_path / "t", official)


class HostilePickle:
    """Unpickled, it would leave a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_hostile_pickle_is_refused_and_nothing_runs(plain, inside, refuses):
    torch.save({"state_dict": plain, "x": HostilePickle()}, "h.ckpt")
    refuses("h.ckpt", "mkdir")
    assert os.listdir() == ["h.ckpt"]


# Whatever is wrong is said in one line, with exit code 2, and leaves no file.

NOT_AT_ALL = "is no Stable Diffusion 1.x, 2.x or XL ("


@whole
@pytest.mark.parametrize("name, tensor, message", [
    (BIAS, None, f"lacks {BIAS}"), (BIAS, torch.zeros(5), f"{BIAS} is torch.float32 [5]"),
    (BIAS, torch.zeros(4, dtype=torch.int32), f"{BIAS} is torch.int32 [4]"),
    (BIAS, torch.full((4,), math.nan), "unet.conv_out.bias holds values that are not finite"),
    (f"{weights_convert.UNET}.more", torch.zeros(1), "such a model does not have: model.diff"),
    ("cond_stage_model.transformer.final_layer_norm.bias", torch.ones(64), "norm.bias twice"),
    (CONV_IN, None, f"{NOT_AT_ALL}ValueError: it lacks {CONV_IN}"),
    (CONV_IN, torch.zeros(32, 8, 3, 3), "it has 8 input channels rather than 4 (or 9, to repaint)"),
    (CONV_IN, torch.zeros(33, 4, 3, 3), NOT_AT_ALL),
    ("first_stage_model.encoder.conv_in.weight", torch.zeros(()), NOT_AT_ALL),
    (f"{weights_convert.TEXT}.embeddings.token_embedding.weight", torch.zeros(3), NOT_AT_ALL)])
def test_tensors_that_do_not_fit_are_named(name, tensor, message, plain, refuses):
    refuses({**plain, name: tensor}, message)


def ending_in_zeros(share: int, data: bytes) -> bytes:
    """As a download that broke off leaves a file."""
    size = len(data) // share
    return data[:-size] + bytes(size)


@pytest.mark.parametrize("source, damage, message", [
    ("plain.ckpt", lambda data: b"version https://git-lfs.github.com/spec/v1\noid", "is a git-LFS"),
    ("plain.ckpt", lambda data: b"PK\5\6" + bytes(18), "it is a zip, but none that torch wrote"),
    ("plain.ckpt", lambda data: data[:100000], "is neither a whole .safetensors nor a whole .ckpt"),
    ("plain.safetensors", lambda data: data[:100000], "is neither a whole .safetensors nor a"),
    ("plain.safetensors", lambda data: b"", "nor a whole .ckpt (a zip, as torch writes it since 1"),
    ("plain.safetensors", partial(ending_in_zeros, 4), "holds nothing but zeros"),
    ("plain.safetensors", partial(ending_in_zeros, 50), "holds nothing but zeros"),
    ("plain.ckpt", lambda data: data.replace(b"state_dict", b"\xff\xff\xffte_dict", 1), "damaged")])
def test_damaged_files_are_named(source, damage, message, official, tmp_path, refuses):
    (tmp_path / source).write_bytes(damage((official / source).read_bytes()))
    refuses(tmp_path / source, message)


def test_folders_of_other_models_are_named(tmp_path, refuses):
    folder = tmp_path / "f"
    (folder / "text_encoder_2").mkdir(parents=True)
    refuses(folder, "lacks unet/diffusion_pytorch_model.safetensors, so it is no diffusers folder; "
                    "pass a folder, or one file")
    for part in ("unet", "vae", "text_encoder"):
        (folder / part).mkdir()
        save_file({"x": torch.zeros(3, 3)}, folder / weights_convert.part_files(part)[0])
    before = sorted(folder.rglob("*"))
    refuses(folder, "is no Stable Diffusion 1.x, 2.x or XL")
    assert sorted(folder.rglob("*")) == before


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
    (["--to", "official", str(tiny_ldm.BUILT_IN)],
     "is not built like Stable Diffusion (ValueError: other: text, vae, unet, scale_factor)"),
    (["models/nowhere.bin"], "no file models/nowhere.bin"),
    (["some/model", "--ema"], "--ema and --no-ema choose in a single file"),
    (["--to", "official", "any", "--no-ema"], "--ema changes what is converted"),
    (["--to", "official", "any", "--prediction", "v"], "--prediction changes what is converted")])
def test_bad_arguments_are_one_line_and_exit_code_2(args, message, official, monkeypatch, capsys):
    monkeypatch.chdir(official)
    before = {path: path.stat().st_mtime_ns for path in official.iterdir()}
    assert weights_convert.main(args) == 2
    assert message in last_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in official.iterdir()} == before


def test_what_is_damaged_or_differs_is_not_turned_back(official, tmp_path, capsys):
    def refused(source, message):
        out = tmp_path / "o.safetensors"
        assert weights_convert.main(["--to", "official", str(source), "-o", str(out)]) == 2
        assert message in last_line(capsys) and not out.exists()

    ours, bad = official / "ours.safetensors", tmp_path / "bad.safetensors"
    refused(with_one_changed(ours, bad, "unet.conv_out.bias", None), "lacks unet.conv_out.bias")
    bias = "text_encoder.layers.0.fc1.bias"
    refused(with_one_changed(ours, bad, bias, torch.zeros(2)), "fc1.bias is torch.float32 [2]")
    ldm = converted(official / "sd2.safetensors", tmp_path / "t", official)
    for part, change, message in (("text", dict(penultimate=False), "other: text)"),
                                  ("unet", dict(norm_groups=7), "is damaged (ValueError")):
        ldm.config = replace(ldm.config, **{part: replace(getattr(ldm.config, part), **change)})
        ldm.save(bad)
        refused(bad, message)


def test_an_output_needs_force_to_be_replaced_and_room(official, tmp_path, monkeypatch, capsys):
    source, out = official / "plain.safetensors", tmp_path / "t.safetensors"
    out.write_text("mine")
    assert convert(source, out, official) == 2 and "exists already" in last_line(capsys)
    os.mkfifo(tmp_path / "pipe")                  # nor is what only looks like a file, ever
    assert convert(source, tmp_path / "pipe", official, "--force") == 2
    assert (tmp_path / "pipe").is_fifo() and "a folder or a device" in last_line(capsys)
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
    text = VOCABULARY.to_str()
    model = json.loads(text)["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "old.json").write_text(json.dumps({"model": {**model, "merges": merges}}))
    write_vocabulary(tmp_path / "two", model)
    for source in (".", "tokenizer.json", "old.json", "two"):
        assert weights_convert.read_tokenizer(tmp_path / source).to_str() == text


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
    write_vocabulary(tmp_path / "two", json.loads(clip.backend.to_str())["model"])
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "two")
    words = ["a", "Photo", "THE", "don't", "we'LL", "é", "e\u0301", "ß", "İ", "ﬁ", "日本", "👩\u200d🚀",
             "1234", "3.5", "--", "(((", "<|startoftext|>", "<|endoftext|>", "\t", "\u00a0", "_x_",
             "&amp;", "ǅ", "٣", "x" * 30]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(words) + rng.choice(["", " ", "  "]) for _ in range(30))
        wanted = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert clip([text])[0].tolist() == wanted, text


@pytest.fixture
def hub(folder, tmp_path):
    """Runs the converter next to a hub that has one repository, a narrow one."""
    with local_hub(folder, "some/model") as address:
        yield partial(run, program="weights_convert.py", cwd=tmp_path, HF_HUB_DISABLE_XET="1",
                      HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"))


@whole
def test_a_hub_repository_is_downloaded_and_converted(hub, official, tmp_path):
    done = hub("some/model")
    assert (done.returncode, done.stdout) == (0, "model.tiny_ldm.safetensors\n"), done.stderr
    ours = (official / "ours.safetensors").read_bytes()
    assert (tmp_path / "model.tiny_ldm.safetensors").read_bytes() == ours
    # By a pasted address, too, and then without a network
    for source, env in (("https://huggingface.co/some/model/tree/main#files", {}),
                        ("huggingface.co/some/model/?x=1", {}),
                        ("some/model", {"HF_HUB_OFFLINE": "1"})):
        done = hub(source, "-o", "again", "--force", **env)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "again").read_bytes() == ours
    for source, message in (("some/other", "some/other can't be had from the hub"),
                            (official / "plain.ckpt", "pass --tokenizer with bpe_simple_vocab_16")):
        done = hub(source)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# Stable Diffusion 1.x, 2.x and XL, number for number. The same inputs go through our networks and
# those of transformers and diffusers; GOLDEN is what these gave, for where they are not installed.
# All in float64, where nothing but a difference of meaning can show. Stepping into a trap of 2.x
# or XL shows as 1e-2 to 10: padding, activation, which layer, the final norm, the pooled vector's
# place and projection, the order of the six sizes, zeros for the empty prompt, v. With weights a
# hundredth as large, "small", what reaches each norm has a variance near the norm's epsilon: a
# wrong one shows as 0.1 and more, and on ordinary weights as 1e-5.

# A row of six or four values for each output in `their_outputs`, in its order, by transformers 5.24
# and diffusers 0.42
GOLDEN = {"plain": """
        -1.95908064     0.459222536    -0.411673869     0.727314733      0.83116248    -0.725095146
       0.0287531323    -0.222705155     0.163893726    -0.106276206     0.695494123      0.58126671
       0.0119283241    -0.242865625     0.230685415     -0.12657128     0.756475439      0.64293544
       -0.331881637    -0.718639676   -0.0350717757     -0.26515887   -0.0904472945    0.0956287005
       -0.155510369   -0.0842387059    0.0946416495     0.101547478     0.116879312     0.891462928
         3.35050752      4.19511023     -9.56790971      10.6799355      8.27845551       11.548071
""", "small": """
       -0.120533875    -0.336852009    0.0390874062     0.210487275     0.101134055     0.234540763
    -0.000679867348  -0.00102797067 -0.000451912314  -0.00393350119   0.00346159338  -0.00636485595
    -0.000679865692  -0.00102796825 -0.000451925888  -0.00393350052   0.00346160448  -0.00636485313
     -0.00139349109 -0.000466821574   0.00012564734  0.000248715242 -0.000195638581 -0.000159050153
     -0.00269819821  -0.00446293318   0.00253607057  -0.00172857482 -0.000882066579   0.00285158645
        0.772402913      2.64802019     -4.44713666      14.9902051      7.51345329      1.07380891
""", "sd2": """
         1.20443529      1.71307832     0.390825404     0.945476187
       -0.255833992   -0.0306746725   -0.0978939829    0.0419798128
        -0.30468833    -0.121375683     -0.35028094    0.0185708311
       -0.331881637     0.204618869      0.18736518    -0.243984162
       -0.155510369    -0.243098475     0.101547478     -1.22513753
        0.660901427      2.69723917      13.6077312     -14.6630958
""", "xl": """
        -1.18401513     0.728330817      2.02131206     0.518072626
        0.760665033       -0.513649    -0.326691652     -1.33542081
       -0.347711656     0.178441369     0.242500887    -0.491883646
       -0.404569581     0.206443704     0.195187828     -0.48481303
       -0.331881637     0.204618869      0.18736518    -0.243984162
       -0.155510369    -0.243098475     0.101547478     -1.22513753
         3.45308858      5.25748525      15.1110282      -20.712115
"""}
WALKS = ("DDIM", "walk")                  # our latents on the way are float32


def check_golden(outputs: dict[str, torch.Tensor], name: str) -> None:
    rows = GOLDEN[name].strip().splitlines()
    assert len(rows) == len(outputs)
    for (output, t), row in zip(outputs.items(), rows):
        known = torch.tensor([float(number) for number in row.split()])
        some = t.flatten()[:: t.numel() // len(known)][: len(known)]
        assert relative_error(some, known) <= (1e-5 if output in WALKS else 1e-7), output


@pytest.mark.parametrize("name", GOLDEN)
def test_networks_give_the_golden_numbers(name, official, tmp_path):
    ldm = converted(official / f"{name}.safetensors", tmp_path / "t", official)
    check_golden(our_outputs(ldm), name)


with_references = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("diffusers", "transformers"))),
    reason="diffusers and transformers are not both installed")


@with_references
@pytest.mark.parametrize("name, prediction", [
    ("plain", "eps"), ("small", "eps"), ("sd2", "eps"), ("sd2", "v"), ("xl", "eps")])
def test_networks_equal_the_reference_implementations(name, prediction, official, tmp_path):
    """Live, at every value, also from a folder that diffusers itself has written, which gives the
    same tensors but for the last layer of 2.x, which is not used."""
    source, more = official / f"{name}.safetensors", ["--prediction", prediction]
    ldm = converted(source, tmp_path / "t", official, *more)
    models = references(CONFIGS[name], load_file(source))
    for part, model in models.items():
        model.save_pretrained(tmp_path / "f" / part)
    assert convert(tmp_path / "f", tmp_path / "u", official, *more) == 0
    ours, theirs = load_file(tmp_path / "t"), load_file(tmp_path / "u")
    assert all(torch.equal(t, ours.pop(key)) for key, t in theirs.items())
    assert all(key.startswith("text_encoder.layers.2.") for key in ours)
    doubles = {part: model.double() for part, model in models.items()}
    theirs, ours = their_outputs(CONFIGS[name], doubles, prediction), our_outputs(ldm)
    assert list(theirs) == list(ours)
    for output, t in ours.items():
        limit = 1e-5 if output in WALKS else 1e-12
        assert relative_error(t, theirs[output]) <= limit, output
    if prediction == "eps":
        check_golden(theirs, name)


@whole
@with_references
@pytest.mark.parametrize("factor", [1.0, 1e-2])
def test_single_precision_stays_within_the_limits(factor, official, tmp_path):
    comparison(tmp_path, NARROW, official / "tokenizer.json", steps=50, factor=factor)
    if factor == 1:
        comparison(tmp_path, NARROW_2, official / "tokenizer.json", steps=25)


@pytest.mark.parametrize("spelling, base", [
    ("kohya", "plain"), ("kohya", "sd2"), ("kohya XL", "xl"), ("diffusers, 2022", "plain"),
    ("diffusers, 2023", "plain"), ("peft", "plain"), ("peft", "sd2")])
def test_loras_are_added_to_the_weights(spelling, base, official, tmp_path, capsys):
    tensors, added = a_lora(spelling, CONFIGS[base])
    save_file(tensors, tmp_path / "one.safetensors")
    torch.save(tensors, tmp_path / "one.pt")
    source = official / f"{base}.safetensors"
    assert convert(source, tmp_path / "without", official) == 0
    loras = [f"{tmp_path / 'one.safetensors'}:0.5", tmp_path / "one.pt"]
    assert convert(source, tmp_path / "with", official, "--lora", *loras) == 0
    assert f"one.safetensors, of {len(added)} layers, at scale 0.5" in capsys.readouterr().err
    before, after = load_file(tmp_path / "without"), load_file(tmp_path / "with")
    for name, t in before.items():
        wanted = t + 1.5 * added[name] if name in added else t
        torch.testing.assert_close(after[name], wanted, rtol=1e-6, atol=1e-6)


def test_a_loras_alpha_may_be_in_its_header(official, tmp_path):
    tensors, added = a_lora("peft", NARROW)
    says = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"resnets.2.conv1": 1},
            "text_encoder.alpha_pattern": {"text_model.encoder.layers.1.self_attn.q_proj": 8},
            "text_encoder.use_rslora": True}
    factors = {"unet.down": 4, "unet.up_b": 0.5, "text_enco": 8 / 2**0.5}
    save_file(tensors, tmp_path / "l", {"lora_adapter_metadata": json.dumps(says)})
    source = official / "plain.safetensors"
    assert convert(source, tmp_path / "o", official, "--lora", tmp_path / "l") == 0
    before, after = load_file(official / "ours.safetensors"), load_file(tmp_path / "o")
    for name, change in added.items():
        wanted = before[name] + factors[name[:9]] * change
        torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=1e-5)


def test_loras_that_can_not_be_added_are_refused(official, tmp_path, refuses):
    good, _ = a_lora("kohya", NARROW)
    first, *_, last = good
    conv = "lora_unet_down_blocks_0_downsamplers_0_conv"
    lora = tmp_path / "l.safetensors"
    for name, tensor, message in (
            ("lora_unet_x.lora_up.weight", torch.ones(3), "1 of its 28 tensors are of no layer"),
            (f"{conv}.lora_mid.weight", torch.ones(3), "lora_mid"),
            (first.replace("_unet_down_blocks_0_attentions_0_", "_unet_input_blocks_1_1_"),
             good[first].clone(), "changes a layer twice, by two names (lora_unet_input_blocks"),
            (first, torch.ones(2, 7), "is for another model: it changes unet_down_blocks_0"),
            (f"{conv}.hada_w1_a", torch.ones(3), "is a LoHa; only plain LoRAs"),
            (f"{conv}.lokr_w1", torch.ones(3), "is a LoKr"),
            (f"{conv}.dora_scale", torch.ones(3), "is a DoRA"),
            (first, None, "is damaged (KeyError: 'down')"), (last, torch.ones(3), "is damaged"),
            (first, torch.full_like(good[first], math.inf), "values that are not finite")):
        tensors = {key: t for key, t in {**good, name: tensor}.items() if t is not None}
        save_file(tensors, lora)
        refuses(official / "plain.ckpt", message, "--lora", lora)
    for given, message in ((f"{lora}:x", "x is no scale"), (f"{lora}:nan", "is no scale"),
                           (tmp_path / "none", "no file"), (official / "ours.safetensors", "of no"),
                           (official / "tokenizer.json", "neither a whole .safetensors nor")):
        refuses(official / "plain.ckpt", message, "--lora", given)


@whole
@with_references
@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
@pytest.mark.parametrize("spelling, name", [
    ("kohya", "plain"), ("kohya", "sd2"), ("kohya XL", "xl"), ("diffusers, 2023", "plain"),
    ("peft", "plain")])
def test_loras_are_added_as_diffusers_adds_them(spelling, name, official, tmp_path):
    source = official / f"{name}.safetensors"
    tensors, _ = a_lora(spelling, CONFIGS[name])
    save_file(tensors, tmp_path / "l.safetensors")
    models = references(CONFIGS[name], load_file(source))
    models = with_lora(models, tmp_path / "l.safetensors", 0.7)
    for part, model in models.items():
        model.save_pretrained(tmp_path / "f" / part)
    assert convert(tmp_path / "f", tmp_path / "theirs", official) == 0
    lora = f"{tmp_path / 'l.safetensors'}:0.7"
    assert convert(source, tmp_path / "ours", official, "--lora", lora) == 0
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    for tensor, t in theirs.items():
        torch.testing.assert_close(ours[tensor], t, rtol=1e-6, atol=1e-6)


def test_prompts_of_siblings_are_padded_and_emptied_as_they_were_trained(official, tmp_path):
    sd2 = converted(official / "sd2.safetensors", tmp_path / "a", official)
    xl = converted(official / "xl.safetensors", tmp_path / "b", official)
    eos = sd2.tokenizer.eos
    ids, ids_xl = sd2.tokenizer("a red ring")[0], xl.tokenizer("a red ring")[0]
    assert (ids[4], ids[5:].tolist()) == (eos, [0] * 72)
    assert ids_xl[4:].tolist() == [eos] * 73
    with calls_of(xl.text_encoder, xl.text_encoder_2.token_embedding, xl.unet) as calls:
        list(xl.denoise("a red ring", steps=1, guidance_scale=3, width=64, height=32))
        list(xl.denoise("a red ring", "", steps=1, guidance_scale=3, width=64, height=32))
    second = [inputs[0] for inputs, _ in calls if inputs[0].dtype == torch.long][1]
    assert torch.equal(second[0], ids)                       # 2.x and XL's second pad with 0
    asked = [inputs for inputs, _ in calls if len(inputs) == 4]
    (_, _, context, vector), (_, _, context_2, vector_2) = asked
    assert not context[0].any() and not vector[0, :128].any()      # None: zeros
    assert context_2[0].any() and vector_2[0, :128].any()          # "": the empty prompt
    sizes = tiny_ldm.timestep_embedding(torch.tensor([32, 64, 0, 0, 32, 64]), 256).flatten()
    assert torch.equal(vector[:, 128:], sizes.to(vector).expand(2, -1))


def test_what_siblings_take_by_default(official, tmp_path, capsys):
    """Steps, sampler and scale; a Turbo by its spelling, its folder, or its hash."""
    sd2, xl = (load_file(official / f"{name}.safetensors") for name in ("sd2", "xl"))

    def defaults(tensors, *more, **metadata):
        save_file(tensors, tmp_path / "x.safetensors", metadata)
        c = converted(tmp_path / "x.safetensors", tmp_path / "t", official, *more).config
        return c.sampler, c.steps, c.guidance_scale, c.prediction, c.image_size

    assert defaults(sd2) == ("ddim", 50, 9, "eps", 512)
    assert defaults(xl) == ("euler_leading", 50, 5, "eps", 1024)
    assert defaults(sd2, "--prediction", "v") == ("ddim", 50, 9, "v", 768)
    spread = {**sd2, f"{weights_convert.UNET}.output_blocks.11.1.transformer_blocks.0.norm1.bias":
              0.2 * randn(64)}
    assert defaults(spread)[3] == "v" and "spreads by 0.2" in capsys.readouterr().err
    assert defaults(spread, **{"modelspec.prediction_type": "epsilon"})[3] == "eps"
    turbo = {name.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): t
             for name, t in sd2.items()}
    for tensors in (turbo, xl):
        tensors = {**tensors, "denoiser.sigmas": torch.ones(1000)}
        assert defaults(tensors)[:3] == ("euler_a_trailing", 1, 1)
    made = LatentDiffusion.load(tmp_path / "t", "cpu").generate("a", width=64, height=32,
                                                               progress=False)
    assert made[0].size == (64, 32)


def test_what_is_no_model_of_these_is_named(plain, official, tmp_path, refuses):
    sd2, xl = (load_file(official / f"{name}.safetensors") for name in ("sd2", "xl"))
    label, distilled = (f"{weights_convert.UNET}.{name}.weight"
                        for name in ("label_emb.0.0", "time_embed.cond_proj"))
    for tensors, message in (
            ({**plain, distilled: torch.ones(3, 3)},
             "a distilled model that takes the guidance scale as an input"),
            ({**sd2, label: torch.ones(4, 4)}, "is the refiner of Stable Diffusion XL"),
            ({**split_unet(xl)[0], **split_unet(sd2)[1]}, "is the refiner of Stable Diffusion XL"),
            ({**xl, "edm_vpred.sigma_max": torch.ones(())}, "is CosXL, whose schedule is another"),
            ({**xl, "edm_mean": torch.ones(4)}, "is Playground, whose schedule is another"),
            ({**xl, "ztsnr": torch.zeros(0)}, "has a zero terminal"),
            ({"model.diffusion_model.joint_blocks.0.x": torch.ones(3)}, "is Stable Diffusion 3"),
            ({"double_blocks.0.img_attn.qkv.weight": torch.ones(3)}, "is Flux"),
            ({"lora_unet_x.lora_up.weight": torch.ones(3)}, "is a LoRA"),
            ({"emb_params": torch.zeros(2, 768)}, "is a textual inversion, which adds a word")):
        refuses(tensors, message)
    vectors = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.zeros(2, 768))})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": vectors}, tmp_path / "a.pt")
    refuses(tmp_path / "a.pt", "is a textual inversion, which adds a word")


def test_xls_vae_stays_in_float32_next_to_half(official, tmp_path):
    """Its numbers get too large for float16."""
    ldm = converted(official / "xl.safetensors", tmp_path / "t", official, dtype=torch.float16)
    assert ldm.dtype == torch.float16 and {p.dtype for p in ldm.vae.parameters()} == {torch.float32}
    image = tiny_ldm.to_tensor([gradient(64, 64)])
    picture, = ldm.generate("a", image=image, steps=2, progress=False)
    assert picture.size == (64, 64)
    with pytest.raises(InputError, match="Stable Diffusion XL can't be trained here"):
        tiny_ldm.train_model("shapes", tmp_path / "m.safetensors", weights=tmp_path / "t")


@with_references
@pytest.mark.skipif(not (os.environ.get("TINY_LDM_FULL_SIZE") and CLIP.is_dir()),
                    reason="needs 11 GB of disk, 16 GB of memory, 15 minutes and CLIP's words: "
                           "set TINY_LDM_FULL_SIZE=1 and TINY_LDM_CLIP_DIR")
def test_full_size_stable_diffusion_equals_the_references(capsys):
    done = run(CLIP / CLIP_FILE, program=".ci/reference.py")
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}")


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
        picture = tiny_ldm.open_image(tmp_path / name, tiny_ldm.to_rgb)
        assert (picture.mode, picture.size) == ("RGB", (3, 2)), name
        assert np.abs(pixels_of([picture]) - grey).max() <= 1, name


@pytest.mark.parametrize("mode, colour", [("RGB", (0, 255, 0)), ("RGBA", (99, 0, 0, 255))])
def test_a_mask_is_read_by_its_brightness_or_by_where_it_is_drawn(mode, colour, tmp_path):
    mask = Image.new(mode, (32, 32))                       # black; with "RGBA" transparent
    mask.paste(colour, (0, 0, 32, 8))                      # the upper quarter
    mask.save(tmp_path / "m.png")
    picture = gradient(32, 32)
    picture.save(tmp_path / "i.png")
    for image in (picture, tiny_ldm.to_tensor([picture]), tmp_path / "i.png"):
        for given in (mask, str(tmp_path / "m.png")):
            repaint = tiny_ldm.fit_pictures(TINY, image, given)["mask"]
            assert repaint[..., :8, :].all() and not repaint[..., 8:, :].any()


def test_what_changes_nothing_is_said_in_one_line(capsys):
    labels = Image.new("L", (32, 32), 1)
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    for mask in (labels, red, Image.new("L", (32, 32)), Image.new("RGBA", (32, 32))):
        tiny_ldm.fit_pictures(TINY, gradient(32, 32), mask)
        assert capsys.readouterr().err.startswith("tiny_ldm: the mask repaints nothing: ")
    tiny_ldm.fit_pictures(TINY, gradient(32, 32), strength=0.09, steps=10)
    assert capsys.readouterr().err.startswith("tiny_ldm: the strength is less than one step")
    tiny_ldm.fit_pictures(TINY, gradient(32, 32), red.convert("1"), strength=0.1, steps=10)
    assert capsys.readouterr().err == ""


def test_numbers_in_32_bits_keep_their_proportions():
    """White is 1, 255 or 65,535, whichever is the first that the numbers fit in; or the largest."""
    for top, dtype in ((1, np.float32), (255, np.float32), (255, np.int32), (65535, np.int32),
                       (10**6, np.int32)):
        values = (np.array([[0, 0.2, 1]]) * top).astype(dtype)
        grey = np.asarray(tiny_ldm.to_rgb(Image.fromarray(values)))[0, :, 0]
        assert grey.tolist() == [0, 51, 255], (top, dtype)


def test_metadata_never_costs_a_picture(tmp_path):
    picture, text = gradient(8, 8), PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2**21, zip=True)
    picture.save(tmp_path / "text.png", pnginfo=text)
    picture.save(tmp_path / "exif.png", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    picture.save(tmp_path / "profile.png", icc_profile=b"no profile")
    for name in ("text.png", "exif.png", "profile.png"):
        read = tiny_ldm.open_image(tmp_path / name, tiny_ldm.to_rgb)
        assert read.tobytes() == picture.tobytes(), name


@pytest.mark.parametrize("size, fitted", [
    ((4000, 3000), (32, 32)), ((3000, 1000), (48, 16)), ((10, 90), (16, 96)),
    ((9000, 1), (3040, 16))])
def test_a_picture_is_brought_to_the_models_own_area(size, fitted, capsys):
    found = tiny_ldm.fit_pictures(TINY, Image.new("RGB", size))
    assert (found["width"], found["height"]) == fitted == found["image"].shape[:1:-1]
    said = f"the picture of {size[0]} x {size[1]} is used at {fitted[0]} x {fitted[1]}"
    assert capsys.readouterr().err == f"tiny_ldm: {said}\n"


@pytest.mark.parametrize("width, height, wanted", [
    (None, None, (32, 32)), (64, None, (32, 64)), (16, 64, (64, 16))])
def test_pictures_are_cropped_to_the_size_and_their_masks_with_them(width, height, wanted):
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


@pytest.mark.parametrize("prompts, settings, message", [
    ([], {}, "0 prompts and 1 negative prompts"),
    (["a"] * 4, dict(negative_prompt=["b"] * 2), "4 prompts and 2 negative prompts"),
    (["a"] * 2, dict(negative_prompt=["b"] * 4), "2 prompts and 4 negative prompts"),
    (["a"], dict(negative_prompt=["b"] * 2), "1 prompts and 2 negative prompts"),
    ("a", dict(steps=0), "steps must be from 1 to 1000, not 0"),
    ("a", dict(sampler="magic"), "unknown sampler 'magic'"),
    ("a", dict(sampler="lcm", steps=51), "steps must be from 1 to 50 with lcm, not 51"),
    (torch.zeros(1, 24, 16), dict(negative_prompt=torch.zeros(1, 12, 16)),
     r"the prompt is \[1, 24, 16\] and that of the negative prompt \[1, 12, 16\]"),
    (torch.zeros(2, 12, 16), {}, r"\[2, 12, 16\] and that of the negative prompt \[1, 16, 16\]"),
    (torch.zeros(2, 8, 16), dict(negative_prompt=torch.zeros(3, 8, 16)),
     "2 prompts and 3 negative prompts"),
    ("a", dict(width=40), "width and height must be multiples of 16, not 40 and 32"),
    ("a", dict(height=9600), "height must be from 1 to 8192, not 9600"),
    ("a", dict(mask=Image.new("L", (8, 8))), "a mask needs an image")])
def test_python_checks_what_the_command_checks(prompts, settings, message, tiny):
    with pytest.raises(InputError, match=message):
        tiny.generate(prompts, progress=False, **settings)
    with pytest.raises(InputError, match=message):
        next(iter(tiny.denoise(prompts, **settings)))


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
        tiny.save(file / "m.safetensors")


def test_python_takes_paths_and_numbers_of_numpy(tiny, tmp_path):
    gradient(32, 32).save(tmp_path / "i.png")
    settings = dict(steps=np.int64(3), seed=np.int32(7), guidance_scale=np.float32(3),
                    progress=False)
    for image in (str(tmp_path / "i.png"), tmp_path / "i.png"):
        made, = tiny.generate("a", image=image, width=np.int64(32), **settings)
        wanted, = tiny.generate("a", image=gradient(32, 32), steps=3, seed=7, guidance_scale=3.0,
                                progress=False)
        assert made.tobytes() == wanted.tobytes()
    with pytest.raises(InputError, match="no file .*none.png; check the path"):
        tiny.generate("a", image=tmp_path / "none.png", **settings)


@pytest.mark.parametrize("wrong", [dict(path=5), dict(dtype="float16"), dict(dtype=torch.int8)])
def test_a_wrong_argument_is_no_damaged_file(wrong):
    with pytest.raises(TypeError):
        LatentDiffusion.load(**wrong)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_the_weights_file_is_mapped_once():
    code = ("import tiny_ldm; half = tiny_ldm.torch.float16; "
            "ldm = tiny_ldm.LatentDiffusion.load(device='cpu', dtype=half); "
            "print(open('/proc/self/maps').read().count('shapes.safetensors'))")
    assert python("-c", code).stdout == "1\n"


@whole
def test_through_a_link_and_as_a_copy(tmp_path):
    (tmp_path / "link.py").symlink_to(HERE / "tiny_ldm.py")
    shutil.copy(HERE / "tiny_ldm.py", tmp_path / "copied.py")
    done = python(tmp_path / "link.py", "a red circle", "--steps", 1, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "a-red-circle-0.png\n")
    done = python(tmp_path / "copied.py", "a red circle", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"the built-in model is not at {tmp_path}/weights/shapes.safetensors" in done.stderr


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
    assert dtype == torch.float32 or (found - exact).norm() > 1e-4 * exact.norm()    # it is in use


@whole
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_compiled_networks_make_the_same_pictures():
    """The smallest that have every part, since compiling takes long; within 1 level."""
    unet = replace(TINY.unet, channel_mult=(1,), transformer_depth=(1,))
    ldm = tiny_model(vae=replace(TINY.vae, channel_mult=(1, 2)), image_size=16, unet=unet)
    settings = dict(steps=2, seed=3, progress=False)
    plain = pixels_of(ldm.generate("a circle", **settings))
    tiny_ldm.compile_networks(ldm)
    assert ldm.unet._compiled_call_impl and ldm.vae.decoder._compiled_call_impl
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


def test_interruptions_change_no_bit_of_a_training(pictures, tmp_path, one_thread, monkeypatch):
    through = small_training(pictures, tmp_path / "through.safetensors")
    out = tmp_path / "parts.safetensors"
    stages = ("vae_loss", "vae_loss", "text_to_image_loss", "text_to_image_loss")
    for stage, call in zip(stages, (2, 2, 1, 3)):
        calls, real_loss = [], getattr(tiny_ldm, stage)

        def loss(*args, **settings):
            """Ctrl-C when it is asked for so many times."""
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt
            return real_loss(*args, **settings)

        monkeypatch.setattr(tiny_ldm, stage, loss)
        with pytest.raises(KeyboardInterrupt):
            small_training(pictures, out, save_minutes=0)
        monkeypatch.undo()
        LatentDiffusion.load(out, "cpu")                # the model so far
    assert same_model(through, small_training(pictures, out))
    assert len(list(tmp_path.iterdir())) == 4           # two models, two checkpoints
    # Once more, when it is finished: the model stays
    assert same_model(through, small_training(pictures, out, unet_steps=0))


@pytest.mark.parametrize("steps", [0, 3])               # the last checkpoint is of stage 1, or of 2
def test_a_trained_model_is_the_average_of_its_weights(steps, pictures, tmp_path):
    out = tmp_path / "m.safetensors"
    small_training(pictures, out, unet_steps=steps)
    state, made = torch.load(f"{out}.checkpoint"), load_file(out)
    assert all(torch.equal(t, state["averaged"][name].half()) for name, t in made.items())
    assert not all(torch.equal(t, state["model"][name].half()) for name, t in made.items())


def test_large_t_are_more_frequent_and_latents_float32(pictures, tmp_path, monkeypatch):
    drawn, loss = [], tiny_ldm.text_to_image_loss

    def watched(ldm, x0, ids, *, t, **more):
        assert x0.dtype == torch.float32
        drawn.append(t)
        return loss(ldm, x0, ids, t=t, **more)

    monkeypatch.setattr(tiny_ldm, "text_to_image_loss", watched)
    small_training(pictures, tmp_path / "m.safetensors", vae_steps=0, unet_batch=512,
                   dtype=torch.bfloat16)
    assert torch.cat(drawn).double().mean().item() == pytest.approx(600, abs=30)   # uniform: 500


def test_muon_keeps_directions_and_takes_the_matrices_inside(built_in):
    g, p = randn(12, 20), torch.nn.Parameter(torch.zeros(12, 20))
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    s = u.T @ tiny_ldm.orthogonalized(g) @ vt.T
    assert 0.6 < s.diagonal().min() and s.diagonal().max() < 1.3
    assert (s - s.diagonal().diag()).abs().max() < 1e-4
    p.grad = g.clone()
    tiny_ldm.Muon([dict(params=[p], lr=0.1, muon=True)]).step()
    torch.testing.assert_close(p.data, -0.1 * tiny_ldm.orthogonalized(g), atol=1e-4, rtol=1e-3)
    weights = dict(built_in.named_parameters())
    inside = {id(p) for p in tiny_ldm.make_optimizer(weights).param_groups[0]["params"]}
    for name, wanted in (("unet.mid_block.0.conv1", True), ("unet.conv_out", False),
                         ("text_encoder.token_embedding", False)):
        assert (id(weights[f"{name}.weight"]) in inside) == wanted


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


def test_a_folder_spelled_another_way_is_the_same_run(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    out = tmp_path / "m.safetensors"
    small_training(pictures, out, unet_steps=2)
    steps = []
    monkeypatch.setattr(tiny_ldm, "text_to_image_loss", lambda *a, **k: steps.append(1))
    for spelled in (f"{pictures.name}/", f"./{pictures.name}", pictures):
        small_training(spelled, out, unet_steps=2)
    assert not steps


def test_what_can_not_be_trained_or_continued_is_refused(pictures, tmp_path, monkeypatch):
    out = tmp_path / "m.safetensors"
    checkpoint = tmp_path / "m.safetensors.checkpoint"
    start = tmp_path / "start.safetensors"
    tiny_model(unet=replace(TINY.unet, in_channels=9)).save(start)
    with pytest.raises(InputError, match="tiny can't be trained here"):
        small_training(pictures, out, weights=start)
    with monkeypatch.context() as two:
        two.setattr(tiny_ldm, "WORLD", 2)
        with pytest.raises(InputError, match=r"2 processes can't share batches of \(4, 15\)"):
            small_training(pictures, out, unet_batch=15)
    small_training(pictures, out)
    for settings in (dict(seed=1), dict(weights=out)):
        with pytest.raises(InputError, match="is of another run .*choose another -o"):
            small_training(pictures, out, **settings)
    good = bytearray(checkpoint.read_bytes())
    flipped = good.copy()
    flipped[len(good) // 2] ^= 1
    for damaged in (good[: len(good) // 2], good[:-1], flipped, b""):
        checkpoint.write_bytes(damaged)
        with pytest.raises(InputError, match="checkpoint .* is damaged .*choose another -o"):
            small_training(pictures, out)
    checkpoint.unlink()
    before = out.read_bytes()
    with pytest.raises(InputError, match="exists, and no checkpoint .*--force"):
        small_training(pictures, out)
    assert out.read_bytes() == before
    small_training(pictures, out, seed=1, force=True)
    assert out.read_bytes() != before


def test_training_goes_on_from_weights_whose_vae_stays(pictures, tmp_path, capsys):
    first = small_training(pictures, tmp_path / "a.safetensors")
    second = small_training(pictures, tmp_path / "b.safetensors", dtype=torch.bfloat16,
                            weights=tmp_path / "a.safetensors")
    assert first.config == second.config and not same_model(first, second)
    for name, p in first.vae.state_dict().items():
        assert torch.equal(p, second.vae.state_dict()[name])
    out = str(tmp_path / "c.safetensors")
    assert tiny_ldm.main(["--train", str(pictures), "--weights", str(tmp_path / "a.safetensors"),
                          "-o", out, "--unet-steps", "0"]) == 0
    assert capsys.readouterr().out == f"{out}\n"


def test_training_leaves_a_layer_that_nothing_uses(pictures, tmp_path):
    first = tiny_model(text=replace(TINY.text, penultimate=True, num_layers=2))
    first.half().save(tmp_path / "a.safetensors")
    second = small_training(pictures, tmp_path / "b.safetensors", weights=tmp_path / "a.safetensors")
    used, unused = [torch.equal(a.fc1.weight, b.fc1.weight.half()) for a, b in
                    zip(first.text_encoder.layers, second.text_encoder.layers)]
    assert unused and not used


def test_a_training_without_stage_2_stores_the_latents_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_ldm.ShapesData, "captions", lambda data: some_captions(300))
    seed = 2**62                                                   # the largest
    ldm = small_training("shapes", tmp_path / "m.safetensors", unet_steps=0, seed=seed)
    pictures = [tiny_ldm.ShapesData(32, seed).item(i)[0] for i in range(256)]
    latents = ldm.encode_image(tiny_ldm.to_tensor(pictures))
    assert ldm.config.scale_factor != TINY.scale_factor
    assert latents.std().item() == pytest.approx(1, rel=0.01)      # the file has half precision


@pytest.mark.parametrize("scale", [math.nan, 0], ids=["loss", "gradient"])
def test_what_is_not_finite_ends_training(scale, pictures, tmp_path, monkeypatch):
    """The root's gradient at 0 is infinite, while the loss is finite."""
    monkeypatch.setattr(tiny_ldm, "text_to_image_loss", lambda ldm, *_, **__: sum(
        (scale * p).abs().sqrt().sum() for p in ldm.parameters() if p.requires_grad))
    out = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match=f"after step 0, with a loss of {scale:.1f}, not all"):
        small_training(pictures, out, vae_steps=0, save_minutes=0)
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
    (tmp_path / "metadata.jsonl").write_text(f"{entry}\n\n", "utf-8-sig")
    assert "ein gr\u00fcner Kreis" in tiny_ldm.FolderData(tmp_path, 32, 0).captions()


@whole
def test_two_processes_learn_together_what_one_learns(tmp_path):
    rng = random.Random(1)
    for file in make_folder(tmp_path / "f").glob("*.txt"):
        # Of so many pieces that are equally frequent it is chance which are learned
        words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(99)]
        file.write_text(f"{file.read_text()} {' '.join(words)}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", []), ("two", torchrun)):
        done = python(*start, HERE / ".ci/shared_training.py", tmp_path, name, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    losses, _ = torch.load(tmp_path / "one.0")
    (ours, a), (theirs, b) = torch.load(tmp_path / "two.0"), torch.load(tmp_path / "two.1")
    assert a.pop("header") == b.pop("header")             # scale factor and tokenizer, too
    assert all(torch.equal(p, b[name]) for name, p in a.items())
    one, two = np.array(losses), (np.array(ours) + theirs) / 2
    assert one[59] < one[0] / 2
    np.testing.assert_allclose(two[:15], one[:15], rtol=1e-5)
    np.testing.assert_allclose(two[:60], one[:60], rtol=0.03)     # rounding has grown by then
    np.testing.assert_allclose(two[60:].mean(), one[60:].mean(), rtol=0.25)


# --------------------------------------------------------------------------------------------------
# 14. Command line. It writes what it says and says what it writes; its files carry their settings.

def made(*args) -> int:
    return tiny_ldm.main([str(arg) for arg in args])


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
                "--steps", 5, "--sampler", "ddim", "--eta", 0.5, "--guidance-scale", 3, "--height",
                128, "--dtype", "bfloat16", "--device", "cpu", "-o", "x.png") == 0
    half = copy.deepcopy(built_in).to(torch.bfloat16, memory_format=torch.channels_last)
    wanted, = half.generate("a red circle", image=gradient(70, 60), mask=mask, strength=0.6,
                            steps=5, sampler="ddim", eta=0.5, guidance_scale=3, height=128,
                            progress=False)
    assert Image.open("x.png").tobytes() == wanted.tobytes()


def test_a_picture_replaces_another_only_by_the_name_that_the_user_gave(inside, capsys):
    for prompt, name in (("A star!", "a-star-0"), ("a star?", "a-star-0_2"),
                         ("a star", "a-star-0_3")):
        assert made(prompt, "--steps", 1) == 0
        assert capsys.readouterr().out == f"{name}.png\n"
    before = Path("a-star-0.png").read_bytes()
    assert made("a star", "--steps", 2, "-n", 2) == 0
    assert capsys.readouterr().out == "a-star-0_4.png\na-star-1.png\n"
    assert made("a star", "--image", "a-star-0.png", "--film", "a-star-0_5.png") == 0
    assert capsys.readouterr().out == "a-star-0_6.png\na-star-0_5.png\n"
    assert Path("a-star-0.png").read_bytes() == before
    assert made("a star", "--steps", 2, "-o", "a-star-0.png") == 0
    assert Path("a-star-0.png").read_bytes() != before


@pytest.mark.skipif(sys.platform != "linux", reason="drops root's rights as Linux does")
@pytest.mark.parametrize("args", [
    ["a", "-o", "no/x.png"], ["a", "-o", "x.png", "--film", "no/x.gif"],
    ["--train", "shapes", "-o", "no/x.safetensors"]])
def test_what_can_not_be_written_is_noticed_before_the_work(args, inside):
    (inside / "no").mkdir(mode=0o555)
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run([*drop, sys.executable, HERE / "tiny_ldm.py", *args], text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search("no/x.* can't be written .*Permission denied", done.stderr)


@pytest.mark.parametrize("env", [dict(RANK="1", WORLD_SIZE="2"),
                                 pytest.param(dict(RANK="", WORLD_SIZE=""), marks=whole)])
def test_numbers_of_processes_mean_nothing_without_torchrun(env, tmp_path):
    done = run("a red circle", "--steps", 1, "-n", 2, "-o", "x.png", cwd=tmp_path, **env)
    assert (done.returncode, done.stdout) == (0, "x-0.png\nx-1.png\n")


def test_the_user_is_told_what_the_model_can_not_know(inside, capsys):
    assert made("An astronaut, and " + "a red ring " * 9, "--steps", 1) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "tiny_ldm: " in line]
    assert len(lines) == 2 and re.search("prompt is too long; cut off: (a |red |ring )+", lines[0])
    assert "has never met: astronaut, and; " in lines[1] and "Stable Diffusion" in lines[1]


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory"),
                                   torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line_and_no_damaged_file(error, inside, monkeypatch, capsys):
    monkeypatch.setattr(LatentDiffusion.__base__, "load", mock.Mock(side_effect=error))
    assert made("a red circle") == 2
    said = capsys.readouterr().err
    assert said.startswith("tiny_ldm: not enough memory (") and said.count("\n") == 1


def test_a_mistake_of_the_program_is_raised():
    with pytest.raises(RuntimeError, match="a mistake"):
        tiny_ldm.main([], mock.Mock(side_effect=RuntimeError("a mistake of this program")))


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
    for name, tensor, value in (("missing", "unet.conv_out.bias", None),
                                ("extra", "extra", torch.zeros(1)),
                                ("shape", "unet.conv_out.bias", torch.zeros(5)),
                                ("old", "unet.conv_in.weight", torch.zeros(1))):
        with_one_changed(d / "tiny.safetensors", d / f"{name}.safetensors", tensor, value)
    tiny_model(unet=replace(TINY.unet, in_channels=9)).save(d / "nine.safetensors")
    Image.new("RGB", (64, 64)).save(d / "p.png")
    for name, file, text in (("empty", "x", ""), ("broken", "p.txt", "a red circle"),
                             ("list", "metadata.jsonl", '\n{"file_name": "p.png"}\n')):
        (d / name).mkdir()
        (d / name / file).write_text(text)
    (d / "broken" / "p.png").write_bytes(b"\x89PNG\r\n")
    (d / "link").symlink_to(d)
    return d


# The words as in a shell, and what the message says
DIFFERENT = "-o and --film must be different files, and not --image, --mask or --weights"
BAD = [
    ("", "the prompt is empty"),
    ("''", "the prompt is empty"),
    ("a --sampler magic", "unknown sampler 'magic'; there are: ddpm, ddim, plms, euler"),
    ("a --steps 0", "steps must be from 1 to 1000, not 0"),
    ("a --steps many", "argument --steps: invalid int value: 'many'; see --help"),
    ("a --width 100", "width and height must be multiples of 16, not 100 and 64"),
    ("a --width 0", "width must be from 1 to 8192, not 0"),
    ("a -n 0", "count must be from 1 to 65536, not 0"),
    ("a --seed -1", "seed must be from 0 to 4611686018427387904, not -1"),
    ("a --eta 2", "eta must be from 0 to 1, not 2.0"),
    ("a --guidance-scale nan", "guidance_scale must be from -1000 to 1000, not nan"),
    ("a --strength 1.5", "strength must be from 0 to 1, not 1.5"),
    ("a -n 2 -o x.png --film x-1.png", DIFFERENT),
    ("a --image cut.safetensors", "cut.safetensors can't be read as a picture"),
    ("a --image alloc.png", "no file alloc.png; check the path"),
    ("a --image link/p.png -o p.png", DIFFERENT),
    ("a --device meta", "there is no device 'meta' here"),
    ("a --mask p.png", "a mask needs an image that it belongs to"),
    ("a --nonsense", "unrecognized arguments: --nonsense"),
    ("a -o nowhere/x.png", "nowhere/x.png can't be written (FileNotFoundError"),
    ("a -n 2 -o x.bmp", "x.bmp must end in .png"),
    ("a -n 2 -o .", ". must end in .png"),
    ("a --film x.mp4", "x.mp4 must end in .png or .gif"),
    ("a --weights ''", ". is a folder"),
    ("a --weights empty", "empty is a folder; name a file"),
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
    ("--train shapes -o x.safetensors --steps 9", "--steps is only for pictures; leave it out"),
    ("a --unet-steps 9", "--unet-steps is only for training; leave it out"),
    ("a --image p.png --mask broken/p.png --width 32", "broken/p.png can't be read as a picture"),
    ("--train shapes -o x.png", "x.png must end in .safetensors"),
    ("--train shapes -o x.safetensors --dtype float16", "gradients are too small to train with"),
    ("--train shapes -o nowhere/x.safetensors", "nowhere/x.safetensors can't be written"),
    ("--train shapes -o tiny.safetensors", "exists, and no checkpoint to continue from"),
    ("--train shapes -o x.safetensors --unet-steps -1", "unet_steps must be from 0 to"),
    ("--train shapes -o x.safetensors --unet-batch 0", "unet_batch must be from 1 to"),
    ("--train shapes -o x.safetensors --save-minutes nan", "save_minutes must be from 0 to"),
    ("--train nowhere -o x.safetensors", "can't train on the folder nowhere (FileNotFoundError"),
    ("--train empty -o x.safetensors", "the folder empty (ValueError: no captioned pictures)"),
    ("--train broken -o x.safetensors", "broken/p.png can't be read as a picture"),
    ("--train list -o x.safetensors", "list/metadata.jsonl, line 2 is wrong (KeyError: 'text')"),
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


# --------------------------------------------------------------------------------------------------
# It does not break. Hundreds of damaged files and odd calls make a picture or end in one line, and
# a training that is killed at twenty moments ends as one that is not. .ci/damage.py tries them.

@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits memory as Linux does")
@pytest.mark.parametrize("extent", [["--one-of", 30], pytest.param([], marks=whole)])
def test_it_does_not_break(extent):
    done = run(*extent, program=".ci/damage.py")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
