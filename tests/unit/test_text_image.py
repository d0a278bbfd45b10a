"""Networks beside which a text has a vector as well: what their prompts are, and what texts are asked of them."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

from camserve import Engine, cli
from camserve.archive import build_archive, read_card
from camserve.archive.prompts import MAX_PROMPTS, given_prompts
from camserve.errors import CamserveError, Internal, InvalidInput, InvalidOption, NotFound, Unsupported
from camserve.methods import GradCam, ScoreCam
from camserve.types import Contrast, Item, ItemResult, Preprocessing, Target, Task, Text, Vector
from camserve.worker.executor import Executor
from camserve.worker.network import Network, load_network

PREPROCESSING = Preprocessing(resize_px=64, crop_px=tiny.TINY_SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
SOURCE = "camserve_test_towers:towers"
DIMENSION = 4
PROMPTS = ("a cat", "a dog", "the cat sat")


class Letters(nn.Module):
    """A text encoder: a token for each letter, and the sum of the letters' rows."""

    max_length = 20
    scale = 30.0

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(128, DIMENSION)
        self.asked = Counter[str]()

    def tokens(self, text: str) -> list[int]:
        if not text.isascii():
            raise InvalidOption(f"this model reads ASCII, got {text!r}")
        return list(text.encode())

    def encode(self, texts: list[str]) -> torch.Tensor:
        self.asked.update(texts)
        return torch.stack([self.vector(text) for text in texts])

    def vector(self, text: str) -> torch.Tensor:
        if text in ("nan", "inf"):
            return torch.full((DIMENSION,), float(text))
        if text == "crash":
            raise RuntimeError("a secret of the model's owner")
        rows: torch.Tensor = self.rows(torch.tensor(self.tokens(text)))
        return 0 * rows[0] if text == "zero" else rows.sum(dim=0)


def towers() -> nn.Module:
    torch.manual_seed(7)
    module = tiny.tiny_module()
    module[-1] = nn.Linear(16, DIMENSION)
    return Beside(module, Letters()).eval()


class Beside(nn.Module):
    """Runs the tower of images alone, and offers the other one beside it."""

    def __init__(self, images: nn.Module, texts: nn.Module) -> None:
        super().__init__()
        self.images, self.text_encoder = images, texts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.images(x)


def other_length() -> nn.Module:
    module = towers()
    module.images[-1] = nn.Linear(16, DIMENSION + 1)
    return module


def no_encoder() -> nn.Module:
    return towers().images


def half_an_encoder() -> nn.Module:
    module = towers()
    module.text_encoder = nn.Identity()
    return module


def forgetful() -> nn.Module:
    """Counts its letters from another one on each time that it is built, as a vocabulary of Python's `hash` does."""
    module = towers()
    BUILT.append(len(BUILT))
    module.text_encoder.tokens = lambda text, shift=BUILT[-1]: [(code + shift) % 128 for code in text.encode()]
    return module


BUILT: list[int] = []


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """The networks above as a package that an archive names."""
    monkeypatch.setitem(sys.modules, "camserve_test_towers", sys.modules[__name__])


def engine(prompts: object = PROMPTS, module: nn.Module | None = None) -> Engine:
    return Engine(module or towers(), preprocessing=PREPROCESSING, outputs="text-image", prompts=prompts)


def packed(store: Path, source: str = SOURCE, prompts: object = PROMPTS, **options: object) -> Path:
    given = {"outputs": "text-image", "preprocessing": PREPROCESSING, "name": "towers"} | options
    return build_archive(source, store=store, prompts=prompts, **given)


def cosine(module: nn.Module, image: np.ndarray, vector: torch.Tensor) -> float:
    """The cosine as its formula says, in float64, of a picture that is the network's own input."""
    x = ((torch.from_numpy(image.copy()).double() / 255 - 0.5) / 0.25).permute(2, 0, 1)[None]
    found = module.double()(x)[0].detach().tolist()
    other = vector.detach().double().tolist()
    lengths = [math.sqrt(sum(a * a for a in some)) for some in (found, other)]
    return sum(a * b for a, b in zip(found, other, strict=True)) / math.prod(lengths)


IMAGE = tiny.pixels(3)


def test_a_texts_score_is_the_cosine_of_the_two_vectors():
    answer = engine().explain(IMAGE, ["grad_cam", "score_cam"], ["text:a cow, asleep", Text("a cat")])
    module = towers()
    for saliency, words in zip(answer.maps, ["a cow, asleep", "a cat"] * 2, strict=True):
        assert saliency.target_text == f"text:{words}"
        assert saliency.score == pytest.approx(cosine(module, IMAGE, module.text_encoder.vector(words)), abs=1e-6)
        assert saliency.target.similarity == saliency.score
        assert saliency.classes == ()


def test_prompts_are_said_with_their_cosine_and_softmax_of_it_times_the_scale():
    answer = engine().explain(IMAGE, top_predictions=9)
    module = towers()
    cosines = {name: cosine(module, IMAGE, module.text_encoder.vector(name)) for name in PROMPTS}
    total = sum(math.exp(30 * one) for one in cosines.values())
    assert [one.label for one in answer.predictions] == sorted(PROMPTS, key=cosines.get, reverse=True)
    for one in answer.predictions:
        assert one.similarity == pytest.approx(cosines[one.label], abs=1e-6)
        assert one.probability == pytest.approx(math.exp(30 * cosines[one.label]) / total, rel=1e-4)
    assert answer.maps[0].target == answer.predictions[0], "without a target it is the nearest prompt"
    assert answer.maps[0].score == answer.predictions[0].similarity
    assert answer.predictions[0].figure.startswith("similarity ")


def test_a_probability_is_never_said_to_be_none():
    module = towers()
    module.text_encoder.scale = 1e4
    answer = engine(module=module).explain(IMAGE, top_predictions=3)
    assert [one.probability > 0 for one in answer.predictions] == [True] * 3
    assert sum(one.probability for one in answer.predictions) == pytest.approx(1)


def test_a_prompt_is_a_class_and_the_text_of_the_same_words_has_its_map():
    answer = engine().explain(IMAGE, [("group_cam", {"groups": 4})], ["a dog", "text:a dog"])
    first, second = answer.maps
    assert (first.target.label, first.target_text) == ("a dog", "a dog")
    assert first.score == pytest.approx(second.score, abs=1e-6)
    np.testing.assert_allclose(first.array, second.array, rtol=0, atol=1e-4)  # float32 vectors of a prompt


def test_contrasts_of_prompts_are_differences_of_cosines():
    answer = engine().explain(IMAGE, ["grad_cam"], ["contrast:a dog>0.5*a cat,the cat sat", "against:a dog", "finer:0"])
    said = {one.label: one.similarity for one in engine().explain(IMAGE, []).predictions}
    others = (said["a cat"] + said["the cat sat"]) / 2
    assert answer.maps[0].score == pytest.approx(said["a dog"] - 0.5 * others, abs=1e-6)
    assert answer.maps[1].score == pytest.approx(-said["a dog"], abs=1e-6)
    assert answer.maps[2].target_text == "contrast:a cat>0.6*a dog,the cat sat"


def test_an_image_or_a_vector_may_be_asked_for_as_well():
    vector = np.arange(1.0, DIMENSION + 1)
    answer = engine(None).explain(IMAGE, ["grad_cam"], [Vector(vector), Vector(image=IMAGE)])
    assert answer.maps[0].score == pytest.approx(cosine(towers(), IMAGE, torch.tensor(vector)), abs=1e-6)
    assert answer.maps[1].score == pytest.approx(1, abs=1e-6)
    assert answer.predictions == ()


REFUSED = [
    ("x" * 21, InvalidOption, "a text has at most 20 tokens here, got 21: 'xxx"),
    ("café", InvalidOption, "this model reads ASCII"),
    ("nan", Unsupported, "the vector of the text 'nan' has numbers that are not finite"),
    ("inf", Unsupported, "the vector of the text 'inf' has numbers that are not finite"),
    ("zero", Unsupported, "the vector of the text 'zero' is all zeros: nothing is similar to it"),
    ("crash", Internal, "internal error"),
]


@pytest.mark.parametrize(("words", "kind", "message"), REFUSED)
def test_a_text_without_a_vector_is_its_own_error_and_its_neighbour_is_unharmed(words, kind, message):
    executor = Executor(network())
    tasks = (Task(0, GradCam(), 0, 0), Task(1, ScoreCam(), 0, 16))
    good = Item(IMAGE, (Text("a cow"),), tasks)
    alone = executor.execute([good]).outcomes[0]
    step = executor.execute([good, Item(IMAGE, (Text("a dog"), Text(words)), tasks), good])
    first, bad, last = step.outcomes
    assert isinstance(bad, kind), bad
    assert message in str(bad)
    assert "secret" not in str(bad)
    for one in (first, last):
        assert isinstance(one, ItemResult)
        assert [each.target for each in one.targets] == [each.target for each in alone.targets]
        assert one.targets[0].score == pytest.approx(
            alone.targets[0].score, abs=1e-6
        )  # float32, in passes of other sizes
        for found, expected in zip(one.partials, alone.partials, strict=True):
            np.testing.assert_allclose(found.sums, expected.sums, rtol=0, atol=1e-5)  # other micro-batches


def network(module: nn.Module | None = None, **options: object) -> Network:
    return Network(module or towers(), preprocessing=PREPROCESSING, outputs="text-image", **options)


def test_a_vector_of_another_length_than_the_networks_is_refused():
    with pytest.raises(InvalidOption, match="the network's vectors have 5 numbers, its text encoder's 4"):
        engine(module=other_length())
    with pytest.raises(InvalidOption, match="the network's vectors have 5 numbers, the target's 4"):
        engine(None, other_length()).explain(IMAGE, ["grad_cam"], [Text("a cat")])


@pytest.mark.parametrize(
    ("answer", "came"),
    [
        (lambda texts: torch.zeros(DIMENSION), r"got torch\.float32 \[4\]"),
        (lambda texts: torch.ones(1), r"got torch\.float32 \[1\]"),
        (lambda texts: torch.zeros(2, DIMENSION), r"got torch\.float32 \[2, 4\]"),
        (lambda texts: torch.ones(1, DIMENSION, dtype=torch.long), r"got torch\.int64 \[1, 4\]"),
        (lambda texts: [[1.0] * DIMENSION], "got list"),
    ],
)
def test_what_is_no_vector_of_each_text_is_refused(answer, came):
    module = towers()
    module.text_encoder.encode = answer
    with pytest.raises(Unsupported, match=rf"gives vectors of the shape \[1, dimension\], {came}"):
        engine(None, module).explain(IMAGE, ["grad_cam"], [Text("a cat")])


def test_a_text_is_encoded_once_for_a_worker_as_long_as_there_is_room():
    module = towers()
    asked = module.text_encoder.asked
    item = Item(IMAGE, (Text("a cat"), Text("a dog")), (Task(0, ScoreCam(), 0, 4),))
    executor = Executor(network(module), memory_bytes=2**20)
    made = [executor.execute([item]).made.get("opening", 0) for _ in range(3)]
    assert asked == {"a cat": 1, "a dog": 1}
    assert made == [3, 0, 0], "an image and two texts, all of which are remembered"
    small = Executor(network(module), memory_bytes=8 * DIMENSION + len("text:a cat"))
    for words in ("a cat", "a cat", "a dog", "a cat"):
        small.execute([Item(None, (Text(words),), ())])
    assert asked == {"a cat": 3, "a dog": 2}, "there is room for one"
    forgetful = Executor(network(module))
    forgetful.execute([item])
    forgetful.execute([item])
    assert asked == {"a cat": 5, "a dog": 4}, "an engine's network may be trained from one call to the next"


def test_the_encoder_runs_in_eval_mode_without_gradients_and_is_left_as_it_was():
    module = towers().train()
    seen = []
    encode = module.text_encoder.encode

    def watched(texts):
        seen.append((module.text_encoder.training, torch.is_grad_enabled()))
        return encode(texts)

    module.text_encoder.encode = watched
    engine(PROMPTS[:1], module).explain(IMAGE, ["grad_cam"], [Text("a cat")])
    assert seen == [(False, False)] * 2
    assert module.text_encoder.training
    assert module.text_encoder.rows.weight.requires_grad


def test_curves_are_of_the_text():
    (found,) = engine().explain(IMAGE, ["grad_cam"], ["text:a cow"], evaluate=True, evaluation_steps=4).maps
    assert found.faithfulness.deletion[0] == pytest.approx(found.score, abs=1e-6)
    assert found.faithfulness.insertion[-1] == pytest.approx(found.score, abs=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (no_encoder, "outputs text-image need a text_encoder beside the network, .*no attribute of this name"),
        (half_an_encoder, "it has no max_length, scale, tokens, encode"),
    ],
)
def test_a_network_without_text_encoder_is_refused(build, message):
    with pytest.raises(InvalidOption, match=message):
        engine(module=build())


def test_prompts_are_packed_as_vectors_and_the_encoder_beside_them(tmp_path):
    path = packed(tmp_path)
    card = read_card(path)
    assert (card.outputs, card.labels) == ("text-image", PROMPTS)
    loaded = load_network(path, device="cpu", runtime="eager")
    assert (loaded.info.labels, loaded.info.dimension) == (PROMPTS, DIMENSION)
    rows = towers().text_encoder
    for vector, words in zip(loaded.references.vectors, PROMPTS, strict=True):
        expected = torch.nn.functional.normalize(rows.vector(words).detach(), dim=0)
        np.testing.assert_allclose(vector, expected, rtol=1e-6)
    found = Executor(loaded).execute([Item(IMAGE, (Text("a cow"), Target(index=1)), ())]).outcomes[0]
    direct = engine().explain(IMAGE, ["grad_cam"], ["text:a cow", "a dog"])
    assert [one.score for one in found.targets] == pytest.approx([one.score for one in direct.maps], abs=1e-6)
    others = packed(tmp_path / "others", prompts=PROMPTS[:2])
    assert load_network(others).info.weights != loaded.info.weights, "kept replies must not be mixed"


def test_without_prompts_there_are_no_predictions_and_a_text_is_asked(tmp_path):
    loaded = load_network(packed(tmp_path, prompts=None), device="cpu", runtime="eager")
    assert (loaded.info.labels, loaded.references) == ((), None)
    found = Executor(loaded).execute([Item(IMAGE, (Text("a cow"),), ())]).outcomes[0]
    assert found.targets[0].score == pytest.approx(engine().explain(IMAGE, ["grad_cam"], ["text:a cow"]).maps[0].score)
    with pytest.raises(InvalidOption, match="no prompts are packed with it: say what to be similar to, by text"):
        engine(None).explain(IMAGE)


def test_several_prompts_of_one_name_are_averaged_by_direction():
    given = {"cat": ["a cat", "the cat sat"], "dog": "a dog"}
    held = engine(given)
    rows = towers().text_encoder
    each = [torch.nn.functional.normalize(rows.vector(words).detach(), dim=0) for words in given["cat"]]
    (found,) = held.explain(IMAGE, ["grad_cam"], ["cat"]).maps
    assert found.score == pytest.approx(cosine(towers(), IMAGE, sum(each)), abs=1e-6)
    assert held.info.labels == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a cat\r\n a dog \n", {"a cat": ("a cat",), "a dog": ("a dog",)}),
        ("\ufeffa café\n", {"a café": ("a café",)}),
        ('["a cat", "a dog"]', {"a cat": ("a cat",), "a dog": ("a dog",)}),
        ('{"cat": ["a cat", "the cat"], "dog": "a dog"}', {"cat": ("a cat", "the cat"), "dog": ("a dog",)}),
    ],
)
def test_a_file_of_prompts_is_read(content, expected, tmp_path):
    path = tmp_path / "prompts"
    path.write_text(content, encoding="utf-8", newline="")
    assert given_prompts(path) == given_prompts(str(path)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty, and must be a file of prompts"),
        ("[]", r"a model has 1\.\.10000 names of prompts, got 0"),
        ("a cat\n\na dog", "a prompt is a text of at least one word, got ''"),
        ("a cat\na cat", "each prompt has a name of its own, and 'a cat' comes twice"),
        ('["a cat", 3]', "a prompt is a text of at least one word, got 3"),
        ('{"cat": []}', f"'cat' has one prompt or a list of up to {MAX_PROMPTS}, got"),
        ('{"cat": {"a": 1}}', "'cat' has one prompt or a list"),
        (json.dumps({"cat": ["a"] * (MAX_PROMPTS + 1)}), "'cat' has one prompt or a list"),
        ("[1, 2", "is not a file of prompts"),
        ("\n".join(map(str, range(10_001))), r"a model has 1\.\.10000 names of prompts, got 10001"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(content, message, tmp_path):
    path = tmp_path / "prompts"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        given_prompts(path)
    with pytest.raises(NotFound, match="there is no file of prompts"):
        given_prompts(tmp_path / "none")


@pytest.mark.parametrize("prompts", [3, [3], {"cat": 3}, {3: "a cat"}, {"": "a cat"}, [" "]])
def test_what_is_no_prompt_in_python_is_refused(prompts):
    with pytest.raises(InvalidOption):
        engine(prompts)


@pytest.mark.parametrize(("words", "kind", "message"), [case for case in REFUSED if case[0] != "crash"])
def test_a_prompt_without_a_vector_is_refused_when_it_is_packed(words, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        packed(tmp_path, prompts=["a cat", words])
    assert not list(tmp_path.iterdir())


def test_whoever_packs_sees_what_the_encoder_raises(tmp_path):
    with pytest.raises(Unsupported, match="the text encoder raises RuntimeError for the prompts of 'crash': a secret"):
        packed(tmp_path, prompts=["crash"])


def test_an_encoder_that_is_another_one_when_it_is_loaded_is_refused(tmp_path):
    with pytest.raises(Unsupported, match="makes another vector of a text when it is loaded again"):
        packed(tmp_path, "camserve_test_towers:forgetful")
    assert not list(tmp_path.iterdir())


def test_prompts_go_with_text_image_alone(tmp_path):
    for outputs in (None, "softmax", "embedding"):
        with pytest.raises(InvalidOption, match="prompts are for outputs text-image, got"):
            packed(tmp_path, outputs=outputs)
    with pytest.raises(InvalidOption, match="give them without references and labels"):
        packed(tmp_path, references=tmp_path)
    with pytest.raises(InvalidOption, match="give them without references and labels"):
        packed(tmp_path, labels=tmp_path)
    with pytest.raises(InvalidOption, match="prompts are for outputs text-image, and these are embedding"):
        Engine(towers(), preprocessing=PREPROCESSING, outputs="embedding", prompts=PROMPTS)
    with pytest.raises(InvalidOption, match="give one of the two"):
        Engine(towers(), preprocessing=PREPROCESSING, outputs="text-image", prompts=PROMPTS, references=tmp_path)


def test_the_command_line_packs_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    told = ["--resize", "64", "--crop", "48x64", "--mean", "0.5 0.5 0.5", "--std", "0.25 0.25 0.25"]
    arguments = ["archive", SOURCE, "--outputs", "text-image", "--prompts", "prompts.txt", "--store", "store", *told]
    assert cli.run(arguments) == 0
    assert read_card(Path("store/towers.mar")).labels == PROMPTS
    assert cli.run(["models", "towers", "--store", "store"]) == 0
    said = capsys.readouterr().out
    assert "--target 'text:a cat'" in said
    assert "outputs text-image of 4 numbers, 3 prompts: a cat, a dog, the cat sat" in said


def test_a_contrast_of_a_prompt_with_itself_is_no_contrast():
    with pytest.raises(CamserveError, match="contrast names each class once"):
        engine().explain(IMAGE, ["grad_cam"], [Contrast(Target(index=0), (Target(label="a cat"),))])


def test_the_encoder_of_the_page_can_be_packed_as_it_says(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    section = page.partition("## Networks of texts and images")[2]
    code, command = (
        re.search(rf"^```{kind}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1] for kind in ("python", "sh")
    )
    mytowers = types.ModuleType("mytowers")
    exec(code, mytowers.__dict__)  # the page's own text
    monkeypatch.setitem(sys.modules, "mytowers", mytowers)
    monkeypatch.chdir(tmp_path)
    trained = mytowers.build()
    save_file(trained.state_dict(), "towers.safetensors")
    Path("prompts.txt").write_text("a cat\na dog\n")
    program, *arguments = shlex.split(command)
    assert (program, cli.run([*arguments, "--store", "store"])) == ("camserve", 0)
    packed = Engine.load("build", "store", device="cpu")
    (found,) = packed.explain(tiny.pixels(2, (224, 224)), ["grad_cam"], ["text:a cow"]).maps
    assert packed.info.labels == ("a cat", "a dog")
    vector = trained.text_encoder.encode(["a cow"])[0].detach().numpy()
    (expected,) = packed.explain(tiny.pixels(2, (224, 224)), ["grad_cam"], [Vector(vector)]).maps
    assert found.score == pytest.approx(expected.score, abs=1e-6)
