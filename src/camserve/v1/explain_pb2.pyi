from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    INTERACTIVE: _ClassVar[Priority]
    NORMAL: _ClassVar[Priority]
    BATCH: _ClassVar[Priority]

class Fusion(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FUSION_UNSPECIFIED: _ClassVar[Fusion]
    MEAN: _ClassVar[Fusion]
    MAX: _ClassVar[Fusion]

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_UNSPECIFIED: _ClassVar[Precision]
    EXACT: _ClassVar[Precision]
    BFLOAT16: _ClassVar[Precision]
    AUTO: _ClassVar[Precision]
PRIORITY_UNSPECIFIED: Priority
INTERACTIVE: Priority
NORMAL: Priority
BATCH: Priority
FUSION_UNSPECIFIED: Fusion
MEAN: Fusion
MAX: Fusion
PRECISION_UNSPECIFIED: Precision
EXACT: Precision
BFLOAT16: Precision
AUTO: Precision

class ExplainRequest(_message.Message):
    __slots__ = ("model", "version", "image", "methods", "targets", "layers", "output", "top_predictions", "precision", "fusion", "evaluate", "evaluation_steps", "priority", "allow_partial", "stream", "text", "predictions_only", "evidence")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    TOP_PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    FUSION_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_STEPS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ALLOW_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_ONLY_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    image: Image
    methods: _containers.RepeatedCompositeFieldContainer[MethodSpec]
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    layers: _containers.RepeatedScalarFieldContainer[str]
    output: Output
    top_predictions: int
    precision: Precision
    fusion: Fusion
    evaluate: bool
    evaluation_steps: int
    priority: Priority
    allow_partial: bool
    stream: StreamOptions
    text: str
    predictions_only: bool
    evidence: bool
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., methods: _Optional[_Iterable[_Union[MethodSpec, _Mapping]]] = ..., targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., layers: _Optional[_Iterable[str]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., top_predictions: _Optional[int] = ..., precision: _Optional[_Union[Precision, str]] = ..., fusion: _Optional[_Union[Fusion, str]] = ..., evaluate: bool = ..., evaluation_steps: _Optional[int] = ..., priority: _Optional[_Union[Priority, str]] = ..., allow_partial: bool = ..., stream: _Optional[_Union[StreamOptions, _Mapping]] = ..., text: _Optional[str] = ..., predictions_only: bool = ..., evidence: bool = ...) -> None: ...

class StreamOptions(_message.Message):
    __slots__ = ("max_maps", "min_interval_s")
    MAX_MAPS_FIELD_NUMBER: _ClassVar[int]
    MIN_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    max_maps: int
    min_interval_s: float
    def __init__(self, max_maps: _Optional[int] = ..., min_interval_s: _Optional[float] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("encoded", "tensor")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    encoded: bytes
    tensor: Tensor
    def __init__(self, encoded: _Optional[bytes] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("data_type", "shape", "data")
    class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        DATA_TYPE_UNSPECIFIED: _ClassVar[Tensor.DataType]
        UINT8: _ClassVar[Tensor.DataType]
        FLOAT32: _ClassVar[Tensor.DataType]
    DATA_TYPE_UNSPECIFIED: Tensor.DataType
    UINT8: Tensor.DataType
    FLOAT32: Tensor.DataType
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    data_type: Tensor.DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, data_type: _Optional[_Union[Tensor.DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class MethodSpec(_message.Message):
    __slots__ = ("cam", "grad_cam", "group_cam", "score_cam", "hires_cam", "grad_cam_plus_plus", "smooth_grad_cam_plus_plus", "xgrad_cam", "layer_cam", "integrated_grad_cam", "eigen_cam", "guided_backprop", "deconvolution", "guided_grad_cam", "integrated_gradients", "smooth_grad", "xrai", "ss_cam", "is_cam", "rise", "ablation_cam", "occlusion", "d_rise", "attention_rollout", "gradient_weighted_attention", "auto", "recipro_cam", "le_grad")
    CAM_FIELD_NUMBER: _ClassVar[int]
    GRAD_CAM_FIELD_NUMBER: _ClassVar[int]
    GROUP_CAM_FIELD_NUMBER: _ClassVar[int]
    SCORE_CAM_FIELD_NUMBER: _ClassVar[int]
    HIRES_CAM_FIELD_NUMBER: _ClassVar[int]
    GRAD_CAM_PLUS_PLUS_FIELD_NUMBER: _ClassVar[int]
    SMOOTH_GRAD_CAM_PLUS_PLUS_FIELD_NUMBER: _ClassVar[int]
    XGRAD_CAM_FIELD_NUMBER: _ClassVar[int]
    LAYER_CAM_FIELD_NUMBER: _ClassVar[int]
    INTEGRATED_GRAD_CAM_FIELD_NUMBER: _ClassVar[int]
    EIGEN_CAM_FIELD_NUMBER: _ClassVar[int]
    GUIDED_BACKPROP_FIELD_NUMBER: _ClassVar[int]
    DECONVOLUTION_FIELD_NUMBER: _ClassVar[int]
    GUIDED_GRAD_CAM_FIELD_NUMBER: _ClassVar[int]
    INTEGRATED_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    SMOOTH_GRAD_FIELD_NUMBER: _ClassVar[int]
    XRAI_FIELD_NUMBER: _ClassVar[int]
    SS_CAM_FIELD_NUMBER: _ClassVar[int]
    IS_CAM_FIELD_NUMBER: _ClassVar[int]
    RISE_FIELD_NUMBER: _ClassVar[int]
    ABLATION_CAM_FIELD_NUMBER: _ClassVar[int]
    OCCLUSION_FIELD_NUMBER: _ClassVar[int]
    D_RISE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_WEIGHTED_ATTENTION_FIELD_NUMBER: _ClassVar[int]
    AUTO_FIELD_NUMBER: _ClassVar[int]
    RECIPRO_CAM_FIELD_NUMBER: _ClassVar[int]
    LE_GRAD_FIELD_NUMBER: _ClassVar[int]
    cam: Cam
    grad_cam: GradCam
    group_cam: GroupCam
    score_cam: ScoreCam
    hires_cam: HiresCam
    grad_cam_plus_plus: GradCamPlusPlus
    smooth_grad_cam_plus_plus: SmoothGradCamPlusPlus
    xgrad_cam: XgradCam
    layer_cam: LayerCam
    integrated_grad_cam: IntegratedGradCam
    eigen_cam: EigenCam
    guided_backprop: GuidedBackprop
    deconvolution: Deconvolution
    guided_grad_cam: GuidedGradCam
    integrated_gradients: IntegratedGradients
    smooth_grad: SmoothGrad
    xrai: Xrai
    ss_cam: SsCam
    is_cam: IsCam
    rise: Rise
    ablation_cam: AblationCam
    occlusion: Occlusion
    d_rise: DRise
    attention_rollout: AttentionRollout
    gradient_weighted_attention: GradientWeightedAttention
    auto: Auto
    recipro_cam: ReciproCam
    le_grad: LeGrad
    def __init__(self, cam: _Optional[_Union[Cam, _Mapping]] = ..., grad_cam: _Optional[_Union[GradCam, _Mapping]] = ..., group_cam: _Optional[_Union[GroupCam, _Mapping]] = ..., score_cam: _Optional[_Union[ScoreCam, _Mapping]] = ..., hires_cam: _Optional[_Union[HiresCam, _Mapping]] = ..., grad_cam_plus_plus: _Optional[_Union[GradCamPlusPlus, _Mapping]] = ..., smooth_grad_cam_plus_plus: _Optional[_Union[SmoothGradCamPlusPlus, _Mapping]] = ..., xgrad_cam: _Optional[_Union[XgradCam, _Mapping]] = ..., layer_cam: _Optional[_Union[LayerCam, _Mapping]] = ..., integrated_grad_cam: _Optional[_Union[IntegratedGradCam, _Mapping]] = ..., eigen_cam: _Optional[_Union[EigenCam, _Mapping]] = ..., guided_backprop: _Optional[_Union[GuidedBackprop, _Mapping]] = ..., deconvolution: _Optional[_Union[Deconvolution, _Mapping]] = ..., guided_grad_cam: _Optional[_Union[GuidedGradCam, _Mapping]] = ..., integrated_gradients: _Optional[_Union[IntegratedGradients, _Mapping]] = ..., smooth_grad: _Optional[_Union[SmoothGrad, _Mapping]] = ..., xrai: _Optional[_Union[Xrai, _Mapping]] = ..., ss_cam: _Optional[_Union[SsCam, _Mapping]] = ..., is_cam: _Optional[_Union[IsCam, _Mapping]] = ..., rise: _Optional[_Union[Rise, _Mapping]] = ..., ablation_cam: _Optional[_Union[AblationCam, _Mapping]] = ..., occlusion: _Optional[_Union[Occlusion, _Mapping]] = ..., d_rise: _Optional[_Union[DRise, _Mapping]] = ..., attention_rollout: _Optional[_Union[AttentionRollout, _Mapping]] = ..., gradient_weighted_attention: _Optional[_Union[GradientWeightedAttention, _Mapping]] = ..., auto: _Optional[_Union[Auto, _Mapping]] = ..., recipro_cam: _Optional[_Union[ReciproCam, _Mapping]] = ..., le_grad: _Optional[_Union[LeGrad, _Mapping]] = ...) -> None: ...

class Auto(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Cam(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GradCam(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GroupCam(_message.Message):
    __slots__ = ("groups", "theta", "variant", "grouping")
    class Variant(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        VARIANT_UNSPECIFIED: _ClassVar[GroupCam.Variant]
        PAPER: _ClassVar[GroupCam.Variant]
        REFERENCE: _ClassVar[GroupCam.Variant]
    VARIANT_UNSPECIFIED: GroupCam.Variant
    PAPER: GroupCam.Variant
    REFERENCE: GroupCam.Variant
    class Grouping(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        GROUPING_UNSPECIFIED: _ClassVar[GroupCam.Grouping]
        CHUNK: _ClassVar[GroupCam.Grouping]
        KMEANS: _ClassVar[GroupCam.Grouping]
        AGGLOMERATIVE: _ClassVar[GroupCam.Grouping]
    GROUPING_UNSPECIFIED: GroupCam.Grouping
    CHUNK: GroupCam.Grouping
    KMEANS: GroupCam.Grouping
    AGGLOMERATIVE: GroupCam.Grouping
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    THETA_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    GROUPING_FIELD_NUMBER: _ClassVar[int]
    groups: int
    theta: float
    variant: GroupCam.Variant
    grouping: GroupCam.Grouping
    def __init__(self, groups: _Optional[int] = ..., theta: _Optional[float] = ..., variant: _Optional[_Union[GroupCam.Variant, str]] = ..., grouping: _Optional[_Union[GroupCam.Grouping, str]] = ...) -> None: ...

class ScoreCam(_message.Message):
    __slots__ = ("variant", "normalise", "tolerance")
    class Variant(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        VARIANT_UNSPECIFIED: _ClassVar[ScoreCam.Variant]
        REFERENCE: _ClassVar[ScoreCam.Variant]
        PAPER: _ClassVar[ScoreCam.Variant]
        LOGIT: _ClassVar[ScoreCam.Variant]
    VARIANT_UNSPECIFIED: ScoreCam.Variant
    REFERENCE: ScoreCam.Variant
    PAPER: ScoreCam.Variant
    LOGIT: ScoreCam.Variant
    class Normalise(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NORMALISE_UNSPECIFIED: _ClassVar[ScoreCam.Normalise]
        AFTER: _ClassVar[ScoreCam.Normalise]
        BEFORE: _ClassVar[ScoreCam.Normalise]
    NORMALISE_UNSPECIFIED: ScoreCam.Normalise
    AFTER: ScoreCam.Normalise
    BEFORE: ScoreCam.Normalise
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    NORMALISE_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    variant: ScoreCam.Variant
    normalise: ScoreCam.Normalise
    tolerance: float
    def __init__(self, variant: _Optional[_Union[ScoreCam.Variant, str]] = ..., normalise: _Optional[_Union[ScoreCam.Normalise, str]] = ..., tolerance: _Optional[float] = ...) -> None: ...

class HiresCam(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GradCamPlusPlus(_message.Message):
    __slots__ = ("variant",)
    class Variant(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        VARIANT_UNSPECIFIED: _ClassVar[GradCamPlusPlus.Variant]
        PAPER: _ClassVar[GradCamPlusPlus.Variant]
        PRODUCT: _ClassVar[GradCamPlusPlus.Variant]
    VARIANT_UNSPECIFIED: GradCamPlusPlus.Variant
    PAPER: GradCamPlusPlus.Variant
    PRODUCT: GradCamPlusPlus.Variant
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    variant: GradCamPlusPlus.Variant
    def __init__(self, variant: _Optional[_Union[GradCamPlusPlus.Variant, str]] = ...) -> None: ...

class SmoothGradCamPlusPlus(_message.Message):
    __slots__ = ("samples", "sigma", "seed")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SIGMA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    samples: int
    sigma: float
    seed: int
    def __init__(self, samples: _Optional[int] = ..., sigma: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class XgradCam(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LayerCam(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class IntegratedGradCam(_message.Message):
    __slots__ = ("steps", "variant")
    class Variant(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        VARIANT_UNSPECIFIED: _ClassVar[IntegratedGradCam.Variant]
        PAPER: _ClassVar[IntegratedGradCam.Variant]
        REFERENCE: _ClassVar[IntegratedGradCam.Variant]
    VARIANT_UNSPECIFIED: IntegratedGradCam.Variant
    PAPER: IntegratedGradCam.Variant
    REFERENCE: IntegratedGradCam.Variant
    STEPS_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    steps: int
    variant: IntegratedGradCam.Variant
    def __init__(self, steps: _Optional[int] = ..., variant: _Optional[_Union[IntegratedGradCam.Variant, str]] = ...) -> None: ...

class EigenCam(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GuidedBackprop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Deconvolution(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GuidedGradCam(_message.Message):
    __slots__ = ("interpolation",)
    class Interpolation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        INTERPOLATION_UNSPECIFIED: _ClassVar[GuidedGradCam.Interpolation]
        BILINEAR: _ClassVar[GuidedGradCam.Interpolation]
        NEAREST: _ClassVar[GuidedGradCam.Interpolation]
    INTERPOLATION_UNSPECIFIED: GuidedGradCam.Interpolation
    BILINEAR: GuidedGradCam.Interpolation
    NEAREST: GuidedGradCam.Interpolation
    INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    interpolation: GuidedGradCam.Interpolation
    def __init__(self, interpolation: _Optional[_Union[GuidedGradCam.Interpolation, str]] = ...) -> None: ...

class IntegratedGradients(_message.Message):
    __slots__ = ("steps", "baseline")
    class Baseline(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        BASELINE_UNSPECIFIED: _ClassVar[IntegratedGradients.Baseline]
        ZERO: _ClassVar[IntegratedGradients.Baseline]
        BLACK: _ClassVar[IntegratedGradients.Baseline]
    BASELINE_UNSPECIFIED: IntegratedGradients.Baseline
    ZERO: IntegratedGradients.Baseline
    BLACK: IntegratedGradients.Baseline
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BASELINE_FIELD_NUMBER: _ClassVar[int]
    steps: int
    baseline: IntegratedGradients.Baseline
    def __init__(self, steps: _Optional[int] = ..., baseline: _Optional[_Union[IntegratedGradients.Baseline, str]] = ...) -> None: ...

class SmoothGrad(_message.Message):
    __slots__ = ("samples", "sigma", "seed")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SIGMA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    samples: int
    sigma: float
    seed: int
    def __init__(self, samples: _Optional[int] = ..., sigma: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class Xrai(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    def __init__(self, steps: _Optional[int] = ...) -> None: ...

class SsCam(_message.Message):
    __slots__ = ("samples", "std", "seed", "tolerance")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    samples: int
    std: float
    seed: int
    tolerance: float
    def __init__(self, samples: _Optional[int] = ..., std: _Optional[float] = ..., seed: _Optional[int] = ..., tolerance: _Optional[float] = ...) -> None: ...

class IsCam(_message.Message):
    __slots__ = ("samples", "tolerance")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    samples: int
    tolerance: float
    def __init__(self, samples: _Optional[int] = ..., tolerance: _Optional[float] = ...) -> None: ...

class Rise(_message.Message):
    __slots__ = ("masks", "grid", "keep_prob", "seed", "tolerance")
    MASKS_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    KEEP_PROB_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    masks: int
    grid: int
    keep_prob: float
    seed: int
    tolerance: float
    def __init__(self, masks: _Optional[int] = ..., grid: _Optional[int] = ..., keep_prob: _Optional[float] = ..., seed: _Optional[int] = ..., tolerance: _Optional[float] = ...) -> None: ...

class DRise(_message.Message):
    __slots__ = ("masks", "grid", "keep_prob", "seed", "tolerance")
    MASKS_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    KEEP_PROB_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    masks: int
    grid: int
    keep_prob: float
    seed: int
    tolerance: float
    def __init__(self, masks: _Optional[int] = ..., grid: _Optional[int] = ..., keep_prob: _Optional[float] = ..., seed: _Optional[int] = ..., tolerance: _Optional[float] = ...) -> None: ...

class AblationCam(_message.Message):
    __slots__ = ("tolerance",)
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    tolerance: float
    def __init__(self, tolerance: _Optional[float] = ...) -> None: ...

class ReciproCam(_message.Message):
    __slots__ = ("kernel",)
    class Kernel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KERNEL_UNSPECIFIED: _ClassVar[ReciproCam.Kernel]
        POINT: _ClassVar[ReciproCam.Kernel]
        GAUSSIAN: _ClassVar[ReciproCam.Kernel]
    KERNEL_UNSPECIFIED: ReciproCam.Kernel
    POINT: ReciproCam.Kernel
    GAUSSIAN: ReciproCam.Kernel
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    kernel: ReciproCam.Kernel
    def __init__(self, kernel: _Optional[_Union[ReciproCam.Kernel, str]] = ...) -> None: ...

class Occlusion(_message.Message):
    __slots__ = ("positions", "window")
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    positions: int
    window: int
    def __init__(self, positions: _Optional[int] = ..., window: _Optional[int] = ...) -> None: ...

class AttentionRollout(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GradientWeightedAttention(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeGrad(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Target(_message.Message):
    __slots__ = ("index", "label", "top_k", "contrast", "finer", "against", "value", "vector", "reference", "text", "box", "detection", "region", "word")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CONTRAST_FIELD_NUMBER: _ClassVar[int]
    FINER_FIELD_NUMBER: _ClassVar[int]
    AGAINST_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    DETECTION_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    index: int
    label: str
    top_k: int
    contrast: Contrast
    finer: Finer
    against: Against
    value: Value
    vector: bytes
    reference: Image
    text: str
    box: BoxTarget
    detection: int
    region: Region
    word: Word
    def __init__(self, index: _Optional[int] = ..., label: _Optional[str] = ..., top_k: _Optional[int] = ..., contrast: _Optional[_Union[Contrast, _Mapping]] = ..., finer: _Optional[_Union[Finer, _Mapping]] = ..., against: _Optional[_Union[Against, _Mapping]] = ..., value: _Optional[_Union[Value, _Mapping]] = ..., vector: _Optional[bytes] = ..., reference: _Optional[_Union[Image, _Mapping]] = ..., text: _Optional[str] = ..., box: _Optional[_Union[BoxTarget, _Mapping]] = ..., detection: _Optional[int] = ..., region: _Optional[_Union[Region, _Mapping]] = ..., word: _Optional[_Union[Word, _Mapping]] = ...) -> None: ...

class Word(_message.Message):
    __slots__ = ("at", "words")
    AT_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    at: int
    words: str
    def __init__(self, at: _Optional[int] = ..., words: _Optional[str] = ...) -> None: ...

class ClassTarget(_message.Message):
    __slots__ = ("index", "label", "top_k")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    index: int
    label: str
    top_k: int
    def __init__(self, index: _Optional[int] = ..., label: _Optional[str] = ..., top_k: _Optional[int] = ...) -> None: ...

class Contrast(_message.Message):
    __slots__ = ("of", "than", "gamma")
    OF_FIELD_NUMBER: _ClassVar[int]
    THAN_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    of: ClassTarget
    than: _containers.RepeatedCompositeFieldContainer[ClassTarget]
    gamma: float
    def __init__(self, of: _Optional[_Union[ClassTarget, _Mapping]] = ..., than: _Optional[_Iterable[_Union[ClassTarget, _Mapping]]] = ..., gamma: _Optional[float] = ...) -> None: ...

class Finer(_message.Message):
    __slots__ = ("of", "gamma", "nearest")
    OF_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    NEAREST_FIELD_NUMBER: _ClassVar[int]
    of: ClassTarget
    gamma: float
    nearest: int
    def __init__(self, of: _Optional[_Union[ClassTarget, _Mapping]] = ..., gamma: _Optional[float] = ..., nearest: _Optional[int] = ...) -> None: ...

class BoxTarget(_message.Message):
    __slots__ = ("box", "of", "probabilities")
    BOX_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    box: Edges
    of: ClassTarget
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, box: _Optional[_Union[Edges, _Mapping]] = ..., of: _Optional[_Union[ClassTarget, _Mapping]] = ..., probabilities: _Optional[_Iterable[float]] = ...) -> None: ...

class Against(_message.Message):
    __slots__ = ("of",)
    OF_FIELD_NUMBER: _ClassVar[int]
    of: ClassTarget
    def __init__(self, of: _Optional[_Union[ClassTarget, _Mapping]] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("of", "contrast", "finer", "against", "box", "mask", "grid")
    OF_FIELD_NUMBER: _ClassVar[int]
    CONTRAST_FIELD_NUMBER: _ClassVar[int]
    FINER_FIELD_NUMBER: _ClassVar[int]
    AGAINST_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    of: ClassTarget
    contrast: Contrast
    finer: Finer
    against: Against
    box: Edges
    mask: bytes
    grid: bytes
    def __init__(self, of: _Optional[_Union[ClassTarget, _Mapping]] = ..., contrast: _Optional[_Union[Contrast, _Mapping]] = ..., finer: _Optional[_Union[Finer, _Mapping]] = ..., against: _Optional[_Union[Against, _Mapping]] = ..., box: _Optional[_Union[Edges, _Mapping]] = ..., mask: _Optional[bytes] = ..., grid: _Optional[bytes] = ...) -> None: ...

class Edges(_message.Message):
    __slots__ = ("x0", "y0", "x1", "y1")
    X0_FIELD_NUMBER: _ClassVar[int]
    Y0_FIELD_NUMBER: _ClassVar[int]
    X1_FIELD_NUMBER: _ClassVar[int]
    Y1_FIELD_NUMBER: _ClassVar[int]
    x0: float
    y0: float
    x1: float
    y1: float
    def __init__(self, x0: _Optional[float] = ..., y0: _Optional[float] = ..., x1: _Optional[float] = ..., y1: _Optional[float] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("of", "direction")
    class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        DIRECTION_UNSPECIFIED: _ClassVar[Value.Direction]
        UP: _ClassVar[Value.Direction]
        DOWN: _ClassVar[Value.Direction]
    DIRECTION_UNSPECIFIED: Value.Direction
    UP: Value.Direction
    DOWN: Value.Direction
    OF_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    of: ClassTarget
    direction: Value.Direction
    def __init__(self, of: _Optional[_Union[ClassTarget, _Mapping]] = ..., direction: _Optional[_Union[Value.Direction, str]] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("size", "encoding", "colormap", "opacity", "boxes", "signed")
    class Size(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SIZE_UNSPECIFIED: _ClassVar[Output.Size]
        INPUT: _ClassVar[Output.Size]
        LAYER: _ClassVar[Output.Size]
        ORIGINAL: _ClassVar[Output.Size]
    SIZE_UNSPECIFIED: Output.Size
    INPUT: Output.Size
    LAYER: Output.Size
    ORIGINAL: Output.Size
    class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ENCODING_UNSPECIFIED: _ClassVar[Output.Encoding]
        FLOAT32: _ClassVar[Output.Encoding]
        FLOAT16: _ClassVar[Output.Encoding]
        UINT8: _ClassVar[Output.Encoding]
        PNG: _ClassVar[Output.Encoding]
        OVERLAY_PNG: _ClassVar[Output.Encoding]
        OVERLAY_JPEG: _ClassVar[Output.Encoding]
    ENCODING_UNSPECIFIED: Output.Encoding
    FLOAT32: Output.Encoding
    FLOAT16: Output.Encoding
    UINT8: Output.Encoding
    PNG: Output.Encoding
    OVERLAY_PNG: Output.Encoding
    OVERLAY_JPEG: Output.Encoding
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    COLORMAP_FIELD_NUMBER: _ClassVar[int]
    OPACITY_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    size: Output.Size
    encoding: Output.Encoding
    colormap: str
    opacity: float
    boxes: BoxOptions
    signed: bool
    def __init__(self, size: _Optional[_Union[Output.Size, str]] = ..., encoding: _Optional[_Union[Output.Encoding, str]] = ..., colormap: _Optional[str] = ..., opacity: _Optional[float] = ..., boxes: _Optional[_Union[BoxOptions, _Mapping]] = ..., signed: bool = ...) -> None: ...

class BoxOptions(_message.Message):
    __slots__ = ("threshold", "all_components")
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ALL_COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    threshold: float
    all_components: bool
    def __init__(self, threshold: _Optional[float] = ..., all_components: bool = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("model", "version", "predictions", "maps", "input", "cost", "request_id", "evidence")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    MAPS_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    predictions: _containers.RepeatedCompositeFieldContainer[Prediction]
    maps: _containers.RepeatedCompositeFieldContainer[SaliencyMap]
    input: InputView
    cost: Cost
    request_id: str
    evidence: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., predictions: _Optional[_Iterable[_Union[Prediction, _Mapping]]] = ..., maps: _Optional[_Iterable[_Union[SaliencyMap, _Mapping]]] = ..., input: _Optional[_Union[InputView, _Mapping]] = ..., cost: _Optional[_Union[Cost, _Mapping]] = ..., request_id: _Optional[str] = ..., evidence: _Optional[str] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("index", "label", "probability", "value", "unit", "similarity", "box", "share")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    index: int
    label: str
    probability: float
    value: float
    unit: str
    similarity: float
    box: Edges
    share: float
    def __init__(self, index: _Optional[int] = ..., label: _Optional[str] = ..., probability: _Optional[float] = ..., value: _Optional[float] = ..., unit: _Optional[str] = ..., similarity: _Optional[float] = ..., box: _Optional[_Union[Edges, _Mapping]] = ..., share: _Optional[float] = ...) -> None: ...

class SaliencyMap(_message.Message):
    __slots__ = ("method", "target", "layers", "shape", "encoding", "data", "minimum", "maximum", "boxes", "degenerate", "complete", "faithfulness", "fraction", "choice", "target_text", "classes", "score", "signed", "estimated_difference")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    DEGENERATE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    FAITHFULNESS_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TARGET_TEXT_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    method: MethodSpec
    target: Prediction
    layers: _containers.RepeatedScalarFieldContainer[str]
    shape: _containers.RepeatedScalarFieldContainer[int]
    encoding: Output.Encoding
    data: bytes
    minimum: float
    maximum: float
    boxes: _containers.RepeatedCompositeFieldContainer[Box]
    degenerate: bool
    complete: bool
    faithfulness: Faithfulness
    fraction: float
    choice: str
    target_text: str
    classes: _containers.RepeatedCompositeFieldContainer[Prediction]
    score: float
    signed: bool
    estimated_difference: float
    def __init__(self, method: _Optional[_Union[MethodSpec, _Mapping]] = ..., target: _Optional[_Union[Prediction, _Mapping]] = ..., layers: _Optional[_Iterable[str]] = ..., shape: _Optional[_Iterable[int]] = ..., encoding: _Optional[_Union[Output.Encoding, str]] = ..., data: _Optional[bytes] = ..., minimum: _Optional[float] = ..., maximum: _Optional[float] = ..., boxes: _Optional[_Iterable[_Union[Box, _Mapping]]] = ..., degenerate: bool = ..., complete: bool = ..., faithfulness: _Optional[_Union[Faithfulness, _Mapping]] = ..., fraction: _Optional[float] = ..., choice: _Optional[str] = ..., target_text: _Optional[str] = ..., classes: _Optional[_Iterable[_Union[Prediction, _Mapping]]] = ..., score: _Optional[float] = ..., signed: bool = ..., estimated_difference: _Optional[float] = ...) -> None: ...

class Faithfulness(_message.Message):
    __slots__ = ("protocol", "deletion_auc", "insertion_auc", "overall", "deletion", "insertion")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DELETION_AUC_FIELD_NUMBER: _ClassVar[int]
    INSERTION_AUC_FIELD_NUMBER: _ClassVar[int]
    OVERALL_FIELD_NUMBER: _ClassVar[int]
    DELETION_FIELD_NUMBER: _ClassVar[int]
    INSERTION_FIELD_NUMBER: _ClassVar[int]
    protocol: str
    deletion_auc: float
    insertion_auc: float
    overall: float
    deletion: _containers.RepeatedScalarFieldContainer[float]
    insertion: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, protocol: _Optional[str] = ..., deletion_auc: _Optional[float] = ..., insertion_auc: _Optional[float] = ..., overall: _Optional[float] = ..., deletion: _Optional[_Iterable[float]] = ..., insertion: _Optional[_Iterable[float]] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("left", "top", "right", "bottom", "score")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    left: float
    top: float
    right: float
    bottom: float
    score: float
    def __init__(self, left: _Optional[float] = ..., top: _Optional[float] = ..., right: _Optional[float] = ..., bottom: _Optional[float] = ..., score: _Optional[float] = ...) -> None: ...

class InputView(_message.Message):
    __slots__ = ("original_width", "original_height", "left", "top", "right", "bottom", "width", "height")
    ORIGINAL_WIDTH_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    original_width: int
    original_height: int
    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int
    def __init__(self, original_width: _Optional[int] = ..., original_height: _Optional[int] = ..., left: _Optional[float] = ..., top: _Optional[float] = ..., right: _Optional[float] = ..., bottom: _Optional[float] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class Cost(_message.Message):
    __slots__ = ("queries", "stage_seconds", "steps", "precision", "worker", "evaluation_queries", "cached", "image_bytes", "runtime", "micro_batch")
    class StageSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    STAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_QUERIES_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    queries: int
    stage_seconds: _containers.ScalarMap[str, float]
    steps: int
    precision: Precision
    worker: str
    evaluation_queries: int
    cached: bool
    image_bytes: int
    runtime: str
    micro_batch: int
    def __init__(self, queries: _Optional[int] = ..., stage_seconds: _Optional[_Mapping[str, float]] = ..., steps: _Optional[int] = ..., precision: _Optional[_Union[Precision, str]] = ..., worker: _Optional[str] = ..., evaluation_queries: _Optional[int] = ..., cached: bool = ..., image_bytes: _Optional[int] = ..., runtime: _Optional[str] = ..., micro_batch: _Optional[int] = ...) -> None: ...

class ExplainUpdate(_message.Message):
    __slots__ = ("progress", "reply")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    reply: ExplainReply
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., reply: _Optional[_Union[ExplainReply, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("done", "total", "predictions", "maps", "input")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    MAPS_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    predictions: _containers.RepeatedCompositeFieldContainer[Prediction]
    maps: _containers.RepeatedCompositeFieldContainer[SaliencyMap]
    input: InputView
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., predictions: _Optional[_Iterable[_Union[Prediction, _Mapping]]] = ..., maps: _Optional[_Iterable[_Union[SaliencyMap, _Mapping]]] = ..., input: _Optional[_Union[InputView, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsReply(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelSummary]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelSummary, _Mapping]]] = ...) -> None: ...

class ModelSummary(_message.Message):
    __slots__ = ("name", "version", "ready", "failure")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    ready: bool
    failure: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., ready: bool = ..., failure: _Optional[str] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "ready", "labels", "input_height", "input_width", "layers", "default_layer", "methods", "source", "licence", "evaluation", "weights", "outputs", "units", "dimension", "targets", "channels", "refused", "lacks", "runtime", "text")
    class EvaluationEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class LacksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    INPUT_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    INPUT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_LAYER_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    LACKS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    ready: bool
    labels: _containers.RepeatedScalarFieldContainer[str]
    input_height: int
    input_width: int
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    default_layer: str
    methods: _containers.RepeatedCompositeFieldContainer[Method]
    source: str
    licence: str
    evaluation: _containers.ScalarMap[str, float]
    weights: str
    outputs: str
    units: _containers.RepeatedScalarFieldContainer[str]
    dimension: int
    targets: _containers.RepeatedCompositeFieldContainer[TargetForm]
    channels: int
    refused: _containers.ScalarMap[str, str]
    lacks: _containers.ScalarMap[str, str]
    runtime: Runtime
    text: TextInput
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., ready: bool = ..., labels: _Optional[_Iterable[str]] = ..., input_height: _Optional[int] = ..., input_width: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ..., default_layer: _Optional[str] = ..., methods: _Optional[_Iterable[_Union[Method, _Mapping]]] = ..., source: _Optional[str] = ..., licence: _Optional[str] = ..., evaluation: _Optional[_Mapping[str, float]] = ..., weights: _Optional[str] = ..., outputs: _Optional[str] = ..., units: _Optional[_Iterable[str]] = ..., dimension: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[TargetForm, _Mapping]]] = ..., channels: _Optional[int] = ..., refused: _Optional[_Mapping[str, str]] = ..., lacks: _Optional[_Mapping[str, str]] = ..., runtime: _Optional[_Union[Runtime, _Mapping]] = ..., text: _Optional[_Union[TextInput, _Mapping]] = ...) -> None: ...

class TextInput(_message.Message):
    __slots__ = ("what", "example", "required", "most_tokens")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    MOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    what: str
    example: str
    required: bool
    most_tokens: int
    def __init__(self, what: _Optional[str] = ..., example: _Optional[str] = ..., required: bool = ..., most_tokens: _Optional[int] = ...) -> None: ...

class Runtime(_message.Message):
    __slots__ = ("name", "micro_batch", "precision", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    micro_batch: int
    precision: Precision
    reason: str
    def __init__(self, name: _Optional[str] = ..., micro_batch: _Optional[int] = ..., precision: _Optional[_Union[Precision, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class TargetForm(_message.Message):
    __slots__ = ("name", "description", "example")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    example: str
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., example: _Optional[str] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("name", "channels", "height", "width", "pooled_head")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    POOLED_HEAD_FIELD_NUMBER: _ClassVar[int]
    name: str
    channels: int
    height: int
    width: int
    pooled_head: bool
    def __init__(self, name: _Optional[str] = ..., channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., pooled_head: bool = ...) -> None: ...

class Method(_message.Message):
    __slots__ = ("name", "title", "paper", "parameters", "queries", "needs", "refused")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    PAPER_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    name: str
    title: str
    paper: str
    parameters: _containers.RepeatedCompositeFieldContainer[Parameter]
    queries: int
    needs: str
    refused: str
    def __init__(self, name: _Optional[str] = ..., title: _Optional[str] = ..., paper: _Optional[str] = ..., parameters: _Optional[_Iterable[_Union[Parameter, _Mapping]]] = ..., queries: _Optional[int] = ..., needs: _Optional[str] = ..., refused: _Optional[str] = ...) -> None: ...

class Parameter(_message.Message):
    __slots__ = ("name", "type", "default", "minimum", "maximum", "choices", "description")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    default: str
    minimum: float
    maximum: float
    choices: _containers.RepeatedScalarFieldContainer[str]
    description: str
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ..., default: _Optional[str] = ..., minimum: _Optional[float] = ..., maximum: _Optional[float] = ..., choices: _Optional[_Iterable[str]] = ..., description: _Optional[str] = ...) -> None: ...
