"""weights_convert: official Stable Diffusion checkpoints (1.x, 2.x, XL) to tiny_ldm weights files,
and back.

    python weights_convert.py v1-5-pruned-emaonly.ckpt --tokenizer bpe_simple_vocab_16e6.txt.gz
    python weights_convert.py stable-diffusion-v1-5/stable-diffusion-v1-5
    python weights_convert.py SOURCE --lora one.safetensors other.safetensors:0.7
    python weights_convert.py --to official FILE -o OUT.safetensors

SOURCE is an original file (.ckpt, .safetensors), a diffusers folder, or the id of a hub repository.
All hold the same numbers under other names, and a few renames lead from ours to theirs (section 1).
"""
from __future__ import annotations

import argparse
import ctypes
import functools
import gzip
import hashlib
import json
import math
import mmap
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Callable, NamedTuple

import tokenizers
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

import tiny_ldm
from tiny_ldm import (BOS, EOS, SD1, SD2, SD2_V, SDXL, ArgumentParser, Config, InputError,
                      LatentDiffusion, ScheduleConfig, TextConfig, check_file, check_header,
                      check_output, clip_backend, for_inpainting, input_errors,
                      make_alphas_cumprod, read_header, say, write_whole)

# %% 1. The map
# --------------------------------------------------------------------------------------------------
# From our names to those in official files, which are CompVis', and to those of diffusers. Each
# table is a list of (ours, theirs), replaced one after the other.

UNET, VAE = "model.diffusion_model", "first_stage_model"
TEXT = "cond_stage_model.transformer.text_model"              # of 1.x
OPEN_TEXT = "cond_stage_model.model"                          # of 2.x
XL_TEXT = "conditioner.embedders.0.transformer.text_model"    # XL's two
XL_TEXT_2 = "conditioner.embedders.1.model"

# CLIP's text encoder and what is in a transformer block have the same names in both
TEXT_ENCODER = [
    (".token_", ".embeddings.token_"), (".position_", ".embeddings.position_"),
    (".layers.", ".encoder.layers."), ("norm", "layer_norm"), (".fc", ".mlp.fc"),
    (".attention.to_q.", ".self_attn.q_proj."), (".attention.to_k.", ".self_attn.k_proj."),
    (".attention.to_v.", ".self_attn.v_proj."), (".attention.to_out.", ".self_attn.out_proj."),
    (".projection.", ".text_projection.")]
# OpenCLIP keeps q, k and v in one matrix
OPEN_CLIP = [
    ("position_embedding.weight", "positional_embedding"), (".norm", ".ln_"),
    (".layers.", ".transformer.resblocks."), (".attention.to_out.", ".attn.out_proj."),
    (".attention.to_q.", ".attn.in_proj_"), (".attention.to_k.", ".attn.in_proj_"),
    (".attention.to_v.", ".attn.in_proj_"), (".fc1.", ".mlp.c_fc."), (".fc2.", ".mlp.c_proj."),
    ("final_norm", "ln_final"), (".projection.weight", ".text_projection")]
TRANSFORMER = [
    (".blocks.", ".transformer_blocks."), (".self_attention.", ".attn1."),
    (".cross_attention.", ".attn2."), (".to_out.", ".to_out.0."),
    (".feed_forward.proj_in.", ".ff.net.0.proj."), (".feed_forward.proj_out.", ".ff.net.2.")]

OFFICIAL_UNET = [
    ("time_embedding", "time_embed"), ("vector_embedding", "label_emb.0"),
    ("down_blocks", "input_blocks"), ("mid_block", "middle_block"), ("up_blocks", "output_blocks"),
    ("norm_out", "out.0"), ("conv_out", "out.2")]
OFFICIAL_RES_BLOCK = [
    (".norm1.", ".in_layers.0."), (".conv1.", ".in_layers.2."), (".emb_proj.", ".emb_layers.1."),
    (".norm2.", ".out_layers.0."), (".conv2.", ".out_layers.3."), (".skip.", ".skip_connection.")]

# diffusers counts blocks level by level and by kind (see `in_its_level`), we count them through.
# The first of these are in no level
DIFFUSERS = [
    ("unet.down_blocks.0.0.", "unet.conv_in."), ("unet.norm_out", "unet.conv_norm_out"),
    ("encoder.0.", "encoder.conv_in."), ("decoder.0.", "decoder.conv_in."),
    ("encoder.12.", "encoder.mid_block.0."), ("encoder.13.", "encoder.mid_block.1."),
    ("encoder.14.", "encoder.mid_block.2."), ("encoder.15.", "encoder.conv_norm_out."),
    ("encoder.17.", "encoder.conv_out."), ("decoder.1.", "decoder.mid_block.0."),
    ("decoder.2.", "decoder.mid_block.1."), ("decoder.3.", "decoder.mid_block.2."),
    ("decoder.19.", "decoder.conv_norm_out."), ("decoder.21.", "decoder.conv_out."),
    ("mid_block.0.", "mid_block.resnets.0."), ("mid_block.1.", "mid_block.attentions.0."),
    ("mid_block.2.", "mid_block.resnets.1."), ("vector_embedding", "add_embedding"),
    ("_embedding.0.", "_embedding.linear_1."), ("_embedding.2.", "_embedding.linear_2."),
    (".emb_proj.", ".time_emb_proj."), (".skip.", ".conv_shortcut."),
    ("coder.mid_block.attentions.0.norm.", "coder.mid_block.attentions.0.group_norm."),
    (".attention.", ".")]
# CompVis names its VAE so much like diffusers does that it is shorter to start from there. Careful,
# on the way up, too, level 0 is the one of the largest pictures
OFFICIAL_VAE = [
    ("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."), (".group_norm.", ".norm."),
    (".to_out.0.", ".proj_out."), (".to_", "."), ("up_blocks.0.", "up.3."),
    ("up_blocks.1.", "up.2."), ("up_blocks.2.", "up.1."), ("up_blocks.3.", "up.0."),
    ("down_blocks.", "down."), (".resnets.", ".block."), ("samplers.0.", "sample."),
    ("conv_norm_out", "norm_out"), (".conv_shortcut.", ".nin_shortcut.")]

# In official files these are 1x1 convolutions (the first ones only in 1.x), in ours they are linear
CONVOLUTIONS = re.compile(r"(unet.*\.\d\.proj_(in|out)|vae.*\.attention\.to_\w+)\.weight")
# diffusers' names for the levels and for what ends each, the number of our first block in them, and
# how many blocks each has
LEVELS = {"unet.down_blocks": ("unet.down_blocks", "downsamplers.0", 1, 3),
          "unet.up_blocks": ("unet.up_blocks", "upsamplers.0", 0, 3),
          "vae.encoder": ("vae.encoder.down_blocks", "downsamplers.0", 1, 3),
          "vae.decoder": ("vae.decoder.up_blocks", "upsamplers.0", 4, 4)}


def renamed(name: str, *tables: list[tuple[str, str]]) -> str:
    for ours, theirs in sum(tables, []):
        name = name.replace(ours, theirs)
    return name


def in_its_level(found: re.Match) -> str:
    """The beginning of a name, blocks counted through -> counted level by level and by kind."""
    side, block, layer, child = found.groups()
    levels, sampler, first, per_level = LEVELS[side]
    level, i = divmod(int(block) - first, per_level)
    kind = f"attentions.{i}" if layer == "1" else f"resnets.{i}"
    if child == "conv":                           # of a Downsample or Upsample
        kind = sampler
    return f"{levels}.{level}.{kind}.{child}"


def diffusers_name(name: str) -> str:
    """Our name of a tensor -> part and name in a diffusers folder."""
    if name.startswith("text_encoder"):
        return renamed(name, TEXT_ENCODER)
    name = renamed(name, DIFFUSERS, TRANSFORMER)
    return re.sub(rf"^({'|'.join(LEVELS)})\.(\d+)\.(?:(\d)\.)?(\w+)", in_its_level, name)


def official_name(name: str, c: Config) -> str:
    """Our name of a tensor -> the name in official files."""
    texts = {"text_encoder": (TEXT_ENCODER, TEXT), "text_encoder_2": (OPEN_CLIP, XL_TEXT_2)}
    if c.text_2:
        texts["text_encoder"] = TEXT_ENCODER, XL_TEXT
    elif c.text.activation == "gelu":
        texts["text_encoder"] = OPEN_CLIP, OPEN_TEXT
    part = name.partition(".")[0]
    if part in texts:
        table, theirs = texts[part]
        return renamed(name, table).replace(part, theirs)
    if part == "vae":
        return renamed(diffusers_name(name), OFFICIAL_VAE).replace("vae", VAE)
    # In a transformer norm1 and norm2 keep their names
    inside = TRANSFORMER if ".blocks." in name else OFFICIAL_RES_BLOCK
    name = renamed(name, OFFICIAL_UNET, inside)
    return re.sub(r"(input_blocks\.\d+\.0)\.conv\.", r"\1.op.", name).replace("unet", UNET)


class Entry(NamedTuple):
    """A tensor of ours, and where it comes from."""
    shape: tuple[int, ...]
    official: str
    official_shape: tuple[int, ...]
    diffusers: str
    third: int | None = None      # which third of the official tensor it is: 0 q, 1 k, 2 v
    turned: bool = False          # OpenCLIP multiplies with its projection from the other side

    def place(self, official: bool) -> tuple[str, tuple[int, ...]]:
        """Name and shape in an official file, or in a diffusers folder."""
        return (self.official, self.official_shape) if official else (self.diffusers, self.shape)


@functools.cache
def name_map(c: Config) -> dict[str, Entry]:
    """Every tensor name of ours -> Entry."""
    with torch.device("meta"):
        ldm = LatentDiffusion(c, None)
    entries = {}
    for name, p in ldm.named_parameters():
        shape, official, third = tuple(p.shape), official_name(name, c), None
        official_shape = shape
        if CONVOLUTIONS.fullmatch(name) and (name.startswith("vae") or not c.unet.head_dim):
            official_shape = (*shape, 1, 1)
        if ".in_proj_" in official:
            third = "qkv".index(re.search(r"\.to_([qkv])\.", name)[1])
            official_shape = (3 * shape[0], *shape[1:])
        turned = official.endswith(".text_projection")
        entries[name] = Entry(shape, official, official_shape, diffusers_name(name), third, turned)
    return entries


# %% 2. Reading
# --------------------------------------------------------------------------------------------------
# A checkpoint is mapped into memory, not read: its tensors are touched one by one, when written.

KNOWN = dict(line.split(maxsplit=1) for line in """
86cd1d3ccb044d7ba8db743d717c9bac603c4043508ad2571383f954390f3cea sd-v1-1.ckpt
3b87d30facd5bafca1cbed71cfb86648aad75d1c264663c0cc78c7aea8daec0d sd-v1-2.ckpt
2cff93af4dcc07c3e03110205988ff98481e86539c51a8098d4f2236e41f7f2f sd-v1-3.ckpt
fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556 sd-v1-4.ckpt
cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516 v1-5-pruned-emaonly.ckpt
6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa v1-5-pruned-emaonly.safetensors
e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053 v1-5-pruned.ckpt
1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6 v1-5-pruned.safetensors
c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19 sd-v1-5-inpainting.ckpt
d635794c1fedfdfa261e065370bea59c651fc9bfa65dc6d67ad29e11869a1824 512-base-ema.ckpt (2.0)
bfcaf0755797b0c30eb00a3787e8b423eb1f5decd8de76c4d824ac2dd27e139f 768-v-ema.ckpt (2.0)
2a208a7ded5d42dcb0c0ec908b23c631002091e06afe7e76d16cd11079f8d4e3 512-inpainting-ema.ckpt
b29e2ed9a8fe58e76f7e801bda091d23738bd74c1da3f339bcbe2d40922fcb60 512-inpainting-ema.safetensors
88ecb782561455673c4b78d05093494b9c539fc6bfc08f3a9a4a0dd7b0b10f36 v2-1_512-ema-pruned.ckpt
df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2 v2-1_512-ema-pruned.safetensors
fc4f9fe7528b2ee3de21971fb805bbf74d680bf1ab5b5f9c08379b0397b82a9d v2-1_512-nonema-pruned.safetensors
ad2a33c361c1f593c4a1fb32ea81afce2b5bb7d1983c6b94793a26a3b54b08a0 v2-1_768-ema-pruned.ckpt
dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac v2-1_768-ema-pruned.safetensors
ff144a49841cf383adbc68841272ce639e1032b0a1f0f6586347feb953c244f4 v2-1_768-nonema-pruned.safetensors
3f067a1b943cf162f2b8f8588f6cf5824bd5b4c7d1d88d87164b9ca123616549 sd_turbo.safetensors
31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b sd_xl_base_1.0.safetensors
e6bb9ea85bbf7bf6478a7c6d18b71246f22e95d41bcdd80ed40aa212c33cfeff sd_xl_base_1.0_0.9vae.safetensors
e869ac7d6942cb327d68d5ed83a40447aadf20e0c3358d98b2cc9e270db0da26 sd_xl_turbo_1.0_fp16.safetensors
9730e344ed7098b31e435c9df23be162b95385a764ba36f491316af2925546f4 sd_xl_turbo_1.0.safetensors
""".strip().splitlines())
KNOWN_SIZES = (4.27, 5.21, 6.94, 7.7, 13.88)      # in GB; only such files are read for their hash

# The networks, by either layout's names. What else a file holds is not theirs and is ignored:
# tables of the schedule, counters, losses, a safety checker, what trainings leave behind
NETWORKS = re.compile(rf"({UNET}|{TEXT}|{OPEN_TEXT}|{XL_TEXT}|{XL_TEXT_2}|unet|vae|text_encoder"
                      rf"|text_encoder_2|{VAE}\.(encoder|decoder|quant_conv|post_quant_conv))\.")
# What is known and in no network of ours: the numbers 0 to 76; what CLIP compares texts with
# pictures by; marks and tables of the schedule, which section 4 reads; the averaged U-Net
UNUSED = re.compile(r".*\.(position_ids|logit_scale|attn_mask|text_projection(\.weight)?)"
                    r"|betas|\w*alphas_cumprod\w*|posterior_\w+|denoiser\.sigmas|scale_factor"
                    r"|model_ema\..*|v_pred")
# An address or the name of a hub repository, and perhaps of a file in it
HUB_ID = re.compile(r"((https?://)?(www\.)?(huggingface\.co|hf\.co)/)?"
                    r"(?P<repository>[\w.-]+/[\w.-]+)"
                    r"(/(tree|blob|resolve)/(?P<revision>[^/?#]+)/?(?P<file>[^?#]*))?/?([?#].*)?")


def recognised(path: Path) -> str:
    """The name of an official file, by size and sha256; "" for any other."""
    size, digest = path.stat().st_size, hashlib.sha256()
    if round(size / 1e9, 2) not in KNOWN_SIZES:
        return ""
    with open(path, "rb") as raw, tqdm.wrapattr(raw, "read", size, desc="sha256") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return KNOWN.get(digest.hexdigest(), "")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, whatever its name ends in. Raises InputError."""
    if zipfile.is_zipfile(check_file(path)):
        with input_errors(f"{path} is damaged", "get it again"):
            return read_pickle(path)
    with input_errors(f"{path} is neither a whole .safetensors nor a whole .ckpt (a zip, as torch "
                      "writes it since 1.6)", "get it again"):
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}


def read_metadata(path: Path) -> dict[str, str]:
    """What a .safetensors says of itself besides its tensors; of any other file nothing."""
    if zipfile.is_zipfile(path):
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


class Inert:
    """Stands in for any class: takes whatever a pickle gives it and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = append = extend = add = as_strided = __init__


# As Inert they are all harmless, but whoever asks for one of these means harm
HARMFUL = re.compile(r"(os|posix|nt|sys|subprocess|shutil|socket|importlib|runpy|pty|ctypes"
                     r"|webbrowser)\..*|(builtins|__builtin__)\.(eval|exec|execfile|compile|open"
                     r"|setattr|__import__|apply|input|breakpoint)")


class Reader(pickle.Unpickler):
    """Reads the pickle in a zip that torch wrote. A pickle is a program, which calls what it names;
    here it can name what is in MADE, and gets an Inert for all else."""

    def __init__(self, path: Path):
        archive = self.archive = zipfile.ZipFile(path)
        if any(entry.compress_type for entry in archive.infolist()):
            raise ValueError("it is compressed")          # torch never compresses; zip bombs do
        name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if name is None:
            raise ValueError("it is a zip, but none that torch wrote")
        self.path, self.folder = path, name.removesuffix("data.pkl")
        with open(path, "rb") as file:
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        super().__init__(archive.open(name))

    def find_class(self, module: str, name: str) -> object:
        name = f"{module}.{name}"
        if HARMFUL.fullmatch(name):
            raise InputError(f"{self.path} asks for {name}, which no checkpoint needs; refused, "
                             "and nothing in it has run; get it from a source you trust")
        return MADE.get(name, Inert)

    def persistent_load(self, pid: tuple) -> Tensor | Inert:
        _, dtype, key, _, count = pid                     # "storage", dtype, name, device, length
        if dtype is Inert:                                # of a kind that no network has
            return Inert()
        if not count:
            return torch.zeros(0, dtype=dtype)
        entry = self.archive.getinfo(f"{self.folder}data/{key}")
        if count * dtype.itemsize > entry.file_size:
            raise ValueError(f"{entry.filename} is too short")
        # A zip has a header before each entry, too: 30 bytes, the name, and padding
        header = entry.header_offset
        lengths = struct.unpack("<HH", self.mapped[header + 26 : header + 30])
        return torch.frombuffer(self.mapped, dtype=dtype, count=count,
                                offset=header + 30 + sum(lengths))


def a_tensor(storage: Tensor | Inert, offset: int, shape: tuple, stride: tuple, *_) -> Tensor:
    return storage.as_strided(shape, stride, offset)


def a_parameter(data: Tensor, *_) -> Tensor:
    return data


def with_attributes(make: Callable, _, args: tuple, __) -> object:
    return make(*args)


# What the pickle of a checkpoint needs
MADE = {"collections.OrderedDict": OrderedDict, "torch._utils._rebuild_tensor_v2": a_tensor,
        "torch._utils._rebuild_parameter": a_parameter,
        "torch._tensor._rebuild_from_type_v2": with_attributes,
        "builtins.getattr": lambda *_: Inert, "__builtin__.getattr": lambda *_: Inert,
        "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32,
        "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16,
        "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32}


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A .ckpt or .bin: a zip with a pickle in it. Raises InputError or ValueError."""
    found = Reader(path).load()
    if not isinstance(found, dict):
        raise ValueError("it holds no table of tensors")
    if "string_to_param" in found:
        raise InputError(f"{path} is a textual inversion, which adds a word to a checkpoint and is "
                         "not one itself")
    places = [found.get(key) for key in ("state_dict", "model", "module", "ema")]
    table = next((place for place in places if isinstance(place, dict)), found)
    # detach: a pickle may hang anything on a tensor, also in place of its methods
    return {str(name): Tensor.detach(t) for name, t in table.items() if isinstance(t, Tensor)}


def read_official(path: Path) -> dict[str, Tensor]:
    """A single file's tensors by their official names, which some programs spell otherwise."""
    spellings = [("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
                 ("cond_stage_model.transformer.", f"{TEXT}."),
                 ("conditioner.embedders.0.model.", f"{OPEN_TEXT}."),     # SD-Turbo
                 (".attn_1.to_out.0.", ".attn_1.proj_out."), (".attn_1.to_", ".attn_1.")]
    tensors = {}
    for theirs, t in read_tensors(path).items():
        name = theirs.removeprefix("module.")
        if "vision_model" not in name:
            name = renamed(name, spellings)
        if name in tensors and not torch.equal(tensors[name].flatten(), t.flatten()):
            raise InputError(f"{path} holds {name} twice, under two names, with different "
                             "values; get it again")
        tensors[name] = t
    return tensors


def choose_unet(tensors: dict[str, Tensor], ema: bool | None, known: str) -> None:
    """A file may hold two U-Nets: as trained, and the average of its weights (EMA). In the files on
    record the average is the released model; in others it is often still that of the model that
    they began from. Puts the chosen one under the plain one's names. Raises InputError."""
    unet = [e.official for e in name_map(SD1).values() if e.official.startswith(UNET)]
    # model.diffusion_model.out.2.bias has its average in model_ema.diffusion_modelout2bias
    averages = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in unet}
    there = sum(average in tensors for average in averages.values())
    plain = any(name in tensors for name in unet)
    if not there and not ema:
        return
    if ema is False and not plain:
        raise InputError("the file holds the averaged U-Net alone; leave out --no-ema")
    if there < len(averages):
        count = f"the file holds {there} of the {len(averages)} tensors of an averaged U-Net"
        if not plain:
            raise InputError(f"{count}, and no other; get it again")
        if ema:
            raise InputError(f"{count}; leave out --ema, or get the file again")
        say(f"{count}; taking the plain one")
    elif ema or not plain or (known and ema is None):
        say("taking the averaged U-Net (EMA)")
        tensors.update({name: tensors[average] for name, average in averages.items()})
    else:
        say("the file holds two U-Nets; taking the plain one, not the averaged one (--ema)")


def part_files(part: str) -> list[str]:
    """The names that a part's file may have in a diffusers folder, the best first."""
    stem = old_stem = f"{part}/diffusion_pytorch_model"
    if part.startswith("text_encoder"):
        stem, old_stem = f"{part}/model", f"{part}/pytorch_model"
    names = []
    for variant in ("", ".fp32", ".bf16", ".fp16", ".non_ema"):
        names += [f"{stem}{variant}.safetensors", f"{old_stem}{variant}.bin"]
    return names


def best_files(source: str | Path, there: list[str]) -> dict[str, list[str]]:
    """Each part's file, or its shards, of those that are there. Raises InputError."""
    best, parts = {}, ["unet", "vae", "text_encoder"]
    if any(name.startswith("text_encoder_2/") for name in there):
        parts.append("text_encoder_2")
    shards = {}                   # a file's name -> itself, or the files that it is cut into
    for file in sorted(there):
        shards.setdefault(re.sub(r"-\d+-of-\d+\.", ".", file), []).append(file)
    for part in parts:
        names = part_files(part)
        found = [name for name in names if name in shards]
        if not found and part == "text_encoder" and "text_encoder_2" in parts:
            raise InputError(f"{source} is the refiner of Stable Diffusion XL, not a model by "
                             "itself")
        if not found:
            files = ", ".join(name for name in sorted(there) if "." in name)
            raise InputError(f"{source} lacks {names[0]}, so it is no diffusers folder; pass a "
                             f"folder, or one file (there: {files[:200] or 'nothing'})")
        best[part] = found[:1] if found[0] in there else shards[found[0]]
        if found[0] != names[0]:
            say(f"of {part} taking {found[0]}")
    return best


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder, as unet.*, vae.*, text_encoder.* and text_encoder_2.*."""
    # The VAE's attention had other names before diffusers 0.15
    former = [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."),
              (".proj_attn.", ".to_out.0.")]
    files = [*folder.glob("*"), *folder.glob("*/*")]
    tensors, there = {}, [file.relative_to(folder).as_posix() for file in files]
    for part, names in best_files(folder, there).items():
        for file in names:
            for name, t in read_tensors(folder / file).items():
                name = renamed(name.removeprefix("text_model."), former)
                tensors[f"{part}.{name}"] = t
    return tensors


def snapshot_in(folder: Path) -> Path:
    """A folder of the hub's cache (models--owner--name) -> its main branch in it, or else the
    latest; any other -> itself."""
    snapshots = {path.name: path for path in folder.glob("snapshots/*") if path.is_dir()}
    main = folder / "refs" / "main"
    named = main.read_text(errors="replace").strip() if main.is_file() else ""
    latest = max(snapshots.values(), key=os.path.getmtime, default=folder)
    return snapshots.get(named, latest)


def on_the_hub(source: str) -> re.Match | None:
    """The parts of an address or a name on the hub; None for what is here, or looks like a file."""
    address = HUB_ID.fullmatch(source)
    is_file = source.endswith((".ckpt", ".safetensors", ".bin", ".pt"))
    if Path(source).exists() or address and is_file and not address["file"]:
        return None
    return address


def download(address: re.Match) -> Path:
    """A hub repository as a diffusers folder, or a file of one. Raises InputError."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    repository, revision, file = address.group("repository", "revision", "file")
    with input_errors(f"{repository} can't be had from the hub",
                      "check name and network, or pass a file"):
        if file:
            return Path(hf_hub_download(repository, file, revision=revision))
        try:
            there = HfApi().list_repo_files(repository, revision=revision)
        except Exception:             # without a network this gives what is in the cache
            return Path(snapshot_download(repository, revision=revision, allow_patterns=[]))
        wanted = ["*.json", "tokenizer/*", *sum(best_files(repository, there).values(), [])]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))


# %% 3. The tokenizer
# --------------------------------------------------------------------------------------------------

WHAT_TO_PASS = ("pass --tokenizer with bpe_simple_vocab_16e6.txt.gz, a folder with vocab.json and "
                "merges.txt, or a tokenizer.json")


def read_tokenizer(source: Path) -> tokenizers.Tokenizer:
    """CLIP's vocabulary from any of the three forms. Raises InputError."""
    with input_errors(f"{source} is no CLIP vocabulary", WHAT_TO_PASS):
        added = {}                                    # words, by textual inversion
        if (source / "added_tokens.json").exists():
            added = json.loads(check_file(source / "added_tokens.json").read_text("utf-8"))
        if (source / "tokenizer.json").exists():
            source = source / "tokenizer.json"
        if (source / "vocab.json").exists():
            files = [str(check_file(source / name)) for name in ("vocab.json", "merges.txt")]
            vocab, merges = tokenizers.models.BPE.read_file(*files)
        elif source.suffix == ".json":
            # Only its tables: the rules of a stranger's file could take forever
            found = json.loads(check_file(source).read_text("utf-8"))
            vocab, merges = found["model"]["vocab"], found["model"]["merges"]
            if isinstance(merges[0], str):            # older files
                merges = [pair.split() for pair in merges]
            added |= {token["content"]: token["id"] for token in found.get("added_tokens", [])}
        else:
            opener = gzip.open if source.suffix == ".gz" else open
            with opener(check_file(source), "rb") as file:
                text = file.read(2**24).decode()      # the true one has 3 MB
            merges = [line.split() for line in text.split("\n")[1 : 48894 + 1]]
            vocab = openai_vocab(merges)
        backend = clip_backend(vocab, merges)
        backend.add_tokens(sorted(added.keys() - {BOS, EOS}, key=added.get))
        for word, number in added.items():            # they must follow the vocabulary's
            if backend.token_to_id(word) != number:
                raise ValueError(f"the added token {word} can't have the number {number}")
        return backend


def openai_vocab(merges: list[list[str]]) -> dict[str, int]:
    """OpenAI's order: the 256 bytes, each written as a letter (first those that are printable), the
    same at the end of a word, the merges, BOS and EOS."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    endings = [letter + "</w>" for letter in letters]
    merged = ["".join(pair) for pair in merges]
    pieces = [*letters, *endings, *merged, BOS, EOS]
    return {piece: number for number, piece in enumerate(pieces)}


def find_tokenizer(given: str | None, path: Path) -> tokenizers.Tokenizer:
    """The one given; or the folder's; or the hub's."""
    if given is None and (path / "tokenizer").is_dir():
        given = path / "tokenizer"
    if given is None:
        from huggingface_hub import hf_hub_download
        with input_errors("no vocabulary: the hub can't be reached", WHAT_TO_PASS):
            given = hf_hub_download("openai/clip-vit-large-patch14", "tokenizer.json")
    return read_tokenizer(Path(given))


# %% 4. Checking
# --------------------------------------------------------------------------------------------------

def refuse_others(tensors: dict[str, Tensor], source: str) -> None:
    """Refuses, by its name, what is not Stable Diffusion 1.x, 2.x or XL. Raises InputError."""
    marks = {"Stable Diffusion 3": r"\bjoint_blocks\.", "Flux": r"\bdouble_blocks\.",
             "CosXL, whose schedule is another": r"^edm_vpred\.sigma_max$",
             "Playground, whose schedule is another": r"^edm_mean$",
             "a model whose schedule has a zero terminal signal-to-noise ratio": r"^ztsnr$",
             "a distilled model that takes the guidance scale as an input":
                 r"\btime_embed(ding)?\.cond_proj\."}
    if f"{OPEN_TEXT}.token_embedding.weight" in tensors:
        marks["the refiner of Stable Diffusion XL, not a model by itself"] = rf"^{UNET}\.label_emb\."
    if not any(name.endswith("token_embedding.weight") for name in tensors):
        marks["a LoRA, which changes a checkpoint and is not one itself"] = r"lora_|\.lora\."
        marks["a textual inversion, which adds a word to a checkpoint and is not one itself"] = (
            "^emb_params$")
    for kind, mark in marks.items():
        if any(re.search(mark, name) for name in tensors):
            raise InputError(f"{source} is {kind}; only Stable Diffusion 1.x, 2.x and XL can be "
                             "converted")


def config_of(tensors: dict[str, Tensor], official: bool) -> Config:
    """SD1, SD2 or SDXL, or its inpainting variant, with the widths that the tensors have: a
    fine-tune's are the same, a test's are smaller. Raises ValueError."""
    def shape(ours: str) -> tuple[int, ...]:
        theirs, _ = entries[f"{ours}.weight"].place(official)
        if theirs not in tensors:
            raise ValueError(f"it lacks {theirs}")
        return tensors[theirs].shape

    def text_of(part: str, usual: TextConfig) -> TextConfig:
        vocab_size, width = shape(f"{part}.token_embedding")
        norms = [entries[f"{part}.layers.{i}.norm1.weight"] for i in range(usual.num_layers)]
        return replace(usual, vocab_size=vocab_size, width=width, num_heads=max(1, width // 64),
                       max_length=shape(f"{part}.position_embedding")[0],
                       num_layers=sum(norm.place(official)[0] in tensors for norm in norms),
                       pooled_dim=usual.pooled_dim and width)

    base = SD1
    linear = tensors.get("unet.down_blocks.0.attentions.0.proj_in.weight")
    words = "token_embedding.weight"
    if tensors.keys() & {f"{XL_TEXT_2}.{words}", f"text_encoder_2.embeddings.{words}"}:
        base = SDXL
    elif f"{OPEN_TEXT}.{words}" in tensors or linear is not None and linear.ndim == 2:
        base = SD2
    entries = name_map(base)
    channels, in_channels, *_ = shape("unet.down_blocks.0.0")
    if in_channels == 9:
        base = for_inpainting(base)
    elif in_channels != 4:
        raise ValueError(f"it has {in_channels} input channels rather than 4 (or 9, to repaint)")
    text, text_2, vector_dim = text_of("text_encoder", base.text), None, None
    if base.text.activation == "gelu" and (not official or text.num_layers == 23):
        text = replace(text, penultimate=False)   # the last layer, which is not used, is not there
    if base.text_2:
        text_2 = text_of("text_encoder_2", base.text_2)
        vector_dim = shape("unet.vector_embedding.0")[1]
    return replace(base, text=text, text_2=text_2,
                   vae=replace(base.vae, channels=shape("vae.encoder.0")[0]),
                   unet=replace(base.unet, channels=channels, vector_dim=vector_dim))


# What a diffusers folder's settings may say of what its tensors do not show. The first value is
# meant where they say nothing
SETTINGS = {
    "prediction_type": ["epsilon", "v_prediction"], "beta_schedule": ["scaled_linear"],
    "trained_betas": [None], "rescale_betas_zero_snr": [False], "num_train_timesteps": [1000],
    "use_flow_sigmas": [None, False], "act_fn": ["silu"], "norm_num_groups": [32],
    "norm_eps": [1e-5], "layer_norm_eps": [1e-5], "flip_sin_to_cos": [True], "freq_shift": [0],
    "time_cond_proj_dim": [None], "center_input_sample": [False], "mid_block_scale_factor": [1],
    "downsample_padding": [1], "shift_factor": [None, 0.0], "latents_mean": [None],
    "latents_std": [None]}


def of_folder(config: Config, folder: Path) -> tuple[Config, str]:
    """The config with what a diffusers folder says that its tensors do not show, and what says
    whether it predicts ε or v. Raises InputError for what we can't do."""
    heads, u, why = [8, [8, 8, 8, 8]], config.unet, ""
    if u.head_dim:
        heads = [[max(1, u.channels * mult // u.head_dim) for mult in u.channel_mult]]
    own = {"scheduler/scheduler_config.json": {},
           "unet/config.json": {"attention_head_dim": heads, "num_attention_heads": [None, *heads]},
           "vae/config.json": {}}
    for part, text in (("text_encoder", config.text), ("text_encoder_2", config.text_2)):
        if text:
            own[f"{part}/config.json"] = {"num_attention_heads": [text.num_heads],
                                          "hidden_act": [text.activation]}
    for name, known in own.items():
        file = folder / name
        if not file.exists():
            continue
        with input_errors(f"{file} says what tiny_ldm can't do", "get another model"):
            found = json.loads(check_file(file).read_text("utf-8"))
            kind = found.get("_class_name", "")
            if re.match("FlowMatch|EDM", kind):
                raise ValueError(f"it is of kind {kind}")
            for key, values in (SETTINGS | known).items():
                if found.get(key, values[0]) not in values:
                    raise ValueError(f"{key} is {found[key]!r}")
            betas = {key: float(found[key]) for key in ("beta_start", "beta_end") if key in found}
            config = replace(config, schedule=replace(config.schedule, **betas),
                             scale_factor=float(found.get("scaling_factor", config.scale_factor)))
            if name.startswith("scheduler"):
                why = "its scheduler/ says so"
            if found.get("prediction_type") == "v_prediction":
                config = replace(config, prediction="v")
            if found.get("timestep_spacing") == "trailing" and kind.startswith("Euler"):
                config = as_turbo(config)
            if kind == "LCMScheduler":
                config = replace(config, sampler="lcm", steps=4, guidance_scale=1.0)
    return config, why


def as_turbo(config: Config) -> Config:
    """One step, without guidance: what the Turbo models were distilled for."""
    return replace(config, name=f"{config.name} Turbo", image_size=512, sampler="euler_a_trailing",
                   steps=1, guidance_scale=1.0)


def prediction_of(path: Path, tensors: dict[str, Tensor], known: str, config: Config
                  ) -> tuple[str, str]:
    """Whether the U-Net of a lone file predicts "eps" or "v", and what says so."""
    yaml, metadata = path.with_suffix(".yaml"), read_metadata(path)
    said, why = metadata.get("modelspec.prediction_type"), "its metadata say so"
    if not said and (metadata.get("modelspec.architecture", "").endswith("-v")
                     or metadata.get("ss_v_parameterization") == "True"):
        said = "v"
    text = yaml.read_text("utf-8") if yaml.is_file() else ""
    found = re.search(r"""(?m)^[^#\n]*parameterization["']?:\s*["']?(\w+)""", text)
    if found:
        said, why = found[1], f"{yaml} says so"
    if said:
        kind = re.fullmatch(r"(eps|v)(ilon|[_-]prediction)?", said.lower())
        if not kind:
            raise ValueError(f"it predicts {said}")
        return kind[1], why
    if "v_pred" in tensors:
        return "v", "it holds a tensor v_pred"
    if known:
        return ("v" if "768" in known else "eps"), "as is known"
    if config.name == SD2.name:                   # a rule of thumb of ComfyUI's, for 2.x
        bias = f"{UNET}.output_blocks.11.1.transformer_blocks.0.norm1.bias"
        spread = tensors[bias].float().std().item()
        return ("v" if spread > 0.09 else "eps"), f"one of its biases spreads by {spread:.3f}"
    return "eps", ""


def schedule_of(tensors: dict[str, Tensor], schedule: ScheduleConfig) -> ScheduleConfig:
    """The schedule of the noise whose tables a lone file holds; without tables the one given.
    Raises ValueError for one that is not made as Stable Diffusion's is."""
    if "betas" in tensors:
        found = torch.cumprod(1 - tensors["betas"].double(), dim=0)
    elif "alphas_cumprod" in tensors:
        found = tensors["alphas_cumprod"].double()
    else:
        return schedule
    if len(found) != schedule.num_timesteps:
        raise ValueError(f"its schedule has {len(found)} timesteps")
    start = 1 - found[0].item()
    end = 1 - (found[-1] / found[-2]).item()
    other = replace(schedule, beta_start=float(f"{start:.3g}"), beta_end=float(f"{end:.3g}"))
    for known in (schedule, other):
        if (make_alphas_cumprod(known) - found).abs().max() < 4e-3:      # in 16 bits, too
            return known
    raise ValueError(f"its schedule has betas of another kind, from {start:.5f} to {end:.5f}")


def as_trained(usual: Config, source: str, path: Path, tensors: dict[str, Tensor],
               known: str, prediction: str | None) -> Config:
    """The usual config with what source and user say of the training; says what was taken."""
    if path.is_dir():
        config, why = of_folder(usual, path)
    else:
        with input_errors(f"{source} can't be used", "get another model"):
            kind, why = prediction_of(path, tensors, known, usual)
            config = replace(usual, prediction=kind, schedule=schedule_of(tensors, usual.schedule))
            scale = tensors.get("scale_factor", torch.tensor(usual.scale_factor)).item()
            if not math.isclose(scale, usual.scale_factor, rel_tol=4e-3):     # in 16 bits, too
                config = replace(config, scale_factor=round(scale, 5))
        if "denoiser.sigmas" in tensors or "turbo" in known:
            config = as_turbo(config)
    if prediction:
        config, why = replace(config, prediction=prediction), "--prediction says so"
    if config.prediction == "v" and config.name == SD2.name:
        config = replace(config, name=SD2_V.name, image_size=SD2_V.image_size)
    where = "a diffusers folder" if path.is_dir() else "a file that is not on record"
    what = known or f"{config.name}, in {where}"
    why = why or "nothing says otherwise; --prediction v would"
    say(f"{source} is {what}; it predicts {config.prediction} ({why})")
    schedule, scale = config.schedule, config.scale_factor
    if (schedule, scale) != (usual.schedule, usual.scale_factor):
        say(f"its beta_start is {schedule.beta_start}, its beta_end is {schedule.beta_end}, its "
            f"scale_factor is {scale}")
    return config


def check_tensors(tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], source: str
                  ) -> None:
    """Raises InputError unless the tensors are those wanted, in these shapes, and the networks have
    no others."""
    for name, shape in wanted.items():
        if name not in tensors:
            raise InputError(f"{source} lacks {name}: no whole model; get it again")
        t = tensors[name]
        # (a Linear may stand for a 1x1 convolution, and the other way around)
        if t.dtype not in CODES or t.shape[:2] != shape[:2] or t.numel() != math.prod(shape):
            raise InputError(f"{source}: {name} is {t.dtype} {list(t.shape)} and should be "
                             f"{list(shape)} in 16 to 64 bits; get it again")
        # Biases may be 0, but no trained norm is
        if len(shape) == 1 and name.endswith(".weight") and not t.any():
            raise InputError(f"{source}: {name} holds nothing but zeros, as where a download broke "
                             "off; get it again")
    others = [name for name in sorted(tensors.keys() - wanted) if not UNUSED.fullmatch(name)]
    unknown = [name for name in others if NETWORKS.match(name)]
    if unknown:
        raise InputError(f"{source} holds {len(unknown)} tensors in its networks that such a model "
                         f"does not have: {', '.join(unknown[:3])}")
    if others:
        say(f"ignored {len(others)} tensors that are of no network: {', '.join(others[:3])}")


# %% 5. LoRA
# --------------------------------------------------------------------------------------------------
# A LoRA (Hu et al. 2021, arXiv:2106.09685) changes layers of a model by products of two thin
# matrices: W + scale · (alpha / rank) · up @ down. Programs spell the layers' names in many ways;
# one way of ours stands for all: diffusers' name, or the official one, with _ for every dot.

LORA_TENSOR = re.compile(r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?[._]"
                         r"(?:(?P<down>down|A)|(?P<up>up|B))(?:\.default)?\.weight"
                         r"|(?:_lora)?\.(?P<alpha>alpha))")
LORA_SPELLINGS = [(r"\.processor\b", ""), (r"\.", "_"), (r"^base_model_model_|^lora_", ""),
                  (r"^te1?_", "text_encoder_"), (r"^te2_", "text_encoder_2_"),
                  (r"^((text_encoder(_2)?_)?)text_model_", r"\1"),
                  (r"^(?=(down_blocks|mid_block|up_blocks)_)", "unet_"),
                  (r"(_attn\d_to_out)$", r"\1_0"), (r"_attn_to_(q|k|v|out)$", r"_attn_\1_proj")]
OTHER_KINDS = {"LoHa": "hada_w", "LoKr": "lokr_w", "DoRA": r"dora_scale|lora_magnitude_vector"}


# What a LoRA adds to a weight: a factor, up [out, rank], and down [rank, in]
Change = tuple[float, Tensor, Tensor]


def lora_name(layer: str) -> str:
    """Any spelling of a layer's name -> the one that stands for all."""
    for theirs, ours in LORA_SPELLINGS:
        layer = re.sub(theirs, ours, layer)
    return layer


def lora_factor(settings: dict, layer: str, rank: int) -> float:
    """alpha / rank where no tensor says it: by peft's settings in the file's header, or 1."""
    part = re.match(r"text_encoder(_2)?|unet|vae", layer)[0]
    alpha = settings.get(f"{part}.lora_alpha", rank)
    for pattern, value in (settings.get(f"{part}.alpha_pattern") or {}).items():
        if layer.endswith(lora_name(pattern)):
            alpha = value
    return alpha / (rank**0.5 if settings.get(f"{part}.use_rslora") else rank)


def lora_tensors(path: Path, c: Config) -> dict[str, dict[str, Tensor]]:
    """A LoRA's tensors, by our name of the weight and by kind: up, down, alpha."""
    tensors, found, others, layers = read_tensors(path), {}, [], {}
    for kind, mark in OTHER_KINDS.items():
        if any(re.search(mark, name) for name in tensors):
            raise InputError(f"{path} is a {kind}; only plain LoRAs can be added")
    for ours, e in name_map(c).items():
        for name in (e.diffusers, e.official.replace(UNET, "unet")):
            layers[lora_name(name.removesuffix(".weight"))] = ours
    for name, t in tensors.items():
        parts = LORA_TENSOR.fullmatch(name)
        ours = parts and layers.get(lora_name(parts["layer"]))
        if not ours:
            others.append(name)
            continue
        if parts.lastgroup in found.setdefault(ours, {}):
            raise InputError(f"{path} changes a layer twice, by two names ({name}); get it again")
        found[ours][parts.lastgroup] = t
    if others or not found:
        raise InputError(f"{path} can't be added to {c.name}: {len(others)} of its {len(tensors)} "
                         f"tensors are of no layer there ({', '.join(others[:2])}); get one that "
                         "was made for this model")
    return found


def read_lora(given: str, c: Config) -> dict[str, Change]:
    """FILE or FILE:SCALE -> what it adds to our weights, by name. Raises InputError."""
    path, scale, changes = Path(given), 1.0, {}
    if not path.exists() and ":" in given:
        name, _, number = given.rpartition(":")
        path = Path(name)
        with input_errors(f"--lora {given}: {number} is no scale", "write FILE or FILE:0.8"):
            scale = float(number)
            if not abs(scale) <= 1000:
                raise ValueError("from -1000 to 1000")
    found = lora_tensors(path, c)
    with input_errors(f"{path} is damaged", "get it again"):
        settings = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
        for ours, parts in found.items():
            entry = name_map(c)[ours]
            layer = lora_name(entry.diffusers.removesuffix(".weight"))
            up, down = parts["up"].flatten(1), parts["down"].flatten(1)
            rank, inputs = down.shape
            if up.shape != (entry.shape[0], rank) or inputs != math.prod(entry.shape[1:]):
                raise InputError(f"{path} is for another model: it changes {layer} by "
                                 f"{list(up.shape)} @ {list(down.shape)}, which here is "
                                 f"{list(entry.shape)}")
            factor = lora_factor(settings, layer, rank)
            if "alpha" in parts:
                factor = parts["alpha"].item() / rank
            changes[ours] = scale * factor, up, down
    say(f"adding {path}, of {len(changes)} layers, at scale {scale:g}")
    return changes


# %% 6. Writing
# --------------------------------------------------------------------------------------------------

# What a .safetensors calls the number formats
CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Row = tuple[list[Tensor], tuple[int, ...]]        # a tensor's parts, and the shape to write it in


def forget(t: Tensor) -> None:
    """Gives the memory behind a mapped tensor back to Linux, so that only one is held at a time.
    Touched again, it is read again. Careful, only whole pages are its own, and a view that is not
    contiguous may have less room than it counts."""
    start = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (t.data_ptr() + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and end > start and t.is_contiguous():
        dont_need = 4
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), dont_need)


def write_safetensors(path: Path, rows: dict[str, Row], dtype: torch.dtype | None,
                      metadata: dict[str, str], loras: tuple[dict[str, Change], ...] = ()
                      ) -> None:
    """A .safetensors, tensor by tensor: the header's length, the header as JSON, the bytes. dtype:
    None keeps each tensor's. Raises InputError."""
    header, at = {"__metadata__": metadata}, 0
    for name, (parts, shape) in rows.items():
        kind = dtype or parts[0].dtype
        end = at + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": CODES[kind], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    free = shutil.disk_usage(path.parent).free
    if free < at + len(head):
        raise InputError(f"{path} needs {at / 1e9:.2f} GB and there are {free / 1e9:.2f} GB left; "
                         "make room")

    def write(beside: str) -> None:
        with open(beside, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name, (parts, shape) in tqdm(rows.items(), "converting", unit="tensor"):
                t = parts[0] if len(parts) == 1 else torch.cat(parts)
                for factor, up, down in [lora[name] for lora in loras if name in lora]:
                    t = t.float() + factor * (up.float() @ down.float()).reshape(t.shape)
                t = t.to(dtype or parts[0].dtype).reshape(shape).contiguous()
                if not t.isfinite().all():
                    raise InputError(f"{name} holds values that are not finite in {t.dtype}; get "
                                     "the file again, or try --dtype float32")
                file.write(t.view(torch.uint8).numpy().data)
                for part in parts:
                    forget(part)

    write_whole(path, write)


def convert(source: str, out: Path, dtype: torch.dtype | None, tokenizer: str | None,
            prediction: str | None, ema: bool | None, loras: list[str]) -> None:
    """Official or diffusers' weights, with LoRAs added, to our file. Raises InputError."""
    address, known = on_the_hub(source), ""
    official = bool(address["file"]) if address else not Path(source).is_dir()
    if ema is not None and not official:
        raise InputError("--ema and --no-ema choose in a single file; of a folder's variants keep "
                         "the one that you want")
    path = download(address) if address else Path(source)
    if official:
        tensors, known = read_official(path), recognised(path)
        choose_unet(tensors, ema, known)
    else:
        path = snapshot_in(path)
        tensors = read_folder(path)
    refuse_others(tensors, source)
    with input_errors(f"{source} is no Stable Diffusion 1.x, 2.x or XL",
                      "README.md names files that are"):
        config = config_of(tensors, official)
        entries = name_map(config)
    check_tensors(tensors, dict(e.place(official) for e in entries.values()), source)
    config = as_trained(config, source, path, tensors, known, prediction)
    added = tuple(read_lora(lora, config) for lora in loras)
    backend = find_tokenizer(tokenizer, path)
    tokens, size = backend.get_vocab_size(), config.text.vocab_size
    if not 0.95 * size <= tokens <= size:         # some trainers pad the embedding
        raise InputError(f"the vocabulary has {tokens} tokens and {source} has {size}; "
                         f"{WHAT_TO_PASS}")
    metadata = {"format": "tiny_ldm", "config": json.dumps(asdict(config)),
                "tokenizer": backend.to_str()}
    with input_errors(f"{source} can't be used", "get it again"):
        check_header(metadata)
    rows = {}
    for ours, e in entries.items():
        t = tensors[e.place(official)[0]]
        if official and e.third is not None:
            t = t.chunk(3)[e.third]
        if official and e.turned:
            t = t.T
        rows[ours] = [t], e.shape
    write_safetensors(out, rows, dtype, metadata, added)


def to_official(source: str, out: Path, dtype: torch.dtype | None) -> None:
    """Our file to one in the official layout, without the schedule. Raises InputError."""
    c = Config.from_dict(json.loads(read_header(source)["config"]))
    tensors, rows = read_tensors(Path(source)), {}
    with input_errors(f"{source} is damaged", "get it again"):
        entries = name_map(c)
    check_tensors(tensors, {ours: e.shape for ours, e in entries.items()}, source)
    for ours, e in entries.items():                   # to_q, to_k, to_v come in this order
        parts, _ = rows.setdefault(e.official, ([], e.official_shape))
        parts.append(tensors[ours].T if e.turned else tensors[ours])
    with input_errors(f"{source} ({c.name}) is not built like Stable Diffusion",
                      "it can't be written in the official layout; use it as it is"):
        usual = config_of({name: parts[0] for name, (parts, _) in rows.items()}, official=True)
        others = [name for name in ("text", "vae", "unet", "scale_factor", "schedule")
                  if getattr(c, name) != getattr(usual, name)]
        if others:
            raise ValueError(f"other: {', '.join(others)}")
    said = c.prediction.replace("eps", "epsilon")
    write_safetensors(out, rows, dtype, {"format": "pt", "modelspec.prediction_type": said})


# %% 7. Command line
# --------------------------------------------------------------------------------------------------

def run(argv: list[str] | None) -> None:
    """What the arguments ask for. Raises InputError."""
    parser = ArgumentParser(prog="weights_convert.py", description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", help=".ckpt, .safetensors, diffusers folder, or hub repository")
    add("-o", "--output", metavar="FILE", type=Path, help="default: named after SOURCE")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="default: as in SOURCE")
    add("--lora", metavar="FILE[:SCALE]", nargs="+", action="extend", default=[],
        help="add these to the weights")
    add("--tokenizer", metavar="FILE_OR_FOLDER",
        help="CLIP's vocabulary (default: the folder's or the hub's)")
    add("--prediction", choices=("eps", "v"), help="what the U-Net predicts")
    add("--ema", action=argparse.BooleanOptionalAction,
        help="of two U-Nets take the averaged one, or not (default: in official files yes)")
    add("--to", choices=("tiny_ldm", "official"), default="tiny_ldm",
        help="the layout to write (default: tiny_ldm)")
    add("--force", action="store_true", help="replace an output that exists")
    args = parser.parse_args(argv)
    given, address = args.source, on_the_hub(args.source)
    if address:
        given = address["file"] or address["repository"]
    name = re.sub(r"\.(ckpt|safetensors|bin|pt)$", "", os.path.basename(os.path.abspath(given)))
    out = args.output or Path(f"{name}.{args.to}.safetensors")
    if out.exists() and not args.force:
        raise InputError(f"{out} exists already; choose another name with -o, or replace a file "
                         "with --force")
    check_output(out, "")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.to == "tiny_ldm":
        convert(args.source, out, dtype, args.tokenizer, args.prediction, args.ema, args.lora)
    else:
        for name in ("lora", "tokenizer", "prediction", "ema"):
            if getattr(args, name) != parser.get_default(name):
                raise InputError(f"--{name} changes what is converted to tiny_ldm; leave out "
                                 "--to official")
        to_official(args.source, out, dtype)
    print(out)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    return tiny_ldm.main(argv, run)


if __name__ == "__main__":
    tiny_ldm.console(run)
