"""What errors and log lines show of a stranger's text."""

from __future__ import annotations

import difflib

import pytest

from camserve.codecs import oip, plain, texts, v1
from camserve.errors import CamserveError
from camserve.gateway.api.status import message
from camserve.labels import resolve_label
from camserve.methods import parse_method, parse_method_text
from camserve.types import Layer, ModelInfo, Target
from camserve.types.request import ExplainRequest, OutputOptions, make_request
from camserve.wording import SHOWN_CHARACTERS, close_to, shown

LONG = "\x1b[31m\n" * 5000
MODEL = ModelInfo("m", "1", ("cat", "dog"), (8, 8), (Layer("stem", 4, 2, 2),), "stem")


@pytest.mark.parametrize("value", ["cat", "²", "it's", 7, -1.5, None, ["labels", "logits"], True])
def test_what_is_short_is_shown_as_python_writes_it(value: object):
    assert shown(value) == repr(value)


@pytest.mark.parametrize("value", [LONG, [LONG] * 50, {LONG: LONG}, 10**4000, LONG.encode(), [[[[LONG] * 9] * 9] * 9]])
def test_what_is_long_is_cut_and_control_characters_are_escaped(value: object):
    text = shown(value)
    assert len(text) <= SHOWN_CHARACTERS + 5
    assert text.isprintable()


@pytest.mark.parametrize(
    "refused",
    [
        lambda: MODEL.layer(LONG),
        lambda: resolve_label(LONG, MODEL.labels),
        lambda: parse_method(LONG),
        lambda: parse_method("group_cam", {LONG: 1}),
        lambda: parse_method("group_cam", {"variant": LONG}),
        lambda: parse_method("group_cam", {"groups": LONG}),
        lambda: parse_method("group_cam", {"groups": -(10**4000)}),
        lambda: parse_method_text("group_cam:" + LONG),
        lambda: OutputOptions(size=LONG),
        lambda: OutputOptions(encoding=LONG),
        lambda: OutputOptions(colormap=LONG),
        lambda: ExplainRequest(b"", fusion=LONG),
        lambda: ExplainRequest(b"", top_predictions=-(10**4000)),
        lambda: ExplainRequest(b"", evaluation_steps=10**4000),
        lambda: ExplainRequest(b"", version=LONG).fit(MODEL),
        lambda: make_request(b"", targets=[Target(top_k=-(10**4000))]),
        lambda: texts.whole("n", LONG),
        lambda: texts.switch("n", LONG),
        lambda: texts.boxes("n", LONG),
        lambda: texts.text("n", [LONG]),
        lambda: plain.decode({"data": b"", LONG: b"1"}),
        lambda: plain.decode({"data": b"", "format": LONG}),
        lambda: plain.decode({"data": b"", "options": [LONG]}),
        lambda: plain.decode({"data": b"", "options": {"target": {LONG: LONG}}}),
        lambda: plain.decode({"data": b"", "options": {"methods": [[LONG]]}}),
        lambda: v1.request_from_bytes(b"\xff" * 50_000),
        lambda: oip.decode(b"\xff" * 50_000),
    ],
)
def test_no_error_repeats_a_long_text(refused):
    with pytest.raises(CamserveError) as caught:
        refused()
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()


def test_close_names_are_sought_for_short_texts_alone(monkeypatch: pytest.MonkeyPatch):
    sought: list[int] = []
    find = difflib.get_close_matches

    def noting(word, possibilities, *arguments):
        sought.append(len(possibilities))
        return find(word, possibilities, *arguments)

    monkeypatch.setattr(difflib, "get_close_matches", noting)
    assert close_to("tabi", ["tabby", "dog"]) == ["tabby"]
    assert close_to("x" * 65, ["x" * 64]) == []
    assert close_to("x", (f"{number}" for number in range(10**5))) == []
    assert sought == [2, 5000]


@pytest.mark.parametrize("text", ["x" * 100_000, "é" * 100_000, "\U0001f63a" * 100_000, "%" * 100_000])
def test_a_status_fits_into_the_metadata_of_a_client(text: str):
    """C-core begins to refuse metadata above 8 KiB; what is not ASCII takes three bytes for each of its own."""
    cut = message(CamserveError(text))
    assert len(cut) > 100
    assert cut.endswith("...")
    assert sum(1 if " " <= each <= "~" and each != "%" else 3 * len(each.encode()) for each in cut) <= 2100
    assert message(CamserveError("as it is")) == "as it is"
