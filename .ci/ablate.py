"""What does it matter to the built-in model? Trains its U-Net and text encoder from nothing, once as
`--train` does and once for each thing left out, and judges each on held-out (colour, shape) pairs.

    python .ci/ablate.py FOLDER --steps 1500 --captions 150

All start from the VAE of the built-in model and from the same random weights, see the same pictures,
and train at the same time, so that they share the machine. What FOLDER holds already is used: a run
that was interrupted goes on.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
CHANGES = {"as it is": {}, "without caption dropout": {"caption_dropout": 0.0},
           "text encoder frozen, as random as it began": {"second_stage": ("unet.",)}}
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


def train(name, args):
    """The training of one of CHANGES, in this process."""
    import torch
    import tiny_ldm
    for setting, value in CHANGES[name].items():
        setattr(tiny_ldm.Trainer, setting, value)
    tiny_ldm.train("shapes", file_of(args.folder, name), weights=args.folder / "start.safetensors",
                   unet_steps=args.steps, dtype=getattr(torch, args.dtype))


def table(args):
    import tiny_ldm
    import test_tiny_ldm as tests
    print("| held-out pairs | " + " | ".join(f"guidance scale {scale:g}" for scale in SCALES) + " |")
    print("|---" * (1 + len(SCALES)) + "|")
    for name in CHANGES:
        ldm, row = tiny_ldm.LatentDiffusion.load(file_of(args.folder, name)), []
        for scale in SCALES:
            judged = tests.prompt_following(ldm, "held-out", args.captions, steps=25,
                                            sampler="euler_a", guidance_scale=scale)
            row.append(f"{100 * tests.right(judged):.0f} %")
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("--steps", type=int, default=1500)
    ap.add_argument("--captions", type=int, default=150)
    ap.add_argument("--dtype", default="bfloat16")
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
