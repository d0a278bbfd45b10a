"""Hypothesis strategies of the values that travel, for the tests of the codecs."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from camserve.finalise.encode import ARRAYS
from camserve.methods import METHODS, Auto
from camserve.types import (
    ENCODINGS,
    FUSIONS,
    MAP_SIZES,
    OUTPUTS,
    PRECISIONS,
    PRIORITIES,
    Against,
    Box,
    BoxOptions,
    Contrast,
    Cost,
    Explanation,
    Faithfulness,
    Finer,
    InputView,
    Layer,
    ModelInfo,
    Prediction,
    Region,
    SaliencyMap,
    StreamOptions,
    Target,
    Text,
    TextInput,
    Value,
    Vector,
)
from camserve.types.request import ExplainRequest, OutputOptions

u32 = st.integers(0, 2**32 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)  # surrogates are not Unicode text
float32s = st.floats(width=32, allow_nan=False)
fractions = st.floats(0, 1)
seconds = st.floats(0, 1e6)
precisions = st.sampled_from(PRECISIONS)


def several(values: st.SearchStrategy, most: int = 3) -> st.SearchStrategy:
    return st.lists(values, max_size=most).map(tuple)


_parameters = {
    "integer": lambda p: st.integers(int(p.minimum), int(p.maximum or 2**32 - 1)),
    "number": lambda p: st.floats(p.minimum, p.maximum),
    "choice": lambda p: st.sampled_from(p.choices),
}
specs = st.one_of(
    [
        st.fixed_dictionaries({p.name: _parameters[p.type](p) for p in spec.parameters()}).map(lambda v, s=spec: s(**v))
        for spec in METHODS.values()
    ]
)
named = st.builds(Target, index=u32) | st.builds(Target, label=texts)
classes = named | st.builds(Target, top_k=st.integers(1, 2**32 - 1))
gammas = st.floats(0, 10)
pixels = hnp.arrays(
    st.sampled_from([np.dtype(np.uint8), np.dtype(np.float32)]),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3)),
)
images = st.one_of(st.binary(max_size=50), pixels)
vectors = hnp.arrays(np.float32, st.integers(1, 5), elements=st.floats(1, 9, width=32))
corners = st.tuples(*[st.floats(-1e6, 1e6)] * 2, *[st.floats(0.5, 1e6)] * 2)
of_classes = st.one_of(
    classes,
    st.builds(Contrast, classes, st.lists(named, min_size=1, max_size=3).map(tuple), gammas),
    st.builds(Finer, classes, gammas, st.integers(1, 100)),
    st.builds(Against, classes),
)
files = st.binary(min_size=1, max_size=50)
regions = st.one_of(
    st.builds(Region, of_classes),
    st.builds(Region, of_classes, corners.map(lambda at: (at[0], at[1], at[0] + at[2], at[1] + at[3]))),
    st.builds(Region, of_classes, mask=files),
    st.builds(Region, of_classes, grid=files),
)
targets = st.one_of(
    classes,
    st.builds(Contrast, classes, st.lists(named, min_size=1, max_size=3).map(tuple), gammas),
    st.builds(Finer, classes, gammas, st.integers(1, 100)),
    st.builds(Against, classes),
    st.builds(Value, named, st.sampled_from(["up", "down"])),
    st.builds(Vector, values=vectors),
    st.builds(Vector, image=st.binary(min_size=1, max_size=50) | pixels),
    st.builds(Text, texts.filter(str.strip)),
    regions,
)
predictions = (
    st.builds(Prediction, index=u32, label=texts, probability=float32s)
    | st.builds(Prediction, index=u32, label=texts, value=float32s, unit=texts)
    | st.builds(Prediction, index=u32, label=texts, similarity=float32s)
    | st.builds(Prediction, index=u32, label=texts, share=float32s)
)
views = st.builds(
    InputView,
    original_size=st.tuples(u32, u32),
    crop=st.tuples(float32s, float32s, float32s, float32s),
    size=st.tuples(u32, u32),
)
layers = st.builds(Layer, name=texts, channels=u32, height=u32, width=u32, pooled_head=st.booleans())
models = st.builds(
    ModelInfo,
    name=texts,
    version=texts,
    labels=several(texts, 4),
    input_size=st.tuples(u32, u32),
    layers=several(layers),
    default_layer=texts,
    source=texts,
    licence=texts,
    evaluation=st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
    weights=texts,
    outputs=st.sampled_from(OUTPUTS),
    units=several(texts),
    dimension=u32,
    text=st.none() | st.builds(TextInput, what=texts, example=texts, required=st.booleans(), most_tokens=u32),
)
boxes = st.builds(BoxOptions, threshold=fractions, all_components=st.booleans())
outputs = st.builds(
    OutputOptions,
    size=st.sampled_from([size for size in MAP_SIZES if size != "layer"]),
    encoding=st.sampled_from(list(ENCODINGS)),
    colormap=st.sampled_from(["jet", "viridis", "magma"]),
    opacity=fractions,
    boxes=st.none() | boxes,
) | st.builds(OutputOptions, size=st.just("layer"), encoding=st.sampled_from(list(ARRAYS)), boxes=st.none() | boxes)
requests = st.builds(
    ExplainRequest,
    image=images,
    methods=st.lists(specs | st.just(Auto()), min_size=1, max_size=3).map(tuple),
    targets=several(targets),
    model=texts,
    version=texts,
    layers=several(texts),
    fusion=st.sampled_from(FUSIONS),
    output=outputs,
    top_predictions=st.integers(1, 2**32 - 1),
    precision=precisions,
    evaluate=st.booleans(),
    evaluation_steps=st.integers(1, 4096),
    priority=st.sampled_from(PRIORITIES),
    allow_partial=st.booleans(),
    stream=st.builds(StreamOptions, max_maps=u32, min_interval_s=seconds),
    text=texts,
)
costs = st.builds(
    Cost,
    queries=u32,
    stage_seconds=st.dictionaries(texts, seconds, max_size=3),
    steps=u32,
    precision=precisions,
    worker=texts,
    evaluation_queries=u32,
    cached=st.booleans(),
)
curves = hnp.arrays(np.float64, st.integers(2, 5), elements=fractions)
faithfulness = st.builds(Faithfulness, protocol=texts, deletion=curves, insertion=curves)
maps = st.builds(
    SaliencyMap,
    method=specs,
    target=predictions,
    layers=several(texts),
    array=hnp.arrays(np.float32, st.just((4, 6)), elements=st.floats(0, 1, width=32)),
    value_range=st.tuples(float32s, float32s),
    degenerate=st.booleans(),
    complete=st.booleans(),
    fraction=st.floats(0, 1, width=32),
    choice=texts,
    boxes=several(st.builds(Box, left=float32s, top=float32s, right=float32s, bottom=float32s, score=float32s)),
    target_text=texts,
    classes=several(predictions),
    score=float32s,
    faithfulness=st.none() | faithfulness,
    estimated_difference=st.none() | fractions,
)
explanations = st.builds(
    Explanation,
    model=texts,
    version=texts,
    predictions=several(predictions),
    maps=several(maps),
    input=st.just(InputView((4, 6), (0.0, 0.0, 6.0, 4.0), (4, 6))),
    cost=costs,
    request_id=texts,
)


def same_image(one: object, other: object) -> bool:
    if not isinstance(one, np.ndarray):
        return one == other
    return isinstance(other, np.ndarray) and (one.dtype, one.shape, one.tobytes()) == (
        other.dtype,
        other.shape,
        other.tobytes(),
    )
