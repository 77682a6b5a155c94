"""The judge: does a picture show what its caption says? It looks at pixels and caption, and at
nothing else. The command measures the built-in model with it:

    python .ci/judge.py 300 --grid weights/samples.png       300 captions of each kind: the README's
                                                             table and its pictures
    python .ci/judge.py 300 --seed 1000000 3000000 4000000   three tables in one, and some pictures
        --failures weights/failures.png                      of what is wrong
    python .ci/judge.py 25 --samplers weights/samplers.png   the samplers, by network calls
    python .ci/judge.py 100 --curve curve.png 1000.safetensors 2000.safetensors
                                                             models on the way, by their step
    python .ci/judge.py 1 --ways weights/ways.png            a picture for each way to walk
    python .ci/judge.py 50 --guidance-experiment             three ways to guide, by their scale
    python .ci/judge.py 75 --attention --check --sampler ddim --steps 20 --seed 3
                                                             does attention fall on what words name?

Steps, sampler and guidance scale are the model's own unless given.
"""
import argparse
import contextlib
import functools
import math
import random
import sys
import textwrap
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny_ldm
from tiny_ldm import (COLOURS, COUNTS, RELATIONS, SHAPE_NAMES, SIZES, LatentDiffusion, Scene, Thing,
                      caption_of, draw, random_scene)


# --------------------------------------------------------------------------------------------------
# What the caption says

def parse_thing(words: list[str]) -> Thing:
    """["small", "red", "star"] or ["red", "star"]."""
    size = None
    if words[0] in SIZES:
        size, *words = words
    colour, shape = words
    return Thing(colour, shape, size)


def parse(caption: str) -> Scene:
    """The grammar backwards: a caption to what it says."""
    text, _, tail = caption.partition(" on a")
    background = tail.removeprefix("n").removesuffix(" background").strip() or None
    words = text.split()
    if words[0] in COUNTS:
        ending = "es" if words[-1] == "crosses" else "s"
        words[-1] = words[-1].removesuffix(ending)
        thing = parse_thing(words[1:])
        return Scene((thing,) * COUNTS[words[0]], None, background)
    for relation in RELATIONS:
        first, found, second = text.partition(f" {relation} ")
        if found:
            things = parse_thing(first.split()[1:]), parse_thing(second.split()[1:])
            return Scene(things, relation, background)
    return Scene((parse_thing(words[1:]),), None, background)


# --------------------------------------------------------------------------------------------------
# What the picture shows

class Found(NamedTuple):
    """A thing in a picture."""
    colour: str
    shape: str
    overlap: float      # with the ideal shape of its size: 1 if they are the same
    radius: float       # in pixels of a picture 128 wide
    x: float
    y: float


def widened(values: np.ndarray) -> np.ndarray:
    """Each pixel of [H, W] takes the largest value among itself and its eight neighbours."""
    height, width = values.shape
    padded = np.pad(values, 1)
    shifted = []
    for i in range(3):
        for j in range(3):
            shifted.append(padded[i : i + height, j : j + width])
    return np.max(shifted, axis=0)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask [H, W] (eight neighbours), as masks, the largest first."""
    numbers = np.arange(1, mask.size + 1).reshape(mask.shape)
    labels = numbers * mask
    while True:           # every pixel takes the largest label around it, until nothing changes
        best = widened(labels) * mask
        if (best == labels).all():
            break
        labels = best
    parts = [labels == label for label in np.unique(labels) if label]
    return sorted(parts, key=np.sum, reverse=True)


def nearest_colour(rgb: np.ndarray) -> str:
    distances = {name: np.abs(rgb - colour).sum() for name, colour in COLOURS.items()}
    return min(distances, key=distances.get)


def ideal_coverage(shape: str, spot: tuple[float, float, float], side: int) -> np.ndarray:
    """How much of each pixel a shape covers: [side, side], 0 to 0.94 (black is not 0)."""
    image = draw(Scene((Thing("black", shape),)), [spot], side)
    return 1 - np.asarray(image)[..., 0].astype(float) / 255


@functools.cache
def moments(shape: str) -> tuple[float, float]:
    """(area, y of the centroid) of a unit shape."""
    r = 40
    rows = ideal_coverage(shape, (64, 64, r), 128).sum(axis=1)
    centroid = (np.arange(128) + 0.5) @ rows / rows.sum()
    return rows.sum() / r**2, (centroid - 64) / r


def fit_shape(coverage: np.ndarray, shape: str) -> tuple[float, float]:
    """How well the coverage [H, W] (0 to 1) of a thing fits a shape of its area and centroid:
    (overlap, radius)."""
    side = len(coverage)
    scale = 128 / side
    area, low = moments(shape)
    total = coverage.sum()
    centres = (np.arange(side) + 0.5) * scale
    r = math.sqrt(total / area) * scale
    x = centres @ coverage.sum(axis=0) / total
    y = centres @ coverage.sum(axis=1) / total - low * r
    ideal = ideal_coverage(shape, (x, y, r), side)
    return np.minimum(ideal, coverage).sum() / np.maximum(ideal, coverage).sum(), r


def look_at(part: np.ndarray, pixels: np.ndarray, ground: np.ndarray) -> Found | None:
    """What a connected part of a picture shows. None: too little to be a thing."""
    side = len(pixels)
    if part.sum() < 0.001 * side * side:
        return None
    contrast = np.abs(pixels - ground).sum(axis=-1)
    strong = part & (contrast >= np.percentile(contrast[part], 50))
    colour = np.median(pixels[strong], axis=0)
    towards = colour - ground
    coverage = (pixels - ground) @ towards / (towards**2).sum()
    coverage = coverage.clip(0, 1) * widened(part)
    ys, xs = np.nonzero(coverage > 0.5)
    if len(xs) < 9:
        return None
    fits = {shape: fit_shape(coverage, shape) for shape in SHAPE_NAMES}
    shape = max(fits, key=fits.get)
    x, y = (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2
    return Found(nearest_colour(colour), shape, *fits[shape], x, y)


def look(image: Image.Image) -> tuple[str, list[Found]]:
    """What is in a picture: (background colour, things)."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    contrast = np.abs(pixels - ground).sum(axis=-1)
    found = [look_at(part, pixels, ground) for part in components(contrast > 60)]
    return nearest_colour(ground), [thing for thing in found if thing is not None]


# --------------------------------------------------------------------------------------------------
# Do they agree?

def judge(image: Image.Image, caption: str) -> str:
    """"" if the picture shows exactly what the caption says; otherwise what is wrong."""
    scene = parse(caption)
    background, found = look(image)
    if background != (scene.background or "white"):
        return f"the background is {background}"
    if len(found) != len(scene.things):
        return f"there are {len(found)} things"
    if scene.relation:                          # it says which of the two is the first
        # Turned so that the first is to the left of the second
        turned = {thing: complex(thing.x, thing.y) / RELATIONS[scene.relation] for thing in found}
        a, b = sorted(found, key=lambda thing: turned[thing].real)
        way = turned[b] - turned[a]
        if way.real <= abs(way.imag):
            return f"nothing is clearly {scene.relation}"
        found = [a, b]
    wrong = [wrong_with(thing, f) for thing, f in zip(scene.things, found)]
    return next(filter(None, wrong), "")


def wrong_with(thing: Thing, found: Found) -> str:
    """"" if what was found is the thing; otherwise what is wrong."""
    if found.colour != thing.colour:
        return f"a {thing.shape} is {found.colour}"
    if found.shape != thing.shape or found.overlap < 0.75:
        return f"a {thing.shape} looks like a {found.shape} ({found.overlap:.2f})"
    is_small = found.radius < 18.5
    if thing.size and is_small != (thing.size == "small"):
        return f"a {thing.size} {thing.shape} has radius {found.radius:.1f}"
    return ""


def alter_one(scene: Scene, rng: random.Random) -> Scene:
    """A scene in which one word may be another: a colour, a shape, a size, the background, the
    relation or the count."""
    first, *rest = scene.things
    things, relation, background = scene.things, scene.relation, scene.background
    what = rng.choice(("colour", "shape", "size", "background", "relation", "count"))
    if what == "background":
        background = rng.choice(list(COLOURS))
    elif what == "relation" and relation and first[:2] != rest[0][:2]:
        relation = rng.choice(list(RELATIONS))
    elif what == "count" and rest and not relation:
        things = (first,) * (5 - len(things))
    elif what in ("colour", "shape") or what == "size" and first.size:
        values = {"colour": list(COLOURS), "shape": SHAPE_NAMES, "size": list(SIZES)}[what]
        first = first._replace(**{what: rng.choice(values)})
        things = (first, *rest) if relation else (first,) * len(things)
    return Scene(things, relation, background)


def altered(scene: Scene, rng: random.Random) -> Scene:
    """A scene that differs in one word. ("On a white background" says nothing new.)"""
    plain = scene._replace(background=scene.background or "white")
    while True:
        other = alter_one(scene, rng)
        if other._replace(background=other.background or "white") != plain:
            return other


# --------------------------------------------------------------------------------------------------
# How well a model follows its prompts

KINDS = {"one thing": ["one"], "two things and their relation": ["two"],
         "two or three of a kind": ["alike"], "held-out": ["one", "two", "alike"]}


class Judged(NamedTuple):
    image: Image.Image
    caption: str
    wrong: str          # "": nothing


def captions_of_kind(kind: str, count: int, seed: int) -> list[str]:
    """Captions to try a model on; "held-out" are those with a (colour, shape) pair that no
    training picture shows, of the other three kinds in turn."""
    rng = random.Random(f"{kind}/{seed}")
    captions = []
    for i in range(count):
        scene_kind = KINDS[kind][i % len(KINDS[kind])]
        scene = random_scene(rng, kind == "held-out", scene_kind)
        captions.append(caption_of(scene))
    return captions


def prompt_following(ldm: LatentDiffusion, kind: str, count: int, seed: int = 10**6,
                     free_words: bool = False, **settings) -> list[Judged]:
    """Pictures of count captions of a kind, judged. free_words: the model is given the caption in
    other words."""
    judged = []
    captions = captions_of_kind(kind, count, seed)
    for i in range(0, count, 25):
        some = captions[i : i + 25]
        prompts = some
        if free_words:
            prompts = [tiny_ldm.rephrase(caption, random.Random(caption)) for caption in some]
        images = ldm.generate(prompts, seed=seed + i, progress=False, **settings)
        for image, caption in zip(images, some):
            judged.append(Judged(image, caption, judge(image, caption)))
    return judged


def right(judged: list[Judged]) -> float:
    """The share of pictures with which nothing is wrong."""
    return sum(not row.wrong for row in judged) / len(judged)


def right_of_all_kinds(ldm: LatentDiffusion, count: int, **settings) -> float:
    """The share of right pictures of count captions of each kind."""
    return right(sum([prompt_following(ldm, kind, count, **settings) for kind in KINDS], []))


def crispness(image: Image.Image, caption: str) -> tuple[float, float, float]:
    """How a picture of things of one colour looks: (mean error of the colour inside the things, and
    of that of the background, in levels of 255; width of the edges in pixels of a picture 128
    wide: where the coverage is from 10 to 90 %, over the length of the outline)."""
    scene = parse(caption)
    pixels = np.asarray(image.convert("RGB")).astype(float)
    ground = np.array(COLOURS[scene.background or "white"])
    colour = np.array(COLOURS[scene.things[0].colour])
    towards = colour - ground
    coverage = (pixels - ground) @ towards / (towards**2).sum()
    thing = coverage > 0.5
    inside, near = ~widened(~thing), widened(widened(thing))
    edge = (coverage > 0.1) & (coverage < 0.9) & near
    # Steps along rows and columns make a line longer by 4/π, on average over its directions
    steps = np.diff(thing, axis=0).sum() + np.diff(thing, axis=1).sum()
    width = edge.sum() / (steps * math.pi / 4)
    inner = np.abs(pixels - colour)[inside].mean() if inside.any() else 0.0
    outer = np.abs(pixels - ground)[~near].mean() if not near.all() else 0.0
    return inner, outer, width * 128 / len(pixels)


# --------------------------------------------------------------------------------------------------
# Does attention fall on what the words name?

@contextlib.contextmanager
def attention_maps(unet: tiny_ldm.UNet) -> Iterator[list[torch.Tensor]]:
    """Collects, while it lasts, where each place looks: for every call of every cross-attention a
    map [B, L, h, w], the mean over its heads. Over the tokens it sums to 1."""
    maps = []

    def keep(attention, inputs, output):
        x, context = inputs                                       # [B, N, C], [B, L, D]
        q = attention.split_heads(attention.to_q(x))              # [B, heads, N, d]
        k = attention.split_heads(attention.to_k(context))        # [B, heads, L, d]
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        weights = scores.softmax(dim=-1).mean(dim=1)              # [B, N, L]
        side = math.isqrt(x.shape[1])
        maps.append(weights.transpose(1, 2).unflatten(2, (side, side)))

    hooks = []
    for module in unet.modules():
        if isinstance(module, tiny_ldm.TransformerBlock):
            hooks.append(module.cross_attention.register_forward_hook(keep))
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def places_of(words: set[str], prompt: str, tokenizer: tiny_ldm.Tokenizer) -> list[int]:
    """Which of the L tokens are pieces of these words."""
    encoding = tokenizer.backend.encode(prompt)
    places = []
    for place, word in enumerate(encoding.word_ids, start=1):     # 0 is BOS
        start, end = encoding.word_to_chars(word)
        if prompt[start:end] in words:
            places.append(place)
    return places


def attention_on_things(ldm: LatentDiffusion, count: int, seed: int, **settings) -> list[float]:
    """For pictures of one thing: of the attention to the thing's words, how much falls on it, over
    its share of the area. Pictures that show something else do not count."""
    captions = captions_of_kind("one thing", count, seed)
    ratios = []
    for i in range(0, count, 25):
        some = captions[i : i + 25]
        with attention_maps(ldm.unet) as maps:
            pictures = ldm.generate(some, seed=seed + i, progress=False, **settings)
        # With guidance the negative prompts come first, then the prompts
        size = maps[0].shape[2:]
        own = [m[-len(some) :].float().cpu() for m in maps]
        equal = [F.interpolate(m, size, mode="bilinear") for m in own]
        heat = F.interpolate(sum(equal), pictures[0].size, mode="bicubic")    # [B, L, H, W]
        for row, picture, caption in zip(heat, pictures, some):
            if judge(picture, caption):
                continue
            thing = parse(caption).things[0]
            places = places_of({thing.colour, thing.shape}, caption, ldm.tokenizer)
            on_words = row[places].mean(dim=0).numpy()
            distance = np.abs(np.asarray(picture).astype(float) - COLOURS[thing.colour]).sum(-1)
            inside = distance < 90
            ratios.append(on_words[inside].sum() / on_words.sum() / inside.mean())
    return ratios


# --------------------------------------------------------------------------------------------------
# The command

def labelled(image: Image.Image, text: str, wrong: str = "", height: int = 206) -> Image.Image:
    """A picture at 128 x 128 with a text below, and a mark if anything is wrong with it."""
    card = Image.new("RGB", (144, height), "white")
    card.paste(image.resize((128, 128), Image.Resampling.NEAREST), (8, 8))
    pen, font = ImageDraw.Draw(card), ImageFont.load_default(11)
    pen.rectangle((7, 7, 136, 136), outline="lightgrey")
    pen.text((8, 140), "\n".join(textwrap.wrap(text, 22)), "black", font)
    if wrong:
        pen.text((128, height - 16), "x", "red", font)
    return card


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row by row."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(images) / columns)), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def print_row(*cells: str) -> None:
    """Prints a row of a table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def print_head(*names: str) -> None:
    print_row(*names)
    print("|---" * len(names) + "|")


def table(ldm: LatentDiffusion, args: argparse.Namespace, settings: dict) -> None:
    """Prompt-following, a row per kind of caption, and how crisp the pictures are."""
    first, failures, looks = [], [], []
    seeds = [f"seed {seed}" for seed in args.seed] if len(args.seed) > 1 else []
    print_head("captions", *seeds, "right")
    for kind in KINDS:
        runs = [prompt_following(ldm, kind, args.count, seed, args.free_words, **settings)
                for seed in args.seed]
        judged = sum(runs, [])
        shares = [right(run) for run in runs if seeds] + [right(judged)]
        print_row(kind, *[f"{100 * share:.1f} %" for share in shares])
        first += judged[:6]
        failures += [one for one in judged if one.wrong][:3]
        for one in judged:
            if not one.wrong and not parse(one.caption).relation:
                looks.append(crispness(one.image, one.caption))
    inside, outside, edge = np.mean(looks, axis=0) if looks else [math.nan] * 3
    print(f"\nPictures with one colour: its mean error {inside:.1f} of 255 inside the things, "
          f"{outside:.1f} in the background; edges {edge:.1f} pixels wide at 128")
    if args.grid:
        grid([labelled(*row) for row in first], 6).save(args.grid)
    if args.failures and failures:
        cards = [labelled(one.image, f"{one.caption}: {one.wrong}", height=240)
                 for one in failures]
        grid(cards, 6).save(args.failures)


CALLS = (5, 10, 20, 50)
# The others are Stable Diffusion XL's and Turbo's choices of timesteps
WALKS = [name for name in tiny_ldm.SAMPLERS if not name.endswith(("leading", "trailing", "lcm"))]


def compare_samplers(ldm: LatentDiffusion, count: int, file: str, settings: dict) -> None:
    """Prompt-following by network calls for each sampler: a table, and a plot of it."""
    print_head("sampler", *[f"{calls} calls" for calls in CALLS])
    lines = {}
    for sampler in WALKS:
        lines[sampler] = []
        for calls in CALLS:
            steps = calls - 1 if sampler == "plms" else calls     # it makes one call more
            settings.update(steps=steps, sampler=sampler)
            share = right_of_all_kinds(ldm, count, **settings)
            lines[sampler].append(share)
        print_row(sampler, *[f"{100 * share:.0f} %" for share in lines[sampler]])
    plot(lines, CALLS, "network calls").save(file)


def loss_on_new_pictures(ldm: LatentDiffusion) -> float:
    """The loss of stage 2 on 512 pictures of another seed than the training's, always the same."""
    data = tiny_ldm.ShapesData(ldm.config.image_size, seed=1)
    trainer = tiny_ldm.Trainer(ldm, data, Path(), seed=1, dtype=torch.float32, save_minutes=0,
                               checkpoint={})
    return trainer.second_stage(batch=512, step=0).item()


def compare_models(files: list[str], args: argparse.Namespace, settings: dict) -> None:
    """Prompt-following and loss of models that are named by their step: a table, and a plot of
    it."""
    print_head("step", *KINDS, "loss")
    lines = {name: [] for name in (*KINDS, "loss (100 %: 1)")}
    for path in files:
        ldm = LatentDiffusion.load(path, dtype=getattr(torch, args.dtype))
        shares = [right(prompt_following(ldm, kind, args.count, **settings)) for kind in KINDS]
        loss = loss_on_new_pictures(ldm.float())
        for line, value in zip(lines.values(), (*shares, loss)):
            line.append(value)
        cells = [f"{100 * share:.0f} %" for share in shares]
        print_row(Path(path).stem, *cells, f"{loss:.4f}")
    picture = plot(lines, [Path(path).stem for path in files], "steps of training")
    picture.save(args.curve[0])


def plot(lines: dict[str, list[float]], ticks: Sequence, axis: str) -> Image.Image:
    """The share of right pictures at each tick, a line per name."""
    width, font = 390 / max(1, len(ticks) - 1), ImageFont.load_default(13)
    longest = max(font.getlength(name) for name in lines)
    picture = Image.new("RGB", (512 + math.ceil(longest), 340), "white")
    pen = ImageDraw.Draw(picture)
    for percent in (0, 25, 50, 75, 100):
        y = 300 - 2.8 * percent
        pen.line([60, y, 450, y], "lightgrey")
        pen.text((10, y - 8), f"{percent} %", "black", font)
    for i, tick in list(enumerate(ticks))[:: math.ceil(45 / width)]:
        pen.text((60 + width * i, 306), f"{tick}", "black", font, anchor="ma")
    pen.text((255, 322), f"{axis}; captions that the picture shows", "black", font, anchor="ma")
    colours = [rgb for name, rgb in COLOURS.items() if name != "white"] + [(140, 140, 140)]
    for n, (name, shares) in enumerate(lines.items()):
        points = [(60 + width * i, 300 - 280 * share) for i, share in enumerate(shares)]
        top = 34 + 22 * n
        pen.line(points, colours[n], 3)
        pen.rectangle((480, top, 494, top + 6), colours[n])
        pen.text((502, top - 5), name, "black", font)
    return picture


GUIDANCE_SCALES = (2, 3, 5, 7.5, 10)
WAYS_TO_GUIDE = {"plain": {}, "at σ from 1 to 5": dict(low=1, high=5), "rescaled": dict(phi=0.7)}


def guided(predict_eps, x: torch.Tensor, t: float, alpha_bar: float, *, texts: list,
           guidance_scale: float, low: float = 0, high: float = math.inf, phi: float = 0, **_):
    """In place of a model's predict_eps: guidance only at σ from low to high (Kynkäänniemi et al.
    2024, arXiv:2404.07724), or with the guided v brought back, by the share phi, to the spread of
    the unguided one (Lin et al. 2023, arXiv:2305.08891, section 3.4)."""
    ask = functools.partial(predict_eps, x, t, alpha_bar, guidance_scale=1.0)
    own = ask(texts=texts[1:])
    if not low <= tiny_ldm.sigma_of(alpha_bar) <= high:
        return own
    eps = tiny_ldm.guide(ask(texts=texts[:1]), own, guidance_scale)
    own_v = tiny_ldm.v_target(tiny_ldm.x0_from_eps(x, own, alpha_bar), own, alpha_bar)
    v = tiny_ldm.v_target(tiny_ldm.x0_from_eps(x, eps, alpha_bar), eps, alpha_bar)
    ratio = own_v.std(dim=(1, 2, 3), keepdim=True) / v.std(dim=(1, 2, 3), keepdim=True)
    return tiny_ldm.eps_from_v(x, (phi * ratio + 1 - phi) * v, alpha_bar)


def compare_guidance(ldm: LatentDiffusion, count: int, settings: dict) -> None:
    """Prompt-following by the guidance scale, a row per way to guide."""
    print_head("guidance", *[f"{scale:g}" for scale in GUIDANCE_SCALES])
    predict_eps = ldm.predict_eps
    for name, way in WAYS_TO_GUIDE.items():
        ldm.predict_eps = functools.partial(guided, predict_eps, **way)
        cells = [name]
        for scale in GUIDANCE_SCALES:
            settings["guidance_scale"] = scale
            cells.append(f"{100 * right_of_all_kinds(ldm, count, **settings):.1f} %")
        print_row(*cells)


def draw_ways(ldm: LatentDiffusion, file: str) -> None:
    """One picture for each way to walk, all from seed 3: the samplers, image to image,
    inpainting."""
    prompt = "a large yellow star on a blue background"
    cards = []
    for sampler in WALKS:
        steps = 200 if sampler == "langevin" else 20
        made, = ldm.generate(prompt, sampler=sampler, steps=steps, seed=3, progress=False)
        cards.append(labelled(made, f"{sampler}, {steps} steps"))
    scene = Scene((Thing("red", "circle"),) * 2)
    image = draw(scene, [(36, 64, 22), (92, 64, 22)], ldm.config.image_size)
    cards.append(labelled(image, "(a picture to begin with)"))
    prompt = "two large green squares"
    for strength in (0.5, 0.9):
        made, = ldm.generate(prompt, image=image, strength=strength, seed=3, progress=False)
        cards.append(labelled(made, f"{prompt}, strength {strength}"))
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, image.width // 2, image.height))
    prompt = "a blue star left of a red circle"
    made, = ldm.generate(prompt, image=image, mask=mask, strength=1, seed=3, progress=False)
    cards.append(labelled(made, f"{prompt}, left half repainted"))
    grid(cards, 6).save(file)


def main(argv: list[str] | None = None) -> int:
    """Prints what the arguments ask for; 1 if --check finds it wrong."""
    parser = argparse.ArgumentParser(description="Measures how well a model follows its prompts.")
    add = parser.add_argument
    add("count", type=int, help="captions of each kind")
    add("--weights")
    add("--steps", type=int)
    add("--sampler")
    add("--guidance-scale", type=float)
    add("--dtype", default="float32")
    add("--seed", type=int, nargs="+", default=[10**6],
        help="of the captions and the pictures; several: each, and all together")
    add("--free-words", action="store_true", help="give the model the captions in other words")
    add("--failures", metavar="FILE", help="also draw the first three of each kind that are wrong")
    add("--grid", metavar="FILE", help="also draw the first pictures of each kind")
    add("--samplers", metavar="FILE", help="instead compare the samplers, as a plot")
    add("--curve", metavar="FILE", nargs="+",
        help="instead compare models on the way, as a plot; first the plot's name")
    add("--ways", metavar="FILE", help="instead draw one picture for each way to walk")
    add("--guidance-experiment", action="store_true", help="instead compare ways to guide")
    add("--attention", action="store_true", help="instead see if attention follows the words")
    add("--check", action="store_true", help="with --attention: exit with 1 below 3")
    args = parser.parse_args(argv)
    settings = dict(steps=args.steps, sampler=args.sampler, guidance_scale=args.guidance_scale)
    given = dict(settings, seed=args.seed[0], free_words=args.free_words)
    if args.curve:
        compare_models(args.curve[1:], args, given)
        return 0
    ldm = LatentDiffusion.load(args.weights, dtype=getattr(torch, args.dtype))
    if args.samplers:
        compare_samplers(ldm, args.count, args.samplers, given)
    elif args.ways:
        draw_ways(ldm, args.ways)
    elif args.guidance_experiment:
        compare_guidance(ldm, args.count, given)
    elif args.attention:
        ratios = []
        for seed in args.seed:
            ratios += attention_on_things(ldm, args.count, seed, **settings)
        print(f"Of the attention to a thing's words {np.mean(ratios):.2f} times as much falls on "
              f"it as its share of the area ({len(ratios)} pictures)")
        return int(args.check and not np.mean(ratios) >= 3)
    else:
        table(ldm, args, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
