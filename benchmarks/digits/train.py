"""Trains the classifier of digit scenes that `camserve evaluate --benchmark digits` explains.

    python benchmarks/digits/train.py                  # src/camserve/evaluation/digits/weights.safetensors
    python benchmarks/digits/train.py --scenes 640 --out /tmp/w.safetensors    # does it run?

Trains on scenes of one digit each, prints the accuracy on held-out scenes made from digit images that training never
saw, and fails below 95 %. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from camserve.evaluation.digits.network import PREPROCESSING, DigitsNet
from camserve.evaluation.digits.scenes import Split, make_scene

WEIGHTS = Path(__file__).resolve().parents[2] / "src/camserve/evaluation/digits/weights.safetensors"
BATCH = 64
TRAIN_SEED, HELD_OUT_SEED = 0, 1
LEAST_ACCURACY = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=50_048, help="of one digit, each seen once")
    parser.add_argument("--held-out", type=int, default=32 * BATCH, help="scenes that the accuracy is measured on")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    given = parser.parse_args()
    module = train(given.scenes)
    accuracy = held_out_accuracy(module, given.held_out // BATCH)
    print(f"accuracy on {given.held_out // BATCH * BATCH} held-out scenes: {accuracy:.2%}")
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, given.out)
    print(f"written to {given.out}")
    if accuracy < LEAST_ACCURACY:
        sys.exit(f"the accuracy must be at least {LEAST_ACCURACY:.0%}")


def train(scenes: int) -> DigitsNet:
    torch.manual_seed(0)
    module = DigitsNet().train()
    steps = scenes // BATCH
    optimiser = torch.optim.AdamW(module.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps)
    for step, (x, classes) in enumerate(batches(TRAIN_SEED, steps, "train")):
        loss = nn.functional.cross_entropy(module(x), classes, label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return module.eval()


@torch.inference_mode()
def held_out_accuracy(module: DigitsNet, count: int) -> float:
    right = 0
    for x, classes in batches(HELD_OUT_SEED, count, "test"):
        right += int((module(x).argmax(dim=1) == classes).sum())
    return right / (count * BATCH)


def batches(seed: int, count: int, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields normalised scenes (BATCH, 3, 96, 96) of one digit and their classes (BATCH,)."""
    mean, std = torch.tensor(PREPROCESSING.mean), torch.tensor(PREPROCESSING.std)
    for number in range(count):
        scenes = [make_scene(seed, number * BATCH + index, 1, split) for index in range(BATCH)]
        pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
        classes = torch.tensor([int(scene.boxes[0].label) for scene in scenes])
        yield ((pixels / 255 - mean) / std).permute(0, 3, 1, 2), classes


if __name__ == "__main__":
    main()
