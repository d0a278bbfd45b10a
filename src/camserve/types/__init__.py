"""Defines the frozen values that camserve's packages hand to each other, by subject.

Nothing here needs torch, gRPC, protobuf or Pillow.

`options`, `model`, `explanation` and `work` are here by name; `request` and `parts`, which need Pillow, are imported
from their own modules.
"""

from camserve.types.explanation import Box, Cost, Explanation, Faithfulness, Prediction, Progress, SaliencyMap, auc
from camserve.types.model import InputView, Layer, MethodInfo, Model, ModelInfo, ModelSummary, Preprocessing
from camserve.types.options import (
    COLORMAPS,
    DEFAULT_CURVE_STEPS,
    ENCODINGS,
    FUSIONS,
    MAP_SIZES,
    MAX_CURVE_STEPS,
    PRECISIONS,
    PRIORITIES,
    BoxOptions,
    Fusion,
    MapSize,
    Precision,
    Priority,
    StreamOptions,
    Target,
    TargetLike,
    check_overlay,
)
from camserve.types.work import (
    DeviceMemory,
    Item,
    ItemResult,
    MapCurves,
    Partial,
    Ranking,
    StepResult,
    Task,
    curve_points,
)

__all__ = [
    "COLORMAPS",
    "DEFAULT_CURVE_STEPS",
    "ENCODINGS",
    "FUSIONS",
    "MAP_SIZES",
    "MAX_CURVE_STEPS",
    "PRECISIONS",
    "PRIORITIES",
    "Box",
    "BoxOptions",
    "Cost",
    "DeviceMemory",
    "Explanation",
    "Faithfulness",
    "Fusion",
    "InputView",
    "Item",
    "ItemResult",
    "Layer",
    "MapCurves",
    "MapSize",
    "MethodInfo",
    "Model",
    "ModelInfo",
    "ModelSummary",
    "Partial",
    "Precision",
    "Prediction",
    "Preprocessing",
    "Priority",
    "Progress",
    "Ranking",
    "SaliencyMap",
    "StepResult",
    "StreamOptions",
    "Target",
    "TargetLike",
    "Task",
    "auc",
    "check_overlay",
    "curve_points",
]
