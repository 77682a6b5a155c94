"""What must hold, as readable examples.

    pytest                                  all of it, in a few minutes
    python test_tiny_ldm.py 200             the README's table: 200 captions of each kind, judged
                                            from the pixels
    python test_tiny_ldm.py 200 --weights FILE
    python test_tiny_ldm.py 25 --samplers FILE.png      prompt-following of every sampler
    python test_tiny_ldm.py 1 --ways FILE.png           a picture for each way to walk
    python test_tiny_ldm.py --golden        the reference implementations' numbers in GOLDEN
"""
import concurrent.futures
import contextlib
import copy
import functools
import glob
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import warnings
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny_ldm
import weights_convert
from tiny_ldm import (COLOURS, COUNTS, RELATIONS, SD1, SD1_INPAINT, SHAPE_NAMES, SHAPES, SIZES,
                      InputError, LatentDiffusion, Scene, Thing, Tokenizer, caption_of, draw,
                      is_held_out, place, random_scene)

try:
    import resource            # not on Windows
except ImportError:
    resource = None

HERE = Path(__file__).parent


# --------------------------------------------------------------------------------------------------
# The judge: does a picture show what its caption says? It looks at pixels and caption, and at
# nothing else.

def parse(caption: str) -> Scene:
    """The grammar backwards: a caption to what it says."""
    text, _, tail = caption.partition(" on a")
    background = tail.removeprefix("n").removesuffix(" background").strip() or None

    def thing(words: list[str]) -> Thing:
        size = words.pop(0) if words[0] in SIZES else None
        return Thing(words[0], words[1], size)

    words = text.split()
    if words[0] in COUNTS:
        ending = "es" if words[-1] == "crosses" else "s"
        shape = words[-1].removesuffix(ending)
        return Scene((thing(words[1:-1] + [shape]),) * COUNTS[words[0]], None, background)
    for relation in RELATIONS:
        first, found, second = text.partition(f" {relation} ")
        if found:
            things = thing(first.split()[1:]), thing(second.split()[1:])
            return Scene(things, relation, background)
    return Scene((thing(words[1:]),), None, background)


def widened(values: np.ndarray) -> np.ndarray:
    """Each pixel of [H, W] takes the largest value among itself and its eight neighbours."""
    h, w = values.shape
    padded = np.pad(values, 1)
    return np.max([padded[i:i + h, j:j + w] for i in range(3) for j in range(3)], axis=0)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask [H, W] (eight neighbours), as masks, the largest first."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:           # every pixel takes the largest label around it, until nothing changes
        best = widened(labels) * mask
        if (best == labels).all():
            break
        labels = best
    parts = [labels == label for label in np.unique(labels) if label]
    return sorted(parts, key=lambda p: -p.sum())


def nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: np.abs(rgb - np.array(COLOURS[name])).sum())


@functools.cache
def moments(shape: str) -> tuple[float, float]:
    """(area, y of the centroid) of a unit shape."""
    ink = 1 - np.asarray(draw(Scene((Thing("black", shape),)), [(64, 64, 40)], 128))[..., 0] / 255
    return ink.sum() / 40**2, ((np.arange(128) + 0.5) @ ink.sum(1) / ink.sum() - 64) / 40


def fit_shape(coverage: np.ndarray, shape: str) -> tuple[float, float]:
    """How well the coverage [H, W] (0 ... 1) of a thing fits a template of its area and centroid:
    (overlap, radius)."""
    side, (area, low) = len(coverage), moments(shape)
    k, total, at = 128 / side, coverage.sum(), np.arange(len(coverage)) + 0.5
    r = math.sqrt(total / area) * k
    x, y = at @ coverage.sum(0) / total * k, at @ coverage.sum(1) / total * k - low * r
    drawn = np.asarray(draw(Scene((Thing("black", shape),)), [(x, y, r)], side))
    template = 1 - drawn[..., 0].astype(float) / 255
    return np.minimum(template, coverage).sum() / np.maximum(template, coverage).sum(), r


def look(image: Image.Image) -> tuple[str, list[dict]]:
    """What is in a picture: (background colour, [{colour, shape, overlap, radius, x, y}, ...])."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    side = len(pixels)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    contrast = np.abs(pixels - ground).sum(-1)
    things = []
    for part in components(contrast > 60):
        if part.sum() < 0.001 * side * side:
            continue
        strong = part & (contrast >= np.percentile(contrast[part], 50))
        colour = np.median(pixels[strong], axis=0)
        towards = colour - ground
        coverage = np.clip(((pixels - ground) @ towards) / (towards**2).sum(), 0, 1)
        coverage = coverage * widened(part)
        if (coverage > 0.5).sum() < 9:
            continue
        (overlap, radius), shape = max((fit_shape(coverage, s), s) for s in SHAPE_NAMES)
        ys, xs = np.nonzero(coverage > 0.5)
        things.append(dict(
            colour=nearest_colour(colour), shape=shape, overlap=overlap, radius=radius,
            x=(xs.min() + xs.max()) / 2, y=(ys.min() + ys.max()) / 2))
    return nearest_colour(ground), things


def judge(image: Image.Image, caption: str) -> str:
    """"" if the picture shows exactly what the caption says; otherwise what is wrong."""
    scene = parse(caption)
    background, found = look(image)
    if background != (scene.background or "white"):
        return f"the background is {background}"
    if len(found) != len(scene.things):
        return f"there are {len(found)} things"
    if scene.relation and len(found) == 2:      # the relation says which of the two is the first
        ux, uy = RELATIONS[scene.relation]
        found.sort(key=lambda f: ux * f["x"] + uy * f["y"])
        a, b = found
        dx, dy = b["x"] - a["x"], b["y"] - a["y"]
        along, across = ux * dx + uy * dy, uy * dx + ux * dy
        if along <= abs(across):
            return f"nothing is clearly {scene.relation}"
    for thing, f in zip(scene.things, found):
        if f["colour"] != thing.colour:
            return f"a {thing.shape} is {f['colour']}"
        if f["shape"] != thing.shape or f["overlap"] < 0.75:
            return f"a {thing.shape} looks like a {f['shape']} ({f['overlap']:.2f})"
        if thing.size and (f["radius"] < 18.5) != (thing.size == "small"):
            return f"a {thing.size} {thing.shape} has radius {f['radius']:.1f}"
    return ""


def random_picture(seed: int) -> tuple[Scene, Image.Image]:
    rng = random.Random(seed)
    scene = random_scene(rng)
    return scene, draw(scene, place(scene, rng), SHAPES.image_size)


KINDS = {"one thing": ["one"], "two things and their relation": ["two"],
         "two or three of a kind": ["alike"], "held-out": ["one", "two", "alike"]}


def captions_of_kind(kind: str, count: int, seed: int) -> list[str]:
    """Captions to try a model on; "held-out" are those with a (colour, shape) pair that no
    training picture shows, of the other three kinds in turn."""
    rng = random.Random(f"{kind}/{seed}")
    return [caption_of(random_scene(rng, kind == "held-out", KINDS[kind][i % len(KINDS[kind])]))
            for i in range(count)]


def crispness(image: Image.Image, caption: str) -> tuple[float, float, float]:
    """How a picture of things of one colour looks: (mean error of the colour inside the things, and
    of that of the background, in levels of 255; width of the edges in pixels of a picture 128
    wide: where the coverage is from 10 to 90 %, over the length of the outline)."""
    scene, pixels = parse(caption), np.asarray(image.convert("RGB")).astype(float)
    ground, colour = (np.array(COLOURS[c]) for c in (scene.background or "white",
                                                     scene.things[0].colour))
    coverage = (pixels - ground) @ (colour - ground) / ((colour - ground)**2).sum()
    thing = coverage > 0.5
    inside, near = ~widened(~thing), widened(widened(thing))
    edge = (coverage > 0.1) & (coverage < 0.9) & near
    # Steps along rows and columns make a line longer by 4/π, on average over its directions
    outline = (np.diff(thing, axis=0).sum() + np.diff(thing, axis=1).sum()) * math.pi / 4
    error = lambda mask, c: np.abs(pixels[mask] - c).mean() if mask.any() else 0.0
    return (error(inside, colour), error(~near, ground),
            edge.sum() / outline * 128 / len(pixels))


def prompt_following(ldm: LatentDiffusion, kind: str, count: int, seed: int = 10**6,
                     free_words: bool = False, **settings) -> list[tuple[Image.Image, str, str]]:
    """[(picture, caption, what is wrong or "")] for count captions of a kind, with fresh seeds.
    free_words: the model gets the caption in other words."""
    captions, judged = captions_of_kind(kind, count, seed), []
    told = [tiny_ldm.rephrase(c, random.Random(c)) if free_words else c for c in captions]
    for i in range(0, count, 25):
        images = ldm.generate(told[i:i + 25], seed=seed + i, progress=False, **settings)
        judged += [(image, c, judge(image, c)) for image, c in zip(images, captions[i:])]
    return judged


def altered(scene: Scene, rng: random.Random) -> Scene:
    """A scene that differs in one word: a colour, a shape, a size, the background, the relation or
    the count."""
    while True:
        things, background, relation = list(scene.things), scene.background, scene.relation
        what = rng.choice(("colour", "shape", "size", "background", "relation", "count"))
        if what == "colour":
            things[0] = things[0]._replace(colour=rng.choice(list(COLOURS)))
        elif what == "shape":
            things[0] = things[0]._replace(shape=rng.choice(SHAPE_NAMES))
        elif what == "size" and things[0].size:
            things[0] = things[0]._replace(size="small" if things[0].size == "large" else "large")
        elif what == "background":
            background = rng.choice(list(COLOURS))
        elif what == "relation" and relation and things[0][:2] != things[1][:2]:
            relation = rng.choice(list(RELATIONS))
        elif what == "count" and not relation and len(things) > 1:
            things = things[:1] * (5 - len(things))
        if not relation:
            things = things[:1] * len(things)
        plain = lambda s: (s.things, s.relation, s.background or "white")
        if plain(Scene(tuple(things), relation, background)) != plain(scene):
            return Scene(tuple(things), relation, background)


def test_judge_accepts_true_pictures_and_rejects_wrong_captions():
    rng, accepted, rejected = random.Random(1), 0, 0
    for seed in range(300):
        scene, picture = random_picture(seed)
        assert parse(caption_of(scene)) == scene
        accepted += judge(picture, caption_of(scene)) == ""
        rejected += judge(picture, caption_of(altered(scene, rng))) != ""
    assert accepted >= 0.99 * 300
    assert rejected >= 0.98 * 300


def test_judge_rejects_noise_and_emptiness():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert judge(noise, "a red circle")
    assert judge(Image.new("RGB", (64, 64), "white"), "a red circle")


# --------------------------------------------------------------------------------------------------
# Fixtures: a model so small that a test takes no time, and the one that is shipped

TINY = replace(
    SHAPES, name="tiny", image_size=32,
    text=tiny_ldm.TextConfig(vocab_size=500, max_length=16, width=16, num_layers=1, num_heads=2),
    vae=tiny_ldm.VAEConfig(channels=8, channel_mult=(1, 1, 1, 2), num_res_blocks=1, norm_groups=4),
    unet=tiny_ldm.UNetConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1,
                             attention=(True, False), num_heads=2, norm_groups=4))


def small_tokenizer(length: int) -> Tokenizer:
    """At most 500 tokens, learned from captions of the Shapes world."""
    captions = [caption_of(random_scene(random.Random(i))) for i in range(300)]
    return Tokenizer.train(captions, 500, length)


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
    return subprocess.run([sys.executable, str(HERE / program), *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, env={**os.environ, **env})


# --------------------------------------------------------------------------------------------------
# Config and parts, against plain definitions

def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sd1_has_the_published_numbers_of_parameters():
    with torch.device("meta"):
        assert count(tiny_ldm.UNet(SD1.unet, SD1.text.width)) == 859_520_964
        assert count(tiny_ldm.VAE(SD1.vae)) == 83_653_863
        assert count(tiny_ldm.TextEncoder(SD1.text)) == 123_060_480
        assert tiny_ldm.UNet(SD1_INPAINT.unet, 768).conv_in.weight.shape == (320, 9, 3, 3)
    assert (SD1.stride, SD1.latent_stride) == (64, 8)


def test_config_survives_json():
    from dataclasses import asdict
    for config in (SHAPES, SD1, SD1_INPAINT):
        assert tiny_ldm.Config.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_schedule_has_the_original_values():
    a = tiny_ldm.make_alphas_cumprod(SD1.schedule)
    assert a.dtype == torch.float64 and a.shape == (1000,)
    sigma = ((1 - a) / a) ** 0.5
    for value, known in ((a[0], 0.99915), (a[1], 0.998296), (a[999], 0.0046601),
                         (sigma[999], 14.6146), (sigma[0], 0.0291672)):
        assert value.item() == pytest.approx(known, rel=1e-5)
    root = lambda s: 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * s / 999
    closed = math.prod(1 - root(s) ** 2 for s in range(501))
    assert a[500].item() == pytest.approx(closed, rel=1e-12)


def test_eps_x0_v_and_score_say_the_same():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn((2, 3, 4, 4, 4), generator=g, dtype=torch.float64)
    for a in (0.999, 0.5, 0.005):
        x = tiny_ldm.add_noise(x0, eps, a)
        v = tiny_ldm.v_from_eps(x0, eps, a)
        torch.testing.assert_close(tiny_ldm.x0_from_eps(x, eps, a), x0)
        torch.testing.assert_close(tiny_ldm.eps_from_x0(x, x0, a), eps)
        torch.testing.assert_close(tiny_ldm.eps_from_v(x, v, a), eps)
        torch.testing.assert_close(tiny_ldm.x0_from_v(x, v, a), x0)
        torch.testing.assert_close(tiny_ldm.score_from_eps(eps, a), -(x - a**0.5 * x0) / (1 - a))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("context_dim", [None, 6])
def test_attention_is_softmax_written_out(causal, context_dim):
    if causal and context_dim:
        pytest.skip("cross-attention is never causal")
    torch.manual_seed(0)
    m = tiny_ldm.Attention(8, 2, context_dim, qkv_bias=True, causal=causal)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6) if context_dim else None
    if context_dim:
        q, (k, v) = m.q(x), m.kv(context).split(8, -1)
    else:
        q, k, v = m.qkv(x).split(8, -1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / math.sqrt(4)
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., h])
    torch.testing.assert_close(m(x, context), m.out(torch.cat(heads, -1)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_attention_to_many_places_is_the_same_in_blocks(dtype, tolerance, monkeypatch):
    if dtype not in tiny_ldm.IN_BLOCKS:
        pytest.skip(f"this processor's oneDNN has no {dtype}")
    layer, context = tiny_ldm.Attention(24, 3, 24), torch.randn(2, 1024, 24)
    x, called = torch.randn(2, 700, 24), []
    blocks = tiny_ldm.attention_in_blocks
    monkeypatch.setattr(tiny_ldm, "attention_in_blocks",
                        lambda *qkv: called.append(1) or blocks(*qkv))
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double(), context.double())
        found = layer.to(dtype)(x.to(dtype), context.to(dtype)).double()
        assert called and relative_error(found, exact) <= tolerance
        layer(x.to(dtype), context[:, :77].to(dtype))              # (few places: another way)
    layer(x.to(dtype), context.to(dtype)).sum().backward()         # (gradients: another way)
    assert len(called) == 1
    q, k, v = (y.to(dtype) for y in (torch.randn(1, 2, 9, 4), *torch.randn(2, 1, 2, 5, 4)))
    torch.library.opcheck(blocks, (q, k, v))                       # what --compile needs to know


def test_causal_attention_in_half_precision_is_so_for_long_prompts_too():
    layer, x = tiny_ldm.Attention(16, 2, causal=True), torch.randn(1, 600, 16)
    with torch.no_grad():
        exact, rounded = layer(x), layer.bfloat16()(x.bfloat16()).float()
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_norm_epsilons_and_padding_are_the_originals():
    with torch.device("meta"):
        unet, vae = tiny_ldm.UNet(SD1.unet, 768), tiny_ldm.VAE(SD1.vae)
        text = tiny_ldm.TextEncoder(SD1.text)
    norms = [(m, owner) for owner in unet.modules() for m in owner.children()
             if isinstance(m, torch.nn.GroupNorm)]
    for module, owner in norms:
        assert module.eps == (1e-6 if isinstance(owner, tiny_ldm.SpatialTransformer) else 1e-5)
    assert {m.eps for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}
    assert {m.eps for m in text.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    assert {m.pad for m in unet.modules() if isinstance(m, tiny_ldm.Downsample)} == {(1, 1, 1, 1)}
    assert {m.pad for m in vae.modules() if isinstance(m, tiny_ldm.Downsample)} == {(0, 1, 0, 1)}


def test_large_pictures_are_decoded_in_bands_to_the_same_values(tiny, monkeypatch):
    z = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    whole = tiny.vae.decode(z)
    monkeypatch.setattr(tiny_ldm, "BAND", 8 * 20)          # as if that were large
    with torch.no_grad():
        torch.testing.assert_close(tiny.vae.decode(z), whole, atol=1e-5, rtol=1e-5)


def test_group_norm_by_its_definition():
    m, x = tiny_ldm.GroupNorm(2, 4, 1e-2), 0.1 * torch.randn(3, 4, 5, 5)
    groups = x.view(3, 2, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
    wanted = (groups - mean) / (variance + 1e-2) ** 0.5
    torch.testing.assert_close(m(x), wanted.view_as(x))
    assert m(x.bfloat16()).dtype == torch.bfloat16


def test_timestep_embedding_is_cos_then_sin():
    e = tiny_ldm.timestep_embedding(torch.tensor([7.0]), 4)[0]
    wanted = torch.tensor([math.cos(7), math.cos(0.07), math.sin(7), math.sin(0.07)])
    torch.testing.assert_close(e, wanted)
    torch.testing.assert_close(tiny_ldm.timestep_embedding(torch.tensor([7]), 4)[0], e)


def test_quick_gelu_and_geglu():
    layer = tiny_ldm.TextLayer(4, 1)
    x = torch.randn(1, 3, 4)
    with torch.no_grad():
        y = x + layer.attention(layer.norm1(x))
        h = layer.fc1(layer.norm2(y))
        torch.testing.assert_close(layer(x), y + layer.fc2(h / (1 + torch.exp(-1.702 * h))))
        ff = tiny_ldm.FeedForward(2)
        value, gate = ff.proj(x[..., :2]).split(8, -1)
        exact = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
        torch.testing.assert_close(ff(x[..., :2]), ff.out(value * exact))


def test_shapes_of_the_public_parts(tiny):
    image = torch.rand(2, 3, 32, 64) * 2 - 1
    mean, logvar = tiny.vae.encode(image)
    assert mean.shape == logvar.shape == (2, 4, 4, 8) and logvar.abs().max() <= 30
    assert tiny.vae.decode(mean).shape == image.shape
    ids = tiny.tokenizer(["a red circle", ""])
    assert ids.shape == (2, 16) and ids.dtype == torch.long
    assert ids[0, 0] == tiny.tokenizer.bos and ids[1, 1:].eq(tiny.tokenizer.eos).all()
    context = tiny.encode_text(["a red circle", ""])
    assert context.shape == (2, 16, 16)
    for t in (torch.tensor([3, 999]), torch.tensor([3.5, 0.25])):
        assert tiny.unet(mean, t, context).shape == mean.shape
    latents = tiny.encode_image(image)
    torch.testing.assert_close(latents, mean * tiny.config.scale_factor)
    before = latents.clone()
    assert tiny.decode_latents(latents).abs().max() <= 1 and torch.equal(latents, before)
    sampled = tiny.encode_image(image, torch.Generator().manual_seed(0))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    wanted = (mean + (0.5 * logvar).exp() * noise) * tiny.config.scale_factor
    torch.testing.assert_close(sampled, wanted)


def test_text_encoder_is_causal(tiny):
    one, other = tiny.encode_text(["a red circle", "a red square"])
    ids = tiny.tokenizer(["a red circle", "a red square"])
    same = (ids[0] == ids[1]).long().cumprod(0).bool()
    assert same.sum() >= 3 and torch.equal(one[same], other[same])
    assert not torch.allclose(one[~same], other[~same])


def test_tokenizer_cuts_and_says_so(tiny, capsys):
    ids = tiny.tokenizer(["red " * 15 + "the end"])[0]
    assert len(ids) == 16 and ids[-1] == tiny.tokenizer.eos and ids[-2] != tiny.tokenizer.eos
    message = "tiny_ldm: the prompt is longer than 14 tokens; cut off: 'red the end'\n"
    assert capsys.readouterr().err == message
    assert tiny.tokenizer.unknown_words("A RED astronaut") == ["astronaut"]
    assert torch.equal(tiny.tokenizer("a ring"), tiny.tokenizer(["a ring"]))


# --------------------------------------------------------------------------------------------------
# Samplers, against exact answers

SD1_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ALPHAS_CUMPROD = tiny_ldm.make_alphas_cumprod(SD1.schedule)


def walk(sampler: str, predict_eps, x, steps: int, noise=None, eta: float = 0.0):
    """All steps of a sampler, from x at its first noise level."""
    way = tiny_ldm.SAMPLERS[sampler]
    return list(way.walk(predict_eps, x, way.plan(steps, ALPHAS_CUMPROD), noise, eta))


@pytest.mark.parametrize("sampler", tiny_ldm.SAMPLERS)
def test_every_number_of_steps_gives_that_many_steps(sampler):
    way = tiny_ldm.SAMPLERS[sampler]
    for steps in range(1, 1001):
        legs = way.plan(steps, ALPHAS_CUMPROD)
        levels = [leg.alpha_bar for leg in legs] + [legs[-1].next_alpha_bar]
        assert [leg.index for leg in legs] == list(range(steps))
        assert all(0 <= leg.t <= 999 for leg in legs)
        assert all(0 < a <= b <= 1 for a, b in zip(levels, levels[1:]))
        if way.plan is not tiny_ldm.leading:
            assert legs[0].t == 999 and levels[-1] == 1 and all(np.diff(levels) > 0)


def test_leading_timesteps_are_the_originals():
    for steps in [s for s in range(1, 1000) if 1000 % s == 0]:
        legs = tiny_ldm.leading(steps, ALPHAS_CUMPROD)
        assert [leg.t for leg in legs] == list(range(1, 1000, 1000 // steps))[::-1]
        assert legs[-1].next_alpha_bar == pytest.approx(ALPHAS_CUMPROD[0].item(), rel=1e-12)


@pytest.mark.parametrize("sampler, steps, eta, within", [
    ("ddpm", 200, 0, 0.04), ("ddim", 50, 0, 0.06), ("ddim", 200, 1, 0.04), ("plms", 50, 0, 0.02),
    ("euler", 50, 0, 0.07), ("euler_a", 200, 0, 0.05), ("dpmpp_2m", 50, 0, 0.06),
    ("dpmpp_2m_karras", 50, 0, 0.02), ("langevin", 1000, 0, 0.03)])
def test_samplers_reproduce_a_gaussian(sampler, steps, eta, within):
    """Data ~ N(m, s²): then xₜ ~ N(√ᾱ m, ᾱ s² + 1 − ᾱ) and the ideal ε is E[ε | xₜ], a formula.
    From data noised to the first level, a sampler must arrive at data noised to the last one."""
    m, s = 0.7, 0.4
    ideal = lambda x, t, a: (1 - a) ** 0.5 * (x - a**0.5 * m) / (a * s**2 + 1 - a)
    g = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(20000, generator=g, dtype=torch.float64)
    legs = tiny_ldm.SAMPLERS[sampler].plan(steps, ALPHAS_CUMPROD)
    first, last = legs[0].alpha_bar, legs[-1].next_alpha_bar
    start = first**0.5 * m + (first * s**2 + 1 - first) ** 0.5 * noise()
    x = walk(sampler, ideal, start, steps, noise, eta)[-1].x
    assert x.mean().item() == pytest.approx(last**0.5 * m, abs=0.02)
    assert x.std().item() == pytest.approx((last * s**2 + 1 - last) ** 0.5, rel=within)


def mixture_error(sampler: str, steps: int) -> float:
    """The error of a walk between σ = 10 and σ = 0.05, even in log σ, on data that is one of two
    Gaussians. In one dimension the flow keeps every point's quantile, so the exact end is known:
    where the cumulative distribution at the last σ is what it was at the first."""
    parts, s, sigmas = ((0.4, -1.0), (0.6, 1.5)), 0.5, np.geomspace(10, 0.05, steps + 1)

    def ideal(x, t, a):      # ε = −σ · score, of x̃ = x/√ᾱ ~ Σ w N(m, s² + σ²)
        variance = s**2 + (1 - a) / a
        odds = [w * torch.exp(-((x / a**0.5 - m) ** 2) / (2 * variance)) for w, m in parts]
        pull = sum(o * (x / a**0.5 - m) for o, (_, m) in zip(odds, parts)) / sum(odds)
        return ((1 - a) / a) ** 0.5 * pull / variance

    def quantile(x, sigma):
        return sum(w * torch.special.ndtr((x - m) / (s**2 + sigma**2) ** 0.5) for w, m in parts)

    start = torch.tensor([-9.0, -3.0, 1.0, 8.0], dtype=torch.float64)
    low, high = torch.full_like(start, -20), torch.full_like(start, 20)
    for _ in range(60):      # bisection
        middle = (low + high) / 2
        below = quantile(middle, sigmas[-1]) < quantile(start, sigmas[0])
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    legs = tiny_ldm.plan(sigmas[:-1], sigmas[:-1], 1 / (1 + sigmas[-1] ** 2))
    x = start * legs[0].alpha_bar**0.5
    *_, last = tiny_ldm.SAMPLERS[sampler].walk(ideal, x, legs, None)
    return (last.x / legs[-1].next_alpha_bar**0.5 - low).abs().max().item()


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("euler", 1), ("plms", 2),
                                            ("dpmpp_2m", 2)])
def test_deterministic_samplers_converge_with_their_papers_order(sampler, order):
    """(PLMS is "pseudo": of high order in ε, of second order in all.)"""
    errors = [mixture_error(sampler, steps) for steps in (40, 80, 160)]
    slopes = [math.log2(e / half) for e, half in zip(errors, errors[1:])]
    print(f"{sampler}: slopes {slopes[0]:.2f}, {slopes[1]:.2f}")
    assert all(order - 0.25 < slope for slope in slopes) and slopes[1] < order + 0.8


def test_euler_is_ddim_in_other_words():
    predict = lambda x, t, a: torch.tanh(x + t / 1000)
    legs, x = tiny_ldm.linspace(20, ALPHAS_CUMPROD), torch.linspace(-2, 2, 5, dtype=torch.float64)
    for one, other in zip(tiny_ldm.euler(predict, x, legs, None),
                          tiny_ldm.ddim(predict, x, legs, None)):
        torch.testing.assert_close(one.x, other.x)


def test_ddim_with_eta_1_is_ddpm():
    predict = lambda x, t, a: torch.tanh(x + t / 1000)
    walks = []
    for name in ("ddim", "ddpm"):
        g = torch.Generator().manual_seed(1)
        noise = lambda: torch.randn(5, generator=g, dtype=torch.float64)
        walks.append([s.x for s in walk(name, predict, noise(), 20, noise, eta=1.0)])
    torch.testing.assert_close(walks[0], walks[1])


def reference_scheduler(sampler: str):
    """What one of our samplers is called in diffusers."""
    import diffusers
    offset = dict(steps_offset=1, timestep_spacing="leading")
    kind, settings = {
        "ddpm": (diffusers.DDPMScheduler, dict(clip_sample=False, **offset)),
        "ddim": (diffusers.DDIMScheduler,
                 dict(clip_sample=False, set_alpha_to_one=False, **offset)),
        "plms": (diffusers.PNDMScheduler,
                 dict(skip_prk_steps=True, set_alpha_to_one=False, **offset)),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
        "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
        "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, dict(final_sigmas_type="zero")),
        "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler,
                            dict(final_sigmas_type="zero", use_karras_sigmas=True))}[sampler]
    return kind(**SD1_SCHEDULE, **settings)


@pytest.mark.parametrize("sampler, eta", [(name, 0.0) for name in tiny_ldm.SAMPLERS
                                          if name != "langevin"] + [("ddim", 0.7)])
@pytest.mark.parametrize("steps", [1, 7, 20, 50, 250])
def test_samplers_equal_those_of_diffusers(sampler, eta, steps):
    """On a fixed "network", with the same noise. diffusers' DDPM ends its last step at ᾱ = 1, the
    original at ᾱ₀, and its Euler's only step of one begins at t = 0: both left out."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    if sampler.startswith("euler") and steps == 1:
        pytest.skip("diffusers' one step of Euler begins at t = 0")
    scheduler = reference_scheduler(sampler)
    scheduler.set_timesteps(steps)
    predict = lambda x, t, a=None: torch.tanh(x * (1 + float(t) / 1000))
    g = [torch.Generator().manual_seed(5) for _ in range(2)]
    noise = lambda: torch.randn((1, 4, 3, 3), generator=g[0])
    start, theirs = noise(), torch.randn((1, 4, 3, 3), generator=g[1]) * scheduler.init_noise_sigma
    way = tiny_ldm.SAMPLERS[sampler]
    if way.starts_at_sigma:
        start = (1 - way.plan(steps, ALPHAS_CUMPROD)[0].alpha_bar) ** 0.5 * start
    ours = walk(sampler, predict, start, steps, noise, eta)
    extra = dict(eta=eta, generator=g[1]) if sampler == "ddim" else {}
    if sampler in ("ddpm", "euler_a"):
        extra = dict(generator=g[1])
    for t in scheduler.timesteps:
        eps = predict(scheduler.scale_model_input(theirs, t), t)
        if sampler == "ddpm" and t == 1:
            ours = ours[:-1]
            break
        theirs = scheduler.step(eps, t, theirs, **extra).prev_sample
    if steps > 1 or sampler != "ddpm":
        assert (ours[-1].x - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    if sampler != "plms":                       # diffusers counts its look-ahead as a step
        assert [s.t for s in walk(sampler, predict, start, steps, noise, eta)] == pytest.approx(
            scheduler.timesteps.tolist())


def test_whoever_iterates_may_look_and_change(tiny):
    plain = [s.x for s in tiny.denoise("a red circle", steps=4)]
    looked = []
    for s in tiny.denoise("a red circle", steps=4):
        tiny.decode_latents(s.x), tiny.decode_latents(s.x0)
        looked.append(s.x)
    assert all(torch.equal(p, q) for p, q in zip(plain, looked))
    for sampler in tiny_ldm.SAMPLERS:
        plain = [s.x for s in tiny.denoise("a red circle", steps=4, sampler=sampler)]
        steps = tiny.denoise("a red circle", steps=4, sampler=sampler)
        next(steps).x.zero_()
        assert not torch.equal(next(steps).x, plain[1])
        steps.close()
        again = [s.x for s in tiny.denoise("a red circle", steps=4, sampler=sampler)]
        assert all(torch.equal(p, q) for p, q in zip(plain, again))


# --------------------------------------------------------------------------------------------------
# LatentDiffusion

@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0)])
def test_picture_i_of_a_batch_is_the_picture_made_alone(tiny, sampler, eta):
    settings = dict(steps=5, sampler=sampler, eta=eta, progress=False)
    batch = tiny.generate(["a red circle", "two blue stars"], batch_size=2, seed=3, **settings)
    assert len(batch) == 4
    prompts = ["a red circle", "a red circle", "two blue stars", "two blue stars"]
    for i, prompt in enumerate(prompts):
        alone = tiny.generate(prompt, seed=3 + i, **settings)[0]
        assert np.abs(np.asarray(batch[i], dtype=int) - np.asarray(alone)).max() <= 1
    again = tiny.generate(["a red circle", "two blue stars"], batch_size=2, seed=3, **settings)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(batch, again))


def test_start_noise_is_that_of_one_cpu_generator_a_picture(tiny):
    draws = [torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(s)) for s in (7, 8)]
    noise = torch.cat(draws)
    plain = [s.x for s in tiny.denoise("a", steps=3, seed=7, batch_size=2)]
    given = [s.x for s in tiny.denoise("a", steps=3, latents=noise, batch_size=2)]
    assert all(torch.equal(a, b) for a, b in zip(plain, given))


def test_guidance_is_a_line_from_the_negative_prompt_through_the_prompt(tiny):
    first = lambda **k: next(tiny.denoise("a red circle", steps=10, **k)).eps
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    e0, e1 = first(guidance_scale=0.0), first(guidance_scale=1.0)
    close(first(guidance_scale=4.0), e0 + 4 * (e1 - e0))
    close(first(guidance_scale=0.0, negative_prompt="a red circle"), e1)
    encoded = tiny.encode_text("a red circle")
    torch.testing.assert_close(next(tiny.denoise(encoded, steps=10)).eps, first())


def test_prediction_eps_and_v_differ_as_they_should(tiny):
    other = tiny_model(prediction="eps")
    a, b = (next(m.denoise("a", steps=2, guidance_scale=1.0)) for m in (tiny, other))
    start = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    wanted = tiny_ldm.eps_from_v(start, b.eps, tiny.alphas_cumprod[a.t].item())
    torch.testing.assert_close(a.eps, wanted, rtol=1e-4, atol=1e-3)


def test_saved_and_loaded_is_the_same(tiny, tmp_path):
    tiny.save(tmp_path / "m.safetensors")
    loaded = LatentDiffusion.load(tmp_path / "m.safetensors", device="cpu")
    assert loaded.config == tiny.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    again = loaded.state_dict()
    assert all(torch.equal(p, again[name]) for name, p in tiny.state_dict().items())
    a, b = (m.generate("two stars", steps=3, progress=False)[0].tobytes() for m in (tiny, loaded))
    assert a == b
    half = LatentDiffusion.load(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_non_finite_is_an_error_not_a_black_picture():
    ldm = tiny_model()
    ldm.unet.conv_out.bias[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        ldm.generate("a", steps=2, progress=False)
    ldm = tiny_model()
    ldm.vae.decoder.conv_out.bias[0] = math.inf
    with pytest.raises(InputError, match="not finite"):
        ldm.generate("a", steps=2, progress=False)


def test_importing_prints_nothing():
    done = subprocess.run([sys.executable, "-c", "import tiny_ldm"], cwd=HERE, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --------------------------------------------------------------------------------------------------
# Image to image, inpainting, and where the network looked

def gradient(width: int, height: int) -> Image.Image:
    """A picture in which every place is different."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("sampler", tiny_ldm.SAMPLERS)
def test_strength_goes_from_the_picture_to_noise(tiny, sampler):
    image, settings = gradient(32, 32), dict(steps=10, sampler=sampler, progress=False)
    back = tiny.generate("a red circle", image=image, strength=0, **settings)[0]
    latents = tiny.encode_image(tiny_ldm.to_tensor([image]))
    assert back.tobytes() == tiny_ldm.to_pil(tiny.decode_latents(latents))[0].tobytes()
    plain = tiny.generate("a red circle", **settings)[0]
    assert tiny.generate("a red circle", image=image, strength=1, **settings)[0] == plain
    for strength, steps in ((0.1, 1), (0.5, 5), (0.99, 9)):
        walked = list(tiny.denoise("a red circle", image=image, strength=strength, steps=10,
                                   sampler=sampler))
        assert [s.index for s in walked] == list(range(10 - steps, 10))


def test_image_to_image_starts_at_the_level_of_its_first_step(tiny):
    seen = []
    handle = tiny.unet.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    image = tiny_ldm.to_tensor([gradient(32, 32)])
    next(tiny.denoise("a", image=image, strength=0.5, steps=10, seed=4, guidance_scale=1.0))
    handle.remove()
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(4))
    (x, t), = seen
    assert t.tolist() == [401]
    torch.testing.assert_close(x, tiny_ldm.add_noise(tiny.encode_image(image), noise,
                                                     tiny.alphas_cumprod[401].item()))


def test_pictures_of_any_size_are_fitted(tiny):
    turned = gradient(50, 30)
    turned.getexif()[0x0112] = 6                       # "rotate by 90 degrees to look at it"
    for image, sides, size in ((gradient(50, 30), {}, (48, 32)), (turned, {}, (32, 48)),
                               (gradient(5, 300), {}, (16, 304)),
                               (gradient(50, 30).convert("L"), dict(width=64, height=16),
                                (64, 16))):
        fitted, _ = tiny_ldm.fit_pictures(image, None, 16, *map(sides.get, ("width", "height")))
        assert fitted.shape == (1, 3, size[1], size[0])
        made = tiny.generate("a", image=image, steps=2, progress=False, **sides)[0]
        assert made.size == size


def test_pictures_of_any_kind_are_read(tmp_path):
    clear = gradient(32, 32).convert("RGBA")
    clear.putalpha(0)
    deep = Image.fromarray((np.asarray(gradient(32, 32).convert("L")).astype(np.uint16) * 257))
    white, grey = Image.new("RGB", (32, 32), "white"), gradient(32, 32).convert("L").convert("RGB")
    for image, meant in ((clear, white), (deep, grey),
                         (gradient(32, 32).convert("1"), gradient(32, 32).convert("1")),
                         (gradient(32, 32).convert("P"), gradient(32, 32).convert("P"))):
        image.save(tmp_path / "x.png")
        assert tiny_ldm.open_image(tmp_path / "x.png").tobytes() == meant.convert("RGB").tobytes()


def test_masks_of_any_kind_and_size_are_fitted(capsys):
    image, mask = gradient(128, 64), Image.new("RGB", (64, 64))
    mask.paste((0, 255, 0), (0, 0, 64, 16))                # the upper quarter, in green
    for given in (image, tiny_ldm.to_tensor([image])):
        _, repaint = tiny_ldm.fit_pictures(given, mask, 16, None, None)
        assert repaint.shape == (1, 1, 64, 128) and repaint.dtype == torch.bool
        assert repaint[..., :15, :].all() and not repaint[..., 17:, :].any()
        assert "the mask is 64x64 and the image 128x64" in capsys.readouterr().err


@pytest.mark.parametrize("latents", [(1, 4, 5, 8), (2, 4, 4, 4), (1, 3, 4, 4), (4, 4, 4)])
def test_latents_are_checked_at_the_door(tiny, latents):
    with pytest.raises(InputError, match="latents must be|is not a multiple of"):
        tiny.denoise("a", latents=torch.zeros(latents))


@pytest.mark.parametrize("prompt, settings, words", [
    ([], {}, "there is no prompt"),
    (torch.zeros(16, 32), {}, "a context must be"),
    ("a", dict(image=torch.zeros(2, 3, 32, 32)), "2 images for 1 pictures"),
    ("a", dict(image=torch.zeros(1, 3, 32, 32), mask=torch.zeros(1, 1, 32, 32)), "must be bool"),
    ("a", dict(image=torch.zeros(1, 3, 32, 32), mask=torch.zeros(32, 32).bool()), "a mask tensor")])
def test_tensors_are_checked_at_the_door(tiny, prompt, settings, words):
    with pytest.raises(InputError, match=words):
        tiny.generate(prompt, steps=1, progress=False, **settings)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m", "plms"])
def test_outside_the_mask_every_pixel_stays(tiny, sampler):
    image, mask = gradient(48, 32), Image.new("L", (48, 32))
    mask.paste(255, (10, 5, 30, 20))
    made, = tiny.generate("a red circle", image=image, mask=mask, strength=1, steps=4,
                          sampler=sampler, progress=False)
    outside = np.asarray(mask) == 0
    assert (np.asarray(made)[outside] == np.asarray(image)[outside]).all()
    assert (np.asarray(made)[~outside] != np.asarray(image)[~outside]).any()
    *_, last = tiny.denoise("a red circle", image=image, mask=mask, strength=1, steps=4,
                            sampler=sampler)
    latents = tiny.encode_image(tiny_ldm.to_tensor([image]))
    kept = torch.ones(4, 6, dtype=torch.bool)
    kept[0:3, 1:4] = False                             # the latents that the mask touches
    assert torch.equal(last.x[..., kept], latents[..., kept])


def test_a_model_with_nine_channels_sees_mask_and_rest_of_the_picture():
    ldm = tiny_model(unet=replace(TINY.unet, in_channels=9))
    image, mask = gradient(32, 32), Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    seen = []
    handle = ldm.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made, = ldm.generate("a", image=image, mask=mask, strength=1, steps=2, progress=False)
    handle.remove()
    assert (np.asarray(made)[:, 16:] == np.asarray(image)[:, 16:]).all()
    rest = tiny_ldm.to_tensor([image])
    rest[..., :16] = 0
    for half in seen[0]:                               # without the prompt and with it
        assert torch.equal(half[4], torch.tensor([1.0, 1, 0, 0]).expand(4, 4))
        torch.testing.assert_close(half[5:], ldm.encode_image(rest)[0])
    with pytest.raises(InputError, match="this model repaints: give it an image and a mask"):
        ldm.generate("a", progress=False)


def test_attention_maps_are_the_softmax_and_change_nothing(tiny):
    plain = tiny.generate("a red circle", steps=3, progress=False)[0]
    layers = [m.cross_attention for m in tiny.unet.modules()
              if isinstance(m, tiny_ldm.SpatialTransformer)]
    with tiny.attention() as maps, tiny.attention(detail=True) as every:
        watched = tiny.generate("a red circle", steps=3, progress=False)[0]
    assert watched.tobytes() == plain.tobytes()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.unet.modules())
    assert maps.count == len(every.calls) == 3 and len(maps.calls) == 1
    assert len(layers) == len(maps.calls[0]) == len(every.calls[0])
    for layer, total in enumerate(maps.calls[0]):
        torch.testing.assert_close(total, sum(call[layer] for call in every.calls))
        torch.testing.assert_close(total.sum(-1), torch.full(total.shape[:-1], 3.0))
        assert total.shape[0] == 2 and total.shape[1] == 2 and total.shape[-1] == 16
    assert maps.mean().shape == (2, 16, 4, 4)          # two halves, 16 tokens
    torch.testing.assert_close(maps.mean().sum(1), torch.ones(2, 4, 4))
    torch.testing.assert_close(maps.mean(), every.mean())
    assert tiny.tokenizer.words("a red circle, Zq") == [
        ("a", [1]), ("red", [2]), ("circle", [3]), (",", [4]), ("Zq", [5, 6])]


def test_words_light_up_what_they_name(built_in):
    """Over 50 pictures, of the attention to a thing's words at least 3 times as much falls on it as
    its share of the area. (Pictures that show something else do not count.)"""
    captions, ratios = captions_of_kind("one thing", 75, 3), []
    for i in range(0, 75, 25):
        with built_in.attention() as maps:
            pictures = built_in.generate(captions[i:i + 25], seed=i, steps=20, progress=False)
        for caption, picture, heat in zip(captions[i:], pictures, maps.mean()[25:]):
            thing, words = parse(caption).things[0], dict(built_in.tokenizer.words(caption))
            if judge(picture, caption) == "":
                heat = heat[words[thing.colour] + words[thing.shape]].mean(dim=0).numpy()
                heat = np.asarray(Image.fromarray(heat).resize(picture.size))
                away = np.asarray(picture).astype(float) - np.array(COLOURS[thing.colour])
                inside = np.abs(away).sum(-1) < 90
                ratios.append(heat[inside].sum() / heat.sum() / inside.mean())
    print(f"attention inside over share of the area: {np.mean(ratios[:50]):.1f}")
    assert len(ratios) >= 50 and np.mean(ratios[:50]) >= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_walks_in_float32(tiny, dtype):
    half = copy.deepcopy(tiny).to(dtype)
    for sampler in tiny_ldm.SAMPLERS:
        for step in half.denoise("a red circle", steps=3, sampler=sampler, image=gradient(32, 32)):
            assert step.x.dtype == step.x0.dtype == step.eps.dtype == torch.float32
    assert half.alphas_cumprod.dtype == torch.float64
    with half.attention() as maps:
        half.generate("a red circle", steps=2, progress=False)
    torch.testing.assert_close(maps.mean().sum(1), torch.ones(2, 4, 4), rtol=0.02, atol=0.02)


# --------------------------------------------------------------------------------------------------
# The Shapes world

def test_scenes_are_as_the_grammar_and_the_plan_say():
    for i in range(500):
        rng = random.Random(i)
        scene = random_scene(rng)
        spots = place(scene, rng)
        assert not any(is_held_out(t) for t in scene.things)
        assert all(t.colour != (scene.background or "white") for t in scene.things)
        assert all(1.1 * r <= v <= 128 - 1.1 * r for x, y, r in spots for v in (x, y))
        for thing, (_, _, r) in zip(scene.things, spots):
            assert 13 <= r <= 16 or (20 <= r <= 22 if len(spots) == 3 else 21 <= r <= 26)
            assert thing.size is None or (r < 18) == (thing.size == "small")
        if scene.relation:
            (x0, y0, _), (x1, y1, _) = spots
            dx, dy = x1 - x0, y1 - y0
            along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}
            across = {"left of": dy, "right of": dy, "above": dx, "below": dx}
            assert along[scene.relation] > abs(across[scene.relation])
    held_out = {t for c in COLOURS for s in SHAPE_NAMES if is_held_out(t := Thing(c, s))}
    assert {f"{t.colour} {t.shape}" for t in held_out} == {
        "red star", "orange triangle", "yellow square", "green circle", "blue cross",
        "purple ring", "black diamond", "white heart"}


def test_captions_read_well():
    for scene, caption in (
            (Scene((Thing("orange", "ring", "large"),), None, "blue"),
             "a large orange ring on a blue background"),
            (Scene((Thing("orange", "ring"), Thing("red", "star")), "left of"),
             "an orange ring left of a red star"),
            (Scene((Thing("red", "cross", "small"),) * 3, None, "orange"),
             "three small red crosses on an orange background")):
        assert caption_of(scene) == caption


def test_rephrased_captions_keep_what_matters():
    caption = "a small red circle left of an orange star on a blue background"
    texts = {tiny_ldm.rephrase(caption, random.Random(i)) for i in range(50)}
    assert len(texts) > 20
    for text in texts:
        for words in ("red circle", "orange star", "blue background", "left of"):
            assert words in text, text


# --------------------------------------------------------------------------------------------------
# Training

@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    monkeypatch.setattr(tiny_ldm.Trainer, "pool_size", 64)


def small_training(out: Path, source: str = "shapes", **settings) -> None:
    tiny_ldm.train(source, out, config=TINY, device="cpu",
                   **{**dict(vae_steps=4, unet_steps=4, vae_batch=4, unet_batch=16), **settings})


def test_optimizer_orthogonalizes():
    g = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(tiny_ldm.orthogonalized(g))
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(tiny_ldm.orthogonalized(g.T), tiny_ldm.orthogonalized(g).T)

    # The five steps as they are written, on gradients of few pictures: nearly of rank 3
    torch.manual_seed(0)
    g = torch.randn(4, 40, 3) @ torch.randn(4, 3, 90) + 1e-4 * torch.randn(4, 40, 90)
    for one in g:
        x = one.double() / one.double().norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        assert (tiny_ldm.orthogonalized(one) - x).norm() < 1e-3 * x.norm()
    torch.testing.assert_close(tiny_ldm.orthogonalized(g), torch.stack(
        [tiny_ldm.orthogonalized(one) for one in g]), rtol=0, atol=1e-4)


def test_one_step_of_training_lowers_the_loss():
    ldm = tiny_model().requires_grad_(True)
    a = ldm.alphas_cumprod
    x0, context = torch.randn(8, 4, 4, 4), torch.randn(8, 16, 16)
    t, eps = torch.randint(1000, (8,)), torch.randn(8, 4, 4, 4)
    loss = lambda: tiny_ldm.diffusion_loss(ldm.unet, x0, context, a, "v", t, eps)
    image, noise = torch.rand(4, 3, 32, 32), torch.randn(4, 4, 4, 4)
    for part, loss in ((ldm.unet, loss),
                       (ldm.vae, lambda: tiny_ldm.vae_loss(ldm.vae, image, noise, 1e-4))):
        optimizer, before = tiny_ldm.Optimizer(dict(part.named_parameters())), loss()
        before.backward()
        optimizer.step(0.1)
        assert loss() < before


@pytest.fixture
def one_thread():
    """Sums over several threads are not always added in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_interrupted_training_equals_an_uninterrupted_one(tmp_path, monkeypatch, one_thread):
    small_training(tmp_path / "whole.safetensors")
    for stage in ("vae", "unet"):      # stopped once in each: by an error, after a checkpoint
        real = tiny_ldm.Trainer.fit

        def breaks(self, name, params, loss_of, *rest):
            def loss_or_stop(step):
                if name == stage and step == 3:
                    raise KeyboardInterrupt
                return loss_of(step)
            return real(self, name, params, loss_or_stop, *rest)

        monkeypatch.setattr(tiny_ldm.Trainer, "fit", breaks)
        with pytest.raises(KeyboardInterrupt):
            small_training(tmp_path / "parts.safetensors", save_minutes=0)
        monkeypatch.setattr(tiny_ldm.Trainer, "fit", real)
    small_training(tmp_path / "parts.safetensors")
    whole, parts = (LatentDiffusion.load(tmp_path / f"{name}.safetensors", "cpu")
                    for name in ("whole", "parts"))
    assert whole.config == parts.config
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    assert not list(tmp_path.glob("*.part"))


SHARED_TRAINING = """
import os, pathlib, sys, torch
import test_tiny_ldm, tiny_ldm
torch.set_num_threads(1)
tiny_ldm.Trainer.pool_size = 128
real = tiny_ldm.Trainer.save
def save_then_die(self, params, ema, sample, state):
    real(self, params, ema, sample, state)
    if (state["stage"], state["step"]) == ("unet", 2):
        os._exit(9)                                        # as by kill -9: nothing is tidied up
if sys.argv[2] == "dies":
    tiny_ldm.Trainer.save = save_then_die
try:
    test_tiny_ldm.small_training(pathlib.Path(sys.argv[1]), vae_batch=8, save_minutes=0)
except tiny_ldm.InputError as e:
    sys.exit(f"tiny_ldm: {e}")
"""


def trained_by(processes: int, out: Path, how: str = "lives") -> list[str]:
    """Trains in so many processes, as torchrun starts them; returns what each wrote to stderr, less
    the progress bar."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [subprocess.Popen(
        [sys.executable, "-c", SHARED_TRAINING, out, how], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(HERE), "RANK": str(rank), "LOCAL_RANK": str(rank),
             "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        for rank in range(processes)]
    return [p.communicate(timeout=600)[1].rpartition("\r")[2] for p in started]


def test_two_processes_train_as_one_does_and_either_goes_on_from_the_other(tmp_path):
    trained_by(1, tmp_path / "one.safetensors")
    trained_by(2, tmp_path / "two.safetensors")
    said = trained_by(2, tmp_path / "both.safetensors", "dies")
    assert said[1].count("\n") == 1 and "another process of this training has ended" in said[1]
    trained_by(1, tmp_path / "both.safetensors")
    one, two, both = (torch.load(tmp_path / f"{name}.safetensors.checkpoint")
                      for name in ("one", "two", "both"))
    for other in (two, both):
        assert other["step"] == 4 and other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        for name, weights in one["ema"].items():
            torch.testing.assert_close(other["ema"][name], weights, atol=1e-3, rtol=0)


def test_torchrun_shares_a_training_and_a_batch_that_can_t_be_shared_is_refused(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", HERE / "tiny_ldm.py", "--train", "shapes", "-o"]
    ended = subprocess.run([*torchrun, tmp_path / "m.safetensors", "--unet-batch", "15"],
                           capture_output=True, text=True)
    assert "batches of 64 and 15 pictures can't be shared evenly among 2 proc" in ended.stderr
    assert ended.returncode != 0 and not list(tmp_path.iterdir())


def test_training_on_a_folder_then_from_its_weights(tmp_path, capsys):
    for i, suffix in enumerate(("png", "jpg", "webp")):
        scene, picture = random_picture(i)
        picture.resize((50, 40)).save(tmp_path / f"p{i}.{suffix}")
        (tmp_path / f"p{i}.txt").write_text(caption_of(scene))
    small_training(tmp_path / "m.safetensors", str(tmp_path))
    line = '{"file_name": "p0.png", "text": "a red circle"}\n'
    (tmp_path / "metadata.jsonl").write_text(3 * line)
    small_training(tmp_path / "n.safetensors", str(tmp_path), weights=tmp_path / "m.safetensors")
    assert "3 of 4 pictures" in capsys.readouterr().err     # the fourth shows samples of m
    m, n = (LatentDiffusion.load(tmp_path / f"{x}.safetensors", "cpu") for x in "mn")
    same = {k: torch.equal(v, n.state_dict()[k]) for k, v in m.state_dict().items()}
    assert all(same[k] for k in same if k.startswith("vae.")) and not all(same.values())
    assert m.config.scale_factor == n.config.scale_factor != 1.0


def test_a_training_without_stage_2_stores_the_latents_scale(tmp_path):
    small_training(tmp_path / "m.safetensors", unet_steps=0)
    assert LatentDiffusion.load(tmp_path / "m.safetensors", "cpu").config.scale_factor != 1.0


def test_a_finished_training_called_again_without_stage_2_leaves_its_model(tmp_path):
    small_training(tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    small_training(tmp_path / "m.safetensors", unet_steps=0)
    assert (tmp_path / "m.safetensors").read_bytes() == before


def test_the_decoder_alone_goes_on_from_latents_that_stay(tmp_path, monkeypatch):
    small_training(tmp_path / "m.safetensors")
    monkeypatch.setattr(tiny_ldm, "busiest_windows", None)        # from whole pictures only
    small_training(tmp_path / "n.safetensors", weights=tmp_path / "m.safetensors", decoder_steps=4,
                   unet_steps=0)
    m, n = (LatentDiffusion.load(tmp_path / f"{x}.safetensors", "cpu") for x in "mn")
    changed = {k for k, v in m.state_dict().items() if not torch.equal(v, n.state_dict()[k])}
    assert changed and all("vae.decoder." in k or "vae.post_quant_conv." in k for k in changed)
    assert m.config.scale_factor == n.config.scale_factor


# --------------------------------------------------------------------------------------------------
# The built-in model, and the command

def test_built_in_file_is_small_and_half_precision():
    assert tiny_ldm.BUILT_IN.stat().st_size <= 20_000_000
    with safe_open(tiny_ldm.BUILT_IN, "pt") as f:
        assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_in_model_draws_what_it_is_told(dtype):
    """25 unseen captions of each kind, as the command draws them; the README's table has more."""
    ldm, settings = LatentDiffusion.load(dtype=dtype), dict(steps=25, sampler="euler_a")
    shares = {kind: right(prompt_following(ldm, kind, 25, **settings)) for kind in KINDS}
    assert shares["one thing"] >= 0.8 and min(shares.values()) >= 0.5, shares


def test_built_in_model_draws_crisp_edges_and_flat_colours(built_in):
    """As the command draws them; pictures from the world itself have edges 1.6 wide."""
    captions = captions_of_kind("one thing", 25, 1)
    drawn = [draw(scene, place(scene, random.Random(i)), SHAPES.image_size)
             for i, scene in enumerate(map(parse, captions))]
    true = [crispness(*pair) for pair in zip(drawn, captions)]
    made = [crispness(image, caption) for image, caption, wrong in prompt_following(
        built_in, "one thing", 25, steps=25, sampler="euler_a") if not wrong]
    for found in (true, made):
        inside, outside, edge = np.mean(found, axis=0)
        print(f"colour error {inside:.1f} and {outside:.1f} of 255, edges {edge:.1f} pixels wide")
        assert inside <= 12 and outside <= 12 and edge <= 3, (inside, outside, edge)


def test_built_in_model_understands_free_words(built_in):
    judged = [row for kind in KINDS for row in prompt_following(
        built_in, kind, 10, free_words=True, steps=25, sampler="euler_a")]
    assert right(judged) >= 0.75


def test_command_makes_a_picture_and_says_only_its_name(tmp_path):
    prompt = "a red circle left of a blue square on a white background"
    done = run(prompt, "--steps", 3, "--film", "f.gif", cwd=tmp_path)
    name = f"{prompt.replace(' ', '-')}-0.png"
    assert (done.returncode, done.stdout) == (0, f"{name}\nf.gif\n"), done.stderr
    assert "tiny_ldm:" not in done.stderr
    image = Image.open(tmp_path / name)
    assert image.size == (SHAPES.image_size,) * 2
    assert image.text["parameters"].splitlines() == [
        prompt, "Steps: 3, Sampler: euler_a, CFG scale: 2.0, Seed: 0, Eta: 0.0, "
                "Precision: float32, Size: 64x64, Model: shapes"]
    assert Image.open(tmp_path / "f.gif").n_frames >= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, "f.gif"]


def test_command_counts_seeds_and_tells_what_it_does_not_know(tmp_path):
    done = run("an astronaut", "-n", 2, "--seed", 5, "--steps", 2, "-o", "x.png", "--film", "f.png",
               "--sampler", "ddpm", "--negative-prompt", "a star", "--width", 128, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "x-5.png\nx-6.png\nf.png\n"), done.stderr
    lines = [l for l in done.stderr.splitlines() if l.startswith("tiny_ldm:")]
    assert len(lines) == 1 and "astronaut" in lines[0] and "Stable Diffusion" in lines[0]
    image = Image.open(tmp_path / "x-6.png")
    assert image.size == (128, 64)
    assert image.text["parameters"].splitlines()[1] == "Negative prompt: a star"


def test_prompts_are_shared_among_processes_and_each_picture_is_that_of_its_own_command(tmp_path):
    """Two processes, as torchrun starts them."""
    (tmp_path / "p.txt").write_text("a red circle\n\n  two blue stars\na white ring\n")
    settings, out = ("--seed", 4, "--steps", 2), tmp_path / "out"
    refused = run("--prompts", "p.txt", *settings, "-o", "out", cwd=tmp_path)
    assert refused.returncode == 2 and "out does not exist" in refused.stderr
    out.mkdir()
    for rank, lines in enumerate((("0001-a-red-circle-4.png", "0004-a-white-ring-4.png"),
                                  ("0003-two-blue-stars-4.png",))):
        done = run("--prompts", "p.txt", *settings, "-o", "out", cwd=tmp_path, RANK=str(rank),
                   WORLD_SIZE="2")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(Path("out") / line) for line in lines]
    alone = run("two blue stars", *settings, "-o", "a.png", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert (tmp_path / "a.png").read_bytes() == (out / lines[0]).read_bytes()
    (tmp_path / "p.txt").write_text("a red circle")
    two = run("--prompts", "p.txt", *settings, "-n", 2, "-o", "out", cwd=tmp_path)
    assert [line.rpartition("-")[2] for line in two.stdout.split()] == ["4.png", "5.png"]
    assert "circle-5.png" in two.stdout


@pytest.mark.parametrize("arguments, words", [
    (("a circle", "--prompts", "p.txt", "-o", "."), "without a prompt"),
    (("--prompts", "p.txt"), "needs -o FOLDER"),
    (("--prompts", "p.txt", "-o", ".", "--film", "f.png"), "--film"),
    (("--prompts", "missing.txt", "-o", "."), "missing.txt"),
    (("--prompts", "empty.txt", "-o", "."), "holds no prompt")])
def test_prompts_that_can_not_be_made_are_refused(arguments, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("a red circle")
    (tmp_path / "empty.txt").write_text("\n \n")
    monkeypatch.chdir(tmp_path)
    assert tiny_ldm.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_compiled_networks_make_the_same_pictures():
    """The smallest that have every part, since compiling takes long; within 1 level. And the
    weights are packed."""
    from torch._dynamo.utils import counters
    ldm = tiny_model(vae=replace(TINY.vae, channel_mult=(1, 2)), image_size=16,
                     unet=replace(TINY.unet, channel_mult=(1,), attention=(True,)))
    settings = dict(steps=2, seed=3, progress=False)
    plain, = ldm.generate("a circle", **settings)
    ldm.compile_networks()
    compiled, = ldm.generate("a circle", **settings)
    difference = np.abs(np.asarray(plain, int) - np.asarray(compiled, int))
    assert np.asarray(plain).std() > 1 and difference.max() <= 1
    with pytest.raises(InputError, match="can't be looked into"), ldm.attention():
        pass
    if tiny_ldm.HAS_MKL:
        assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] > 20


def test_a_missing_compiler_is_one_line(tmp_path):
    done = run("a red circle", "--compile", "-o", tmp_path / "a.png", CXX="no-such-compiler",
               PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 2 and "can be compiled here" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "a.png").exists()


def test_again_makes_the_same_file(tmp_path):
    """The second of two pictures, with everything that can be set, and names that need quotes."""
    gradient(48, 32).save(tmp_path / 'an, "odd": name.png')
    mask = Image.new("L", (24, 16))                     # of another size: a note says so
    mask.paste(255, (0, 0, 12, 16))
    mask.save(tmp_path / "m.png")
    done = run("a red  circle,\nSteps: 3", "--image", 'an, "odd": name.png', "--mask", "m.png",
               "-n", 2, "--steps", 3, "--sampler", "euler_a", "--guidance-scale", 1 / 3,
               "--strength", 0.9, "--negative-prompt", "a star,\n blue", "--seed", 7, "--dtype",
               "bfloat16", "-o", "x.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "x-7.png\nx-8.png\n"), done.stderr
    assert "tiny_ldm: the mask is 24x16 and the image 48x32; resizing the mask" in done.stderr
    assert run("--again", "x-8.png", "-o", "y.png", cwd=tmp_path).stdout == "y.png\n"
    assert (tmp_path / "y.png").read_bytes() == (tmp_path / "x-8.png").read_bytes()
    assert (tmp_path / "y.png").read_bytes() != (tmp_path / "x-7.png").read_bytes()


def test_film_and_attention_are_drawn(tmp_path):
    done = run("a red circle", "-n", 2, "--steps", 4, "-o", "x.png", "--film", "f.gif",
               "--attention", "a.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "x-0.png\nx-1.png\nf.gif\na.png\n"), done.stderr
    assert Image.open(tmp_path / "f.gif").size == (128, 64)
    assert Image.open(tmp_path / "a.png").size == (4 * 136, 2 * 152)     # 4 cards, 2 rows


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    d = tmp_path_factory.mktemp("bad")
    whole = tiny_ldm.BUILT_IN.read_bytes()
    (d / "cut.safetensors").write_bytes(whole[:len(whole) // 2])
    (d / "text.safetensors").write_text("<html>not found</html>")
    save_file({"x": torch.zeros(1)}, d / "other.safetensors")
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, d / "official.safetensors")
    ldm = tiny_model()
    ldm.save(d / "tiny.safetensors")
    with safe_open(d / "tiny.safetensors", "pt") as f:
        metadata = f.metadata()
    tensors = load_file(d / "tiny.safetensors")
    bias = "unet.conv_out.bias"
    for name, changed in (
            ("missing", {k: v for k, v in tensors.items() if "conv_in" not in k}),
            ("extra", {**tensors, "extra": torch.zeros(1)}),
            ("shape", {**tensors, bias: torch.zeros(5)}),
            ("ints", {**tensors, bias: torch.zeros(4, dtype=torch.int32)})):
        save_file(changed, d / f"{name}.safetensors", metadata)
    save_file(tensors, d / "config.safetensors", {**metadata, "config": "{"})
    groups = metadata["config"].replace('"norm_groups": ', '"norm_groups": -')
    save_file(tensors, d / "groups.safetensors", {**metadata, "config": groups})
    save_file(tensors, d / "words.safetensors", {**metadata, "tokenizer": "{}"})
    for name, text in (("p", ""),
                       ("odd", "a cat\nSteps: 2, Sampler: Euler a, Seed: 1, Size: 64x64"),
                       ("damaged", "a cat\nSteps: x, Seed: 1, Size: 64x64")):
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", text)
        Image.new("RGB", (64, 64)).save(d / f"{name}.png", pnginfo=info)
    (d / "empty").mkdir()
    (d / "unreadable").mkdir()
    (d / "unreadable" / "broken.png").write_bytes(b"\x89PNG\r\n")
    (d / "unreadable" / "broken.txt").write_text("a red circle")
    (d / "jsonl").mkdir()
    (d / "jsonl" / "metadata.jsonl").write_text('{"file_name": "p.png"}\n')
    return d


BAD = [
    ([""], "the prompt is empty"),
    (["  "], "the prompt is empty"),
    ([], "the prompt is empty"),
    (["a", "--sampler", "magic"], "unknown sampler 'magic'; there are: ddim, ddpm, dpmpp"),
    (["a", "--steps", "0"], "steps must be from 1 to 1000, not 0"),
    (["a", "--steps", "1001"], "steps must be from 1 to 1000, not 1001"),
    (["a", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["a", "--width", "100"], "width 100 is not a multiple of 16; the nearest: 96 or 112"),
    (["a", "--height", "-3"], "height -3 is not a multiple of 16; the nearest: 16"),
    (["a", "-n", "0"], "-n must be from 1 to 65536, not 0"),
    (["a", "-n", "2", "--seed", str(2**63 - 1)], "the seeds must be below 2**63"),
    (["a", "-o", "x.png", "--film", "x.png"], "x.png is a folder, or the name of another picture"),
    (["a", "-n", "2", "-o", "x.png", "--film", "x-1.png"], "x-1.png is a folder, or the name of"),
    (["a", "--image", "p.png", "-o", "p.png"], "p.png is a folder, or the name of another"),
    (["a", "--image", "./p.png", "-o", "p.png"], "p.png is a folder, or the name of another"),
    (["a", "--weights", ""], "no weights file at ."),
    (["a", "--image", ""], "can't be read as a picture"),
    (["a", "--image", "p.png", "--mask", "text.safetensors"], "can't be read as a picture"),
    (["a", "--image", "p.png", "--strength", "0", "--attention", "x.png"], "never looks"),
    (["a\udcff"], "the prompt is not UTF-8 text: 'a\\udcff'"),
    (["a", "--seed", "-1"], "seed must be from 0 to"),
    (["a", "--eta", "2"], "eta must be from 0 to 1, not 2.0"),
    (["a", "--guidance-scale", "nan"], "guidance_scale must be from -1000 to 1000, not nan"),
    (["a", "--strength", "1.5"], "strength must be from 0 to 1, not 1.5"),
    (["a", "--image", "p.png", "--strength", "nan", "--attention", "x.png"],
     "strength must be from 0 to 1, not nan"),
    (["a", "--image", "none.png"], "none.png can't be read as a picture ([Errno 2] No such file"),
    (["a", "--image", "text.safetensors"], "text.safetensors can't be read as a picture"),
    (["a", "--image", "p.png", "--mask", "none.png"], "none.png can't be read as a picture"),
    (["a", "--image", "p.png", "--width", "0"], "width 0 is not a multiple of 16"),
    (["a", "--mask", "p.png"], "a mask needs an image that it belongs to"),
    (["a", "--attention", "x.gif"], "the attention map is written as .png; 'x.gif' does not"),
    (["a", "--attention", "nowhere/x.png"], "the folder nowhere does not exist"),
    (["--again", "none.png"], "none.png can't be read as a picture ([Errno 2] No such file"),
    (["--again", "p.png"], "p.png has no settings in it"),
    (["--again", "odd.png"], "unknown sampler 'Euler a'"),
    (["--again", "damaged.png"], "argument --steps: invalid int value: 'x'"),
    (["a", "--nonsense"], "unrecognized arguments: --nonsense"),
    (["a", "-o", "nowhere/x.png"], "the folder nowhere does not exist"),
    (["a", "-o", "x.bmp"], "the picture is written as .png; 'x.bmp' does not end so"),
    (["a", "--film", "x.mp4"], "the film is written as .png or .gif; 'x.mp4' does not end so"),
    (["a", "--weights", "none.safetensors"], "no weights file at none.safetensors"),
    (["a", "--weights", "empty"], "no weights file at empty"),
    (["a", "--weights", "cut.safetensors"], "cut.safetensors is damaged or no .safetensors file"),
    (["a", "--weights", "text.safetensors"], "text.safetensors is damaged or no .safetensors file"),
    (["a", "--weights", "other.safetensors"], "other.safetensors is no tiny_ldm weights file"),
    (["a", "--weights", "official.safetensors"],
     "convert it first: python weights_convert.py official.safetensors"),
    (["a", "--weights", "missing.safetensors"],
     "lacks 6 of 384 tensors: unet.conv_in.bias, unet.conv_in.weight, "),
    (["a", "--weights", "extra.safetensors"], "has unexpected 1 of 384 tensors: extra"),
    (["a", "--weights", "shape.safetensors"],
     "has the wrong shape for 1 of 384 tensors: unet.conv_out.bias"),
    (["a", "--weights", "ints.safetensors"],
     "has no floating-point numbers in 1 of 384 tensors: unet.conv_out.bias"),
    (["a", "--weights", "config.safetensors"], "config.safetensors is damaged or no .safetensors"),
    (["a", "--weights", "groups.safetensors"], "groups.safetensors is damaged or no .safetensors"),
    (["a", "--weights", "words.safetensors"], "words.safetensors is damaged or no .safetensors"),
    (["--train", "shapes"], "--train needs -o FILE"),
    (["--train", "shapes", "-o", "nowhere/x.safetensors"], "the folder nowhere does not exist"),
    (["--train", "shapes", "-o", "x.safetensors", "--save-minutes", "nan"],
     "save_minutes must be at least 0, not nan"),
    (["--train", "nowhere", "-o", "x.safetensors"], "no folder nowhere to train on"),
    (["--train", "empty", "-o", "x.safetensors"], "no captioned pictures in empty"),
    (["--train", "unreadable", "-o", "x.safetensors"],
     "unreadable/broken.png can't be read as a picture"),
    (["--train", "jsonl", "-o", "x.safetensors"], "jsonl/metadata.jsonl, line 1: needs"),
]
if not torch.cuda.is_available():
    BAD.append((["a", "--device", "cuda"], "there is no device 'cuda' here"))


@pytest.mark.parametrize("args, message", BAD,
                         ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(args, message, bad_files, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    before = sorted(bad_files.rglob("*"))
    assert tiny_ldm.main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tiny_ldm: ") and err.count("\n") == 1
    assert message in err, err
    assert sorted(bad_files.rglob("*")) == before


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line_and_other_errors_are_raised(error, capsys):
    def fails(argv):
        raise error
    assert tiny_ldm.main([], fails) == 2
    assert capsys.readouterr().err.startswith("tiny_ldm: not enough memory (")
    error = RuntimeError("a mistake of this program")
    with pytest.raises(RuntimeError, match="a mistake"):
        tiny_ldm.main([], fails)


def test_bad_input_from_the_shell(tmp_path):
    done = run("a", "--steps", 0, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tiny_ldm: steps must be from 1 to 1000, not 0\n"
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Stable Diffusion 1.x: the converter, on narrow synthetic checkpoints in the official layout

NARROW = replace(SD1, text=tiny_ldm.TextConfig(small_tokenizer(77).backend.get_vocab_size(),
                                               width=64, num_layers=2, num_heads=1),
                 vae=replace(SD1.vae, channels=32), unet=replace(SD1.unet, channels=32))


def synthetic(name: str, shape: list[int], factor: float = 1.0) -> torch.Tensor:
    """Always the same numbers for a name, of a scale that keeps activations sane through the whole
    network; all but the norms' weights times factor."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    n = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
    if name.endswith("bias"):
        return 0.05 * factor * n
    if len(shape) == 1:
        return 1 + 0.1 * n
    return factor * (0.5 if "embedding" in name else math.prod(shape[1:]) ** -0.5) * n


def official_shapes(config) -> dict[str, list[int]]:
    """The names and shapes of a checkpoint in the official layout, from the converter's map."""
    return {name: [entry.shape[0] // len(entry.official), *entry.shape[1:], *[1, 1] * entry.conv]
            for entry in weights_convert.name_map(config).values() for name in entry.official}


def official_tensors(config=NARROW, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """A whole checkpoint in the official layout, with the schedule tables and what else is in
    there."""
    shapes = official_shapes(config)
    return {**{name: synthetic(name, shape, factor) for name, shape in shapes.items()},
            **{name: torch.zeros(1000) for name in weights_convert.TABLES},
            f"{weights_convert.TEXT}.embeddings.position_ids": torch.arange(77)[None],
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}


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
    return d


def convert(source, out, folder, *more) -> int:
    return weights_convert.main([str(source), "-o", str(out), "--tokenizer",
                                 str(folder / "tokenizer.json"), *more])


@pytest.mark.parametrize("config, known", [
    (SD1, "dd0d17c940fbd3a9caaa5c0908f12bcc529c3920a6edcf30fe8eedab2d41b931"),
    (SD1_INPAINT, "1e54cd5f6b14b417c8ba329a678ebcd247819c297b8ad7dffd4871802835bff8")])
def test_the_map_covers_every_official_tensor(config, known):
    """The names and shapes of the published file, sorted, as one hash; with 9 input channels for
    inpainting."""
    lines = [f"{name} {shape}" for name, shape in official_shapes(config).items()]
    assert len(lines) == 686 + 248 + 196
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == known


@pytest.mark.parametrize("name", ["plain.safetensors", "plain.ckpt", "half.safetensors",
                                  "full-ema.safetensors"])
def test_there_and_back_gives_the_same_bits(name, official, tmp_path, capsys):
    ours, theirs = tmp_path / "t.safetensors", tmp_path / "o.safetensors"
    assert convert(official / name, ours, official) == 0
    assert ("EMA" in capsys.readouterr().err) == (name == "full-ema.safetensors")
    ldm = LatentDiffusion.load(ours, "cpu")
    assert ldm.config.unet == NARROW.unet
    assert (ldm.config.prediction, ldm.config.scale_factor) == ("eps", 0.18215)
    assert weights_convert.main(["--to", "official", str(ours), "-o", str(theirs)]) == 0
    back, source = load_file(theirs), load_file(official / "plain.safetensors")
    assert len(back) == 686 + 248 + 196 - 16 * 10
    half = name == "half.safetensors"
    assert all(torch.equal(v, source[k].half() if half else source[k]) for k, v in back.items())


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
    assert convert(official / "plain.safetensors", tmp_path / "plain", official) == 0
    assert (tmp_path / "x").read_bytes() == (tmp_path / "plain").read_bytes()


def test_an_inpainting_model_converts_from_either_layout(official, tmp_path):
    config = replace(NARROW, name=SD1_INPAINT.name, unet=replace(NARROW.unet, in_channels=9))
    tensors, parts = official_tensors(config), {"unet": {}, "vae": {}, "text_encoder": {}}
    for entry in weights_convert.name_map(config).values():
        for theirs, name in zip(entry.official, entry.diffusers):
            part, _, rest = name.partition(".")
            parts[part][rest] = tensors[theirs]
    (tmp_path / "folder").mkdir()
    for part, named in parts.items():
        (tmp_path / "folder" / part).mkdir()
        save_file(named, tmp_path / "folder" / weights_convert.part_files(part)[0])
    save_file(tensors, tmp_path / "official.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert convert(tmp_path / "official.safetensors", a, official) == 0
    assert convert(tmp_path / "folder", b, official) == 0
    ldm = LatentDiffusion.load(a, "cpu")
    assert ldm.config == config and ldm.unet.conv_in.weight.shape == (32, 9, 3, 3)
    assert a.read_bytes() == b.read_bytes()


def test_a_known_file_is_named_by_size_and_hash(official, tmp_path, monkeypatch, capsys):
    source = official / "plain.ckpt"
    assert convert(source, tmp_path / "a.safetensors", official) == 0
    assert "in a file that is not on record" in capsys.readouterr().err
    size, digest = source.stat().st_size, hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(weights_convert, "KNOWN_SIZES", [(size, size)])
    monkeypatch.setitem(weights_convert.KNOWN, digest, "sd-v1-0.ckpt")
    assert convert(source, tmp_path / "b.safetensors", official) == 0
    assert "plain.ckpt is sd-v1-0.ckpt\n" in capsys.readouterr().err


def test_half_precision_on_request(official, tmp_path):
    out = tmp_path / "t.safetensors"
    assert convert(official / "plain.safetensors", out, official, "--dtype", "float16") == 0
    assert {v.dtype for v in load_file(out).values()} == {torch.float16}


def test_what_lightning_left_in_a_checkpoint_is_inert(official, tmp_path, monkeypatch):
    names = ["pytorch_lightning", "pytorch_lightning.callbacks",
             "pytorch_lightning.callbacks.model_checkpoint"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = ModelCheckpoint
    callback = ModelCheckpoint()
    callback.best = np.float64(0.5)
    state = {"state_dict": load_file(official / "plain.safetensors"), "more": callback,
             "callbacks": {ModelCheckpoint: {"best": np.float32(1)}}}
    torch.save(state, tmp_path / "lightning.ckpt")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    assert convert(tmp_path / "lightning.ckpt", tmp_path / "t.safetensors", official) == 0


def test_what_a_pickle_hangs_on_a_tensor_is_left_behind(official, tmp_path):
    tensors = load_file(official / "plain.safetensors")
    for t in tensors.values():
        t.reshape = t.shape_of = "neither a method nor a number"
    torch.save(tensors, tmp_path / "hung.ckpt")
    assert convert(tmp_path / "hung.ckpt", tmp_path / "t.safetensors", official) == 0


def test_two_spellings_of_one_tensor_are_one_too_many(official, tmp_path, capsys):
    tensors = load_file(official / "plain.safetensors")
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    tensors[name.replace("text_model.", "")] = tensors[name] + 1
    save_file(tensors, tmp_path / "two.safetensors")
    assert convert(tmp_path / "two.safetensors", tmp_path / "t.safetensors", official) == 2
    assert f"holds {name} twice" in capsys.readouterr().err


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_is_refused_and_nothing_runs(official, tmp_path, capsys):
    tensors = load_file(official / "plain.safetensors")
    torch.save({"state_dict": tensors, "x": Hostile(tmp_path / "ran")}, tmp_path / "h.ckpt")
    assert convert(tmp_path / "h.ckpt", tmp_path / "t.safetensors", official) == 2
    assert "system" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["h.ckpt"]


def bad_checkpoint(name: str, official: Path, d: Path) -> Path:
    path, bias = d / name, f"{weights_convert.UNET}.out.2.bias"
    tensors = load_file(official / "plain.safetensors")
    whole, ckpt = ((official / f"plain.{end}").read_bytes() for end in ("safetensors", "ckpt"))
    torch.save({"state_dict": {}}, d / "legacy", _use_new_zipfile_serialization=False)
    legacy = (d / "legacy").read_bytes()
    (d / "legacy").unlink()
    contents = {
        "pointer.ckpt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "page.ckpt": b"<!DOCTYPE html><html>", "empty.safetensors": b"",
        "cut.safetensors": whole[:100000], "cut.ckpt": ckpt[:100000], "legacy.ckpt": legacy,
        "corrupt.ckpt": ckpt.replace(b"state_dict", b"\xff\xff\xffte_dict", 1),
        "corrupt.safetensors": b"\xff" * 1000,
        "missing.safetensors": {k: v for k, v in tensors.items() if k != bias},
        "more.safetensors": {**tensors, "model.diffusion_model.label_emb.weight": torch.zeros(3)},
        "shape.safetensors": {**tensors, bias: torch.zeros(5)},
        "numbers.safetensors": {**tensors, bias: torch.zeros(4, dtype=torch.int32)},
        "nan.safetensors": {**tensors, bias: torch.full((4,), math.nan)},
        "sd2.safetensors": {"cond_stage_model.model.token_embedding.weight": torch.zeros(3)},
        "sdxl.safetensors": {"conditioner.embedders.0.x": torch.zeros(3)},
        "lora.safetensors": {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(3)},
        "other.safetensors": {"x": torch.zeros(3)}}[name]
    path.write_bytes(contents) if isinstance(contents, bytes) else save_file(contents, path)
    return path


@pytest.mark.parametrize("name, message", [
    ("pointer.ckpt", "is a git-LFS pointer"), ("page.ckpt", "is an HTML page"),
    ("empty.safetensors", "is empty"), ("cut.safetensors", "is no whole .safetensors file"),
    ("cut.ckpt", "is neither a .safetensors nor a whole .ckpt"),
    ("legacy.ckpt", "is neither a .safetensors nor a whole .ckpt (a zip, as torch writes it since"),
    ("corrupt.ckpt", "is damaged"), ("corrupt.safetensors", "is no whole .safetensors file"),
    ("missing.safetensors", "lacks model.diffusion_model.out.2.bias"),
    ("more.safetensors", "holds 1 tensors that Stable Diffusion 1.x has not: "
                         "model.diffusion_model.label_emb.weight"),
    ("shape.safetensors", "model.diffusion_model.out.2.bias is torch.float32 [5]"),
    ("numbers.safetensors", "model.diffusion_model.out.2.bias is torch.int32 [4]"),
    ("nan.safetensors", "unet.conv_out.bias holds values that are not finite"),
    ("sd2.safetensors", "is Stable Diffusion 2.x"), ("sdxl.safetensors", "is Stable Diffusion XL"),
    ("lora.safetensors", "is a LoRA"), ("other.safetensors", "is no Stable Diffusion 1.x")])
def test_bad_checkpoints_are_one_line_and_exit_code_2(name, message, official, tmp_path, capsys):
    path = bad_checkpoint(name, official, tmp_path)
    assert convert(path, tmp_path / "t.safetensors", official) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tiny_ldm: ")]
    assert message in lines[-1] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("part, shape", [
    ("model.diffusion_model.input_blocks.0.0.weight", ()),
    ("model.diffusion_model.input_blocks.0.0.weight", (33, 4, 3, 3)),
    ("model.diffusion_model.input_blocks.0.0.weight", (32, 8, 3, 3)),
    ("first_stage_model.encoder.conv_in.weight", ()),
    (f"{weights_convert.TEXT}.embeddings.token_embedding.weight", (3,)),
    (f"{weights_convert.TEXT}.embeddings.position_embedding.weight", ())])
def test_impossible_shapes_are_one_line(part, shape, official, tmp_path, capsys):
    save_file({**official_tensors(), part: torch.zeros(shape)}, tmp_path / "x.safetensors")
    assert convert(tmp_path / "x.safetensors", tmp_path / "t.safetensors", official) == 2
    assert "x.safetensors is no Stable Diffusion 1.x: it has" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda t: t.pop("unet.conv_out.bias"), lambda t: t.update(more=torch.zeros(1)),
    lambda t: t.update({"text_encoder.layers.0.attention.qkv.bias": torch.zeros(2)}),
    lambda t: t.update({"unet.conv_out.bias": torch.zeros(4, dtype=torch.int32)})])
def test_a_damaged_file_is_not_turned_back(damage, official, tmp_path, capsys):
    ours, out = tmp_path / "t.safetensors", tmp_path / "o.safetensors"
    assert convert(official / "plain.safetensors", ours, official) == 0
    tensors = load_file(ours)
    damage(tensors)
    with safe_open(ours, framework="pt") as file:
        save_file(tensors, tmp_path / "bad.safetensors", file.metadata())
    assert weights_convert.main(["--to", "official", str(tmp_path / "bad.safetensors"),
                                 "-o", str(out)]) == 2
    assert "its tensors are not those of its config" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("part, name, width, message", [
    ("text_encoder", "embeddings.token_embedding.weight", 1024, "is Stable Diffusion 2.x"),
    ("unet", "add_embedding.linear_1.weight", 3, "is Stable Diffusion XL"),
    ("unet", "x", 3, "is no Stable Diffusion 1.x"),
    (None, None, None, "lacks unet/diffusion_pytorch_model.safetensors, unet/diffusion_pyt")])
def test_folders_of_other_models_are_named(part, name, width, message, official, tmp_path, capsys):
    for p in ("unet", "vae", "text_encoder") if part else ():
        (tmp_path / p).mkdir()
        save_file({name if p == part else "x": torch.zeros(3, width or 1)},
                  tmp_path / weights_convert.part_files(p)[0])
    before = sorted(tmp_path.rglob("*"))
    assert convert(tmp_path, tmp_path / "t.safetensors", official) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("args, message", [
    ([], "the following arguments are required: SOURCE"),
    (["plain.ckpt", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["nowhere.ckpt"], "nowhere.ckpt can't be opened (No such file or directory)"),
    (["plain.ckpt", "--tokenizer", "nowhere"], "nowhere is no CLIP vocabulary"),
    (["plain.ckpt", "--tokenizer", "plain.ckpt"], "plain.ckpt is no CLIP vocabulary"),
    (["plain.ckpt", "--tokenizer", "other.json"], "and plain.ckpt has"),
    (["plain.ckpt", "--tokenizer", "tokenizer.json", "-o", "nowhere/x"], "the folder nowhere does"),
    (["--to", "official", "plain.safetensors"], "plain.safetensors is an official checkpoint"),
    (["--to", "official", "plain.ckpt"], "plain.ckpt is damaged or no .safetensors file"),
    (["--to", "official", str(tiny_ldm.BUILT_IN)], "is not built like Stable Diffusion 1.x (other: "
     "prediction, scale_factor, guidance_scale, vae, unet)")])
def test_bad_arguments_are_one_line_and_exit_code_2(args, message, official, monkeypatch, capsys):
    monkeypatch.chdir(official)
    before = sorted(official.iterdir())
    assert weights_convert.main(args) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("tiny_ldm: ")]
    assert out == "" and message in lines[-1] and sorted(official.iterdir()) == before, err


def test_a_full_disk_is_told_before_anything_is_written(official, tmp_path, monkeypatch, capsys):
    full = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(weights_convert.shutil, "disk_usage", lambda folder: full)
    assert convert(official / "plain.safetensors", tmp_path / "t.safetensors", official) == 2
    assert "make room" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_output_is_not_replaced_unasked(official, tmp_path, capsys):
    out = tmp_path / "t.safetensors"
    out.write_text("mine")
    assert convert(official / "plain.safetensors", out, official) == 2
    assert "exists already" in capsys.readouterr().err and out.read_text() == "mine"
    assert convert(official / "plain.safetensors", out, official, "--force") == 0


class Networks(NamedTuple):
    """Ours or the references', to be called alike."""
    text: Callable        # ids -> context
    unet: Callable        # x, t (one number), context -> noise
    encode: Callable      # image -> mean and log-variance, one above the other
    decode: Callable      # z -> image
    ddim: Callable        # x, [empty context, context], steps -> latents; guidance 7.5
    picture: Callable     # latents -> PIL image


def our_networks(ldm: LatentDiffusion) -> Networks:
    def ddim(x, context, steps):
        *_, last = ldm.denoise(context[1:], context[:1], steps=steps, latents=x)
        return last.x

    return Networks(ldm.text_encoder,
                    lambda x, t, context: ldm.unet(x, torch.full((len(x),), t), context),
                    lambda image: torch.cat(ldm.vae.encode(image), dim=1), ldm.vae.decode, ddim,
                    lambda x: tiny_ldm.to_pil(ldm.decode_latents(x))[0])


def their_networks(text, unet, vae) -> Networks:
    import diffusers
    scheduler = diffusers.DDIMScheduler(**SD1_SCHEDULE, steps_offset=1, clip_sample=False,
                                        set_alpha_to_one=False)
    finish = diffusers.image_processor.VaeImageProcessor().postprocess

    def encode(image):
        posterior = vae.encode(image).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def ddim(x, context, steps):
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            empty, prompt = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(empty + 7.5 * (prompt - empty), t, x).prev_sample
        return x

    return Networks(lambda ids: text(ids).last_hidden_state,
                    lambda x, t, context: unet(x, t, context).sample,
                    encode, lambda z: vae.decode(z).sample, ddim,
                    lambda x: finish(vae.decode(x / 0.18215).sample, "pil")[0])


def reference_models(c: tiny_ldm.Config) -> tuple:
    """transformers' text encoder, diffusers' U-Net and VAE, as wide as c says."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    widths = lambda part: tuple(part.channels * m for m in part.channel_mult)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=c.text.vocab_size, hidden_size=c.text.width, hidden_act="quick_gelu",
        intermediate_size=4 * c.text.width, num_hidden_layers=c.text.num_layers,
        num_attention_heads=c.text.num_heads, bos_token_id=0, eos_token_id=1))
    unet = diffusers.UNet2DConditionModel(
        cross_attention_dim=c.text.width, attention_head_dim=8, block_out_channels=widths(c.unet))
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2, block_out_channels=widths(c.vae))
    return tuple(model.eval().requires_grad_(False) for model in (text, unet, vae))


def load_official(models: tuple, tensors: dict[str, torch.Tensor]) -> tuple:
    """Puts official tensors into reference_models, renamed by diffusers' own rules."""
    from diffusers.loaders import single_file_utils as rules
    text, unet, vae = models
    getattr(text, "text_model", text).load_state_dict(
        {n.removeprefix(f"{weights_convert.TEXT}."): t for n, t in tensors.items()
         if n.startswith(weights_convert.TEXT) and not n.endswith("position_ids")}, assign=True)
    unet.load_state_dict(rules.convert_ldm_unet_checkpoint(tensors, unet.config), assign=True)
    vae.load_state_dict(rules.convert_ldm_vae_checkpoint(tensors, vae.config), assign=True)
    return models


def normal(random: np.random.RandomState, dtype, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal(shape)).to(dtype)


@torch.no_grad()
def vae_outputs(n: Networks, random: np.random.RandomState, dtype) -> dict[str, torch.Tensor]:
    return {"VAE, encode": n.encode(normal(random, dtype, 1, 3, 64, 128).clamp(-1, 1)),
            "VAE, decode": n.decode(normal(random, dtype, 1, 4, 8, 16))}


@torch.no_grad()
def outputs(n: Networks, dtype=torch.float64, steps: int = 10) -> dict[str, torch.Tensor]:
    """What the networks make of inputs that are always the same."""
    random = np.random.RandomState(0)
    context = n.text(torch.from_numpy(random.randint(0, 200, (2, 77))))
    x = normal(random, dtype, 2, 4, 16, 24)
    return {"text encoder": context, "U-Net, t = 1": n.unet(x, 1, context),
            "U-Net, t = 981": n.unet(x, 981, context), **vae_outputs(n, random, dtype),
            f"DDIM, {steps} steps": n.ddim(normal(random, dtype, 1, 4, 16, 24), context, steps)}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# Six values of each of the `outputs` of transformers 5.24 and diffusers 0.42 for the narrow
# checkpoint `official_tensors(factor=...)`, in float64: `python test_tiny_ldm.py --golden` prints
# them.
GOLDEN = {
    1.0: {
        "text encoder":
            [-1.95908064, 0.459222536, -0.411673869, 0.727314733, 0.83116248,
             -0.725095146],
        "U-Net, t = 1":
            [0.0287531323, -0.222705155, 0.163893726, -0.106276206, 0.695494123,
             0.58126671],
        "U-Net, t = 981":
            [0.0119283241, -0.242865625, 0.230685415, -0.12657128, 0.756475439,
             0.64293544],
        "VAE, encode":
            [-0.331881637, -0.718639676, -0.0350717757, -0.26515887, -0.0904472945,
             0.0956287005],
        "VAE, decode":
            [-0.155510369, -0.0842387059, 0.0946416495, 0.101547478, 0.116879312,
             0.891462928],
        "DDIM, 10 steps":
            [3.35050752, 4.19511023, -9.56790971, 10.6799355, 8.27845551, 11.548071],
    },
    0.01: {
        "text encoder":
            [-0.120533875, -0.336852009, 0.0390874062, 0.210487275, 0.101134055,
             0.234540763],
        "U-Net, t = 1":
            [-0.000679867348, -0.00102797067, -0.000451912314, -0.00393350119,
             0.00346159338, -0.00636485595],
        "U-Net, t = 981":
            [-0.000679865692, -0.00102796825, -0.000451925888, -0.00393350052,
             0.00346160448, -0.00636485313],
        "VAE, encode":
            [-0.00139349109, -0.000466821574, 0.00012564734, 0.000248715242,
             -0.000195638581, -0.000159050153],
        "VAE, decode":
            [-0.00269819821, -0.00446293318, 0.00253607057, -0.00172857482,
             -0.000882066579, 0.00285158645],
        "DDIM, 10 steps":
            [0.772402913, 2.64802019, -4.44713666, 14.9902051, 7.51345329,
             1.07380891],
    },
}


def six_of(outputs: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: t.flatten()[:: t.numel() // 6][:6].tolist() for name, t in outputs.items()}


def print_golden() -> None:
    for factor in (1.0, 1e-2):
        models = load_official(reference_models(NARROW), official_tensors(factor=factor))
        values = six_of(outputs(their_networks(*(model.double() for model in models))))
        print(f"    {factor}: {{")
        for name, six in values.items():
            numbers = textwrap.wrap(", ".join(f"{v:.9g}" for v in six), 70)
            print(f'        "{name}":\n            [' + "\n             ".join(numbers) + "],")
        print("    },")


@pytest.mark.parametrize("factor", [1.0, 1e-2])
def test_networks_give_the_golden_numbers(factor, official, tmp_path):
    """Needs neither diffusers nor transformers. In float64, where nothing but a difference of
    meaning can show (the walk's latents are float32). With weights a hundredth as large, what
    reaches each norm has a variance near the norm's epsilon: a wrong one shows as 0.1 and more, and
    on ordinary weights as 1e-5."""
    save_file(official_tensors(factor=factor), tmp_path / "plain.safetensors")
    assert convert(tmp_path / "plain.safetensors", tmp_path / "t.safetensors", official) == 0
    ldm = LatentDiffusion.load(tmp_path / "t.safetensors", "cpu", torch.float64)
    for name, found in six_of(outputs(our_networks(ldm))).items():
        error = relative_error(torch.tensor(found), torch.tensor(GOLDEN[factor][name]))
        assert error <= (1e-5 if "DDIM" in name else 1e-7), name


def make_references(d: Path, factor: float) -> tuple:
    """A diffusers folder of narrow networks with synthetic weights: (ours, converted from it; the
    references; the folder)."""
    models = reference_models(NARROW)
    for model, name in zip(models, ("text_encoder", "unet", "vae")):
        for n, p in model.named_parameters():
            p.copy_(synthetic(n, list(p.shape), factor))
        model.save_pretrained(d / name)
    (d / "tokenizer").mkdir()
    (d / "tokenizer" / "tokenizer.json").write_text(small_tokenizer(77).backend.to_str())
    assert weights_convert.main([str(d), "-o", str(d / "t.safetensors")]) == 0
    return LatentDiffusion.load(d / "t.safetensors", "cpu"), models, d


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return make_references(tmp_path_factory.mktemp("diffusers"), 1.0)


@pytest.mark.parametrize("factor", [1.0, 1e-2])
def test_networks_equal_the_reference_implementations(factor, references, tmp_path):
    """From a diffusers folder, live, at every value."""
    ldm, models, _ = references if factor == 1.0 else make_references(tmp_path, factor)
    ldm, *models = (copy.deepcopy(m).double() for m in (ldm, *models))
    ours, theirs = outputs(our_networks(ldm)), outputs(their_networks(*models))
    for name, found in ours.items():
        error = relative_error(found, theirs[name])
        assert error <= (1e-5 if "DDIM" in name else 1e-12), name


def test_diffusers_reads_what_is_written_in_the_official_layout(references, tmp_path):
    """By its own rules, and from tensors that came by way of a diffusers folder and ours."""
    _, models, d = references
    ours, back = d / "t.safetensors", tmp_path / "o.safetensors"
    assert weights_convert.main(["--to", "official", str(ours), "-o", str(back)]) == 0
    again = load_official(reference_models(NARROW), load_file(back))
    for model, read in zip(models, again):
        state = read.state_dict()
        assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def test_diffusers_folders_of_every_age_convert_to_the_same(references, tmp_path):
    *_, d = references
    whole = load_file(d / "t.safetensors")
    stem = "diffusion_pytorch_model"
    for part, name, other in (("unet", stem, f"{stem}.bin"),
                              ("vae", stem, f"{stem}.fp16.safetensors"),
                              ("text_encoder", "model", "pytorch_model.bin")):
        (tmp_path / part).mkdir()
        tensors = load_file(next((d / part).glob(f"{name}*.safetensors")))
        if part == "vae":                     # the attention's names before diffusers 0.15
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                             ("to_out.0", "proj_attn")):
                new, old = f".attentions.0.{new}.", f".attentions.0.{old}."
                tensors = {k.replace(new, old): v for k, v in tensors.items()}
        if part == "text_encoder":    # the names before transformers 5, with old files' buffer
            tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save = torch.save if other.endswith("bin") else save_file
        save(tensors, tmp_path / part / other)
    assert convert(tmp_path, tmp_path / "t.safetensors", d / "tokenizer") == 0
    again = load_file(tmp_path / "t.safetensors")
    assert again.keys() == whole.keys() and all(torch.equal(v, again[k]) for k, v in whole.items())


def test_a_folder_s_scheduler_says_what_the_unet_puts_out(references, tmp_path, capsys):
    """Its tensors can't: a fine-tune to v-prediction has the same. Missing entries are SD 1.x's."""
    *_, d = references
    folder, out = tmp_path / "f", tmp_path / "t.safetensors"
    shutil.copytree(d, folder)
    (folder / "scheduler").mkdir()

    def config_with(**scheduler):
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        code = weights_convert.main([str(folder), "-o", str(out), "--force"])
        err = capsys.readouterr().err.splitlines()[-1]
        return LatentDiffusion.load(out, "cpu").config if code == 0 else (code, err)

    plain = LatentDiffusion.load(d / "t.safetensors", "cpu").config
    assert plain.prediction == "eps"
    assert config_with(**SD1_SCHEDULE, num_train_timesteps=1000, trained_betas=None) == plain
    changed = config_with(prediction_type="v_prediction", beta_end=0.02)
    schedule = replace(plain.schedule, beta_end=0.02)
    assert changed == replace(plain, prediction="v", schedule=schedule)
    for odd in ({"prediction_type": "sample"}, {"rescale_betas_zero_snr": True},
                {"beta_schedule": "linear"}, {"num_train_timesteps": 500}):
        code, err = config_with(**odd)
        (name, value), = odd.items()
        assert code == 2 and f"{name} is {value!r}" in err and "Traceback" not in err
    assert config_with(beta_start="x")[0] == 2


@pytest.fixture
def hub(references, monkeypatch, tmp_path):
    """A local server that speaks for the hub: one repository, made of the folder above."""
    *_, d = references
    files = {str(p.relative_to(d)): p for p in d.rglob("*") if p.is_file() and p.parent != d}
    info = json.dumps({"id": "some/model", "sha": "f" * 40, "private": False, "tags": [],
                       "siblings": [{"rfilename": name} for name in files], "downloads": 0,
                       "likes": 0}).encode()
    tree = json.dumps([{"type": "file", "path": name, "size": p.stat().st_size, "oid": "0"}
                       for name, p in files.items()]).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            file = files.get(self.path.partition(f"/some/model/resolve/{'f' * 40}/")[2])
            body = file.read_bytes() if file else None
            if self.path.startswith("/api/models/some/model"):
                body = tree if "/tree/" in self.path else info
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("X-Repo-Commit", "f" * 40)
            self.send_header("ETag", f'"{zlib.crc32(body or b""):x}"')
            self.end_headers()
            if self.command == "GET" and body:
                self.wfile.write(body)

        do_HEAD = do_GET
        log_message = lambda self, *a: None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
           "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()


run_convert = functools.partial(run, program="weights_convert.py")


def test_a_hub_repository_is_downloaded_and_converted(hub, references, tmp_path):
    done = run_convert("some/model", cwd=tmp_path, **hub)
    assert (done.returncode, done.stdout) == (0, "model.tiny_ldm.safetensors\n"), done.stderr
    whole = load_file(references[-1] / "t.safetensors")
    again = load_file(tmp_path / "model.tiny_ldm.safetensors")
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
    done = run_convert("some/other", cwd=tmp_path, **hub)
    assert done.returncode == 2
    assert "some/other can't be had from the hub" in done.stderr.splitlines()[-1]


def test_without_a_vocabulary_the_error_says_what_to_pass(official, tmp_path, hub):
    done = run_convert(official / "plain.safetensors", cwd=tmp_path, **hub)
    assert done.returncode == 2
    assert "pass --tokenizer with bpe_simple_vocab_16e6.txt.gz" in done.stderr.splitlines()[-1]


CLIP = Path(os.environ.get("TINY_LDM_CLIP_DIR", "nowhere"))
CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture
def clip():
    """CLIP's tokenizer, from OpenAI's file."""
    if not CLIP.is_dir():
        pytest.skip("TINY_LDM_CLIP_DIR names no folder with CLIP's vocabulary")
    return Tokenizer(weights_convert.read_tokenizer(CLIP / CLIP_FILE), 77)


def test_ids_are_those_of_clips_tokenizer(clip, capsys):
    for line in (CLIP / "tokens.jsonl").read_text("utf-8").splitlines():
        case = json.loads(line)
        ids = case["ids"][:76] + [49407] * max(1, 77 - len(case["ids"]))
        assert clip([case["text"]])[0].tolist() == ids[:77], case["text"]
    capsys.readouterr()
    assert clip(["a " * 75 + "red fox"])[0, -2:].tolist() == [320, 49407]
    message = "tiny_ldm: the prompt is longer than 75 tokens; cut off: 'red fox'\n"
    assert capsys.readouterr().err == message


def test_a_tokenizer_folder_gives_the_same_and_transformers_agrees(clip, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(clip.backend.get_vocab()))
    merges = json.loads(clip.backend.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    assert weights_convert.read_tokenizer(tmp_path).to_str() == clip.backend.to_str()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    words = ["a", "Photo", "THE", "don't", "we'LL", "é", "e\u0301", "ß", "İ", "ﬁ", "日本", "👩\u200d🚀",
             "1234", "3.5", "--", "(((", "<|startoftext|>", "<|endoftext|>", "\t", "\u00a0", "_x_",
             "&amp;", "ǅ", "٣", "x" * 30]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(words) + rng.choice(["", " ", "  "]) for _ in range(30))
        wanted = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert clip([text], warn=False)[0].tolist() == wanted, text


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


def full_size_comparison(d: Path, config=SD1, steps: int = 50) -> dict[str, float]:
    """Writes a checkpoint, converts it by the command, and compares all networks, a whole walk and
    its picture with the references'. The two models are in memory one after the other."""
    source, out, vocabulary = d / "sd1.safetensors", d / "t.safetensors", CLIP / CLIP_FILE
    plan = {name: weights_convert.Plan(tuple(shape), torch.float32,
                                       functools.partial(synthetic, name, shape))
            for name, shape in official_shapes(config).items()}
    weights_convert.write_safetensors(source, plan, {})
    peak, seconds = measured("weights_convert", source, "-o", out, "--tokenizer", vocabulary)
    size = out.stat().st_size
    found = {"conversion: seconds": seconds, "conversion: GB written": size / 1e9,
             "conversion: GB of memory at the peak": peak / 1e9}
    assert peak <= size + 500e6

    def outputs_and_picture(n: Networks):
        found = outputs(n, torch.float32, steps)
        return found, np.asarray(n.picture(found[f"DDIM, {steps} steps"]), dtype=int)

    text, unet, vae = load_official(reference_models(config), load_file(source))
    wanted, their_picture = outputs_and_picture(their_networks(text, unet, vae))
    rough, exact = (vae_outputs(their_networks(text, unet, vae.to(dtype)), np.random.RandomState(1),
                                dtype) for dtype in (torch.float32, torch.float64))
    found["diffusers' VAE from its own in float64"] = max(
        relative_error(t, exact[name]) for name, t in rough.items())
    del text, unet, vae
    got, our_picture = outputs_and_picture(our_networks(LatentDiffusion.load(out, "cpu")))
    found.update({name: relative_error(t, wanted[name]) for name, t in got.items()})
    difference = np.abs(our_picture - their_picture)
    found["picture: differing 8-bit values, %"] = 100 * (difference > 0).mean()
    found["picture: largest difference"] = difference.max()
    peak, seconds = measured("tiny_ldm", "an astronaut", "--weights", out, "--device", "cpu",
                             "--steps", 1, "-o", d / "p.png")
    return {**found, "one step at 512 x 512 and all around it: seconds": seconds,
            "one step at 512 x 512 and all around it: GB of memory at the peak": peak / 1e9}


@pytest.mark.skipif(not (os.environ.get("TINY_LDM_FULL_SIZE") and CLIP.is_dir()),
                    reason="needs 9 GB of disk, 16 GB of memory, 10 minutes and CLIP's vocabulary: "
                           "set TINY_LDM_FULL_SIZE=1 and TINY_LDM_CLIP_DIR")
def test_full_size_stable_diffusion_equals_the_references(capsys):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    with tempfile.TemporaryDirectory() as d:      # pytest's own would stay for three runs
        found = full_size_comparison(Path(d))
    with capsys.disabled():
        print("".join(f"\n    {name}: {value:.3g}" for name, value in found.items()))
    # Without AVX-512, oneDNN's convolutions round more: diffusers' own VAE is 4.6e-6 off.
    rounding = found["diffusers' VAE from its own in float64"]
    limits = {**LIMITS, "VAE": max(LIMITS["VAE"], 1.5 * rounding)}
    for name, value in found.items():
        assert value <= limits.get(name.split(",")[0], math.inf), name
    assert found["picture: differing 8-bit values, %"] <= 0.1
    assert found["picture: largest difference"] <= 1


# --------------------------------------------------------------------------------------------------
# It does not break: damaged files and bad calls by the hundred, each in a process of its own

class Case(NamedTuple):
    """Files to put into an empty folder, as bytes or as what makes them, and a call there."""
    name: str
    files: dict[str, bytes | Callable[[Path], object]]
    argv: list
    program: types.ModuleType = tiny_ldm
    room: int | None = None          # bytes that a file may have: a disk that is full


ODD = [None, True, -1, 0, 0.5, 10**30, -1e308, math.nan, "x", "", [], {}, [[-1]], "\ud800\n"]
DEEP = b"[" * 100_000


def damaged(whole: bytes, ends: list[int], rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """A file cut around each of its inner ends, with lengths that are huge, with a bit flipped near
    an end or anywhere, empty, doubled."""
    for at in sorted({end + by for end in ends for by in (-1, 0, 1)}):
        if 0 <= at < len(whole):
            yield f"cut at {at}", whole[:at]
    for end in ends:
        yield f"huge at {end}", whole[:end] + b"\xff" * 8 + whole[end + 8 :]
        yield f"nothing at {end}", whole[:end] + b"\0" * 8 + whole[end + 8 :]
    for i in range(24):
        at = rng.choice(ends) + rng.randrange(40) if i % 2 else rng.randrange(len(whole))
        at = min(at, len(whole) - 1)
        yield (f"bit flipped at {at}",
               whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    yield "doubled", whole * 2


def odd_leaves(tree, rng: random.Random, count: int) -> Iterator[tuple[str, object]]:
    """Copies of a JSON value with one part of it, at any depth, replaced or taken away."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        others = [(f"{key}={odd!r}", odd) for odd in rng.sample(ODD, count) if odd is not value]
        if isinstance(value, (dict, list)) and len(value) < 30:
            others += [(f"{key}.{name}", odd) for name, odd in odd_leaves(value, rng, count)]
        for name, odd in others:
            changed = copy.copy(tree)
            changed[key] = odd
            yield name, changed
        if isinstance(tree, dict):
            yield f"no {key}", {k: v for k, v in tree.items() if k != key}


def no_files(path: Path) -> dict[str, Callable[[Path], object]]:
    """What may stand where a file is expected."""
    return {"folder": Path.mkdir, "pipe": os.mkfifo, "loop": lambda p: p.symlink_to(p.name),
            "dangling": lambda p: p.symlink_to("nowhere"),
            "endless": lambda p: p.symlink_to("/dev/zero"),
            "nothing": lambda p: p.write_bytes(b"")}


def as_safetensors(header: dict, size: int) -> Callable[[Path], object]:
    """Writes a .safetensors whose numbers are all zero (and take no room on the disk)."""
    def write(path: Path) -> None:
        head = json.dumps(header).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head)
        os.truncate(path, 8 + len(head) + size)
    return write


def header_of(file: Path) -> tuple[dict, int]:
    """The header of a .safetensors, and the number of bytes after it."""
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), len(whole) - end


def odd_tensors(header: dict, rng: random.Random) -> Iterator[tuple[str, dict]]:
    """A header with one tensor that is not as it should be."""
    names = [n for n in header if n != "__metadata__"]
    for name in rng.sample(names, 2):
        entry, other = header[name], rng.choice(names)
        for what, odd in odd_leaves(entry, rng, 3):
            yield f"{name}.{what}", {**header, name: odd}
        for dtype in ("I32", "F64", "F8_E4M3", "BOOL"):
            yield f"{name} {dtype}", {**header, name: {**entry, "dtype": dtype}}
        yield f"{name} for {other}", {**header, name: header[other]}
        yield f"{name} named {other}", {{name: other + "x"}.get(k, k): v for k, v in header.items()}
        yield f"{name} long", {**header, "x" * 100_000: entry}


def weights_cases(whole: Path, rng: random.Random) -> Iterator[Case]:
    case = lambda name, content, *more: Case(
        name, {"w.safetensors": content},
        ["a red circle", "--weights", "w.safetensors", "--steps", 1, "-o", "x.png", *more])
    data = (whole / "tiny.safetensors").read_bytes()
    header, size = header_of(whole / "tiny.safetensors")
    end = len(data) - size
    for name, content in [*damaged(data, [0, 8, end, len(data)], rng), *no_files(whole).items()]:
        yield case(name, content)
    for name, content in odd_tensors(header, rng):
        yield case(name, as_safetensors(content, size))
    meta = header["__metadata__"]
    with_meta = lambda **m: as_safetensors({**header, "__metadata__": {**meta, **m}}, size)
    for name, odd in odd_leaves(json.loads(meta["config"]), rng, 2):
        yield case(f"config {name}", with_meta(config=json.dumps(odd)), "--image",
                   whole / "p.png", *(["--width", 64] if len(name) % 2 else []))
    for name, odd in [*odd_leaves(json.loads(meta["tokenizer"]), rng, 1), *odd_vocabularies(meta)]:
        yield case(f"tokenizer {name}", with_meta(tokenizer=json.dumps(odd)))
    for key in ("config", "tokenizer", "format"):
        yield case(f"deep {key}", with_meta(**{key: DEEP.decode()}))
    yield case("deep header", len(DEEP).to_bytes(8, "little") + DEEP)
    for value in (math.nan, math.inf, 1e38):
        tensors = {k: torch.full_like(v, value) for k, v in
                   load_file(whole / "tiny.safetensors").items()}
        yield case(f"all {value}", functools.partial(save_file, tensors, metadata=meta))


def odd_vocabularies(meta: dict) -> Iterator[tuple[str, object]]:
    """Tokenizers whose tables do not fit each other, or whose rules take forever."""
    tree = json.loads(meta["tokenizer"])
    vocab, merges = tree["model"]["vocab"], tree["model"]["merges"]
    with_model = lambda **m: {**tree, "model": {**tree["model"], **m}}
    for word in (tiny_ldm.BOS, tiny_ldm.EOS, "a", "a</w>"):
        yield f"no {word}", with_model(vocab={k: v for k, v in vocab.items() if k != word})
        for odd in (-1, 499, 10**6, 2**32, "1", None, 0.5):
            yield f"{word}={odd}", with_model(vocab={**vocab, word: odd})
    for odd in ([["a", "zzz"]], ["a b", "c"], [1, 2], [[]], ["a b c"], {"a": "b"}, merges[::-1]):
        yield f"merges {str(odd)[:20]}", with_model(merges=odd)
    yield "slow", {**tree, "normalizer": {"type": "Replace", "pattern": {
        "Regex": "(a|r|e|d| |c|i|l)*(.*.*)*x"}, "content": ""}}
    yield "grows", {**tree, "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 1000}] * 4}}
    yield "other", {**tree, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}}


def odd_pickles(tensors: dict, ran: Path) -> Iterator[tuple[str, object]]:
    """What may be in a .ckpt in place of tensors."""
    name = f"{weights_convert.UNET}.out.2.bias"
    changed = lambda t: {"state_dict": {**tensors, name: t}}
    looped = {}
    looped["state_dict"] = looped
    deep = []
    for _ in range(100_000):
        deep = [deep]
    yield from {
        "meta": changed(torch.zeros(4, device="meta")), "sparse": changed(torch.eye(4).to_sparse()),
        "complex": changed(torch.zeros(4, dtype=torch.complex64)), "none": changed(None),
        "int8": changed(torch.zeros(4, dtype=torch.int8)), "huge": changed(
            torch.zeros(1).expand(2**40)), "bool": changed(torch.zeros(4, dtype=torch.bool)),
        "quantized": changed(torch.quantize_per_tensor(torch.zeros(4), 1, 0, torch.quint8)),
        "parameter": changed(torch.nn.Parameter(torch.zeros(4))), "nan": changed(
            torch.full((4,), math.nan)), "float8": changed(torch.zeros(4, dtype=torch.float8_e5m2)),
        "number as name": {**tensors, 5: torch.zeros(1)}, "list": {"state_dict": [1, 2]},
        "tensor": {"state_dict": torch.zeros(3)}, "text": "state_dict", "loop": looped,
        "in itself": {"state_dict": {"state_dict": tensors}}, "empty": {}, "nothing": None,
        "canary": {"state_dict": tensors, "x": Hostile(ran)}, "hidden": {
            "state_dict": {**tensors, "x": {"y": [Hostile(ran)]}}}, "name": {Hostile(ran): tensors},
    }.items()


def zipped(entries: list[tuple[str, bytes]], compression: int = 0) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")                    # of two entries of one name
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def write_bomb(path: Path, entry: str) -> None:
    """A small zip that becomes a gigabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(entry, "w") as file:
            for _ in range(256):
                file.write(bytes(2**22))


def checkpoint_cases(whole: Path, rng: random.Random) -> Iterator[Case]:
    case = lambda name, content, ending="ckpt": Case(
        f"{ending} {name}", {f"c.{ending}": content},
        [f"c.{ending}", "--tokenizer", whole / "tokenizer.json", "--dtype", "float16", "-o", "o"],
        weights_convert)
    data = (whole / "sd.ckpt").read_bytes()
    with zipfile.ZipFile(whole / "sd.ckpt") as archive:
        entries = [(i.filename, archive.read(i)) for i in archive.infolist()]
        ends = [i.header_offset for i in archive.infolist()][::200]
        ends += [archive.start_dir, len(data) - 22]
    for name, content in [*damaged(data, ends, rng), *no_files(whole).items()]:
        yield case(name, content)
    for name, content in odd_pickles(torch.load(whole / "sd.ckpt")["state_dict"], whole / "ran"):
        yield case(name, lambda p, content=content: torch.save(content, p))
        yield case(f"old {name}", lambda p, content=content: torch.save(
            content, p, _use_new_zipfile_serialization=False))
    root = entries[0][0].partition("/")[0]
    with_pickle = lambda b: [(n, b if n.endswith("data.pkl") else c) for n, c in entries]
    for name, content in (
            ("compressed", zipped(entries, zipfile.ZIP_DEFLATED)),
            ("bomb", functools.partial(write_bomb, entry=f"{root}/data/9")),
            ("bomb for a pickle", functools.partial(write_bomb, entry=f"{root}/data.pkl")),
            ("path", zipped([*entries, ("../../ran", b"x"), ("/ran", b"x")])),
            ("twice", zipped([*entries, *with_pickle(b"cos\nsystem\n(S'touch ran'\ntR.")])),
            ("no data", zipped(entries[:1])), ("order", zipped(entries[::-1])),
            *((f"pickle {code[:12]}", zipped(with_pickle(code))) for code in (
                b"", b".", b"N.", b"\x80\x02}q\x00.", b"(" * 10**5, b"]" * 10**5 + b".",
                b"\x80\x02" + b"(l" * 10**5 + b".", b"cbuiltins\nbytearray\n(I1099511627776\ntR.",
                b"cos\nsystem\n(S'touch ran'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.",
                b"ctorch.hub\nload\n(S'x'\ntR.", b"cnumpy\nx\n)R.", b"c__main__\nx\n.",
                b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\ttouch ran\x85R.",
                b"\x80\x04X" + b"\xff" * 4, b"I" + b"9" * 10**5 + b"\n.", b"g0\n.", b"\x95" * 9))):
        yield case(name, content)
    header, size = header_of(whole / "sd.safetensors")
    for name, content in odd_tensors(header, rng):
        yield case(name, as_safetensors(content, size), "safetensors")


def folder_cases(whole: Path, rng: random.Random) -> Iterator[Case]:
    """A diffusers folder in which one file is not what it should be."""
    names = [weights_convert.part_files(part)[0] for part in ("unet", "vae", "text_encoder")]
    parts = {name: functools.partial(shutil.copy, whole / "folder" / name) for name in names}
    parts["tokenizer/tokenizer.json"] = (whole / "tokenizer.json").read_bytes()
    parts["scheduler/scheduler_config.json"] = b"{}"
    for part in parts:
        others = [*no_files(whole).items(), ("text", b"x"), ("other", parts[rng.choice([*parts])]),
                  ("gone", None), ("deep", len(DEEP).to_bytes(8, "little") + DEEP)]
        if part.endswith("safetensors"):
            header, size = header_of(whole / "folder" / part)
            others += [(n, as_safetensors(h, size)) for n, h in odd_leaves(header, rng, 0)][:9]
        for name, content in others:
            yield Case(f"{part} {name}", {"f/" + k: v for k, v in {**parts, part: content}.items()},
                       ["f", "-o", "o", "--dtype", "float16"], weights_convert)


def tokenizer_cases(whole: Path, rng: random.Random) -> Iterator[Case]:
    case = lambda name, files, given: Case(name, files, [
        whole / "sd.ckpt", "--tokenizer", given, "--dtype", "float16", "-o", "o"], weights_convert)
    text = (whole / "tokenizer.json").read_bytes()
    for name, content in [*damaged(text, [0, text.find(b'"model"'), len(text)], rng),
                          *no_files(whole).items(), ("deep", DEEP), ("text", b"\xff\xfe")]:
        for file in ("t.json", "t.gz", "t.txt"):
            yield case(f"{file} {name}", {file: content}, file)
    for name, odd in odd_vocabularies({"tokenizer": text}):
        yield case(name, {"t.json": json.dumps(odd).encode()}, "t.json")
    tree = json.loads(text)["model"]
    tables = {"vocab.json": json.dumps(tree["vocab"]).encode(),
              "merges.txt": b"\n".join(" ".join(m).encode() for m in tree["merges"])}
    for name in tables:
        for what, content in [*no_files(whole).items(), ("deep", DEEP), ("list", b"[]"),
                              ("words", b"a b c\n"), ("bytes", b"\xff"), ("null", b"null")]:
            files = {**tables, name: content}
            yield case(f"{name} {what}", {f"t/{k}": v for k, v in files.items()}, "t")
    for what in (b"a b\n", b"\0", b"\n"):
        yield case(f"gz bomb {what}", {"t.gz": gzip.compress(what * 2**20, 1) * 1024}, "t.gz")


def chunks_of(png: bytes) -> list[int]:
    """Where the chunks of a PNG begin."""
    ends = [8]
    while ends[-1] < len(png):
        ends.append(ends[-1] + 12 + int.from_bytes(png[ends[-1] : ends[-1] + 4], "big"))
    return ends


def chunk(kind: bytes, data: bytes) -> bytes:
    return (len(data).to_bytes(4, "big") + kind + data
            + zlib.crc32(kind + data).to_bytes(4, "big"))


def picture_cases(whole: Path, rng: random.Random) -> Iterator[Case]:
    def case(name, content, ending="png"):
        make = ["--weights", whole / "tiny.safetensors", "--steps", 1, "-o", "x.png"]
        image = ["a red circle", "--image", f"i.{ending}", *make]
        way = [image, ["a", "--image", whole / "p.png", "--mask", f"i.{ending}", *make],
               ["--again", f"i.{ending}", *make]][rng.randrange(3)]
        return Case(f"{ending} {name} {way[0]} {way[1]}", {f"i.{ending}": content},
                    [*way, *([] if way[0] == "--again" else ["--width", 32, "--height", 32])])

    picture = gradient(32, 32)
    for ending in ("png", "gif", "tiff", "jpg", "webp", "bmp"):
        file = io.BytesIO()
        picture.save(file, {"jpg": "JPEG"}.get(ending, ending))
        data = (whole / "x.png").read_bytes() if ending == "png" else file.getvalue()
        ends = chunks_of(data) if ending == "png" else [0, 4, 10, 30, len(data) // 2]
        for name, content in damaged(data, ends, rng):
            yield case(name, content, ending)
    for name, content in no_files(whole).items():
        yield case(name, content)
    whole_png = (whole / "x.png").read_bytes()
    ihdr = lambda w, h, rest=b"\x08\x02\0\0\0": chunk(
        b"IHDR", w.to_bytes(4, "big") + h.to_bytes(4, "big") + rest)
    pixels = chunk(b"IDAT", zlib.compress(bytes(97 * 32))) + chunk(b"IEND", b"")
    text = b"parameters\0a\nSteps: 1, Seed: 1, Size: "
    for name, content in {
            "bomb": ihdr(30000, 30000) + pixels, "large": ihdr(12000, 9000) + pixels,
            "huge": ihdr(2**31 - 1, 2**31 - 1) + pixels, "empty": ihdr(0, 0) + pixels,
            "long": ihdr(1, 2**20) + pixels, "palette": ihdr(32, 32, b"\x08\x03\0\0\0") + pixels,
            "kind": ihdr(32, 32, b"\x07\x09\0\0\0") + pixels, "no pixels": ihdr(32, 32),
            "text bomb": ihdr(32, 32) + chunk(b"zTXt", b"parameters\0\0" + zlib.compress(
                bytes(2**22))) + pixels, "no animation": ihdr(32, 32) + chunk(
                b"acTL", b"\0\0\0\x09\0\0\0\0") + pixels,
            **{f"text {s[:30]}": ihdr(32, 32) + chunk(b"tEXt", text + s) + pixels for s in (
                b"64x64", b"9999999999x64", b"0x0", b"64x64, Weights: /dev/zero",
                b"64x64, Eta: nan", b'64x64, Image: "\\u0000"', b'64x64, Mask: "\\ud800.png"',
                b'64x64, Steps: "[1]"', b"64x64, Sampler: \x1b[2J", b"64x64, Precision: int8",
                b'64x64, Image: "' + b"a" * 10**6)}}.items():
        yield case(name, whole_png[:8] + content)
    yield case("program", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n")


def training_cases(whole: Path, rng: random.Random) -> Iterator[Case]:
    png, argv = (whole / "p.png").read_bytes(), ["--train", "f", "-o", "m.safetensors", "--weights",
                                                 whole / "tiny.safetensors", "--unet-steps", 1,
                                                 "--unet-batch", 2]
    line = lambda name, text="a red circle": json.dumps({"file_name": name, "text": text}).encode()
    for name, content in [*no_files(whole).items(), ("gone", None), ("text", b"x"),
                          ("bytes", b"\xff\xfe"), ("marked", b"\xef\xbb\xbfa"), ("nul", b"\0"),
                          ("long", b"red " * 10**6), ("one word", b"a" * 10**6)]:
        yield Case(f"caption {name}", {"f/p.png": png, "f/p.txt": content}, argv)
        yield Case(f"picture {name}", {"f/p.png": content, "f/p.txt": b"a"}, argv)
        yield Case(f"list {name}", {"f/p.png": png, "f/metadata.jsonl": content}, argv)
    for content in (line("p.png"), line("../f/p.png"), line("/etc/passwd"), line("/dev/zero"),
                    line("/dev/stdin"), line("."), line(""), line("a" * 10**5), line("p.png", None),
                    line("\0"), line(5), line(["p.png"]), line("\ud800"), line("p.png", {"a": 1}),
                    b"{}", b"[]", b"0", b"null", b'"p.png"', b"[1]", b"{", DEEP, b"1" * 10**5,
                    b'{"file_name": "p.png"}', line("p.png", "\ud800"), b"\r\n\r\n", b"\0",
                    line("p.png") + b"\n" + b"{", line("x/../p.png"), line("p.png", "\n\x1b[2J"),
                    line("\x1b[2J\n.png"), line("p.png", 10**300)):
        yield Case(f"line {content[:40]}", {"f/p.png": png, "f/metadata.jsonl": content}, argv)
    for name, content in damaged(png, chunks_of(png), rng):
        yield Case(f"png {name}", {"f/p.png": content, "f/p.txt": b"a"}, argv)


def resume_cases(whole: Path, rng: random.Random) -> Iterator[Case]:
    """A training checkpoint that is damaged, alone."""
    argv = ["--train", whole / "f", "-o", "m.safetensors", "--vae-steps", 2, "--vae-batch", 2,
            "--unet-steps", 2, "--unet-batch", 2]
    case = lambda name, content: Case(name, {"m.safetensors.checkpoint": content}, argv)
    data = (whole / "m.safetensors.checkpoint").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        ends = [i.header_offset for i in archive.infolist()][::200]
        ends += [archive.start_dir, len(data) - 22]
    for name, content in [*damaged(data, ends, rng), *no_files(whole).items()]:
        yield case(name, content)
    state = torch.load(whole / "m.safetensors.checkpoint")
    save = lambda state: lambda p: torch.save(state, p)
    for name, odd in odd_leaves({**state, "x": 0}, rng, 2):
        yield case(name, save(odd))
    for part in ("ema", "model"):
        for key in rng.sample([*state[part]], 3):
            for odd in (torch.zeros(3), torch.zeros(state[part][key].shape, dtype=torch.int8), None,
                        torch.full(state[part][key].shape, math.nan), "x"):
                yield case(f"{part} {key} {str(odd)[:9]}",
                           save({**state, part: {**state[part], key: odd}}))
    slots = state["optimizer"]["state"]
    for key in rng.sample([*slots], 4):
        for odd in ({}, {"m": torch.zeros(3)}, {"m": None}, {**slots[key], "n": "x"}, None):
            yield case(f"optimizer {key} {str(odd)[:9]}", save(
                {**state, "optimizer": {**state["optimizer"], "state": {**slots, key: odd}}}))
    yield case("canary", save({**state, "x": Hostile(whole / "ran")}))


WORDS = ["", " ", "x", "nan", "inf", "-1", "0", "1e400", "1" * 30, "1" * 5000, "\u0663", "/", "..",
         "\n\x1b[2J", "/dev/null", "/dev/full/x.png", "/proc/x.png", "/proc/x.safetensors", "--",
         "a\udcff", "x" * 300 + ".png", "\u65e5.png", "--steps", "m.safetensors", "2.5", "cpu"]


def call_cases(whole: Path, rng: random.Random) -> Iterator[Case]:
    """Every flag with every odd word, and without one; and prompts."""
    make = ["a red circle", "--weights", whole / "tiny.safetensors", "--steps", 1, "-o", "x.png"]
    train = ["--train", whole / "f", "--weights", whole / "tiny.safetensors", "-o", "m.safetensors",
             "--unet-steps", 1, "--unet-batch", 2]
    for name in vars(tiny_ldm.parse_args(["a"])):
        flag = f"--{name.replace('_', '-')}"
        for base in (make, train) if name in ("output", "weights", "seed", "dtype", "device") else (
                (train,) if name in ("train", "vae_steps", "unet_steps", "vae_batch", "unet_batch",
                                     "save_minutes") else (make,)):
            for word in [*rng.sample(WORDS, 6), None]:
                given = [flag] if word is None else [flag, word]
                yield Case(" ".join(map(str, [base[0], *given]))[:60], {}, [*base, *given])
    for flag in ("--output", "--dtype", "--tokenizer", "--to"):
        for word in [*rng.sample(WORDS, 8), None]:
            given = [flag] if word is None else [flag, word]
            yield Case(f"convert {given}"[:60], {}, [whole / "sd.ckpt", "--tokenizer", whole /
                                                     "tokenizer.json", "-o", "o", *given],
                       weights_convert)
    for word in WORDS:
        yield Case(f"convert {word}"[:60], {}, [word], weights_convert)
    for prompt in ("\x00", "\x1b[2J", "\u202e\u2066", "\ud800", "\U0001d49c" * 70, "\u65e5" * 70,
                   "a\u0301" * 100, "\ufeff", "\n", "-", "--", "/../x", "{", "%s%n", "a" * 2**20,
                   "red " * 2**18, "<|endoftext|>" * 99):
        yield Case(f"prompt {prompt[:20]!r}", {}, [prompt, *make[1:-2]])
        yield Case(f"not {prompt[:20]!r}", {}, [*make, f"--negative-prompt={prompt}",
                                                *["--attention", "y.png"] * (len(prompt) > 50)])


def full_disk_cases(whole: Path, rng: random.Random) -> Iterator[Case]:
    make = ["a red circle", "--weights", whole / "tiny.safetensors", "--steps", 9, "-o", "x.png"]
    for more in (["--width", 256], ["--film", "f.png"], ["--film", "f.gif"],
                 ["--attention", "a.png"]):
        yield Case(f"picture {more}", {}, [*make, *more], room=2**12)
    for to in ("tiny_ldm", "official"):
        source = whole / ("sd.ckpt" if to == "tiny_ldm" else "o.safetensors")
        yield Case(to, {}, [source, "--to", to, "-o", "o", "--tokenizer", whole / "tokenizer.json"],
                   weights_convert, 2**16)
    yield Case("training", {}, ["--train", whole / "f", "-o", "m.safetensors", "--vae-steps", 1,
                                "--vae-batch", 1], room=2**16)


CASES = {"weights": weights_cases, "checkpoints": checkpoint_cases, "folders": folder_cases,
         "tokenizers": tokenizer_cases, "pictures": picture_cases, "training": training_cases,
         "resumed": resume_cases, "calls": call_cases, "full disk": full_disk_cases}


def make_whole_pictures(whole: Path) -> None:
    """A picture, and a folder to train on."""
    (whole / "f").mkdir()
    for name in ("p.png", "f/p.png"):
        gradient(32, 32).save(whole / name)
    (whole / "f" / "p.txt").write_text("a red circle")


def make_whole_files(whole: Path) -> None:
    """A small file of each kind that is as it should be."""
    make_whole_pictures(whole)
    (whole / "tokenizer.json").write_text(small_tokenizer(77).backend.to_str())
    tiny_model().save(whole / "tiny.safetensors")
    # All zero, and views of one number: a whole checkpoint in 200 KB
    zeros = {n: torch.zeros(1).expand(s) for n, s in official_shapes(NARROW).items()}
    torch.save({"state_dict": zeros}, whole / "sd.ckpt")
    save_file({n: t.half().contiguous() for n, t in zeros.items()}, whole / "sd.safetensors")
    parts = {"unet": {}, "vae": {}, "text_encoder": {}}
    for entry in weights_convert.name_map(NARROW).values():
        for theirs, name in zip(entry.official, entry.diffusers):
            part, _, rest = name.partition(".")
            parts[part][rest] = zeros[theirs].half().contiguous()
    for part, tensors in parts.items():
        (whole / "folder" / part).mkdir(parents=True)
        save_file(tensors, whole / "folder" / weights_convert.part_files(part)[0])
    small_training(whole / "m.safetensors", str(whole / "f"), vae_steps=2, vae_batch=2,
                   unet_steps=2, unet_batch=2)
    convert(whole / "sd.ckpt", whole / "o.safetensors", whole)
    tiny_ldm.main(["a red circle", "--weights", str(whole / "tiny.safetensors"), "--steps", "1",
                   "-o", str(whole / "x.png")])


def listing() -> dict[str, int]:
    """What is in this folder and below, with when it was changed."""
    return {os.path.join(at, name): os.lstat(os.path.join(at, name)).st_mtime_ns
            for at, folders, files in os.walk(".") for name in folders + files}


def forked(call: Callable[[], int], log, room: int | None = None, memory: int = 2**29,
           seconds: int = 180) -> int:
    """Calls in a process of its own, with only so much more memory and time, and files of only so
    many bytes; its output goes to a file. Returns the exit code, or minus the signal that ended
    it."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds // 9, seconds // 9))
        signal.alarm(seconds)
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def tried(case: Case, ran: Path) -> tuple[int, str]:
    """(exit code, "" or what is wrong with how the call ended)."""
    with tempfile.TemporaryDirectory() as d, tempfile.TemporaryFile() as log:
        os.chdir(d)
        for name, content in case.files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                content(Path(name)) if callable(content) else Path(name).write_bytes(content)
        before = listing()
        code = forked(lambda: case.program.main([str(a) for a in case.argv]), log, case.room)
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
        # A picture is whole when its name is printed, whatever comes after.
        named = {f"./{line}" for line in said.splitlines()}
        changed = {name for name, at in listing().items() if before.get(name) != at} - named
        os.chdir("/")
    # Progress, and what the user shall know beside, may come before the line that says the error.
    lines = [line for line in re.split("[\r\n]+", said)
             if line and not re.search(r"(step|tensor)/s|s/(step|tensor)|^\S*\.png$", line)]
    notes = [line for line in lines if line.startswith("tiny_ldm: ")]
    wrong = {
        f"exit code {code}": code not in (0, 2), "a traceback": "Traceback" in said,
        "other words on stderr": code == 2 and lines != notes,
        "no error": code == 2 and not notes, "too much memory": "not enough memory" in said,
        f"files {changed}": code == 2 and changed,
        "files left over": any(name.endswith(".part") for name in changed),
        "something ran": ran.exists() or Path("ran").exists() or "./ran" in changed}
    what = ", ".join(name for name, is_so in wrong.items() if is_so)
    return code, what and f"{what}: {said[-2000:]}"


def try_cases(folder: str, shard: int, shards: int, group: str = "") -> None:
    """Tries every shards-th case, or those of a group, and prints how each ended, as JSON."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    tiny_ldm.keep_freed_memory = lambda: None          # to fork a small process is faster
    tiny_ldm.Trainer.pool_size, tiny_ldm.train.__kwdefaults__["config"] = 64, TINY
    whole, found = Path(folder), []
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_whole_files(whole)       # which also wakes PyTorch up, before the processes part
    for name in [group] if group else CASES:
        for i, case in enumerate(CASES[name](whole, random.Random(name))):
            if i % shards == shard:
                began = time.monotonic()
                found.append((name, case.name, *tried(case, whole / "ran"),
                              time.monotonic() - began))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """How the cases ended, by two processes that share the work: forking is safe only where no
    other threads are. Two of five, which are more than 500 damaged files and 100 calls; with
    TINY_LDM_ALL_CASES=1 in the environment all of them."""
    shards = 2 if "TINY_LDM_ALL_CASES" in os.environ else 5
    call = "import sys, test_tiny_ldm as t; t.try_cases(sys.argv[1], *map(int, sys.argv[2:]))"
    runs = [subprocess.Popen([sys.executable, "-c", call, tmp_path_factory.mktemp("whole"), str(i),
                              str(shards)],
                             cwd=HERE, stdout=subprocess.PIPE, text=True) for i in range(2)]
    return [row for run in runs for row in json.loads(run.communicate()[0])]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits memory as Linux does")
@pytest.mark.parametrize("group", CASES)
def test_damaged_files_and_bad_calls_end_in_one_line(group, outcomes):
    rows = [row for row in outcomes if row[0] == group]
    codes = [code for _, _, code, _, _ in rows]
    print(f"{group}: {len(rows)} cases, {codes.count(2)} refused, {sum(r[4] for r in rows):.0f} s")
    assert [f"{name}: {wrong}" for _, name, _, wrong, _ in rows if wrong] == []
    assert codes.count(2) >= len(rows) / 4
    if group == "calls":
        assert len(outcomes) - len(rows) >= 500


@pytest.mark.skipif(sys.platform != "linux", reason="closes and fills stdout as shells there do")
@pytest.mark.parametrize("end, code, said", [
    (">&- 2>&-", 0, ""), ("> /dev/full", 2, "No space left"), ("| true", 2, "Broken pipe")])
def test_a_closed_or_full_stdout_is_no_traceback(end, code, said, tmp_path):
    call = f"set -o pipefail; '{sys.executable}' '{HERE}/tiny_ldm.py' a --steps 1 -o x.png {end}"
    done = subprocess.run(["bash", "-c", call], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert Image.open(tmp_path / "x.png").size == (64, 64)        # made all the same


def test_names_that_the_terminal_can_not_show(tmp_path):
    done = run("a", "--steps", 1, "-o", "\u65e5.png", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "\\u65e5.png\n"), done.stderr
    assert (tmp_path / "\u65e5.png").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what a process has loaded")
@pytest.mark.parametrize("moment", range(5))
def test_ctrl_c_at_any_moment(moment, tmp_path):
    """From the first imports on, which take the longest; a picture takes no second."""
    process = subprocess.Popen([sys.executable, HERE / "tiny_ldm.py", "a", "-n", "999", "--steps",
                                "2"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)
    while "/numpy/" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    time.sleep(random.Random(moment).uniform(0, 0.5 * moment))
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in said, said
    assert "\n".join(re.findall("^tiny_ldm: .*", said, re.M)) in ("", "tiny_ldm: interrupted")
    for file in tmp_path.iterdir():                    # those that are there are whole
        assert Image.open(file).convert("RGB").size == (64, 64)


# --------------------------------------------------------------------------------------------------
# Interrupted training

def same_model(a: Path, b: Path) -> bool:
    """To the bit. (The files may differ: safetensors writes the header in any order.)"""
    a, b = (LatentDiffusion.load(file, "cpu") for file in (a, b))
    return a.config == b.config and all(torch.equal(t, b.state_dict()[name])
                                        for name, t in a.state_dict().items())


TRAINING = dict(vae_steps=6, vae_batch=2, unet_steps=6, unet_batch=4, save_minutes=0)


def kill_training(folder: str) -> None:
    """Trains without interruption; then until killed, twenty times; and then to the end. Prints how
    many of the killed ones left a half-written file, and the exit code at the end."""
    torch.set_num_threads(1)
    tiny_ldm.Trainer.pool_size, rng, kills, left = 64, random.Random(0), 0, 0
    os.chdir(folder)
    log = open("log", "w")
    train = lambda out: small_training(Path(out), "pictures", **TRAINING) or 0
    halves = lambda: set(glob.glob("killed/.m.safetensors.checkpoint.*"))
    assert forked(lambda: train("whole/m.safetensors"), log) == 0
    while kills < 20:
        old, pid = halves(), os.fork()
        if pid == 0:
            os.dup2(log.fileno(), 2)
            os._exit(train("killed/m.safetensors"))
        if kills % 2:                   # every second one dies while a checkpoint is written
            while not halves() - old and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG
                                                       | os.WNOWAIT):
                time.sleep(0.0002)
        else:
            time.sleep(rng.uniform(0, 0.5))
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        kills, left = kills + (code != 0), left + bool(halves() - old)
        if code == 0:                   # came to its end before: once more from the beginning
            shutil.rmtree("killed"), os.mkdir("killed")
        assert code in (0, -signal.SIGKILL), code
    print(json.dumps([left, forked(lambda: train("killed/m.safetensors"), log)]))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_training_killed_at_twenty_moments_equals_an_uninterrupted_one(tmp_path):
    for name in ("pictures", "whole", "killed"):
        (tmp_path / name).mkdir()
    for i in range(3):
        scene, picture = random_picture(i)
        picture.save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(caption_of(scene))
    call = "import sys, test_tiny_ldm as t; t.kill_training(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", call, tmp_path], cwd=HERE, text=True,
                          stdout=subprocess.PIPE)
    left, code = json.loads(done.stdout)
    said = (tmp_path / "log").read_text()
    assert code == 0 and left >= 5, (left, said)
    assert "damaged" not in said
    whole, killed = (sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("whole", "killed"))
    assert whole == killed and len(whole) == 4         # the model, its pictures, two checkpoints
    a, b = (tmp_path / d / "m.safetensors" for d in ("whole", "killed"))
    assert same_model(a, b)
    assert a.with_suffix(".png").read_bytes() == b.with_suffix(".png").read_bytes()


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(tmp_path, one_thread, capsys):
    m = tmp_path / "m.safetensors"
    last, before = tiny_ldm.checkpoint_paths(m)
    settings = dict(vae_steps=2, unet_steps=3, unet_batch=4, save_minutes=0)
    make_whole_pictures(tmp_path)
    train = lambda **more: small_training(m, str(tmp_path / "f"), **{**settings, **more})
    train()
    wanted = shutil.copy(m, tmp_path / "wanted.safetensors")
    whole = last.read_bytes()
    at = len(whole) // 2
    for content in (whole[:at], whole[:-1], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
                    b""):
        last.write_bytes(content)
        capsys.readouterr()
        train()
        said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert len(said) == 1 and str(last) in said[0] and "the one before it" in said[0]
        assert same_model(m, wanted)
    last.unlink()
    train()                                            # killed while it wrote the last one
    assert same_model(m, wanted)
    last.write_bytes(b""), before.write_bytes(b"")
    with pytest.raises(InputError, match="before.checkpoint is damaged .*remove it to start anew"):
        train()


def test_a_loss_that_is_not_finite_ends_training(tmp_path):
    ldm = tiny_model()
    ldm.unet.conv_in.weight[:] = math.nan
    ldm.save(tmp_path / "nan.safetensors")
    make_whole_pictures(tmp_path)
    with pytest.raises(InputError, match="the loss is nan at step 0"):
        small_training(tmp_path / "m.safetensors", str(tmp_path / "f"),
                       weights=tmp_path / "nan.safetensors")
    assert not list(tmp_path.glob("m.*"))


# --------------------------------------------------------------------------------------------------
# Same in, same out; and long use

def test_same_in_same_out(tiny, built_in):
    """To the byte from run to run and in any order within a batch. The size of a batch and the
    number of threads change the order in which PyTorch adds, and it promises nothing there: at most
    one level of 256 (here, none)."""
    prompts = ["a red circle", "two blue stars", "a green heart", "a black ring"]
    threads = torch.get_num_threads()
    for ldm in (tiny, built_in):
        side = ldm.config.image_size // ldm.config.latent_stride
        z = torch.randn(4, 4, side, side, generator=torch.Generator().manual_seed(0))
        pixels = lambda prompts, z: [np.asarray(image).astype(int) for image in ldm.generate(
            prompts, latents=z, steps=5, progress=False)]
        plain = pixels(prompts, z)
        assert np.array_equal(pixels(prompts, z), plain)
        order = [2, 0, 3, 1]
        assert np.array_equal(pixels([prompts[i] for i in order], z[order]),
                              [plain[i] for i in order])
        alone = [pixels(prompts[i], z[i : i + 1])[0] for i in range(4)]
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert np.abs(np.array(pixels(prompts, z)) - plain).max() <= 1
        torch.set_num_threads(threads)
        assert np.abs(np.array(alone) - plain).max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_pictures_of_the_cpu(tiny, built_in):
    """In float32 no pixel differs by more than 1 of 256, whatever the sampler."""
    for ldm in (tiny, built_in):
        both = [copy.deepcopy(ldm).to(device) for device in ("cpu", "cuda")]
        for sampler in tiny_ldm.SAMPLERS:
            pictures = [model.generate(["a red circle", "two blue stars"], sampler=sampler,
                                       steps=25, progress=False) for model in both]
            here, there = (np.stack(p).astype(int) for p in pictures)
            assert np.abs(here - there).max() <= 1, sampler


def test_the_command_makes_the_same_file_in_every_run_and_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = lambda *args: tiny_ldm.main(["a red circle", "--steps", "3", *args])
    assert make("-n", "3", "--seed", "5", "-o", "x.png") == make("--seed", "6", "-o", "y.png") == 0
    assert run("a red circle", "--steps", 3, "--seed", 6, "-o", "z.png").returncode == 0
    wanted = Path("x-6.png").read_bytes()
    assert Path("y.png").read_bytes() == Path("z.png").read_bytes() == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_five_hundred_pictures_take_no_more_memory_than_one(tiny):
    resident = lambda: (int(Path("/proc/self/statm").read_text().split()[1])
                        * os.sysconf("SC_PAGESIZE"))
    image, mask, used = gradient(32, 32), Image.new("L", (32, 32), 255), []
    for i in range(500):
        more = dict(image=image, mask=mask) if i % 2 else {}
        with tiny.attention() if i % 3 == 0 else contextlib.nullcontext():
            tiny.generate(f"{i} stars", seed=i, steps=2, progress=False, **more,
                          sampler=list(tiny_ldm.SAMPLERS)[i % 8])
        used.append(resident())
    assert max(used[400:]) - max(used[:100]) < 4e6, used[::50]


def test_two_processes_at_once_write_whole_files_into_one_folder(tmp_path):
    calls = [subprocess.Popen([sys.executable, HERE / "tiny_ldm.py", "a red circle", "-n", "4",
                               "--steps", "2", "-o", "x.png", "--film", "f.png"], cwd=tmp_path,
                              stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
             for _ in range(2)]
    assert [call.wait() for call in calls] == [0, 0]
    names = ["f.png", *(f"x-{i}.png" for i in range(4))]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert {Image.open(tmp_path / name).convert("RGB").height for name in names} == {64, 256}


def test_threads_save_into_one_folder_and_generate_with_one_model(tiny, tmp_path):
    make = lambda i: tiny.generate("a red circle", seed=i, steps=3, progress=False)[0].tobytes()
    alone = [make(i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, range(8))) == alone
        list(pool.map(lambda i: tiny.save(tmp_path / f"{i % 4}.safetensors"), range(40)))
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f"{i}.safetensors" for i in range(4)]
    assert all(same_model(f, files[0]) for f in files)


def test_imported_twice_under_two_names(tiny, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("again", HERE / "tiny_ldm.py")
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "again", again)
    spec.loader.exec_module(again)
    tiny.save(tmp_path / "m.safetensors")
    ours, theirs = (module.LatentDiffusion.load(tmp_path / "m.safetensors", "cpu").generate(
        "a", steps=2, progress=False)[0] for module in (tiny_ldm, again))
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_cell_leaves_nothing_behind(tiny, step):
    """Ctrl-C in a notebook raises KeyboardInterrupt wherever the kernel is; then one goes on."""
    settings = dict(steps=4, progress=False, sampler="euler_a")
    wanted = tiny.generate("a red circle", **settings)[0].tobytes()
    calls = []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)     # Python has none where & began it

    block = tiny.unet.mid1
    for watched in (tiny.attention, contextlib.nullcontext):
        calls.clear()
        handle = block.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), watched():
            tiny.generate("a red circle", **settings)
        handle.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.unet.modules())
        assert tiny.generate("a red circle", **settings)[0].tobytes() == wanted
        assert torch.is_grad_enabled()


# --------------------------------------------------------------------------------------------------

def print_table(argv: list[str]) -> None:
    """What the README shows: the table of prompt-following, a row a kind of caption; with the
    options also its pictures."""
    import argparse
    ap = argparse.ArgumentParser(description=print_table.__doc__)
    ap.add_argument("count", type=int, help="captions of each kind")
    ap.add_argument("--weights")
    ap.add_argument("--steps", type=int, default=50)
    ap.add_argument("--sampler", default="ddim")
    ap.add_argument("--guidance-scale", type=float)
    ap.add_argument("--dtype", default="float32")
    ap.add_argument("--seed", type=int, default=10**6, help="of the captions and the pictures")
    ap.add_argument("--free-words", action="store_true", help="tell the model in other words")
    ap.add_argument("--failures", action="store_true", help="also print what was wrong")
    ap.add_argument("--grid", metavar="FILE", help="also draw the first pictures of each kind")
    ap.add_argument("--samplers", metavar="FILE", help="instead compare the samplers, as a plot")
    ap.add_argument("--ways", metavar="FILE", help="instead draw one picture for each way to walk")
    args = ap.parse_args(argv)
    ldm, rows = LatentDiffusion.load(args.weights, dtype=getattr(torch, args.dtype)), []
    if args.samplers:
        return compare_samplers(ldm, args.count, args.samplers)
    if args.ways:
        return draw_ways(ldm, args.ways)
    looks = []
    print("| captions | right |\n|---|---|")
    for kind in KINDS:
        judged = prompt_following(ldm, kind, args.count, args.seed, args.free_words,
                                  steps=args.steps, sampler=args.sampler,
                                  guidance_scale=args.guidance_scale)
        looks += [crispness(image, caption) for image, caption, wrong in judged
                  if not wrong and not parse(caption).relation]
        print(f"| {kind} | {100 * right(judged):.1f} % |", flush=True)
        rows += judged[:6]
        if args.failures:
            print("\n".join(f"    {caption}: {wrong}" for _, caption, wrong in judged if wrong))
    inside, outside, edge = np.mean(looks, axis=0)
    print(f"\nPictures with one colour: its mean error {inside:.1f} of 255 inside the things, "
          f"{outside:.1f} in the background; edges {edge:.1f} pixels wide at 128")
    if args.grid:
        tiny_ldm.grid([labelled(*row) for row in rows], 6).save(args.grid)


def right(judged: list[tuple[Image.Image, str, str]]) -> float:
    return sum(not wrong for _, _, wrong in judged) / len(judged)


def labelled(image: Image.Image, caption: str, wrong: str = "") -> Image.Image:
    """A picture at 128 x 128 with its caption below, and a mark where the judge disagrees."""
    card = Image.new("RGB", (144, 206), "white")
    card.paste(image.resize((128, 128), Image.Resampling.NEAREST), (8, 8))
    pen, font = ImageDraw.Draw(card), ImageFont.load_default(11)
    pen.rectangle((7, 7, 136, 136), outline="lightgrey")
    pen.text((8, 140), "\n".join(textwrap.wrap(caption, 22)), "black", font)
    if wrong:
        pen.text((128, 190), "x", "red", font)
    return card


CALLS = (5, 10, 20, 50)


def compare_samplers(ldm: LatentDiffusion, count: int, file: str) -> None:
    """Prompt-following against network calls for each sampler: a table, and a plot of it."""
    print("| sampler | " + " | ".join(f"{calls} calls" for calls in CALLS) + " |")
    print("|---" * (1 + len(CALLS)) + "|")
    shares = {}
    for sampler in tiny_ldm.SAMPLERS:
        shares[sampler] = []
        for calls in CALLS:         # PLMS calls once more than it steps
            judged = [row for kind in KINDS for row in prompt_following(
                ldm, kind, count, steps=calls - (sampler == "plms"), sampler=sampler)]
            shares[sampler].append(right(judged))
        row = " | ".join(f"{100 * share:.0f} %" for share in shares[sampler])
        print(f"| {sampler} | {row} |", flush=True)
    plot = Image.new("RGB", (640, 340), "white")
    pen, font = ImageDraw.Draw(plot), ImageFont.load_default(13)
    at = lambda i, share: (60 + 130 * i, 300 - 280 * share)
    for share in (0, 0.25, 0.5, 0.75, 1):
        pen.line([at(0, share), at(3, share)], "lightgrey")
        pen.text((10, at(0, share)[1] - 8), f"{100 * share:.0f} %", "black", font)
    for i, calls in enumerate(CALLS):
        pen.text((at(i, 0)[0] - 8, 306), f"{calls}", "black", font)
    pen.text((200, 322), "network calls; captions that the picture shows", "black", font)
    colours = [rgb for name, rgb in COLOURS.items() if name != "white"] + [(140, 140, 140)]
    for n, ((sampler, line), colour) in enumerate(zip(shares.items(), colours)):
        pen.line([at(i, share) for i, share in enumerate(line)], colour, 3)
        pen.rectangle((480, 34 + 22 * n, 494, 40 + 22 * n), colour)
        pen.text((502, 29 + 22 * n), sampler, "black", font)
    plot.save(file)


def draw_ways(ldm: LatentDiffusion, file: str) -> None:
    """One picture for each way to walk, all from seed 3: the samplers, image to image, inpainting,
    a negative prompt."""
    prompt, settings = "a large yellow star on a blue background", dict(seed=3, progress=False)
    cards = []
    for sampler in tiny_ldm.SAMPLERS:
        steps = 200 if sampler == "langevin" else 20
        made, = ldm.generate(prompt, sampler=sampler, steps=steps, **settings)
        cards.append(labelled(made, f"{sampler}, {steps} steps"))
    scene = Scene((Thing("red", "circle"),) * 2)
    image = draw(scene, [(36, 64, 22), (92, 64, 22)], ldm.config.image_size)
    cards.append(labelled(image, "(a picture to begin with)"))
    for strength in (0.5, 0.9):
        made, = ldm.generate("two large green squares", image=image, strength=strength, **settings)
        cards.append(labelled(made, f"two large green squares, strength {strength}"))
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, image.width // 2, image.height))
    made, = ldm.generate("a blue star left of a red circle", image=image, mask=mask, strength=1,
                         **settings)
    cards.append(labelled(made, "a blue star left of a red circle, left half repainted"))
    tiny_ldm.grid(cards, 6).save(file)


if __name__ == "__main__":
    print_golden() if sys.argv[1:] == ["--golden"] else print_table(sys.argv[1:])
