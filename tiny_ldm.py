"""tiny_ldm: latent diffusion, the architecture of Stable Diffusion, in one file to read and run.

A picture is hard to make at once and easy to make by steps: train a network to remove a little
noise from noisy pictures, start from nothing but noise, and remove it fifty times. Latent diffusion
(Rombach et al. 2022, arXiv:2112.10752) does this not on pixels but on a small code of the picture,
its latents, which is 48 times smaller. Five parts:

    "a red circle ..."                              random noise       [B, 4, 64, 64]
           | tokenizer                                     |
    ids    [B, 77]                                         v
           | text encoder (CLIP)              +------> U-Net(xₜ, t, context) -> guess of the noise
           v                                  |            |                    ε  [B, 4, 64, 64]
    context [B, 77, 768] ---------------------+            v
                                              |     sampler: one step, to less noise
                                              +------------|   (S times)
                                                           v
                                                    latents x₀         [B, 4, 64, 64]
                                                           | VAE decoder
                                                           v
                                                    picture      [B, 3, 512, 512]

(Shapes as in Stable Diffusion 1.x. The model built into this repository is the same code with
smaller numbers.)

    1. Config        every number, and why it is that number
    2. Diffusion     the noise schedule, what noise does to a picture, and the loss
    3. Blocks        the four bricks that all networks are made of
    4. VAE           pictures to latents and back
    5. Text          words to ids to vectors
    6. U-Net         the network that sees the noise
    7. Samplers      how to walk from noise to a picture
    8. LatentDiffusion   everything together: load, save, generate
    9. Shapes        a little world of coloured shapes to learn from
   10. Training      the autoencoder first, then the U-Net and its text encoder
   11. Command line

Letters in shape comments: B batch, C channels, H W pixels, h w latents, L tokens, D width, N places
(h·w, or L), d width of one head, E width of the timestep's vector, S steps, T timesteps (1000).
"""
# %% Imports
from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import json
import math
import os
import random
import re
import signal
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

AS_PROGRAM = __name__ == "__main__" and "ipykernel" not in sys.modules       # no notebook
if AS_PROGRAM:       # Ctrl-C while PyTorch is being loaded ends without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm


class InputError(ValueError):
    """What the user gave can't be used. The message is one line: what is wrong, with the value, and
    what to do."""


@contextlib.contextmanager
def blaming(what: str, cure: str) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of a file from outside: raises InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")       # one line is enough
            yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        kind = "" if isinstance(e, OSError) else f"{type(e).__name__}: "
        raise InputError(f"{what} ({kind}{shortened(str(e))}); {cure}") from None


def shortened(text: str, width: int = 60) -> str:
    """The beginning of a text, for a message of one line; what can't be seen is escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= width else text[: width - 3] + "..."


# %% 1. Config
# --------------------------------------------------------------------------------------------------
# Every number in which models differ stands here and nowhere else. Stable Diffusion 1.x is one
# instance of these classes (`SD1`), the small model built into this repository another (`SHAPES`),
# so whatever you learn on the small one holds for the large one.

@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 49408       # CLIP's: 2 x 256 byte symbols + 48,894 merges + begin and end
    max_length: int = 77          # L: tokens a prompt, begin and end included
    width: int = 768              # D: also the width of the U-Net's context
    num_layers: int = 12
    num_heads: int = 12


@dataclass(frozen=True)
class VAEConfig:
    channels: int = 128           # at full resolution; a level has this times its number below
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)   # three halvings between four levels
    num_res_blocks: int = 2       # ResBlocks a level (the decoder has one more)
    latent_channels: int = 4      # 512 x 512 x 3 numbers become 64 x 64 x 4: 48 times fewer
    norm_groups: int = 32


@dataclass(frozen=True)
class UNetConfig:
    # 9 for inpainting: 4 latents + 1 mask + 4 latents of the masked picture
    in_channels: int = 4
    out_channels: int = 4
    channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    # Which levels have attention: not the coarsest one (the middle, as coarse, always has)
    attention: tuple[bool, ...] = (True, True, True, False)
    # SD 1.x fixes the number of heads (their size grows: 40, 80, 160) ...
    num_heads: int = 8
    head_dim: int | None = None   # ... SD 2.x fixes their size at 64 instead
    norm_groups: int = 32


@dataclass(frozen=True)
class ScheduleConfig:
    num_timesteps: int = 1000     # T
    beta_start: float = 0.00085   # variance of the noise added by the first step ...
    beta_end: float = 0.0120      # ... and by the last one


@dataclass(frozen=True)
class Config:
    """A whole model. `prediction` is what the U-Net puts out: "eps" (the noise) or "v" (both are
    explained in section 2)."""
    name: str
    # Side of the training pictures, and the default size of the results
    image_size: int
    prediction: str = "eps"
    # 1 / (standard deviation of the latents), so that scaled latents have about 1
    scale_factor: float = 0.18215
    # How much the prompt counts unless the user says (section 8: guidance)
    guidance_scale: float = 7.5
    text: TextConfig = field(default_factory=TextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @property
    def latent_stride(self) -> int:
        """Pixels a latent along each side: 8 in SD 1.x."""
        return 2 ** (len(self.vae.channel_mult) - 1)

    @property
    def stride(self) -> int:
        """Width and height of a picture must be multiples of this: every halving in the VAE and the
        U-Net. 64 in SD 1.x."""
        return self.latent_stride * 2 ** (len(self.unet.channel_mult) - 1)

    @staticmethod
    def from_dict(d: dict) -> "Config":
        """The inverse of `dataclasses.asdict`, from JSON (where tuples became lists)."""
        parts = {"text": TextConfig, "vae": VAEConfig, "unet": UNetConfig,
                 "schedule": ScheduleConfig}
        tuples = lambda part: {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
        return Config(**{**d, **{name: kind(**tuples(d[name])) for name, kind in parts.items()}})


SD1 = Config("Stable Diffusion 1.x", image_size=512)
SD1_INPAINT = replace(SD1, name="Stable Diffusion 1.x inpainting", unet=UNetConfig(in_channels=9))
SHAPES = Config(
    "shapes",
    image_size=64,          # 8 x 8 latents: the fewest in which a shape still keeps its corners
    prediction="v",         # learns colours and layout sooner than "eps" (section 2 says why)
    scale_factor=1.0,       # measured after the VAE is trained, and stored with the weights
    guidance_scale=2.0,     # measured: with more, a second thing may be drawn twice
    text=TextConfig(vocab_size=512, max_length=24, width=128, num_layers=3, num_heads=4),
    vae=VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, norm_groups=8),
    unet=UNetConfig(channels=112, channel_mult=(1, 1), num_res_blocks=1, attention=(True, True),
                    num_heads=4, norm_groups=16))


# %% 2. Diffusion
# --------------------------------------------------------------------------------------------------
# Take clean latents x₀ and mix them with Gaussian noise ε, at a level set by the timestep t = 0 ...
# 999:
#
#     xₜ = √ᾱₜ · x₀ + √(1 − ᾱₜ) · ε                  (Ho et al. 2020, arXiv:2006.11239, equation 4)
#
# ᾱ falls from nearly 1 (clean) to nearly 0 (nothing but noise), and the variance stays 1 if x₀ has
# variance 1. A network that sees only xₜ and t and guesses ε knows also x₀, since the line above
# ties them together. So there are four ways to say the same guess, and one can go from any to any:
#
#     ε       the noise: what Stable Diffusion 1.x predicts
#     x₀      the clean latents: what we want in the end
#     v       √ᾱₜ · ε − √(1 − ᾱₜ) · x₀: like ε where there is little noise and like −x₀ where there
#             is much, so it is never trivial to guess (Salimans & Ho 2022, arXiv:2202.00512)
#     score   ∇ log p(xₜ) = −ε / √(1 − ᾱₜ): the direction in which xₜ gets more likely
#             (Song et al. 2021, arXiv:2011.13456)

def make_alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """ᾱₜ for t = 0 ... T−1: float64 on the CPU, [T]. Cast it once, after the arithmetic.

    Careful, "scaled linear": it is √β that grows linearly, not β (CompVis
    ldm/modules/diffusionmodules/util.py).
    """
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps,
                           dtype=torch.float64, device="cpu")
    return torch.cumprod(1 - roots**2, dim=0)      # ᾱₜ = Π (1 − βₛ), s = 0 ... t


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """xₜ = √ᾱₜ x₀ + √(1−ᾱₜ) ε.  x0, eps [B, ...]; alpha_bar a number or a tensor that broadcasts,
    as in all these."""
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps


def x0_from_eps(x: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """x₀ = (xₜ − √(1−ᾱₜ) ε) / √ᾱₜ"""
    return (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def eps_from_x0(x: Tensor, x0: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """ε = (xₜ − √ᾱₜ x₀) / √(1−ᾱₜ)"""
    return (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5


def v_from_eps(x0: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """v = √ᾱₜ ε − √(1−ᾱₜ) x₀"""
    return alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * x0


def eps_from_v(x: Tensor, v: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """ε = √ᾱₜ v + √(1−ᾱₜ) xₜ  (put the definitions of v and xₜ in: the x₀ cancel)"""
    return alpha_bar**0.5 * v + (1 - alpha_bar) ** 0.5 * x


def x0_from_v(x: Tensor, v: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """x₀ = √ᾱₜ xₜ − √(1−ᾱₜ) v"""
    return alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * v


def score_from_eps(eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """∇ log p(xₜ) = −ε / √(1−ᾱₜ)"""
    return -eps / (1 - alpha_bar) ** 0.5


def diffusion_loss(unet: nn.Module, x0: Tensor, context: Tensor, alphas_cumprod: Tensor,
                   prediction: str, t: Tensor, eps: Tensor) -> Tensor:
    """The whole training of a diffusion model: add noise, guess, compare (Ho et al. 2020,
    algorithm 1).

    x0 [B, 4, h, w] scaled latents; context [B, L, D]; t [B] int64 in 0 ... T−1; eps like x0,
    standard normal. The target is ε, or v, whose error is that of ε divided by √ᾱₜ: it counts
    for more where there is much noise, which is where the layout of a picture is decided. Returns
    the mean squared error, a scalar.
    """
    alpha_bar = alphas_cumprod[t].to(x0.dtype).view(-1, 1, 1, 1)
    target = eps if prediction == "eps" else v_from_eps(x0, eps, alpha_bar)
    return F.mse_loss(unet(add_noise(x0, eps, alpha_bar), t, context), target)


# %% 3. Blocks
# --------------------------------------------------------------------------------------------------
# Four bricks. The VAE and the U-Net are ResBlocks between Downsamples and Upsamples, with Attention
# in the U-Net at most levels and in the middle, and in the VAE in the middle alone; the text
# encoder is Attention all the way. Pictures go in and out as [B, C, H, W], sequences as [B, N, D].
# Arguments hold what differs between the networks: above all the epsilons and the padding, which
# are easy to get wrong and hard to see: the picture only gets a little worse. Some names come from
# the end of the section, where they are made faster or smaller: `norm_silu_conv(norm, conv, x)` is
# conv(silu(norm(x))), `Linear` is PyTorch's, `in_bands(layer, x, 2)` is layer(x), which is twice as
# large as x, and `attention_in_blocks` is attention.
#
# Two ideas make networks this deep trainable at all. Residuals: a block adds to its input rather
# than replaces it, so that gradients find a way past it (He et al. 2015, arXiv:1512.03385). Norms:
# a block first brings its input to mean 0 and variance 1, so that it need not care for the scale.

def zeroed(layer: nn.Module) -> nn.Module:
    """Fills with zeros: a residual branch that starts as nothing trains better (Zhang et al. 2019,
    arXiv:1901.09321)."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class GroupNorm(nn.GroupNorm):
    """Normalises each group of channels of each picture to mean 0, variance 1 (Wu & He 2018,
    arXiv:1803.08494), in float32 even where the network is half precision, as the original does."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.group_norm(x.to(wide), self.num_groups, weight, bias, self.eps).to(x.dtype)


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x))) + linear(silu(emb))))): [B, C, H, W] ->
    [B, C', H, W], where skip is a 1x1 convolution if C' is not C, and nothing otherwise.

    emb [B, E] is the timestep as a vector (section 6), for the U-Net alone; the VAE knows no time.
    eps is 1e-5 in the U-Net and 1e-6 in the VAE (CompVis openaimodel.py, model.py).
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float,
                 emb_dim: int | None = None):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels) if emb_dim else None
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x)
        if self.emb is not None:
            # SiLU here too, after the one inside the time embedding
            h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = norm_silu_conv(self.norm2, self.conv2, h)
        return h + (x if self.skip is None else self.skip(x))


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v over several heads (Vaswani et al. 2017, arXiv:1706.03762), then a
    Linear.

    x [B, N, C] asks; context [B, L, D] answers, x itself where context_dim is None
    (self-attention). q, k and v come from as few matrix products as possible. causal: position i
    sees 0 ... i only (the text encoder).
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None,
                 qkv_bias: bool = False, causal: bool = False):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        if context_dim is None:
            self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q = Linear(dim, dim, bias=qkv_bias)
            self.kv = Linear(context_dim, 2 * dim, bias=qkv_bias)
        self.out = Linear(dim, dim)

    def qkv_heads(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, heads, N, d]; k and v [B, heads, L, d]."""
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, (k, v) = self.q(x), self.kv(context).chunk(2, dim=-1)
        return tuple(y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv_heads(x, context)
        on_cpu, many = x.device.type == "cpu", k.shape[2] >= 1024 and not torch.is_grad_enabled()
        if on_cpu and many and q.dtype in IN_BLOCKS and not self.causal:
            y = attention_in_blocks(q, k, v)
        # In bfloat16 PyTorch's kernel is slow, most of all at the gradient: written out, training
        # takes 40 % less time
        elif on_cpu and not many and q.dtype == torch.bfloat16:
            y = self.softmax(q, k) @ v
        else:                   # the three ways compute the same
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def softmax(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax(q kᵀ / √d): [B, heads, N, L], how much each position looks at each other."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if self.causal:         # minus infinity above the diagonal: no weight on what comes later
            scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
        return scores.softmax(dim=-1)

    def weights(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The weights behind `forward(x, context)`, for looking at them."""
        return self.softmax(*self.qkv_heads(x, context)[:2])


class Downsample(nn.Module):
    """Halves H and W: 3x3 convolution with stride 2.

    Careful, two paddings: the U-Net pads 1 on all sides, the VAE's encoder 1 at the right and the
    bottom only. The wrong one shifts everything by half a pixel of the smaller picture (CompVis
    model.py:66, openaimodel.py:143).
    """

    def __init__(self, channels: int, symmetric: bool):
        super().__init__()
        self.pad = (1, 1, 1, 1) if symmetric else (0, 1, 0, 1)     # left, right, top, bottom
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class Upsample(nn.Module):
    """Doubles H and W: each pixel becomes four, then a 3x3 convolution smooths."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        layer = lambda part: self.conv(F.interpolate(part, scale_factor=2.0, mode="nearest"))
        return in_bands(layer, x, 2)


class Level(nn.Module):
    """One resolution of a network: its blocks, and the Downsample or Upsample that leads to the
    next (or None)."""

    def __init__(self, blocks: list[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.resample is None else self.resample(x)


# The rest of the section is for memory and speed alone; the first time you may skip it.

BAND = 256 * 256             # pixels; from four times as many on, pictures are taken in bands


def is_large(x: Tensor) -> bool:
    return x.shape[2] * x.shape[3] >= 4 * BAND and not torch.is_grad_enabled()


def in_bands(layer: Callable[[Tensor], Tensor], x: Tensor, scale: int = 1) -> Tensor:
    """layer(x), [B, C, H, W] -> [B, C', scale·H, scale·W], where layer looks one row up and down.

    Large pictures go through in bands of rows, each with a row more above and below, whose results
    are dropped: the same values, but what the layer holds on the way stays small.
    """
    if not is_large(x):
        return layer(x)
    h, w = x.shape[2:]
    out, rows = None, max(1, BAND // w)
    for y in range(0, h, rows):
        top, end = max(0, y - 1), min(h, y + rows)
        band = layer(x[:, :, top : end + 1])[:, :, scale * (y - top) : scale * (end - top)]
        if out is None:
            order = torch.channels_last if band.stride(1) == 1 else torch.contiguous_format
            out = torch.empty((*band.shape[:2], scale * h, scale * w), dtype=band.dtype,
                              device=band.device, memory_format=order)
        out[:, :, scale * y : scale * end] = band
    return out


def norm_silu_conv(norm: GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(silu(norm(x))); of a large x in bands, with the norm that the whole has."""
    if not is_large(x):
        return conv(F.silu(norm(x)))
    channels, h, w = x.shape[1:]

    def mean_of(f: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of f(x) over its group, for each channel: [B, C, 1, 1]."""
        sums = sum(f(part.float()).sum((2, 3)) for part in x.split(max(1, BAND // w), dim=2))
        groups = sums.unflatten(1, (norm.num_groups, -1)).mean(2) / (h * w)
        return groups.repeat_interleave(channels // norm.num_groups, 1)[..., None, None]

    mean = mean_of(lambda part: part)
    factor = (mean_of(lambda part: (part - mean) ** 2) + norm.eps).rsqrt()
    factor = factor * norm.weight[:, None, None]
    shift = norm.bias[:, None, None] - mean * factor
    return in_bands(lambda part: conv(F.silu(part * factor + shift).to(x.dtype)), x)


HAS_MKL = torch.backends.mkl.is_available()


class Linear(nn.Linear):
    """W x + b for x [B, N, C], -> [B, N, C'].

    On x86 processors in float32 it is asked for as a convolution of one pixel, the same sum: those
    PyTorch gives to oneDNN, but matrix products to Intel's MKL, which on AMD's processors runs at
    less than half their speed: a step of SD 1.x takes a fifth less time there.
    """

    def forward(self, x: Tensor) -> Tensor:
        if (not HAS_MKL or x.device.type != "cpu" or x.dtype != torch.float32
                or torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        # Channels innermost in memory go in and out: then no later layer needs a copy
        pixels = x.contiguous()[:, :, None].movedim(3, 1)                   # [B, C, N, 1]
        return F.conv2d(pixels, self.weight[..., None, None], self.bias).movedim(1, 3).squeeze(2)


# The precisions that oneDNN, Intel's library of kernels, has here: not all processors do bfloat16
IN_BLOCKS = [torch.float32] * torch.backends.mkldnn.is_available() + [torch.bfloat16] * getattr(
    torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()


@torch.library.custom_op("tiny_ldm::attention_in_blocks", mutates_args=(),
                         schema="(Tensor q, Tensor k, Tensor v) -> Tensor")
def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, [B, heads, N, d], for many places on a CPU: with oneDNN's kernels, one
    head and 512 places at a time, whose weights stay in the processor's cache. It takes a third
    less time than PyTorch's own way: in float32 that spares a tenth of a step of SD 1.x."""
    y = heads_beside(q)
    for b, h in np.ndindex(q.shape[:2]):
        keys = (k[b, h] * q.shape[-1] ** -0.5).to_mkldnn()
        values = v[b, h].T.contiguous().to_mkldnn()
        for some, result in zip(q[b, h].split(512), y[b, h].split(512)):
            scores = F.linear(some.contiguous().to_mkldnn(), keys)           # linear(x, W) = x Wᵀ
            result.copy_(F.linear(scores.softmax(dim=-1), values).to_dense())
    return y


@attention_in_blocks.register_fake     # --compile can't look into it, and asks for the shape alone
def heads_beside(q: Tensor, *_: Tensor) -> Tensor:
    """An empty [B, heads, N, d], where the heads of a place lie side by side."""
    b, heads, n, d = q.shape
    return q.new_empty(b, n, heads, d).transpose(1, 2)


# %% 4. VAE
# --------------------------------------------------------------------------------------------------
# A variational autoencoder (Kingma & Welling 2013, arXiv:1312.6114): the encoder turns a picture
# [B, 3, H, W] in [−1, 1] into the mean and log-variance of a Gaussian over latents [B, 4, H/8,
# W/8]; the decoder turns latents into a picture. It throws away what the eye does not miss, so that
# the diffusion model can spend its effort on what is in the picture.

class MiddleAttention(nn.Module):
    """Single-head self-attention over all positions, with its norm and residual: x [B, C, h, w] ->
    the same."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.attention = Attention(channels, num_heads=1, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)                    # [B, h·w, C]
        return x + self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def middle(channels: int, groups: int) -> nn.Sequential:
    """The lowest resolution of encoder and decoder."""
    return nn.Sequential(ResBlock(channels, channels, groups, 1e-6),
                         MiddleAttention(channels, groups),
                         ResBlock(channels, channels, groups, 1e-6))


class Encoder(nn.Module):
    """image [B, 3, H, W] -> [B, 2·4, H/8, W/8], of which quant_conv makes mean and log-variance."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        widths = [c.channels * mult for mult in c.channel_mult]
        self.conv_in = nn.Conv2d(3, c.channels, 3, padding=1)
        self.down = nn.Sequential()
        for level, (i, o) in enumerate(zip([c.channels, *widths], widths)):
            blocks = [ResBlock(i if n == 0 else o, o, c.norm_groups, 1e-6)
                      for n in range(c.num_res_blocks)]
            last = level == len(widths) - 1
            self.down.append(Level(blocks, None if last else Downsample(o, symmetric=False)))
        self.mid = middle(o, c.norm_groups)
        self.norm_out = GroupNorm(c.norm_groups, o, 1e-6)
        self.conv_out = nn.Conv2d(o, 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(x)))
        return norm_silu_conv(self.norm_out, self.conv_out, h)


class Decoder(nn.Module):
    """What post_quant_conv makes of latents, [B, 4, h, w] -> image [B, 3, 8h, 8w]: the encoder
    mirrored, with one ResBlock more a level."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        widths = [c.channels * mult for mult in reversed(c.channel_mult)]
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], c.norm_groups)
        self.up = nn.Sequential()
        for level, (i, o) in enumerate(zip([widths[0], *widths], widths)):
            blocks = [ResBlock(i if n == 0 else o, o, c.norm_groups, 1e-6)
                      for n in range(c.num_res_blocks + 1)]
            self.up.append(Level(blocks, Upsample(o) if level < len(widths) - 1 else None))
        self.norm_out = GroupNorm(c.norm_groups, o, 1e-6)
        self.conv_out = nn.Conv2d(o, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.up(self.mid(self.conv_in(z)))
        return norm_silu_conv(self.norm_out, self.conv_out, h)


class VAE(nn.Module):
    """Encoder and decoder, with a 1x1 convolution on either side of the latents.

    Its latents are not scaled: scale_factor is the diffusion model's affair
    (`LatentDiffusion.encode_image`).
    """

    def __init__(self, c: VAEConfig):
        super().__init__()
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, 3, H, W] in [−1, 1] -> mean, logvar, each [B, 4, H/8, W/8]."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """z [B, 4, h, w], not scaled -> image [B, 3, 8h, 8w], in [−1, 1] but for small
        overshoots."""
        return self.decoder(self.post_quant_conv(z))


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """z = mean + σ · noise, σ = exp(½ logvar): the "reparametrisation trick", through which
    gradients flow."""
    return mean + torch.exp(0.5 * logvar) * noise


def vae_loss(vae: VAE, image: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """|x̂ − x| + (x̂ − x)² of the reconstruction x̂ + kl_weight · KL(N(mean, σ²) || N(0, 1)), each
    a mean over its numbers.

    The absolute error wants sharp edges but pulls a doubtful pixel to the likeliest value alone,
    and may leave a small thing out for long; the squared error pulls by as much as it is wrong.
    Together they learn faster than either. The KL term (½(mean² + σ² − 1 − log σ²), Kingma &
    Welling, appendix B) keeps the latents near 0 and a little noisy: without it they may grow
    without bound, and pictures that look alike may lie far apart. It is kept tiny.
    """
    mean, logvar = vae.encode(image)
    reconstruction = vae.decode(sample_posterior(mean, logvar, noise))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    error = reconstruction - image
    return error.abs().mean() + error.square().mean() + kl_weight * kl.mean()


# %% 5. Text
# --------------------------------------------------------------------------------------------------
# A prompt becomes vectors in two steps. The tokenizer cuts it into pieces that occur often (byte
# pair encoding, Sennrich et al. 2016, arXiv:1508.07909) and numbers them; the text encoder, CLIP's
# transformer (Radford et al. 2021, arXiv:2103.00020), turns each number into a vector that knows
# the words before it. All L vectors go to the U-Net:
#
#     "A red ring"  ->  BOS  a  red  ring  EOS  EOS ...  ->  ids [B, L]  ->  context [B, L, D]
#
# A new model learns its own small vocabulary from its captions; an official one brings CLIP's.

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


class Tokenizer:
    """Prompts to ids, [B, L]: BOS, up to L−2 pieces, EOS, and then more EOS as padding.

    Careful: Stable Diffusion 1.x pads with EOS and lets the network attend to the padding; OpenAI's
    own CLIP pads with 0. `backend` is a tokenizer of the `tokenizers` library; CLIP's and that of a
    new model differ in nothing but their tables.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int):
        self.backend, self.max_length = backend, max_length
        self.bos, self.eos = backend.token_to_id(BOS), backend.token_to_id(EOS)

    def __call__(self, prompts: str | list[str], warn: bool = True) -> Tensor:
        """["a prompt", ...] -> LongTensor [B, L]. What does not fit is cut off, and with `warn` a
        line on stderr shows it."""
        rows = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            encoding = self.backend.encode(prompt)
            ids, room = encoding.ids, self.max_length - 2
            if warn and len(ids) > room:
                print(f"tiny_ldm: the prompt is longer than {room} tokens; cut off: "
                      f"{shortened(prompt[encoding.offsets[room][0]:])!r}", file=sys.stderr)
            ids = [self.bos, *ids[:room], self.eos]
            rows.append(ids + [self.eos] * (self.max_length - len(ids)))
        return torch.tensor(rows, dtype=torch.long)

    def count_cut(self, captions: list[str]) -> None:
        """Says on stderr how many captions are too long."""
        cut = sum(len(e.ids) > self.max_length - 2 for e in self.backend.encode_batch(captions))
        if cut:
            print(f"tiny_ldm: {cut} of {len(captions)} captions are longer than "
                  f"{self.max_length - 2} tokens and are cut", file=sys.stderr)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the vocabulary does not hold whole: for a small model, those
        it never met."""
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", prompt))
        # The end token stands for a letter without a piece, too
        return [w for w in words if len(ids := self.backend.encode(w).ids) > 1 or ids == [self.eos]]

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt, each with the places in L that its pieces have."""
        encoding, found = self.backend.encode(prompt), {}
        for place, word in enumerate(encoding.word_ids[: self.max_length - 2], 1):
            found.setdefault(word, []).append(place)
        at = encoding.offsets
        return [(prompt[at[p[0] - 1][0] : at[p[-1] - 1][1]], p) for p in found.values()]

    @staticmethod
    def train(captions: list[str], vocab_size: int, max_length: int) -> "Tokenizer":
        """A new tokenizer by CLIP's recipe (lower case, words split from punctuation, byte pairs,
        an end-of-word mark) whose merges are learned from `captions`."""
        backend = clip_backend({}, [])
        backend.train_from_iterator(captions, trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[BOS, EOS], end_of_word_suffix="</w>",
            show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        # The trainer numbers single characters in random order; sorted, the same captions give the
        # same tokenizer.
        merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
        merged = ["".join(pair) for pair in merges]
        characters = sorted(backend.get_vocab().keys() - {BOS, EOS, *merged})
        tokens = dict.fromkeys([BOS, EOS, *characters, *merged])
        return Tokenizer(clip_backend({t: i for i, t in enumerate(tokens)}, merges), max_length)


def clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's recipe with these tables: lower case, words split from punctuation, each digit alone;
    inside a word, pairs are merged in the order of `merges`; "</w>" marks the end of a word."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=EOS))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if vocab:
        # As in CLIP's own file: BOS is found in a prompt after lower-casing, EOS before.
        backend.add_special_tokens([tokenizers.AddedToken(BOS, normalized=True), EOS])
    return backend


def backend_from_json(text: str) -> tokenizers.Tokenizer:
    """The tables of a tokenizer.json under CLIP's recipe. What rules the file has besides is not
    heeded: those of a stranger could take forever."""
    tables = json.loads(text)["model"]
    merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in tables["merges"])
    return clip_backend(tables["vocab"], [tuple(pair) for pair in merges])


class TextLayer(nn.Module):
    """One layer of CLIP's transformer: x + attention(norm(x)), then x + mlp(norm(x)), where
    x [B, L, D]."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, qkv_bias=True, causal=True)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.fc1(self.norm2(x))
        # Careful, "quick GELU": CLIP was trained with this one
        return x + self.fc2(h * torch.sigmoid(1.702 * h))


class TextEncoder(nn.Module):
    """ids [B, L] -> context [B, L, D]: the last layer's output after the final norm, all positions,
    padding included."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.position_embedding = nn.Embedding(c.max_length, c.width)
        self.layers = nn.Sequential(*(TextLayer(c.width, c.num_heads) for _ in range(c.num_layers)))
        self.norm = nn.LayerNorm(c.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        return self.norm(self.layers(x))


# %% 6. U-Net
# --------------------------------------------------------------------------------------------------
# The network that sees noisy latents and guesses the noise (or v). On the way down it halves the
# resolution, and sees more and more of the picture at once; on the way up it doubles it again, and
# at each step is handed what it had seen at that resolution on the way down (the "skips"). Two
# things steer it: the timestep, added in each ResBlock, and the prompt, which each position of the
# picture looks up by cross-attention (each position asks, the words answer). One level of SD 1.x on
# the way down, with the shapes for 64 x 64 latents; there are four, 320, 640, 1280, 1280 wide:
#
#     [B, 320, 64, 64] -> ResBlock, SpatialTransformer, twice -> Downsample -> [B, 320, 32, 32]
#
# The architecture is that of Ronneberger et al. 2015 (arXiv:1505.04597), with attention as in Ho et
# al. 2020 and, for the words, in Rombach et al. 2022.

def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t [B], int or float -> [B, dim]: cosines and sines of t · 10000^(−i/half), i = 0 ...
    half−1: frequencies from 1 down to almost 1/10000.

    Careful, [cos, sin] in this order; the transformer's positions have [sin, cos] (CompVis
    util.py:161).
    """
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = t.float()[:, None] * freqs.to(t.device)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020, arXiv:2002.05202): value · gelu(gate), with the exact GELU (erf, not
    tanh)."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj, self.out = Linear(dim, 8 * dim), Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """Every position looks at every other (self-attention), then at the words (cross-attention),
    then thinks.

    x [B, C, h, w], context [B, L, D] -> like x. The norm before has eps 1e-6 here (CompVis
    attention.py:76).
    """

    def __init__(self, channels: int, num_heads: int, context_dim: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = Linear(channels, channels)       # (1x1 convolutions in the original)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = Attention(channels, num_heads)
        self.cross_attention = Attention(channels, num_heads, context_dim)
        self.feed_forward = FeedForward(channels)
        self.proj_out = zeroed(Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))           # [B, h·w, C]
        h = h + self.self_attention(self.norm1(h))
        h = h + self.cross_attention(self.norm2(h), context)
        h = h + self.feed_forward(self.norm3(h))
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class UNetBlock(nn.Module):
    """A ResBlock, and where the level has attention a SpatialTransformer after it."""

    def __init__(self, i: int, o: int, c: UNetConfig, context_dim: int, attention: bool):
        super().__init__()
        heads = o // c.head_dim if c.head_dim else c.num_heads
        self.res = ResBlock(i, o, c.norm_groups, 1e-5, 4 * c.channels)
        self.transformer = (SpatialTransformer(o, heads, context_dim, c.norm_groups) if attention
                            else None)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.res(x, emb)
        return x if self.transformer is None else self.transformer(x, context)


class UNet(nn.Module):
    """x [B, C, h, w] noisy latents, t [B] timesteps, context [B, L, D] -> the network's guess,
    [B, 4, h, w]."""

    def __init__(self, c: UNetConfig, context_dim: int):
        super().__init__()
        self.channels, emb_dim = c.channels, 4 * c.channels
        block = lambda i, o, attention: UNetBlock(i, o, c, context_dim, attention)
        self.time1, self.time2 = nn.Linear(c.channels, emb_dim), nn.Linear(emb_dim, emb_dim)
        self.conv_in = nn.Conv2d(c.in_channels, c.channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = c.channels, [c.channels]       # skips: the widths handed to the way up
        for level, mult in enumerate(c.channel_mult):
            blocks, last = [], level == len(c.channel_mult) - 1
            for _ in range(c.num_res_blocks):
                blocks.append(block(channels, c.channels * mult, c.attention[level]))
                channels = c.channels * mult
            self.down.append(Level(blocks, None if last else Downsample(channels, symmetric=True)))
            skips += [channels] * (len(blocks) + (not last))     # of each block, of the Downsample
        self.mid1, self.mid2 = block(channels, channels, True), block(channels, channels, False)
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            blocks = []
            for _ in range(c.num_res_blocks + 1):
                blocks.append(block(channels + skips.pop(), c.channels * mult, c.attention[level]))
                channels = c.channels * mult
            self.up.append(Level(blocks, Upsample(channels) if level > 0 else None))
        self.norm_out = GroupNorm(c.norm_groups, channels, 1e-5)
        self.conv_out = zeroed(nn.Conv2d(channels, c.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        emb = self.time2(F.silu(self.time1(timestep_embedding(t, self.channels).to(x.dtype))))
        h = self.conv_in(x)
        # Every output on the way down, conv_in and Downsamples included
        skips = [h]
        for level in self.down:
            for block in level.blocks:
                h = block(h, emb, context)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        h = self.mid2(self.mid1(h, emb, context), emb, context)
        for level in self.up:
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
            if level.resample is not None:
                h = level.resample(h)
        return norm_silu_conv(self.norm_out, self.conv_out, h)


# %% 7. Samplers
# --------------------------------------------------------------------------------------------------
# A sampler walks from noise to a picture. One network call tells in which direction the noise lies;
# a sampler decides how far to follow it before it asks again. First the plan: which noise levels to
# stop at, a list of `Leg`s. Then the walk, one function for each way, all with one signature:
#
#     predict_eps  (x, t, ᾱ) -> ε: the network, with guidance (section 8) already in it
#     x            [B, 4, h, w], the latents at the plan's first noise level; float32
#     legs         the plan, or its last part (to begin from a noisy picture)
#     noise        () -> fresh standard normal noise like x; called once in each step that uses it
#     eta          how much fresh noise a step adds, where the sampler leaves that open
#
# Each yields a `Step` for each leg, and goes on from `step.x`: whoever iterates may look at it, or
# change it. In all formulas here ᾱ and ᾱ′ (in the code: a, b) stand for the noise levels that a leg
# leads from and to; ᾱ grows as the noise falls.
#
# Half of the papers count noise otherwise: they never shrink the picture, x̃ = x / √ᾱ = x₀ + σ ε,
# with σ = √((1−ᾱ)/ᾱ) from 14.6 to 0.03. It is the same noise seen through another scale.

class Leg(NamedTuple):
    index: int                    # 0 ... S−1
    t: float                      # the timestep that the network is told
    alpha_bar: float
    next_alpha_bar: float         # where this step leads


@dataclass
class Step:
    index: int                    # 0 ... S−1
    t: float                      # the timestep this step started at
    x: Tensor                     # the latents after it
    eps: Tensor                   # the noise that the network saw in them before it
    x0: Tensor                    # the present guess of the clean latents


def sigma_of(alpha_bar):
    """σ = √((1−ᾱ)/ᾱ), for numbers and arrays."""
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def plan(ts, sigmas, last_alpha_bar: float = 1.0) -> list[Leg]:
    """Legs through these noise levels, [S] each, and from the last one to last_alpha_bar.
    ᾱ = 1 / (1 + σ²)."""
    a = [1 / (1 + s * s) for s in np.asarray(sigmas).tolist()] + [last_alpha_bar]
    return [Leg(i, t, a[i], a[i + 1]) for i, t in enumerate(np.asarray(ts).tolist())]


def leading(steps: int, alphas_cumprod: Tensor) -> list[Leg]:
    """t = 981, 961 ... 21, 1 for S = 50: the plan of DDPM, DDIM and PLMS.

    As diffusers has it ("leading", offset 1), and the original code wherever S divides 1000
    (elsewhere that gives more steps than asked, or runs off the table). S = 1000 would
    reach past the end, to t = 1000: there the first step stays at 999. Careful, the last step goes
    to ᾱ₀ = 0.99915, not to 1 (CompVis util.py:66; in diffusers set_alpha_to_one=False).
    """
    a, last = alphas_cumprod.numpy(), len(alphas_cumprod) - 1
    ts = np.minimum(np.arange(steps)[::-1] * ((last + 1) // steps) + 1, last)
    return plan(ts, sigma_of(a[ts]), a[0].item())


def linspace(steps: int, alphas_cumprod: Tensor) -> list[Leg]:
    """From t = 999 to 0 in even steps, also between whole numbers: Euler's plan (k-diffusion)."""
    sigmas = sigma_of(alphas_cumprod.numpy())
    ts = np.linspace(len(sigmas) - 1, 0, steps)
    return plan(ts, np.interp(ts, np.arange(len(sigmas)), sigmas))


def linspace_short(steps: int, alphas_cumprod: Tensor) -> list[Leg]:
    """The same on whole numbers and without t = 0, but for S = 1000, which needs all: DPM-Solver's
    plan (diffusers "linspace")."""
    sigmas = sigma_of(alphas_cumprod.numpy())
    ts = np.linspace(0, len(sigmas) - 1, min(steps + 1, len(sigmas))).round().astype(int)
    ts = ts[::-1][:steps]
    return plan(ts, sigmas[ts])


def nearest_timesteps(levels: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The timesteps whose noise is nearest to these, by the logarithm."""
    return np.interp(np.log(levels), np.log(sigmas), np.arange(len(sigmas))).round().astype(int)


def karras(steps: int, alphas_cumprod: Tensor, rho: float = 7.0) -> list[Leg]:
    """σ^(1/ρ) falls evenly: short steps where there is little noise, and detail is made (Karras et
    al. 2022, arXiv:2206.00364, equation 5)."""
    sigmas = sigma_of(alphas_cumprod.numpy())
    roots = np.linspace(sigmas[-1] ** (1 / rho), sigmas[0] ** (1 / rho), steps)
    return plan(nearest_timesteps(roots**rho, sigmas), roots**rho)


def geometric(steps: int, alphas_cumprod: Tensor) -> list[Leg]:
    """σ falls by the same factor in each step: Langevin's plan."""
    sigmas = sigma_of(alphas_cumprod.numpy())
    levels = np.geomspace(sigmas[-1], sigmas[0], steps)
    return plan(nearest_timesteps(levels, sigmas), levels)


def ddpm(predict_eps, x: Tensor, legs: list[Leg], noise, eta: float = 0.0) -> Iterator[Step]:
    """Denoising diffusion probabilistic models (Ho et al. 2020, arXiv:2006.11239): the chain that
    training assumes.

    Between two legs lies one noising step, with variance β = 1 − ᾱ/ᾱ′. Given x₀, its inverse is a
    Gaussian whose mean lies between x₀ and x (equations 6 and 7). With S = T this is the paper's
    algorithm 2, but for the end: `leading` stops at ᾱ₀.
    """
    for i, t, a, b in legs:
        eps = predict_eps(x, t, a)
        x0 = x0_from_eps(x, eps, a)
        beta = 1 - a / b
        # μ = √ᾱ′ β / (1−ᾱ) x₀ + √(ᾱ/ᾱ′) (1−ᾱ′) / (1−ᾱ) x
        mean = b**0.5 * beta / (1 - a) * x0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * x
        variance = (1 - b) / (1 - a) * beta
        step = Step(i, t, mean + variance**0.5 * noise(), eps, x0)
        yield step
        x = step.x


def ddim(predict_eps, x: Tensor, legs: list[Leg], noise, eta: float = 0.0) -> Iterator[Step]:
    """Denoising diffusion implicit models (Song et al. 2020, arXiv:2010.02502, equation 12).

    Go to the guess of x₀, and from there back to the next noise level along the same ε. With
    eta = 0 nothing random is left: the same noise gives the same picture, and few steps are enough.
    eta = 1 is DDPM.
    """
    for i, t, a, b in legs:
        eps = predict_eps(x, t, a)
        x0 = x0_from_eps(x, eps, a)
        # f = η √((1−ᾱ′)/(1−ᾱ) (1 − ᾱ/ᾱ′)), the paper's σ; x′ = √ᾱ′ x₀ + √(1 − ᾱ′ − f²) ε + f noise
        fresh = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        next_x = b**0.5 * x0 + (1 - b - fresh**2) ** 0.5 * eps
        step = Step(i, t, next_x + fresh * noise() if eta > 0 else next_x, eps, x0)
        yield step
        x = step.x


def plms(predict_eps, x: Tensor, legs: list[Leg], noise, eta: float = 0.0) -> Iterator[Step]:
    """Pseudo linear multistep (Liu et al. 2022, arXiv:2202.09778): DDIM's step, along an ε that is
    extrapolated from the last four (Adams-Bashforth).

    The first step has no past, so it looks ahead instead: one network call more.
    """
    weights = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
               4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    history: list[Tensor] = []                   # the network's own answers, the latest first
    for n, (i, t, a, b) in enumerate(legs):
        eps = predict_eps(x, t, a)
        history = [eps, *history[:3]]
        if n == 0 and len(legs) > 1:             # (ε + ε ahead) / 2
            mixed = (eps + predict_eps(add_noise(x0_from_eps(x, eps, a), eps, b), legs[1].t, b)) / 2
        else:
            mixed = sum(w * e for w, e in zip(weights[len(history)], history))
        x0 = x0_from_eps(x, mixed, a)
        step = Step(i, t, add_noise(x0, mixed, b), eps, x0)
        yield step
        x = step.x


def euler(predict_eps, x: Tensor, legs: list[Leg], noise, eta: float = 0.0) -> Iterator[Step]:
    """Euler's method for the probability-flow equation dx̃/dσ = ε (Karras et al. 2022, algorithm 1
    without its second-order correction). The step is DDIM's, in other words and between other noise
    levels."""
    for i, t, a, b in legs:
        eps = predict_eps(x, t, a)
        next_scaled = x / a**0.5 + (sigma_of(b) - sigma_of(a)) * eps        # x̃′ = x̃ + (σ′ − σ) ε
        step = Step(i, t, b**0.5 * next_scaled, eps, x0_from_eps(x, eps, a))
        yield step
        x = step.x


def euler_a(predict_eps, x: Tensor, legs: list[Leg], noise, eta: float = 0.0) -> Iterator[Step]:
    """Euler ancestral (k-diffusion): goes below the next noise level, to σ_down, and adds noise up
    to it: σ_down² + σ_up² = σ′²."""
    for i, t, a, b in legs:
        eps = predict_eps(x, t, a)
        x0, sigma, next_sigma = x0_from_eps(x, eps, a), sigma_of(a), sigma_of(b)
        up = next_sigma * (1 - (next_sigma / sigma) ** 2) ** 0.5            # σ_up = σ′ √(1−(σ′/σ)²)
        down = next_sigma**2 / sigma                                        # σ_down = σ′²/σ
        next_scaled = x0 + down * eps                                       # x̃′ = x₀ + σ_down ε
        step = Step(i, t, b**0.5 * (next_scaled + up * noise() if up > 0 else next_scaled), eps, x0)
        yield step
        x = step.x


def dpmpp_2m(predict_eps, x: Tensor, legs: list[Leg], noise, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): solves the linear part of
    the equation exactly, and extrapolates x₀ from this guess and the last, so 20 steps do.

    Time is λ = −log σ (lam), of which a step covers h. The last step, to σ = 0, is of first order.
    """
    lam = lambda alpha_bar: -math.log(sigma_of(alpha_bar)) if alpha_bar < 1 else math.inf
    last_x0, last_h = None, 0.0
    for i, t, a, b in legs:
        eps = predict_eps(x, t, a)
        x0, h = x0_from_eps(x, eps, a), lam(b) - lam(a)
        guess = x0
        if last_x0 is not None and b < 1:    # D = x₀ + (x₀ − previous x₀) · h / (2 · previous h)
            guess = x0 + (x0 - last_x0) * (h / (2 * last_h))
        # x′ = √(1−ᾱ′)/√(1−ᾱ) x − √ᾱ′ (e⁻ʰ − 1) D
        next_x = ((1 - b) / (1 - a)) ** 0.5 * x - b**0.5 * math.expm1(-h) * guess
        step = Step(i, t, next_x, eps, x0)
        yield step
        x, last_x0, last_h = step.x, x0, h


def langevin(predict_eps, x: Tensor, legs: list[Leg], noise, eta: float = 0.0) -> Iterator[Step]:
    """Annealed Langevin dynamics (Song & Ermon 2019, arXiv:1907.05600, algorithm 1), the ancestor
    of all this: climb towards likelier pictures, shaken by fresh noise, while the noise level
    falls slowly enough for the picture to keep up. It takes more steps than the others.

    The paper's step size δ is the same share r of each level's variance; its ten levels with a
    hundred steps each are S levels with one step here. The last step only takes the noise away.
    """
    # A larger r needs fewer steps, but leaves more noise in x than the level has, by 1/(1 − r/4)
    r = 0.7
    for i, t, a, b in legs:
        eps = predict_eps(x, t, a)
        x0, delta = x0_from_eps(x, eps, a), r * (1 - a)
        if b == 1:
            next_x = x0
        else:                                    # x + δ/2 · score + √δ · noise, at the new scale
            climbed = x + delta / 2 * score_from_eps(eps, a) + delta**0.5 * noise()
            next_x = (b / a) ** 0.5 * climbed
        step = Step(i, t, next_x, eps, x0)
        yield step
        x = step.x


class Sampler(NamedTuple):
    walk: Callable[..., Iterator[Step]]
    plan: Callable[[int, Tensor], list[Leg]]
    # What to begin with: noise ε itself, or x̃ = σ ε, which is √(1−ᾱ) ε at our scale
    starts_at_sigma: bool = False


SAMPLERS = {
    "ddpm": Sampler(ddpm, leading), "ddim": Sampler(ddim, leading), "plms": Sampler(plms, leading),
    "euler": Sampler(euler, linspace, True), "euler_a": Sampler(euler_a, linspace, True),
    "dpmpp_2m": Sampler(dpmpp_2m, linspace_short), "dpmpp_2m_karras": Sampler(dpmpp_2m, karras),
    "langevin": Sampler(langevin, geometric, True)}


# %% 8. LatentDiffusion
# --------------------------------------------------------------------------------------------------
# The five parts together, and the two things one does with them: `denoise`, which yields every step
# of the walk, and `generate`, which returns pictures. Guidance, which makes the picture follow the
# prompt, lives here too: the network is asked twice, with the prompt and without, and the
# difference between the answers, which is what the prompt says, is enlarged.
#
# The weights file is one .safetensors: the tensors named as in the classes above, and in its header
# the config and the tokenizer, so that the file is the whole model. Below the class stands what
# meets the outside world: files, settings, devices. Whatever is wrong there is said in one line.

# (Cells in a notebook have no file: then the weights are looked for where it runs.)
BUILT_IN = Path(globals().get("__file__", "")).parent / "weights" / "shapes.safetensors"
Prompt = str | list[str] | Tensor                    # one, several, or context [n, L, D]
Picture = Image.Image | Tensor


class LatentDiffusion(nn.Module):
    """config, tokenizer, text_encoder, unet, vae: a whole model."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer, self.compiled = config, tokenizer, False
        self.text_encoder = TextEncoder(config.text)
        self.unet = UNet(config.unet, config.text.width)
        self.vae = VAE(config.vae)
        self.alphas_cumprod = make_alphas_cumprod(config.schedule)    # stays float64 on the CPU

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @staticmethod
    def load(path: str | Path | None = None, device: str = "auto",
             dtype: torch.dtype | None = None) -> "LatentDiffusion":
        """A model from a weights file; the built-in one without a path. In eval mode, no gradients.

        device: "auto" takes CUDA, then Apple's MPS, then the CPU. dtype: float32 if None, whatever
        the file holds. Raises InputError if the file is missing, damaged, or of another format.
        """
        path = Path(BUILT_IN if path is None else path)
        device, dtype = pick_device(device), dtype or torch.float32
        keep_freed_memory()

        # With channels innermost most machines are faster; in float32 on a CPU it is only 4 %, and
        # the plain order needs no copy and adds up as the reference implementations do.
        plain = device.type == "cpu" and dtype == torch.float32

        def convert(t: Tensor) -> Tensor:
            inside = t.ndim == 4 and not plain
            order = torch.channels_last if inside else torch.preserve_format
            return t.to(dtype, memory_format=order) if t.is_floating_point() else t

        config, tokenizer, tensors = read_weights(path, device, convert)
        # Builds the networks without memory and random numbers
        with blaming(f"{path} is damaged", "get it again"), torch.device("meta"):
            ldm = LatentDiffusion(config, tokenizer)
        if problem := misfit(tensors, {name: p.shape for name, p in ldm.named_parameters()}):
            raise InputError(f"{path} {problem}; get or train the file anew")
        ldm.load_state_dict(tensors, assign=True)
        return ldm.eval().requires_grad_(False)

    def compile_networks(self) -> None:
        """Has PyTorch write and compile machine code for U-Net and decoder, at their first call: a
        minute or more, once. "Freezing" also brings the weights into the order in which the
        processor takes them (compile's own options have it, too, but it is not heeded there).
        Raises InputError where nothing can be compiled."""
        from torch._inductor import config as compiler
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=self.device))
        except Exception as e:        # a compiler is missing, or this Python is too new for PyTorch
            raise InputError(f"nothing can be compiled here ({shortened(str(e))}); install a C++ "
                             "compiler (g++), or leave out --compile") from None
        compiler.freezing = self.compiled = True
        for network in (self.unet, self.vae.decoder):
            network.compile()

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the model as one .safetensors, in dtype if one is given."""
        metadata = {"format": "tiny_ldm", "config": json.dumps(asdict(self.config)),
                    "tokenizer": self.tokenizer.backend.to_str()}
        tensors = {name: t.detach().to("cpu", dtype or t.dtype).contiguous()
                   for name, t in self.state_dict().items()}
        write_whole(path, lambda file: save_file(tensors, file, metadata))

    @torch.no_grad()
    def encode_text(self, prompts: Prompt) -> Tensor:
        """["..."] -> context [B, L, D]; a context stays what it is. Raises InputError."""
        if isinstance(prompts, Tensor):
            if prompts.ndim != 3:
                raise InputError(f"a context must be [n, L, D], not {list(prompts.shape)}")
            return prompts.to(self.device, self.dtype)
        if not isinstance(prompts, str) and not len(prompts):
            raise InputError("there is no prompt; give at least one")
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.no_grad()
    def encode_image(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """image [B, 3, H, W] in [−1, 1] -> scaled latents [B, 4, H/8, W/8]: the mean, or with a
        generator a sample.

        Careful, the order: first sample, then multiply by scale_factor (CompVis ddpm.py:549).
        """
        mean, logvar = self.vae.encode(image.to(self.device, self.dtype))
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            mean = sample_posterior(mean, logvar, noise)
        return self.config.scale_factor * mean

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """latents [B, 4, h, w], scaled -> image [B, 3, 8h, 8w], within [−1, 1], float32."""
        z = (latents / self.config.scale_factor).to(self.device, self.dtype)
        image = self.vae.decode(z).float()
        if not image.isfinite().all():
            raise self._not_finite("the decoded picture")
        return image.clamp(-1, 1)

    def _not_finite(self, what: str) -> InputError:
        cure = "check the weights" if self.dtype == torch.float32 else "use float32"
        return InputError(f"{what} is not finite in {self.dtype}; {cure}")

    def denoise(self, prompt: Prompt, negative_prompt: Prompt = "", *, steps: int = 50,
                sampler: str = "ddim", guidance_scale: float | None = None, eta: float = 0.0,
                seed: int = 0, batch_size: int = 1, width: int | None = None,
                height: int | None = None, latents: Tensor | None = None,
                image: Picture | None = None, strength: float = 0.75,
                mask: Picture | None = None) -> Iterator[Step]:
        """Makes pictures and yields every step of it; `decode_latents(step.x)` shows the picture so
        far.

        prompt: a string, a list, or a context tensor [n, L, D]; each is used batch_size times.
        negative_prompt: one for all, or one for each prompt. guidance_scale: if None, the config's,
        7.5 in SD 1.x. Picture i draws all its noise from its own generator, seeded with seed + i,
        on the CPU and in float32, so it is the same picture alone or in a batch, on every device.
        latents: what to start from in place of noise, [B, 4, h, w]. image, mask: see
        `fit_pictures`. With an image, the walk starts from the image with noise in it,
        strength · S steps before the end (SDEdit, Meng et al. 2021, arXiv:2108.01073): 0 gives it
        back, 1 forgets it. With a mask, it stays as it is where the mask is black. Raises
        InputError for settings out of range, and for a size that is no multiple of the model's
        stride.
        """
        c = self.config
        guidance_scale = c.guidance_scale if guidance_scale is None else guidance_scale
        if latents is not None:
            height, width = (side * c.latent_stride for side in latents.shape[-2:])
        image, mask = fit_pictures(image, mask, c.stride, width, height)
        check_settings(c, sampler, steps, seed, batch_size, guidance_scale, eta, strength)
        context, scale = self._contexts(prompt, negative_prompt, batch_size, guidance_scale)
        n = len(context) // (1 if scale is None else 2)
        sides = (height, width) if image is None else image.shape[2:]
        shape = (1, c.vae.latent_channels,
                 *((side or c.image_size) // c.latent_stride for side in sides))
        if latents is not None and latents.shape != (n, *shape[1:]):
            raise InputError(f"latents must be {[n, *shape[1:]]}, not {list(latents.shape)}")
        if image is not None and len(image) not in (1, n):
            raise InputError(f"{len(image)} images for {n} pictures: give one, or one for each")
        generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
        noise = lambda: torch.cat([torch.randn(shape, generator=g) for g in generators]).to(
            self.device)
        walk, plan_of, starts_at_sigma = SAMPLERS[sampler]
        legs = plan_of(steps, self.alphas_cumprod)
        x = start = noise() if latents is None else latents.to(self.device, torch.float32)
        if starts_at_sigma:
            x = (1 - legs[0].alpha_bar) ** 0.5 * start
        # The latents of the image: what to start from, and with a mask what to keep
        known = None if image is None else self.encode_image(image).float().expand_as(x)
        if known is not None and strength < 1:
            legs = legs[steps - steps_walked(steps, image, strength) :]
            if not legs:
                return iter([Step(steps - 1, 0, known, torch.zeros_like(known), known)])
            x = add_noise(known, start, legs[0].alpha_bar)
        extra, keep = self._inpainting(image, mask, known, start)
        predict_eps = lambda x, t, alpha_bar: self._guided_eps(x, t, alpha_bar, context, scale,
                                                               extra)
        return self._walk(walk(predict_eps, keep(x, legs[0].alpha_bar), legs, noise, eta), legs,
                          keep)

    def _contexts(self, prompt: Prompt, negative_prompt: Prompt, batch_size: int,
                  guidance_scale: float) -> tuple[Tensor, float | None]:
        """(context [n, L, D], None); or with guidance, that of the negative prompts and then of the
        prompts, [2n, L, D], and the scale. At scale 1 the negative prompt has no say."""
        context = self.encode_text(prompt).repeat_interleave(batch_size, dim=0)
        if guidance_scale == 1.0:
            return context, None
        negative = self.encode_text(negative_prompt)
        if len(negative) > 1:
            negative = negative.repeat_interleave(batch_size, dim=0)
        if len(negative) not in (1, len(context)):
            raise InputError(f"{len(negative)} negative prompts for {len(context)} pictures: give "
                             "one, or one for each prompt")
        return torch.cat([negative.expand_as(context), context]), guidance_scale

    def _inpainting(self, image: Tensor | None, mask: Tensor | None, known: Tensor | None,
                    noise: Tensor) -> tuple[Tensor | None, Callable[[Tensor, float], Tensor]]:
        """What the two kinds of model need to keep a part of a picture: (channels that the U-Net
        sees beside the latents, or None; a function that puts the known part into x at a noise
        level).

        An ordinary model is shown the known latents, with as much noise as x has: at the start and
        after each step, so that they are there before the next (CompVis ddim.py:144). One with 9
        channels has learned to look at the mask and the rest of the picture.
        """
        c = self.config
        native = c.unet.in_channels > c.vae.latent_channels
        if native and mask is None:
            raise InputError("this model repaints: give it an image and a mask")
        if mask is None:
            return None, lambda x, alpha_bar: x
        if native:
            small = F.interpolate(mask.float(), noise.shape[2:])       # one pixel for each latent
            behind = self.encode_image(image.to(self.device) * ~mask.to(self.device)).float()
            small = small.to(behind).expand(len(behind), -1, -1, -1)
            return torch.cat([small, behind], dim=1), lambda x, alpha_bar: x
        # Latents that a white pixel falls into are repainted
        repaint = F.max_pool2d(mask.float(), c.latent_stride).bool().to(self.device)
        return None, lambda x, alpha_bar: torch.where(repaint, x,
                                                      add_noise(known, noise, alpha_bar))

    def _guided_eps(self, x: Tensor, t: float, alpha_bar: float, context: Tensor,
                    scale: float | None, extra: Tensor | None) -> Tensor:
        """The network's ε for x [B, 4, h, w] at timestep t, with classifier-free guidance.

        With a scale s, context holds the negative prompts and then the prompts, and the guess goes
        from the one through the other: ε = ε₀ + s (ε₁ − ε₀) (Ho & Salimans 2022, arXiv:2207.12598;
        their w is s − 1).
        """
        inputs = x if extra is None else torch.cat([x, extra.expand(len(x), -1, -1, -1)], dim=1)
        inputs = (inputs if scale is None else torch.cat([inputs, inputs])).to(self.dtype)
        times = torch.full((len(inputs),), t, device=self.device)
        out = self.unet(inputs, times, context).float()
        if scale is not None:
            without, with_prompt = out.chunk(2)
            out = without + scale * (with_prompt - without)
        return out if self.config.prediction == "eps" else eps_from_v(x, out, alpha_bar)

    @torch.no_grad()
    def _walk(self, steps: Iterator[Step], legs: list[Leg],
              keep: Callable[[Tensor, float], Tensor]) -> Iterator[Step]:
        """The steps of a sampler, each checked to be finite, with the known part put in; at the end
        without noise."""
        for step, leg in zip(steps, legs):
            if not step.x.isfinite().all():
                raise self._not_finite(f"step {step.index}")
            step.x = keep(step.x, 1.0 if leg is legs[-1] else leg.next_alpha_bar)
            yield step

    def generate(self, prompt: Prompt, negative_prompt: Prompt = "", *, progress: bool = True,
                 watch: Callable[[Step], object] = lambda step: None,
                 **settings) -> list[Image.Image]:
        """The pictures, as PIL images. `settings`: `denoise` has them; progress: a bar; watch is
        called with each step."""
        image, mask = fit_pictures(settings.get("image"), settings.get("mask"), self.config.stride,
                                   settings.get("width"), settings.get("height"))
        walk = self.denoise(prompt, negative_prompt, **{**settings, "image": image, "mask": mask})
        total = steps_walked(settings.get("steps", 50), image, settings.get("strength", 0.75))
        for step in tqdm(walk, "denoising", total, disable=not progress, unit="step"):
            watch(step)
        pictures = self.decode_latents(step.x)
        if mask is not None:          # the given pixels themselves where it is black
            pictures = torch.where(mask.to(pictures.device), pictures, image.to(pictures.device))
        return to_pil(pictures)

    @contextlib.contextmanager
    def attention(self, detail: bool = False) -> Iterator["AttentionMaps"]:
        """`with ldm.attention() as maps:` records where the U-Net looks for each word. The maps are
        computed beside the pictures, which stay the same to the bit. detail: keeps every network
        call apart rather than their sum. Raises InputError after `compile_networks`."""
        if self.compiled:
            raise InputError("compiled networks can't be looked into; leave out compile_networks "
                             "(--compile)")
        maps = AttentionMaps(detail)
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self.unet.register_forward_pre_hook(
                lambda _, args: maps.begin(args[0])))
            for block in self.unet.modules():
                if isinstance(block, SpatialTransformer):
                    hooks.enter_context(block.cross_attention.register_forward_hook(
                        lambda layer, args, _: maps.add(layer.weights(*args))))
            yield maps


class AttentionMaps:
    """Cross-attention: how much each place looks at each token, over the tokens a sum of 1.

    `calls`: for each network call the layers in their running order, [B, heads, h, w, L] each;
    without detail one entry, the sum over all `count` calls. With guidance B is twice the number
    of pictures: first the negative prompts, then the prompts.
    """

    def __init__(self, detail: bool):
        self.detail, self.calls, self.count = detail, [], 0

    def begin(self, x: Tensor) -> None:
        """A network call begins, with latents x [B, 4, h, w]."""
        self.size, self.layer, self.count = x.shape[2:], 0, self.count + 1
        if self.detail or not self.calls:
            self.calls.append([])

    def add(self, weights: Tensor) -> None:
        """weights of the next layer, [B, heads, N, L]."""
        halved = math.isqrt(self.size.numel() // weights.shape[2])        # 1, 2, 4 or 8
        weights = weights.float().unflatten(2, [side // halved for side in self.size]).cpu()
        layers = self.calls[-1]
        if self.layer < len(layers):
            layers[self.layer] += weights
        else:
            layers.append(weights)
        self.layer += 1

    def mean(self) -> Tensor:
        """Averaged over calls, layers and heads, at the size of the latents: [B, L, h, w]."""
        maps = [F.interpolate(w.mean(dim=1).movedim(-1, 1), tuple(self.size), mode="bilinear")
                for layers in self.calls for w in layers]
        return sum(maps) / (self.count * len(self.calls[0]))


def read_weights(path: Path, device: torch.device, convert: Callable[[Tensor], Tensor] = lambda t: t
                 ) -> tuple[Config, Tokenizer, dict[str, Tensor]]:
    """What a weights file holds: its tensors converted; mapped rather than read where convert
    leaves them as they are. Raises InputError."""
    if not path.is_file():
        raise InputError(f"no weights file at {path}; check the path, or leave it out for the "
                         "built-in model")
    with blaming(f"{path} is damaged or no .safetensors file",
                 "get it again, or convert a .ckpt with weights_convert.py"):
        with safe_open(path, framework="pt") as file:
            header, names, tensors = file.metadata() or {}, list(file.keys()), {}
        # Opened anew every 64 tensors: what was read of a file fills memory until it is closed
        for i in range(0, len(names), 64):
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors.update((n, convert(file.get_tensor(n))) for n in names[i : i + 64])
        parts = parse_header(header) if header.get("format") == "tiny_ldm" else None
    if any(n.startswith(("model.diffusion_model.", "cond_stage_model.")) for n in tensors):
        raise InputError(f"{path} is an official checkpoint; convert it first: "
                         f"python weights_convert.py {path}")
    if parts is None:
        raise InputError(f"{path} is no tiny_ldm weights file (its format: "
                         f"{header.get('format')!r}); make one with --train, or from Stable "
                         "Diffusion with weights_convert.py")
    return *parts, tensors


def misfit(tensors: dict[str, Tensor], want: dict[str, tuple[int, ...]]) -> str:
    """What keeps tensors from being those of a model with these names and shapes; "" if nothing."""
    both = want.keys() & tensors.keys()
    for problem, names in (
            ("lacks", want.keys() - both), ("has unexpected", tensors.keys() - both),
            ("has the wrong shape for", [n for n in both if tensors[n].shape != want[n]]),
            ("has no floating-point numbers in",
             [n for n in both if not tensors[n].is_floating_point()])):
        if names:
            return (f"{problem} {len(names)} of {len(want)} tensors: "
                    f"{', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}")
    return ""


def parse_header(header: dict[str, str]) -> tuple[Config, Tokenizer]:
    """The config and tokenizer in the header of a weights file, or in a training checkpoint."""
    config = Config.from_dict(json.loads(header["config"]))
    check_config(config)
    backend = backend_from_json(header["tokenizer"])
    if max(backend.get_vocab().values()) >= config.text.vocab_size:
        raise ValueError("the tokenizer has more tokens than the text encoder")
    return config, Tokenizer(backend, config.text.max_length)


def check_config(c: Config) -> None:
    """Raises ValueError for numbers that no model can have; only for those that do not show in the
    shapes of its tensors, since `load` compares these."""
    u, s = c.unet, c.schedule
    counts = (c.image_size, c.text.num_heads, u.num_heads, u.head_dim or 1, u.norm_groups,
              c.vae.norm_groups, s.num_timesteps)
    depths = (c.text.num_layers, u.num_res_blocks, c.vae.num_res_blocks)
    if not (all(type(n) is int and 0 < n <= 2**16 for n in counts) and max(depths) <= 100
            and c.text.width % c.text.num_heads == u.channels % (u.head_dim or u.num_heads) == 0
            and c.image_size % c.stride == 0 and c.prediction in ("eps", "v")
            and 0 < s.beta_start < 1 and 0 < s.beta_end < 1
            and 0 < c.scale_factor < 1e6 and abs(c.guidance_scale) <= 1000):
        raise ValueError("its config has numbers that can't be, or that do not fit each other")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raises InputError for a value that is not, and for "not a number"."""
    if not low <= value <= high:
        raise InputError(f"{name} must be from {low} to {high}, not {value}")


def check_settings(c: Config, sampler: str, steps: int, seed: int, batch_size: int,
                   guidance_scale: float, eta: float, strength: float) -> None:
    """Raises InputError for what no picture can be made from."""
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}; there are: {', '.join(sorted(SAMPLERS))}")
    within("steps", steps, 1, c.schedule.num_timesteps)
    within("seed", seed, 0, 2**63 - 1)
    within("batch_size", batch_size, 1, 2**16)
    within("eta", eta, 0, 1)
    within("guidance_scale", guidance_scale, -1000, 1000)
    within("strength", strength, 0, 1)


def fit_pictures(image: Picture | None, mask: Picture | None, stride: int, width: int | None,
                 height: int | None) -> tuple[Tensor | None, Tensor | None]:
    """An image and its mask (white: repaint) as tensors [B, 3, H, W] in [−1, 1] and bool
    [1, 1, H, W].

    Pictures are resized and cropped to width and height, or else to the multiples of `stride`
    nearest to their size. Tensors are left as they are. Raises InputError for sizes that are not
    multiples of `stride`, and for a mask alone.
    """
    if isinstance(image, Tensor):
        if image.ndim != 4 or image.shape[1] != 3:
            raise InputError(f"an image tensor must be [B, 3, H, W], not {list(image.shape)}")
        height, width = image.shape[2:]
    for name, n in (("width", width), ("height", height)):
        if n is not None and n > 8192:
            raise InputError(f"{name} must be at most 8192, not {n}")
        if n is not None and (n <= 0 or n % stride):
            below = max(stride, n // stride * stride)
            near = f"{below} or {below + stride}" if n > below else f"{below}"
            raise InputError(f"{name} {n} is not a multiple of {stride}; the nearest: {near}")
    if image is None and mask is not None:
        raise InputError("a mask needs an image that it belongs to")
    own = width, height                   # the size that a mask is made for
    if isinstance(image, Image.Image):
        image = to_rgb(image)
        own = image.size
        width, height = (given or min(8192, max(1, round(side / stride)) * stride)
                         for given, side in zip((width, height), own))
        image = to_tensor([ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)])
    if isinstance(mask, Image.Image):
        mask = to_rgb(mask).convert("L")
        if mask.size != own:
            print(f"tiny_ldm: the mask is {mask.width}x{mask.height} and the image "
                  f"{own[0]}x{own[1]}; resizing the mask", file=sys.stderr)
            mask = mask.resize(own)
        mask = to_tensor([ImageOps.fit(mask, (width, height))])[:, :1] > 0
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (1, 1, height, width)):
        raise InputError(f"a mask tensor must be bool {[1, 1, height, width]}, not {mask.dtype} "
                         f"{list(mask.shape)}")
    return image, mask


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any kind as RGB: turned as its EXIF orientation says, 16 bits brought to 8, and
    white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):        # 16 bits: Pillow would make all above 255 white
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def steps_walked(steps: int, image: Picture | None, strength: float) -> int:
    """How many of S steps are done: with an image only the last ones."""
    return steps if image is None else int(strength * steps)


def pick_device(name: str) -> torch.device:
    """"auto", "cpu", "cuda" or "mps" -> a device that is there, set to exact float32. Raises
    InputError."""
    torch.backends.cudnn.allow_tf32 = False      # or GPUs round float32 convolutions to 10 bits
    there = (["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
             + ["cpu"])
    name = there[0] if name == "auto" else str(name)
    if name.split(":")[0] not in there:
        raise InputError(f"there is no device {name!r} here; there is: {', '.join(there)}")
    if name == "cuda" and "LOCAL_RANK" in os.environ:         # under torchrun: one for each process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed buffers.

    By default it gives them back to the kernel, and each layer's output then costs thousands of
    page faults. No other C library needs this; where the call is missing, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)             # M_MMAP_MAX: no buffer gets a mapping of its own
        mallopt(-1, 2**31 - 1)     # M_TRIM_THRESHOLD: the heap's top is kept, too


def write_whole(path: str | Path, write: Callable[[str], None]) -> None:
    """Calls write(name) on a name beside `path`, then renames: a file is there whole or not at
    all."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; make it first")
    # At random, since other threads and processes may be writing in this folder
    beside = path.parent / f".{path.name[:40]}.{os.urandom(4).hex()}.part"
    try:
        write(str(beside))
        os.replace(beside, path)
    except (OSError, SafetensorError, RuntimeError) as e:      # the last is torch.save's
        raise InputError(f"{path} can't be written ({shortened(str(e))}); check the name, the room "
                         "on the disk and the permissions") from None
    finally:
        beside.unlink(missing_ok=True)


def to_pil(image: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [−1, 1] -> pictures; rounded to 8 bits, not cut off."""
    pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Pictures of one size -> [B, 3, H, W] in [−1, 1], float32."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row by row."""
    w, h = images[0].size
    sheet = Image.new("RGB", (w * columns, h * -(-len(images) // columns)), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * w, i // columns * h))
    return sheet


# %% 9. Shapes
# --------------------------------------------------------------------------------------------------
# The built-in model knows one little world: plain pictures of coloured shapes, whose caption says
# exactly what they show, so that a program can judge every picture. The grammar:
#
#     caption  := scene [" on a(n) " COLOUR " background"]         (no background named: white)
#     scene    := thing | thing RELATION thing | COUNT [SIZE] COLOUR SHAPEs
#     thing    := "a(n) " [SIZE] COLOUR SHAPE
#
# Lengths are in pixels of a picture 128 wide, whatever the size it is drawn at.

COLOURS = {"red": (220, 30, 40), "orange": (255, 140, 0), "yellow": (250, 220, 40),
           "green": (30, 150, 60), "blue": (30, 70, 220), "purple": (125, 40, 180),
           "black": (15, 15, 15), "white": (255, 255, 255)}
SHAPE_NAMES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
# From the first thing to the second: left of means that the second lies in direction +x.
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
COUNTS = {"two": 2, "three": 3}
SIZES = {"small": (13, 16), "large": (21, 26)}       # radius
LARGE_OF_THREE = (20, 22)                            # three of the largest would hardly fit
SYNONYMS = {"left of": ("to the left of", "on the left of"),
            "right of": ("to the right of", "on the right of"), "above": ("over", "on top of"),
            "below": ("under", "beneath", "underneath"), "small": ("little", "tiny"),
            "large": ("big", "huge"), "purple": ("violet",), "a": ("", "one", "the"),
            "an": ("", "one", "the"), "two": ("2", "a pair of"), "three": ("3",)}


class Thing(NamedTuple):
    colour: str
    shape: str
    size: str | None = None       # "small", "large", or None: either


class Scene(NamedTuple):
    """What a caption says."""
    things: tuple[Thing, ...]        # one; two in a relation; or two or three alike
    relation: str | None = None
    background: str | None = None    # None: white, not said


def is_held_out(thing: Thing) -> bool:
    """Eight of the 64 (colour, shape) pairs are never trained on: what becomes of them shows
    whether the model composes or remembers."""
    return (list(COLOURS).index(thing.colour) + SHAPE_NAMES.index(thing.shape)) % 8 == 3


def caption_of(scene: Scene) -> str:
    """The scene in words, as the grammar above has it."""
    article = lambda words: ("an " if words[0] in "aeiou" else "a ") + words
    words = [" ".join(filter(None, (it.size, it.colour, it.shape))) for it in scene.things]
    if len(words) == 1:
        text = article(words[0])
    elif scene.relation:
        text = f"{article(words[0])} {scene.relation} {article(words[1])}"
    else:
        text = f"{list(COUNTS)[len(words) - 2]} {words[0]}{'es' if words[0][-1] == 's' else 's'}"
    return text + (f" on {article(scene.background)} background" if scene.background else "")


def rephrase(caption: str, rng: random.Random) -> str:
    """The same in free words, so that the model understands who has not read the grammar."""
    for phrase, others in SYNONYMS.items():
        if rng.random() < 0.5:
            caption = re.sub(rf"\b{phrase} ", lambda _: f"{rng.choice(others)} ".lstrip(), caption)
    return caption


def random_scene(rng: random.Random, held_out: bool = False, kind: str | None = None) -> Scene:
    """A scene to train on; or, with held_out, one whose first thing is a held-out pair.

    kind: "one" thing, "two" in a relation, or two or three "alike"; if None, most often the second,
    which takes the longest to learn. Half name their background.
    """
    background = rng.choice(list(COLOURS)) if rng.random() < 0.5 else None
    colours = [c for c in COLOURS if c != (background or "white")]

    def thing(held_out: bool) -> Thing:
        while True:
            it = Thing(*(rng.choice(c) for c in (colours, SHAPE_NAMES, (None, "small", "large"))))
            if is_held_out(it) == held_out:
                return it

    kind = kind or rng.choice(("one", "two", "two", "two", "alike", "alike"))
    first = thing(held_out)
    if kind == "two":
        return Scene((first, thing(False)), rng.choice(list(RELATIONS)), background)
    return Scene((first,) * (1 if kind == "one" else rng.choice((2, 3))), None, background)


def place(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """(x, y, radius) of each thing: inside the picture, apart, and as the relation says. It throws
    dice until that is so."""
    while True:
        spots = []
        for thing in scene.things:
            size = thing.size or rng.choice(list(SIZES))
            crowded = len(scene.things) == 3 and size == "large"
            r = rng.uniform(*(LARGE_OF_THREE if crowded else SIZES[size]))
            margin = 1.1 * r + 2                     # 1.1: the diamond is the tallest outline
            spots.append((rng.uniform(margin, 128 - margin), rng.uniform(margin, 128 - margin), r))
        pairs = [(a, b) for i, a in enumerate(spots) for b in spots[:i]]
        if any(math.dist(a[:2], b[:2]) < 1.2 * (a[2] + b[2]) + 2 for a, b in pairs):
            continue
        if scene.relation:      # clearly so: twice the distance in the other direction
            ux, uy = RELATIONS[scene.relation]
            dx, dy = spots[1][0] - spots[0][0], spots[1][1] - spots[0][1]
            if ux * dx + uy * dy < 2 * abs(uy * dx + ux * dy):
                continue
        return spots


def turned(n: int, *radii: float) -> list[tuple[float, float]]:
    """n corners, clockwise from the top, at these radii by turns."""
    return [(r * math.sin(2 * math.pi * i / n), -r * math.cos(2 * math.pi * i / n))
            for i in range(n) for r in (radii[i % len(radii)],)]


def heart() -> list[tuple[float, float]]:
    """x = 16 sin³ t, y = 13 cos t − 5 cos 2t − 2 cos 3t − cos 4t, over 16, tip down, a
    tenth further up."""
    ts = [2 * math.pi * i / 64 for i in range(64)]
    y = lambda t: sum(k * math.cos(n * t) for n, k in ((1, 13), (2, -5), (3, -2), (4, -1))) / 16
    return [(math.sin(t) ** 3, -y(t) - 0.1) for t in ts]


# The corners of unit shapes (y down, radius about 1), unrotated. Cross: one arm, turned four times.
OUTLINES = {
    "circle": turned(64, 1.0), "triangle": turned(3, 1.0), "star": turned(10, 1.0, 0.41),
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)], "heart": heart(),
    "diamond": [(0, -1.1), (0.78, 0), (0, 1.1), (-0.78, 0)], "ring": turned(64, 1.0),
    "cross": [(c * x - s * y, s * x + c * y) for s, c in ((0, 1), (1, 0), (0, -1), (-1, 0))
              for x, y in ((-0.34, -0.34), (-0.34, -1), (0.34, -1))]}


def draw(scene: Scene, spots: list[tuple[float, float, float]], size: int) -> Image.Image:
    """The picture, size x size, anti-aliased: drawn four times larger, averaged down."""
    background = COLOURS[scene.background or "white"]
    image = Image.new("RGB", (4 * size, 4 * size), background)
    pen, k = ImageDraw.Draw(image), 4 * size / 128
    for thing, (x, y, r) in zip(scene.things, spots):
        hole = [(0.55 * r, background)] if thing.shape == "ring" else []
        for f, colour in [(r, COLOURS[thing.colour]), *hole]:
            pen.polygon([((x + f * u) * k - 0.5, (y + f * v) * k - 0.5)
                         for u, v in OUTLINES[thing.shape]], colour)
    return image.reduce(4)


class ShapesData:
    """Pictures of the Shapes world without end: number i is always the same picture and caption."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return 2**31

    def captions(self) -> list[str]:
        """Enough of them to learn a vocabulary from."""
        return [self.item(i)[1] for i in range(20000)]

    def item(self, i: int) -> tuple[Image.Image, str]:
        rng = random.Random(f"{self.seed}/{i}")
        scene = random_scene(rng)
        picture, caption = draw(scene, place(scene, rng), self.size), caption_of(scene)
        return picture, rephrase(caption, rng) if rng.random() < 0.25 else caption


# %% 10. Training
# --------------------------------------------------------------------------------------------------
# Two stages, as in the latent-diffusion paper: first the VAE alone, then the U-Net and its text
# encoder on the VAE's latents. Everything random in step n (which pictures, which noise) is drawn
# from a generator seeded with n, so that a run that was interrupted goes on exactly as if it had
# not been. With `torchrun --nproc-per-node N`, N processes make a part of every batch each, and
# exchange little but gradients. Each draws the random numbers of the whole batch and uses its
# part, so that what is learned does not depend on N.

class FolderData:
    """A folder of pictures with captions: name.png|jpg|jpeg|webp beside name.txt, or a
    metadata.jsonl whose lines have `file_name` and `text`. Number i is one of them at random."""

    def __init__(self, folder: Path, size: int, seed: int):
        self.size, self.seed = size, seed
        if not folder.is_dir():
            raise InputError(f"no folder {folder} to train on; give one, or the word: shapes")
        pictures = sorted(p for p in folder.iterdir()
                          if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        table, self.items = folder / "metadata.jsonl", []
        if not table.exists():
            self.items = [(p, read_text(t).strip()) for p in pictures
                          if (t := p.with_suffix(".txt")).exists()]
        for number, line in enumerate(read_text(table).split("\n") if table.exists() else [], 1):
            with blaming(f"{table}, line {number}: needs a file_name and a text, has "
                         f"{shortened(line)}", "mend it"):
                if line.strip():
                    entry = json.loads(line)
                    text = entry["text"].encode().decode()      # raises for half a surrogate pair
                    self.items.append((folder / entry["file_name"], text.strip()))
        if silent := {*pictures} - {path for path, _ in self.items}:
            print(f"tiny_ldm: {len(silent)} of {len(pictures)} pictures in {folder} have no "
                  "caption and are left out", file=sys.stderr)
        if not self.items:
            raise InputError(f"no captioned pictures in {folder}: it needs name.png with name.txt, "
                             "or a metadata.jsonl")
        for path, caption in self.items:          # all at the start, not one by one hours later
            open_image(path)
            if len(caption) > 10_000:             # a tokenizer may need minutes for a megabyte
                raise InputError(f"the caption of {path} has {len(caption)} letters; shorten it")

    def __len__(self) -> int:
        return len(self.items)

    def captions(self) -> list[str]:
        return [caption for _, caption in self.items]

    def item(self, i: int) -> tuple[Image.Image, str]:
        path, caption = random.Random(f"{self.seed}/{i}").choice(self.items)
        return ImageOps.fit(open_image(path), (self.size,) * 2, Image.Resampling.LANCZOS), caption


def read_text(path: Path) -> str:
    with blaming(f"{path} can't be read as UTF-8 text", "replace or remove it"):
        return Path(regular(path)).read_text("utf-8-sig")     # a byte order mark is no text


def open_image(path: str | Path) -> Image.Image:
    """A picture file as RGB, turned as its EXIF orientation says. Raises InputError. Not all
    formats that Pillow knows: for some it runs other programs."""
    with blaming(f"{path} can't be read as a picture", "replace or remove it"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(regular(path), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")) as i:
            return to_rgb(i)


def regular(path: str | Path) -> str | Path:
    """path. Raises OSError if it is a pipe or a device: to read that could take forever."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError("it is no regular file")
    return path


class Optimizer(torch.optim.Optimizer):
    """Adam for vectors and for what touches data directly; Muon for the matrices inside.

    Adam (Kingma & Ba 2014, arXiv:1412.6980) scales each number by itself: m / √v, the running mean
    of the gradient over the root of that of its square. Muon (Jordan et al. 2024) takes a weight
    matrix as a whole: of the gradient's U Σ Vᵀ it keeps the directions and sets all singular values
    to about 1, so that rare directions are learned as fast as common ones. A convolution counts as
    a matrix [out, in·9].
    """

    def __init__(self, params: dict[str, nn.Parameter], lr: float = 1e-3, muon_lr: float = 0.02):
        edge = ("embedding", "conv_in", "conv_out", "quant_conv")
        inside = {n for n, p in params.items() if p.ndim >= 2 and not any(e in n for e in edge)}
        groups = [dict(params=[p for n, p in params.items() if (n in inside) == muon],
                       base_lr=muon_lr if muon else lr, muon=muon) for muon in (True, False)]
        super().__init__([g for g in groups if g["params"]], dict(lr=lr))

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` times the full learning rates."""
        for group in self.param_groups:
            lr, same_shape = group["base_lr"] * factor, {}
            for p in group["params"]:
                s = self.state[p]
                m = s.setdefault("m", torch.zeros_like(p))
                if group["muon"]:
                    m.lerp_(p.grad, 0.05)                        # running mean of the gradient ...
                    g = p.grad.lerp(m, 0.95).flatten(1)          # ... one step ahead (Nesterov)
                    same_shape.setdefault(g.shape, []).append((p, g))
                else:
                    n = s["n"] = s.get("n", 0) + 1
                    m.lerp_(p.grad, 0.1)
                    v = s.setdefault("v", torch.zeros_like(p)).lerp_(p.grad**2, 0.01)
                    # Both means start at 0, too small at first: divided by what they have summed
                    p.sub_(lr * (m / (1 - 0.9**n)) / ((v / (1 - 0.99**n)) ** 0.5 + 1e-8))
            for (rows, columns), pairs in same_shape.items():    # in few large products
                params, gs = zip(*pairs)
                # A tall matrix needs more to move its outputs as much: √(rows/columns).
                tall = max(1.0, rows / columns) ** 0.5
                for p, direction in zip(params, orthogonalized(torch.stack(gs))):
                    p.sub_(lr * tall * direction.reshape(p.shape))


def orthogonalized(g: Tensor) -> Tensor:
    """[..., m, n] = U Σ Vᵀ -> about U Vᵀ, by matrix products only: five Newton-Schulz steps.

    Each maps every singular value s to a·s + b·s³ + c·s⁵, whose coefficients (Jordan et al. 2024)
    were chosen to push anything in (0, 1] quickly to between 0.7 and 1.2. For the matrix x that is
    (a + b·y + c·y²) x with y = x xᵀ. All five multiply x from the left by polynomials of the same
    small square y, which commute: so they are multiplied with each other first, and with x once.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (torch.linalg.matrix_norm(g, keepdim=True) + 1e-7)
    x = x.mT if (tall := g.shape[-2] > g.shape[-1]) else x
    y = x @ x.mT
    whole = identity = torch.eye(y.shape[-1]).to(y)
    for _ in range(5):
        one = a * identity + b * y + c * y @ y
        whole, y = one @ whole, one @ one @ y                # x <- one x, so y <- one y oneᵀ
    x = whole @ x
    return x.mT if tall else x


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are (torchrun sets both)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def average(tensors: list[Tensor], world: int) -> None:
    """Puts in each tensor its mean over all processes: gradients of parts of a batch become that of
    the whole."""
    if world > 1:
        flat = torch.cat([t.flatten() for t in tensors])      # one large message beats many small
        try:
            torch.distributed.all_reduce(flat)
        except RuntimeError:
            raise InputError("another process of this training has ended, so this one ends, too; "
                             "the same command goes on from the last checkpoint") from None
        for t, mean in zip(tensors, (flat / world).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


class Trainer:
    """Both stages of training, resumable. `train` at the end of this section runs it."""

    pool_size = 16384             # encoded pictures kept for the U-Net (2 KB each of SHAPES)
    caption_dropout = 0.1         # the share that learns without its caption, for guidance
    second_stage = ("unet.", "text_encoder.")      # what stage 2 trains

    def __init__(self, data, out: Path, ldm: LatentDiffusion, seed: int, save_minutes: float,
                 dtype: torch.dtype, run: list[str], checkpoint: dict | None):
        self.data, self.out, self.ldm, self.seed, self.dtype = data, out, ldm, seed, dtype
        self.save_seconds, self.run, self.checkpoint = 60 * save_minutes, run, checkpoint
        self.rank, self.world = rank_and_world()
        self.pool: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def generator(self, step: int) -> torch.Generator:
        """The source of all that is random in a step, the same in every process."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def mine(self, batch: int) -> slice:
        """Which rows of a batch are this process's."""
        return slice(batch * self.rank // self.world, batch * (self.rank + 1) // self.world)

    def images(self, step: int, batch: int) -> tuple[Tensor, list[str]]:
        """This process's pictures of a step, [its part of B, 3, H, W], and their captions."""
        numbers = range(step * batch, (step + 1) * batch)[self.mine(batch)]
        pictures, captions = zip(*(self.data.item(i) for i in numbers))
        images = to_tensor(list(pictures)).to(self.ldm.device)
        return images.contiguous(memory_format=torch.channels_last), list(captions)

    def fit(self, stage: str, prefix: str | tuple[str, ...], loss_of: Callable[[int], Tensor],
            steps: int, batch: int, ema_decay: float, sample: Callable[[], Image.Image]) -> None:
        """The loop of both stages: trains the parameters whose names begin with `prefix`, then puts
        their moving averages in their place."""
        for n, p in self.ldm.named_parameters():
            p.requires_grad_(n.startswith(prefix))
        params = {n: p for n, p in self.ldm.named_parameters() if p.requires_grad}
        ema = {n: p.detach().clone() for n, p in params.items()}
        optimizer, start, before, mean_loss = Optimizer(params), 0, 0.0, None
        if self.checkpoint and self.checkpoint["stage"] == stage:
            with blaming(f"the checkpoint of {self.out} is damaged", "remove it to start anew"):
                start, before, mean_loss = (self.checkpoint[k] for k in ("step", "seconds", "loss"))
                optimizer.load_state_dict(self.checkpoint["optimizer"])
                for n, e in ema.items():
                    e.copy_(self.checkpoint["ema"][n])
        began = saved = time.monotonic()
        seconds = lambda: before + time.monotonic() - began
        bar = tqdm(range(start, steps), stage, steps, initial=start, disable=self.rank > 0,
                   unit="step")
        for step in bar:
            # In bfloat16 the products are rounded; weights, gradients and norms stay float32.
            with torch.autocast(self.ldm.device.type, self.dtype, self.dtype != torch.float32):
                loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            average([loss.detach(), *(p.grad for p in params.values())], self.world)
            if not loss.isfinite():       # the checkpoint shall not be spoiled, too
                raise InputError(f"the loss is {loss:f} at step {step}; begin with other weights")
            nn.utils.clip_grad_norm_(params.values(), 1.0)
            # Warm up over the first third (at most 100 steps) while running means are poor; cool
            # down to nothing over the last.
            optimizer.step(min(1.0, (step + 1) / min(100, steps / 3), (steps - step) / (steps / 3)))
            # A moving average of the weights draws better than the weights (a short one at first).
            decay = min(ema_decay, (step + 1) / (step + 10))
            for n, p in params.items():
                ema[n].lerp_(p.detach(), 1 - decay)
            mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
            speed = (step + 1 - start) * batch / (time.monotonic() - began)
            bar.set_postfix(loss=f"{mean_loss:.4f}", images_s=f"{speed:.1f}", refresh=False)
            due = time.monotonic() - saved > self.save_seconds or step == steps - 1
            if due and self.rank == 0:
                self.save(params, ema, sample, dict(stage=stage, step=step + 1, seconds=seconds(),
                                                    loss=mean_loss,
                                                    optimizer=optimizer.state_dict()))
                saved = time.monotonic()
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(ema[n])
        if self.rank == 0:
            print(f"{stage}: {steps} steps of {batch} pictures, {seconds() / 60:.1f} minutes, loss "
                  f"{mean_loss:.4f}", file=sys.stderr)

    @torch.no_grad()
    def save(self, params: dict[str, nn.Parameter], ema: dict[str, Tensor],
             sample: Callable[[], Image.Image], state: dict) -> None:
        """Writes what resuming needs; then the model with averaged weights, and its sample grid."""
        state.update(run=self.run, ema=ema, model=self.ldm.state_dict(),
                     config=json.dumps(asdict(self.ldm.config)),
                     tokenizer=self.ldm.tokenizer.backend.to_str())
        last, before = checkpoint_paths(self.out)
        if last.exists():
            os.replace(last, before)
        write_whole(last, lambda file: torch.save(state, file))
        for n, p in params.items():
            p.data, ema[n] = ema[n], p.data
        self.ldm.save(self.out, torch.float16)
        picture = sample()
        write_whole(self.out.with_suffix(".png"), lambda file: picture.save(file, "PNG"))
        for n, p in params.items():
            p.data, ema[n] = ema[n], p.data

    def train_vae(self, stage: str, steps: int, batch: int) -> None:
        """Stage 1, on windows of half the side, which cost a quarter; in the last eleventh of the
        steps on whole pictures, in batches of a quarter. Then measures the latents' scale.

        First "vae", all of it. Then "decoder", that part alone: it goes on learning to draw, from
        latents that stay what they are, so a U-Net that knows them stays right. It sees whole
        pictures only: it has learned what shapes are, and windows would now just shift its norms.
        """
        vae, c = self.ldm.vae, self.ldm.config

        def loss_of(step: int) -> Tensor:
            whole = stage == "decoder" or step >= steps * 10 // 11
            rng = self.generator(step)
            n = max(self.world, batch // 4) if whole else batch
            images, half = self.images(step, n)[0], c.image_size // 2
            if not whole:
                corners = torch.randint(c.image_size - half + 1, (n, 4, 2), generator=rng)
                images = busiest_windows(images, half, corners[self.mine(n)].tolist())
            side = images.shape[-1] // c.latent_stride
            noise = torch.randn((n, c.vae.latent_channels, side, side), generator=rng)
            return vae_loss(vae, images, noise[self.mine(n)].to(images), kl_weight=1e-4)

        def sample() -> Image.Image:
            images = self.images(0, 8 * self.world)[0]
            return grid(to_pil(images) + to_pil(vae.decode(vae.encode(images)[0])), 8)

        part = "vae." if stage == "vae" else ("vae.decoder.", "vae.post_quant_conv.")
        self.fit(stage, part, loss_of, steps, batch, 0.998, sample)
        if stage == "decoder":
            return
        with torch.no_grad():
            latents = torch.cat([vae.encode(self.images(i, 64)[0])[0] for i in range(16)])
            average(moments := [latents.mean(), (latents**2).mean()], self.world)
        self.ldm.config = replace(c, scale_factor=(moments[1] - moments[0] ** 2).item() ** -0.5)
        if self.rank == 0:
            self.ldm.save(self.out, torch.float16)        # once more, now with the scale

    @torch.no_grad()
    def encoded(self, group: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's pictures of a group as (mean, logvar, ids)."""
        images, captions = self.images(group, size)
        mean, logvar = self.ldm.vae.encode(images)
        return mean.float(), logvar.float(), self.ldm.tokenizer(captions, warn=False).to(
            images.device)

    def train_unet(self, steps: int, batch: int) -> None:
        """Stage 2, on a pool of encoded pictures that slides along the stream of pictures: in each
        step a few new ones push out the oldest, so that encoding costs little and yet no picture
        stays for long."""
        c, mine, size = self.ldm.config, self.mine(batch), max(self.world, batch // 8)
        groups = max(1, min(self.pool_size, len(self.data)) // size)
        no_prompt, device = self.ldm.tokenizer([""]), self.ldm.device

        def loss_of(step: int) -> Tensor:
            for g in range(step, step + groups):
                if g not in self.pool:
                    self.pool[g] = self.encoded(g, size)
            self.pool.pop(step - 1, None)
            # Each row of the batch takes from a random group, in which its place is its own.
            rng = self.generator(step)
            picks = torch.randint(groups, (batch,), generator=rng)[mine].tolist()
            rows = [[part[i * len(part) // len(picks)] for part in self.pool[step + g]]
                    for i, g in enumerate(picks)]
            mean, logvar, ids = (torch.stack(part) for part in zip(*rows))
            noise = torch.randn((2, batch, *mean.shape[1:]), generator=rng)
            z_noise, eps = noise[:, mine].to(device)
            # Timesteps are spread over the batch, not drawn one by one: the same mean loss, with
            # less scatter. Large ones come more often (density √t): where there is much noise, the
            # layout of a picture is decided, which takes longest to learn.
            t = (torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)) / batch
            t = (t[mine] ** (2 / 3) * c.schedule.num_timesteps).long()
            t = t.clamp(max=c.schedule.num_timesteps - 1)
            # Some learn what no prompt looks like, for guidance.
            dropped = torch.rand(batch, 1, generator=rng)[mine] < self.caption_dropout
            ids = torch.where(dropped.to(device), no_prompt.to(device), ids)
            x0 = c.scale_factor * sample_posterior(mean, logvar, z_noise)
            return diffusion_loss(self.ldm.unet, x0.contiguous(memory_format=torch.channels_last),
                                  self.ldm.text_encoder(ids), self.ldm.alphas_cumprod.to(x0),
                                  c.prediction, t.to(device), eps)

        captions = [self.data.item(-1 - i)[1] for i in range(16)]
        sample = lambda: grid(self.ldm.generate(captions, steps=20, progress=False), 4)
        self.fit("unet", self.second_stage, loss_of, steps, batch, 0.999, sample)


def busiest_windows(images: Tensor, side: int, corners: list) -> Tensor:
    """[B, 3, H, W] -> [B, 3, side, side]: of the windows with these (y, x) corners, [B, 4, 2], the
    one with the most in it, since little is learned from an empty background."""
    windows = [max((image[:, y : y + side, x : x + side] for y, x in places), key=Tensor.std)
               for image, places in zip(images, corners)]
    return torch.stack(windows).contiguous(memory_format=torch.channels_last)


def checkpoint_paths(out: Path) -> tuple[Path, Path]:
    """The training checkpoint of a run, and the one before it, in case the last is damaged."""
    return Path(f"{out}.checkpoint"), Path(f"{out}.before.checkpoint")


def read_checkpoint(out: Path, run: list[str]) -> dict | None:
    """The last checkpoint of a run that is whole, its config and tokenizer parsed; None where there
    is none. Raises InputError."""
    for path in (paths := [path for path in checkpoint_paths(out) if path.exists()]):
        try:
            with blaming(f"the checkpoint {path} is damaged", "remove it to start anew"):
                with zipfile.ZipFile(regular(path)) as file:     # PyTorch doesn't check the sums
                    if file.testzip() is not None:
                        raise ValueError("a checksum is wrong")
                found = torch.load(path, map_location="cpu", weights_only=True)
                found["parts"] = parse_header(found)
                kinds = [type(found[key]) for key in ("step", "seconds", "loss")]
                if kinds != [int, float, float] or found["stage"] not in ("vae", "decoder", "unet"):
                    raise ValueError("it does not say where the run stood")
                other = found["run"] != run
        except InputError as e:
            if path == paths[-1]:
                raise
            print(f"tiny_ldm: {str(e).rpartition(';')[0]}; going on from the one before it",
                  file=sys.stderr)
            path.unlink(missing_ok=True)      # or it would be kept in the place of that one
            continue
        if other:
            raise InputError(f"{path} is of another run (its --train, --weights and --seed were "
                             f"{found['run']}, not {run}); remove it, or choose another -o")
        return found
    return None


def check_training(out: Path, dtype: torch.dtype, save_minutes: float, **counts: int) -> None:
    """Raises InputError for what can't be trained; counts: the seed, the steps, the batches."""
    least = {"seed": 0, "decoder_steps": 0, "unet_steps": 0}
    for name, value in counts.items():
        within(name, value, least.get(name, 1), 2**14 if "batch" in name else 2**31)
    if not save_minutes >= 0:
        raise InputError(f"save_minutes must be at least 0, not {save_minutes}")
    if dtype == torch.float16:
        raise InputError("gradients are too small for float16; train in float32 or bfloat16")
    if out.suffix != ".safetensors":
        raise InputError(f"a model is written to a .safetensors file; {out} does not end so")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist; make it first")
    vae_batch, unet_batch, world = counts["vae_batch"], counts["unet_batch"], rank_and_world()[1]
    if vae_batch % world or unet_batch % world:
        raise InputError(f"batches of {vae_batch} and {unet_batch} pictures can't be shared evenly "
                         f"among {world} processes; choose multiples of {world}")


def train(source: str, out: str | Path, *, weights: str | Path | None = None, vae_steps: int = 4400,
          decoder_steps: int = 0, unet_steps: int = 20000, vae_batch: int = 64,
          unet_batch: int = 128, seed: int = 0, device: str = "auto",
          dtype: torch.dtype = torch.float32, save_minutes: float = 5.0,
          config: Config = SHAPES) -> None:
    """Trains on "shapes" or on a folder and writes the weights file `out`.

    With `weights`, goes on from that model and leaves its latents as they are: only the decoder
    of its VAE may go on, for `decoder_steps`. An interrupted run goes on where out + ".checkpoint"
    stands. Raises InputError.
    """
    out, device, run = Path(out), pick_device(device), [source, str(weights or ""), str(seed)]
    check_training(out, dtype, save_minutes, seed=seed, vae_steps=vae_steps,
                   decoder_steps=decoder_steps, unet_steps=unet_steps, vae_batch=vae_batch,
                   unet_batch=unet_batch)
    keep_freed_memory()
    world = rank_and_world()[1]
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # However training ends: one of its threads that outlives Python aborts the process.
        atexit.register(torch.distributed.destroy_process_group)
    torch.manual_seed(seed)
    checkpoint = read_checkpoint(out, run)
    start = None if weights is None else LatentDiffusion.load(weights, str(device))
    config = replace(start.config, name=source) if start else config
    if config.unet.in_channels != config.vae.latent_channels:
        raise InputError(f"{weights} is an inpainting model, which can't be trained here")
    size = config.image_size
    data = ShapesData(size, seed) if source == "shapes" else FolderData(Path(source), size, seed)
    for path in out.parent.iterdir():       # what a killed run left half-written
        if path.name.startswith(f".{out.name[:40]}.") and path.suffix == ".part":
            path.unlink(missing_ok=True)
    if checkpoint:
        config, tokenizer = checkpoint["parts"]
    elif start is None:
        tokenizer = Tokenizer.train(data.captions(), config.text.vocab_size, config.text.max_length)
        text = replace(config.text, vocab_size=tokenizer.backend.get_vocab_size())
        config = replace(config, name=source, text=text)
    if source != "shapes":
        (start.tokenizer if start else tokenizer).count_cut(data.captions())
    ldm = start or LatentDiffusion(config, tokenizer).to(device)
    ldm.to(memory_format=torch.channels_last)
    ldm.config = config
    if checkpoint:
        with blaming(f"the checkpoint of {out} is damaged", "remove it to start anew"):
            ldm.load_state_dict(checkpoint["model"])
    trainer = Trainer(data, out, ldm, seed, save_minutes, dtype, run, checkpoint)
    stage = checkpoint["stage"] if checkpoint else "decoder" if start else "vae"
    if stage == "vae":
        trainer.train_vae("vae", vae_steps, vae_batch)
    if stage != "unet" and decoder_steps:
        trainer.train_vae("decoder", decoder_steps, vae_batch)
    if unet_steps:
        trainer.train_unet(unet_steps, unet_batch)


# %% 11. Command line
# --------------------------------------------------------------------------------------------------
# python tiny_ldm.py "a red circle left of a blue square"       makes a picture and prints its name
# python tiny_ldm.py --again FILE.png                           makes it again
# python tiny_ldm.py --train shapes -o FILE                     trains a model
# Progress goes to stderr. Bad input is one line there and exit code 2; only errors of this program
# itself show a traceback.

class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message}; see --help")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    ap = ArgumentParser(prog="tiny_ldm.py", allow_abbrev=False,
                        description="Makes pictures from words, or trains to.")
    add = ap.add_argument
    add("prompt", nargs="?", help="what the picture shall show")
    add("-o", "--output", metavar="FILE", help="the .png to write (default: named after prompt and "
                                               "seed), or with --train the .safetensors")
    add("--weights", metavar="FILE", help="another model than the built-in one; with --train, "
                                          "where to start")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--compile", action="store_true", help="faster networks, after a minute of compiling")
    add("--seed", type=int, default=0, metavar="N")
    add("-n", "--count", type=int, default=1, metavar="COUNT", help="with seeds N, N+1, ...")
    groups = {"pictures": (
        ("steps", int, 25, "N", "1 to 1000"),
        ("sampler", str, "euler_a", "NAME", ", ".join(SAMPLERS)),
        ("guidance-scale", float, None, "X", "how much the prompt counts (default: the model's)"),
        ("eta", float, 0.0, "X", "fresh noise in ddim, 0 to 1"),
        ("negative-prompt", str, "", "TEXT", "what to steer away from"),
        ("width", int, None, "W", "of the picture"), ("height", int, None, "H", "of the picture"),
        ("image", str, None, "FILE", "a picture to begin with"),
        ("strength", float, 0.75, "X", "how far from it, 0 to 1"),
        ("mask", str, None, "FILE", "repaint only where this picture is white"),
        ("film", str, None, "FILE", "also write how it formed: a strip (.png) or a .gif"),
        ("attention", str, None, "FILE", "also draw where the model looked for each word (.png)"),
        ("again", str, None, "FILE", "make the picture in this .png once more"),
        ("prompts", str, None, "FILE", "a picture for each line of this file, in the folder -o")),
        "training": (
        ("train", str, None, "shapes|FOLDER", "the Shapes world, or captioned pictures"),
        ("vae-steps", int, 4400, "N", "of stage 1"),
        ("decoder-steps", int, 0, "N", "more of stage 1, for the decoder alone"),
        ("unet-steps", int, 20000, "N", "of stage 2"),
        ("vae-batch", int, 64, "N", "pictures a step in stage 1"),
        ("unet-batch", int, 128, "N", "pictures a step in stage 2"),
        ("save-minutes", float, 5.0, "X", "between checkpoints"))}
    for group, rows in groups.items():
        add = ap.add_argument_group(group).add_argument
        for name, kind, default, metavar, what in rows:
            add(f"--{name}", type=kind, default=default, metavar=metavar,
                help=what if default in (None, "") else f"{what} (default: {default})")
    ap.set_defaults(prefix="")       # of a picture's name: --prompts numbers them
    if [] in vars(args := ap.parse_args(argv)).values():       # Python < 3.13 makes it of --x=--
        ap.error("-- is no value")
    return args


# The settings that make a picture: their names in its text chunk, and the arguments.
SETTINGS = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "guidance_scale", "Seed": "seed",
            "Eta": "eta", "Precision": "dtype", "Weights": "weights", "Image": "image",
            "Strength": "strength", "Mask": "mask"}


def parameters_text(args: argparse.Namespace, config: Config, image: Image.Image) -> str:
    """The settings in the form that viewers of this field read from a PNG's text chunk
    `parameters`: the prompt, "Negative prompt: ...", and a line of "Name: value" pairs."""
    odd = lambda text: re.search('[,:"]', text) or not text.isprintable()
    quoted = lambda value: json.dumps(value) if odd(str(value)) else str(value)
    one_line = lambda text: " ".join(text.split())      # the tokenizer sees no difference
    pairs = {name: getattr(args, key) for name, key in SETTINGS.items()}
    if args.image is None:
        del pairs["Strength"]
    pairs.update(Size=f"{image.width}x{image.height}", Model=config.name)
    lines = [f"Negative prompt: {one_line(args.negative_prompt)}"] if args.negative_prompt else []
    line = ", ".join(f"{k}: {quoted(v)}" for k, v in pairs.items() if v is not None)
    return "\n".join([one_line(args.prompt), *lines, line])


def settings_of(file: str) -> tuple[list[str], str]:
    """The inverse: the arguments and the prompt of the picture in a .png. Raises InputError."""
    text = str(open_image(file).info.get("parameters", ""))
    words, _, line = text.rpartition("\n")
    prompt, _, negative = words.partition("\nNegative prompt: ")
    found = dict(re.findall(r'(\w[\w ]*): ("(?:\\.|[^"\\])*"|[^,]*)', line))
    size = re.fullmatch(r"(\d+)x(\d+)", found.get("Size", ""))
    if not (prompt and size and "Seed" in found):
        raise InputError(f"{file} has no settings in it (a text chunk `parameters`); give a .png "
                         "that tiny_ldm wrote")
    argv = [f"--width={size[1]}", f"--height={size[2]}", f"--negative-prompt={negative}"]
    for name, key in SETTINGS.items():
        if value := found.get(name):
            with blaming(f"{file} has damaged settings", "give the picture as it was made"):
                value = json.loads(value) if value.startswith('"') else value
            argv.append(f"--{key.replace('_', '-')}={value}")
    return argv, prompt


def picture_path(args: argparse.Namespace, seed: int) -> Path:
    """Where a picture goes: -o, or a name made of prompt and seed; several have the seed in it."""
    if args.output is None:
        words = re.sub(r"[^\w]+", "-", args.prompt.lower()).strip("-")[:56].strip("-")
        return Path(f"{args.prefix}{words or 'picture'}-{seed}.png")
    path = Path(args.output)
    return path if args.count == 1 else path.with_name(f"{path.stem}-{seed}{path.suffix}")


def check_paths(args: argparse.Namespace) -> list[Path]:
    """Where the pictures go. Raises InputError before any work where they can't be written."""
    if not (args.prompt or "").strip():
        raise InputError("the prompt is empty; say what the picture shall show, like "
                         '"a red circle left of a blue square"')
    for text in (args.prompt, args.negative_prompt):
        if any("\ud800" <= letter <= "\udfff" for letter in text):       # what is left of bad bytes
            raise InputError(f"the prompt is not UTF-8 text: {shortened(ascii(text))}")
    within("-n", args.count, 1, 2**16)
    if args.seed + args.count > 2**63:
        raise InputError(f"the seeds must be below 2**63, and the last would be {args.seed} + "
                         f"{args.count - 1}")
    if args.attention and args.image and args.strength * args.steps < 1:
        raise InputError(f"at strength {args.strength} the model never looks at the picture: "
                         "--attention needs more")
    paths = [picture_path(args, args.seed + i) for i in range(args.count)]
    for what, file, endings in (("picture", args.output, (".png",)),
                                ("film", args.film, (".png", ".gif")),
                                ("attention map", args.attention, (".png",))):
        if file is not None and Path(file).suffix.lower() not in endings:
            raise InputError(f"the {what} is written as {' or '.join(endings)}; {file!r} does not "
                             "end so")
    taken = {os.path.abspath(file) for file in (args.image, args.mask) if file}
    for path in [*paths, *(Path(file) for file in (args.film, args.attention) if file)]:
        if not path.parent.is_dir():
            raise InputError(f"the folder {path.parent} does not exist; make it first")
        if path.is_dir() or os.path.abspath(path) in taken:
            raise InputError(f"{path} is a folder, or the name of another picture here; choose "
                             "another name")
        taken.add(os.path.abspath(path))
    return paths


def jobs_of(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments; or with --prompts those for each line of the file, whose pictures are named
    after its number. Raises InputError."""
    if args.prompts is None:
        return [args]
    if args.output is None or args.prompt or args.film or args.attention:
        raise InputError("--prompts needs -o FOLDER, and goes without a prompt, --film and "
                         "--attention")
    jobs = []
    for number, line in enumerate(read_text(Path(args.prompts)).splitlines(), 1):
        if line.strip():
            jobs.append(argparse.Namespace(**{
                **vars(args), "prompt": line, "output": None,
                "prefix": os.path.join(args.output, f"{number:04}-")}))
    if not jobs:
        raise InputError(f"{args.prompts} holds no prompt; write one on each line")
    return jobs


def make_pictures(args: argparse.Namespace) -> None:
    """What the command does without --train. With `torchrun --nproc-per-node N`, every Nth prompt
    of --prompts."""
    jobs = [(job, check_paths(job)) for job in jobs_of(args)]
    image, mask = (None if f is None else open_image(f) for f in (args.image, args.mask))
    ldm = LatentDiffusion.load(args.weights, args.device, getattr(torch, args.dtype))
    image, mask = fit_pictures(image, mask, ldm.config.stride, args.width, args.height)
    if args.compile:
        ldm.compile_networks()
    rank, world = rank_and_world()
    for job, paths in jobs[rank::world]:
        if job.guidance_scale is None:
            job.guidance_scale = ldm.config.guidance_scale
        make_picture(ldm, job, paths, image, mask)


def make_picture(ldm: LatentDiffusion, args: argparse.Namespace, paths: list[Path],
                 image: Tensor | None, mask: Tensor | None) -> None:
    """The pictures of one prompt, one by one, so that each is the same to the bit as when it is
    made alone."""
    prompt, films, attention = ldm.encode_text(args.prompt), [], []
    for path in paths:
        guesses = []
        with ldm.attention() if args.attention else contextlib.nullcontext() as maps:
            picture, = ldm.generate(
                prompt, args.negative_prompt, steps=args.steps, sampler=args.sampler,
                guidance_scale=args.guidance_scale, eta=args.eta, seed=args.seed, width=args.width,
                height=args.height, image=image, strength=args.strength, mask=mask,
                progress=rank_and_world()[0] == 0,
                watch=lambda step: guesses.append(step.x0) if args.film else None)
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", parameters_text(args, ldm.config, picture))
        write_whole(path, lambda file: picture.save(file, "PNG", pnginfo=info))
        print(path, flush=True)
        if args.film:                          # ten of the steps, from first to last
            shown = [guesses[round(i * (len(guesses) - 1) / 9)] for i in range(10)]
            films.append(to_pil(torch.cat([ldm.decode_latents(x0) for x0 in shown])))
        if args.attention:
            attention += draw_attention(picture, ldm.tokenizer.words(args.prompt), maps.mean()[-1])
        args.seed += 1
    if args.film:
        write_whole(args.film, lambda file: save_film(films, file, Path(args.film).suffix.lower()))
        print(args.film)
    if args.attention:
        sheet = grid(attention, len(attention) // len(paths))
        write_whole(args.attention, lambda file: sheet.save(file, "PNG"))
        print(args.attention)
    unknown = ldm.tokenizer.unknown_words(args.prompt)
    if args.weights is None and unknown:
        print(f"tiny_ldm: the built-in model knows coloured shapes ({', '.join(COLOURS)}; "
              f"{', '.join(SHAPE_NAMES)}) and has never met: {shortened(', '.join(unknown))}; for "
              "other pictures get Stable Diffusion (see README.md)", file=sys.stderr)


def save_film(films: list[list[Image.Image]], file: str, ending: str) -> None:
    """The frames of each picture as a row (.png), or those of all pictures at once, one after the
    other (.gif)."""
    if ending == ".png":
        grid(sum(films, []), len(films[0])).save(file, "PNG")
    else:
        first, *others = [grid(list(pictures), len(films)) for pictures in zip(*films)]
        first.save(file, "GIF", save_all=True, append_images=others, duration=200, loop=0)


def draw_attention(picture: Image.Image, words: list[tuple[str, list[int]]],
                   maps: Tensor) -> list[Image.Image]:
    """The picture, and for each word (its text, its places in L) the picture lit where the model
    looked for it; maps [L, h, w]."""
    picture = ImageOps.scale(picture, max(1, 128 // picture.width), Image.Resampling.NEAREST)
    cards = []
    for word, places in [("", []), *words]:
        lit = picture
        if places:
            heat = maps[places].mean(dim=0)
            heat = (255 * (heat - heat.min()) / (heat.max() - heat.min() + 1e-9)).byte().numpy()
            light = Image.fromarray(heat).resize(picture.size, Image.Resampling.BICUBIC)
            lit = Image.composite(picture, picture.point(lambda v: v // 5), light)
        card = ImageOps.expand(lit, (4, 4, 4, 20), "white")
        ImageDraw.Draw(card).text((6, picture.height + 7), word, "black")
        cards.append(card)
    return cards


def run(argv: list[str]) -> None:
    """What the arguments ask for. Raises InputError."""
    args = parse_args(argv)
    if args.again is not None:       # the file's settings, then those given beside it
        settings, prompt = settings_of(args.again)
        args = parse_args([*settings, *argv])
        args.prompt = prompt if args.prompt is None else args.prompt
    if args.train is None:
        make_pictures(args)
    elif args.output is None:
        raise InputError("--train needs -o FILE.safetensors, where the model goes")
    else:
        settings = {name: vars(args)[name] for name in train.__kwdefaults__.keys() & vars(args)}
        train(args.train, args.output, **{**settings, "dtype": getattr(torch, args.dtype)})


def main(argv: list[str] | None = None, command: Callable[[list[str]], None] = run) -> int:
    """Runs a command and returns its exit code: 2, and one line on stderr, for bad input."""
    try:
        command(sys.argv[1:] if argv is None else argv)
        print(end="", flush=True)      # a full disk, or a reader that is gone, shows itself now
        return 0
    except (InputError, OSError) as e:
        print(f"tiny_ldm: {shortened(str(e), 1000)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:     # PyTorch has no type of its own for the CPU's
        if isinstance(e, RuntimeError) and not re.search("alloc|out of memory", str(e)):
            raise
        print(f"tiny_ldm: not enough memory ({shortened(str(e))}); close other programs, make a "
              "smaller picture, or use --dtype bfloat16", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tiny_ldm: interrupted", file=sys.stderr)
        return 130


def console(command: Callable[[list[str]], None] = run) -> None:
    """main as a program: where stdout or stderr are closed or know few letters, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main(None, command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # all is done
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.close()      # what could not be written, Python would try again, and complain
    sys.exit(code)


if AS_PROGRAM:
    console()
