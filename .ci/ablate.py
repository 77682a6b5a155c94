"""What matters to the built-in model? Trains its U-Net and text encoder from nothing, once as
`--train` does and once for each thing left out, and judges each on held-out (colour, shape) pairs.

    python .ci/ablate.py FOLDER --steps 600 --captions 150

All start from the VAE of the built-in model and from the same random weights, see the same
pictures, and train at the same time, so that they share the machine. What FOLDER holds already is
used: a run that was interrupted goes on.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
CHANGES = ("as it is", "without caption dropout", "text encoder frozen, as random as it began",
           "AdamW in place of Muon")
SCALES = (1.0, 2.0, 3.0)


def file_of(folder, name):
    return folder / f"{name.replace(',', '').replace(' ', '-')}.safetensors"


def make_start(file):
    """The built-in model, with a U-Net and a text encoder that have learned nothing yet."""
    import torch
    import tiny_ldm
    ldm = tiny_ldm.LatentDiffusion.load(device="cpu")
    torch.manual_seed(0)
    fresh = tiny_ldm.LatentDiffusion(ldm.config, ldm.tokenizer)
    fresh.vae.load_state_dict(ldm.vae.state_dict())
    fresh.save(file)


def drop_no_captions():
    """From now on every picture is trained with its caption."""
    import torch
    import tiny_ldm
    as_it_is = tiny_ldm.text_to_image_loss

    def loss(ldm, x0, ids, **settings):
        none = torch.zeros(len(ids), dtype=torch.bool)
        return as_it_is(ldm, x0, ids, dropped=none, **settings)

    tiny_ldm.text_to_image_loss = loss


def freeze_text_encoder():
    """From now on only the U-Net is trained."""
    import torch
    import tiny_ldm
    as_it_is = tiny_ldm.make_optimizer

    def make_optimizer(weights):
        return as_it_is({name: p for name, p in weights.items() if name.startswith("unet.")})

    tiny_ldm.make_optimizer = make_optimizer
    tiny_ldm.TextEncoder.forward = torch.no_grad()(tiny_ldm.TextEncoder.forward)


def use_adamw():
    """From now on AdamW trains everything."""
    import torch
    import tiny_ldm

    def make_optimizer(weights):
        return torch.optim.AdamW(weights.values(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)

    tiny_ldm.make_optimizer = make_optimizer


def train(name, args):
    """The training of one of CHANGES, in this process."""
    import tiny_ldm
    if "dropout" in name:
        drop_no_captions()
    if "frozen" in name:
        freeze_text_encoder()
    if "AdamW" in name:
        use_adamw()
    start = args.folder / "start.safetensors"
    tiny_ldm.train_model("shapes", file_of(args.folder, name), weights=start,
                         unet_steps=args.steps)


def table(args):
    import judge
    import tiny_ldm
    judge.print_head("held-out pairs", *[f"guidance scale {scale:g}" for scale in SCALES])
    for name in CHANGES:
        ldm = tiny_ldm.LatentDiffusion.load(file_of(args.folder, name))
        cells = []
        for scale in SCALES:
            judged = judge.prompt_following(ldm, "held-out", args.captions, steps=25,
                                            sampler="euler_a", guidance_scale=scale)
            cells.append(f"{100 * judge.right(judged):.0f} %")
        judge.print_row(name, *cells)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("--steps", type=int, default=600)
    ap.add_argument("--captions", type=int, default=150)
    ap.add_argument("--train", choices=CHANGES, help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.train:
        return train(args.train, args)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "start.safetensors").exists():
        make_start(args.folder / "start.safetensors")
    threads = str(max(1, os.cpu_count() // len(CHANGES)))
    runs = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--train", name],
                             env={**os.environ, "OMP_NUM_THREADS": threads},
                             stderr=open(file_of(args.folder, name).with_suffix(".log"), "w"))
            for name in CHANGES]
    if any([run.wait() for run in runs]):
        sys.exit(f"a training failed; see the .log files in {args.folder}")
    table(args)


if __name__ == "__main__":
    main()
