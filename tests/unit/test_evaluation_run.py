"""Evaluations from images to report: what is measured, that a second run continues, what the files say."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from asked import asked
from PIL import Image
from tiny import TINY_LABELS, TINY_SIZE, pixels, png, tiny_module

from camserve import Engine, cli
from camserve.errors import InvalidInput, InvalidOption, Unsupported
from camserve.evaluation import run as running
from camserve.evaluation.curves import PROTOCOLS, faithfulness
from camserve.evaluation.digits.scenes import benchmark_scenes
from camserve.evaluation.digits.shipped import load_engine
from camserve.evaluation.digits.towers import PROMPTS
from camserve.evaluation.examples import Example
from camserve.evaluation.figures import write_figures
from camserve.evaluation.localisation import localise
from camserve.evaluation.report import make_report
from camserve.evaluation.run import Plan, evaluate
from camserve.evaluation.sanity import cascading_randomisation
from camserve.evaluation.truth import TrueBox
from camserve.finalise.maps import into_original
from camserve.methods import METHODS, parse_method
from camserve.types import Preprocessing
from camserve.types.references import References

PREPROCESSING = Preprocessing(resize_px=64, crop_px=TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
LYNX, MUG = TrueBox("lynx", 10, 20, 60, 70), TrueBox("coffee mug", 40, 0, 80, 50)
PERSON = TrueBox("person", 0, 0, 5, 5)
EXAMPLES = [
    Example("boxed.png", png(pixels(0, (90, 100))), (LYNX, MUG, LYNX, PERSON)),
    Example("bare.png", png(pixels(1))),
]
METHODS_TRIED = tuple(map(parse_method, ("grad_cam", "score_cam", "cam")))
PLAN = Plan(METHODS_TRIED, dataset="two images", sanity_images=1, pictures=1)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_module(), preprocessing=PREPROCESSING, labels=TINY_LABELS, micro_batch=16)


@pytest.fixture(scope="module")
def result(engine, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    progress = []
    records = evaluate(engine, EXAMPLES, PLAN, out, lambda *seen: progress.append(seen))
    return out, records, progress


def of(records, kind, image, method):
    (found,) = (r for r in records if (r["kind"], r["image"], r["method"]) == (kind, image, method))
    return found


def test_every_class_with_boxes_is_explained_else_the_most_probable(engine, result):
    _, records, _ = result
    boxed, bare = (of(records, "image", name, "grad_cam") for name in ("boxed.png", "bare.png"))
    assert [one["label"] for one in boxed["maps"]] == ["lynx", "coffee-mug"]
    top = engine.explain(EXAMPLES[1].source, []).predictions[0]
    assert [one["class"] for one in bare["maps"]] == [top.index]
    assert bare["maps"][0]["localisation"] is None


KINDS = {
    "sigmoid": (TINY_LABELS, "lynx"),
    "binary": (("no", "lynx"), "lynx"),
    "value": (TINY_LABELS, "lynx"),
    "embedding": (("coffee-mug", "lynx"), "lynx"),
}
SCORES = {"value": "value", "embedding": "similarity"}


@pytest.mark.parametrize("outputs", KINDS)
def test_outputs_of_every_kind_are_evaluated_by_the_score_that_is_explained(outputs, tmp_path, monkeypatch):
    labels, box = KINDS[outputs]
    module = tiny_module()
    if outputs == "binary":
        module = torch.nn.Sequential(*module, torch.nn.Linear(6, 1))
    named: dict[str, object] = {"labels": labels}
    if outputs == "embedding":
        named = {"references": References(labels, np.eye(2, 6, dtype=np.float32) - np.float32(0.1))}
    engine = Engine(module.eval(), preprocessing=PREPROCESSING, outputs=outputs, **named)
    plan = Plan((parse_method("grad_cam"),), protocols=(PROTOCOLS["rise"],), sanity_images=1)
    (record, check) = evaluate(engine, EXAMPLES[:1], plan, tmp_path)
    (first, *_) = (one for one in record["maps"] if one["label"] == box)
    target = labels.index(box)
    said = {one.index: one for one in engine.explain(EXAMPLES[0].source, [], top_predictions=6).predictions}[target]
    score = SCORES.get(outputs, "probability")
    whole = getattr(said, score)
    assert first["score"] == pytest.approx(whole, rel=1e-5)
    assert first["curves"]["rise"]["deletion"][0] == pytest.approx(whole, abs=1e-5)
    assert first["localisation"]["energy"] >= 0
    assert record["contrast"] is None or record["contrast"]["least_likely"]["energy"] >= 0
    assert check["stages"]
    headings: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_ylabel", lambda _, text: headings.append(text))
    write_figures(plan.settings(engine), [record], plan.methods, tmp_path)
    assert list(filter(None, headings)) == [f"{score} of what is explained, mean of maps"]
    assert f"; score: {score}; " in make_report(plan.settings(engine), [record], plan.methods).as_markdown()


class Places(torch.nn.Sequential):
    """Six classes of 6 x 8 places, among other things; the mug is nowhere."""

    def __init__(self) -> None:
        super().__init__(*tiny_module()[:5], torch.nn.Conv2d(12, 6, 1))
        x = torch.from_numpy(pixels(0)).movedim(2, 0)[None] / 255
        with torch.no_grad():
            self[-1].bias -= super().forward((x - 0.5) / 0.25).mean(dim=(0, 2, 3))
            self[-1].bias[TINY_LABELS.index("coffee-mug")] -= 100

    def forward(self, x):
        return {"features": x, "out": super().forward(x)}


def test_a_network_of_places_is_evaluated_for_the_classes_that_have_some(tmp_path):
    options = {"outputs": "segmentation", "output": "out"}
    engine = Engine(Places().eval(), preprocessing=PREPROCESSING, labels=TINY_LABELS, **options)
    plan = Plan(METHODS_TRIED[:2], protocols=(PROTOCOLS["rise"],), sanity_images=1)
    mask = np.zeros((90, 100), bool)
    mask[30:60, 20:45] = True
    example = replace(EXAMPLES[0], masks={"lynx": mask})
    grad_cam, score_cam, *checks = evaluate(engine, [example], plan, tmp_path)
    (explained,) = engine.explain(EXAMPLES[0].source, "grad_cam", "lynx").maps
    for record in (grad_cam, score_cam):
        (one,) = record["maps"]
        assert one["label"] == "lynx", "the mug has a box, but no place of the image is of it"
        assert one["score"] == pytest.approx(explained.score, rel=1e-5)
        assert one["curves"]["rise"]["deletion"][0] == pytest.approx(explained.score, abs=1e-5)
        (map_,) = engine.explain(EXAMPLES[0].source, record["method"], "lynx", size="original").maps
        share = map_.array[mask].sum() / map_.array.sum()
        assert one["localisation"]["energy"] == pytest.approx(share, rel=1e-4)  # the maps are float32
    assert [len(check["stages"][0]) > 1 for check in checks] == [True, True], "its places stay when it is randomised"


def test_figures_are_those_of_the_metrics(engine, result):
    _, records, _ = result
    answer = engine.explain(EXAMPLES[0].source, ["score_cam"], [5])
    (saliency,) = answer.maps
    found = of(records, "image", "boxed.png", "score_cam")["maps"][0]
    expected = localise(into_original(saliency.array, answer.input), [LYNX])  # no box reaches beyond the crop
    assert found["localisation"] == pytest.approx(vars(expected))
    x = engine.network.normalise(torch.from_numpy(np.array(saliency.image))[None])[0]
    array, column = torch.from_numpy(saliency.array)[None], asked([5])
    ((curves,),) = faithfulness(engine.network.module, x, array, column, [PROTOCOLS["rise"]], 4)
    np.testing.assert_allclose(found["curves"]["rise"]["deletion"], curves.deletion, rtol=0, atol=2e-6)
    assert found["curves"]["rise"]["insertion_auc"] == pytest.approx(curves.insertion_auc, abs=1e-6)
    assert found["score"] == pytest.approx(saliency.target.probability, abs=1e-6)
    assert found["curves"]["rise"]["deletion"][0] == pytest.approx(found["score"], abs=2e-6)


def test_contrast_needs_boxes_of_the_most_likely_class(engine, result):
    _, records, _ = result
    most = engine.explain(EXAMPLES[0].source, []).predictions[0].label
    contrast = of(records, "image", "boxed.png", "grad_cam")["contrast"]
    assert (contrast is not None) == (most in ("lynx", "coffee-mug"))
    again = Example("top.png", EXAMPLES[0].source, (TrueBox(most, 0, 0, 50, 50),))
    subject = running.subject_of(engine, again, again.read(), PLAN, None)
    measured = running.measured(subject, METHODS["grad_cam"]())
    assert measured["contrast"]["most_likely"] == measured["maps"][0]["localisation"]
    assert measured["contrast"]["least_likely"] != measured["contrast"]["most_likely"]


def test_masked_queries_that_serve_all_classes_are_asked_once(engine, monkeypatch):
    top = engine.explain(EXAMPLES[0].source, []).predictions[0].label
    example = Example("top.png", EXAMPLES[0].source, (TrueBox(top, 0, 0, 50, 50),))
    subject = running.subject_of(engine, example, example.read(), PLAN, None)
    explain, asked = engine.explain, []
    monkeypatch.setattr(
        engine,
        "explain",
        lambda content, methods, *rest, **more: asked.append(rest) or explain(content, methods, *rest, **more),
    )
    for method in ("score_cam", "grad_cam"):
        measured = running.measured(subject, parse_method(method))
        assert measured["queries"] == (12 if method == "score_cam" else 0)
        assert [one["label"] for one in measured["maps"]] == [top]
        least = explain(EXAMPLES[0].source, [method], [subject.contrasted])
        found = into_original(least.maps[0].array, least.input)
        expected = vars(localise(found, subject.boxes[subject.classes[0]]))
        assert measured["contrast"]["least_likely"] == pytest.approx(expected, abs=1e-4)
    most = subject.classes[0]
    assert [classes for (classes,) in asked] == [[most, subject.contrasted], [most], [subject.contrasted]]


def test_a_parameter_that_does_not_fit_the_layer_stops_nothing(engine, tmp_path):
    plan = Plan((parse_method("group_cam"), parse_method("grad_cam")), sanity_images=1, pictures=0)
    group_cam, grad_cam, *sanity = evaluate(engine, EXAMPLES[1:], plan, tmp_path)
    assert "groups must be 1..12 at this layer, got 32" in group_cam["unsupported"] == sanity[0]["unsupported"]
    assert len(grad_cam["maps"]) == 1


def test_a_broken_image_is_named(engine, tmp_path):
    broken = Example("broken.png", png(pixels(0))[:99])
    with pytest.raises(InvalidInput, match=r"broken\.png: the PNG file is broken"):
        evaluate(engine, [EXAMPLES[1], broken], Plan(METHODS_TRIED[:1], sanity_images=0), tmp_path)


def test_what_the_network_cannot_serve_is_said(result):
    _, records, _ = result
    for kind, image in (("image", "boxed.png"), ("image", "bare.png"), ("sanity", "sanity check")):
        assert "global average pooling" in of(records, kind, image, "cam")["unsupported"]


def test_progress_counts_images_times_methods_and_the_sanity_checks(result):
    _, _, progress = result
    assert [(done, total) for done, total, _ in progress] == [(done, 9) for done in range(10)]
    assert progress[0][2] == "boxed.png: Grad-CAM"


def test_a_stopped_run_is_continued(engine, result, tmp_path, monkeypatch):
    out, records, _ = result
    lines = (out / running.JOURNAL).read_text().splitlines(keepends=True)
    (tmp_path / running.JOURNAL).write_text("".join(lines[:4]) + lines[4][:30])  # killed while it wrote
    made = []
    original = running.measured
    monkeypatch.setattr(running, "measured", lambda subject, spec: made.append(spec) or original(subject, spec))
    again = evaluate(engine, EXAMPLES, PLAN, tmp_path)
    assert made == list(METHODS_TRIED)  # those of the second image
    assert [_figures(record) for record in again] == [_figures(record) for record in records]
    made.clear()
    assert len(evaluate(engine, EXAMPLES, PLAN, tmp_path)) == len(records)
    assert made == []


def _figures(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "pictures", "seen")}


def test_other_boxes_or_methods_are_measured_anew(engine, tmp_path):
    plan = Plan((METHODS["grad_cam"](),), sanity_images=0, pictures=0)
    evaluate(engine, EXAMPLES[:1], plan, tmp_path)
    moved = [Example("boxed.png", EXAMPLES[0].source, (TrueBox("lynx", 0, 0, 9, 9),))]
    more = Plan((*plan.methods, parse_method("group_cam", {"groups": 3})), sanity_images=0, pictures=0)
    records = evaluate(engine, moved, more, tmp_path)
    assert len((tmp_path / running.JOURNAL).read_text().splitlines()) == 1 + 1 + 2
    assert [record["method"] for record in records] == ["grad_cam", "group_cam"]
    assert records[0]["sha256"] == moved[0].digest(moved[0].read())


def test_settings_are_not_mixed(engine, tmp_path):
    plan = Plan((METHODS["grad_cam"](),), sanity_images=0)
    evaluate(engine, EXAMPLES[1:], plan, tmp_path)
    with pytest.raises(InvalidOption, match="begun with precision 'exact', got 'bfloat16'"):
        evaluate(engine, EXAMPLES[1:], Plan(plan.methods, precision="bfloat16"), tmp_path)
    (tmp_path / running.JOURNAL).write_text("no journal\n")
    with pytest.raises(InvalidInput, match="is not a journal"):
        evaluate(engine, EXAMPLES[1:], plan, tmp_path)


@pytest.fixture(scope="module")
def report(engine, result):
    _, records, _ = result
    return make_report(PLAN.settings(engine), records, METHODS_TRIED)


def test_rows_are_means_over_maps(result, report):
    _, records, _ = result
    row = report.rows[1]
    maps = [one for image in ("boxed.png", "bare.png") for one in of(records, "image", image, "score_cam")["maps"]]
    assert (row["title"], row["images"], row["maps"]) == ("Score-CAM", 2, 3)
    deletion = [one["curves"]["rise"]["deletion_auc"] for one in maps]
    assert row["rise_deletion"] == pytest.approx(sum(deletion) / 3)
    assert row["rise_overall"] == pytest.approx(row["rise_insertion"] - row["rise_deletion"])
    assert row["energy"] == pytest.approx(sum(one["localisation"]["energy"] for one in maps[:2]) / 2)
    assert row["increase"] == sum(one["increased"] for one in maps) / 3
    assert row["queries"] == 12
    assert [stage["down_to"] for stage in row["sanity_stages"]] == ["9", "7", "3", "0"]
    assert report.rows[2]["maps"] == 0


def test_the_three_files_say_the_same(engine, report, tmp_path):
    paths = report.write(tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.csv", "report.md"]
    content = json.loads(paths[0].read_text())
    assert content["settings"] == PLAN.settings(engine)
    assert content["settings"]["protocols"]["rise"] == {"steps": 28, "step_px": 110}
    assert {"model", "version", "layer", "precision", "versions", "machine"} <= set(content["settings"])
    lines = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [line["method"] for line in lines] == ["grad_cam", "score_cam", "cam"]
    assert float(lines[1]["rise_deletion"]) == content["methods"][1]["rise_deletion"]
    text = paths[2].read_text()
    assert text.startswith("two images, 2 images; model model 1.0, layer 4,")
    assert "| Score-CAM | " in text
    assert f"{content['methods'][1]['energy']:.1%}" in text
    assert "CAM: not served by this network. CAM needs a head" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


def test_pictures(engine, result):
    out, records, _ = result
    paths = write_figures(PLAN.settings(engine), records, METHODS_TRIED, out)
    assert [path.name for path in paths] == ["curves-rise.png", "curves-group_cam_paper.png", "sheet.png"]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 300
    assert len(list((out / running.OVERLAYS).iterdir())) == 1 + 2 * 2  # the image, two classes, two methods that work


def test_nothing_measured_has_no_figures(engine, tmp_path):
    assert write_figures(PLAN.settings(engine), [], METHODS_TRIED, tmp_path) == []


@pytest.fixture
def loaded(engine, monkeypatch):
    monkeypatch.setattr(Engine, "load", lambda name, store=None: engine)


def test_the_command(loaded, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    (images / "boxed.png").write_bytes(EXAMPLES[0].read())
    boxes = {
        "images": [{"id": 1, "file_name": "boxed.png"}],
        "categories": [{"id": 1, "name": "lynx"}, {"id": 2, "name": "person"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [10, 20, 50, 50]},
            {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5]},
        ],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    arguments = ["--images", str(images), "--boxes", str(tmp_path / "boxes.json"), "--out", str(out)]
    arguments += ["--methods", "grad_cam group_cam:groups=4", "--protocol", "rise", "--sanity-images", "0"]
    assert cli.run(["evaluate", *arguments]) == 0
    assert capsys.readouterr().out.split()[0] == str(out / "report.json")
    content = json.loads((out / "report.json").read_text())
    assert [row["title"] for row in content["methods"]] == ["Grad-CAM", "Group-CAM (groups=4)"]
    assert content["settings"]["labels_without_class"] == ["person"]
    assert content["settings"]["dataset"] == "folder images, boxes of boxes.json"
    assert content["methods"][0]["energy"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --images and --benchmark"),
        (["--benchmark", "digits", "--images", "x"], "exactly one of --images and --benchmark"),
        (["--benchmark", "digits", "--boxes", "x"], "--boxes belong to --images"),
        (["--images", "nowhere"], "there is no folder nowhere"),
        (["--images", ".", "--methods", "gradcam"], "unknown method 'gradcam'"),
    ],
)
def test_misuse_of_the_command(loaded, arguments, message, tmp_path, capsys):
    assert cli.run(["evaluate", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "what"), [("digits-answers", "question"), ("digits-tokens", "caption so far")])
def test_a_network_that_takes_a_text_is_refused_with_what_measures_it(name, what, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Engine, "load", lambda *_, **__: load_engine(name, device="cpu"))
    out = tmp_path / "out"
    assert cli.run(["evaluate", "--benchmark", "digits", "--model", name, "--limit", "1", "--out", str(out)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"takes a {what} beside the image, and here are images alone" in said
    assert "camserve explain --text --evaluate" in said
    assert not out.exists()


@pytest.mark.parametrize("name", ["digits-answers", "digits-tokens"])
def test_a_network_that_takes_a_text_has_no_sanity_check_of_images_alone(name):
    with pytest.raises(Unsupported, match="beside the image, and here are images alone"):
        cascading_randomisation(load_engine(name, device="cpu"), [pixels(0)], ["grad_cam"])


def test_prompts_are_the_classes_of_the_digits_benchmark(monkeypatch, tmp_path):
    monkeypatch.setattr(Engine, "load", lambda *_, **__: load_engine("digits-text-image", device="cpu"))
    arguments = ["--benchmark", "digits", "--model", "digits-text-image", "--limit", "1", "--methods", "grad_cam"]
    assert cli.run(["evaluate", *arguments, "--protocol", "rise", "--out", str(tmp_path)]) == 0
    image, check = (json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()[1:])
    boxes = {PROMPTS[int(box.label)]: box for box in benchmark_scenes(1)[0].boxes}
    assert {one["label"] for one in image["maps"]} == set(boxes)
    content = load_engine("digits-text-image", device="cpu").explain(benchmark_scenes(1)[0].pixels, [], list(boxes))
    cosines = {one.label: one.similarity for one in content.predictions}
    for one in image["maps"]:
        assert one["score"] == pytest.approx(cosines[one["label"]], abs=1e-5)
        assert one["curves"]["rise"]["deletion"][0] == pytest.approx(cosines[one["label"]], abs=1e-5)
        assert one["localisation"]["energy"] > 0.3
    assert image["contrast"]["most_likely"]["energy"] > image["contrast"]["least_likely"]["energy"]
    (stages,) = check["stages"]
    assert [stage["down_to"] for stage in stages] == ["head", *(f"features.{block}.0" for block in (4, 3, 2, 1, 0))]
    assert stages[0]["correlation"] < 0.9, "the weights of the text encoder stay, and no stage is spent on them"


def test_a_model_without_predictions_is_refused_with_what_to_do(tmp_path):
    engine = Engine(tiny_module(), preprocessing=PREPROCESSING, outputs="embedding")
    with pytest.raises(Unsupported, match=r"has no predictions, since no references are packed .*--references"):
        evaluate(engine, EXAMPLES, PLAN, tmp_path / "out")


def test_boxes_of_a_model_of_numbers_are_refused_with_what_to_do(tmp_path):
    engine = load_engine("digits-value", device="cpu")
    said = "whose first is 'sum': coffee mug, lynx, person; without boxes, what it predicts itself is explained"
    with pytest.raises(InvalidInput, match=said):
        evaluate(engine, EXAMPLES, PLAN, tmp_path / "out")


def test_the_digits_benchmark(tmp_path):
    """Two scenes: CAM points at the digit that it explains (its maps have 12 x 12 places of 8 px, so a maximum may lie
    just outside the box), and the least likely class finds neither."""
    arguments = ["--benchmark", "digits", "--limit", "2", "--methods", "cam", "--out", str(tmp_path)]
    assert cli.run(["evaluate", *arguments, "--protocol", "rise", "--sanity-images", "0"]) == 0
    (row,) = json.loads((tmp_path / "report.json").read_text())["methods"]
    assert (row["images"], row["maps"], row["pointing_15px"]) == (2, 4, 1)
    assert row["energy"] > 5 * row["least_likely_energy"]
    assert row["rise_insertion"] > row["rise_deletion"]
