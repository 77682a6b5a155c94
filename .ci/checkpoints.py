"""What the tests give the converter: narrow checkpoints, with every name of Stable Diffusion 1.x,
2.x and XL on layers a tenth as wide; as diffusers' folders, with LoRAs, and on a hub.
"""
import contextlib
import http.server
import json
import os
import random
import re
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import torch
from safetensors.torch import load_file, save_file

import tiny_ldm
import weights_convert
from tiny_ldm import SD1, SD1_INPAINT, SD2, SDXL, Config, Tokenizer, caption_of, random_scene

Tensors = dict[str, torch.Tensor]


# --------------------------------------------------------------------------------------------------
# A small vocabulary, and the narrow models' sizes

def some_captions(count: int) -> list[str]:
    return [caption_of(random_scene(random.Random(i))) for i in range(count)]


def small_tokenizer(length: int) -> Tokenizer:
    """At most 500 tokens, learned from captions of the Shapes world."""
    return Tokenizer.train(some_captions(300), 500, length)


def write_vocabulary(folder: Path, model: dict) -> None:
    """A tokenizer's tables as vocab.json and merges.txt."""
    folder.mkdir()
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


VOCABULARY = small_tokenizer(77).backend
TOKENS = VOCABULARY.get_vocab_size()
VAE = replace(SD1.vae, channels=32)
NARROW = replace(SD1, text=tiny_ldm.TextConfig(TOKENS, width=64, num_layers=2, num_heads=1),
                 vae=VAE, unet=replace(SD1.unet, channels=32))
NARROW_INPAINT = replace(NARROW, name=SD1_INPAINT.name, unet=replace(NARROW.unet, in_channels=9))
NARROW_2 = replace(
    SD2, text=replace(SD2.text, vocab_size=TOKENS, width=64, num_layers=3, num_heads=1),
    vae=VAE, unet=replace(SD2.unet, channels=64))
NARROW_XL = replace(
    SDXL, text=replace(SDXL.text, vocab_size=TOKENS, width=64, num_layers=3, num_heads=1),
    text_2=replace(SDXL.text_2, vocab_size=TOKENS, width=128, num_layers=3, num_heads=2,
                   pooled_dim=128),
    vae=VAE, unet=replace(SDXL.unet, channels=32, vector_dim=128 + 6 * 256))


def split_unet(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """An official file's tensors: (the U-Net's, the others)."""
    unet = {name: t for name, t in tensors.items() if name.startswith(weights_convert.UNET)}
    return unet, {name: t for name, t in tensors.items() if name not in unet}


def averaged(unet: Tensors) -> Tensors:
    """A U-Net under the names that an official file gives its average."""
    names = {name: name.removeprefix("model.").replace(".", "") for name in unet}
    return {f"model_ema.{names[name]}": t for name, t in unet.items()}


# --------------------------------------------------------------------------------------------------
# diffusers' folders

UNET_FILE = "diffusion_pytorch_model"


def write_folder(folder: Path, tensors: Tensors, config: Config = NARROW) -> None:
    """Official tensors as a diffusers folder with a tokenizer."""
    parts = {"unet": {}, "vae": {}, "text_encoder": {}}
    for entry in weights_convert.name_map(config).values():
        part, _, name = entry.diffusers.partition(".")
        parts[part][name] = tensors[entry.official]
    for part, named in parts.items():
        (folder / part).mkdir(parents=True)
        save_file(named, folder / weights_convert.part_files(part)[0])
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(VOCABULARY.to_str())


def as_shards(folder: Path) -> None:
    """The U-Net in two files and an index."""
    file = folder / "unet" / f"{UNET_FILE}.safetensors"
    tensors, where = load_file(file), {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        name = f"{UNET_FILE}-{i:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in names}, folder / "unet" / name)
        where.update(dict.fromkeys(names, name))
    Path(f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    file.unlink()


def as_variant(variant: str, folder: Path) -> None:
    """The U-Net in a variant's file alone."""
    file = folder / "unet" / f"{UNET_FILE}.safetensors"
    file.rename(file.with_name(f"{UNET_FILE}.{variant}.safetensors"))


def as_cache(folder: Path) -> None:
    """As the hub's cache has it, with a later snapshot that is not of its main branch."""
    parts = [path for path in folder.iterdir() if path.is_dir()]
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaaa")
    (folder / "snapshots" / "aaaa").mkdir(parents=True)
    for part in parts:
        part.rename(folder / "snapshots" / "aaaa" / part.name)
    (folder / "snapshots" / "bbbb").mkdir()
    os.utime(folder / "snapshots" / "aaaa", (0, 0))


def as_years_ago(folder: Path) -> None:
    """With pickles and a variant, the VAE's names before diffusers 0.15, and the text encoder's
    before transformers 5, with old files' buffer."""
    files = {"unet": f"{UNET_FILE}.bin", "vae": f"{UNET_FILE}.fp16.safetensors",
             "text_encoder": "pytorch_model.bin"}
    for part, name in files.items():
        file = folder / weights_convert.part_files(part)[0]
        tensors = load_file(file)
        file.unlink()
        if part == "vae":
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                             ("to_out.0", "proj_attn")):
                new, old = f".attentions.0.{new}.", f".attentions.0.{old}."
                tensors = {key.replace(new, old): t for key, t in tensors.items()}
        if part == "text_encoder":
            tensors = {f"text_model.{key}": t for key, t in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save = torch.save if name.endswith("bin") else save_file
        save(tensors, folder / part / name)


@contextlib.contextmanager
def local_hub(folder: Path, repository: str) -> Iterator[str]:
    """A server that speaks for the hub and has one repository, which is this folder. Gives its
    address."""
    sha, files = "f" * 40, [path for path in folder.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    info = {"id": repository, "sha": sha, "siblings": [{"rfilename": name} for name in sizes]}
    tree = [{"type": "file", "path": name, "size": size, "oid": "0"}
            for name, size in sizes.items()]
    for name, answer in (("info", info), ("tree", tree)):
        (folder.parent / f"{name}.json").write_text(json.dumps(answer))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            if path.startswith(f"/api/models/{repository}"):
                return str(folder.parent / ("tree.json" if "/tree/" in path else "info.json"))
            return str(folder / (path.partition(f"/{repository}/resolve/{sha}/")[2] or "nowhere"))

        def end_headers(self):
            self.send_header("X-Repo-Commit", sha)
            self.send_header("ETag", f'"{zlib.crc32(self.path.encode()):x}"')
            super().end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


# --------------------------------------------------------------------------------------------------
# LoRAs

# Each spelling that is about, for the same few layers of the narrow models: ours, and its name in
# the file without what follows
LORAS = {
    "kohya": {
        "unet.down_blocks.1.1.blocks.0.self_attention.to_q":
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.5.1.blocks.0.cross_attention.to_out":
            "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_out_0",
        "unet.mid_block.1.proj_in": "lora_unet_mid_block_attentions_0_proj_in",
        "unet.up_blocks.3.1.blocks.0.feed_forward.proj_in":
            "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "unet.up_blocks.2.0.conv1": "lora_unet_up_blocks_0_resnets_2_conv1",
        "unet.down_blocks.3.0.conv": "lora_unet_down_blocks_0_downsamplers_0_conv",
        "text_encoder.layers.0.attention.to_v":
            "lora_te_text_model_encoder_layers_0_self_attn_v_proj",
        "text_encoder.layers.0.attention.to_out":
            "lora_te_text_model_encoder_layers_0_self_attn_out_proj",
        "text_encoder.layers.1.fc1": "lora_te_text_model_encoder_layers_1_mlp_fc1"},
    "kohya XL": {
        "unet.down_blocks.4.1.blocks.1.self_attention.to_q":
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        "unet.mid_block.1.blocks.9.cross_attention.to_k":
            "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k",
        "unet.up_blocks.5.1.proj_out": "lora_unet_output_blocks_5_1_proj_out",
        "text_encoder.layers.0.attention.to_out":
            "lora_te1_text_model_encoder_layers_0_self_attn_out_proj",
        "text_encoder_2.layers.1.attention.to_k":
            "lora_te2_text_model_encoder_layers_1_self_attn_k_proj",
        "text_encoder_2.layers.1.attention.to_out":
            "lora_te2_text_model_encoder_layers_1_self_attn_out_proj"},
    "diffusers, 2022": {
        "unet.down_blocks.1.1.blocks.0.self_attention.to_q":
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora",
        "unet.mid_block.1.blocks.0.cross_attention.to_out":
            "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora"},
    "diffusers, 2023": {
        "unet.down_blocks.1.1.blocks.0.self_attention.to_q":
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora",
        "unet.mid_block.1.proj_out": "unet.mid_block.attentions.0.proj_out.lora",
        "text_encoder.layers.0.attention.to_out":
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora",
        "text_encoder.layers.0.fc2":
            "text_encoder.text_model.encoder.layers.0.mlp.fc2.lora_linear_layer"},
    "peft": {
        "unet.down_blocks.1.1.blocks.0.self_attention.to_q":
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.up_blocks.2.0.conv1": "unet.up_blocks.0.resnets.2.conv1",
        "text_encoder.layers.1.attention.to_q":
            "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"}}

# The two tensors of a layer, by whose file it is
ENDINGS = {"kohya": ("lora_down.weight", "lora_up.weight"),
           "diffusers": ("down.weight", "up.weight"), "peft": ("lora_A.weight", "lora_B.weight")}


def a_lora(spelling: str, config: Config, rank: int = 2, alpha: float = 3.0
           ) -> tuple[Tensors, Tensors]:
    """A LoRA in one of LORAS' spellings: (the file's tensors, what it adds to ours at scale 1)."""
    tensors, added = {}, {}
    down_name, up_name = ENDINGS[re.split("[ ,]", spelling)[0]]
    random = torch.Generator().manual_seed(0)
    for ours, theirs in LORAS[spelling].items():
        entry = weights_convert.name_map(config)[f"{ours}.weight"]
        shape = entry.shape if ours.startswith("text") else entry.official_shape
        down = torch.randn(rank, *shape[1:], generator=random)
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=random)
        tensors[f"{theirs}.{down_name}"], tensors[f"{theirs}.{up_name}"] = down, up
        factor = 1.0
        if spelling.startswith("kohya"):
            tensors[f"{theirs}.alpha"], factor = torch.tensor(alpha), alpha / rank
        change = factor * up.flatten(1) @ down.flatten(1)
        added[f"{ours}.weight"] = change.reshape(entry.shape)
    return tensors, added
