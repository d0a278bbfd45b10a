"""Makes the evidence record of one answer: what was asked and computed, and hashes of image, maps and reply.

Nothing of the image, of a text, of a mask or of a vector is in a record, only their SHA-256: whoever has one can show
that it was this one, and nobody can get it back. The fields are listed in docs/operations.md.
"""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np
from google.protobuf import json_format
from PIL import Image

from camserve import __version__, images
from camserve.codecs import v1
from camserve.evidence.canonical import canonical, sha256
from camserve.images import ImageContent
from camserve.types import AnyTarget, Explanation, Faithfulness, InputView, SaliencyMap
from camserve.types.request import FittedRequest
from camserve.types.targets import words_in

FORM = "camserve.evidence.v1"
"""Name of the form of a record; a field may be added to it, none taken away."""

Record = dict[str, Any]

_GATEWAY_LIBRARIES = ("numpy", "Pillow", "protobuf", "grpcio")


@dataclass(frozen=True)
class Asked:
    """Tells of a call what its request does not."""

    request_id: str = ""
    token: str = ""
    """Name of the token, never its secret; "" where nobody needs one."""
    door: str = ""
    """The "package.Service/Method" by which it came; "" where there is no server."""


@dataclass
class Witness:
    """Sees an answer while it is made, and tells what its record holds.

    Args:
        asked: the call.
        fitted: the request, with its methods chosen.
    """

    asked: Asked
    fitted: FittedRequest
    explanation: Explanation | None = None
    reply: str = ""
    """SHA-256 of the reply without its evidence."""
    _maps: list[Record] = field(default_factory=list)

    def seen(self, maps: Iterable[SaliencyMap]) -> Iterator[SaliencyMap]:
        """Yields maps, and notes each."""
        hidden = any(words for target in self.fitted.targets for words in words_in(target))
        for saliency in maps:
            self._maps.append(_map(saliency, self.fitted, hidden))
            yield saliency

    def finished(self, finish: Callable[[], Explanation]) -> Callable[[], Explanation]:
        """Returns a function that notes the explanation, without maps, that another returns."""

        def noting() -> Explanation:
            self.explanation = finish()
            return self.explanation

        return noting

    def record(self) -> Record:
        """Returns the record; everything of the answer must have been seen."""
        assert self.explanation is not None, "the answer was seen"
        request, found, model = self.fitted.request, self.explanation, self.fitted.model
        workers, preprocessing = _workers(found.environments)
        record: Record = {
            "record": FORM,
            "time": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "request_id": self.asked.request_id,
            "token": self.asked.token,
            "model": {"name": model.name, "version": model.version, "weights": model.weights},
            "image": image_told(request.image),
            "preprocessing": preprocessing,
            "input": _view(found.input),
            "methods": [{"name": one.name, "parameters": asdict(one)} for one in self.fitted.methods],
            "targets": [target_told(target) for target in self.fitted.targets],
            "layers": [layer.name for layer in self.fitted.parts.layers if layer.name],
            "fusion": request.fusion,
            "output": {"size": request.output.size, "signed": request.output.signed},
            "evaluation_steps": request.evaluation_steps if request.evaluate else 0,
            "precision": {"asked": request.precision, "used": found.cost.precision},
            "runtime": found.cost.runtime,
            "piece": self.fitted.piece,
            "queries": found.cost.queries,
            "evaluation_queries": found.cost.evaluation_queries,
            "cached": found.cost.cached,
            "gateway": gateway_environment(),
            "workers": workers,
            "maps": self._maps,
            "reply": {"sha256": self.reply, "door": self.asked.door},
        }
        return record | ({"text": text_told(request.text)} if request.text else {})


def line_of(explanation: Explanation, fitted: FittedRequest) -> str:
    """Returns the record of an answer that no gateway has made, as one line of JSON."""
    witness = Witness(Asked(), fitted, explanation)
    for _ in witness.seen(explanation.maps):
        pass
    return canonical(witness.record())


def map_digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of a map: its float32 numbers, little-endian, row by row."""
    return sha256(np.ascontiguousarray(array, "<f4").data.cast("B"))


def image_told(image: ImageContent) -> Record:
    """Returns what a record says of an image: the SHA-256 of its file as it was sent, or of a tensor's numbers."""
    if isinstance(image, Image.Image):
        image = images.as_file(image)
    if isinstance(image, bytes):
        return {"sha256": sha256(image), "bytes": len(image), "form": "file"}
    little = np.ascontiguousarray(image, image.dtype.newbyteorder("<"))
    shape = [*image.shape, *([1] if image.ndim == 2 else [])]
    return {"sha256": sha256(little.data.cast("B")), "bytes": little.nbytes, "form": image.dtype.name, "shape": shape}


def target_told(target: AnyTarget) -> Record:
    """Returns what a record says of a target: its ProtoJSON, with hashes instead of words, vectors and pictures."""
    told: Record = json_format.MessageToDict(v1.target_to_proto(target), preserving_proto_field_name=True)
    if "vector" in told:
        told["vector"] = _hash_of(told["vector"])
    if "reference" in told:
        told["reference"] = _hash_of(told["reference"].get("encoded") or told["reference"]["tensor"]["data"])
    if "text" in told:
        told["text"] = text_told(told["text"])
    if told.get("word", {}).get("words"):
        told["word"]["words"] = text_told(told["word"]["words"])
    for name in ("mask", "grid"):
        if name in told.get("region", {}):
            told["region"][name] = _hash_of(told["region"][name])
    return told


def gateway_environment() -> Record:
    """Returns what the maps are finished with: versions by name, and the kind of machine."""
    found = {"camserve": __version__, "python": platform.python_version(), "machine": platform.machine()}
    return found | {name: metadata.version(name) for name in _GATEWAY_LIBRARIES if _is_there(name)}


def _is_there(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _hash_of(encoded: str) -> Record:
    content = base64.b64decode(encoded)
    return {"sha256": sha256(content), "bytes": len(content)}


def text_told(text: str) -> Record:
    """Returns what a record says of a text."""
    return {"sha256": sha256(text.encode()), "bytes": len(text.encode())}


def _view(view: InputView) -> Record:
    return {"original_size": list(view.original_size), "crop": list(view.crop), "size": list(view.size)}


def _workers(environments: Iterable[str]) -> tuple[list[Record], Record]:
    """Returns what each kind of worker computes with, and how it makes an image the network's input."""
    workers: list[Record] = [json.loads(one) for one in environments if one]
    found = [one.pop("preprocessing", {}) for one in workers]
    return workers, found[0] if found else {}


def _map(saliency: SaliencyMap, fitted: FittedRequest, hidden: bool) -> Record:
    text = saliency.target_text
    told: Record = {
        "method": fitted.methods.index(saliency.method),
        "target": text_told(text) if hidden else text,
        "score": float(saliency.score),
        "shape": list(saliency.array.shape),
        "sha256": map_digest(saliency.array),
        "complete": saliency.complete,
        "fraction": float(saliency.fraction),
        "degenerate": saliency.degenerate,
    }
    if saliency.faithfulness is not None:
        told["faithfulness"] = _faithfulness(saliency.faithfulness)
    return told


def _faithfulness(found: Faithfulness) -> Mapping[str, Any]:
    curves = np.concatenate([found.deletion, found.insertion]).astype("<f8")
    return {
        "protocol": found.protocol,
        "deletion_auc": float(found.deletion_auc),
        "insertion_auc": float(found.insertion_auc),
        "sha256": sha256(curves.data.cast("B")),
    }
