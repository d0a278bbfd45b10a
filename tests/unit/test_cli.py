"""The command line: what it parses, prints, writes and returns. Clients, engine and supervisor are stand-ins here."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from camserve import cli, errors
from camserve.cli import commands
from camserve.client import ModelSummary, Progress
from camserve.errors import InvalidInput, InvalidOption
from camserve.methods import METHODS, GradCam, GroupCam, ScoreCam
from camserve.types import (
    Box,
    BoxOptions,
    Contrast,
    Cost,
    Explanation,
    InputView,
    Layer,
    ModelInfo,
    Prediction,
    RuntimeInfo,
    SaliencyMap,
    Target,
    Text,
    Vector,
)

CAT, DOG = Prediction(281, "tabby, [small] cat", 0.875), Prediction(5, "dog", 0.1)
VIEW = InputView(original_size=(8, 8), crop=(0.0, 0.0, 8.0, 8.0), size=(8, 8))


def saliency(method=GradCam(), target=CAT, **options) -> SaliencyMap:  # noqa: B008  # frozen
    array = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    options = {"lies_on": lambda: Image.new("RGB", (8, 8), "white"), "degenerate": False, **options}
    return SaliencyMap(method, target, ("features",), array, (0.0, 1.0), complete=True, **options)


class StandIn:
    """A client, and an engine, that remembers what it was asked."""

    maps = (saliency(),)
    failure: BaseException | None = None

    def __init__(self, *where, **options) -> None:
        self.asked = None
        type(self).last, self.where, self.options = self, where, options

    load = classmethod(lambda cls, *where: cls(*where))

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def explain(self, image, methods, targets, *, on_progress, **options) -> Explanation:
        self.asked = {"image": image, "methods": methods, "targets": targets, **options}
        on_progress(0, 10)
        if self.failure is not None:
            raise self.failure
        on_progress(10, 10)
        cost = Cost(1234, {"queries": 2.5, "decode": 0.004}, 3, "exact", "host:1 cpu")
        return Explanation("lite0", "1.0", (CAT, DOG), self.maps, VIEW, cost)

    def stream(self, image, methods, targets, **options):
        for done in (0, 4, 8):
            yield Progress(done, 10, (CAT, DOG), self.maps if done else ())
        yield self.explain(image, methods, targets, on_progress=lambda *_: None, **options)

    def model(self, name):
        layer = Layer("stem", 4, 2, 2)
        return ModelInfo(
            name,
            "1.0",
            ("age", "size"),
            (8, 8),
            (layer,),
            "stem",
            outputs="value",
            units=("years",),
            runtime=RuntimeInfo("eager", 4, "exact", "the network has no ONNX graph"),
        )

    def models(self):
        if self.failure is not None:
            raise self.failure
        return (ModelSummary("lite0", "1.0", True), ModelSummary("resnet50", "2.1", False))


@pytest.fixture
def client(monkeypatch):
    kind = type("Client", (StandIn,), {})
    monkeypatch.setattr("camserve.client.Client", kind)
    return kind


@pytest.fixture
def engine(monkeypatch):
    kind = type("Engine", (StandIn,), {})
    monkeypatch.setattr("camserve.engine.Engine", kind)
    return kind


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("grad_cam", GradCam()),
        ("grad-cam", GradCam()),
        ("group_cam:groups=16", GroupCam(groups=16)),
        ("group_cam:groups=16,theta=62.5, variant=reference", GroupCam(groups=16, theta=62.5, variant="reference")),
        ("group_cam:", GroupCam()),
    ],
)
def test_method_texts(text, method):
    assert commands.parse_method_text(text) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gradcam", "unknown method 'gradcam'; there are cam, grad_cam"),
        ("group_cam:size=3", "unknown parameter 'size'"),
        ("group_cam:groups", r"must be NAME\[:KEY=VALUE,...\], got 'group_cam:groups'"),
        ("group_cam:groups=many", "must be an integer, got 'many'"),
        ("group_cam:groups=1.5", r"must be an integer, got 1\.5"),
    ],
)
def test_bad_method_texts(text, message):
    with pytest.raises(errors.InvalidOption, match=message):
        commands.parse_method_text(text)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("281", Target(index=281)),
        ("top3", Target(top_k=3)),
        ("tiger cat", Target(label="tiger cat")),
        ("topcoat", Target(label="topcoat")),
        ("-1", Target(label="-1")),
    ],
)
def test_target_texts(text, target):
    assert commands.parse_target(text) == target


def test_explain_asks_the_server(client, tmp_path):
    arguments = ["--method", "group_cam:groups=8", "--method", "cam", "--target", "5", "--target", "top2", "--boxes"]
    arguments += ["--signed", "--target", "contrast:1>2", "--text", "which is left?"]
    arguments += ["--model", "m", "--layer", "l", "--size", "original", "--precision", "bfloat16", "--timeout", "9"]
    arguments += ["--address", "host:1", "--out", str(tmp_path), "--priority", "batch", "--allow-partial"]
    assert cli.run(["explain", "cat.png", *arguments]) == 0
    assert (client.last.where, client.last.options) == (("host:1",), {"timeout_s": 9, "tls": None, "token": None})
    assert client.last.asked == {
        "image": Path("cat.png"),
        "methods": [GroupCam(groups=8), METHODS["cam"]()],
        "targets": [Target(index=5), Target(top_k=2), Contrast(Target(index=1), (Target(index=2),))],
        "text": "which is left?",
        "model": "m",
        "layer": ("l",),
        "fusion": "mean",
        "evaluate": False,
        "size": "original",
        "signed": True,
        "precision": "bfloat16",
        "boxes": BoxOptions(),
        "priority": "batch",
        "allow_partial": True,
    }


def test_the_command_line_reads_the_file_of_a_vector_and_of_a_reference(tmp_path):
    np.save(tmp_path / "face.npy", np.array([1.0, -2.0]))
    (tmp_path / "face.jpg").write_bytes(b"a photo")
    assert commands.read_target(f"vector:{tmp_path}/face.npy") == Vector([1.0, -2.0])
    assert commands.read_target(f"reference:{tmp_path}/face.jpg") == Vector(image=b"a photo")
    assert commands.read_target("text:a cat; asleep, 3") == Text("a cat; asleep, 3")
    for text, sentence in (
        (f"vector:{tmp_path}/none.npy", "cannot read a vector from .*none.npy"),
        (f"vector:{tmp_path}/face.jpg", "cannot read a vector from .*face.jpg"),
        (f"reference:{tmp_path}/none.jpg", "cannot read .*none.jpg"),
        ("vector:", "vector: what of"),
    ):
        with pytest.raises(InvalidInput, match=sentence):
            commands.read_target(text)


def test_a_pickled_vector_is_not_loaded(tmp_path):
    np.save(tmp_path / "bad.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(InvalidOption, match="cannot read a vector"):
        commands.read_target(f"vector:{tmp_path}/bad.npy")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("dog", "cat-grad_cam-dog"),
        ("5", "cat-grad_cam-dog"),
        ("contrast:dog>0.6*tabby,7", "cat-grad_cam-contrast-dog-0-6-tabby-7"),
        ("down:dog", "cat-grad_cam-down-dog"),
    ],
)
def test_a_picture_is_named_by_what_it_explains(text, name, tmp_path):
    (path,) = cli.write_pictures([saliency(target=DOG, target_text=text)], "cat", tmp_path)
    assert path.stem == name


def test_a_model_is_described_with_an_example_of_each_target(client, capsys):
    assert cli.run(["models", "ages"]) == 0
    out = capsys.readouterr().out
    assert "outputs value: age (years), size" in out
    assert "--target 'up:age'" in out
    assert "layers: stem; default stem" in out
    assert "runtime eager, 4 queries a pass; auto is exact (the network has no ONNX graph)" in out


def test_explain_shows_what_comes_in(client, tmp_path, capsys):
    assert cli.run(["explain", "some/cat.png", "--watch", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if line] == [
        f"cat.png: tabby, [small] cat, {done} of 10 masked queries" for done in (0, 4, 8)
    ]
    assert "87.5%" in out
    assert [path.name for path in tmp_path.iterdir()] == ["cat-grad_cam-tabby-small-cat.png"]


@pytest.mark.parametrize("option", [["--watch"], ["--allow-partial"], ["--priority", "batch"]])
def test_what_only_a_server_can_do_is_refused_without_one(engine, option, capsys):
    assert cli.run(["explain", "cat.png", "--local", *option]) == 2
    assert "need a server" in capsys.readouterr().err


def test_explain_without_a_server(engine, tmp_path):
    assert cli.run(["explain", "cat.png", "--local", "--store", "here", "--out", str(tmp_path)]) == 0
    assert engine.last.where == ("lite0", Path("here"))
    assert engine.last.asked == {
        "image": Path("cat.png"),
        "methods": [GradCam()],
        "targets": [],
        "text": "",
        "layer": (),
        "fusion": "mean",
        "evaluate": False,
        "size": "input",
        "signed": False,
        "precision": "auto",
        "boxes": None,
    }


def test_explain_says_how_much_a_map_that_stopped_early_was_asked(client, tmp_path, capsys):
    client.maps = (saliency(fraction=0.27, estimated_difference=0.0412),)
    cli.run(["explain", "some/cat.png", "--method", "score_cam:tolerance=0.05", "--out", str(tmp_path)])
    text = " ".join(capsys.readouterr().out.split())
    assert "of 27% of the queries; all of them would change it by 0.041 at most" in text
    assert client.last.asked["methods"] == [ScoreCam(tolerance=0.05)]


def test_explain_prints_tables_and_paths(client, tmp_path, capsys):
    client.maps = (
        saliency(boxes=(Box(1.4, 2.0, 6.6, 7.0, 0.456),)),
        saliency(GroupCam(groups=8), DOG, degenerate=True),
    )
    cli.run(
        ["explain", "some/cat.png", "--method", "grad_cam", "--method", "group_cam:groups=8", "--out", str(tmp_path)]
    )
    text = " ".join(capsys.readouterr().out.split())
    assert "cat.png (lite0 1.0)" in text
    assert "281 tabby, [small] cat 87.5% 5 dog 10.0%" in text
    assert "1234 4 ms 2.5 s" in text
    assert "Grad-CAM, tabby, [small] cat: x 1..7, y 2..7, score 0.46" in text
    assert "Group-CAM (groups=8), dog: no positive evidence, the map is empty" in text
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["cat-grad_cam-tabby-small-cat.png", "cat-group_cam-dog.png"]
    assert all(str(path) in text for path in paths)


def test_pictures_are_overlays(tmp_path):
    value = saliency()
    (path,) = cli.write_pictures([value], "cat", tmp_path / "new" / "folder")
    with Image.open(path) as image:
        assert image.tobytes() == value.overlay().tobytes()


def test_picture_of_a_map_that_lies_on_nothing_is_grey(tmp_path):
    (path,) = cli.write_pictures([saliency(lies_on=None)], "cat", tmp_path)
    with Image.open(path) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), np.round(255 * saliency().array).astype(np.uint8))


def test_pictures_of_one_run_do_not_overwrite_each_other(tmp_path):
    maps = [saliency(GroupCam(groups=groups)) for groups in (2, 4, 8)]
    names = [path.name for path in cli.write_pictures(maps, "cat", tmp_path)]
    stem = "cat-group_cam-tabby-small-cat"
    assert names == [f"{stem}.png", f"{stem}-2.png", f"{stem}-3.png"]
    assert [path.name for path in cli.write_pictures(maps, "cat", tmp_path)] == names  # a second run does


def test_a_class_without_a_label_is_named_by_its_index(tmp_path):
    (path,) = cli.write_pictures([saliency(target=Prediction(7, "", 1.0))], "cat", tmp_path)
    assert path.name == "cat-grad_cam-7.png"


FAULTS = {
    errors.InvalidOption: 2,
    errors.InvalidImage: 2,
    errors.NotFound: 2,
    errors.Unauthenticated: 2,
    errors.Unsupported: 2,
    errors.Unavailable: 1,
    errors.DeadlineExceeded: 1,
    errors.Internal: 1,
}


@pytest.mark.parametrize(("kind", "status"), FAULTS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_errors_are_one_line(client, capsys, kind, status):
    client.failure = kind("what was wrong")
    assert cli.run(["explain", "cat.png"]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "camserve: what was wrong\n")


def test_bad_method_is_found_before_anything_is_asked(client, capsys):
    assert cli.run(["explain", "cat.png", "--method", "group_cam:theta=101"]) == 2
    assert capsys.readouterr().err == "camserve: group_cam: theta must be 0..100, got 101\n"
    assert not hasattr(client, "last")


def test_folder_that_cannot_be_written(client, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.run(["explain", "cat.png", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_interrupt_is_quiet(client, capsys):
    client.failure = KeyboardInterrupt()
    assert cli.run(["explain", "cat.png"]) == 130
    assert capsys.readouterr().err.strip() == ""


@pytest.mark.parametrize("arguments", [["bogus"], ["explain"], ["explain", "a.png", "--size", "big"], ["serve", "-x"]])
def test_misuse(arguments, capsys):
    assert cli.run(arguments) == 2
    assert "Usage: camserve" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["explain", "--help"]])
def test_help_succeeds(arguments, capsys):
    assert cli.run(arguments) == 0
    assert "camserve" in capsys.readouterr().out


def test_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "camserve.engine", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.run(["explain", "cat.png"]) == 1
    assert capsys.readouterr().err == "Error: rich.console is not installed: pip install 'camserve[cli]'\n"


def test_without_click_the_command_says_what_to_install():
    program = "import sys; sys.modules['click'] = None; from camserve.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "the command camserve needs click and rich: pip install 'camserve[cli]'\n"


def test_nothing_listens(unused_tcp_port, capsys):
    assert cli.run(["models", "--address", f"127.0.0.1:{unused_tcp_port}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"camserve: no answer from 127.0.0.1:{unused_tcp_port}; is a camserve server running there?"
    )
    assert error.count("\n") == 1


def test_models_of_a_server(client, capsys):
    assert cli.run(["models"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "lite0 1.0 yes" in text
    assert "resnet50 2.1 no" in text


def test_models_of_a_store(tmp_path, capsys):
    assert cli.run(["models", "--store", str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "lite0 1.0 efficientnet-lite0 packed on first use" in text


def test_methods_as_json(capsys):
    assert cli.run(["methods", "--json"]) == 0
    described = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert list(described) == list(METHODS)
    assert described["group_cam"] == {
        "name": "group_cam",
        "title": "Group-CAM",
        "refused": "",
        "paper": GroupCam.paper,
        "needs": "",
        "cost": None,
        "variants": ["paper", "reference"],
        "parameters": [
            {
                "name": parameter.name,
                "type": parameter.type,
                "default": parameter.default,
                "minimum": parameter.minimum,
                "maximum": parameter.maximum,
                "choices": list(parameter.choices),
                "description": parameter.description,
            }
            for parameter in GroupCam.parameters()
        ],
    }
    assert described["grad_cam"]["variants"] == []


def test_methods_as_json_have_their_cost_for_a_model(capsys, monkeypatch):
    info = ModelInfo("mine", "1.0", (), (8, 8), (Layer("only", 40, 2, 2),), "only")
    monkeypatch.setattr("camserve.engine.Engine.load", lambda name, store: SimpleNamespace(info={"mine": info}[name]))
    assert cli.run(["methods", "--json", "--model", "mine"]) == 0
    costs = {method["name"]: method["cost"] for method in json.loads(capsys.readouterr().out)}
    assert costs == {name: spec.default_passes(info.layer("")) for name, spec in METHODS.items()}
    assert (costs["score_cam"], costs["group_cam"], costs["xrai"]) == (40, 33, 200)


def test_methods_for_people(capsys):
    assert cli.run(["methods"]) == 0
    text = capsys.readouterr().out
    for name, spec in METHODS.items():
        assert f"{name}: {spec.title}. {spec.paper}\n" in text
    assert "groups=32" in text


@pytest.fixture
def built(monkeypatch):
    calls = []

    def build_archive(source, **options):
        calls.append((source, options))
        return options["store"] / f"{source}.mar"

    monkeypatch.setattr("camserve.archive.build_archive", build_archive)
    return calls


def test_archive_packs_each_source(built, capsys, monkeypatch):
    monkeypatch.setenv("CAMSERVE_MODEL_STORE", "there")
    assert cli.run(["archive", "one", "two", "--weights", "DEFAULT", "--layer", "l"]) == 0
    assert capsys.readouterr().out.split() == [str(Path("there/one.mar")), str(Path("there/two.mar"))]
    assert [source for source, _ in built] == ["one", "two"]
    assert built[0][1] == {
        "name": None,
        "store": Path("there"),
        "version": "1.0",
        "detections": None,
        "weights": "DEFAULT",
        "outputs": None,
        "output": None,
        "units": (),
        "labels": None,
        "layer": "l",
        "licence": None,
        "evaluation": None,
        "calibration": None,
        "preprocessing": None,
        "references": None,
        "prompts": None,
    }


def test_archive_with_preprocessing(built):
    sizes = ["--resize", "256", "--crop", "224", "--interpolation", "bilinear"]
    assert cli.run(["archive", "one", *sizes, "--mean", "0", "0.5", "1", "--std", "1", "2", "3"]) == 0
    preprocessing = built[0][1]["preprocessing"]
    assert (preprocessing.resize_px, preprocessing.crop_px, preprocessing.interpolation) == (
        256,
        (224, 224),
        "bilinear",
    )
    assert (preprocessing.mean, preprocessing.std) == ((0, 0.5, 1), (1, 2, 3))


@pytest.mark.parametrize(
    ("given", "crop", "mean", "std"),
    [
        (["--crop", "128x64", "--mean", "0.5", "--std", "0.25"], (128, 64), (0.5,), (0.25,)),
        (["--crop", "64", "--mean", "0.1,0.2", "--std", "1 2"], (64, 64), (0.1, 0.2), (1, 2)),
        (
            ["--mean", "-1", "0", "1", "2", "--std", "1", "2", "3", "4", "--crop", "9x8"],
            (9, 8),
            (-1, 0, 1, 2),
            (1, 2, 3, 4),
        ),
    ],
)
def test_archive_with_inputs_of_any_shape(built, given, crop, mean, std):
    assert cli.run(["archive", "one", *given, "--resize", "64"]) == 0
    ((source, options),) = built
    found = options["preprocessing"]
    assert (source, found.crop_px, found.mean, found.std, found.channels) == ("one", crop, mean, std, len(mean))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            ["--crop", "64x", "--mean", "0", "--std", "1"],
            "--crop must be pixels, as 224, or height x width, as 128x64; got '64x'",
        ),
        (["--crop", "0", "--mean", "0", "--std", "1"], "--crop must be"),
        (["--crop", "64", "--mean", "a", "--std", "1"], "--mean must be numbers, one for each channel, got 'a'"),
        (["--crop", "64", "--mean", "0", "0", "--std", "1"], "std must have a finite number for each of 2 channels"),
        (["--crop", "64", "--mean", "0", "--std", "0"], "std must be above 0"),
    ],
)
def test_archive_with_an_odd_input_says_what_is_allowed(built, capsys, given, text):
    assert cli.run(["archive", "one", "--resize", "64", *given]) == 2
    assert text in capsys.readouterr().err
    assert not built


def test_archive_with_images_that_are_stretched(built):
    given = ["--resize", "128x64", "--crop", "64", "--mean", "0", "--std", "1"]
    assert cli.run(["archive", "one", *given]) == 0
    assert built[0][1]["preprocessing"].resize_px == (128, 64)


def test_archive_needs_all_of_the_preprocessing(built, capsys):
    assert cli.run(["archive", "one", "--resize", "256"]) == 2
    assert "come together" in capsys.readouterr().err
    assert not built


def test_archive_name_is_for_one_source(built, capsys):
    assert cli.run(["archive", "one", "two", "--name", "x"]) == 2
    assert "--name is for one source, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 2])
def test_main_exits_with_the_status(monkeypatch, status):
    monkeypatch.setattr(sys, "argv", ["camserve", *(["--version"] if status == 0 else ["bogus"])])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == status


def test_a_watched_model_without_predictions_shows_how_far_it_is():
    from rich.console import Console

    from camserve.cli.terminal import live_view

    lines = io.StringIO()
    with live_view(Console(file=lines), "face.png") as show:
        show((), 1, 2)
    assert lines.getvalue() == "face.png: 1 of 2 masked queries\n"
