"""Trains a network of digit scenes that is shipped with camserve.

    OMP_NUM_THREADS=1 python benchmarks/digits/train.py digits-multilabel   # into the package
    python benchmarks/digits/train.py digits-multilabel --measure           # how well do the shipped weights answer?
    python benchmarks/digits/train.py digits-vit --scenes 640 --out /tmp/w.safetensors    # does it run?

Trains on scenes that are each seen once, prints how well it answers on held-out scenes made from digit images that
training never saw, and fails where that is less than it should be. What was printed of shipped weights is kept in
`figures.json`, and in the table of `README.md`, both beside this file. Seeds are fixed. It takes one to five minutes on
one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from camserve.evaluation.digits.asked import END, NAMES, QUESTIONS, answer, in_order
from camserve.evaluation.digits.scenes import BACKGROUND, SIZE_PX, Scene, Split
from camserve.evaluation.digits.shipped import PREPROCESSING, SHIPPED, Shipped
from camserve.evaluation.digits.tasks import Task, size_px
from camserve.evaluation.digits.towers import PROMPTS, TEXTS, digits_in
from camserve.evaluation.digits.towers import truths as texts_true
from camserve.evaluation.truth import TrueBox

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402  # beside the programs of the folder above

WEIGHTS = HERE.parents[1] / "src/camserve/evaluation/digits/weights"
FIGURES, README = HERE / "figures.json", HERE / "README.md"
BATCH = 64
CELLS = 12
"""Cells of masks that hide digits, and of the maps of networks that take a text, in both directions."""
ABSENT = 10.0
"""Weight of the squares of cosines that are to be 0."""
LOOKS = 0.3
"""Weight of how much of a look lies on what it is about."""
TOLD = 0.5
"""Weight of what the maps of cells say of digits."""
COUNTED = 0.5
"""Weight of where the number of what is counted comes from."""
QUIET = 1.0
"""Weight of what maps have where no digit is."""
FAINT = (0.0, 0.1, 0.2, 0.3)
"""Shares of what masks hide that stay visible, where a text is beside the scene: those of methods rarely hide all."""
TRAIN_SEED, HELD_OUT_SEED = 0, 1


Loss = Callable[[Any, Tensor, Tensor, Sequence[Scene]], Tensor]
"""Takes the network, normalised scenes, what is true of them, and the scenes."""


def one_class(module: Any, x: Tensor, truths: Tensor, scenes: Sequence[Scene]) -> Tensor:
    return functional.cross_entropy(module(x), truths.argmax(dim=1), label_smoothing=0.05)


def yes_or_no(module: Any, x: Tensor, truths: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Returns the binary cross-entropy of each output, smoothed as much as that of `one_class`."""
    return functional.binary_cross_entropy_with_logits(module(x), 0.025 + 0.95 * truths)


def places(module: Any, x: Tensor, truths: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Returns the cross-entropy of the places; the background, most of a scene, counts a fifth."""
    logits = module(x)
    weights = logits.new_ones(logits.shape[1])
    weights[BACKGROUND] = 0.2
    return functional.cross_entropy(logits.flatten(2), truths.long(), weights, label_smoothing=0.05)


def numbers(module: Any, x: Tensor, truths: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Returns how wrong the numbers of scenes are, those of each digit's cells, and what the cells of no digit say.

    Of the scene alone a network learns as well, but the cell that says the size lies anywhere near the digit.
    """
    cells = module.cells(x)
    owners = torch.tensor([number for number, scene in enumerate(scenes) for _ in scene.boxes])
    of_digits = torch.stack([cells_of(box, cells.shape[2]) for scene in scenes for box in scene.boxes])
    each = torch.tensor([[float(box.label), size_px(box)] for scene in scenes for box in scene.boxes])
    free = torch.stack([~of_digits[owners == number].any(dim=0) for number in range(len(scenes))])
    of_scenes = error(module.pooled(cells, torch.ones_like(free)), truths)
    outside = (cells[:, 0].abs() + cells[:, 1].relu())[free].mean()
    return of_scenes + error(module.pooled(cells[owners], of_digits), each) + outside


def texts(module: Any, x: Tensor, truths: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Returns the contrastive loss of scenes and texts, in both directions: each true pair against all false ones.

    A pair that is neither is in neither; texts of one digit weigh as much as those of two. Cosines to texts of which no
    digit is there are to be 0: what masks leave over then fits no text by chance.
    """
    x, boxes = partly_shown(x, scenes)
    truths = truths.clone()
    for number, scene in enumerate(scenes):
        if boxes[number] != scene.boxes:
            truths[number] = torch.tensor(texts_true(boxes[number])) if boxes[number] else 0
    named = torch.tensor([[float(digit in digits_in(text)) for text in TEXTS] for digit in range(len(PROMPTS))])
    cosines = module.similarity(x, TEXTS)
    logits = module.text_encoder.log_scale.exp() * cosines
    false = logits.masked_fill(truths != 0, -torch.inf)
    of_one = torch.arange(len(TEXTS)) < len(PROMPTS)
    one, two = (truths == 1) & of_one, (truths == 1) & ~of_one
    losses = [torch.logaddexp(logits, false.logsumexp(dim, keepdim=True)) - logits for dim in (0, 1)]
    contrast = sum(each[true].sum() / true.sum().clamp(min=1) for each in losses for true in (one, two))
    there = torch.zeros(len(scenes), len(PROMPTS))
    for row, found in enumerate(boxes):
        there[row, [int(box.label) for box in found]] = 1
    absent = there @ named == 0  # named: (digits, texts)
    return contrast + ABSENT * sum(cosines[absent & some].square().mean() for some in (of_one, ~of_one))


def partly_shown(
    x: Tensor, scenes: Sequence[Scene], faint: Sequence[float] = (0.0,)
) -> tuple[Tensor, list[tuple[TrueBox, ...]]]:
    """Returns the scenes, of every fourth one digit alone, of every eighth none, as masks of cells show them.

    The boxes are those of the digits that each shows. What is hidden stays visible as faintly as `faint` says, which
    one scene after another takes.
    """
    x, shown = x.clone(), [scene.boxes for scene in scenes]
    for number, scene in enumerate(scenes):
        cells = torch.stack([cells_of(box, CELLS) for box in scene.boxes])
        if number % 4 == 0:
            kept = number // 4 % len(cells)
            mask, shown[number] = cells[kept], scene.boxes[kept : kept + 1]
        elif number % 8 == 1:
            mask, shown[number] = ~cells.any(dim=0), ()
        else:
            continue
        shown_share = functional.interpolate(mask[None, None].float(), SIZE_PX, mode="bilinear")[0]
        left = faint[number // 8 % len(faint)]
        x[number] *= left + (1 - left) * shown_share
    return x, shown


Asking = tuple[int, str, int | None, Sequence[TrueBox]]
"""Which scene is asked, with which text, the answer, None where nothing tells it, and the boxes that it is about."""


def asked_of(module: Any, x: Tensor, truths: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Returns how wrong the answers to all questions about scenes are, beside what `looking` and `counting` add.

    Where a mask hides all digits, every answer is to be as likely: what masks leave over then answers nothing by
    chance.
    """
    x, shown = partly_shown(x, scenes, FAINT)
    asks = [(row, question, *answer(question, boxes)) for row, boxes in enumerate(shown) for question in QUESTIONS]
    maps = module.features(x)
    told = looking(module, maps, shown, [ask for ask in asks if ask[2] is not None or not shown[ask[0]]])
    return told + COUNTED * counting(module, maps, [answer(QUESTIONS[-1], boxes)[1] for boxes in shown])


def written_of(module: Any, x: Tensor, truths: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Returns how wrong each next word of the captions is, beside what `looking` adds.

    Behind words for digits that a mask hides, the next word is that for the next digit which is shown: masks of one
    digit alone say its word whatever was said before.
    """
    x, shown = partly_shown(x, scenes, FAINT)
    asks: list[Asking] = []
    for row, scene in enumerate(scenes):
        whole, seen = in_order(scene.boxes), in_order(shown[row])
        for said in dict.fromkeys((whole, seen)):
            for at in range(len(said) + 1):
                so_far = " ".join(NAMES[int(box.label)] for box in said[:at])
                rest = [box for box in said[at:] if box in seen][:1]
                asks.append((row, so_far, int(rest[0].label) if rest else END, rest))
    return looking(module, module.features(x), shown, asks)


def looking(module: Any, maps: Tensor, shown: Sequence[Sequence[TrueBox]], asks: Sequence[Asking]) -> Tensor:
    """Returns the loss of what is asked, of where the network looks, and of what its maps say of each cell.

    Of the answers alone a network learns as well, but what it looks at is then wider than the digit, and maps that say
    a digit are not only on it. Maps are to have nothing where no digit is: what shows the background alone, or with all
    digits, tells nothing of any.
    """
    rows, said, found, about = zip(*asks, strict=True)
    words = {text: text_of(module, text) for text in dict.fromkeys(said)}
    numbers, looks = module.looked(maps[list(rows)], torch.stack([words[text] for text in said]))
    told = torch.tensor([one is not None for one in found])
    wrong = functional.cross_entropy(
        numbers[told], torch.tensor([one for one in found if one is not None]), label_smoothing=0.05
    )
    untold = -numbers[~told].log_softmax(dim=1).mean(dim=1)
    on = torch.stack([cells_inside(boxes) if boxes else torch.ones(CELLS, CELLS, dtype=torch.bool) for boxes in about])
    inside = (looks * on.flatten(1)).sum(dim=1).clamp(min=1e-6)
    return (
        (wrong * told.sum() + untold.sum()) / len(asks)
        - LOOKS * inside.log().mean()
        + TOLD * cells_wrong(module.head(maps.movedim(1, 3)), shown)
        + QUIET * maps.movedim(1, 3)[free(shown)].mean()
    )


def counting(module: Any, maps: Tensor, counted: Sequence[Sequence[TrueBox]]) -> Tensor:
    """Returns how far the shares of a number are from 1 in the box of each digit that counts, and from 0 elsewhere.

    Of the answers alone a network learns to count whatever there is more of where there are fewer sevens: the
    background. The answer is then as right, but what speaks for "one" lies everywhere but on the seven.
    """
    shares = module.shares(maps, text_of(module, QUESTIONS[-1])[None]).unflatten(1, (CELLS, CELLS))
    inside = torch.stack(
        [cells_of_all(boxes) if boxes else torch.zeros(CELLS, CELLS, dtype=torch.bool) for boxes in counted]
    )
    each = [(shares[row] * cells_inside([box])).sum() for row, boxes in enumerate(counted) for box in boxes]
    outside = (shares * ~inside).sum(dim=(1, 2)).mean()
    return outside + ((torch.stack(each) - 1).abs().mean() if each else 0)


def text_of(module: Any, text: str) -> Tensor:
    """Returns the sum (32,) of the vectors of a text's words."""
    vectors: Tensor = module.words(torch.tensor(module.tokeniser.tokens(text), dtype=torch.long)).sum(dim=0)
    return vectors


def free(shown: Sequence[Sequence[TrueBox]]) -> Tensor:
    """Returns which cells (n, 12, 12) are of no digit."""
    none = torch.ones(CELLS, CELLS, dtype=torch.bool)
    return torch.stack([~cells_of_all(boxes) if boxes else none for boxes in shown])


def cells_wrong(numbers: Tensor, shown: Sequence[Sequence[TrueBox]]) -> Tensor:
    """Returns how wrong numbers (n, 12, 12, outputs) of cells are as logits of each digit being there.

    Where a digit is counts as much as where it is not.
    """
    there, near = (torch.zeros(*numbers.shape[:3], len(NAMES), dtype=torch.bool) for _ in range(2))
    for row, boxes in enumerate(shown):
        for box in boxes:
            there[row, :, :, int(box.label)] |= cells_inside([box])
            near[row, :, :, int(box.label)] |= cells_of(box, CELLS)
    of_digits = numbers[..., : len(NAMES)]
    return functional.softplus(-of_digits[there]).mean() + functional.softplus(of_digits[~near]).mean()


def cells_inside(boxes: Sequence[TrueBox]) -> Tensor:
    """Returns which cells (12, 12) have their middles in the boxes: a map whose maximum is there points into one.

    Of a box that has no such cell they are those that it touches.
    """
    middles = (torch.arange(CELLS) + 0.5) * (SIZE_PX / CELLS)
    each = [
        ((middles >= box.top) & (middles < box.bottom))[:, None] & ((middles >= box.left) & (middles < box.right))
        for box in boxes
    ]
    return torch.stack(
        [found if found.any() else cells_of(box, CELLS) for found, box in zip(each, boxes, strict=True)]
    ).any(dim=0)


def cells_of_all(boxes: Sequence[TrueBox]) -> Tensor:
    return torch.stack([cells_of(box, CELLS) for box in boxes]).any(dim=0)


def error(found: Tensor, truths: Tensor) -> Tensor:
    return functional.smooth_l1_loss(found / 10, truths / 10, beta=0.1)


def boxes(module: Any, x: Tensor, truths: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Returns how wrong a detector's centres are (the focal loss of CenterNet, eq. 1), and its edges at the centres."""
    logits, distances = module.cells(x)
    cells = logits.shape[2]
    owners = torch.tensor([number for number, scene in enumerate(scenes) for _ in scene.boxes])
    each = torch.tensor([[b.left, b.top, b.right, b.bottom] for scene in scenes for b in scene.boxes])
    classes = torch.tensor([int(box.label) for scene in scenes for box in scene.boxes])
    centres = (each[:, :2] + each[:, 2:]) / 2 * (cells / SIZE_PX)  # in cells, x and y
    middle = torch.arange(cells) + 0.5
    apart = (middle - centres[:, 1:])[:, :, None] ** 2 + (middle - centres[:, :1])[:, None, :] ** 2
    wanted = torch.zeros_like(logits)
    for owner, label, near in zip(owners, classes, torch.exp(-apart), strict=True):  # a cell is the unit
        wanted[owner, label] = torch.maximum(wanted[owner, label], near)
    columns, rows = centres.long().clamp(max=cells - 1).T
    wanted[owners, classes, rows, columns] = 1
    probabilities, at = logits.sigmoid().clamp(1e-4, 1 - 1e-4), wanted == 1
    right = (1 - probabilities) ** 2 * probabilities.log() * at
    wrong = (1 - wanted) ** 4 * probabilities**2 * (1 - probabilities).log() * ~at
    middles = torch.stack([columns, rows], dim=1).add(0.5) * (SIZE_PX / cells)
    edges = torch.cat([middles - each[:, :2], each[:, 2:] - middles], dim=1)
    found = distances[owners, :, rows, columns]
    return -(right + wrong).sum() / len(each) + functional.l1_loss(found, edges) / 4


def cells_of(box: TrueBox, cells: int) -> Tensor:
    """Returns which cells (cells, cells) of a scene the box touches."""
    starts = torch.arange(cells) * (SIZE_PX / cells)
    ends = starts + SIZE_PX / cells
    rows, columns = (starts < box.bottom) & (ends > box.top), (starts < box.right) & (ends > box.left)
    return rows[:, None] & columns


@dataclass(frozen=True)
class Recipe:
    loss: Loss
    scenes: int = 50_048
    rate: float = 5e-3
    decay: float = 1e-2
    stem: Callable[[Any], nn.Sequential] | None = None
    """Returns the convolutions that start as the first ones of `digits`; None: all weights start at random."""
    half: bool = False
    """Whether the weights are kept in float16."""


RECIPES = {
    "digits": Recipe(one_class),
    "digits-multilabel": Recipe(yes_or_no, scenes=96_000),
    "digits-binary": Recipe(yes_or_no, scenes=80_000),
    "digits-value": Recipe(numbers, scenes=96_000, rate=8e-3),
    "digits-text-image": Recipe(texts, scenes=96_000, rate=8e-3, half=True),
    "digits-segmentation": Recipe(places, scenes=64_000, rate=8e-3, half=True),
    "digits-boxes": Recipe(boxes, scenes=64_000, rate=8e-3, half=True),
    "digits-answers": Recipe(asked_of, scenes=80_000, rate=8e-3, half=True),
    "digits-tokens": Recipe(written_of, scenes=96_000, rate=8e-3, half=True),
    "digits-vit": Recipe(one_class, scenes=48_000, rate=1e-3, decay=5e-2, stem=lambda vit: vit.conv_proj[:3]),
    "digits-vit-timm": Recipe(
        one_class,
        scenes=48_000,
        rate=1e-3,
        decay=5e-2,
        stem=lambda vit: vit.patch_embed.backbone,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=RECIPES)
    parser.add_argument("--scenes", type=int, help="to learn from, each seen once")
    parser.add_argument("--held-out", type=int, default=32 * BATCH, help="scenes that the figures are measured on")
    parser.add_argument("--measure", action="store_true", help="the weights that are shipped, without training")
    parser.add_argument("--out", type=Path, help="default: the weights that are shipped, with their figures")
    given = parser.parse_args()
    network, recipe = SHIPPED[given.network], RECIPES[given.network]
    module = network.trained() if given.measure else train(network, recipe, given.scenes or recipe.scenes)
    if recipe.half:
        module = module.half().float()  # the figures are those of the weights as they are kept
    count = given.held_out // BATCH
    figures = held_out_figures(module, network.task, count)
    print(
        f"on {count * BATCH} held-out scenes: " + ", ".join(f"{name}: {value:.4f}" for name, value in figures.items())
    )
    if not given.measure:
        out = given.out or WEIGHTS / f"{network.name}.safetensors"
        kept = module.half() if recipe.half else module
        save_file({key: value.contiguous() for key, value in kept.state_dict().items()}, out)
        print(f"written to {out}")
    if given.out is None:
        record(network.name, {"held_out": count * BATCH, "figures": figures})
    if next(iter(figures.values())) < network.task.least:
        sys.exit(f"the first figure must be at least {network.task.least}")


def record(name: str, found: dict[str, Any]) -> None:
    """Keeps the figures of a network beside those of the others, and makes the table anew."""
    kept = json.loads(FIGURES.read_text())
    kept[name] = found
    kept = {each: kept[each] for each in SHIPPED if each in kept}
    FIGURES.write_text(json.dumps(kept, indent=2) + "\n")
    README.write_text(common.embedded(README.read_text(), "figures", table(kept)))


def table(kept: dict[str, Any]) -> str:
    """Returns the README's table of the networks that are shipped."""
    lines = ["| network | learns | weights | of | reaches |", "| --- | --- | ---: | ---: | --- |"]
    for name, row in kept.items():
        task, size = SHIPPED[name].task, (WEIGHTS / f"{name}.safetensors").stat().st_size
        cells = [f"`{name}`", task.question, f"{size / 1e3:.0f} kB", f"{RECIPES[name].scenes:,} scenes"]
        lines.append("| " + " | ".join([*cells, task.told.format(**row["figures"])]) + " |")
    return "\n".join(lines)


def train(network: Shipped, recipe: Recipe, scenes: int) -> nn.Module:
    torch.manual_seed(0)
    module = network.build().train()
    if recipe.stem is not None:
        start_as_digits(recipe.stem(module))
    steps = scenes // BATCH
    optimiser = torch.optim.AdamW(module.parameters(), weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=recipe.rate, total_steps=steps)
    for step, batch in enumerate(batches(network.task, TRAIN_SEED, steps, "train")):
        loss: Tensor = recipe.loss(module, *batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return module.eval()


def start_as_digits(stem: nn.Sequential) -> None:
    """Gives convolutions the weights of the first ones of `digits`.

    A transformer that starts at random hardly learns anything of so few scenes.
    """
    for mine, learnt in zip(stem, SHIPPED["digits"].trained().get_submodule("features").children(), strict=False):
        mine.load_state_dict(learnt.state_dict())


@torch.inference_mode()
def held_out_figures(module: nn.Module, task: Task, count: int) -> dict[str, float]:
    answers = [
        (task.answers(module, x).numpy(), truths.numpy())
        for x, truths, _ in batches(task, HELD_OUT_SEED, count, "test")
    ]
    outputs, truths = (np.concatenate(part) for part in zip(*answers, strict=True))
    return dict(task.figures(outputs, truths))


def batches(task: Task, seed: int, count: int, split: Split) -> Iterator[tuple[Tensor, Tensor, list[Scene]]]:
    """Yields normalised scenes (BATCH, 3, 96, 96), what is true of them (BATCH, K), and the scenes."""
    mean, std = torch.tensor(PREPROCESSING.mean), torch.tensor(PREPROCESSING.std)
    for number in range(count):
        scenes = [task.scene(seed, number * BATCH + index, split) for index in range(BATCH)]
        pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
        truths = torch.tensor([task.truth(scene) for scene in scenes])
        yield ((pixels / 255 - mean) / std).permute(0, 3, 1, 2), truths, scenes


if __name__ == "__main__":
    main()
