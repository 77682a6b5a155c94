"""weights_convert: official Stable Diffusion 1.x checkpoints to tiny_ldm weights files, and back.

    python weights_convert.py v1-5-pruned-emaonly.ckpt --tokenizer bpe_simple_vocab_16e6.txt.gz
    python weights_convert.py stable-diffusion-v1-5/stable-diffusion-v1-5
    python weights_convert.py --to official FILE -o OUT.safetensors

SOURCE is an original file (.ckpt, .safetensors), a diffusers folder, or the id of a hub repository.
All hold the same numbers under other names. There are a thousand names and a few rules: `bricks`
walks through the networks and says what each part is called in ours, in the original ("official")
and in diffusers' files; the small tables before it say the same for the layers inside a part.
"""
from __future__ import annotations

import argparse
import ctypes
import functools
import gzip
import hashlib
import json
import mmap
import os
import re
import shutil
import signal
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

if __name__ == "__main__":       # as in tiny_ldm.py
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import tokenizers
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

import tiny_ldm
from tiny_ldm import (BOS, EOS, SD1, SD1_INPAINT, ArgumentParser, Config, InputError,
                      LatentDiffusion, TextConfig, backend_from_json, blaming, check_config,
                      clip_backend, misfit, read_text, read_weights, regular, write_whole)

# %% 1. The map
# --------------------------------------------------------------------------------------------------
# Our name of a layer -> "official|diffusers", or one word where both say the same. Several names
# are one matrix in ours, their rows stacked: the fused q, k, v.

UNET_RES = {"norm1": "in_layers.0|norm1", "conv1": "in_layers.2|conv1",
            "emb": "emb_layers.1|time_emb_proj", "norm2": "out_layers.0|norm2",
            "conv2": "out_layers.3|conv2", "skip": "skip_connection|conv_shortcut"}
VAE_RES = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2",
           "skip": "nin_shortcut|conv_shortcut"}
# In official files these are 1x1 convolutions, [o, i, 1, 1]; in ours they are linear, [o, i].
VAE_ATTENTION = {"attention.qkv": "q k v|to_q to_k to_v", "attention.out": "proj_out|to_out.0"}
PROJECTIONS = {"proj_in": "proj_in", "proj_out": "proj_out"}
BLOCK = "transformer_blocks.0"
TRANSFORMER = {
    "norm": "norm", **{f"norm{i}": f"{BLOCK}.norm{i}" for i in (1, 2, 3)},
    "self_attention.qkv": f"{BLOCK}.attn1.to_q {BLOCK}.attn1.to_k {BLOCK}.attn1.to_v",
    "self_attention.out": f"{BLOCK}.attn1.to_out.0", "cross_attention.q": f"{BLOCK}.attn2.to_q",
    "cross_attention.kv": f"{BLOCK}.attn2.to_k {BLOCK}.attn2.to_v",
    "cross_attention.out": f"{BLOCK}.attn2.to_out.0",
    "feed_forward.proj": f"{BLOCK}.ff.net.0.proj", "feed_forward.out": f"{BLOCK}.ff.net.2"}
TEXT_LAYER = {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
              "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
              "attention.out": "self_attn.out_proj"}
VAE_NORM = {"norm": "norm|group_norm"}
UNET_ENDS = {"time1": "time_embed.0|time_embedding.linear_1", "conv_in": "input_blocks.0.0|conv_in",
             "time2": "time_embed.2|time_embedding.linear_2", "norm_out": "out.0|conv_norm_out",
             "conv_out": "out.2|conv_out"}
VAE_ENDS = {"conv_in": "conv_in", "norm_out": "norm_out|conv_norm_out", "conv_out": "conv_out"}
TEXT_ENDS = {"token_embedding": "embeddings.token_embedding", "norm": "final_layer_norm",
             "position_embedding": "embeddings.position_embedding"}
QUANT = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

UNET, VAE = "model.diffusion_model", "first_stage_model"
TEXT = "cond_stage_model.transformer.text_model"
Brick = tuple[dict[str, str], str, str, str]    # table, our prefix, official prefix, diffusers'


def bricks(c: Config) -> Iterator[Brick]:
    """Every part of a model."""
    yield UNET_ENDS, "unet", UNET, "unet"
    yield from unet_bricks(c)
    for side in ("encoder", "decoder"):
        yield VAE_ENDS, f"vae.{side}", f"{VAE}.{side}", f"vae.{side}"
        for i, official in ((0, "block_1"), (2, "block_2")):
            yield (VAE_RES, f"vae.{side}.mid.{i}", f"{VAE}.{side}.mid.{official}",
                   f"vae.{side}.mid_block.resnets.{i // 2}")
        for table in (VAE_NORM, VAE_ATTENTION):
            yield (table, f"vae.{side}.mid.1", f"{VAE}.{side}.mid.attn_1",
                   f"vae.{side}.mid_block.attentions.0")
    yield from vae_bricks(c)
    yield QUANT, "vae", VAE, "vae"
    yield TEXT_ENDS, "text_encoder", TEXT, "text_encoder"
    for i in range(c.text.num_layers):
        yield (TEXT_LAYER, f"text_encoder.layers.{i}", f"{TEXT}.encoder.layers.{i}",
               f"text_encoder.encoder.layers.{i}")


def unet_bricks(c: Config) -> Iterator[Brick]:
    """Levels and blocks in ours and in diffusers; the original counts through. On the way down it
    counts each Downsample as a block; on the way up an Upsample belongs to the block before it."""
    levels, depth, i = len(c.unet.channel_mult), c.unet.num_res_blocks, 1
    for level in range(levels):
        ours, theirs = f"unet.down.{level}", f"unet.down_blocks.{level}"
        for b in range(depth):
            at = f"{UNET}.input_blocks.{i}"
            yield UNET_RES, f"{ours}.blocks.{b}.res", f"{at}.0", f"{theirs}.resnets.{b}"
            if c.unet.attention[level]:
                for table in (TRANSFORMER, PROJECTIONS):
                    yield (table, f"{ours}.blocks.{b}.transformer", f"{at}.1",
                           f"{theirs}.attentions.{b}")
            i += 1
        if level < levels - 1:
            yield ({"conv": "op|conv"}, f"{ours}.resample", f"{UNET}.input_blocks.{i}.0",
                   f"{theirs}.downsamplers.0")
            i += 1
    for ours, i in (("unet.mid1", 0), ("unet.mid2", 1)):
        yield (UNET_RES, f"{ours}.res", f"{UNET}.middle_block.{2 * i}",
               f"unet.mid_block.resnets.{i}")
    for table in (TRANSFORMER, PROJECTIONS):
        yield (table, "unet.mid1.transformer", f"{UNET}.middle_block.1",
               "unet.mid_block.attentions.0")
    for j, level in enumerate(reversed(range(levels))):
        ours, theirs, attention = f"unet.up.{j}", f"unet.up_blocks.{j}", c.unet.attention[level]
        for b in range(depth + 1):
            at = f"{UNET}.output_blocks.{j * (depth + 1) + b}"
            yield UNET_RES, f"{ours}.blocks.{b}.res", f"{at}.0", f"{theirs}.resnets.{b}"
            if attention:
                for table in (TRANSFORMER, PROJECTIONS):
                    yield (table, f"{ours}.blocks.{b}.transformer", f"{at}.1",
                           f"{theirs}.attentions.{b}")
        if level > 0:
            yield ({"conv": "conv"}, f"{ours}.resample", f"{at}.{2 if attention else 1}",
                   f"{theirs}.upsamplers.0")


def vae_bricks(c: Config) -> Iterator[Brick]:
    """Careful, the original decoder counts its levels by resolution: its up.3 comes first."""
    levels = len(c.vae.channel_mult)
    for side, way in (("encoder", "down"), ("decoder", "up")):
        for j in range(levels):
            ours, theirs = f"vae.{side}.{way}.{j}", f"vae.{side}.{way}_blocks.{j}"
            at = f"{VAE}.{side}.{way}.{j if way == 'down' else levels - 1 - j}"
            for b in range(c.vae.num_res_blocks + (way == "up")):
                yield VAE_RES, f"{ours}.blocks.{b}", f"{at}.block.{b}", f"{theirs}.resnets.{b}"
            if j < levels - 1:
                yield ({"conv": "conv"}, f"{ours}.resample", f"{at}.{way}sample",
                       f"{theirs}.{way}samplers.0")


class Entry(NamedTuple):
    """Where a tensor of ours comes from."""
    shape: tuple[int, ...]
    official: list[str]           # several: stacked
    diffusers: list[str]
    conv: bool                    # two more dimensions in official files


@functools.cache
def name_map(c: Config) -> dict[str, Entry]:
    """Every tensor name of ours -> Entry."""
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LatentDiffusion(c, None).named_parameters()}
    out = {}
    for table, ours, *prefixes in bricks(c):
        for layer, words in table.items():
            official, _, diffusers = words.partition("|")
            for kind in ("weight", "bias"):
                name = f"{ours}.{layer}.{kind}"
                if name in shapes:      # not every layer has a bias, nor every ResBlock a skip
                    names = ([f"{prefix}.{word}.{kind}" for word in theirs.split()]
                             for prefix, theirs in zip(prefixes, (official, diffusers or official)))
                    conv = kind == "weight" and table in (VAE_ATTENTION, PROJECTIONS)
                    out[name] = Entry(shapes[name], *names, conv)
    assert out.keys() == shapes.keys(), sorted(shapes.keys() ^ out.keys())[:3]
    return out


# %% 2. Reading
# --------------------------------------------------------------------------------------------------
# A checkpoint is mapped into memory, not read: its tensors are touched one by one, when written.

KNOWN = {   # by sha256; of the first three the size is known only roughly
    "86cd1d3ccb044d7ba8db743d717c9bac603c4043508ad2571383f954390f3cea": "sd-v1-1.ckpt",
    "3b87d30facd5bafca1cbed71cfb86648aad75d1c264663c0cc78c7aea8daec0d": "sd-v1-2.ckpt",
    "2cff93af4dcc07c3e03110205988ff98481e86539c51a8098d4f2236e41f7f2f": "sd-v1-3.ckpt",
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": "sd-v1-4.ckpt",
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": "v1-5-pruned-emaonly.ckpt",
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa":
        "v1-5-pruned-emaonly.safetensors",
    "e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053": "v1-5-pruned.ckpt",
    "1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6": "v1-5-pruned.safetensors",
    "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19": "sd-v1-5-inpainting.ckpt"}
KNOWN_SIZES = ((4_265_000_000, 4_275_000_000), (7_703_000_000, 7_704_000_000))

# Classes that training frameworks leave in checkpoints. They are made inert; any other is refused.
INERT = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.")
# Beside the networks in official files: the schedule, which tiny_ldm computes.
TABLES = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
          "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
          "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
          "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")
# CLIP's last layer, which compares texts with pictures; Stable Diffusion does not use it.
PROJECTION = r"cond_stage_model\.(transformer\.)?(logit_scale|text_projection(\.weight)?)"


def recognised(path: Path) -> str | None:
    """The name of an official file, by size and sha256; None for any other."""
    size = path.stat().st_size
    if not any(low <= size <= high for low, high in KNOWN_SIZES):
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file, tqdm(None, "sha256", size, unit="B", unit_scale=True) as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return KNOWN.get(digest.hexdigest())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises InputError."""
    try:
        with open(regular(path), "rb") as file:
            head = file.read(512)
    except OSError as e:
        raise InputError(f"{path} can't be opened ({e.strerror or e}); check the path") from None
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-LFS pointer, not the file; fetch it: git lfs pull")
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"{path} is an HTML page, not a checkpoint: the download wants a log-in "
                         "or has moved; get it again")
    if not head:
        raise InputError(f"{path} is empty; get it again")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    with (blaming(f"{path} is no whole .safetensors file", "get it again"),
          safe_open(path, framework="pt") as file):
        return {name: file.get_tensor(name) for name in file.keys()}


def inert(name: str) -> type:
    """A class that takes whatever a pickle gives it and does nothing."""
    ignore = lambda self, *args, **kwargs: None
    return type(name, (), {"__init__": ignore, "__setstate__": ignore})


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A .ckpt or .bin: a zip with a pickle in it. A pickle is a program; torch's reader runs only
    the few instructions that make tensors and plain values, and refuses names it does not know."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is neither a .safetensors nor a whole .ckpt (a zip, as torch "
                         "writes it since 1.6); get it again")
    with blaming(f"{path} is damaged", "get it again"):
        with zipfile.ZipFile(path) as archive:        # torch writes them so; a bomb is not
            if any(entry.compress_type for entry in archive.infolist()):
                raise ValueError("it is compressed")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in names if not name.startswith(INERT)]
        if refused:
            raise InputError(f"{path} asks for {', '.join(refused[:3])}, which no checkpoint "
                             "needs; refused, and nothing in it has run; get it from a source you "
                             "trust")
        stand_ins = [(inert(name.rsplit(".")[-1]), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        found = found.get("state_dict", found)
        # detach: a pickle may hang anything on a tensor, also in place of its methods
        return {str(name): Tensor.detach(t) for name, t in found.items() if isinstance(t, Tensor)}


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder, as unet.*, vae.* and text_encoder.*."""
    tensors = {}
    for part in ("unet", "vae", "text_encoder"):
        names = part_files(part)
        path = next((folder / name for name in names if (folder / name).exists()), None)
        if path is None:
            raise InputError(f"{folder} lacks {', '.join(names)}: is it a diffusers folder?")
        for name, t in read_tensors(path).items():
            name = name.removeprefix("text_model.")
            if part == "vae":                          # the names before diffusers 0.15
                for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"),
                                 ("proj_attn", "to_out.0")):
                    name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
            tensors[f"{part}.{name}"] = t
    return tensors


def read_official(path: Path) -> dict[str, Tensor]:
    """A single file's tensors by their official names. Some programs that save fine-tunes spell
    those of the text encoder and of the VAE's attention otherwise."""
    spellings = ((r"^(cond_stage_model\.transformer)\.(?=embeddings|encoder|final_layer_norm)",
                  r"\1.text_model."),
                 (r"(\.mid\.attn_1)\.to_([qkv])\.", r"\1.\2."),
                 (r"(\.mid\.attn_1)\.to_out\.0\.", r"\1.proj_out."))
    tensors = {}
    for name, t in read_tensors(path).items():
        for theirs, official in spellings:
            name = re.sub(theirs, official, name)
        if name in tensors:
            raise InputError(f"{path} holds {name} twice, by two names; get it again")
        tensors[name] = t
    return tensors


def part_files(part: str) -> list[str]:
    """The names that a part's file may have in a diffusers folder, the best first."""
    stems = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
    if part == "text_encoder":
        stems = {"safetensors": "model", "bin": "pytorch_model"}
    return [f"{part}/{stem}{v}.{end}" for v in ("", ".fp16") for end, stem in stems.items()]


def download(repository: str) -> Path:
    """A hub repository as a diffusers folder, in huggingface_hub's cache."""
    from huggingface_hub import HfApi, snapshot_download
    with blaming(f"{repository} can't be had from the hub",
                 "check name and network, or pass a file"):
        files = HfApi().list_repo_files(repository)
        wanted = [next((n for n in part_files(part) if n in files), None)
                  for part in ("unet", "vae", "text_encoder")]
        if None in wanted:
            raise InputError(f"{repository} holds no diffusers folder; download one file and pass "
                             "it: " + ", ".join(f for f in files if "." in f)[:200])
        return Path(snapshot_download(repository, allow_patterns=[*wanted, "tokenizer/*",
                                                                "scheduler/*"]))


# %% 3. The tokenizer
# --------------------------------------------------------------------------------------------------

WHAT_TO_PASS = ("pass --tokenizer with bpe_simple_vocab_16e6.txt.gz, a folder with vocab.json and "
                "merges.txt, or a tokenizer.json")


def read_tokenizer(source: Path) -> tokenizers.Tokenizer:
    """CLIP's vocabulary from any of the three forms. Raises InputError."""
    with blaming(f"{source} is no CLIP vocabulary", WHAT_TO_PASS):
        if (source / "vocab.json").exists():
            lines = read_text(source / "merges.txt").splitlines()
            vocab = json.loads(read_text(source / "vocab.json"))
            return clip_backend(vocab, pairs(lines[lines[0].startswith("#version") :]))
        if source.is_dir():
            source = source / "tokenizer.json"
        if source.suffix == ".json":
            return backend_from_json(read_text(source))
        with (gzip.open if source.suffix == ".gz" else open)(regular(source), "rb") as file:
            text = file.read(2**24).decode()        # the true one has 3 MB
        merges = pairs(text.split("\n")[1 : 48894 + 1])
        # OpenAI's order of the 256 byte symbols: printable ones, then the others, shifted by 256.
        printable = [b for b in range(256) if chr(b).isprintable() and chr(b) not in " \xa0"]
        symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
        merged = ["".join(pair) for pair in merges]
        words = [*symbols, *(s + "</w>" for s in symbols), *merged, BOS, EOS]
        return clip_backend({word: i for i, word in enumerate(words)}, merges)


def pairs(lines) -> list[tuple[str, str]]:
    return [tuple(line.split()) for line in lines if line.strip()]


def find_tokenizer(given: str | None, folder: Path | None) -> tokenizers.Tokenizer:
    """The one given; or the folder's; or the hub's."""
    if given is not None:
        return read_tokenizer(Path(given))
    if folder and (folder / "tokenizer").is_dir():
        return read_tokenizer(folder / "tokenizer")
    from huggingface_hub import hf_hub_download
    with blaming("no vocabulary: the hub can't be reached", WHAT_TO_PASS):
        path = hf_hub_download("openai/clip-vit-large-patch14", "tokenizer.json")
    return read_tokenizer(Path(path))


# %% 4. Converting
# --------------------------------------------------------------------------------------------------

def config_of(tensors: dict[str, Tensor], official: bool) -> Config:
    """SD1 or SD1_INPAINT with the widths that the tensors have: a fine-tune's are the same, a
    test's are smaller. Raises InputError."""
    def shape(part: str, name: str) -> tuple[int, ...]:
        entry = name_map(SD1)[f"{part}.{name}.weight"]
        theirs = (entry.official if official else entry.diffusers)[0]
        if theirs not in tensors:
            raise InputError(f"lacks {theirs}")
        return tuple(tensors[theirs].shape)

    conv_in, vae = shape("unet", "conv_in"), shape("vae", "encoder.conv_in")
    if conv_in[1] not in (SD1.unet.in_channels, SD1_INPAINT.unet.in_channels):
        raise InputError(f"has {conv_in[1]} input channels rather than 4 (or 9, to repaint)")
    vocab_size, width = shape("text_encoder", "token_embedding")
    length = shape("text_encoder", "position_embedding")[0]
    layers = {n for n in tensors if re.search(r"encoder\.layers\.\d+\.layer_norm1\.weight$", n)}
    text = TextConfig(vocab_size, length, width, len(layers), num_heads=max(1, width // 64))
    return like_sd1(conv_in[1], conv_in[0], vae[0], text)


def as_scheduled(config: Config, folder: Path) -> Config:
    """The config with what a diffusers folder says of the U-Net's training, which its tensors do
    not show: the schedule of the noise, and whether it puts out ε or v. Raises InputError."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.exists():
        return config
    with blaming(f"{file} is no schedule that tiny_ldm knows", "get another model, or the file "
                 "again"):
        found, s = json.loads(read_text(file)), config.schedule
        predictions = {"epsilon": "eps", "v_prediction": "v"}
        for name, known in (("prediction_type", (*predictions,)),
                            ("beta_schedule", ("scaled_linear",)), ("trained_betas", (None,)),
                            ("rescale_betas_zero_snr", (False,)),
                            ("num_train_timesteps", (s.num_timesteps,))):
            if found.get(name, known[0]) not in known:
                raise ValueError(f"{name} is {found[name]!r}")
        config = replace(
            config, prediction=predictions[found.get("prediction_type", "epsilon")],
            schedule=replace(s, beta_start=found.get("beta_start", s.beta_start),
                             beta_end=found.get("beta_end", s.beta_end)))
        check_config(config)
    return config


def like_sd1(in_channels: int, unet_channels: int, vae_channels: int, text: TextConfig) -> Config:
    base = SD1_INPAINT if in_channels == SD1_INPAINT.unet.in_channels else SD1
    return replace(base, text=text, vae=replace(base.vae, channels=vae_channels),
                   unet=replace(base.unet, channels=unet_channels))


def refuse_others(tensors: dict[str, Tensor], source: str) -> None:
    """Names what is not Stable Diffusion 1.x."""
    marks = {"a LoRA, which changes a checkpoint and is none": r"lora_|\.lora\.",
             "Stable Diffusion XL": r"^conditioner\.|^unet\.add_embedding\.",
             "Stable Diffusion 2.x": r"^cond_stage_model\.model\."}
    kinds = [kind for kind, mark in marks.items() if any(re.search(mark, n) for n in tensors)]
    embedding = tensors.get("text_encoder.embeddings.token_embedding.weight")
    if embedding is not None and embedding.shape[1:] == (1024,):
        kinds = ["Stable Diffusion 2.x"]
    if kinds:
        raise InputError(f"{source} is {kinds[0]}; only Stable Diffusion 1.x can be converted")


def find_sources(entries: dict[str, Entry], tensors: dict[str, Tensor], official: bool,
                 source: str) -> dict[str, list[Tensor]]:
    """Our tensor names -> the tensors to stack. Every tensor of the source is used or on the short
    list of those that are not needed. Raises InputError."""
    ema = official and any(n.startswith("model_ema.diffusion_model") for n in tensors)
    if ema:
        print("tiny_ldm: the file holds two U-Nets; taking the averaged one (EMA), which is the "
              "released model", file=sys.stderr)
    used, out = set(), {}
    for ours, entry in entries.items():
        names = entry.official if official else entry.diffusers
        if ema:     # "model.diffusion_model.a.b" is "model_ema.diffusion_modelab"
            names = [f"model_ema.{n[len('model.'):].replace('.', '')}" if n.startswith(UNET) else n
                     for n in names]
        for n in names:
            if n not in tensors:
                raise InputError(f"{source} lacks {n}: no whole Stable Diffusion 1.x; get it again")
        used.update(names)
        out[ours] = [tensors[n] for n in names]
        for n, t in zip(names, out[ours]):
            want = [entry.shape[0] // len(names), *entry.shape[1:]]
            if t.dtype not in CODES or list(t.shape) not in (want, [*want, 1, 1]):
                raise InputError(f"{source}: {n} is {t.dtype} {list(t.shape)} and should be {want} "
                                 "in 16 to 64 bits; get it again")
    ignored = re.compile("|".join([r".*\.position_ids", r"model_ema\.(decay|num_updates)", *TABLES,
                                   PROJECTION] + [UNET + r"\..*"] * ema))
    unknown = sorted(n for n in tensors if n not in used and not ignored.fullmatch(n))
    if unknown:
        raise InputError(f"{source} holds {len(unknown)} tensors that Stable Diffusion 1.x has "
                         f"not: {', '.join(unknown[:3])}")
    return out


def forget(t: Tensor) -> None:
    """Gives the memory behind a mapped tensor back to the kernel, so that only one is held at a
    time. It stays readable: touched again, it is read again. Elsewhere than on Linux: nothing.

    Careful, t may be a view whose numbers take less room than it counts: what lies behind is not
    its own."""
    start = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (t.data_ptr() + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if sys.platform == "linux" and length > 0 and t.is_contiguous():
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), 4)  # DONTNEED


# What a .safetensors calls the number formats that there are (8-bit floats can't be stacked).
CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


class Plan(NamedTuple):
    """A tensor to write: `make` is called when its turn comes."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_safetensors(path: Path, plan: dict[str, Plan], metadata: dict[str, str]) -> None:
    """A .safetensors, tensor by tensor: the header's length, the header as JSON, the bytes. Raises
    InputError for values that are not finite, and for a disk that is full."""
    header, at = {"__metadata__": metadata}, 0
    for name, (shape, dtype, _) in plan.items():
        end = at + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    if path.parent.is_dir() and (free := shutil.disk_usage(path.parent).free) < at + len(head):
        raise InputError(f"{path} needs {at / 1e9:.2f} GB and there are {free / 1e9:.2f} GB left; "
                         "make room")

    def write(beside: str) -> None:
        with open(beside, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name, (_, dtype, make) in tqdm(plan.items(), "converting", unit="tensor"):
                t = make().to(dtype).contiguous()
                if not t.isfinite().all():
                    raise InputError(f"{name} holds values that are not finite in {dtype}; get the "
                                     "file again, or try --dtype float32")
                file.write(t.view(torch.uint8).numpy().data)

    write_whole(path, write)


def may_write(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise InputError(f"{out} exists already; choose another name with -o, or replace it with "
                         "--force")


def stacked(shape: tuple[int, ...], parts: list[Tensor]) -> Callable[[], Tensor]:
    """A function that makes one tensor of ours, and lets its sources go."""
    def make() -> Tensor:
        t = torch.cat([part.reshape(-1, *shape[1:]) for part in parts])     # always a copy
        for part in parts:
            forget(part)
        return t
    return make


def convert(source: str, out: Path | None = None, dtype: torch.dtype | None = None,
            tokenizer: str | None = None, force: bool = False) -> Path:
    """Official or diffusers' weights to a tiny_ldm weights file. Returns its name. Raises
    InputError."""
    path = Path(source)
    name = path.stem if path.is_file() else os.path.basename(os.path.abspath(path))
    out = out or Path(f"{name}.tiny_ldm.safetensors")
    may_write(out, force)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.ckpt)(?<!\.safetensors)", source):
        path = download(source)
    official = not path.is_dir()
    tensors = read_official(path) if official else read_folder(path)
    refuse_others(tensors, source)
    try:
        config = config_of(tensors, official)
        entries = name_map(config)
    except (ValueError, IndexError) as e:      # an InputError is a ValueError, too
        why = e if isinstance(e, InputError) else "has tensors of impossible shapes"
        raise InputError(f"{source} is no Stable Diffusion 1.x: it {why}; README.md names files "
                         "that are") from None
    parts = find_sources(entries, tensors, official, source)
    config = config if official else as_scheduled(config, path)
    backend = find_tokenizer(tokenizer, None if official else path)
    if backend.get_vocab_size() != config.text.vocab_size:
        raise InputError(f"the vocabulary has {backend.get_vocab_size()} tokens and {source} has "
                         f"{config.text.vocab_size}; {WHAT_TO_PASS}")
    known = recognised(path) if official else None
    where = "in a file that is not on record" if official else "in a diffusers folder"
    print(f"tiny_ldm: {source} is {known or f'{config.name}, {where}'}", file=sys.stderr)
    metadata = {"format": "tiny_ldm", "config": json.dumps(asdict(config)),
                "tokenizer": backend.to_str()}
    plan = {ours: Plan(shape, dtype or parts[ours][0].dtype, stacked(shape, parts[ours]))
            for ours, (shape, *_) in entries.items()}
    write_safetensors(out, plan, metadata)
    return out


def to_official(source: str, out: Path | None = None, dtype: torch.dtype | None = None,
                force: bool = False) -> Path:
    """A tiny_ldm weights file to a checkpoint in the official layout, without the schedule tables.
    Returns its name. Raises InputError."""
    out = out or Path(f"{Path(source).stem}.official.safetensors")
    may_write(out, force)
    c, _, tensors = read_weights(Path(source), torch.device("cpu"))
    like = like_sd1(c.unet.in_channels, c.unet.channels, c.vae.channels, c.text)
    others = [name for name in vars(c) if getattr(c, name) != getattr(like, name)
              and name not in ("name", "image_size")]
    if others:
        raise InputError(f"{source} ({c.name}) is not built like Stable Diffusion 1.x (other: "
                         f"{', '.join(others)}), and the official layout has no place to say so; "
                         "use it as it is")
    plan, entries = {}, name_map(c)
    if problem := misfit(tensors, {name: entry.shape for name, entry in entries.items()}):
        raise InputError(f"{source} is damaged: its tensors are not those of its config (it "
                         f"{problem}); get it again")
    for ours, entry in entries.items():
        for name, piece in zip(entry.official, tensors[ours].chunk(len(entry.official))):
            shape = (*piece.shape, 1, 1) if entry.conv else tuple(piece.shape)
            plan[name] = Plan(shape, dtype or piece.dtype, lambda p=piece, s=shape: p.reshape(s))
    write_safetensors(out, plan, {"format": "pt"})
    return out


# %% 5. Command line
# --------------------------------------------------------------------------------------------------

def run(argv: list[str]) -> None:
    """What the arguments ask for. Raises InputError."""
    ap = ArgumentParser(prog="weights_convert.py", description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("source", metavar="SOURCE",
                    help=".ckpt, .safetensors, diffusers folder, or hub repository id")
    ap.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: named after SOURCE")
    ap.add_argument("--dtype", choices=("float16", "float32"), help="default: as in SOURCE")
    ap.add_argument("--tokenizer", metavar="FILE_OR_FOLDER",
                    help="CLIP's vocabulary, for a lone checkpoint")
    ap.add_argument("--to", choices=("tiny_ldm", "official"), default="tiny_ldm")
    ap.add_argument("--force", action="store_true", help="replace an output that exists")
    args = ap.parse_args(argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.to == "official":
        print(to_official(args.source, args.output, dtype, args.force))
    else:
        print(convert(args.source, args.output, dtype, args.tokenizer, args.force))


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    return tiny_ldm.main(argv, run)


if __name__ == "__main__":
    tiny_ldm.console(run)
