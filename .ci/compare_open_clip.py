"""Does open_clip itself, the package that Stable Diffusion 2.x and XL took their text encoder from,
give the same vectors as ours? In float64, with narrow checkpoints in the official layout:

    pip install open_clip_torch && python .ci/compare_open_clip.py

It needs torchvision, and that a build of PyTorch like its own, so .ci/run leaves it out.
"""
import sys
import tempfile
from pathlib import Path

import open_clip.model
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import weights_convert
from checkpoints import NARROW_2, NARROW_XL, VOCABULARY
from reference import official_tensors, relative_error
from tiny_ldm import Config, LatentDiffusion


@torch.no_grad()
def errors(config: Config, folder: Path) -> dict[str, float]:
    """How far our context, and for XL our pooled vector, are from open_clip's."""
    is_xl = config.text_2 is not None
    tensors = official_tensors(config)
    save_file(tensors, folder / "official.safetensors")
    (folder / "tokenizer.json").write_text(VOCABULARY.to_str())
    out = folder / "ours.safetensors"
    assert weights_convert.main([str(folder / "official.safetensors"), "-o", str(out), "--force",
                                 "--tokenizer", str(folder / "tokenizer.json")]) == 0
    ldm = LatentDiffusion.load(out, "cpu", torch.float64)
    c, ours, prefix = config.text, ldm.text_encoder, weights_convert.OPEN_TEXT
    if is_xl:
        c, ours, prefix = config.text_2, ldm.text_encoder_2, weights_convert.XL_TEXT_2
    tower = open_clip.model._build_text_tower(c.width, open_clip.model.CLIPTextCfg(
        context_length=77, vocab_size=c.vocab_size, width=c.width, heads=c.num_heads,
        layers=c.num_layers)).double()
    own = {name: tensors.get(f"{prefix}.{name}", t) for name, t in tower.state_dict().items()}
    tower.load_state_dict(own)
    ids = ldm.tokenizer(["a red ring", "two blue stars"])
    x = tower.token_embedding(ids) + tower.positional_embedding
    for block in tower.transformer.resblocks[:-1]:
        x = block(x, attn_mask=tower.attn_mask)
    last = tower.transformer.resblocks[-1](x, attn_mask=tower.attn_mask)
    context, our_last = ours.context_and_last(ids)
    if not is_xl:
        return {"2.x, context": relative_error(context, tower.ln_final(x))}
    eos = ldm.tokenizer.eos
    first_eos = (ids == eos).int().argmax(dim=1)
    pooled = tower.ln_final(last)[torch.arange(2), first_eos] @ tower.text_projection
    return {"XL, context": relative_error(context, x),
            "XL, pooled": relative_error(ours.pooled(our_last, ids, eos), pooled)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for config in (NARROW_2, NARROW_XL):
            for name, error in errors(config, Path(folder)).items():
                print(f"{name}: {error:.1e}")
                assert error <= 1e-12
