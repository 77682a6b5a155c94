"""One process of a small training on FOLDER/f, alone or with others under torchrun. Stage 1 has no
noise, so that the number of processes changes nothing in it but how sums are rounded. Writes the
model as FOLDER/NAME.safetensors, and as FOLDER/NAME.RANK the losses, the last weights and header:

    python .ci/shared_training.py FOLDER NAME
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny_ldm
from test_tiny_ldm import small_training

models, losses = [], []
real_model, real_train, real_loss = tiny_ldm.new_model, tiny_ldm.train, tiny_ldm.vae_loss


def new_model(*args):
    models.append(real_model(*args))
    return models[0]


def train(*args):
    for step, loss in real_train(*args):
        losses.append(loss)
        yield step, loss


def vae_loss(vae, image, noise):
    return real_loss(vae, image, 0 * noise)


if __name__ == "__main__":
    folder, name = sys.argv[1:]
    torch.set_num_threads(1)
    tiny_ldm.new_model, tiny_ldm.train, tiny_ldm.vae_loss = new_model, train, vae_loss
    small_training(f"{folder}/f", f"{folder}/{name}.safetensors", vae_steps=60, unet_steps=60,
                   vae_batch=8, unet_batch=32)
    last = models[0].half()
    torch.save((losses, {"header": last.header(), **last.state_dict()}),
               f"{folder}/{name}.{tiny_ldm.RANK}")
