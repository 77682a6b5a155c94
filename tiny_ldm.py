"""tiny_ldm: latent diffusion, the architecture of Stable Diffusion, in one file to read and run.

Train a network to tell which part of a noisy picture is noise. Then start from nothing but noise,
ask the network, take away a little of what it calls noise, and ask again: after a few dozen rounds
there is a picture that nobody has ever drawn. Latent diffusion (Rombach et al. 2022,
arXiv:2112.10752) does this not on pixels but on a small code of the picture, its latents: for a
picture of 512 x 512 every step works on 16,384 numbers instead of 786,432.

Letters in this file: B batch; C channels; H, W height and width in pixels, h, w those of the
latents; L tokens per prompt; D width of a token's vector; N length of a sequence (h·w, or L); d
width of one attention head; E width of the timestep's vector; S sampling steps; T timesteps (1000);
x₀ clean latents; ε noise; xₜ the mix of both at timestep t; ᾱₜ ("alpha bar") the part of xₜ's
variance that comes from x₀.

Making a picture (shapes as in Stable Diffusion 1.x; the model built into this repository is the
same code with smaller numbers):

    "a red circle ..."                                random noise       [B, 4, 64, 64]
           | tokenizer                                      |
           v                                                v
    ids     [B, 77]                     +-----> U-Net(xₜ, t, context) -> guess of ε
           | text encoder (CLIP)        |                   |
           v                            |                   v
    context [B, 77, 768] ---------------+      sampler: one step to less noise,
                                                 and back to the U-Net, S times
                                                            v
                                                      latents x₀         [B, 4, 64, 64]
                                                            | VAE decoder
                                                            v
                                                        picture          [B, 3, 512, 512]

Training (the VAE comes first, by itself: picture -> latents -> the same picture):

    picture -> VAE encoder -> x₀ -> mix with noise ε, at a random t -> xₜ
                                                                        |
    its caption -> tokenizer -> text encoder -> context -> U-Net(xₜ, t, context) -> guess of ε
                                                                        |
                             the loss: how far is the guess from the ε that was mixed in?

Part I, the lesson: all you need to understand, rebuild and train the system, in plain PyTorch
    1. Config            the sizes, and why they are what they are
    2. Diffusion         the whole idea: noise, the question, the loss, a sampler, guidance
    3. Blocks            bricks that several of the networks share
    4. VAE               pictures to latents and back
    5. Text              words to ids to vectors
    6. U-Net             the network that sees the noise
    7. Samplers          more ways to walk from noise to a picture
    8. LatentDiffusion   everything together: load, encode, denoise, generate
    9. Training          two losses, one loop
Part II, the workshop: what makes a tool of it, and the built-in model's own recipe
   10. Shapes            the little world that the built-in model knows
   11. Files             what comes from outside: weights, pictures, settings
   12. Faster            memory and speed
   13. Training runs     data, checkpoints, several processes
   14. Command line

Lines that begin with "# %%" start a cell: VS Code and JupyterLab (with jupytext) step through the
file cell by cell, and each section of Part I ends with a cell that shows something. The notebooks
next to this file play with the sections.
"""
from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

# True where the cells run one by one; an import and the command skip the cells named "Look"
STEPPING = __name__ == "__main__" and "ipykernel" in sys.modules


# %% 1. Config
# --------------------------------------------------------------------------------------------------
# The sizes in which models differ. Stable Diffusion 1.x is one instance of these classes (`SD1`),
# the small model built into this repository another (`SHAPES`), so whatever you learn on the small
# one holds for the large one. Notebook 7 puts the two side by side. Many words here are explained
# only later: skim this section now, and come back to it.

@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 49408       # CLIP's: 2 · 256 bytes, 48,894 merges, 2 special ones (section 5)
    max_length: int = 77          # L: tokens per prompt, the two special ones included
    width: int = 768              # D: also the width of the context that the U-Net reads
    num_layers: int = 12
    num_heads: int = 12           # so each head is 64 wide
    activation: str = "quick_gelu"        # or "gelu", the exact one
    pad_id: int | None = None     # what prompts are filled up with; None: EOS (section 5)
    penultimate: bool = False     # is the context what comes out of the last layer but one? ...
    final_norm: bool = True       # ... and does the final norm follow?
    pooled_dim: int | None = None         # width of a vector for the prompt as a whole, if any


@dataclass(frozen=True)
class VAEConfig:
    channels: int = 128           # level i is channels · channel_mult[i] wide
    # Four levels with three halvings between them: a latent stands for 8 x 8 pixels. What a level
    # loses in resolution it partly makes up for in channels
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2       # per level (the decoder has one more)
    latent_channels: int = 4      # 512 x 512 x 3 numbers become 64 x 64 x 4: 48 times fewer
    norm_groups: int = 32         # channels are normalised in this many groups


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 4          # 9 for inpainting: latents, a mask, the masked picture's latents
    out_channels: int = 4
    channels: int = 320           # so the levels are 320, 640, 1280, 1280 wide: 860 M parameters
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2       # per level (the way up has one more)
    # Transformer blocks at each level. None at the coarsest, 8 x 8: the middle, also 8 x 8, has as
    # many as the level with the most
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    num_heads: int = 8            # at every level, so they get wider: 40, 80, 160; ...
    head_dim: int | None = None   # ... or else there are more of them: each is this wide
    vector_dim: int | None = None         # width of a vector that is added to the timestep's: XL's
                                          # pooled prompt, and 6 sizes written as 256 waves each
    norm_groups: int = 32


@dataclass(frozen=True)
class ScheduleConfig:
    num_timesteps: int = 1000     # T
    beta_start: float = 0.00085   # β: the variance that the first noising step adds ...
    beta_end: float = 0.0120      # ... and the last one (section 2)


@dataclass(frozen=True)
class Config:
    """A whole model: its sizes, and the settings that its pictures are made with by default."""
    name: str
    image_size: int               # side of the training pictures, in pixels
    # What the U-Net predicts: "eps", the noise, or "v" (section 2). In diffusers, Hugging Face's
    # library, these are "epsilon" and "v_prediction"
    prediction: str = "eps"
    # Latents are multiplied by this, 1 / (their standard deviation), before noise is mixed in. The
    # noise has standard deviation 1; only if the latents have it, too, is ᾱ their share
    scale_factor: float = 0.18215
    sampler: str = "euler_a"      # section 7
    steps: int = 25               # S
    guidance_scale: float = 7.5   # how far the picture is pushed towards the prompt (section 2)
    text: TextConfig = field(default_factory=TextConfig)
    text_2: TextConfig | None = None      # a second text encoder, in Stable Diffusion XL
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @property
    def vae_stride(self) -> int:
        """Pixels per latent along each side, the paper's downsampling factor f: 8 in SD 1.x."""
        return 2 ** (len(self.vae.channel_mult) - 1)

    @property
    def stride(self) -> int:
        """Width and height of a picture must be multiples of this, so that every halving in the VAE
        and the U-Net comes out even: 64 in SD 1.x."""
        return self.vae_stride * 2 ** (len(self.unet.channel_mult) - 1)

    @property
    def context_dim(self) -> int:
        """How wide the context is: with two text encoders both, side by side."""
        return self.text.width + (self.text_2.width if self.text_2 else 0)

    @staticmethod
    def from_dict(values: dict) -> "Config":
        """The inverse of `dataclasses.asdict`, from JSON (in which tuples have become lists)."""
        parts = dict(text=TextConfig, text_2=TextConfig, vae=VAEConfig, unet=UNetConfig,
                     schedule=ScheduleConfig)
        built = dict(values)
        for name, part in parts.items():
            if values.get(name):
                sizes = {key: tuple(value) if isinstance(value, list) else value
                         for key, value in values[name].items()}
                built[name] = part(**sizes)
        return Config(**built)


def for_inpainting(config: Config) -> Config:
    """A model that has learned to repaint: its U-Net also sees a mask and the rest of a picture."""
    return replace(config, name=f"{config.name} inpainting",
                   unet=replace(config.unet, in_channels=9))


# 1,066 M parameters: U-Net 860 M, VAE 84 M, text encoder 123 M
SD1 = Config("Stable Diffusion 1.x", image_size=512)
SD1_INPAINT = for_inpainting(SD1)

# What changed after 1.x? (Sizes, scale_factor and a picture's settings: see the code below.)
#
#                     1.x           2.x                     XL
#     text encoder    CLIP L        OpenCLIP H, trained     CLIP L and OpenCLIP bigG, side by side
#                                   on public data
#     its GELU, pad   quick, EOS    exact, 0                L as in 1.x; bigG exact, 0
#     context         last layer,   last layer but one,     last layers but one, no final norm (the
#                     final norm    final norm              last layer serves CLIP's own task)
#     heads           8 per level   64 wide: more of them where there are more channels
#     predicts        ε             ε (512), v (768)        ε
#     levels, depth   4: 1 1 1 0    4: 1 1 1 0              3: 0 2 10, most where places are few
#     is also told    -             -                       each prompt as one vector, and sizes, so
#                                                           that small pictures could be used, too
SD2 = Config(
    "Stable Diffusion 2.x", image_size=512, sampler="ddim", steps=50, guidance_scale=9.0,
    text=TextConfig(width=1024, num_layers=24, num_heads=16, activation="gelu", pad_id=0,
                    penultimate=True),
    unet=UNetConfig(head_dim=64))
SD2_V = replace(SD2, name="Stable Diffusion 2.x, v", image_size=768, prediction="v")
SD2_INPAINT = for_inpainting(SD2)
# 3,469 M parameters: U-Net 2,567 M, VAE 84 M, text encoders 123 M and 695 M
SDXL = Config(
    "Stable Diffusion XL", image_size=1024, scale_factor=0.13025, sampler="euler_leading", steps=50,
    guidance_scale=5.0,
    text=TextConfig(penultimate=True, final_norm=False),
    text_2=TextConfig(width=1280, num_layers=32, num_heads=20, activation="gelu", pad_id=0,
                      penultimate=True, final_norm=False, pooled_dim=1280),
    unet=UNetConfig(channel_mult=(1, 2, 4), transformer_depth=(0, 2, 10), head_dim=64,
                    vector_dim=2816))
SDXL_INPAINT = for_inpainting(SDXL)

# 8.6 M parameters: U-Net 5.2 M, VAE 2.7 M, text encoder 0.7 M
SHAPES = Config(
    "shapes",
    image_size=64,          # 8 x 8 latents: the fewest in which a shape still keeps its corners
    prediction="v",         # learns colours and layout sooner than "eps" (section 2 says why)
    scale_factor=1.0,       # a placeholder: measured when the VAE is trained (section 9)
    guidance_scale=2.0,     # measured: from 5 on colours are driven too far
    # vocab_size is an upper limit for the tokenizer: its captions gave 423 pieces
    text=TextConfig(vocab_size=512, max_length=24, width=128, num_layers=3, num_heads=4),
    # Pixels of flat colour need few channels; the coarse levels, where a shape is decided, get more
    vae=VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, norm_groups=8),
    # Two levels of equal width: 8 x 8 and 4 x 4 is all the room there is
    unet=UNetConfig(channels=112, channel_mult=(1, 1), num_res_blocks=1, transformer_depth=(1, 1),
                    num_heads=4, norm_groups=16))

# %% Look: every size of the small model
if STEPPING:
    print(SHAPES)


# %% 2. Diffusion
# --------------------------------------------------------------------------------------------------
# The whole idea, before any network. ("Picture" means x₀ here, so in this file its latents.)
# Notebook 1 plays it through in the plane, on points.
#
# Noise (Sohl-Dickstein et al. 2015, arXiv:1503.03585). One step of noising shrinks the picture a
# little and adds a little Gaussian noise, such that the variance stays 1 if it was 1:
#
#     xₜ = √(1−βₜ) · xₜ₋₁ + √βₜ · ε         (DDPM: Ho et al. 2020, arXiv:2006.11239, equation 2)
#
# In many steps the factors multiply, to √ᾱₜ with ᾱₜ = (1−β₀)(1−β₁) ... (1−βₜ). The small noises, a
# new ε in each step, shrunk by the steps after it, add up to one Gaussian noise; and since the
# variance stays 1, its share is the rest, 1−ᾱₜ. So all the steps up to t are one step of the same
# form, in which ε is all the noise together:
#
#     xₜ = √ᾱₜ · x₀ + √(1−ᾱₜ) · ε                                               (equation 4)
#
# (Careful with the counting: x₀ is the clean picture, but t counts from 0, as in all code, and at
# t = 0 one noising step is done already. The paper counts 1 ... T.)
#
# With Stable Diffusion's β from 0.00085 to 0.012 a picture goes from nearly clean to nearly nothing
# but noise:
#
#     t           0       250     500     750     999
#     √ᾱₜ         1.000   0.821   0.526   0.237   0.068     how much of the picture is in xₜ
#     √(1−ᾱₜ)     0.029   0.571   0.851   0.972   0.998     how much noise
#     σₜ          0.03    0.70    1.62    4.10    14.6      noise / picture: section 7's scale
#
# The question. Training shows a network xₜ and t, and asks for ε: all the noise, at once. The
# network can't know ε, because many pictures could have become this xₜ. Under a squared error its
# best answer is the mean of all the ε that are possible, and with it the mean of all the possible
# x₀: at t = 999, where nearly every picture is possible, a blur. So one step is not enough. But the
# mean points the right way: go a little towards it, and where there is less noise fewer pictures
# are possible, so the next mean is sharper. Sampling is nothing else.

def make_alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """ᾱₜ, the product of all α = 1−β up to t, for t = 0 ... T−1: [T], float64, always on the CPU
    (`load` builds the rest where there are no numbers).

    Careful, it is √β that grows linearly, not β (diffusers: "scaled_linear"; the original calls it
    just "linear"), or every level but the first would be noisier (CompVis util.py:22).

    CompVis is the original code, github.com/CompVis/stable-diffusion at 21f890f. Its util.py is
    always the one in ldm/modules/diffusionmodules; the other files are somewhere in ldm/.
    """
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps,
                           dtype=torch.float64, device="cpu")
    return torch.cumprod(1 - roots**2, dim=0)


# The answer. xₜ is known, and xₜ = √ᾱₜ x₀ + √(1−ᾱₜ) ε, so whoever guesses one of the two guesses
# the other. Four ways to say the same guess:
#
#     ε       the noise: what Stable Diffusion 1.x predicts
#     x₀      = (xₜ − √(1−ᾱₜ) ε) / √ᾱₜ            the clean latents
#     v       = √ᾱₜ ε − √(1−ᾱₜ) x₀               (Salimans & Ho 2022, arXiv:2202.00512)
#     score   = −E[ε | xₜ] / √(1−ᾱₜ) = ∇ log p(xₜ)  the direction in which xₜ gets likelier
#                                                (Song et al. 2021, arXiv:2011.13456)
#
# (E[ε | xₜ] is the mean of all the ε that are possible with this xₜ.)
#
# Why is the score there? p(xₜ) says how likely xₜ is among all noisy pictures of this t. With only
# one x₀, log p(xₜ) is −|xₜ − √ᾱₜ x₀|² / (2 (1−ᾱₜ)) plus a constant: its gradient is −ε / √(1−ᾱₜ).
# With many x₀ it is the mean of their gradients, each weighted by how probable that x₀ is given xₜ:
# so ε becomes its mean, E[ε | xₜ].
#
# Why v? Write √ᾱₜ = cos φ and √(1−ᾱₜ) = sin φ: then xₜ = cos φ · x₀ + sin φ · ε turns from x₀ to ε
# like the hand of a clock, and v = cos φ · ε − sin φ · x₀ is the direction in which it moves as φ
# grows. Where there is little noise that is ε, which xₜ hardly shows, and where there is much, −x₀,
# which it hardly shows either. So v is never trivial to guess, as ε is at t = 999, where xₜ is
# hardly anything else.
#
# In all functions below alpha_bar is a number, or a tensor that broadcasts.

def add_noise(x0: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """xₜ = √ᾱₜ x₀ + √(1−ᾱₜ) ε.  x0 and eps [B, ...]."""
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps


def v_target(x0: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """v = √ᾱₜ ε − √(1−ᾱₜ) x₀."""
    return alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * x0


def x0_from_eps(xt: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """x₀ = (xₜ − √(1−ᾱₜ) ε) / √ᾱₜ."""
    return (xt - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def eps_from_v(xt: Tensor, v: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """ε = √ᾱₜ v + √(1−ᾱₜ) xₜ.  (Put in the definitions of v and xₜ: the x₀ cancel.)"""
    return alpha_bar**0.5 * v + (1 - alpha_bar) ** 0.5 * xt


def score_from_eps(eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """∇ log p(xₜ) = −ε / √(1−ᾱₜ), where eps is the mean that the network guesses."""
    return -eps / (1 - alpha_bar) ** 0.5


# The loss. This is all of the training: mix in noise, guess, compare.

def diffusion_loss(unet: nn.Module, x0: Tensor, context: Tensor, alphas_cumprod: Tensor,
                   prediction: str = "eps", *, t: Tensor | None = None, eps: Tensor | None = None,
                   generator: torch.Generator | None = None) -> Tensor:
    """The mean squared error of a guess (Ho et al. 2020, algorithm 1): a scalar.

    unet: any network(xt, t, context) -> like xt. x0 [B, C, h, w], float32: clean latents, scaled.
    context [B, L, D]. alphas_cumprod [T]. prediction: what the network is asked for, "eps" or "v".
    t [B], integers, and eps, like x0: drawn here unless the caller passes them, t uniform, eps
    normal (on the CPU, from the generator if one is given).
    """
    if t is None:
        t = torch.randint(len(alphas_cumprod), (len(x0),), generator=generator)
    if eps is None:
        eps = torch.randn(x0.shape, generator=generator)
    t, eps = t.to(x0.device), eps.to(x0)
    alpha_bar = alphas_cumprod.to(x0)[t].view(-1, 1, 1, 1)        # [B, 1, 1, 1]
    xt = add_noise(x0, eps, alpha_bar)
    target = eps
    if prediction == "v":
        target = v_target(x0, eps, alpha_bar)
    guess = unet(xt, t, context)
    return F.mse_loss(guess, target)


# (With "v" an error counts 1/ᾱₜ times as much. If the guess of ε is wrong by δ, the x₀ that goes
# with it is wrong by −√(1−ᾱₜ)/√ᾱₜ δ, so v = √ᾱₜ ε − √(1−ᾱₜ) x₀ is wrong by (√ᾱₜ + (1−ᾱₜ)/√ᾱₜ) δ =
# δ/√ᾱₜ; the loss squares it. So noisy xₜ count for more, and there the layout of a picture is
# decided.)
#
# A sampler. Section 7 has more, and all follow the same pattern: with the network's guess of the ε
# in x, one step takes x from noise level ᾱ to a level ᾱ′ with less noise (careful, less noise is a
# larger ᾱ: ᾱ′ > ᾱ).

def ddim(x: Tensor, eps: Tensor, a: float, a_next: float, *, eta: float = 0.0,
         noise: Callable[[], Tensor] | None = None, **_) -> Tensor:
    """Denoising diffusion implicit models (Song et al. 2020, arXiv:2010.02502, equations 12 and 16;
    careful, their α is our ᾱ).

    Jump to the guess of x₀, then back to the next noise level along the same ε. Nothing requires
    ᾱ′ to be the very next timestep's: the path is smooth, so a few dozen jumps are enough. x, eps
    [B, C, h, w]; a and a_next are ᾱ and ᾱ′. With eta = 0 nothing is random: the same start gives
    the same picture. With eta > 0 a part of the noise, of variance σ̂² (the paper's σₜ², not the σₜ
    above), is replaced by fresh noise, drawn by noise(); since the whole must have variance 1 − ᾱ′,
    1 − ᾱ′ − σ̂² is left for the old. At eta = 1 this is DDPM, the noising chain run backwards
    (section 7). The same network serves for both: its loss only ever saw xₜ, never a chain. Section
    7's `sample` calls it, step by step; **_ takes what only other samplers need.
    """
    x0 = x0_from_eps(x, eps, a)
    # η times the spread of a DDPM step: noising from ᾱ′ to ᾱ adds β = 1 − ᾱ/ᾱ′, of which the part
    # (1−ᾱ′)/(1−ᾱ) stays unknown when x and x₀ are known (`ddpm` in section 7)
    sigma_fresh = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
    # x′ = √ᾱ′ x₀ + √(1 − ᾱ′ − σ̂²) ε + σ̂ · noise
    x_next = a_next**0.5 * x0 + (1 - a_next - sigma_fresh**2) ** 0.5 * eps
    if eta > 0:
        x_next = x_next + sigma_fresh * noise()
    return x_next


# Guidance. So far the prompt is just one more input, and a network can get away with hardly looking
# at it. By Bayes' rule p(prompt | x) = p(x | prompt) p(prompt) / p(x), where p(prompt) does not
# depend on x and has no gradient. So what the prompt adds to the score is a difference,
#
#     ∇ log p(prompt | x) = ∇ log p(x | prompt) − ∇ log p(x)
#
# To follow this difference s times as far as the network would by itself, note that ε is the score
# up to a factor. So
#
#     ε = ε_∅ + s · (ε_c − ε_∅)        ε_∅ without the prompt, ε_c with it

def guide(eps_without: Tensor, eps_with: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598; careful, their w is s − 1).

    Both guesses come from one network, which in training was now and then given an empty prompt
    (section 9). scale 1 is the network's own guess; more follows the prompt more closely, at the
    price of variety and, in the end, of natural colours. v may be given in place of ε (for the same
    xₜ it is ε times a constant, plus a constant). If what stands in for "without" is another
    prompt, a negative prompt, the picture is pushed away from it.
    """
    return eps_without + scale * (eps_with - eps_without)


# That is all. From here on: a network good enough to guess (3 to 6), and better walks (7).

# %% Look: alpha bar from clean to noise
if STEPPING:
    print(make_alphas_cumprod(SD1.schedule)[::333])


# %% 3. Blocks
# --------------------------------------------------------------------------------------------------
# Bricks that several networks share. Notebook 4 takes the U-Net apart into them.
#
#                        U-Net                       VAE                 text encoder
#     ResBlock           everywhere                  everywhere          -
#     Attention          most levels, the middle     the middle          every layer
#     Downsample         between levels              encoder             -
#     Upsample           between levels              decoder             -
#
# Pictures travel as [B, C, H, W], sequences as [B, N, C], text as [B, L, D]. What differs between
# the networks is an argument, above all the norms' epsilons and the paddings. A wrong one is hard
# to see: the picture gets a little worse, and nothing says why.
#
# Two ideas make networks this deep trainable at all. Residuals: a block adds to its input instead
# of replacing it, so gradients find a way past it (He et al. 2015, arXiv:1512.03385). Norms: a
# block first brings its input to mean 0 and variance 1, so the input's scale does not matter.
# GroupNorm does so for each picture and each group of its channels (Wu & He 2018,
# arXiv:1803.08494).

def zero_module(module: nn.Module) -> nn.Module:
    """Fills a layer with zeros and returns it. A residual branch that ends in zeros adds nothing at
    first, which makes early training stable (Zhang et al. 2019, arXiv:1901.09321)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual: [B, C, H, W] -> [B, C', H, W].

        x ── norm, SiLU, conv1 ──(+)── norm, SiLU, conv2 ──(+)──>
        |                         |                         |
        |              timestep's vector, one               |
        |              number per channel                   |
        +── skip: a 1x1 convolution if C' is not C ─────────+

    emb_dim: E, the width of the timestep's vector (section 6); None in the VAE, which knows no
    time. Careful, eps is no noise here, but what a norm adds to the variance before it divides:
    1e-5 in the U-Net, 1e-6 in the VAE (CompVis util.py:205, model.py:38).
    """

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int,
                 emb_dim: int | None = None, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if emb_dim is not None:
            self.emb_proj = nn.Linear(emb_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps)
        self.conv2 = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity()
        if in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], emb [B, E] -> [B, C', H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))                     # [B, C', H, W]
        if emb is not None:
            # Careful, SiLU again, although the embedding's own layers have one
            h = h + self.emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v in several heads (Vaswani et al. 2017, arXiv:1706.03762).

    Each position of x asks a question q; each position of the context has a key k, which says what
    it has to offer, and a value v, which is what it gives. The better a key fits the question, the
    more of its value goes into the answer. Without a context x answers itself (self-attention).
    causal: position i sees only 0 ... i (the text encoder).
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None,
                 qkv_bias: bool = False, causal: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        context_dim = context_dim or dim
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, N, C], context [B, L, D] -> [B, N, C]. At 64 x 64: N = 4096, C = 320, L = 77."""
        if context is None:
            context = x
        q = self.split_heads(self.to_q(x))                        # [B, heads, N, d]   8, 4096, 40
        k = self.split_heads(self.to_k(context))                  # [B, heads, L, d]   8, 77, 40
        v = self.split_heads(self.to_v(context))                  # [B, heads, L, d]
        y = self.attend(q, k, v)                                  # [B, heads, N, d]
        y = y.transpose(1, 2).flatten(2)                          # [B, N, C]
        return self.to_out(y)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, N, heads·d] -> [B, heads, N, d]: each head works on its own part of the width."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The formula. PyTorch's fused kernels compute it without ever holding all of
        softmax(q kᵀ / √d), [B, heads, N, L], in memory."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class Downsample(nn.Module):
    """Halves H and W: a 3x3 convolution with stride 2.

    Careful, two paddings: the U-Net pads 1 on all sides, the VAE's encoder 1 at the right and the
    bottom only. The wrong one shifts everything by one pixel of the larger picture (CompVis
    model.py:66, openaimodel.py:143).
    """

    def __init__(self, channels: int, symmetric: bool):
        super().__init__()
        self.padding = (1, 1, 1, 1) if symmetric else (0, 1, 0, 1)    # left, right, top, bottom
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Doubles H and W: each pixel becomes four, then a 3x3 convolution smooths."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# %% Look: what is in a ResBlock
if STEPPING:
    print(ResBlock(320, 640, norm_groups=32, eps=1e-5, emb_dim=1280))


# %% 4. VAE
# --------------------------------------------------------------------------------------------------
# A variational autoencoder (Kingma & Welling 2013, arXiv:1312.6114): the encoder turns a picture
# [B, 3, H, W] in [−1, 1] into latents [B, 4, H/8, W/8], the decoder turns latents into a picture.
# Most bits of a photograph are fine texture. The VAE takes care of these, so that the diffusion
# model can spend its effort on what is in the picture and where. Notebook 2 plays with this.
#
# "Variational": the encoder does not name a point but a little cloud, a Gaussian with a mean and a
# variance for each number; training decodes a random point of it, so points close to each other
# have to decode to nearly the same picture. The loss that trains it is in section 9.

class AttnBlock(nn.Module):
    """Self-attention with one head over all positions of a picture, with norm and residual:
    [B, C, h, w] -> the same."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.attention = Attention(channels, num_heads=1, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)          # [B, h·w, C]
        tokens = self.attention(tokens)
        return x + tokens.transpose(1, 2).reshape(b, c, h, w)


def mid_block(channels: int, norm_groups: int) -> list[nn.Module]:
    """The coarsest level of encoder and decoder, where all positions can see each other."""
    return [ResBlock(channels, channels, norm_groups),
            AttnBlock(channels, norm_groups),
            ResBlock(channels, channels, norm_groups)]


class Encoder(nn.Sequential):
    """image [B, 3, H, W] -> [B, 8, H/8, W/8], of which the VAE's quant_conv makes a mean and a
    log-variance for each of the 4 latent channels. Layers in a row; in SD 1.x, from level to level:

        [B, 128, 512, 512] -> [B, 256, 256, 256] -> [B, 512, 128, 128] -> [B, 512, 64, 64]
    """

    def __init__(self, c: VAEConfig):
        channels = c.channels
        layers = [nn.Conv2d(3, channels, 3, padding=1)]
        for level, mult in enumerate(c.channel_mult):
            if level > 0:
                layers.append(Downsample(channels, symmetric=False))
            width = c.channels * mult
            for _ in range(c.num_res_blocks):
                layers.append(ResBlock(channels, width, c.norm_groups))
                channels = width
        layers += mid_block(channels, c.norm_groups)
        layers += [nn.GroupNorm(c.norm_groups, channels, eps=1e-6), nn.SiLU(),
                   nn.Conv2d(channels, 2 * c.latent_channels, 3, padding=1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """latents [B, 4, h, w] -> image [B, 3, 8h, 8w]: the encoder mirrored, with one ResBlock more
    per level. In SD 1.x, from 64 x 64 latents:

        [B, 512, 64, 64] -> [B, 512, 128, 128] -> [B, 256, 256, 256] -> [B, 128, 512, 512]
    """

    def __init__(self, c: VAEConfig):
        channels = c.channels * c.channel_mult[-1]
        layers = [nn.Conv2d(c.latent_channels, channels, 3, padding=1)]
        layers += mid_block(channels, c.norm_groups)
        for level, mult in enumerate(reversed(c.channel_mult)):
            if level > 0:
                layers.append(Upsample(channels))
            width = c.channels * mult
            for _ in range(c.num_res_blocks + 1):
                layers.append(ResBlock(channels, width, c.norm_groups))
                channels = width
        layers += [nn.GroupNorm(c.norm_groups, channels, eps=1e-6), nn.SiLU(),
                   nn.Conv2d(channels, 3, 3, padding=1)]
        super().__init__(*layers)


class VAE(nn.Module):
    """Encoder and decoder, with a 1x1 convolution on either side of the latents. (These are called
    "quant" since the paper's other autoencoder quantises there.)

    Its latents z are not scaled: x₀ = scale_factor · z, which LatentDiffusion sees to.
    """

    def __init__(self, c: VAEConfig):
        super().__init__()
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, 3, H, W] in [−1, 1] -> (mean, logvar) of the cloud, each [B, 4, H/8, W/8].
        logvar is log σ²; clamped, so that σ stays between 3e-7 and 2e4 and exp can't overflow."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """z [B, 4, h, w], not scaled -> image [B, 3, 8h, 8w], in [−1, 1] but for small
        overshoots."""
        return self.decoder(self.post_quant_conv(z))


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A point of the cloud (of the "posterior"), z = mean + σ · noise. Written so, the randomness
    comes from outside and gradients reach mean and σ (the "reparametrisation trick"). All
    [B, 4, h, w]."""
    return mean + torch.exp(0.5 * logvar) * noise


# %% Look: 64 x 64 pixels become 8 x 8 latents
if STEPPING:
    print(VAE(SHAPES.vae).encode(torch.zeros(1, 3, 64, 64))[0].shape)


# %% 5. Text
# --------------------------------------------------------------------------------------------------
# A prompt becomes vectors in two steps. Notebook 3 plays with both.
#
#     "A red ring"  ->  BOS  a  red  ring  EOS  EOS ...  ->  ids [B, L]  ->  context [B, L, D]
#
# (BOS and EOS are two special tokens, for the beginning and the end; more EOS fill up to L.)
#
# The tokenizer cuts the prompt into pieces and numbers them. Byte pair encoding (Sennrich et al.
# 2016, arXiv:1508.07909) learns the pieces: begin with single letters, then again and again merge
# the two pieces that most often stand side by side. Of "low low lower" it makes
#
#     l o w</w>  l o w</w>  l o w e r</w>       </w> marks the end of a word
#     lo w</w>   lo w</w>   lo w e r</w>        l + o: three times
#     low</w>    low</w>    lo w e r</w>        lo + w</w>: twice
#
# so frequent words end up as one piece, rare ones as several. The single letters are in truth
# bytes. CLIP has all 256 twice, inside a word and at its end. A tokenizer trained here has the 256
# and, at the end of a word, only those that end one in its captions; any other end becomes EOS.
#
# The text encoder turns each number into a vector that knows the words before it. Stable Diffusion
# takes the text half of CLIP (Radford et al. 2021, arXiv:2103.00020), which was trained on 400
# million pictures with captions to give a picture and its caption similar vectors: so its vectors
# already say what things look like. It stays frozen while the U-Net learns to read them. The
# built-in model has a world of some fifty words, and trains its small text encoder together with
# the U-Net.

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


class Tokenizer:
    """Prompts to ids [B, L]: BOS, up to L − 2 pieces, EOS, and padding.

    Careful: Stable Diffusion 1.x pads with EOS, and the U-Net sees the padding like any word;
    OpenAI's own CLIP and OpenCLIP pad with 0. The cutting is done by a tokenizer of the
    `tokenizers` library. CLIP's and that of a new model differ in their tables only.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int, pad_id: int | None = None):
        self.backend = backend
        self.max_length = max_length
        self.bos = backend.token_to_id(BOS)
        self.eos = backend.token_to_id(EOS)
        self.pad_id = self.eos if pad_id is None else pad_id

    def __call__(self, prompts: str | list[str]) -> Tensor:
        """["a prompt", ...] -> LongTensor [B, L]. What does not fit is cut off."""
        if isinstance(prompts, str):
            prompts = [prompts]
        ids = torch.full((len(prompts), self.max_length), self.pad_id)
        for row, prompt in zip(ids, prompts):
            pieces = self.backend.encode(prompt).ids[: self.max_length - 2]
            row[: len(pieces) + 2] = torch.tensor([self.bos, *pieces, self.eos])
        return ids

    @staticmethod
    def train(captions: list[str], vocab_size: int, max_length: int) -> "Tokenizer":
        """A new tokenizer, by CLIP's recipe, learned from captions: at most vocab_size pieces, BOS,
        EOS and the single letters included (all of which stay, however small it is)."""
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[BOS, EOS], end_of_word_suffix="</w>",
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        backend = clip_backend({}, [])
        backend.train_from_iterator(captions, trainer)
        merges = json.loads(backend.to_str())["model"]["merges"]
        # The library numbers the letters at a word's end at random; sorted, the same pieces get the
        # same numbers. (Which of two equally frequent pairs it merges first may still be chance)
        pieces = sorted(backend.get_vocab())
        vocab = {piece: number for number, piece in enumerate(pieces)}
        return Tokenizer(clip_backend(vocab, merges), max_length)


def clip_backend(vocab: dict[str, int], merges: list[list[str]]) -> tokenizers.Tokenizer:
    """CLIP's recipe with these tables: vocab is piece -> id, merges the pairs in the order in which
    they are merged (OpenAI's CLIP, simple_tokenizer.py, but for its repair of broken text)."""
    merges = [tuple(pair) for pair in merges]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=EOS))
    # One way to write each letter (NFC), runs of white space as one space, lower case
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d"      # English endings
                  r"|[\p{L}]+"                    # or a run of letters, of any alphabet
                  r"|[\p{N}]"                     # or one digit
                  r"|[^\s\p{L}\p{N}]+")           # or a run of punctuation
    # Split keeps what matches and removes the rest. Then bytes, not letters, are merged, so that
    # every alphabet works; each byte is written as a letter
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if vocab:
        # The special pieces (a trainer adds them itself). As in transformers' CLIP, BOS is looked
        # for in the lower-cased prompt, and EOS in the prompt as it was written
        backend.add_special_tokens([tokenizers.AddedToken(BOS, normalized=True), EOS])
    return backend


class TextLayer(nn.Module):
    """One layer of CLIP's transformer: [B, L, D] -> the same."""

    def __init__(self, width: int, num_heads: int, activation: str):
        super().__init__()
        self.activation = activation
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, qkv_bias=True, causal=True)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))     # each gathers from the words before it
        h = self.fc1(self.norm2(x))               # then each one thinks by itself
        # Careful, "quick GELU": CLIP was trained with this approximation, OpenCLIP with GELU
        if self.activation == "quick_gelu":
            h = h * torch.sigmoid(1.702 * h)
        else:
            h = F.gelu(h)
        return x + self.fc2(h)


class TextEncoder(nn.Module):
    """ids [B, L] -> context [B, L, D]: all positions, padding included, of the last layer, after
    the final norm; or of the layer before it, or without the norm, as the config says."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.config = c
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.position_embedding = nn.Embedding(c.max_length, c.width)
        self.layers = nn.Sequential()
        for _ in range(c.num_layers):
            self.layers.append(TextLayer(c.width, c.num_heads, c.activation))
        self.final_norm = nn.LayerNorm(c.width)
        if c.pooled_dim is not None:
            self.projection = nn.Linear(c.width, c.pooled_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        context, _ = self.context_and_last(ids)
        return context

    def context_and_last(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The context, and what comes out of the last layer, [B, L, D] each."""
        length = ids.shape[1]
        x = self.token_embedding(ids)                             # [B, L, D]   what
        x = x + self.position_embedding.weight[:length]           # + [L, D]    where
        before = self.layers[:-1](x)
        last = self.layers[-1](before)
        context = before if self.config.penultimate else last
        if self.config.final_norm:
            context = self.final_norm(context)
        return context, last

    def pooled(self, last: Tensor, ids: Tensor, eos: int) -> Tensor:
        """The prompt as one vector [B, 1280]: what CLIP compares with pictures. It is read at the
        first EOS, the one place that has seen all words and their end, and no padding."""
        first_eos = (ids == eos).int().argmax(dim=1)              # [B]
        return self.projection(self.final_norm(last)[torch.arange(len(ids)), first_eos])


# %% Look: a tokenizer learns
if STEPPING:
    tokenizer = Tokenizer.train(["low low lower"], vocab_size=520, max_length=8)
    print(tokenizer.backend.encode("lower low slow").tokens)


# %% 6. U-Net
# --------------------------------------------------------------------------------------------------
# The network that sees noisy latents and guesses the noise (or v). Going down it halves the
# resolution, and each place sees more and more of the picture; going up it doubles it again, and
# every block is handed what the way down knew at that resolution, a skip. (Each resolution has
# three: from two blocks, and from what led to them, a Downsample or the first convolution.) Stable
# Diffusion 1.x:
#
#     latents [B, 4, 64, 64]                                     guess [B, 4, 64, 64]
#          |                                                          ^
#     64 x 64    320 wide  ---------------- 3 skips -------------->  3 blocks
#          | Downsample                                               ^ Upsample
#     32 x 32    640 wide  ---------------- 3 skips -------------->  3 blocks
#          | Downsample                                               ^ Upsample
#     16 x 16   1280 wide  ---------------- 3 skips -------------->  3 blocks
#          | Downsample                                               ^ Upsample
#      8 x 8    1280 wide  ---------------- 3 skips -------------->  3 blocks
#          |                                                          ^
#          +------------------------- middle ------------------------+
#
# Two things steer it. The timestep is added in every ResBlock: how much of this is noise? The
# prompt is looked up by cross-attention: each position of the picture asks, the words answer. The U
# shape is from Ronneberger et al. 2015 (arXiv:1505.04597), attention in it from Ho et al. 2020,
# attention to the words from Rombach et al. 2022. Notebook 4 looks inside.

def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t [B], int or float -> [B, dim]: cosines and sines of t · 10000^(−i/half), i = 0 ... half−1.

    Why waves? They are like the hands of a clock: the fast ones tell neighbours apart, the slow
    ones say roughly when it is, and nearby times look alike. Frequencies go from 1 to nearly
    1/10000. Careful, all cosines, then all sines (CompVis util.py:166); DDPM's code has the sines
    first, and the transformer paper alternates them.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    frequencies = torch.exp(-math.log(10000) * exponents)         # [half]
    angles = t.float()[:, None] * frequencies                     # [B, half]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020, arXiv:2002.05202): value · gelu(gate), so that one half of the layer
    decides how much of the other half passes. 4 times as wide inside, twice for value and gate."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * 4 * dim)
        self.proj_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)            # [B, N, 4·C] each
        return self.proj_out(value * F.gelu(gate))                # the exact GELU, not by tanh


class TransformerBlock(nn.Module):
    """Every position looks at every other one, then at the words, then goes through a small MLP by
    itself (CompVis: BasicTransformerBlock). x [B, N, C], context [B, L, D] -> like x."""

    def __init__(self, channels: int, num_heads: int, context_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks on a picture: its positions are laid out as a sequence and afterwards put
    back, with a residual around it all. x [B, C, h, w], context [B, L, D] -> like x.

    Careful, the norm has eps 1e-6 here, unlike that of the ResBlocks (CompVis attention.py:76).
    proj_in and proj_out are 1x1 convolutions in SD 1.x; on a sequence that is a Linear.
    """

    def __init__(self, channels: int, num_heads: int, context_dim: int, depth: int,
                 norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(TransformerBlock(channels, num_heads, context_dim))
        self.proj_out = zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)          # [B, h·w, C]
        tokens = self.proj_in(tokens)
        for block in self.blocks:
            tokens = block(tokens, context)
        tokens = self.proj_out(tokens)
        return x + tokens.transpose(1, 2).reshape(b, c, h, w)


class UNetBlock(nn.ModuleList):
    """Layers one after the other, each of which gets what it needs."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def embedding_layers(in_dim: int, emb_dim: int) -> nn.Sequential:
    """What makes one vector [B, E] of what all blocks are told."""
    return nn.Sequential(nn.Linear(in_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))


def unet_layers(c: UNetConfig, context_dim: int, in_channels: int, out_channels: int,
                depth: int) -> list[nn.Module]:
    """A ResBlock and, where depth is not 0, a SpatialTransformer after it."""
    layers = [ResBlock(in_channels, out_channels, c.norm_groups, 4 * c.channels, eps=1e-5)]
    if depth > 0:
        num_heads = out_channels // c.head_dim if c.head_dim else c.num_heads
        layers.append(SpatialTransformer(out_channels, num_heads, context_dim, depth,
                                         c.norm_groups))
    return layers


class UNet(nn.Module):
    """x [B, C, h, w] noisy latents, t [B] int or float, context [B, L, D] -> the guess [B, 4, h,
    w]. vector [B, 2816]: what Stable Diffusion XL is told besides (`LatentDiffusion.added_vector`).

    Three lists of blocks, as in the original. R ResBlock, A SpatialTransformer (SD 1.x):

        down_blocks                          up_blocks
         0   conv_in     320   64 x 64       11   R A   320   64 x 64
         1   R A         320   64 x 64       10   R A   320   64 x 64
         2   R A         320   64 x 64        9   R A   320   64 x 64
         3   Downsample  320   32 x 32        8   R A   640   32 x 32, then Upsample
         4   R A         640   32 x 32        7   R A   640   32 x 32
         5   R A         640   32 x 32        6   R A   640   32 x 32
         6   Downsample  640   16 x 16        5   R A  1280   16 x 16, then Upsample
         7   R A        1280   16 x 16        4   R A  1280   16 x 16
         8   R A        1280   16 x 16        3   R A  1280   16 x 16
         9   Downsample 1280    8 x 8         2   R    1280    8 x 8, then Upsample
        10   R          1280    8 x 8         1   R    1280    8 x 8
        11   R          1280    8 x 8         0   R    1280    8 x 8
                          mid_block   R A R  1280    8 x 8

    The left column runs down, the right one up; widths are those of the outputs. Each row is a
    skip: the output of the block on the left goes into the one on the right, next to its own input
    (openaimodel.py:736; there input_blocks, middle_block, output_blocks).
    """

    def __init__(self, c: UNetConfig, context_dim: int):
        super().__init__()
        layers = partial(unet_layers, c, context_dim)
        widths = [c.channels * mult for mult in c.channel_mult]
        emb_dim = 4 * c.channels                                  # E
        self.channels = c.channels
        self.time_embedding = embedding_layers(c.channels, emb_dim)
        if c.vector_dim is not None:
            self.vector_embedding = embedding_layers(c.vector_dim, emb_dim)
        channels = c.channels
        conv_in = nn.Conv2d(c.in_channels, channels, 3, padding=1)
        self.down_blocks = nn.ModuleList([UNetBlock([conv_in])])
        skips = [channels]                                        # how wide each skip is
        for level, width in enumerate(widths):
            if level > 0:
                self.down_blocks.append(UNetBlock([Downsample(channels, symmetric=True)]))
                skips.append(channels)
            for _ in range(c.num_res_blocks):
                block = layers(channels, width, c.transformer_depth[level])
                self.down_blocks.append(UNetBlock(block))
                channels = width
                skips.append(channels)

        middle = layers(channels, channels, depth=max(c.transformer_depth))
        self.mid_block = UNetBlock(middle + layers(channels, channels, depth=0))

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(c.num_res_blocks + 1):
                block = layers(channels + skips.pop(), widths[level], c.transformer_depth[level])
                self.up_blocks.append(UNetBlock(block))
                channels = widths[level]
            if level > 0:
                self.up_blocks[-1].append(Upsample(channels))

        self.norm_out = nn.GroupNorm(c.norm_groups, channels, eps=1e-5)
        self.conv_out = zero_module(nn.Conv2d(channels, c.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor,
                vector: Tensor | None = None) -> Tensor:
        waves = timestep_embedding(t, self.channels)              # [B, 320]
        emb = self.time_embedding(waves.to(x.dtype))              # [B, E]   E = 1280
        if vector is not None:
            emb = emb + self.vector_embedding(vector)
        h = x                                                     # [B, 4, 64, 64]
        skips = []
        for block in self.down_blocks:
            h = block(h, emb, context)                            # at first [B, 320, 64, 64]
            skips.append(h)
        h = self.mid_block(h, emb, context)                       # [B, 1280, 8, 8]
        for block in self.up_blocks:
            h = torch.cat([h, skips.pop()], dim=1)                # careful, h first
            h = block(h, emb, context)
        return self.conv_out(F.silu(self.norm_out(h)))            # [B, 4, 64, 64]


# %% Look: how many parameters ("meta": shapes without memory)
if STEPPING:
    with torch.device("meta"):
        unet = UNet(SD1.unet, SD1.context_dim)
    print(sum(p.numel() for p in unet.parameters()))


# %% 7. Samplers
# --------------------------------------------------------------------------------------------------
# A sampler walks from noise to a picture. A network call says in which direction the noise lies;
# the sampler decides how far to follow it before it asks again. Notebook 5 tries them out;
# notebook 1 derives `ddpm` and `langevin`.
#
# First the noise levels to stop at: `Levels`. Then a step function that goes from one to the next,
# x_next = step(x, eps, a, a_next, ...), of which `ddim` in section 2 was the first. All take
#
#     x, eps        [B, C, h, w], float32: the latents, and the network's guess of the noise in them
#     a, a_next     ᾱ and ᾱ′: the noise level of x, and the one to go to. ᾱ grows as noise falls
#     t             the timestep of x
#     eta           how much fresh noise is added, where the sampler leaves that open (ddim)
#     noise         () -> fresh standard normal noise like x
#     past          the last three steps, a `Step` each (below), the latest last
#     look_ahead    x -> the network's guess for x at ᾱ′ (`plms` asks); None in the last step
#
# and name those that they use. One loop, `sample`, runs them all.
#
# Half of the papers count noise in another way. They never shrink the picture:
#
#     x̃ = x / √ᾱ = x₀ + σ ε,   with σ = √((1−ᾱ)/ᾱ) from 14.6 down to 0.03
#
# It is the same noise on another scale.

class Levels(NamedTuple):
    timesteps: list[float]        # [S]: what the network is told
    alpha_bars: list[float]       # [S + 1]: step i goes from alpha_bars[i] to alpha_bars[i + 1]


@dataclass
class Step:
    """What happened in one step of a walk."""
    index: int                    # 0 ... S−1
    t: float                      # the timestep at which it began
    x: Tensor                     # the latents after it, [B, C, h, w]
    eps: Tensor                   # the guess of the noise at its beginning
    x0: Tensor                    # the guess of the clean latents at its beginning
    alpha_bar: float = 1.0        # the noise level at which it began


def sample(step: Callable[..., Tensor], predict_eps: Callable[..., Tensor], x: Tensor,
           levels: Levels, noise: Callable[[], Tensor], eta: float = 0.0) -> Iterator[Step]:
    """The loop: asks the network and takes a step, S times.

    predict_eps: (x, t, alpha_bar) -> ε, the network, with guidance already in it. x: latents at the
    first noise level. Yields every step. The caller may replace `step.x`: the next step begins
    there.
    """
    past = []
    for i, t in enumerate(levels.timesteps):
        a, a_next = levels.alpha_bars[i : i + 2]
        eps = predict_eps(x, t, a)
        look_ahead = None
        if i + 1 < len(levels.timesteps):
            look_ahead = partial(predict_eps, t=levels.timesteps[i + 1], alpha_bar=a_next)
        x_next = step(x, eps, a, a_next, t=t, eta=eta, noise=noise, past=past,
                      look_ahead=look_ahead)
        taken = Step(i, t, x_next, eps, x0_from_eps(x, eps, a), a)
        past = [*past[-2:], taken]
        yield taken
        x = taken.x                                               # perhaps changed by the caller


# Which noise levels to stop at. All take the number of steps and σ of every timestep, [T].

def sigma_of(alpha_bar: float | np.ndarray) -> float | np.ndarray:
    """σ = √((1−ᾱ)/ᾱ)."""
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def levels_of(timesteps: np.ndarray, sigmas: np.ndarray, last_sigma: float = 0.0) -> Levels:
    """Levels at these σ [S], and then at last_sigma. ᾱ = 1/(1 + σ²)."""
    alpha_bars = 1 / (1 + np.append(sigmas, last_sigma) ** 2)
    return Levels(timesteps.tolist(), alpha_bars.tolist())


def leading(steps: int, sigmas: np.ndarray) -> Levels:
    """t = 981, 961 ... 21, 1 for S = 50: DDPM, DDIM and PLMS (diffusers "leading", offset 1).

    Careful, the last step goes to ᾱ₀ = 0.99915, not to 1 (CompVis util.py:66). With S = 1000 the
    first one would begin at t = 1000, which does not exist: it goes from 999 to 999, and changes
    nothing. And where S is small, or rounding 1000/S down loses much, the first one begins low, at
    t = 1 for S = 1, at 801 for 5, at 501 for 501, where the network expects less noise than there
    is: take `trailing`.
    """
    stride = len(sigmas) // steps
    timesteps = np.arange(steps)[::-1] * stride + 1
    timesteps = timesteps.clip(max=len(sigmas) - 1)
    return levels_of(timesteps, sigmas[timesteps], last_sigma=sigmas[0])


def leading_to_zero(steps: int, sigmas: np.ndarray) -> Levels:
    """The same timesteps, but the last step goes to σ = 0: Euler for Stable Diffusion XL."""
    levels = leading(steps, sigmas)
    levels.alpha_bars[-1] = 1.0
    return levels


def trailing(steps: int, sigmas: np.ndarray) -> Levels:
    """t = 999, 749, 499, 249 for S = 4: the first step begins where there is most noise. With few
    steps that counts, so Turbo takes them, a model that was trained to need no more than four
    (Sauer et al. 2023, arXiv:2311.17042)."""
    stops = np.linspace(len(sigmas), 0, steps, endpoint=False)
    timesteps = stops.round().astype(int) - 1
    return levels_of(timesteps, sigmas[timesteps])


def lcm_timesteps(steps: int, sigmas: np.ndarray) -> Levels:
    """t = 999, 759, 499, 259 for S = 4: evenly chosen from the 50 timesteps 999, 979 ... 19 that
    latent consistency models are trained at. S is at most 50."""
    chosen = 50 - np.arange(steps) * 50 // steps                  # of 50, 49 ... 1
    timesteps = chosen * (len(sigmas) // 50) - 1
    return levels_of(timesteps, sigmas[timesteps])


def linspace(steps: int, sigmas: np.ndarray) -> Levels:
    """From t = 999 to 0 in even steps, which may fall between whole numbers: Euler. σ is
    interpolated, as in diffusers' "linspace" (k-diffusion, Katherine Crowson's samplers,
    interpolates log σ)."""
    timesteps = np.linspace(len(sigmas) - 1, 0, steps)
    return levels_of(timesteps, np.interp(timesteps, np.arange(len(sigmas)), sigmas))


def linspace_rounded(steps: int, sigmas: np.ndarray) -> Levels:
    """The same, rounded to whole timesteps: DPM-Solver. Of S + 1 stops from 999 to 0 the last is
    left out: the last step goes straight to σ = 0. (S = 1000 has none to spare, and keeps t =
    0.)"""
    stops = min(steps + 1, len(sigmas))
    timesteps = np.linspace(0, len(sigmas) - 1, stops).round()[::-1]
    timesteps = timesteps[:steps].astype(int)
    return levels_of(timesteps, sigmas[timesteps])


def nearest_timesteps(targets: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """For each σ in targets the timestep whose log σ is nearest."""
    timesteps = np.interp(np.log(targets), np.log(sigmas), np.arange(len(sigmas)))
    return timesteps.round().astype(int)


def karras(steps: int, sigmas: np.ndarray, rho: float = 7.0) -> Levels:
    """σ^(1/ρ) falls evenly: short steps where there is little noise, since there the detail is made
    (Karras et al. 2022, arXiv:2206.00364, equation 5)."""
    roots = np.linspace(sigmas[-1] ** (1 / rho), sigmas[0] ** (1 / rho), steps)
    return levels_of(nearest_timesteps(roots**rho, sigmas), roots**rho)


def geometric(steps: int, sigmas: np.ndarray) -> Levels:
    """σ falls by the same factor in each step: Langevin."""
    targets = np.geomspace(sigmas[-1], sigmas[0], steps)
    return levels_of(nearest_timesteps(targets, sigmas), targets)


# How to go from one level to the next.

def ddpm(x: Tensor, eps: Tensor, a: float, a_next: float, *, noise: Callable, **_) -> Tensor:
    """Denoising diffusion probabilistic models (Ho et al. 2020): the noising chain run backwards.

    A step of ours undoes one noising step, the one from ᾱ′ to ᾱ, with β = 1 − ᾱ/ᾱ′. Let x′ be what
    x was before it. Two things tell about x′: x₀, which makes it a Gaussian around √ᾱ′ x₀, and x,
    which is a noised x′. Bayes multiplies the two (notebook 1), which gives a Gaussian again; its
    mean is a weighted sum of x₀ and x (equations 6 and 7). We don't know x₀, so we put in the
    guess, and draw. With S = T this is nearly the paper's algorithm 2; only the end differs
    (`leading` stops at ᾱ₀; the paper goes on to ᾱ = 1, and adds no noise in its last step).
    """
    x0 = x0_from_eps(x, eps, a)
    beta = 1 - a / a_next
    coefficient_x0 = a_next**0.5 * beta / (1 - a)                 # √ᾱ′ β / (1−ᾱ)
    coefficient_x = (a / a_next) ** 0.5 * (1 - a_next) / (1 - a)  # √(ᾱ/ᾱ′) (1−ᾱ′) / (1−ᾱ)
    variance = (1 - a_next) / (1 - a) * beta
    return coefficient_x0 * x0 + coefficient_x * x + variance**0.5 * noise()


def plms(x: Tensor, eps: Tensor, a: float, a_next: float, *, past: list[Step],
         look_ahead: Callable | None, **_) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022, arXiv:2202.09778): DDIM's step, along a better ε.

    ε changes on the way. Put a polynomial through its last values, at most four, as if they were
    evenly spaced, and take its mean over the next step: that gives the weights, here times a
    common factor (Adams-Bashforth). The first step has no past: it takes DDIM's step, asks the
    network there, and goes along the mean of the two ε: one network call more.
    """
    guesses = [step.eps for step in past] + [eps]                 # the latest last
    all_weights = [[1], [-1, 3], [5, -16, 23], [-9, 37, -59, 55]]
    weights = all_weights[len(past)]
    mixed = sum(weight * guess for weight, guess in zip(weights, guesses)) / sum(weights)
    if not past and look_ahead is not None:
        x_ahead = ddim(x, eps, a, a_next)
        mixed = (eps + look_ahead(x_ahead)) / 2
    return ddim(x, mixed, a, a_next)


def euler(x: Tensor, eps: Tensor, a: float, a_next: float, **_) -> Tensor:
    """Euler's method for dx̃/dσ = ε (Karras et al. 2022, algorithm 1 without its correction): since
    x̃ = x₀ + σ ε, as σ shrinks x̃ moves back along ε. With the mean of ε in its place this is the
    probability-flow equation (Song et al. 2021): no noise is added on the way, so every start has
    one path and one end, and yet at every σ the x̃ are distributed as noisy pictures are. The step
    is DDIM's in other words; the levels differ."""
    x_scaled = x / a**0.5                                         # x̃
    x_scaled = x_scaled + (sigma_of(a_next) - sigma_of(a)) * eps  # x̃′ = x̃ + (σ′ − σ) ε
    return a_next**0.5 * x_scaled


def euler_a(x: Tensor, eps: Tensor, a: float, a_next: float, *, noise: Callable, **_) -> Tensor:
    """Euler ancestral (k-diffusion): goes below the next level, to σ_down, and then adds fresh
    noise up to it: σ_down² + σ_up² = σ′². σ_up is the spread of a DDPM step, written in σ: this is
    ddim with eta = 1, as euler is ddim with eta = 0; the levels differ. Fresh noise lets later
    steps mend what earlier ones got wrong."""
    sigma, sigma_next = sigma_of(a), sigma_of(a_next)
    sigma_up = sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
    sigma_down = sigma_next**2 / sigma
    x_scaled = x0_from_eps(x, eps, a) + sigma_down * eps + sigma_up * noise()
    return a_next**0.5 * x_scaled


def dpmpp_2m(x: Tensor, eps: Tensor, a: float, a_next: float, *, past: list[Step], **_) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): DDIM's step solves the
    equation of `euler`, dx̃/dσ = ε, exactly if the guess of x₀ does not change on the way. It
    does, so it is extrapolated, from this guess and the last one, to the middle of the step; then
    20 steps are enough. Time is λ = −log σ, of which a step covers h.
    """
    x0 = x0_from_eps(x, eps, a)
    if a_next == 1:
        return x0                                                 # the last step: no noise is left
    h = math.log(sigma_of(a) / sigma_of(a_next))
    if past:
        last = past[-1]
        h_last = math.log(sigma_of(last.alpha_bar) / sigma_of(a))
        x0 = x0 + (x0 - last.x0) * (h / (2 * h_last))             # to the middle of the step
    # DDIM's step, written with x and x₀: x′ = √(1−ᾱ′)/√(1−ᾱ) x − √ᾱ′ (e⁻ʰ − 1) x₀
    kept = ((1 - a_next) / (1 - a)) ** 0.5
    return kept * x - a_next**0.5 * math.expm1(-h) * x0


def langevin(x: Tensor, eps: Tensor, a: float, a_next: float, *, noise: Callable, **_) -> Tensor:
    """Annealed Langevin dynamics (Song & Ermon 2019, arXiv:1907.05600, algorithm 1), the sampler
    of the first score models: climb along the score towards likelier pictures, shaken by fresh
    noise, while the noise level falls slowly enough for x to keep up. It takes many more steps.

    The paper has ten levels with a hundred such moves each; here every level gets one. How far a
    move goes, δ, is a fixed share of the level's variance, as there (notebook 1 has the theory:
    with a larger share fewer moves do, but too much noise stays in x).
    """
    if a_next == 1:
        return x0_from_eps(x, eps, a)
    delta = 0.7 * (1 - a)
    # x + δ/2 · score + √δ · noise, then brought to the next level's scale
    x = x + delta / 2 * score_from_eps(eps, a) + delta**0.5 * noise()
    return (a_next / a) ** 0.5 * x


def lcm(x: Tensor, eps: Tensor, a: float, a_next: float, *, t: float, noise: Callable,
        **_) -> Tensor:
    """Latent consistency models (Luo et al. 2023, arXiv:2310.04378; the idea: Song et al. 2023,
    arXiv:2303.01469), for networks trained to it.

    Every point of a path of the probability-flow equation leads to the same picture. Such a network
    was taught to name that end from wherever it stands, rather than the mean of all pictures that
    are possible there, so its first answer is already sharp. To make it better, mix fresh noise
    into it, as much as the next level has, and ask again.

    What stands at the end already is its own answer: c_skip goes to 1 and c_out to 0 as t goes to
    0. (At the timesteps in use, 19 and more, c_skip is below 1e-5: x₀ is the network's guess.)
    """
    c_skip = 0.25 / ((10 * t) ** 2 + 0.25)
    c_out = (1 - c_skip) ** 0.5
    x0 = c_skip * x + c_out * x0_from_eps(x, eps, a)
    if a_next == 1:
        return x0
    return add_noise(x0, noise(), a_next)


class Sampler(NamedTuple):
    step: Callable[..., Tensor]
    levels: Callable[[int, np.ndarray], Levels]
    # A walk begins with noise alone: ε itself, as if ᾱ were 0, or, where the original begins with
    # x̃ = σ ε, √(1−ᾱ) ε. (Euler does so, but not with `leading`.) That is a factor of 1 or 0.998,
    # which no eye can see; but with the original's choice the same noise gives its picture
    starts_at_sigma: bool = False


SAMPLERS = {
    "ddpm": Sampler(ddpm, leading),
    "ddim": Sampler(ddim, leading),
    "plms": Sampler(plms, leading),
    "euler": Sampler(euler, linspace, starts_at_sigma=True),
    "euler_a": Sampler(euler_a, linspace, starts_at_sigma=True),
    "euler_leading": Sampler(euler, leading_to_zero),
    "euler_trailing": Sampler(euler, trailing, starts_at_sigma=True),
    "euler_a_trailing": Sampler(euler_a, trailing, starts_at_sigma=True),
    "dpmpp_2m": Sampler(dpmpp_2m, linspace_rounded),
    "dpmpp_2m_karras": Sampler(dpmpp_2m, karras),
    "langevin": Sampler(langevin, geometric, starts_at_sigma=True),
    "lcm": Sampler(lcm, lcm_timesteps),
}

# %% Look: where ten steps stop
if STEPPING:
    print(leading(10, sigma_of(make_alphas_cumprod(SD1.schedule).numpy())))


# %% 8. LatentDiffusion
# --------------------------------------------------------------------------------------------------
# Everything together. `generate` makes pictures; `denoise` yields every step on the way, to look at
# or to change. Three places to start from: noise; a picture with noise in it (image to image); and
# such a picture of which a part has to stay (inpainting). Notebook 5 uses them all.

# (Cells that run in Jupyter have no file: then the weights are looked for where Jupyter runs)
HERE = Path(globals().get("__file__", "tiny_ldm.py")).resolve().parent
BUILT_IN = HERE / "weights/shapes.safetensors"


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Pictures of one size -> [B, 3, H, W] in [−1, 1], float32."""
    pixels = np.stack([image.convert("RGB") for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def to_pil(image: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [−1, 1] -> pictures, rounded to 8 bits (CompVis truncates instead)."""
    pixels = (image.float() + 1) * 127.5
    pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def draw_noise(shape: tuple[int, ...], generators: list[torch.Generator],
               device: torch.device) -> Tensor:
    """Standard normal noise [B, ...], the row of each picture from its own generator. shape: that
    of one picture, [1, ...]. Drawn on the CPU, so that a seed means the same on every device."""
    rows = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.cat(rows).to(device)


class Text(NamedTuple):
    """What the U-Net is told of prompts: vectors of the words, and of each prompt as a whole."""
    context: Tensor               # [B, L, D]
    pooled: Tensor | None = None          # [B, 1280], only in Stable Diffusion XL


class LatentDiffusion(nn.Module):
    """A whole model: config, tokenizer, text_encoder, unet, vae."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.text_encoder = TextEncoder(config.text)
        if config.text_2:
            self.text_encoder_2 = TextEncoder(config.text_2)
        self.unet = UNet(config.unet, config.context_dim)
        self.vae = VAE(config.vae)
        self.alphas_cumprod = make_alphas_cumprod(config.schedule)    # float64, on the CPU

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    # The weights file is the whole model: the tensors, named as in the classes above, and as text
    # in its header the config and the tokenizer.

    @staticmethod
    def load(path: str | Path | None = None, device: str | torch.device = "auto",
             dtype: torch.dtype | None = None) -> "LatentDiffusion":
        """A model from a weights file; without a path the built-in one. In eval mode, no gradients.

        device: "auto" takes a CUDA GPU if there is one. dtype: None means float32, whatever the
        file has.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with safe_open(path or BUILT_IN, framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        with torch.device("meta"):            # no memory, no random numbers: the file has them all
            ldm = LatentDiffusion.from_header(header)
        ldm.load_state_dict(tensors, assign=True)
        return ldm.to(device, dtype or torch.float32).eval().requires_grad_(False)

    @staticmethod
    def from_header(header: dict[str, str]) -> "LatentDiffusion":
        """A new model with the config and the tokenizer of a `header`."""
        config = Config.from_dict(json.loads(header["config"]))
        tables = json.loads(header["tokenizer"])["model"]
        backend = clip_backend(tables["vocab"], tables["merges"])
        return LatentDiffusion(config, Tokenizer(backend, config.text.max_length,
                                                 config.text.pad_id))

    def save(self, path: str | Path) -> None:
        """Writes the model as one .safetensors, in the precision that it has."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, self.header())

    def header(self) -> dict[str, str]:
        """What a weights file says besides its tensors."""
        return {"format": "tiny_ldm", "config": json.dumps(asdict(self.config)),
                "tokenizer": self.tokenizer.backend.to_str()}

    @torch.no_grad()
    def encode_text(self, prompts: str | list[str]) -> Tensor | Text:
        """["a prompt", ...] -> context [B, L, D]; in Stable Diffusion XL with the pooled vector."""
        ids = self.tokenizer(prompts).to(self.device)             # [B, L]
        context = self.text_encoder(ids)
        if not self.config.text_2:
            return context
        t = self.tokenizer
        ids = Tokenizer(t.backend, t.max_length, self.config.text_2.pad_id)(prompts).to(self.device)
        context_2, last = self.text_encoder_2.context_and_last(ids)
        pooled = self.text_encoder_2.pooled(last, ids, t.eos)
        return Text(torch.cat([context, context_2], dim=-1), pooled)

    def added_vector(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        """The vector that Stable Diffusion XL adds to the timestep's: pooled [B, 1280] and sizes
        [B, 6] -> [B, 2816]. Each number is written as waves, like a timestep.

        Careful, sizes are (original height, width, crop top, left, target height, width): height
        first (generative-models helpers.py:191). Told of a small original the network draws as if
        scaled up; told of a crop, as if cut off.
        """
        waves = timestep_embedding(sizes.flatten(), 256)          # [B·6, 256]
        waves = waves.reshape(len(sizes), -1).to(pooled)          # [B, 1536]
        return torch.cat([pooled, waves], dim=-1)

    @torch.no_grad()
    def encode_image(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """image [B, 3, H, W] in [−1, 1] -> scaled latents [B, 4, H/8, W/8]: the mean, which is
        always the same, or with a generator a random point of the cloud.

        Careful, the order: first draw, then multiply by scale_factor (CompVis ddpm.py:549).
        """
        latents, logvar = self.vae.encode(image.to(next(self.vae.parameters())))
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            latents = sample_posterior(latents, logvar, noise)
        return self.config.scale_factor * latents

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 4, h, w] -> image [B, 3, 8h, 8w] in [−1, 1], float32."""
        z = latents / self.config.scale_factor
        image = self.vae.decode(z.to(next(self.vae.parameters())))
        return image.float().clamp(-1, 1)

    def text_of(self, prompts: str | list[str] | Tensor | Text, repeats: int) -> Text:
        """The text of prompts, each used so many times in a row. One that is encoded already is
        passed through."""
        if isinstance(prompts, (str, list)):
            prompts = self.encode_text(prompts)
        if isinstance(prompts, Tensor):
            prompts = Text(prompts)
        return Text(*[part.to(self.device, self.dtype).repeat_interleave(repeats, dim=0)
                      for part in prompts if part is not None])

    def texts(self, prompt: str | list[str] | Tensor | Text,
              negative_prompt: str | list[str] | Tensor | Text | None, guidance_scale: float,
              batch_size: int) -> list[Text]:
        """What to ask the network with: the prompts; or for guidance the negative prompts, and then
        the prompts."""
        text = self.text_of(prompt, batch_size)
        if guidance_scale == 1:
            return [text]
        if negative_prompt is None:
            if text.pooled is not None:
                # Where Stable Diffusion XL's training dropped the caption, it put zeros
                return [Text(*[torch.zeros_like(part) for part in text]), text]
            negative_prompt = ""
        negative = self.text_of(negative_prompt, 1)
        return [self.text_of(negative, len(text.context) // len(negative.context)), text]

    def predict_eps(self, x: Tensor, t: float, alpha_bar: float, *, texts: list[Text],
                    guidance_scale: float, extra: Tensor | None = None) -> Tensor:
        """The network's guess of ε in x [B, 4, h, w], with guidance where there are two texts (both
        are asked in one call). extra: what an inpainting model sees next to the latents."""
        inputs = x
        if extra is not None:
            inputs = torch.cat([x, extra.expand(len(x), -1, -1, -1)], dim=1)
        inputs = inputs.to(self.dtype).repeat(len(texts), 1, 1, 1)
        times = torch.full((len(inputs),), t, device=self.device)
        context = torch.cat([text.context for text in texts])
        vector = None
        if self.config.text_2:
            size = [side * self.config.vae_stride for side in x.shape[2:]]
            sizes = torch.tensor([*size, 0, 0, *size]).expand(len(inputs), 6)
            vector = self.added_vector(torch.cat([text.pooled for text in texts]), sizes)
        guess = self.unet(inputs, times, context, vector).float()
        if len(texts) == 2:
            guess = guide(*guess.chunk(2), guidance_scale)
        if self.config.prediction == "v":
            guess = eps_from_v(x, guess, alpha_bar)
        return guess

    @torch.no_grad()
    def denoise(self, prompt: str | list[str] | Tensor | Text,
                negative_prompt: str | list[str] | Tensor | Text | None = None, *,
                steps: int | None = None, sampler: str | None = None,
                guidance_scale: float | None = None, eta: float = 0.0, seed: int = 0,
                batch_size: int = 1, width: int | None = None, height: int | None = None,
                latents: Tensor | None = None, image: Tensor | None = None,
                strength: float = 0.75, mask: Tensor | None = None) -> Iterator[Step]:
        """Makes pictures and yields every step; `decode_latents(step.x)` shows how far they are.

        prompt: a string, a list, or what `encode_text` gave; each is used batch_size times.
        negative_prompt: one for all, or one per prompt; None is the empty prompt (XL: zeros); not
        used if guidance_scale is 1. steps 1 to 1000 (lcm: to 50), sampler (a name in SAMPLERS),
        guidance_scale: None takes the config's. eta 0 to 1: for ddim. seed: picture i draws all its
        noise from its own generator, seeded with seed + i, on the CPU and in float32, so the noise
        is the same alone or in a batch and on every device. width, height: multiples of the
        config's stride. latents [B, 4, h, w]: the noise to start from, of this size. image [B or 1,
        3, height, width] in [−1, 1]: start from this with noise in it; strength 0 gives it back as
        the VAE draws it, 1 forgets it. mask, bool [1, 1, height, width]: where it is False the
        image stays. (Section 11 makes both from pictures of any size.)
        """
        c = self.config
        steps = steps or c.steps
        sampler = SAMPLERS[sampler or c.sampler]
        if guidance_scale is None:
            guidance_scale = c.guidance_scale
        texts = self.texts(prompt, negative_prompt, guidance_scale, batch_size)

        rows = (height or c.image_size) // c.vae_stride
        columns = (width or c.image_size) // c.vae_stride
        shape = (1, c.vae.latent_channels, rows, columns)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts[0].context))]
        noise = partial(draw_noise, shape, generators, self.device)
        start = noise() if latents is None else latents.to(self.device, torch.float32)

        # Without an image x is noise, and what follows is no more than `yield from sample(...)`
        x, levels, known = self.begin(sampler, steps, start, image, strength)
        first = steps - len(levels.timesteps)
        if first == steps:                    # strength 0: no step is left, the image as it is
            yield Step(steps - 1, 0.0, known, 0 * known, known)
            return
        # With a mask either the network sees the rest of the picture (extra), or the rest is put
        # back after every step (repaint)
        extra, repaint = self.inpainting(image, mask)
        if repaint is not None:
            x = torch.where(repaint, x, add_noise(known, start, levels.alpha_bars[0]))
        predict_eps = partial(self.predict_eps, texts=texts, guidance_scale=guidance_scale,
                              extra=extra)
        walk = sample(sampler.step, predict_eps, x, levels, noise, eta)
        for step, a_next in zip(walk, [*levels.alpha_bars[1:-1], 1.0]):
            step.index += first
            if repaint is not None:
                # What is known stays, with as much noise in it as x has, in the end with none
                # (Blended Diffusion, Avrahami et al. 2021, arXiv:2111.14818; CompVis ddim.py:144)
                step.x = torch.where(repaint, step.x, add_noise(known, start, a_next))
            yield step

    def begin(self, sampler: Sampler, steps: int, start: Tensor, image: Tensor | None,
              strength: float) -> tuple[Tensor, Levels, Tensor | None]:
        """Where a walk begins: (x, the levels from there on, the image's latents or None).

        With an image these are the last strength · S steps, rounded down (18 of 25 at 0.75), and x
        is the image with as much noise in it as there is at the first of them (SDEdit, Meng et al.
        2021, arXiv:2108.01073).
        """
        levels = sampler.levels(steps, sigma_of(self.alphas_cumprod.numpy()))
        x = start
        if sampler.starts_at_sigma:
            x = (1 - levels.alpha_bars[0]) ** 0.5 * start
        if image is None:
            return x, levels, None
        known = self.encode_image(image).float().expand_as(start)
        first = steps - int(strength * steps)
        levels = Levels(levels.timesteps[first:], levels.alpha_bars[first:])
        if first > 0:
            x = add_noise(known, start, levels.alpha_bars[0])
        return x, levels, known

    def inpainting(self, image: Tensor | None, mask: Tensor | None
                   ) -> tuple[Tensor | None, Tensor | None]:
        """How a part of a picture is kept. For a model with 9 channels, which has learned to look
        at the mask and the rest of the picture: (mask and the latents of the rest [B, 5, h, w],
        None). For any other: (None, which latents to repaint, bool [1, 1, h, w])."""
        if mask is None:
            return None, None
        if self.config.unet.in_channels == self.config.vae.latent_channels:
            # A latent is repainted if any of its pixels is
            repaint = F.max_pool2d(mask.float(), self.config.vae_stride) > 0
            return None, repaint.to(self.device)
        rest = self.encode_image(image * ~mask).float()
        small = F.interpolate(mask.float(), rest.shape[2:]).to(rest)     # one pixel per latent
        return torch.cat([small.expand_as(rest[:, :1]), rest], dim=1), None

    def generate(self, prompt: str | list[str] | Tensor | Text,
                 negative_prompt: str | list[str] | Tensor | Text | None = None, *,
                 progress: bool = True, on_step: Callable[[Step], None] | None = None,
                 **settings) -> list[Image.Image]:
        """The pictures. All settings are those of `denoise`. progress: a bar on stderr; on_step is
        called with every step."""
        total = settings.get("steps") or self.config.steps
        with tqdm(desc="denoising", total=total, disable=not progress) as bar:
            for step in self.denoise(prompt, negative_prompt, **settings):
                bar.update(step.index + 1 - bar.n)
                if on_step is not None:
                    on_step(step)
        pictures = self.decode_latents(step.x)
        mask = settings.get("mask")
        if mask is not None:                  # where it is False, the given pixels themselves
            image = settings["image"]
            pictures = torch.where(mask, pictures.to(image), image)
        return to_pil(pictures)


# %% Look: a picture
if STEPPING:
    from IPython.display import display
    display(*LatentDiffusion.load().generate("a red circle left of a blue square"))


# %% 9. Training
# --------------------------------------------------------------------------------------------------
# Two losses, one loop. First the VAE by itself; then the U-Net (and here its text encoder) on the
# VAE's latents. Notebook 6 trains a small world from nothing in a minute or two.
#
# Stable Diffusion's training differs in scale: hundreds of millions of pictures with captions from
# the web (LAION), in batches of 2,048, for 150,000 GPU hours (A100). CLIP stays frozen there. The
# U-Net's optimizer was AdamW; ours, Muon, stands after the loop. And the VAE has two losses more,
# without which photographs come out blurred: LPIPS, which compares what a trained network sees in
# the picture and in its reconstruction, and a discriminator, a second network that learns to tell
# patches of the one from patches of the other (Esser et al. 2020, arXiv:2012.09841). Flat shapes do
# without both.

# The recipe: (1) train the VAE with `vae_loss`, put the averages of its weights (EMA, see `train`)
# in their place, and freeze it; (2) set scale_factor to 1 / (standard deviation of its latents);
# (3) train the U-Net and the text encoder on the encoded pictures with `text_to_image_loss`, and
# again put in the averages. Both with `train` and `Muon` (below): full learning rates are 0.005 for
# its matrices (with 0.02 both stages learned more slowly) and, with betas of (0.9, 0.99), 0.001 for
# the rest; no weight decay. The command (section 13) takes batches of 16 and 128; x₀ are random
# points of the clouds; and timesteps are T · u^⅔ for a uniform u, so that large t come more often:
# there the layout is decided, which takes longest to learn.

def vae_loss(vae: VAE, image: Tensor, noise: Tensor, kl_weight: float = 1e-4) -> Tensor:
    """Stage 1: |x̂ − x| + (x̂ − x)² of the reconstruction x̂, and a little KL: a scalar.

    image [B, 3, H, W] in [−1, 1]; noise [B, 4, H/8, W/8] picks the point of the cloud. The absolute
    error pulls a doubtful pixel to the median of what it could be, which is sharp; the squared one
    to the mean, which never overlooks a small thing. KL, the Kullback-Leibler divergence, says how
    far the cloud is from a standard normal one: KL(N(mean, σ²) || N(0, 1)) = ½ (mean² + σ² − 1 −
    log σ²) (Kingma & Welling, appendix B). It keeps the latents near 0 and a little noisy, or they
    could grow without bound, and codes of similar pictures could lie far apart. It is kept so small
    that this is nearly a plain autoencoder whose codes are blurred a little.

    The paper's kl_weight is 1e-6, but there errors and KL are sums, and here they are means, over
    48 times as many numbers in the picture as in the latents. Made of sums, our loss would have a
    weight of 48 · 1e-4 = 0.005.
    """
    mean, logvar = vae.encode(image)
    reconstruction = vae.decode(sample_posterior(mean, logvar, noise))
    error = reconstruction - image
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    return error.abs().mean() + error.square().mean() + kl_weight * kl.mean()


def text_to_image_loss(ldm: LatentDiffusion, x0: Tensor, ids: Tensor, *,
                       dropped: Tensor | None = None, t: Tensor | None = None,
                       eps: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
    """Stage 2: the loss of section 2, with captions: a scalar.

    x0 [B, 4, h, w]: scaled latents of the pictures. ids [B, L]: their captions. dropped [B], bool:
    which captions are replaced by the empty one; each with probability 0.1 if None. So one network
    learns to guess both with the prompt and without, which guidance needs. (ids and dropped are on
    the CPU, where the tokenizer works and chance is drawn.) t, eps, generator: see
    `diffusion_loss`.
    """
    if dropped is None:
        dropped = torch.rand(len(ids), generator=generator) < 0.1
    ids = torch.where(dropped[:, None], ldm.tokenizer(""), ids)   # [B, L]
    context = ldm.text_encoder(ids.to(ldm.device))                # [B, L, D]
    return diffusion_loss(ldm.unet, x0, context, ldm.alphas_cumprod, ldm.config.prediction, t=t,
                          eps=eps, generator=generator)


def learning_rate_factor(step: int, steps: int) -> float:
    """What the full learning rate is multiplied by. It rises over the first third, at most 100
    steps, since at first gradients are large and the optimizer's running estimates poor; it falls
    to nothing over the last third, where the weights settle."""
    warm_up = (step + 1) / min(100, steps / 3)
    cool_down = (steps - step) / (steps / 3)
    return min(1.0, warm_up, cool_down)


def train(parameters: list[nn.Parameter], averages: list[Tensor], optimizer: torch.optim.Optimizer,
          loss_of: Callable[[int], Tensor], steps: int, start: int = 0,
          decay: float = 0.999) -> Iterator[tuple[int, float]]:
    """The loop of both stages: yields (step, loss) after every step, so that whoever iterates can
    show progress, save, or stop.

    averages: a copy of each parameter, which becomes its exponential moving average (EMA). Weights
    jump about with every batch; the average lies in the middle of these jumps and draws better
    pictures. In the end the caller puts the averages in place of the weights.
    loss_of: (step) -> the loss of that step's batch. start: where an interrupted run goes on.
    """
    for step in range(start, steps):
        for group in optimizer.param_groups:
            full = group.setdefault("initial_lr", group["lr"])
            group["lr"] = full * learning_rate_factor(step, steps)
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)     # one bad batch can't throw it off course
        optimizer.step()
        with torch.no_grad():
            kept = min(decay, (step + 1) / (step + 10))           # a short average at first
            for average, p in zip(averages, parameters):
                average.lerp_(p, 1 - kept)
        yield step, loss.item()


# Which optimizer? AdamW scales the step of each weight separately. A layer is a matrix, though, and
# its gradient G = U Σ Vᵀ (its singular values in Σ) is mostly a few directions that all pictures
# share. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) keeps U Vᵀ and drops Σ, so
# that rare directions are learned as fast as common ones. Here that decides: after 600 steps of
# stage 2 AdamW drew 2 % of the captions right whose pair of colour and shape no training picture
# shows, and Muon 29 % (150 captions, guidance 2, both with a batch of 128).

def orthogonalized(g: Tensor) -> Tensor:
    """[m, n] = U Σ Vᵀ -> about U Vᵀ, by five Newton-Schulz steps: each maps every singular value s
    to a s + b s³ + c s⁵, and a, b, c were chosen to push all but the smallest quickly to between
    0.7 and 1.2."""
    if g.shape[0] > g.shape[1]:
        return orthogonalized(g.T).T
    x = g / (g.norm() + 1e-7)                 # no singular value is larger than 1 now
    for _ in range(5):
        y = x @ x.T                                               # the smaller square
        x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
    return x


class Muon(torch.optim.AdamW):
    """Muon for the parameters in groups with muon=True, AdamW for the others: vectors, embeddings,
    and the layers that touch pictures or latents. A convolution counts as a matrix [out,
    in·3·3]."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else []:
                state = self.state[p]
                if not state:
                    # (AdamW expects a step in whatever it loads from a checkpoint)
                    state.update(step=torch.zeros(1), momentum=torch.zeros_like(p))
                # The running mean of the gradient, and a look ahead along it (Nesterov)
                state["momentum"].lerp_(p.grad, 0.05)
                g = p.grad.lerp(state["momentum"], 0.95).flatten(1)
                # U Vᵀ of a tall matrix spreads a step over more outputs: the root makes up for it
                lr = group["lr"] * max(1, g.shape[0] / g.shape[1]) ** 0.5
                p.sub_(lr * orthogonalized(g).reshape(p.shape))
                p.grad = None                 # AdamW leaves alone what has no gradient
        super().step()


# What loss to expect? Stage 1 of the built-in model ended at 0.0035. Stage 2 (v) begins at 1, since
# v has variance 1 and the new network answers 0. It was 0.77 after 120 steps, 0.42 after 1,000 and
# 0.34 after 20,000: it falls fast at first and then hardly at all, while pictures get better for
# hours, since most of it is noise that nobody can guess. Judge the pictures, not the loss.

# %% Look: the loss falls, on pictures of one colour each
if STEPPING:
    vae = VAE(SHAPES.vae)
    weights = list(vae.parameters())

    def loss_of(step):
        image = torch.rand(8, 3, 1, 1).expand(8, 3, 64, 64)
        return vae_loss(vae, image, torch.randn(8, 4, 8, 8))

    # (Without averages)
    for step_and_loss in train(weights, [], torch.optim.AdamW(weights), loss_of, steps=20):
        print(step_and_loss)


# %% Part II: the workshop
# --------------------------------------------------------------------------------------------------
# What makes a tool of the lesson: a world to learn, a door where all that comes from outside is
# checked, speed, trainings that survive an interruption, and the command. It uses Part I, and
# derives from its LatentDiffusion.
import argparse
import atexit
import contextlib
import copy
import ctypes
import functools
import glob
import itertools
import operator
import os
import random
import re
import signal
import tempfile
import time
import warnings
import zipfile

from PIL import ImageDraw, PngImagePlugin
from torch.nn.attention import SDPBackend, sdpa_kernel

# %% 10. Shapes
# --------------------------------------------------------------------------------------------------
# The built-in model knows one little world: plain pictures of coloured shapes, whose caption says
# exactly what they show, so that a program can judge every picture. The grammar:
#
#     caption  := scene [" on a(n) " COLOUR " background"]         (no background named: white)
#     scene    := thing | thing RELATION thing | COUNT [SIZE] COLOUR SHAPEs
#     thing    := "a(n) " [SIZE] COLOUR SHAPE
#
# Lengths are in pixels of a picture 128 wide, whatever the size it is drawn at. Notebook 6 uses it.

COLOURS = {"red": (220, 30, 40), "orange": (255, 140, 0), "yellow": (250, 220, 40),
           "green": (30, 150, 60), "blue": (30, 70, 220), "purple": (125, 40, 180),
           "black": (15, 15, 15), "white": (255, 255, 255)}
SHAPE_NAMES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
# The way from the first thing to the second, x + iy: left of means that the second lies at +x
RELATIONS = {"left of": 1, "right of": -1, "above": 1j, "below": -1j}
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
    size: str | None = None          # "small", "large", or None: either


class Scene(NamedTuple):
    """What a caption says."""
    things: tuple[Thing, ...]        # one; two in a relation; or two or three alike
    relation: str | None = None
    background: str | None = None    # None: white, not said


def is_held_out(thing: Thing) -> bool:
    """Eight of the 64 (colour, shape) pairs, one diagonal of the table, are never trained on: what
    becomes of them shows whether the model composes or remembers."""
    row = list(COLOURS).index(thing.colour)
    column = SHAPE_NAMES.index(thing.shape)
    return (row + column) % 8 == 3


def with_article(words: str) -> str:
    """"red star" -> "a red star"."""
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}"


def caption_of(scene: Scene) -> str:
    """The scene in words, as the grammar above has it."""
    names = [" ".join(filter(None, (it.size, it.colour, it.shape))) for it in scene.things]
    text = with_article(names[0])
    if scene.relation:
        text = f"{text} {scene.relation} {with_article(names[1])}"
    elif len(names) > 1:
        ending = "es" if names[0].endswith("s") else "s"
        text = f"{list(COUNTS)[len(names) - 2]} {names[0]}{ending}"
    if scene.background:
        text = f"{text} on {with_article(scene.background)} background"
    return text


def rephrase(caption: str, rng: random.Random) -> str:
    """The same in free words, so that other wordings work, too. (An empty article takes its space
    along.)"""
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
    colours = [colour for colour in COLOURS if colour != (background or "white")]
    kind = kind or rng.choice(("one", "two", "two", "two", "alike", "alike"))
    first = random_thing(rng, colours, held_out)
    if kind == "one":
        return Scene((first,), None, background)
    if kind == "two":
        second = random_thing(rng, colours, held_out=False)
        return Scene((first, second), rng.choice(list(RELATIONS)), background)
    return Scene((first,) * rng.choice((2, 3)), None, background)


def random_thing(rng: random.Random, colours: list[str], held_out: bool) -> Thing:
    """One that is a held-out pair, or one that is not."""
    while True:
        thing = Thing(rng.choice(colours), rng.choice(SHAPE_NAMES), rng.choice((None, *SIZES)))
        if is_held_out(thing) == held_out:
            return thing


Spot = tuple[float, float, float]        # x, y, radius of a thing


def place(scene: Scene, rng: random.Random) -> list[Spot]:
    """Where each thing goes: inside the picture, apart, and as the relation says. By rejection: it
    draws at random until all of that holds."""
    while True:
        spots = [random_spot(thing, len(scene.things), rng) for thing in scene.things]
        if fits(scene, spots):
            return spots


def random_spot(thing: Thing, count: int, rng: random.Random) -> Spot:
    """Anywhere in the picture."""
    size = thing.size or rng.choice(list(SIZES))
    radii = LARGE_OF_THREE if count == 3 and size == "large" else SIZES[size]
    r = rng.uniform(*radii)
    margin = 1.1 * r + 2                 # 1.1: the diamond is the tallest outline
    return rng.uniform(margin, 128 - margin), rng.uniform(margin, 128 - margin), r


def fits(scene: Scene, spots: list[Spot]) -> bool:
    """Are the things apart, and as the relation says?"""
    for (x, y, r), (x2, y2, r2) in itertools.combinations(spots, 2):
        way = complex(x2 - x, y2 - y)
        if abs(way) < 1.2 * (r + r2) + 2:
            return False
        if scene.relation:
            way = way / RELATIONS[scene.relation]     # turned, so that it should lead to +x
            if way.real < 2 * abs(way.imag):          # clearly so: twice as far as to the side
                return False
    return True


def polygon(n: int) -> np.ndarray:
    """n corners on a circle, clockwise from the top: [n], complex, x + iy, y down."""
    return -1j * np.exp(2j * np.pi * np.arange(n) / n)


# The outlines of unit shapes: radius about 1, not turned. Heart: x = sin³ a, 16 y = −13 cos a + ...
# (and 0.1 higher)
ANGLES = np.linspace(0, 2 * np.pi, 64, endpoint=False)
HEART = 13 * np.cos(ANGLES) - 5 * np.cos(2 * ANGLES)
HEART = HEART - 2 * np.cos(3 * ANGLES) - np.cos(4 * ANGLES)
ARM = np.array([-0.34 - 0.34j, -0.34 - 1j, 0.34 - 1j])           # of the cross
OUTLINES = {
    "circle": polygon(64), "ring": polygon(64), "triangle": polygon(3),
    "star": polygon(10) * np.tile([1.0, 0.41], 5),
    "square": 0.86 * np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j]),
    "diamond": np.array([-1.1j, 0.78, 1.1j, -0.78]),
    "heart": np.sin(ANGLES) ** 3 - 1j * (HEART / 16 + 0.1),
    "cross": np.concatenate([ARM, 1j * ARM, -ARM, -1j * ARM])}


def draw(scene: Scene, spots: list[Spot], size: int) -> Image.Image:
    """The picture, size x size, anti-aliased: drawn four times larger, averaged down."""
    background = COLOURS[scene.background or "white"]
    image = Image.new("RGB", (4 * size, 4 * size), background)
    pen = ImageDraw.Draw(image)
    for thing, (x, y, r) in zip(scene.things, spots):
        fills = [(r, COLOURS[thing.colour])]
        if thing.shape == "ring":
            fills.append((0.55 * r, background))
        for radius, colour in fills:
            corners = complex(x, y) + radius * OUTLINES[thing.shape]
            # (Pillow counts from the middle of the first pixel)
            corners = corners * (size / 32) - (0.5 + 0.5j)
            pen.polygon(corners.view(float).tolist(), colour)
    return image.reduce(4)


@dataclass
class ShapesData:
    """Pictures of the Shapes world without end: number i is always the same picture and caption."""
    size: int
    seed: int

    def captions(self) -> list[str]:
        """Enough of them to learn a vocabulary from."""
        return [self.item(i)[1] for i in range(20000)]

    def item(self, i: int) -> tuple[Image.Image, str]:
        """Picture and caption number i."""
        rng = random.Random(f"{self.seed}/{i}")
        scene = random_scene(rng)
        picture = draw(scene, place(scene, rng), self.size)
        caption = caption_of(scene)
        if rng.random() < 0.25:
            caption = rephrase(caption, rng)
        return picture, caption


# %% 11. Files
# --------------------------------------------------------------------------------------------------
# The door. Whatever comes from outside (weights, pictures, texts, settings) is checked here, and
# what is wrong is said in one line. What else only a training or the command takes is checked
# there.

class InputError(ValueError):
    """What the user gave can't be used. The message is one line: what is wrong, with the value, and
    what to do."""


@contextlib.contextmanager
def input_errors(what: str, cure: str) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of what came from outside: raises InputError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        reason = shortened(f"{type(error).__name__}: {error}", 200)
        raise InputError(f"{what} ({reason}); {cure}") from None


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch has no type of its own for it on a CPU."""
    signs = "MemoryError|allocate memory|bad_alloc|out of memory|create a primitive"
    return not isinstance(error, InputError) and re.search(signs, repr(error)) is not None


def shortened(text: str, width: int = 60) -> str:
    """The beginning of a text, on one line; what can't be printed is escaped."""
    letters = " ".join(text.split())
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in letters)
    return text if len(text) <= width else text[: width - 3] + "..."


def say(message: str) -> None:
    """A line for the user, next to the progress bar."""
    print(f"tiny_ldm: {shortened(message, 1000)}", file=sys.stderr)


RANGES = {"steps": (1, 1000), "guidance_scale": (-1000, 1000), "eta": (0, 1), "strength": (0, 1),
          "seed": (0, 2**62), "width": (1, 8192), "height": (1, 8192),
          "batch_size": (1, 65536), "count": (1, 65536),
          "vae_batch": (1, 65536), "unet_batch": (1, 65536), "vae_steps": (0, 10**9),
          "unet_steps": (0, 10**9), "save_minutes": (0, 10**6)}


def check_settings(settings: dict) -> None:
    """Raises InputError for a number out of its range, or an unknown sampler."""
    for name, (low, high) in RANGES.items():
        value = settings.get(name)
        if value is not None and not low <= value <= high:       # nan is in no range
            raise InputError(f"{name} must be from {low} to {high}, not {value}")
    if settings.get("sampler") == "lcm" and (settings.get("steps") or 1) > 50:
        raise InputError(f"steps must be from 1 to 50 with lcm, not {settings['steps']}")
    if settings.get("sampler") not in (None, *SAMPLERS):
        raise InputError(f"unknown sampler {settings['sampler']!r}; there are: "
                         f"{', '.join(SAMPLERS)}")


def check_file(path: str | Path) -> Path:
    """The path. Raises InputError for what is no regular file (a pipe could block forever), and for
    what a download often leaves in its place: a git-LFS pointer, or a web page."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file (weights_convert.py takes folders)")
    if not path.is_file():
        raise InputError(f"no file {path}; check the path")
    with open(path, "rb") as file:
        head = file.read(100).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-LFS pointer, not the file; fetch it: git lfs pull")
    if head.startswith((b"<!doctype", b"<html")):
        raise InputError(f"{path} is an HTML page, not the file: the download wants a log-in, or "
                         "has moved; get it again")
    return path


def check_output(path: str | Path, *endings: str) -> None:
    """Raises InputError, before all the work, for a file that could not be written after it."""
    path = Path(path)
    if not path.name.lower().endswith(endings):
        raise InputError(f"{path} must end in {' or '.join(endings)}")
    with input_errors(f"{path} can't be written", "choose another place or name"):
        if path.exists() and not path.is_file():
            raise ValueError("a folder or a device has this name")
        tempfile.TemporaryFile(dir=path.parent).close()


def write_whole(path: str | Path, write: Callable[[str], None]) -> None:
    """Calls write(name) with a name next to path, then renames: a file is there whole or not at
    all. Raises InputError."""
    path = Path(path)
    # At random, since others may be writing in this folder; cut, since names have a limit
    beside = path.with_name(f".{path.name[:40]}.{os.urandom(4).hex()}.part")
    try:
        with input_errors(f"{path} can't be written", "check name, room on the disk, permissions"):
            write(str(beside))
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def open_image(image: str | Path | Image.Image,
               convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A picture, or the one in a file, as `convert` makes it. Raises InputError. Not all formats
    that Pillow knows: for some it runs other programs."""
    formats = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    PngImagePlugin.MAX_TEXT_CHUNK = 2**26             # a picture may hold a long text
    with input_errors(f"{shortened(str(image), 300)} can't be read as a picture",
                      "replace or remove it"):
        if not isinstance(image, Image.Image):
            image = Image.open(check_file(image), formats=formats)
        return convert(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any kind as RGB: turned as its EXIF orientation says, brought to 8 bits, and
    white where it is transparent."""
    image = upright(image)
    if image.mode[0] in "IF":                 # numbers, of which Pillow would cut all above 255
        values = np.nan_to_num(np.asarray(image, float), posinf=0)
        # Which is white? With 16 bits the largest there is, else the first that is large enough
        top = 65535
        if ";" not in image.mode:
            top = next(top for top in (1, 255, 65535, values.max()) if values.max() <= top)
        image = Image.fromarray((values * 255 / top).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """Its brightness; or where something is drawn, if the rest is transparent."""
    if image.has_transparency_data:
        alpha = upright(image).convert("RGBA").getchannel("A")
        if min(alpha.getextrema()) < 255:
            return alpha
    return to_rgb(image).convert("L")


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says, if it can be read."""
    image.load()
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    return image


def fit_pictures(config: Config, image: str | Path | Image.Image | Tensor | None = None,
                 mask: str | Path | Image.Image | Tensor | None = None, width: int | None = None,
                 height: int | None = None, latents: Tensor | None = None, **others) -> dict:
    """The settings of `denoise`, checked and complete, with an image -> [B, 3, H, W] in [−1, 1],
    and its mask (white: repaint) -> bool [1, 1, H, W].

    Pictures are resized and cropped to width x height, or else to the model's own area in their own
    proportions. Tensors stay as they are. Raises InputError for a setting out of its range, for
    sizes that are no multiples of the config's stride, and for a mask that is missing or alone.
    """
    for name in ("steps", "sampler", "guidance_scale"):
        if others.get(name) is None:
            others[name] = getattr(config, name)
    others["seed"] = operator.index(others.get("seed", 0))        # NumPy's integers are fine, too
    check_settings(dict(others, width=width, height=height))
    if mask is not None and image is None:
        raise InputError("a mask needs an image that it belongs to")
    if mask is None and config.unet.in_channels > config.vae.latent_channels:
        raise InputError("this model repaints: give it an image and a mask")
    stride, side = config.stride, config.image_size
    if latents is not None:
        height, width = [length * config.vae_stride for length in latents.shape[2:]]
    if isinstance(image, Tensor):
        height, width = image.shape[2:]
    elif image is not None:
        image = open_image(image, to_rgb)
        ratio = (image.width / image.height) ** 0.5
        own = [max(stride, round(it / stride) * stride) for it in (side * ratio, side / ratio)]
        width, height = width or own[0], height or own[1]
    width, height = size = (width or side, height or side)
    if width % stride or height % stride:
        raise InputError(f"width and height must be multiples of {stride}, not {width} and "
                         f"{height}")
    if mask is not None and not isinstance(mask, Tensor):
        mask = to_tensor([ImageOps.fit(open_image(mask, to_mask), size)])[:, :1] > 0
        if not mask.any():
            say("the mask repaints nothing: no pixel of it is brighter than half of white")
    if isinstance(image, Image.Image):
        if image.size != size:
            say(f"the picture of {image.width} x {image.height} is used at {width} x {height}")
        if 0 < others.get("strength", 0.75) * others["steps"] < 1:
            say("the strength is less than one step: the picture stays as it is")
        image = to_tensor([ImageOps.fit(image, size, Image.Resampling.LANCZOS)])
    return dict(others, image=image, mask=mask, width=width, height=height, latents=latents)


def check_header(header: dict[str, str]) -> None:
    """Raises some error for a config or a tokenizer that no model can have."""
    c = Config.from_dict(json.loads(header["config"]))
    tokenizer = json.loads(header["tokenizer"])
    vocab = tokenizer["model"]["vocab"]
    added = sum(token["content"] not in vocab for token in tokenizer["added_tokens"])
    c.name.encode()                       # raises for lone surrogates
    texts = list(filter(None, (c.text, c.text_2)))
    for part in (c, *texts, c.vae, c.unet, c.schedule):
        for it in fields(part):
            value = getattr(part, it.name)
            # Optional ones may be missing, and 0 is a pad_id
            if it.type == "int | None" and str(value) in ("None", "0"):
                continue
            if it.type.startswith("int") and (type(value) is not int or not 0 < value < 65536):
                raise ValueError(f"{it.name} can't be {value!r}")
    for text in texts:
        good = (text.num_layers <= 100 and text.width % text.num_heads == 0
                and text.activation in ("quick_gelu", "gelu")
                and text.max_length == c.text.max_length
                and max(*vocab.values(), text.pad_id or 0) + added < text.vocab_size)
        if not good:
            raise ValueError(f"no text encoder is like {text}, with {len(vocab) + added} tokens")
    vector_dim = c.text_2.pooled_dim + 6 * 256 if c.text_2 else None
    heads = c.unet.head_dim or c.unet.num_heads
    # The last one is the middle
    levels = [*zip(c.unet.channel_mult, c.unet.transformer_depth), (c.unet.channel_mult[-1], 1)]
    good = (max(c.vae.num_res_blocks, c.unet.num_res_blocks, *c.unet.transformer_depth) <= 100
            and not any(depth and c.unet.channels * mult % heads for mult, depth in levels)
            and c.unet.vector_dim == vector_dim
            and c.image_size % c.stride == 0
            and max(2, c.steps) <= c.schedule.num_timesteps <= 1000
            and 1e-6 < c.schedule.beta_start <= c.schedule.beta_end < 0.1
            and 0 < c.scale_factor < 1e6 and abs(c.guidance_scale) <= 1000
            and c.prediction in ("eps", "v") and c.sampler in SAMPLERS
            and {BOS, EOS} <= vocab.keys())
    if not good:
        raise ValueError("its config or tokenizer can't be, or they do not fit each other")


def read_header(path: str | Path) -> dict[str, str]:
    """The header of a weights file. Raises InputError unless it is one."""
    with input_errors(f"{path} is damaged or no .safetensors file",
                      "get it again, or convert a .ckpt with weights_convert.py"):
        with safe_open(check_file(path), framework="pt") as file:
            header, names = file.metadata() or {}, str(file.keys())
        if "model.diffusion_model." in names:
            raise InputError(f"{path} is an official checkpoint; convert it first: "
                             f"python weights_convert.py {path}")
        if header.get("format") != "tiny_ldm" or "unet.conv_in.weight" in names:
            raise InputError(f"{path} is no tiny_ldm weights file, or one of an earlier version; "
                             "make it with --train, or from Stable Diffusion with "
                             "weights_convert.py")
        check_header(header)
    return header


class LatentDiffusion(LatentDiffusion):
    """The lesson's, behind the door. What its methods do and take is as said there, but pictures
    may be of any kind and size, and what commonly goes wrong raises InputError."""

    @classmethod
    def load(cls, path: str | Path | None = None, device: str | torch.device = "auto",
             dtype: torch.dtype | None = None) -> "LatentDiffusion":
        path = Path(BUILT_IN if path is None else path)
        if path == BUILT_IN and not path.exists():
            raise InputError(f"the built-in model is not at {path}; get the folder weights/ of the "
                             "repository, or name another model")
        nn.Module().to(dtype=dtype)              # raises for a wrong dtype, no fault of the file
        device = pick_device(device)
        read_header(path)
        with input_errors(f"{path} is damaged", "get it again, or make it anew"):
            ldm = super().load(path, device, dtype)
        if ldm.config.text_2 and ldm.dtype == torch.float16:
            ldm.vae.float()                      # whose numbers get too large for float16
        if device.type != "cpu" or ldm.dtype != torch.float32:
            # Channels innermost is faster, except on a CPU in float32, where the plain order needs
            # no copies
            ldm.to(memory_format=torch.channels_last)
        return ldm

    @classmethod
    def from_header(cls, header: dict[str, str]) -> "LatentDiffusion":
        ldm = super().from_header(header)
        # Words beyond the vocabulary, each one token, as textual inversion makes them
        added = json.loads(header["tokenizer"])["added_tokens"]
        words = [token["content"] for token in added if token["content"] not in (BOS, EOS)]
        ldm.tokenizer.backend.add_tokens(words)
        return ldm

    def save(self, path: str | Path) -> None:
        write_whole(path, super().save)

    def decode_latents(self, latents: Tensor) -> Tensor:
        image = super().decode_latents(latents)
        if image.isnan().any():                  # or a black picture would be drawn
            raise InputError(f"the picture is not finite in {self.dtype}; use float32, or other "
                             "weights")
        return image

    @functools.wraps(LatentDiffusion.denoise)
    def denoise(self, prompt, negative_prompt=None, **settings):
        return super().denoise(**self.checked(prompt, negative_prompt, settings))

    @functools.wraps(LatentDiffusion.generate)
    def generate(self, prompt, negative_prompt=None, **settings):
        return super().generate(**self.checked(prompt, negative_prompt, settings))

    def checked(self, prompt: str | list[str] | Tensor | Text,
                negative_prompt: str | list[str] | Tensor | Text | None, settings: dict) -> dict:
        """What denoise and generate take, with its pictures fitted."""
        settings = fit_pictures(self.config, **settings)
        negative, width = negative_prompt, self.config.context_dim
        if settings["guidance_scale"] == 1 or negative is None and self.config.text_2:
            negative = prompt                    # none is needed, or zeros in its place
        shape, negative_shape = self.shape_of(prompt), self.shape_of(negative)
        if not shape[0] or negative_shape[0] not in (1, shape[0]):
            raise InputError(f"{shape[0]} prompts and {negative_shape[0]} negative prompts: give "
                             "at least one prompt, and one negative prompt for all or one for each")
        if shape[1:] != negative_shape[1:] or shape[2:] != [width]:
            raise InputError(f"the context of the prompt is {shape} and that of the negative "
                             f"prompt {negative_shape}; wanted: [prompts, words, {width}], and "
                             "the same number of words in both")
        return dict(settings, prompt=prompt, negative_prompt=negative_prompt)

    def shape_of(self, prompts: str | list[str] | Tensor | Text | None) -> list[int]:
        """The shape [B, L, D] that their context has, or will have."""
        if isinstance(prompts, (Tensor, Text)):
            return list(getattr(prompts, "context", prompts).shape)
        count = len(prompts) if isinstance(prompts, list) else 1          # None: the empty one
        return [count, self.config.text.max_length, self.config.context_dim]


# %% 12. Faster
# --------------------------------------------------------------------------------------------------
# What pays: keeping freed memory, the order in memory (see `load`), compiling. The rest is PyTorch.

def pick_device(name: str | torch.device) -> torch.device:
    """"auto", "cpu", "cuda" or "mps" -> a device that is there, made ready. Raises InputError."""
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False      # or GPUs round float32 convolutions to 10 bits
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with input_errors(f"there is no device {str(name)!r} here", "leave out the device"):
        probe = torch.zeros(1, device=name)
        probe.tolist()                       # "meta" holds no numbers
        return probe.device


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed buffers. By default it gives them back to the kernel, and
    then each layer's output costs thousands of page faults: a step takes up to 2.6 times as long.
    Where there is no such call, nothing changes."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)             # M_MMAP_MAX: no buffer gets a mapping of its own
        mallopt(-1, 2**31 - 1)     # M_TRIM_THRESHOLD: the heap's top is kept, too


def compile_networks(ldm: LatentDiffusion) -> None:
    """Has PyTorch compile U-Net and decoder at their first call, which takes a minute or more.
    Raises InputError where nothing can be compiled."""
    from torch._inductor import config as compiler
    compiler.freezing = True       # weights are brought into the order that the processor likes
    with input_errors("nothing can be compiled here",
                      "install a C++ compiler (g++), or leave out --compile"):
        torch.compile(torch.sin)(torch.zeros(2, device=ldm.device))
    ldm.unet.compile()
    ldm.vae.decoder.compile()


# %% 13. Training runs
# --------------------------------------------------------------------------------------------------
# The loop of section 9 with data, progress, and checkpoints. What is random in a step depends only
# on the seed and the step's number, so that a run that was interrupted continues exactly as if it
# had not been. With `torchrun --nproc-per-node N` each of N processes takes its part of every
# batch, with noise of its own, and PyTorch averages the gradients. Notebook 6 trains.

@dataclass
class FolderData:
    """A folder of pictures with captions: name.png|jpg|jpeg|webp next to name.txt, or a
    metadata.jsonl whose lines have `file_name` and `text`. Number i is one of them at random."""
    folder: Path
    size: int
    seed: int

    def __post_init__(self):
        with input_errors(f"can't train on the folder {self.folder}",
                          "it needs name.png, .jpg or .webp next to name.txt, or a metadata.jsonl "
                          "whose lines have file_name and text"):
            self.items = list(self.read())
            if not self.items:
                raise ValueError("no captioned pictures")
        for path, _ in self.items:                # now, rather than one by one hours later
            open_image(path, to_rgb)

    def read(self) -> Iterator[tuple[Path, str]]:
        """Every picture's path and its caption."""
        for path in sorted(self.folder.iterdir()):
            caption = path.with_suffix(".txt")
            if path.name == "metadata.jsonl":
                for number, line in enumerate(read_text(path).split("\n"), 1):
                    if line.strip():
                        with input_errors(f"{path}, line {number} is wrong",
                                          'write {"file_name": "a.png", "text": "a red star"}'):
                            entry = json.loads(line)
                            pair = self.folder / entry["file_name"], clean(entry["text"])
                        yield pair
            elif path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and caption.exists():
                yield path, clean(read_text(caption))

    def captions(self) -> list[str]:
        """All of them."""
        return [caption for _, caption in self.items]

    def item(self, i: int) -> tuple[Image.Image, str]:
        """Picture and caption number i."""
        path, caption = random.Random(f"{self.seed}/{i}").choice(self.items)
        picture = open_image(path, to_rgb)
        return ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS), caption


def read_text(path: Path) -> str:
    """All of a text file. Raises InputError."""
    with input_errors(f"{path} is no text in UTF-8", "write it anew"):
        return check_file(path).read_text("utf-8-sig")


def clean(caption: str) -> str:
    """Without spaces around it, and not so long that a tokenizer takes long. Raises for lone
    surrogates (halves of a letter), which no tokenizer takes."""
    caption.encode()
    return caption.strip()[:10_000]


RANK, WORLD = 0, 1                                # this process's number, and how many there are
if {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= os.environ.keys():         # by torchrun
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Objective(nn.Module):
    """The loss of a step as a module: DistributedDataParallel averages the gradients of what the
    forward of a module returns."""

    def __init__(self, ldm: LatentDiffusion, loss_of: Callable[[int], Tensor], dtype: torch.dtype):
        super().__init__()
        self.ldm = ldm
        self.loss_of = loss_of
        self.dtype = dtype
        self.kernels = [SDPBackend.MATH]          # on a CPU the fused kernel's gradient is slow
        if ldm.device.type != "cpu":
            self.kernels.append(SDPBackend.FLASH_ATTENTION)

    def forward(self, step: int) -> Tensor:
        # In bfloat16 the products are rounded; weights and their gradients stay float32
        half = torch.autocast(self.ldm.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with sdpa_kernel(self.kernels), half:
            return self.loss_of(step)


@dataclass
class Trainer:
    """Both stages of a training, resumable. `train_model` below runs it."""
    ldm: LatentDiffusion
    data: ShapesData | FolderData
    out: Path
    seed: int
    dtype: torch.dtype
    save_minutes: float
    checkpoint: dict              # what run it is of, and where it goes on from

    def __post_init__(self):
        # second_stage uses the same ones up to eight times
        self.encoded = functools.lru_cache(maxsize=8)(self.encoded)

    def generator(self, step: int) -> torch.Generator:
        """The source of all that is random in a step of this process."""
        number = self.seed * 1_000_003 + step * WORLD + RANK
        return torch.Generator().manual_seed(number % 2**63)

    def pictures(self, number: int, count: int) -> tuple[Tensor, tuple[str, ...]]:
        """Batch `number` of this process: pictures [count, 3, H, W] and their captions."""
        first = (number * WORLD + RANK) * count
        pictures, captions = zip(*[self.data.item(i) for i in range(first, first + count)])
        return to_tensor(pictures).to(self.ldm.device), captions

    def encoded(self, number: int, count: int) -> tuple[Tensor, tuple[str, ...]]:
        """The same with latents in place of the pictures, in float32: in bfloat16 the lowest noise
        levels would be lost."""
        images, captions = self.pictures(number, count)
        return self.ldm.encode_image(images, self.generator(2**40 + number)).float(), captions

    def first_stage(self, batch: int, step: int) -> Tensor:
        """The loss of a step of stage 1."""
        images, _ = self.pictures(step, batch)
        side = self.data.size // self.ldm.config.vae_stride
        shape = (batch, self.ldm.config.vae.latent_channels, side, side)
        noise = torch.randn(shape, generator=self.generator(step))
        return vae_loss(self.ldm.vae, images, noise.to(images))

    def measure_scale(self) -> None:
        """Sets scale_factor so that latents have a standard deviation of 1, by the same pictures in
        all processes."""
        ldm = self.ldm
        images = to_tensor([self.data.item(i)[0] for i in range(256)])
        spread = ldm.encode_image(images).std().item()
        ldm.config = replace(ldm.config, scale_factor=ldm.config.scale_factor / spread)

    def second_stage(self, batch: int, step: int) -> Tensor:
        """The loss of a step of stage 2. Encoding is costly, so every picture is used in eight
        steps, with other noise: an eighth of each batch is new. (If 8 does not divide the batch,
        fewer steps.)"""
        ldm, rng = self.ldm, self.generator(step)
        uses = math.gcd(8, batch)
        parts = [self.encoded(number, batch // uses) for number in range(step, step + uses)]
        latents, captions = zip(*parts)
        t = torch.rand(batch, generator=rng) ** (2 / 3) * ldm.config.schedule.num_timesteps
        ids = ldm.tokenizer(sum(captions, ()))
        return text_to_image_loss(ldm, torch.cat(latents), ids, t=t.long(), generator=rng)

    def fit(self, stage: str, loss_of: Callable[[int], Tensor], steps: int) -> None:
        """Trains what this stage trains, then puts the averages of the weights in their place."""
        averaged = copy.deepcopy(self.ldm).requires_grad_(False)
        ldm = self.ldm.requires_grad_(stage == "unet")
        ldm.vae.requires_grad_(stage == "vae")
        if ldm.config.text.penultimate:
            ldm.text_encoder.layers[-1].requires_grad_(False)     # nothing uses what it gives
        weights = {name: p for name, p in ldm.named_parameters() if p.requires_grad}
        averages = [averaged.get_parameter(name) for name in weights]
        optimizer = make_optimizer(weights)
        start = 0
        if self.checkpoint.get("stage") == stage:
            with input_errors(f"the checkpoint of {self.out} is damaged", "choose another -o"):
                start = int(self.checkpoint["step"])
                ldm.load_state_dict(self.checkpoint["model"])
                averaged.load_state_dict(self.checkpoint["averaged"])
                optimizer.load_state_dict(self.checkpoint["optimizer"])
        objective = Objective(ldm, loss_of, self.dtype)
        if WORLD > 1:
            objective = nn.parallel.DistributedDataParallel(objective)
        walk = train(list(weights.values()), averages, optimizer, objective, steps, start)
        bar = tqdm(walk, stage, steps, initial=start, unit="step", disable=RANK > 0)
        saved = time.monotonic()
        losses = []
        for step, loss in bar:
            losses.append(loss)
            bar.set_postfix(loss=np.mean(losses[-100:]), refresh=False)
            due = step == steps - 1 or time.monotonic() - saved > 60 * self.save_minutes
            # The checkpoint must not be spoiled, too; gradients can be that a finite loss had
            if not math.isfinite(loss) or due and not all(p.isfinite().all() for p in averages):
                raise InputError(f"after step {step}, with a loss of {loss}, not all weights are "
                                 "finite; begin with other weights or another seed")
            if RANK == 0 and due:
                state = dict(averaged.header(), run=self.checkpoint["run"], stage=stage,
                             step=step + 1, model=ldm.state_dict(),
                             averaged=averaged.state_dict(), optimizer=optimizer.state_dict())
                write_whole(f"{self.out}.checkpoint", partial(torch.save, state))
                copy.deepcopy(averaged).half().save(self.out)
                saved = time.monotonic()
        ldm.load_state_dict(averaged.state_dict())


def make_optimizer(weights: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Muon for the matrices inside the networks, AdamW for the rest."""
    inside, rest = [], []
    for name, p in weights.items():
        # What touches pictures or latents has at most nine channels on that side
        is_inside = p.ndim > 1 and min(p.shape[:2]) > 9 and not name.endswith("embedding.weight")
        (inside if is_inside else rest).append(p)
    groups = [dict(params=inside, lr=0.005, muon=True), dict(params=rest, lr=1e-3, muon=False)]
    return Muon(groups, betas=(0.9, 0.99), weight_decay=0)


def read_checkpoint(out: Path, run: list[str], force: bool) -> dict:
    """The checkpoint of a run; where there is none, only what run it is. Raises InputError; also
    where there is a model but no checkpoint, unless force is given."""
    path = Path(f"{out}.checkpoint")
    if not path.exists():
        if out.exists() and not force:
            raise InputError(f"{out} exists, and no checkpoint to continue from; choose another "
                             "-o, or replace it with --force")
        return {"run": run}
    with input_errors(f"the checkpoint {path} is damaged", "choose another -o"):
        if zipfile.ZipFile(check_file(path)).testzip():     # PyTorch does not look at checksums
            raise ValueError("a checksum is wrong")
        found = torch.load(path, map_location="cpu", weights_only=True)
        check_header(found)
        if found["run"] != run:
            raise InputError(f"{path} is of another run ({found['run']}, not {run}: its --train, "
                             "--weights and --seed); choose another -o")
    return found


def new_model(config: Config, captions: list[str]) -> LatentDiffusion:
    """One that knows nothing yet but the pieces of these captions."""
    text = config.text
    tokenizer = Tokenizer.train(captions, text.vocab_size, text.max_length)
    text = replace(text, vocab_size=tokenizer.backend.get_vocab_size())
    with torch.device("meta"):            # only for its header
        header = [LatentDiffusion(replace(config, text=text), tokenizer).header()]
    if WORLD > 1:                         # the same pieces for all: which they are may be chance
        torch.distributed.broadcast_object_list(header)
    return LatentDiffusion.from_header(header[0])


def remove_leftovers(out: Path) -> None:
    """Removes what a killed run had half written. (Not for a name so long that write_whole cuts it:
    another run's may begin in the same way.)"""
    if len(out.name) < 30:
        for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.part"):
            leftover.unlink(missing_ok=True)


def join_processes(*batches: int) -> None:
    """Lets the processes that torchrun started find each other, each with a GPU of its own where
    there are any. Raises InputError unless they can share the batches."""
    if any(batch % WORLD for batch in batches):
        raise InputError(f"{WORLD} processes can't share batches of {batches} pictures evenly; "
                         "choose other batches, or another number of processes")
    if WORLD > 1 and not torch.distributed.is_initialized():
        if torch.accelerator.device_count() > 1:
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()
        # However training ends: a thread of the group that outlived Python would abort the process
        atexit.register(torch.distributed.destroy_process_group)


def train_model(source: str, out: str | Path, *, weights: str | Path | None = None,
                vae_steps: int = 20000, unet_steps: int = 20000, vae_batch: int = 16,
                unet_batch: int = 128, seed: int = 0, device: str = "auto",
                dtype: torch.dtype = torch.float32, save_minutes: float = 5.0,
                force: bool = False, config: Config = SHAPES) -> None:
    """Trains on "shapes" or on a folder and writes the weights file `out`.

    With `weights`, continues from that model, whose VAE stays as it is. An interrupted run
    continues from out + ".checkpoint". Raises InputError.
    """
    out = Path(out)
    check_settings(locals())
    check_output(out, ".safetensors")
    if dtype == torch.float16:
        raise InputError("in float16 gradients are too small to train with; use bfloat16")
    start = "nothing" if weights is None else os.path.realpath(weights)
    run = [source if source == "shapes" else os.path.realpath(source), start, str(seed)]
    checkpoint = read_checkpoint(out, run, force)
    remove_leftovers(out)
    join_processes(vae_batch, unet_batch)
    device = pick_device(device)
    torch.manual_seed(seed)
    ldm = None
    if "model" in checkpoint:
        ldm = LatentDiffusion.from_header(checkpoint)
    elif weights is not None:
        ldm = LatentDiffusion.load(weights, "cpu")
    config = ldm.config if ldm else config
    if config.unet.in_channels != config.vae.latent_channels or config.text_2:
        raise InputError(f"{config.name} can't be trained here")
    data = ShapesData(config.image_size, seed)
    if source != "shapes":
        data = FolderData(Path(source), config.image_size, seed)
    ldm = ldm or new_model(config, data.captions())
    ldm.config = replace(ldm.config, name=shortened(os.path.basename(os.path.abspath(source))))
    ldm.eval().to(device, memory_format=torch.channels_last)

    trainer = Trainer(ldm, data, out, seed, dtype, save_minutes, checkpoint)
    if weights is None and checkpoint.get("stage") != "unet":
        trainer.fit("vae", partial(trainer.first_stage, vae_batch // WORLD), vae_steps)
        trainer.measure_scale()
    trainer.fit("unet", partial(trainer.second_stage, unet_batch // WORLD), unet_steps)
    if RANK == 0:
        ldm.half().save(out)


# %% 14. Command line
# --------------------------------------------------------------------------------------------------
# Progress goes to stderr, the names of written files to stdout. Bad input is one line on stderr and
# exit code 2; only errors of this program itself show a traceback.

class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message}; see --help")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="tiny_ldm.py", allow_abbrev=False,
                            description="Makes a picture of a prompt, or trains a model.")
    add = parser.add_argument
    add("prompt", nargs="?", default="", help="what the picture should show")
    add("-o", "--output", help="the .png to write; with --train the .safetensors")
    add("--weights", help="another model than the built-in one; with --train, where to start")
    add("--device", default="auto", help="cpu, cuda or mps")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
        help="precision of the networks (float16: not for training)")
    add("--seed", type=int, default=0, help="another one gives another picture, or training")
    pictures = parser.add_argument_group("pictures", "What is not given is the model's own.")
    add = pictures.add_argument
    add("-n", "--count", type=int, default=1, help="how many, with seeds SEED, SEED + 1, ...")
    add("--steps", type=int, help="1 to 1000")
    add("--sampler", help=", ".join(SAMPLERS))
    add("--guidance-scale", type=float, help="how much the prompt counts")
    add("--eta", type=float, default=0.0, help="fresh noise in ddim, 0 to 1")
    add("--negative-prompt", help="what to steer away from")
    add("--width", type=int, help="in pixels")
    add("--height", type=int, help="in pixels")
    add("--image", help="a picture to begin with")
    add("--strength", type=float, default=0.75, help="how far from it, 0 to 1")
    add("--mask", help="repaint only where this picture is white")
    add("--film", help="also write how the picture formed: a strip (.png) or a .gif")
    add("--compile", action="store_true", help="faster networks, after a minute of compiling")
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--train", metavar="shapes|FOLDER", help="the Shapes world, or captioned pictures")
    add("--force", action="store_true", help="replace a model that is there")
    add("--vae-steps", type=int, default=20000, help="of stage 1")
    add("--unet-steps", type=int, default=20000, help="of stage 2")
    add("--unet-batch", type=int, default=128, help="pictures per step of stage 2")
    add("--save-minutes", type=float, default=5.0, help="between checkpoints")
    args = parser.parse_args(argv)
    for option in (pictures if args.train else training)._group_actions:
        if getattr(args, option.dest) != option.default:
            raise InputError(f"{option.option_strings[-1]} is only for {option.container.title}; "
                             "leave it out")
    return args


def parameters_text(args: argparse.Namespace, settings: dict, model: str) -> str:
    """The settings in the form that viewers of this field read from a PNG's text chunk
    `parameters`: the prompt, "Negative prompt: ...", and a line of "Name: value" pairs."""
    text = " ".join(args.prompt.split())
    if args.negative_prompt:
        text += f"\nNegative prompt: {' '.join(args.negative_prompt.split())}"
    line = ("Steps: {steps}, Sampler: {sampler}, CFG scale: {guidance_scale}, Seed: {seed}, "
            "Size: {width}x{height}, Model: ")
    return f"{text}\n{line.format_map(settings)}{model}"


def picture_paths(args: argparse.Namespace) -> list[Path]:
    """Where the pictures go: -o, or a name made of prompt and seed; if there are several, each name
    has its seed, too. Raises InputError if what is written would replace one another, or what is
    read."""
    words = re.sub(r"\W+", "-", args.prompt.lower())[:57].strip("-")
    path = Path(args.output or f"{words or 'picture'}.png")
    check_output(path, ".png")
    paths = [path]
    if args.count > 1 or not args.output:
        paths = [path.with_name(f"{path.stem}-{args.seed + i}.png") for i in range(args.count)]
    named = paths if args.output else []         # other names give way to what is there
    written = [os.path.realpath(file) for file in (*named, args.film) if file]
    read = [os.path.realpath(file) for file in (args.image, args.mask, args.weights) if file]
    if len({*written, *read}) < len(written) + len(set(read)):
        raise InputError("-o and --film must be different files, and not --image, --mask or "
                         "--weights")
    return paths


def free_name(path: Path, film: str | None) -> Path:
    """The first of x.png, x_2.png, x_3.png ... that does not exist and will not be the film's."""
    name, numbers = path, itertools.count(2)
    film = os.path.realpath(film or "")
    while os.path.lexists(name) or os.path.realpath(name) == film:
        name = path.with_name(f"{path.stem}_{next(numbers)}.png")
    return name


def make_pictures(args: argparse.Namespace) -> None:
    """What the command does without --train: the pictures one by one, so that each is the same to
    the bit as when it is made alone."""
    check_settings(vars(args))
    if not args.prompt.strip():
        raise InputError("the prompt is empty; say what the picture should show, like "
                         '"a red circle left of a blue square"')
    with input_errors("the prompt is not UTF-8 text", "check the terminal's encoding"):
        f"{args.prompt} {args.negative_prompt}".encode()
    paths = picture_paths(args)
    check_output(args.film or paths[0], ".png", ".gif")
    ldm = LatentDiffusion.load(args.weights, args.device, args.dtype)
    names = ("steps", "sampler", "guidance_scale", "eta", "strength", "image", "mask", "width",
             "height")
    settings = fit_pictures(ldm.config, **{name: getattr(args, name) for name in names})
    say_what_is_lost(ldm.tokenizer, args)
    if args.compile:
        compile_networks(ldm)
    films = []
    for settings["seed"], path in enumerate(paths, args.seed):
        guesses = []
        picture, = ldm.generate(args.prompt, args.negative_prompt, **settings,
                                on_step=lambda step: guesses.append(step.x0))
        if not args.output:                    # only now: another command may be at work here, too
            path = free_name(path, args.film)
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", parameters_text(args, settings, ldm.config.name))
        write_whole(path, partial(picture.save, format="PNG", pnginfo=info))
        print(path, flush=True)
        if args.film:                          # ten of the steps, from first to last
            shown = [guesses[round(i * (len(guesses) - 1) / 9)] for i in range(10)]
            films.append([to_pil(ldm.decode_latents(x0))[0] for x0 in shown])
    if args.film:
        write_whole(args.film, partial(save_film, films, args.film.lower().endswith(".gif")))
        print(args.film)


def save_film(films: list[list[Image.Image]], moving: bool, file: str) -> None:
    """A row for each picture's film, or all next to each other, moving."""
    if moving:
        frames = [Image.fromarray(np.hstack(frames)) for frames in zip(*films)]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=200, loop=0)
    else:
        rows = [np.hstack(film) for film in films]
        Image.fromarray(np.vstack(rows)).save(file, "PNG")


def say_what_is_lost(tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Says which end of the prompt is cut off, and which of its words the built-in model has never
    met."""
    rest = tokenizer.backend.encode(args.prompt).offsets[tokenizer.max_length - 2 :]
    if rest:
        say(f"the prompt is too long; cut off: {shortened(args.prompt[rest[0][0] :])}")
    known = tokenizer.backend.get_vocab()
    unknown = [word for word in re.findall(r"[^\W\d_]+", args.prompt.lower())
               if f"{word}</w>" not in known]
    if unknown and args.weights is None:
        say(f"the built-in model knows coloured shapes ({', '.join(COLOURS)}; "
            f"{', '.join(SHAPE_NAMES)}) and has never met: {shortened(', '.join(unknown))}; for "
            "other pictures get Stable Diffusion (see README.md)")


def run(argv: list[str] | None) -> None:
    """What the arguments ask for; None: the command line's. Raises InputError."""
    args = parse_args(argv)
    args.dtype = getattr(torch, args.dtype)
    if not args.train:
        make_pictures(args)
    elif args.prompt or not args.output:
        raise InputError("--train needs -o FILE.safetensors, where the model goes, and no prompt")
    else:
        settings = {name: value for name, value in vars(args).items()
                    if name in train_model.__kwdefaults__}
        train_model(args.train, args.output, **settings)
        if RANK == 0:
            print(args.output)


def main(argv: list[str] | None = None, command: Callable = run) -> int:
    """Runs a command and returns its exit code: 2, and one line on stderr, for bad input."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")       # one line is enough
            command(argv)
        print(end="", flush=True)      # a full disk, or a reader that is gone, shows itself now
        return 0
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception as error:
        message = str(error)
        if is_out_of_memory(error):
            message = (f"not enough memory ({message}); close other programs, use smaller "
                       "pictures or batches, or --dtype bfloat16")
        elif not isinstance(error, (InputError, OSError)):
            raise
        say(message)
        return 2


def console(command: Callable = run) -> None:
    """main as a program, also where stdout and stderr are closed or can't write every letter."""
    for ending in (signal.SIGINT, signal.SIGTERM):                # nothing half-written stays then
        if signal.getsignal(ending) != signal.SIG_IGN:            # as in a script's "command &"
            signal.signal(ending, signal.default_int_handler)
    sys.unraisablehook = lambda _: None           # of a progress bar that is interrupted
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(None, command))


if __name__ == "__main__" and not STEPPING:
    console()
