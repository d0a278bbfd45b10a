"""Feeds strangers' bytes to everything that reads some, and counts what comes out that should not.

    python benchmarks/fuzz.py image --seconds 60      # one target, results/fuzz.json
    python benchmarks/fuzz.py all --seconds 3600      # an hour, shared by all targets
    python benchmarks/fuzz.py all --inputs 100        # a hundred inputs for each: does it run?
    python benchmarks/fuzz.py --write-corpus          # the seeds in fuzz_corpus/
    python benchmarks/fuzz.py --render                # the figures in docs/security.md, at once

Every target may raise the errors that it documents. Anything else is a finding, and so is an input that takes more than
two seconds of processor time; each kind is printed with an input that shows it. Each target has a process of its own,
so that one that dies is counted too.

Inputs are seeds changed at random. With atheris (`pip install 'camserve[fuzz]'`, or `pip install --target DIR atheris`
and `PYTHONPATH=DIR`) every other input is one of its own, guided by the Python code that it reaches; the results say
which.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import torch

try:
    import atheris
except ImportError:
    atheris = None

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "fuzz_corpus"
RESULTS = HERE / "results" / "fuzz.json"
SECURITY = common.ROOT / "docs" / "security.md"
TARGETS = (
    *("image", "v1", "v1_json", "oip", "oip_json", "plain", "step", "answer", "tokens", "archive", "text", "program"),
    "evidence",
)
PACKAGES = ("pillow", "protobuf", "safetensors", "tokenizers", *(["atheris"] if atheris else []))
SLOW_S = 2.0
MAX_BYTES = 2**14
"""Bytes of an input: what harms by its size alone is for tests and `hostile.py`."""

SEPARATOR = b"\n--\n"
"""Separates the parts of an input that stands for several."""

MEMBERS = ("model.json", "labels.json", "weights.safetensors", "references.safetensors")
PROGRAM = {
    "archive_format": b"pt2",
    "archive_version": b"0",
    ".data/version": b"3",
    "data/weights/weight_0": bytes(4 * 2 * 3),
    "data/weights/weight_1": bytes(4 * 2),
}
"""Files of a program of torch.export that are the same in every input: numbers, and what it is."""
PROGRAM_MEMBERS = (
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)

Read = Callable[[bytes], object]


def targets(work: Path) -> dict[str, tuple[Read, tuple[type[Exception], ...]]]:
    """Returns what is fuzzed, and the errors that it may raise; files are written into the folder `work`."""
    from camserve import images
    from camserve.archive import read_card
    from camserve.archive.hugging_face.towers import TextTower
    from camserve.archive.package import read_weights
    from camserve.archive.references import read_references
    from camserve.codecs import oip, oip_json, plain, step, v1, v1_json
    from camserve.errors import CamserveError, InvalidImage, InvalidInput, InvalidOption, Unsupported
    from camserve.evidence.replay import compare, read_record, request_options
    from camserve.evidence.verify import verify
    from camserve.gateway.api.access import parse_tokens
    from camserve.gateway.ops.settings import Settings
    from camserve.gateway.pool.check_answer import check_answer
    from camserve.gateway.pool.fake import MODEL
    from camserve.runtimes.exported_network import exported_network
    from camserve.runtimes.exported_program import read_program
    from camserve.types import Preprocessing
    from camserve.types.request import ExplainRequest

    limits = Settings().request_limits()
    file = work / "x.mar"
    items = _items()

    def image(data: bytes) -> None:
        decoded(data)
        if data.startswith(b"\x89PNG"):
            decoded(_with_checksums(data))

    def decoded(data: bytes) -> None:
        size = images.probe(data, max_pixels=4 * 10**6)
        picture = images.decode(data, max_pixels=4 * 10**6)
        assert sorted(picture.size) == sorted(size)
        assert picture.mode == "RGB"
        grey, _ = images.sent_view(data, Preprocessing(8, (8, 8), (0.5,), (0.5,)))
        assert grey.mode in ("L", "I;16")

    models = (MODEL, replace(MODEL, outputs="value"), replace(MODEL, outputs="text-image", dimension=2))

    def fit(request: ExplainRequest) -> None:
        """Fits a request to the first model that takes its targets."""
        for model in models:
            try:
                request.fit(model, limits)
                return
            except (InvalidOption, Unsupported):
                if model is models[-1]:
                    raise

    def json_body(data: bytes) -> None:
        # A form where it is none of JSON's beginnings.
        content_type = "application/json" if data[:1] in (b"{", b"[", b"") else "multipart/form-data; boundary=x"
        fit(v1.request_from_bytes(v1_json.request_bytes(data, content_type), limits))

    def inference(data: bytes) -> None:
        # JSON, and perhaps binary elements.
        text, separator, binary = data.partition(SEPARATOR)
        asked = oip_json.decode(text + binary, str(len(text)) if separator else None, "fake", "", limits)
        fit(asked.inference.request)

    def plain_fields(data: bytes) -> None:
        # Fields as TorchServe hands them over: name, value, name, value, ...
        parts = data.split(SEPARATOR)
        entry = {name.decode("latin-1"): value for name, value in zip(parts[::2], parts[1::2], strict=False)}
        fit(plain.decode(entry).request)

    def archive(data: bytes) -> None:
        if data.startswith(b"PK"):
            file.write_bytes(data)
        else:  # members, in the order of their names
            with zipfile.ZipFile(file, "w") as packed:
                for name, part in zip(MEMBERS, data.split(SEPARATOR), strict=False):
                    packed.writestr(name, part)
        card = read_card(file)
        read_weights(file)
        read_references(file, card)

    def text(data: bytes) -> None:
        tower = TextTower(torch.nn.Module(), data)
        for words in ("a photo of a cat", "", "na\u00efve  \u732b!"):
            assert all(isinstance(token, int) for token in tower.tokens(words))

    def program(data: bytes) -> None:
        if not data.startswith(b"PK"):  # what a program says, in the order of `PROGRAM_MEMBERS`
            data = _zipped(PROGRAM | dict(zip(PROGRAM_MEMBERS, data.split(SEPARATOR), strict=False)))
        file.write_bytes(data)
        exported_network(read_program(file))

    def evidence(data: bytes) -> None:
        file.write_bytes(data)
        with suppress(InvalidInput):
            verify([file])
        record = read_record(file, 1 if data.count(b"\n") > 1 else None)
        with suppress(InvalidOption):  # it has hashes in place of words, or what no request may have
            request_options(record)
        compare(record, record)

    return {
        "image": (image, (InvalidImage,)),
        "v1": (lambda data: fit(v1.request_from_bytes(data)), (CamserveError,)),
        "v1_json": (json_body, (CamserveError,)),
        "oip": (lambda data: fit(oip.decode(data).request), (CamserveError,)),
        "oip_json": (inference, (CamserveError,)),
        "plain": (plain_fields, (CamserveError,)),
        "step": (step.request_from_bytes, (CamserveError,)),
        # The gateway takes ValueError for a malformed answer.
        "answer": (
            lambda data: check_answer(MODEL, items, step.result_from_bytes(data)),
            (CamserveError, ValueError),
        ),
        "tokens": (lambda data: parse_tokens(Path("tokens.toml"), data), (InvalidOption,)),
        "archive": (archive, (InvalidInput,)),
        "text": (text, (InvalidInput, InvalidOption)),
        "program": (program, (InvalidInput,)),
        "evidence": (evidence, (InvalidInput,)),
    }


def _zipped(files: dict[str, bytes]) -> bytes:
    """Returns a zip file with files in a folder, as PyTorch writes them."""
    import io

    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as packed:
        for name, content in files.items():
            packed.writestr(zipfile.ZipInfo(f"network/{name}", (1980, 1, 1, 0, 0, 0)), content)
    return written.getvalue()


def _with_checksums(data: bytes) -> bytes:
    """Returns a PNG file with the right checksums: a changed byte is seldom left to the decoder otherwise."""
    fixed, position = bytearray(data), 8
    while position + 8 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4])
        if end + 4 <= len(data):
            fixed[end : end + 4] = zlib.crc32(data[position + 4 : end]).to_bytes(4)
        position = end + 4
    return bytes(fixed)


@dataclass
class Round:
    """Runs one target until its time or its number of inputs is over, and writes down what it found."""

    target: str
    read: Read
    allowed: tuple[type[Exception], ...]
    seconds: float
    inputs: int
    report: Path
    findings: Path
    done: int = 0
    hangs: int = 0
    slowest_s: float = 0.0
    refused: int = 0
    foreign: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began_s = time.monotonic()

    def __call__(self, data: bytes) -> None:
        """Feeds one input; ends the process when everything is done."""
        began_s = time.thread_time()
        try:
            self.read(data)
        except self.allowed:
            self.refused += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # what panics in Rust is no Exception
            self._found(_name(error), data, traceback.format_exc())
        took_s = time.thread_time() - began_s
        self.slowest_s = max(self.slowest_s, took_s)
        if took_s > SLOW_S:
            self.hangs += 1
            self._keep("hang", data, f"{took_s:.1f} s of processor time")
        self.done += 1
        if self.done >= self.inputs or time.monotonic() - self._began_s > self.seconds:
            self._write()
            os._exit(0)  # libFuzzer has no other end

    def _found(self, name: str, data: bytes, text: str) -> None:
        if name not in self.foreign:
            self._keep(name, data, text)
        self.foreign[name] = self.foreign.get(name, 0) + 1

    def _keep(self, name: str, data: bytes, text: str) -> None:
        path = self.findings / f"{self.target}-{blake2b(data, digest_size=6).hexdigest()}"
        path.write_bytes(data)
        print(f"{self.target}: {name}, with {path}\n{text}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        content = {
            "inputs": self.done,
            "refused": self.refused,
            "seconds": round(time.monotonic() - self._began_s, 1),
            "slowest_s": round(self.slowest_s, 3),
            "hangs": self.hangs,
            "foreign": self.foreign,
        }
        self.report.write_text(json.dumps(content))


def _name(error: BaseException) -> str:
    """Returns an exception's class and the line that raised it, which make a kind of finding."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__module__}.{type(error).__name__} at {'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"
    )


def child(target: str, seconds: float, inputs: int, report: Path, findings: Path) -> None:
    """Fuzzes one target in this process, which does not return."""
    logging.disable()
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["camserve", "PIL"]) if atheris else nullcontext():
        read, allowed = targets(Path.cwd())[target]
    one = Round(target, read, allowed, seconds, inputs, report, findings)
    changed = _changed(target)
    if not atheris:
        while True:
            one(next(changed))

    def both(data: bytes) -> None:
        one(data)  # whatever reached something new, changed: mostly what is refused early
        one(next(changed))  # nearly good ones get further

    options = [f"-max_len={MAX_BYTES}", "-len_control=0", "-mutate_depth=1", "-rss_limit_mb=4096", "-timeout=120"]
    Path("new").mkdir()  # libFuzzer writes the inputs that reach something new into the first folder
    folders = ["new", str(CORPUS / target)]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={findings}/{target}-", "-verbosity=0", *folders], both)
    atheris.Fuzz()


def _changed(target: str) -> Iterator[bytes]:
    """Yields seeds with a few places changed, cut out or doubled."""
    chance = random.Random(0)
    seeds = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    while True:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((0, 1, 1, 2, 4, 8))):
            start, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 1, 2, 4, 16))
            new = (b"", chance.randbytes(length), bytes(data[start : start + length]) * 2, b"\xff" * length)
            data[start : start + length] = chance.choice(new)
        yield bytes(data)


def fuzz(target: str, seconds: float, inputs: int, findings: Path) -> dict[str, Any]:
    """Returns what was found in one target, by a process of its own."""
    report = findings / f"{target}.json"
    command = [sys.executable, HERE / "fuzz.py", target, "--seconds", str(seconds), "--inputs", str(inputs)]
    with tempfile.TemporaryDirectory() as work:  # where a child writes
        done = subprocess.run([*command, "--report", report], cwd=work, check=False)
    if not report.exists():
        print(f"{target}: died with code {done.returncode}; see {findings}", file=sys.stderr)
        return {"inputs": 0, "foreign": {f"the process died with code {done.returncode}": 1}, "hangs": 0}
    return dict(json.loads(report.read_text()))


def _items() -> tuple[Any, ...]:
    """Returns the items to which the seeds of `answer` are the answer."""
    from camserve.methods import GradCam, ScoreCam
    from camserve.types import Item, Target, Task

    tasks = (Task(0, GradCam(), 0, 0, "features"), Task(1, ScoreCam(), 0, 3, "features", ordered=True))
    return (Item(_seeds_of_image()["grey.png"], (Target(index=1),), tasks, top_predictions=3),)


def _seeds_of_image() -> dict[str, bytes]:
    import io

    import numpy as np
    from PIL import Image

    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(108, dtype=np.uint16).reshape(9, 12) * 600)
    frames = [rgba.convert("RGB"), rgba.rotate(180).convert("RGB")]
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "baseline.jpeg": (rgba.convert("RGB"), {"exif": exif}),
        "progressive.jpeg": (rgba.convert("RGB"), {"progressive": True, "comment": b"a"}),
        "cmyk.jpeg": (rgba.convert("CMYK"), {"progressive": True}),
        "grey.png": (rgba.convert("L"), {"exif": exif}),
        "rgba.png": (rgba, {}),
        "palette.png": (rgba.convert("RGB").quantize(8), {"transparency": 3}),
        "16bit.png": (deep, {}),
        "16bit.tiff": (deep, {}),
        "big-endian.tiff": (Image.fromarray(np.asarray(deep).astype(">u2")), {}),
        "lzw.tiff": (deep, {"compression": "tiff_lzw"}),
        "deflate.tiff": (rgba.convert("L"), {"compression": "tiff_adobe_deflate"}),
        "packbits.tiff": (rgba.convert("1"), {"compression": "packbits"}),
        "lossy.webp": (rgba.convert("RGB"), {"exif": exif}),
        "lossless.webp": (rgba, {"lossless": True}),
        "animated.webp": (frames[0], {"save_all": True, "append_images": frames[1:], "lossless": True}),
    }
    found = {}
    for name, (picture, options) in made.items():
        file = io.BytesIO()
        picture.save(file, name.rpartition(".")[2].upper(), **options)
        found[name] = file.getvalue()
    return found


def seeds() -> dict[str, dict[str, bytes]]:
    """Returns small inputs by target and name, from which fuzzing begins."""
    import base64
    import io

    import numpy as np
    from safetensors.torch import save

    from camserve.codecs import step, v1
    from camserve.gateway.pool.fake import MODEL
    from camserve.gateway.pool.fake_answers import answer
    from camserve.oip import inference_pb2
    from camserve.types import Vector
    from camserve.types.request import make_request

    pictures = _seeds_of_image()
    photo = pictures["grey.png"]
    full = make_request(
        photo,
        [("group_cam", {"groups": 4}), "auto", "rise", "xrai"],
        ["tabby", 2],
        layer=["features", "stem"],
        evaluate=True,
        boxes=True,
        size="original",
        encoding="overlay_png",
    )
    vectors = [Vector([1.0, 2.0]), Vector(image=photo), Vector(image=np.zeros((2, 2, 3), np.uint8))]
    infer = inference_pb2.ModelInferRequest(model_name="fake", id="7")
    infer.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(photo)
    infer.outputs.add(name="saliency")
    infer.parameters["explain_method"].string_param = "grad_cam;group_cam:groups=4"
    infer.parameters["explain_targets"].string_param = "top3;text:a cat, asleep"
    infer.parameters["timeout"].int64_param = 1000
    raw = inference_pb2.ModelInferRequest(model_name="fake")
    raw.inputs.add(name="image", datatype="UINT8", shape=[1, 3, 4, 3])
    raw.raw_input_contents.append(bytes(36))
    in_base64 = base64.b64encode(photo).decode()
    options = {"explain_method": "rise:masks=9", "explain_targets": ["top2", 4], "explain_boxes": 0.5, "priority": 1}
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [in_base64]}
    tensor |= {"parameters": {"content_type": "base64"}}
    asked = {"id": "7", "parameters": options, "inputs": [tensor], "outputs": [{"name": "saliency"}]}
    image = {"name": "image", "datatype": "FP32", "shape": [32, 48], "parameters": {"binary_data_size": 4 * 32 * 48}}
    nested = {"name": "image", "datatype": "UINT8", "shape": [2, 1, 3], "data": [[[1, 2, 3]], [[4, 5, 6]]]}
    typed = {"image": {"encoded": in_base64}, "methods": [{"groupCam": {"groups": 4}}], "targets": [{"label": "tabby"}]}
    form = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + photo + b"\r\n--x\r\n"
        b'Content-Disposition: form-data; name="request"\r\n\r\n{"targets": [{"topK": 2}]}\r\n--x--\r\n'
    )
    items = _items()
    card = {
        "name": "mine",
        "version": "1.0",
        "architecture": "torchvision:resnet18",
        "preprocessing": {"resize_px": 64, "crop_px": [64, 64], "mean": [0, 0, 0], "std": [1, 1, 1]},
        "layer": None,
        "source": "",
        "licence": "",
        "outputs": "embedding",
    }
    held = save({"references": torch.eye(2)})
    parts = [json.dumps(card).encode(), b'["a", "b"]', save({"a": torch.zeros(2, 2)}), held]
    archives = {"members": SEPARATOR.join(parts)}
    for name, compression in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as packed:
            for member, part in zip(MEMBERS, parts, strict=True):
                packed.writestr(member, part)
        archives[f"{name}.mar"] = file.getvalue()
    fields = {"data": photo, "options": b'{"methods": [{"name": "rise", "masks": 9}], "targets": ["top2", 4]}'}
    more = {"body": photo, "method": b"score_cam", "layer": b"stem", "boxes": b"0.5 all", "size": b"input"}
    tokens = '[tokens.{}]\nsha256 = "' + "0a" * 32 + '"\nrequests_per_s = 2.5\npriority = "batch"\n'
    return {
        "image": pictures,
        "v1": {
            "full": v1.request_to_proto(full).SerializeToString(),
            **{
                name: v1.request_to_proto(make_request(photo, ["grad_cam"], targets)).SerializeToString()
                for name, targets in (
                    ("classes", ["contrast:1>2,3", "finer:4", "against:top2"]),
                    ("values", ["down:0", "up:1"]),
                    ("vectors", vectors),
                    ("texts", ["text:a cat; asleep", "contrast:0>1"]),
                )
            },
            "pixels": v1.request_to_proto(
                make_request(np.zeros((3, 4, 3), np.uint8), ["score_cam"], [1])
            ).SerializeToString(),
        },
        "v1_json": {"json": json.dumps(typed).encode(), "form": form},
        "oip": {"encoded": infer.SerializeToString(), "raw": raw.SerializeToString()},
        "oip_json": {
            "base64": json.dumps(asked).encode(),
            "binary": json.dumps({"inputs": [image]}).encode() + SEPARATOR + bytes(4 * 32 * 48),
            "nested": json.dumps({"inputs": [nested]}).encode(),
        },
        "plain": {
            name: SEPARATOR.join(part for pair in form.items() for part in (pair[0].encode(), pair[1]))
            for name, form in (("json", fields), ("form", more))
        },
        "step": {"items": step.request_to_bytes(items), "describe": step.DESCRIBE},
        "answer": {"result": step.result_to_bytes(answer(MODEL, items))},
        "tokens": {"two.toml": (tokens.format("a") + "[tokens.b]\nsha256 = '" + "1b" * 32 + "'\n").encode()},
        "archive": archives,
        "text": _seeds_of_text(),
        "program": _seeds_of_program(),
        "evidence": _seeds_of_evidence(),
    }


def _seeds_of_text() -> dict[str, bytes]:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [*"abcdefghijklmnopqrstuvwxyz", "ca", "cat", "<s>", "</s>"]
    pairs = Tokenizer(models.BPE({one: at for at, one in enumerate(letters)}, [("c", "a"), ("ca", "t")], unk_token="a"))
    pairs.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pairs.pre_tokenizer = pre_tokenizers.Split("[a-z]+", "removed", invert=True)
    pairs.add_special_tokens(["<s>", "</s>"])
    pairs.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 28), ("</s>", 29)])
    words = ["[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "##s"]
    pieces = Tokenizer(models.WordPiece({one: at for at, one in enumerate(words)}, unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    likely = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581a", -1.0), ("\u2581cat", -2.0), ("c", -3.0)], 0, False))
    likely.pre_tokenizer = pre_tokenizers.Metaspace()
    padding = {"token": 0, "left": False, "masked": True}
    return {
        name: json.dumps({"max_length": 16, "padding": filled, "tokeniser": json.loads(made.to_str())}).encode()
        for name, made, filled in (("bpe", pairs, None), ("wordpiece", pieces, padding), ("unigram", likely, padding))
    }


def _seeds_of_program() -> dict[str, bytes]:
    import io

    class Means(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.mean((2, 3)))

    shapes = ({0: torch.export.Dim("n")},)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Means(), (torch.zeros(2, 3, 4, 4),), dynamic_shapes=shapes), file)
    with zipfile.ZipFile(file) as packed:
        files = {name.partition("/")[2]: packed.read(name) for name in packed.namelist()}
    said = json.loads(files[PROGRAM_MEMBERS[0]])
    for node in said["graph_module"]["graph"]["nodes"]:
        node["metadata"].pop("stack_trace", None)  # it has the paths of this machine
    files[PROGRAM_MEMBERS[0]] = json.dumps(said).encode()
    whole = _zipped({name: files[name] for name in (*PROGRAM, *PROGRAM_MEMBERS)})
    return {"members": SEPARATOR.join(files[name] for name in PROGRAM_MEMBERS), "whole.pt2": whole}


def _seeds_of_evidence() -> dict[str, bytes]:
    from camserve.evidence.canonical import canonical, sha256
    from camserve.evidence.log import FIRST
    from camserve.evidence.record import FORM

    maps = {"method": 0, "target": "tabby", "score": 0.5, "shape": [32, 48], "sha256": "0a" * 32, "complete": True}
    curves = {"protocol": "rise", "deletion_auc": 0.125, "insertion_auc": 1e-7, "sha256": "0b" * 32}
    record: dict[str, Any] = {
        "record": FORM,
        "number": 1,
        "previous": FIRST,
        "request_id": "4f0c",
        "model": {"name": "fake", "version": "1.0", "weights": "0c" * 32},
        "image": {"form": "file", "bytes": 14528, "sha256": "0d" * 32},
        "methods": [{"name": "group_cam", "parameters": {"groups": 16, "theta": 70}}],
        "targets": [{"index": 1}, {"contrast": {"of": {"index": 1}, "than": [{"index": 2}], "gamma": 0.5}}],
        "layers": ["features"],
        "fusion": "mean",
        "output": {"size": "input", "signed": False},
        "evaluation_steps": 28,
        "precision": {"asked": "exact", "used": "exact"},
        "piece": 16,
        "gateway": {"camserve": "0.1.0"},
        "workers": [{"torch": "2.9.1", "threads": "2"}],
        "maps": [maps | {"faithfulness": curves}],
    }
    first = canonical(record)
    more = {"number": 2, "previous": sha256(first.encode()), "targets": [{"text": {"sha256": "0e" * 32, "bytes": 5}}]}
    lines = f"{first}\n{canonical(record | more)}\n"
    return {"record.json": f"{first}\n".encode(), "log.jsonl": lines.encode()}


def write_corpus() -> None:
    """Writes the seeds into `fuzz_corpus/`."""
    for target, files in seeds().items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (CORPUS / target / name).write_bytes(data)


def summary(content: Mapping[str, Any]) -> str:
    """Returns what the page on security says of results: how many inputs each target got, and what came out."""
    found = content["total"]
    each = ", ".join(f"{name} {one['inputs']:,}" for name, one in content["targets"].items())
    return (
        f"{found['inputs']:,} inputs; exceptions of a foreign type: {found['foreign']}; inputs that took {SLOW_S:g} s: "
        f"{found['hangs']} (`benchmarks/results/{RESULTS.name}`). By target: {each}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", default=["all"], help=f"all, {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--inputs", type=int, default=sys.maxsize, help="at most, for each target")
    parser.add_argument("--write-corpus", action="store_true", help="write the seeds anew")
    parser.add_argument("--render", action="store_true", help="the figures of docs/security.md from the JSON, at once")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write_corpus:
        write_corpus()
        return 0
    if given.render:
        found = summary(json.loads(given.out.read_text()))
        SECURITY.write_text(common.embedded(SECURITY.read_text(), "fuzz", found))
        return 0
    if unknown := set(given.targets) - {*TARGETS, "all"}:
        parser.error(f"there are no targets {', '.join(sorted(unknown))}")
    chosen = TARGETS if "all" in given.targets else tuple(given.targets)
    if given.report:
        child(*chosen, given.seconds, given.inputs, given.report, given.report.parent)
    findings = Path(tempfile.mkdtemp(prefix="camserve-fuzz-findings-"))
    results = {target: fuzz(target, given.seconds / len(chosen), given.inputs, findings) for target in chosen}
    environment = common.environment(torch.device("cpu"))
    environment["versions"] |= {name: version(name) for name in PACKAGES}
    total = {
        "inputs": sum(one["inputs"] for one in results.values()),
        "foreign": sum(sum(one["foreign"].values()) for one in results.values()),
        "hangs": sum(one["hangs"] for one in results.values()),
    }
    content = {"environment": environment, "guided": atheris is not None, "total": total, "targets": results}
    common.write(given.out, content)
    print(json.dumps({"total": total, "targets": results}, indent=2))
    return 1 if total["foreign"] or total["hangs"] else 0


if __name__ == "__main__":
    sys.exit(main())
