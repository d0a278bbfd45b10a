"""Explains networks of every family of torchvision and of many of timm, and says which work and which do not.

    python benchmarks/families.py              # all, to benchmarks/results/families.json
    python benchmarks/families.py --render     # docs/models.md from that file

Each network has random weights and its own default input size, or a smaller one. A family works where the default layer
is local by the probe, and Grad-CAM, Score-CAM and Group-CAM answer at it.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, embedded, environment, write
from torch import nn

from camserve.errors import CamserveError
from camserve.methods import GradCam, GroupCam, ScoreCam
from camserve.types import Item, ItemResult, Preprocessing, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

RESULTS = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "models.md"
CLASSES = 7
SEED = 0

TORCHVISION = {
    "alexnet": 224,
    "convnext_tiny": 224,
    "densenet121": 224,
    "efficientnet_b0": 224,
    "efficientnet_v2_s": 224,
    "googlenet": 224,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 224,
    "mobilenet_v2": 224,
    "mobilenet_v3_small": 224,
    "regnet_y_400mf": 224,
    "resnet18": 224,
    "resnext50_32x4d": 224,
    "shufflenet_v2_x0_5": 224,
    "squeezenet1_1": 224,
    "swin_t": 224,
    "swin_v2_t": 256,
    "vgg11": 224,
    "vit_b_16": 224,
    "wide_resnet50_2": 224,
}
"""Smallest member of each classification family, with its side in pixels."""

TIMM = (
    *(
        "bat_resnext26ts",
        "beit_base_patch16_224",
        "botnet26t_256",
        "cait_xxs24_224",
        "coat_lite_tiny",
        "coatnet_nano_rw_224",
    ),
    *("convit_tiny", "convmixer_768_32", "convnext_atto", "convnextv2_atto", "crossvit_tiny_240", "cs3darknet_s"),
    *(
        "cspresnet50",
        "darknet53",
        "davit_tiny",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "densenet121",
    ),
    *("dla34", "dpn68", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0"),
    *("efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224", "fastvit_t8", "fbnetc_100", "focalnet_tiny_srf"),
    *("gcvit_xxtiny", "gernet_s", "ghostnet_050", "gmixer_24_224", "gmlp_ti16_224", "haloregnetz_b", "hardcorenas_a"),
    *("hgnetv2_b0", "hiera_tiny_224", "hrnet_w18_small", "inception_next_tiny", "lambda_resnet26t", "lcnet_050"),
    *("levit_128s", "maxvit_pico_rw_256", "mambaout_femto", "mixer_s32_224", "mnasnet_small", "mobilenetv2_035"),
    *(
        "mobilenetv3_small_050",
        "mobilenetv4_conv_small",
        "mobileone_s0",
        "mobilevit_xxs",
        "mobilevitv2_050",
        "mvitv2_tiny",
    ),
    *("nest_tiny", "nf_regnet_b0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "regnety_002"),
    *("repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_14w_8s", "resmlp_12_224", "resnest14d", "resnet18"),
    *(
        "resnetv2_50",
        "rexnet_100",
        "rexnetr_200",
        "samvit_base_patch16_224",
        "selecsls42",
        "semnasnet_050",
        "sequencer2d_s",
    ),
    *("seresnet18", "shvit_s1", "skresnet18", "starnet_s1", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_ns_224"),
    *("swinv2_tiny_window8_256", "swiftformer_xs", "test_vit", "tf_efficientnetv2_b0", "tiny_vit_5m_224", "tinynet_e"),
    *(
        "tnt_s_patch16_224",
        "twins_svt_small",
        "vgg11",
        "visformer_tiny",
        "vit_tiny_patch16_224",
        "vit_base_patch16_siglip_224",
    ),
    *("vit_small_patch16_18x2_224", "vitamin_small_224", "volo_d1_224", "xception41", "xcit_nano_12_p16_224"),
)
"""A small member of each family, at its own default size."""


def build(library: str, name: str) -> tuple[nn.Module, int]:
    """Returns a network with random weights, all of whose branches are felt, and the side of its input in pixels."""
    torch.manual_seed(SEED)
    if library == "torchvision":
        from torchvision import models

        options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
        module, side = models.get_model(name, weights=None, num_classes=CLASSES, **options), TORCHVISION[name]
    else:
        import timm

        module = timm.create_model(name, pretrained=False, num_classes=CLASSES)
        side = module.default_cfg["input_size"][-1]
    with torch.no_grad():
        for parameter in module.parameters():
            # Layer scales, last norms and heads that begin at zero would hide what is behind them.
            if parameter.abs().max() < 1e-3:
                parameter.normal_(0, 0.2)
    return module.eval(), side


def explain(module: nn.Module, side: int) -> dict[str, Any]:
    """Returns what is found out about a network, and which methods answer at its default layer.

    Raises:
        CamserveError: the network is refused.
    """
    preprocessing = Preprocessing(side, (side, side), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    start = time.process_time()
    network = Network(module, preprocessing=preprocessing)
    surveyed = network.survey
    layer = network.info.layer("")
    site = next(site for site in surveyed.layers if site.layer.name == layer.name)
    image = np.random.default_rng(SEED).integers(0, 256, (side, side, 3), dtype=np.uint8)
    answers = {}
    for spec, queries in ((GradCam(), 0), (ScoreCam(), 2), (GroupCam(groups=2), 2)):
        (outcome,) = Executor(network).execute([Item(image, (Target(1),), (Task(0, spec, 0, queries),))]).outcomes
        if not isinstance(outcome, ItemResult):
            answers[spec.name] = str(outcome)
        else:
            sums = outcome.partials[0].sums
            answers[spec.name] = "map" if np.isfinite(sums).all() and sums.any() else "empty"
    return {
        "side_px": side,
        "default_layer": layer.name,
        "maps": [layer.channels, layer.height, layer.width],
        "own_tokens": list(site.arrangement.own),
        "offered": len(surveyed.layers),
        "refused": dict(Counter(surveyed.refused.values())),
        "one_by_one": surveyed.alone,
        "methods": answers,
        "cpu_s": round(time.process_time() - start, 2),
    }


def page(results: dict[str, Any]) -> str:
    """Returns the tables of docs/models.md."""
    parts = []
    for library, found in results["families"].items():
        works = {name: one for name, one in found.items() if one.get("methods") and not _wrong(one)}
        parts.append(f"### {library} {results['environment']['versions'][library]}: {len(works)} of {len(found)}\n")
        parts.append("| network | input | default layer | its maps | layers offered | not offered |")
        parts.append("| --- | --- | --- | --- | --- | --- |")
        for name, one in works.items():
            channels, height, width = one["maps"]
            own = f", {len(one['own_tokens'])} tokens beside" if one["own_tokens"] else ""
            row = (name, one["side_px"], f"`{one['default_layer']}`", f"{channels} x {height} x {width}{own}")
            parts.append(f"| {' | '.join(map(str, row))} | {one['offered']} | {sum(one['refused'].values())} |")
        others = {name: one for name, one in found.items() if name not in works}
        if others:
            parts.append("\n| network that does not work | why |\n| --- | --- |")
            parts.extend(f"| {name} | {_why(one)} |" for name, one in others.items())
        parts.append("")
    return "\n".join(parts).rstrip()


def _why(one: dict[str, Any]) -> str:
    if "error" in one:
        return str(one["error"]).replace("|", "/")
    return "; ".join(f"{name}: {answer}" for name, answer in _wrong(one).items()).replace("|", "/")


def _wrong(one: dict[str, Any]) -> dict[str, str]:
    """Returns what methods answer that is no map; two queries of an untrained network may find no positive evidence."""
    return {name: answer for name, answer in one["methods"].items() if answer not in {"map", "empty"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of networks, in place of their former results; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="write docs/models.md from the results, and stop")
    arguments = parser.parse_args()
    if arguments.render:
        PAGE.write_text(embedded(PAGE.read_text(), "families", page(json.loads(RESULTS.read_text()))))
        return
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    families: dict[str, dict[str, Any]] = {"torchvision": {}, "timm": {}}
    if arguments.only:
        families = json.loads(RESULTS.read_text())["families"]
    for library, names in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for name in names:
            if arguments.only and name not in arguments.only:
                continue
            try:
                found = explain(*build(library, name))
            except CamserveError as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            families[library][name] = found
            said = found.get("error") or f"{found['default_layer']} {found['methods']} {found['cpu_s']} s"
            print(f"{library} {name}: {said}", flush=True)
    machine = environment(torch.device("cpu"))
    machine["versions"]["timm"] = __import__("timm").__version__
    ordered = {
        library: {name: families[library][name] for name in names if name in families[library]}
        for library, names in (("torchvision", TORCHVISION), ("timm", TIMM))
    }
    write(arguments.out, {"environment": machine, "families": ordered})


if __name__ == "__main__":
    main()
