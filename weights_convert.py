"""weights_convert: official Stable Diffusion 1.x checkpoints to tiny_ldm weights files, and back.

    python weights_convert.py v1-5-pruned-emaonly.safetensors --tokenizer bpe_simple_vocab_16e6.txt.gz
    python weights_convert.py stable-diffusion-v1-5/stable-diffusion-v1-5
    python weights_convert.py --to official FILE -o OUT.safetensors

SOURCE is an original file (.ckpt, .safetensors), a diffusers folder, or the id of a hub repository. The
two say the same with other names: `bricks` walks the networks and says, for each part, what it is called
in ours, in the original ("official") and in diffusers' files; everything else follows from that.
"""
from __future__ import annotations

import argparse
import errno
import gzip
import hashlib
import json
import re
import shutil
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from tiny_ldm import (BOS, EOS, SD1, SD1_INPAINT, ArgumentParser, Config, InputError, LatentDiffusion,
                      clip_backend, read_text, read_weights, shortened, write_whole)

# %% 1. The map
# ----------------------------------------------------------------------------------------------------------------
# Inside each kind of brick: our name -> (official names, diffusers' names). Several names are one matrix in ours,
# rows stacked (the fused q, k, v).

Q, K, V = ("to_q", "to_k", "to_v")
UNET_RES = {"norm1": ("in_layers.0", "norm1"), "conv1": ("in_layers.2", "conv1"), "emb": ("emb_layers.1", "time_emb_proj"),
            "norm2": ("out_layers.0", "norm2"), "conv2": ("out_layers.3", "conv2"),
            "skip": ("skip_connection", "conv_shortcut")}
VAE_RES = {**{n: (n, n) for n in ("norm1", "conv1", "norm2", "conv2")}, "skip": ("nin_shortcut", "conv_shortcut")}
VAE_ATTENTION = {"norm": ("norm", "group_norm"), "attention.qkv": (("q", "k", "v"), (Q, K, V)),
                 "attention.out": ("proj_out", "to_out.0")}
INNER = {"norm1": "norm1", "norm2": "norm2", "norm3": "norm3", "self_attention.qkv": tuple(f"attn1.{n}" for n in (Q, K, V)),
         "self_attention.out": "attn1.to_out.0", "cross_attention.q": "attn2.to_q",
         "cross_attention.kv": ("attn2.to_k", "attn2.to_v"), "cross_attention.out": "attn2.to_out.0",
         "feed_forward.proj": "ff.net.0.proj", "feed_forward.out": "ff.net.2"}
TEXT_LAYER = {"norm1": "layer_norm1", "attention.qkv": tuple(f"self_attn.{n}_proj" for n in "qkv"),
              "attention.out": "self_attn.out_proj", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
ONE = {"": ("", "")}                                  # a single layer: the prefixes are the names

UNET, VAE, TEXT = "model.diffusion_model", "first_stage_model", "cond_stage_model.transformer.text_model"


def both(table: dict) -> dict:
    return {ours: (theirs, theirs) for ours, theirs in table.items()}


def bricks(c: Config) -> Iterator[tuple[dict, str, str, str]]:
    """(table, our prefix, official prefix, diffusers' prefix) of every part of a model."""
    for ours, official, diffusers in (
            ("time1", "time_embed.0", "time_embedding.linear_1"), ("time2", "time_embed.2", "time_embedding.linear_2"),
            ("conv_in", "input_blocks.0.0", "conv_in"), ("norm_out", "out.0", "conv_norm_out"), ("conv_out", "out.2", "conv_out")):
        yield ONE, f"unet.{ours}", f"{UNET}.{official}", f"unet.{diffusers}"
    yield from unet_bricks(c)
    for side in ("encoder", "decoder"):
        for ours, diffusers in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield ONE, f"vae.{side}.{ours}", f"{VAE}.{side}.{ours}", f"vae.{side}.{diffusers}"
        mid, theirs = f"vae.{side}.mid", f"vae.{side}.mid_block"
        yield VAE_RES, f"{mid}.0", f"{VAE}.{side}.mid.block_1", f"{theirs}.resnets.0"
        yield VAE_ATTENTION, f"{mid}.1", f"{VAE}.{side}.mid.attn_1", f"{theirs}.attentions.0"
        yield VAE_RES, f"{mid}.2", f"{VAE}.{side}.mid.block_2", f"{theirs}.resnets.1"
        yield from vae_bricks(c, side, *(("down", "down") if side == "encoder" else ("up", "up")))
    for name in ("quant_conv", "post_quant_conv"):
        yield ONE, f"vae.{name}", f"{VAE}.{name}", f"vae.{name}"
    for ours, theirs in (("token_embedding", "embeddings.token_embedding"), ("norm", "final_layer_norm"),
                         ("position_embedding", "embeddings.position_embedding")):
        yield ONE, f"text_encoder.{ours}", f"{TEXT}.{theirs}", f"text_encoder.{theirs}"
    for i in range(c.text.num_layers):
        theirs = f"encoder.layers.{i}"
        yield both(TEXT_LAYER), f"text_encoder.layers.{i}", f"{TEXT}.{theirs}", f"text_encoder.{theirs}"


def unet_bricks(c: Config) -> Iterator[tuple[dict, str, str, str]]:
    """The official U-Net numbers all blocks of the way down, Downsamples included, and of the way up, without."""
    transformer = {**both({n: n for n in ("norm", "proj_in", "proj_out")}),
                   **both({ours: tuple(f"transformer_blocks.0.{n}" for n in names) if isinstance(names, tuple)
                           else f"transformer_blocks.0.{names}" for ours, names in INNER.items()})}
    u, levels, i = c.unet, len(c.unet.channel_mult), 1
    for level in range(levels):
        for b in range(u.num_res_blocks):
            ours, theirs = f"unet.down.{level}.blocks.{b}", f"unet.down_blocks.{level}"
            yield UNET_RES, f"{ours}.res", f"{UNET}.input_blocks.{i}.0", f"{theirs}.resnets.{b}"
            if u.attention[level]:
                yield transformer, f"{ours}.transformer", f"{UNET}.input_blocks.{i}.1", f"{theirs}.attentions.{b}"
            i += 1
        if level < levels - 1:
            yield (ONE, f"unet.down.{level}.resample.conv", f"{UNET}.input_blocks.{i}.0.op",
                   f"unet.down_blocks.{level}.downsamplers.0.conv")
            i += 1
    yield UNET_RES, "unet.mid1.res", f"{UNET}.middle_block.0", "unet.mid_block.resnets.0"
    yield transformer, "unet.mid1.transformer", f"{UNET}.middle_block.1", "unet.mid_block.attentions.0"
    yield UNET_RES, "unet.mid2.res", f"{UNET}.middle_block.2", "unet.mid_block.resnets.1"
    for j, level in enumerate(reversed(range(levels))):
        for b in range(u.num_res_blocks + 1):
            ours, theirs = f"unet.up.{j}.blocks.{b}", f"unet.up_blocks.{j}"
            i, at = j * (u.num_res_blocks + 1) + b, 1 + u.attention[level]
            yield UNET_RES, f"{ours}.res", f"{UNET}.output_blocks.{i}.0", f"{theirs}.resnets.{b}"
            if u.attention[level]:
                yield transformer, f"{ours}.transformer", f"{UNET}.output_blocks.{i}.1", f"{theirs}.attentions.{b}"
        if level > 0:
            yield (ONE, f"unet.up.{j}.resample.conv", f"{UNET}.output_blocks.{i}.{at}.conv",
                   f"unet.up_blocks.{j}.upsamplers.0.conv")


def vae_bricks(c: Config, side: str, way: str, resample: str) -> Iterator[tuple[dict, str, str, str]]:
    """Careful, the official decoder numbers its levels by resolution, the way down: its up.3 comes first."""
    levels = len(c.vae.channel_mult)
    for j in range(levels):
        ours, theirs = f"vae.{side}.{way}.{j}", f"vae.{side}.{way}_blocks.{j}"
        official = f"{VAE}.{side}.{way}.{j if way == 'down' else levels - 1 - j}"
        for b in range(c.vae.num_res_blocks + (way == "up")):
            yield VAE_RES, f"{ours}.blocks.{b}", f"{official}.block.{b}", f"{theirs}.resnets.{b}"
        if j < levels - 1:
            yield (ONE, f"{ours}.resample.conv", f"{official}.{resample}sample.conv", f"{theirs}.{resample}samplers.0.conv")


class Entry(NamedTuple):
    """One tensor of ours and where it comes from."""
    shape: tuple[int, ...]
    official: tuple[str, ...]     # several: stacked
    diffusers: tuple[str, ...]
    conv: bool                    # in official files it has two more dimensions: a 1x1 convolution where ours is linear


def name_map(c: Config) -> dict[str, Entry]:
    """Every tensor name of ours -> Entry."""
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LatentDiffusion(c, None).named_parameters()}
    out = {}
    for table, ours, official, diffusers in bricks(c):
        for leaf, names in table.items():
            for kind in ("weight", "bias"):
                name = ".".join(filter(None, (ours, leaf, kind)))
                if name in shapes:
                    o, d = (tuple(".".join(filter(None, (prefix, n, kind))) for n in (ns if isinstance(ns, tuple) else (ns,)))
                            for prefix, ns in zip((official, diffusers), names))
                    conv = kind == "weight" and (leaf in ("proj_in", "proj_out") or (table is VAE_ATTENTION and leaf != "norm"))
                    out[name] = Entry(shapes[name], o, d, conv)
    assert out.keys() == shapes.keys(), sorted(shapes.keys() - out.keys())[:3]
    return out


# %% 2. Reading
# ----------------------------------------------------------------------------------------------------------------

KNOWN = {  # sha256: (name, bytes); the first three files' exact sizes are not on record
    "86cd1d3ccb044d7ba8db743d717c9bac603c4043508ad2571383f954390f3cea": ("sd-v1-1.ckpt", 4_265_380_512),
    "3b87d30facd5bafca1cbed71cfb86648aad75d1c264663c0cc78c7aea8daec0d": ("sd-v1-2.ckpt", 4_265_380_512),
    "2cff93af4dcc07c3e03110205988ff98481e86539c51a8098d4f2236e41f7f2f": ("sd-v1-3.ckpt", 4_265_380_512),
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": ("sd-v1-4.ckpt", 4_265_380_512),
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": ("v1-5-pruned-emaonly.ckpt", 4_265_380_512),
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa": ("v1-5-pruned-emaonly.safetensors", 4_265_146_304),
    "e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053": ("v1-5-pruned.ckpt", 7_703_807_346),
    "1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6": ("v1-5-pruned.safetensors", 7_703_324_286),
    "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19": ("sd-v1-5-inpainting.ckpt", 4_265_437_280),
}
# Classes that training frameworks leave in checkpoints: made inert. Nothing else beside tensors and plain values is read.
INERT = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.")
# In official files, beside the networks: never used here.
TABLES = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
          "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
          "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar")


def recognised(path: Path) -> str | None:
    """The name of an official file, by size and sha256; None for any other."""
    size = path.stat().st_size
    if not any(abs(size - known) < 100_000 for _, known in KNOWN.values()):
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file, tqdm(total=size, desc="sha256", unit="B", unit_scale=True) as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return KNOWN.get(digest.hexdigest(), (None,))[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped rather than read. Raises InputError."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as e:
        raise InputError(f"{path} can't be opened ({e.strerror}); check the path") from None
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-LFS pointer, not the file itself; fetch it with: git lfs pull")
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"{path} is an HTML page, not a checkpoint; the download needs a log-in or has moved: get it again")
    if not head:
        raise InputError(f"{path} is empty; get it again")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path} is no whole .safetensors file ({shortened(str(e))}); get it again") from None


def inert(name: str) -> type:
    """A class that takes whatever a pickle gives it and does nothing."""
    return type(name, (), {"__init__": lambda self, *a, **k: None, "__setstate__": lambda self, state: None})


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A .ckpt or .bin: a zip with a pickle in it, read without running anything that it holds."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is neither a .safetensors nor a whole torch file; get it again")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in names if not name.startswith(INERT)]
        if refused:
            raise InputError(f"{path} asks for {', '.join(refused[:3])}: that is no checkpoint's business; refused, and "
                             "nothing in it has run; get the file from a source that you trust, or as .safetensors")
        with torch.serialization.safe_globals([(inert(name.rsplit(".")[-1]), name) for name in names]):
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except InputError:
        raise
    except Exception as e:         # a pickle from outside: whatever goes wrong in it, the file is
        raise InputError(f"{path} is damaged ({type(e).__name__}: {shortened(str(e))}); get it again") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    return {name: t for name, t in found.items() if isinstance(t, Tensor)}


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder, as unet.*, vae.* and text_encoder.*."""
    tensors = {}
    for part in ("unet", "vae", "text_encoder"):
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        names = [f"{'pytorch_model' if part == 'text_encoder' and e == 'bin' else stem}{v}.{e}"
                 for v in ("", ".fp16") for e in ("safetensors", "bin")]
        path = next((folder / part / n for n in names if (folder / part / n).exists()), None)
        if path is None:
            raise InputError(f"{folder} lacks {part}/{names[0]} (or {', '.join(names[1:])}); is it a diffusers folder?")
        for name, t in read_tensors(path).items():
            name = re.sub(r"^text_model\.", "", name)
            if part == "vae":                          # the names before diffusers 0.15
                for old, new in (("query", Q), ("key", K), ("value", V), ("proj_attn", "to_out.0")):
                    name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
            tensors[f"{part}.{name}"] = t
    return tensors


def download(repository: str) -> Path:
    """A hub repository as a diffusers folder, in huggingface_hub's cache."""
    from huggingface_hub import HfApi, snapshot_download
    try:
        files = HfApi().list_repo_files(repository)
        wanted = []
        for part in ("unet", "vae", "text_encoder"):
            found = [f for e in (r"\.safetensors", r"\.bin") for v in ("", r"\.fp16") for f in files
                     if re.fullmatch(rf"{part}/(diffusion_pytorch_model|pytorch_model|model){v}{e}", f)]
            wanted += found[:1]
        if len(wanted) < 3:
            raise InputError(f"{repository} holds no diffusers folder; download one of its files and pass it: "
                             f"{', '.join(f for f in files if f.endswith(('.ckpt', '.safetensors')))[:200]}")
        return Path(snapshot_download(repository, allow_patterns=[*wanted, "tokenizer/*"]))
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"{repository} can't be had from the hub ({type(e).__name__}: {shortened(str(e))}); check the name "
                         "and the network, or pass a file") from None


# %% 3. The tokenizer
# ----------------------------------------------------------------------------------------------------------------

def read_tokenizer(source: Path) -> tokenizers.Tokenizer:
    """bpe_simple_vocab_16e6.txt(.gz), a folder with vocab.json and merges.txt, or a tokenizer.json. Raises InputError."""
    try:
        if source.is_dir() and (source / "vocab.json").exists():
            merges = [line for line in read_text(source / "merges.txt").splitlines() if not line.startswith("#version")]
            return clip_backend(json.loads(read_text(source / "vocab.json")), pairs(merges))
        if source.is_dir():
            source = source / "tokenizer.json"
        if source.suffix == ".json":
            return tokenizers.Tokenizer.from_str(read_text(source))
        text = gzip.decompress(source.read_bytes()).decode() if source.suffix == ".gz" else read_text(source)
        merges = pairs(text.split("\n")[1 : 49152 - 256 - 2 + 1])
        # The order of OpenAI's table: printable bytes first, then the others, which stand for themselves shifted by 256.
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
        words = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges), BOS, EOS]
        return clip_backend({word: i for i, word in enumerate(words)}, merges)
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"{source} is no CLIP vocabulary ({type(e).__name__}: {shortened(str(e))}); pass "
                         "bpe_simple_vocab_16e6.txt.gz, a folder with vocab.json and merges.txt, or a tokenizer.json") from None


def pairs(lines: list[str]) -> list[tuple[str, str]]:
    return [tuple(line.split()) for line in lines if line.strip()]


def find_tokenizer(given: str | None, folder: Path | None) -> tokenizers.Tokenizer:
    """The one given; or the folder's; or the hub's."""
    if given:
        return read_tokenizer(Path(given))
    if folder and (folder / "tokenizer").is_dir():
        return read_tokenizer(folder / "tokenizer")
    from huggingface_hub import hf_hub_download
    try:
        return read_tokenizer(Path(hf_hub_download("openai/clip-vit-large-patch14", "tokenizer.json")))
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"the vocabulary can't be had from the hub ({type(e).__name__}); pass --tokenizer with "
                         "bpe_simple_vocab_16e6.txt.gz, a folder with vocab.json and merges.txt, or a tokenizer.json") from None


# %% 4. Converting
# ----------------------------------------------------------------------------------------------------------------

def config_of(tensors: dict[str, Tensor], official: bool) -> Config:
    """SD1 or SD1_INPAINT, with the widths that the tensors have (a fine-tune has the same; a test's model is narrower)."""
    def shape(o: str, d: str) -> tuple[int, ...]:
        name = o if official else d
        if name not in tensors:
            raise InputError(f"it lacks {name}")
        return tuple(tensors[name].shape)

    conv_in = shape(f"{UNET}.input_blocks.0.0.weight", "unet.conv_in.weight")
    vocab, width = shape(f"{TEXT}.embeddings.token_embedding.weight", "text_encoder.embeddings.token_embedding.weight")
    length = shape(f"{TEXT}.embeddings.position_embedding.weight", "text_encoder.embeddings.position_embedding.weight")[0]
    layers = len({n for n in tensors if re.search(r"encoder\.layers\.\d+\.layer_norm1\.weight$", n)})
    vae = shape(f"{VAE}.encoder.conv_in.weight", "vae.encoder.conv_in.weight")[0]
    base = SD1_INPAINT if conv_in[1] == 9 else SD1
    return replace(base, text=replace(base.text, vocab_size=vocab, width=width, max_length=length, num_layers=layers,
                                      num_heads=max(1, width // 64)),
                   vae=replace(base.vae, channels=vae), unet=replace(base.unet, channels=conv_in[0]))


def refuse_others(tensors: dict[str, Tensor], source: str) -> None:
    """Names what is not Stable Diffusion 1.x."""
    for kind, mark in (("a LoRA: it changes a checkpoint, and is none", r"lora_|\.lora\."),
                       ("Stable Diffusion XL", r"^conditioner\."), ("Stable Diffusion 2.x", r"^cond_stage_model\.model\.")):
        if any(re.search(mark, name) for name in tensors):
            raise InputError(f"{source} is {kind}; this converts Stable Diffusion 1.x")
    width = tensors.get("text_encoder.embeddings.token_embedding.weight")
    if width is not None and width.shape[1] == 1024:
        raise InputError(f"{source} is Stable Diffusion 2.x; this converts Stable Diffusion 1.x")


def sources(c: Config, tensors: dict[str, Tensor], official: bool, source: str) -> dict[str, list[Tensor]]:
    """Our tensor names -> the tensors to stack. Every tensor of the source is used or known to be of no use."""
    ema = official and any(n.startswith("model_ema.diffusion_model") for n in tensors)
    if ema:
        print("tiny_ldm: the file holds two U-Nets; the averaged one (EMA) is the released model and is taken", file=sys.stderr)
    used, out, entries = set(), {}, name_map(c)
    for ours, entry in entries.items():
        names = entry.official if official else entry.diffusers
        if ema:
            names = [f"model_ema.{n[len('model.'):].replace('.', '')}" if n.startswith(UNET) else n for n in names]
        missing = [n for n in names if n not in tensors]
        if missing:
            raise InputError(f"{source} lacks {missing[0]}: no whole Stable Diffusion 1.x; get it again")
        used.update(names)
        out[ours] = [tensors[n] for n in names]
        rows = sum(t.shape[0] for t in out[ours])
        for n, t in zip(names, out[ours]):
            tail = tuple(t.shape[1:]) if t.shape[-2:] != (1, 1) or len(entry.shape) == 4 else tuple(t.shape[1:-2])
            if (rows, *tail) != entry.shape or not t.is_floating_point():
                raise InputError(f"{source}: {n} is {t.dtype} {list(t.shape)}, which does not make {list(entry.shape)}")
    known = lambda n: (n in TABLES or n.endswith("position_ids") or n in ("model_ema.decay", "model_ema.num_updates")
                       or (ema and n.startswith(UNET)))
    unknown = sorted(n for n in tensors if n not in used and not known(n))
    if unknown:
        raise InputError(f"{source} holds {len(unknown)} tensors that Stable Diffusion 1.x has not: {', '.join(unknown[:3])}")
    return out


def forget(t: Tensor) -> None:
    """Gives the memory behind a mapped tensor back to the kernel (Linux), so that only one is held at a time."""
    import ctypes
    import mmap
    page = mmap.PAGESIZE
    start = -(-t.data_ptr() // page) * page
    length = (t.data_ptr() + t.nbytes) // page * page - start
    if sys.platform == "linux" and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), 4)     # MADV_DONTNEED


DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_safetensors(path: Path, plan: dict[str, tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]],
                      metadata: dict[str, str]) -> None:
    """A .safetensors tensor by tensor (length of the header, header as JSON, then the bytes). plan: {name: (shape, dtype,
    a function that makes it)}. Raises InputError for values that are not finite, and for a full disk."""
    header, at = {"__metadata__": metadata}, 0
    for name, (shape, dtype, _) in plan.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; make it first")
    free = shutil.disk_usage(path.parent).free
    if free < at + len(head):
        raise InputError(f"{path} needs {at / 1e9:.2f} GB and {path.parent} has {free / 1e9:.2f} GB left; make room")

    def write(name: str) -> None:
        with open(name, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name, (shape, dtype, make) in tqdm(plan.items(), "converting", unit="tensor"):
                t = make().to(dtype)
                if not t.isfinite().all():
                    raise InputError(f"{name} holds values that are not finite in {str(dtype)[6:]}; get the file again"
                                     + (", or use --dtype float32" if dtype == torch.float16 else ""))
                file.write(t.contiguous().view(torch.uint8).numpy().data)

    try:
        write_whole(path, write)
    except OSError as e:
        why = "the disk is full" if e.errno == errno.ENOSPC else e.strerror
        raise InputError(f"{path} can't be written: {why}") from None


def convert(source: str, out: Path | None = None, dtype: torch.dtype | None = None, tokenizer: str | None = None,
            force: bool = False) -> Path:
    """Official or diffusers' weights to a tiny_ldm weights file; returns where it is. Raises InputError."""
    path, folder, known = Path(source), None, None
    out = out or Path(f"{path.stem if path.is_file() else path.name}.tiny_ldm.safetensors")
    may_write(out, force)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.suffix in (".ckpt", ".safetensors"):
        path = download(source)
    if path.is_dir():
        folder, tensors = path, read_folder(path)
    else:
        tensors, known = read_tensors(path), recognised(path)
    refuse_others(tensors, source)
    try:
        config = config_of(tensors, folder is None)
    except InputError as e:
        raise InputError(f"{source} is no Stable Diffusion 1.x: {e}") from None
    parts = sources(config, tensors, folder is None, source)
    backend = find_tokenizer(tokenizer, folder)
    if backend.get_vocab_size() != config.text.vocab_size:
        raise InputError(f"the vocabulary has {backend.get_vocab_size()} tokens, {source} has {config.text.vocab_size}; pass "
                         "the right one with --tokenizer")
    config = replace(config, name=known or config.name)
    print(f"tiny_ldm: {source}: {known or config.name + ', a file not on record (a fine-tune?)'}", file=sys.stderr)

    def maker(shape: tuple[int, ...], stack: list[Tensor]) -> Callable[[], Tensor]:
        def make() -> Tensor:
            t = torch.cat([p.reshape(-1, *shape[1:]) for p in stack]) if len(stack) > 1 else stack[0].reshape(shape).clone()
            for p in stack:
                forget(p)
            return t
        return make

    plan = {ours: (entry.shape, dtype or parts[ours][0].dtype, maker(entry.shape, parts[ours]))
            for ours, entry in name_map(config).items()}
    write_safetensors(out, plan, {"format": "tiny_ldm", "config": json.dumps(asdict(config)), "tokenizer": backend.to_str()})
    return out


def to_official(source: str, out: Path, dtype: torch.dtype | None = None, force: bool = False) -> Path:
    """A tiny_ldm weights file to a checkpoint in the official layout (without the schedule tables). Raises InputError."""
    may_write(out, force)
    config, _, tensors = read_weights(Path(source), torch.device("cpu"))
    plan = {}
    for ours, entry in name_map(config).items():
        t = tensors[ours]
        for name, piece in zip(entry.official, t.chunk(len(entry.official))):
            shape = tuple(piece.shape) + ((1, 1) if entry.conv else ())
            plan[name] = (shape, dtype or t.dtype, lambda piece=piece, shape=shape: piece.reshape(shape))
    write_safetensors(out, plan, {"format": "pt"})
    return out


def may_write(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise InputError(f"{out} exists already; choose another name with -o, or replace it with --force")


# %% 5. Command line
# ----------------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    ap = ArgumentParser(prog="weights_convert.py", description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("source", metavar="SOURCE", help=".ckpt, .safetensors, diffusers folder, or hub repository id")
    ap.add_argument("-o", "--output", metavar="FILE", help="default: named after SOURCE")
    ap.add_argument("--dtype", choices=("float16", "float32"), help="default: as in SOURCE")
    ap.add_argument("--tokenizer", metavar="FILE_OR_FOLDER", help="CLIP's vocabulary, for a lone checkpoint")
    ap.add_argument("--to", choices=("tiny_ldm", "official"), default="tiny_ldm", help="the direction")
    ap.add_argument("--force", action="store_true", help="replace an output that exists")
    try:
        args = ap.parse_args(argv)
        dtype = getattr(torch, args.dtype) if args.dtype else None
        out = Path(args.output) if args.output else None
        if args.to == "official":
            print(to_official(args.source, out or Path(f"{Path(args.source).stem}.official.safetensors"), dtype, args.force))
        else:
            print(convert(args.source, out, dtype, args.tokenizer, args.force))
        return 0
    except InputError as e:
        print(f"tiny_ldm: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tiny_ldm: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
