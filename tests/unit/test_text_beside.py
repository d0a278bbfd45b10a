"""Networks that take a text beside the image: each item is asked with its own, whatever else is in the step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from looking import CAPTION, Looking, ReadIn, asking, writing
from torch import nn

from camserve import Engine
from camserve.errors import CamserveError, InvalidOption, Unsupported
from camserve.methods import AblationCam, GradCam, IntegratedGradients, MethodSpec, Rise, ScoreCam
from camserve.types import AnyTarget, Item, ItemResult, Preprocessing, Target, Task, Text, Word
from camserve.types.request import UNBOUNDED, ExplainRequest
from camserve.types.target_forms import target_forms
from camserve.worker.executor import Executor
from camserve.worker.network import Network

PREPROCESSING = Preprocessing(32, (32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def executor(module: nn.Module, outputs: str, memory_bytes: int = 0, micro_batch: int = 4) -> Executor:
    network = Network(module.eval(), preprocessing=PREPROCESSING, outputs=outputs, micro_batch=micro_batch)
    return Executor(network, memory_bytes)


METHODS: tuple[MethodSpec, ...] = (GradCam(), ScoreCam(), AblationCam(), Rise(masks=7), IntegratedGradients(steps=3))


def item(text: str, *targets: AnyTarget, seed: int = 0, methods: tuple[MethodSpec, ...] = METHODS) -> Item:
    tasks = tuple(Task(at, spec, 0, 100) for at, spec in enumerate(methods))
    return Item(image(seed), targets, tasks, text, precision="exact")


def assert_same(found: ItemResult | CamserveError, expected: ItemResult | CamserveError) -> None:
    assert isinstance(found, ItemResult)
    assert isinstance(expected, ItemResult)
    assert [one.target for one in found.targets] == [one.target for one in expected.targets]
    assert [one.score for one in found.targets] == pytest.approx([one.score for one in expected.targets], rel=1e-5)
    for mine, theirs in zip(found.partials, expected.partials, strict=True):
        np.testing.assert_allclose(mine.sums, theirs.sums, rtol=1e-4, atol=1e-4 * np.abs(theirs.sums).max())


WORDS = [
    item("", Text("one two three"), Word(2, "two one")),
    item("three", Text("one"), Target(index=2)),
    item("three", Text("two one"), seed=1),
    item("", Word(1, "zero"), Target(top_k=2), seed=2),
]
ANSWERS = [
    item("which is left", Target(index=0)),
    item("which is right", Target(index=0)),
    item("which is left", Target(index=3), Target(index=1), seed=1),
    item("which", Target(top_k=2), seed=1),
]


@pytest.mark.parametrize(("module", "outputs", "items"), [(asking, "answers", ANSWERS), (writing, "tokens", WORDS)])
@pytest.mark.parametrize("memory_bytes", [0, 2**24])
@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_items_with_different_texts_in_a_step_are_answered_as_each_is_alone(
    module, outputs, items, memory_bytes, micro_batch
):
    alone = [executor(module(), outputs).execute([one]).outcomes[0] for one in items]
    assert not np.allclose(alone[0].partials[1].sums[:1], alone[1].partials[1].sums[:1]), "the texts make a difference"
    together = executor(module(), outputs, memory_bytes, micro_batch)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [0, 1, 2, 3]):  # with a memory, later steps have what earlier ones left
        outcomes = together.execute([items[index] for index in order]).outcomes
        for index, found in zip(order, outcomes, strict=True):
            assert_same(found, alone[index])


def test_shards_of_an_item_on_two_workers_add_up():
    whole = executor(writing(), "tokens").execute([item("two", Text("one three"), methods=(ScoreCam(),))]).outcomes[0]
    first, second = (executor(writing(), "tokens") for _ in range(2))
    parts = []
    for worker, (start, stop) in ((first, (0, 3)), (second, (3, 100))):
        one = replace(item("two", Text("one three")), tasks=(Task(0, ScoreCam(), start, stop),))
        parts.append(worker.execute([one]).outcomes[0].partials[0])
    np.testing.assert_allclose(parts[0].merge(parts[1]).sums, whole.partials[0].sums, rtol=1e-5, atol=1e-6)


BAD = {
    "no question": ("answers", item("", Target(index=0)), "needs a question beside the image"),
    "a question without words": ("answers", item("?!", Target(index=0)), "the question has no word"),
    "an unknown word": ("answers", item("which is lefd", Target(index=0)), "unknown word 'lefd'; close to it: left"),
    "a long question": ("answers", item("left " * 5, Target(index=0)), "at most 4 tokens, got 5"),
    "a long caption": ("tokens", item("one " * 5, Target(index=0)), "at most 4 tokens, got 5"),
    "a long text": ("tokens", item("one", Text("one " * 4)), "at most 4 tokens, got 4 behind 1"),
    "an unknown target": ("tokens", item("", Text("four")), "the words asked for: unknown word 'four'"),
    "a word that is not there": ("tokens", item("", Word(3, "one two")), "there are 2 words in 'one two', word 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_texts_are_refused_and_a_neighbour_is_unharmed(name):
    outputs, bad, message = BAD[name]
    module, good = (asking, ANSWERS[0]) if outputs == "answers" else (writing, WORDS[0])
    found, refused = executor(module(), outputs).execute([good, bad]).outcomes
    assert isinstance(refused, InvalidOption)
    assert message in str(refused)
    assert_same(found, executor(module(), outputs).execute([good]).outcomes[0])


def test_words_that_the_network_has_no_output_for_are_refused_and_a_neighbour_is_unharmed():
    few = Looking(CAPTION, "", 3, end=2)  # its tokeniser knows five words
    good = item("one", Text("zero"))
    found, asked, said = (
        executor(few, "tokens").execute([good, item("", Text("three")), item("three", Target(0))]).outcomes
    )
    assert isinstance(found, ItemResult)
    for refused, what in ((asked, "the words asked for"), (said, "the caption so far")):
        assert isinstance(refused, Unsupported)
        assert str(refused) == f"{what}: the tokeniser has tokens that the network has no output for"


def test_a_network_that_writes_has_several_tokens_to_choose_from():
    with pytest.raises(InvalidOption, match="the logits of several next tokens, and this network has one output"):
        Engine(Looking(CAPTION, "", 1, end=0), preprocessing=PREPROCESSING, outputs="tokens")


def test_outputs_that_are_not_finite_fail_alone():
    module = writing()
    module.words.weight.data[3] = torch.nan
    found, refused = executor(module, "tokens").execute([WORDS[3], item("three", Text("one"))]).outcomes
    assert_same(found, executor(writing(), "tokens").execute([WORDS[3]]).outcomes[0])
    assert isinstance(refused, Unsupported)
    assert "not finite" in str(refused)


def test_a_network_that_reads_the_image_with_the_text_in_mind_has_maps_of_one_word_at_a_time():
    engine = Engine(writing(ReadIn), preprocessing=PREPROCESSING, outputs="tokens")
    with pytest.raises(Unsupported, match="the layer's maps depend on the words before"):
        engine.explain(image(), ["grad_cam"], ["text:one two"])
    both = engine.explain(image(), ["grad_cam"], ["word:2:one two"]).maps[0]
    behind = engine.explain(image(), ["grad_cam"], ["two"], text="one").maps[0]
    assert both.array.any()
    np.testing.assert_allclose(both.array, behind.array, atol=1e-6)
    assert both.score == pytest.approx(behind.score)


def test_a_word_of_the_model_s_own_caption_becomes_that_word():
    engine = Engine(writing(), preprocessing=PREPROCESSING, outputs="tokens")
    engine.network.module.get_submodule("head").bias.data[4] -= 9
    answer = engine.explain(image(), ["grad_cam"], ["word:2"], text="two", top_predictions=3)
    first, second, _ = (one.label for one in answer.predictions)
    (found,) = answer.maps
    assert found.target_text == f"word:2:{first} {second}"
    assert [one.label for one in found.classes] == [second]
    assert found.classes[0].probability == pytest.approx(answer.predictions[1].probability, rel=1e-5)
    assert found.score == pytest.approx(np.log(found.classes[0].probability), rel=1e-5)
    with pytest.raises(InvalidOption, match=r"caption has 3 words .* word 4 was asked for"):
        engine.explain(image(), ["grad_cam"], ["word:4"], text="two")  # a caption has four words, and one is there


def test_a_model_says_what_text_it_takes_and_which_targets():
    asked, written = (
        Engine(module(), preprocessing=PREPROCESSING, outputs=outputs).info
        for module, outputs in ((asking, "answers"), (writing, "tokens"))
    )
    assert (asked.text.what, asked.text.example, asked.text.required) == ("question", "which is left", True)
    assert (written.text.what, written.text.required, written.text.most_tokens) == ("caption so far", False, 4)
    assert written.labels == CAPTION
    assert {form.name for form in target_forms(written)} == {"class", "contrast", "finer", "against", "text", "word"}
    for info, text in ((asked, "which"), (written, "")):
        for form in target_forms(info):
            request = ExplainRequest(image(), targets=(), text=text)
            from camserve.types import as_target

            assert replace(request, targets=(as_target(form.example),)).fit(info, UNBOUNDED)


def test_an_answer_is_named_as_a_text_and_an_unknown_one_names_close_ones():
    engine = Engine(
        asking(), preprocessing=PREPROCESSING, outputs="answers", labels=["seven", "two", "six", "no", "yes"]
    )
    (found,) = engine.explain(image(), ["grad_cam"], ["text:Seven"], text="which").maps
    assert (found.target.index, found.target_text) == (0, "seven")
    with pytest.raises(InvalidOption, match="unknown label 'sven'; close to it: 'seven'"):
        engine.explain(image(), ["grad_cam"], ["text:sven"], text="which")


def test_a_network_without_a_tokeniser_is_refused_and_so_is_one_whose_end_is_no_output():
    bare, wrong = asking(), Looking(CAPTION, "", 5, end=5)
    del bare.tokeniser
    with pytest.raises(InvalidOption, match="its tokeniser as the attribute `tokeniser`: a Tokeniser of camserve"):
        Engine(bare, preprocessing=PREPROCESSING, outputs="answers")
    with pytest.raises(InvalidOption, match="`end` of the tokeniser must be one of 5 outputs, got 5"):
        Engine(wrong, preprocessing=PREPROCESSING, outputs="tokens")


def test_a_graph_of_the_image_alone_is_not_used():
    with pytest.raises(Unsupported, match="it takes a text beside the image"):
        Engine(asking(), preprocessing=PREPROCESSING, outputs="answers", runtime="onnx")
    engine = Engine(asking(), preprocessing=PREPROCESSING, outputs="answers", runtime="auto")
    assert engine.info.runtime.name == "eager"
    first, second = (engine.explain(image(), ["score_cam"], [0], text=text) for text in ("which is left", "right"))
    assert not np.allclose(first.maps[0].array, second.maps[0].array)


def test_hooks_are_gone_after_a_failing_pass():
    engine = Engine(writing(ReadIn), preprocessing=PREPROCESSING, outputs="tokens")
    with pytest.raises(Unsupported):
        engine.explain(image(), ["grad_cam"], ["text:one two"])
    modules = list(engine.network.module.modules())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in modules)
