"""Stable Diffusion 1.x, 2.x and XL next to the reference implementations: the same synthetic
checkpoint, inputs and noise go through our networks and samplers, and those of transformers and
diffusers. The tests compare narrow networks so. The command compares those of 1.x, 2.x and XL at
full size, and prints how far apart they are, and what converting and one step cost:

    python .ci/reference.py bpe_simple_vocab_16e6.txt.gz      (CLIP's vocabulary)

It takes 11 GB of disk, 16 GB of memory and 15 minutes, and ends with exit code 1 and a traceback
where a figure is over its limit.
"""
import argparse
import math
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import tiny_ldm
import weights_convert
from tiny_ldm import SD1, SD2, LatentDiffusion

SD1_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


# --------------------------------------------------------------------------------------------------
# A checkpoint like the official ones, of any width

TABLES = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod posterior_variance
    sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod
    sqrt_recipm1_alphas_cumprod posterior_log_variance_clipped posterior_mean_coef1
    posterior_mean_coef2""".split()


def synthetic(name: str, shape: tuple[int, ...], factor: float = 1.0) -> torch.Tensor:
    """Always the same numbers for a name, of a scale that keeps activations sane through the whole
    network; all but the norms' weights times factor."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    n = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
    return scaled(name, n, factor)


def scaled(name: str, n: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Normal numbers n, brought to the scale that a tensor of this official name needs."""
    if name.endswith("bias"):
        return 0.05 * factor * n
    if n.ndim == 1:
        return 1 + 0.1 * n
    return factor * (0.5 if "embedding" in name else math.prod(n.shape[1:]) ** -0.5) * n


def official_tensors(config: tiny_ldm.Config, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """A whole checkpoint in the official layout, with what else is in there."""
    entries = weights_convert.name_map(config).values()
    tensors = {e.official: synthetic(e.official, e.official_shape, factor) for e in entries}
    tensors.update((name, torch.zeros(1000)) for name in TABLES)
    alphas_cumprod = tiny_ldm.make_alphas_cumprod(config.schedule)
    tensors["alphas_cumprod"] = alphas_cumprod.float()
    before = torch.cat([torch.ones(1), alphas_cumprod[:-1]])
    tensors["betas"] = (1 - alphas_cumprod / before).float()
    tensors[f"{weights_convert.TEXT}.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    return tensors


# --------------------------------------------------------------------------------------------------
# The two of them, asked the same

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
def our_sd1_outputs(ldm: LatentDiffusion, dtype=torch.float64, steps: int = 10) -> dict:
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
def their_sd1_outputs(models: dict, dtype=torch.float64, steps: int = 10) -> dict:
    import diffusers
    (text, unet, vae), i = models.values(), inputs(dtype)
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


def reference_vae(c: tiny_ldm.Config, tensors: dict[str, torch.Tensor]):
    """diffusers' VAE, as wide as c says, with official tensors in it."""
    import diffusers
    from diffusers.loaders import single_file_utils as rules
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        block_out_channels=tuple(c.vae.channels * mult for mult in c.vae.channel_mult))
    vae.load_state_dict(rules.convert_ldm_vae_checkpoint(tensors, vae.config), assign=True)
    return vae


def reference_models(c: tiny_ldm.Config, tensors: dict[str, torch.Tensor]) -> tuple:
    """transformers' text encoder, diffusers' U-Net and VAE, as wide as c says, with official
    tensors in them, renamed by diffusers' own rules."""
    import diffusers
    import transformers
    from diffusers.loaders import single_file_utils as rules
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=c.text.vocab_size, hidden_size=c.text.width, hidden_act="quick_gelu",
        intermediate_size=4 * c.text.width, num_hidden_layers=c.text.num_layers,
        num_attention_heads=c.text.num_heads, bos_token_id=0, eos_token_id=1))
    unet = diffusers.UNet2DConditionModel(
        cross_attention_dim=c.text.width, attention_head_dim=8,
        block_out_channels=tuple(c.unet.channels * mult for mult in c.unet.channel_mult))
    prefix = f"{weights_convert.TEXT}."
    text_tensors = {name.removeprefix(prefix): t for name, t in tensors.items()
                    if name.startswith(prefix) and not name.endswith("position_ids")}
    getattr(text, "text_model", text).load_state_dict(text_tensors, assign=True)
    unet.load_state_dict(rules.convert_ldm_unet_checkpoint(tensors, unet.config), assign=True)
    vae = reference_vae(c, tensors)
    return tuple(model.eval().requires_grad_(False) for model in (text, unet, vae))


def sibling_shells(c: tiny_ldm.Config) -> dict:
    """transformers' text encoders and diffusers' U-Net for Stable Diffusion 2.x and XL, with
    whatever numbers they begin with."""
    import diffusers
    import transformers

    def text_config(text, layers, act):
        return transformers.CLIPTextConfig(
            vocab_size=text.vocab_size, hidden_size=text.width, intermediate_size=4 * text.width,
            num_hidden_layers=layers, num_attention_heads=text.num_heads, hidden_act=act,
            projection_dim=text.width, bos_token_id=0, eos_token_id=1)

    models, settings, depth = {}, {}, c.unet.transformer_depth
    down = ["CrossAttnDownBlock2D" if blocks else "DownBlock2D" for blocks in depth]
    heads = tuple(max(1, c.unet.channels * mult // 64) for mult in c.unet.channel_mult)
    if c.text_2:
        settings = dict(addition_embed_type="text_time", addition_time_embed_dim=256,
                        projection_class_embeddings_input_dim=c.text_2.width + 6 * 256,
                        transformer_layers_per_block=tuple(max(1, blocks) for blocks in depth))
        models["text_encoder"] = transformers.CLIPTextModel(
            text_config(c.text, c.text.num_layers, "quick_gelu"))
        models["text_encoder_2"] = transformers.CLIPTextModelWithProjection(
            text_config(c.text_2, c.text_2.num_layers, "gelu"))
    else:
        models["text_encoder"] = transformers.CLIPTextModel(
            text_config(c.text, c.text.num_layers - 1, "gelu"))
    models["unet"] = diffusers.UNet2DConditionModel(
        cross_attention_dim=c.context_dim, attention_head_dim=heads, use_linear_projection=True,
        down_block_types=down, up_block_types=[name.replace("Down", "Up") for name in down[::-1]],
        block_out_channels=tuple(c.unet.channels * mult for mult in c.unet.channel_mult),
        in_channels=c.unet.in_channels, **settings)
    return models


def reference_siblings(c: tiny_ldm.Config, tensors: dict[str, torch.Tensor]) -> dict:
    """The same for Stable Diffusion 2.x and XL: text_encoder, text_encoder_2 (XL), unet, vae."""
    from diffusers.loaders import single_file_utils as rules

    def open_clip(model, prefix):
        named = rules.convert_open_clip_checkpoint(model, tensors, prefix)
        named = {name.removeprefix("text_model."): t for name, t in named.items()}
        own = {name: named[name.removeprefix("text_model.")] for name in model.state_dict()}
        model.load_state_dict(own, assign=True)

    models = sibling_shells(c)
    if c.text_2:
        text = models["text_encoder"]
        prefix = "conditioner.embedders.0.transformer.text_model."
        named = {name.removeprefix(prefix): t for name, t in tensors.items()
                 if name.startswith(prefix) and not name.endswith("position_ids")}
        getattr(text, "text_model", text).load_state_dict(named, assign=True)
        open_clip(models["text_encoder_2"], "conditioner.embedders.1.model.")
    else:
        open_clip(models["text_encoder"], "cond_stage_model.model.")
    unet = models["unet"]
    unet.load_state_dict(rules.convert_ldm_unet_checkpoint(tensors, unet.config), assign=True)
    models["vae"] = reference_vae(c, tensors)
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


def padded(ids: torch.Tensor, pad: int) -> torch.Tensor:
    """Prompts of ids that end at place 9, with the end token 1."""
    ids = ids.clone()
    ids[ids == 1] = 2
    ids[:, 9], ids[:, 10:] = 1, pad
    return ids


SIZES = torch.tensor([[1024, 768, 5, 9, 128, 192]] * 2)       # unequal, so that their order shows


@torch.no_grad()
def our_sibling_outputs(ldm: LatentDiffusion, dtype=torch.float64, steps: int = 10) -> dict:
    i, xl = inputs(dtype), bool(ldm.config.text_2)
    ids = padded(i["ids"], 1 if xl else 0)
    text = tiny_ldm.Text(ldm.text_encoder(ids))
    vector = None
    if xl:
        ids = padded(i["ids"], 0)
        context, last = ldm.text_encoder_2.context_and_last(ids)
        text = tiny_ldm.Text(torch.cat([text.context, context], dim=-1),
                             ldm.text_encoder_2.pooled(last, ids, eos=1))
        vector = ldm.added_vector(text.pooled, SIZES)
    prompt = tiny_ldm.Text(*[part[:1] for part in text if part is not None])
    negative = None if xl else text.context[1:]
    *_, last = ldm.denoise(prompt, negative, sampler="euler_leading" if xl else "ddim", steps=steps,
                           guidance_scale=7.5, latents=i["start"])
    found = {"text encoder": text.context, "pooled": text.pooled}
    for t in (1, 981):
        found[f"U-Net, t = {t}"] = ldm.unet(i["x"], torch.tensor([t, t]), text.context, vector)
    found["VAE, encode"] = torch.cat(ldm.vae.encode(i["image"]), dim=1)
    found.update({"VAE, decode": ldm.vae.decode(i["z"]), "walk": last.x})
    return {name: t for name, t in found.items() if t is not None}


@torch.no_grad()
def their_sibling_outputs(models: dict, prediction: str, dtype=torch.float64, steps: int = 10
                          ) -> dict:
    import diffusers
    i, xl, found = inputs(dtype), "text_encoder_2" in models, {}
    ids = padded(i["ids"], 1 if xl else 0)
    hidden = models["text_encoder"](ids, output_hidden_states=True)
    context, negative, more, sizes = hidden.last_hidden_state, None, {}, SIZES.to(dtype)
    settings = dict(SD1_SCHEDULE, steps_offset=1, prediction_type=prediction)
    if xl:
        both = models["text_encoder_2"](padded(i["ids"], 0), output_hidden_states=True)
        context = torch.cat([hidden.hidden_states[-2], both.hidden_states[-2]], dim=-1)
        found["pooled"] = pooled = both.text_embeds
        more = dict(added_cond_kwargs=dict(text_embeds=pooled, time_ids=sizes))
        scheduler = diffusers.EulerDiscreteScheduler(**settings, timestep_spacing="leading")
        negative = torch.zeros_like(context[:1])
    else:
        scheduler = diffusers.DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=False)
        negative = context[1:]
    unet, vae = models["unet"], models["vae"]
    for t in (1, 981):
        found[f"U-Net, t = {t}"] = unet(i["x"], t, context, **more).sample
    scheduler.set_timesteps(steps)
    x = i["start"] * scheduler.init_noise_sigma
    if xl:
        size = torch.tensor([[128, 192, 0, 0, 128, 192]] * 2).to(dtype)
        vectors = torch.cat([torch.zeros_like(pooled[:1]), pooled[:1]])
        more = dict(added_cond_kwargs=dict(text_embeds=vectors, time_ids=size))
    for t in scheduler.timesteps:
        asked = scheduler.scale_model_input(torch.cat([x, x]), t)
        guesses = unet(asked, t, torch.cat([negative, context[:1]]), **more).sample
        without, with_prompt = guesses.chunk(2)
        x = scheduler.step(without + 7.5 * (with_prompt - without), t, x).prev_sample
    posterior = vae.encode(i["image"]).latent_dist
    return {"text encoder": context, **found,
            "VAE, encode": torch.cat([posterior.mean, posterior.logvar], dim=1),
            "VAE, decode": vae.decode(i["z"]).sample, "walk": x}


def is_sibling(c: tiny_ldm.Config) -> bool:
    return c.text_2 is not None or c.text.activation == "gelu"


def references(c: tiny_ldm.Config, tensors: dict[str, torch.Tensor]) -> dict:
    """The reference models of any of them: text_encoder, text_encoder_2 (XL), unet, vae."""
    if is_sibling(c):
        return reference_siblings(c, tensors)
    return dict(zip(("text_encoder", "unet", "vae"), reference_models(c, tensors)))


def our_outputs(ldm: LatentDiffusion, dtype=torch.float64, steps: int = 10) -> dict:
    """What any of our models answers, by what was asked. Last comes the end of a guided walk."""
    outputs = our_sibling_outputs if is_sibling(ldm.config) else our_sd1_outputs
    return outputs(ldm, dtype, steps)


def their_outputs(c: tiny_ldm.Config, models: dict, prediction: str = "eps", dtype=torch.float64,
                  steps: int = 10) -> dict:
    """The same of the reference models for a config."""
    if is_sibling(c):
        kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
        return their_sibling_outputs(models, kind, dtype, steps)
    return their_sd1_outputs(models, dtype, steps)


def with_lora(models: dict, lora: Path, scale: float) -> dict:
    """Reference models, to whose weights diffusers has added a LoRA."""
    import diffusers
    kind, others = diffusers.StableDiffusionPipeline, ["safety_checker", "feature_extractor"]
    if "text_encoder_2" in models:
        kind, others = diffusers.StableDiffusionXLPipeline, ["tokenizer_2"]
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1)
    pipeline = kind(**models, **dict.fromkeys(["tokenizer", *others]), scheduler=scheduler)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return {part: getattr(pipeline, part) for part in models}


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
        "euler_leading": ("EulerDiscrete", leading),
        "euler_trailing": ("EulerDiscrete", dict(timestep_spacing="trailing")),
        "euler_a_trailing": ("EulerAncestralDiscrete", dict(timestep_spacing="trailing")),
        "dpmpp_2m": ("DPMSolverMultistep", {}),
        "dpmpp_2m_karras": ("DPMSolverMultistep", dict(use_karras_sigmas=True)),
        "lcm": ("LCM", {})}[sampler]
    kind = getattr(diffusers, f"{name}Scheduler")
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


def their_walk(sampler: str, network, start: torch.Tensor, steps: int, **settings
               ) -> tuple[list[float], list[torch.Tensor]]:
    """diffusers' timesteps, and the latents after each, on a network that predicts ε."""
    scheduler, walk = reference_scheduler(sampler), []
    scheduler.set_timesteps(steps)
    x = scheduler.init_noise_sigma * start
    for t in scheduler.timesteps:
        eps = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(eps, t, x, **settings).prev_sample
        walk.append(x)
    return scheduler.timesteps.tolist(), walk


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# --------------------------------------------------------------------------------------------------
# In single precision, all the way to the picture

# What float32 on a CPU allows: max error over max value.
LIMITS = {"text encoder": 2e-6, "U-Net": 5e-6, "VAE": 3e-6, "DDIM": 5e-6, "walk": 1e-5}


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


def written(d: Path, config, vocabulary: Path, factor: float) -> tuple[Path, Path, dict]:
    """A synthetic checkpoint, and what the command converts it to: (source, weights, figures)."""
    source, out = d / "official.safetensors", d / "t.safetensors"
    rows = {e.official: ([synthetic(e.official, e.official_shape, factor)], e.official_shape)
            for e in weights_convert.name_map(config).values()}
    weights_convert.write_safetensors(source, rows, torch.float32, {})
    del rows
    peak, seconds = measured("weights_convert", source, "-o", out, "--tokenizer", vocabulary,
                             "--force")
    assert peak <= 1.2e9          # one tensor at a time: all of them are 4 to 5 GB
    return source, out, {"conversion: seconds": seconds,
                         "conversion: GB written": out.stat().st_size / 1e9,
                         "conversion: GB of memory at the peak": peak / 1e9}


def comparison(d: Path, config, vocabulary: Path, steps: int, factor: float = 1.0) -> dict:
    """Writes a checkpoint, converts it by the command, and compares all networks, a whole walk and
    its picture with the references', in float32. One of the two models is in memory at a time."""
    import diffusers
    source, out, found = written(d, config, vocabulary, factor)
    models = references(config, load_file(source))
    theirs = their_outputs(config, models, "eps", torch.float32, steps)
    vae = models["vae"]
    last = list(theirs)[-1]
    finish = diffusers.image_processor.VaeImageProcessor().postprocess
    their_picture = finish(vae.decode(theirs[last] / config.scale_factor).sample, "pil")[0]
    exact = vae.double().decode(inputs(torch.float64)["z"]).sample
    rounding = relative_error(theirs["VAE, decode"], exact)
    del models, vae
    ldm = LatentDiffusion.load(out, "cpu")
    ours = our_outputs(ldm, torch.float32, steps)
    our_picture = tiny_ldm.to_pil(ldm.decode_latents(ours[last]))[0]
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


@torch.no_grad()
def xl_at_full_size() -> dict[str, float]:
    """Text encoders and U-Net of XL, in float32, one after the other, since the U-Net alone has 10
    GB. There is no file: both models hold the same tensors, by the converter's names."""
    c, generator, found = tiny_ldm.SDXL, torch.Generator().manual_seed(0), {}
    with torch.device("meta"):
        shells, ldm = sibling_shells(c), LatentDiffusion(c, None)
    contexts, pooled, text = [], None, inputs(torch.float32)["ids"]
    for part, theirs in shells.items():
        ours, tensors, named = getattr(ldm, part), {}, {}
        for name, entry in weights_convert.name_map(c).items():
            if name.startswith(f"{part}."):
                # By PyTorch, which is quicker than `synthetic`: XL has 3,500 million numbers
                t = scaled(entry.official, torch.randn(entry.shape, generator=generator))
                tensors[name.removeprefix(f"{part}.")] = t
                named[entry.diffusers.removeprefix(f"{part}.")] = t
        ours.load_state_dict(tensors, assign=True)
        for name in theirs.state_dict():      # transformers puts text_model. before some of them
            named[name] = named.pop(name.removeprefix("text_model."))
        theirs.load_state_dict(named, assign=True)
        for module in theirs.modules():       # what no file holds
            if hasattr(module, "position_ids"):
                module.position_ids = torch.arange(c.text.max_length)[None]
        theirs.eval()
        del tensors, named
        if part == "unet":
            x = torch.randn(2, 4, 32, 32, generator=generator)
            context = torch.cat(contexts, dim=-1)
            for t in (1, 981):
                wanted = theirs(x, t, context, added_cond_kwargs=dict(
                    text_embeds=pooled, time_ids=SIZES.float())).sample
                given = ours(x, torch.tensor([t, t]), context, ldm.added_vector(pooled, SIZES))
                found[f"U-Net, t = {t}"] = relative_error(given, wanted)
        else:
            ids = padded(text, 0 if part == "text_encoder_2" else 1)
            wanted = theirs(ids, output_hidden_states=True)
            context, last = ours.context_and_last(ids)
            found[part] = relative_error(context, wanted.hidden_states[-2])
            contexts.append(context)
            if part == "text_encoder_2":
                pooled = ours.pooled(last, ids, eos=1)
                found["pooled"] = relative_error(pooled, wanted.text_embeds)
        theirs.to("meta")
        ours.to("meta")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares Stable Diffusion at full size.")
    parser.add_argument("vocabulary", type=Path)
    vocabulary = parser.parse_args(argv).vocabulary.resolve()
    for config, steps in ((SD1, 50), (SD2, 25)):
        with tempfile.TemporaryDirectory() as d:
            found = comparison(Path(d), config, vocabulary, steps)
            peak, seconds = measured("tiny_ldm", "an astronaut", "--weights",
                                     Path(d) / "t.safetensors", "--device", "cpu", "--steps", 1,
                                     "-o", Path(d) / "p.png")
        found["one step at 512 x 512 and all around it: seconds"] = seconds
        found["one step at 512 x 512 and all around it: GB of memory at the peak"] = peak / 1e9
        print(config.name)
        for name, value in found.items():
            print(f"    {name}: {value:.3g}")
    print(tiny_ldm.SDXL.name)
    for name, value in xl_at_full_size().items():
        print(f"    {name}: {value:.3g}")
        assert value <= LIMITS["U-Net" if name.startswith("U-Net") else "text encoder"], name
    return 0


if __name__ == "__main__":
    sys.exit(main())
