"""Small networks for tests that take a text beside the image: one answers questions, one writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from camserve.types.tokenisers import Words

QUESTION = ("which", "is", "left", "right")
CAPTION = ("zero", "one", "two", "three", "end")


class Looking(nn.Module):
    """A small network that looks where its text tells it to."""

    def __init__(self, words: tuple[str, ...], example: str, outputs: int, end: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.words, self.head = nn.Embedding(len(words), 8), nn.Linear(8, outputs)
        self.tokeniser = Words(words, example, max_length=4, end=end)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        maps, asked = self.features(x), self.words(tokens).sum(dim=1)
        looks = torch.einsum("nc,nchw->nhw", asked, maps).flatten(1).softmax(dim=1)
        return self.head(3 * torch.einsum("np,ncp->nc", looks, maps.flatten(2)) + asked)


class ReadIn(Looking):
    """The same, but the image is read with the text in mind from the first layer on."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return super().forward(x * (1 + self.words(tokens).sum(dim=1).mean(dim=1).tanh())[:, None, None, None], tokens)


def asking() -> Looking:
    return Looking(QUESTION, "which is left", 5)


def writing(kind: type[Looking] = Looking) -> Looking:
    return kind(CAPTION, "", 5, end=4)
