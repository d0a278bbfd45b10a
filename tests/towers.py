"""Small networks of images and texts with random weights, as Hugging Face saves them, for tests of any kind."""

from pathlib import Path

import tokenizers
import torch
import transformers

SIDE = 32
PROMPTS = ["a photo of a cat", "two dogs, asleep", "a red bird over the sea"]
WORDS = sorted({letter for prompt in PROMPTS for letter in prompt.lower()} | set("bcdefghijklmnopqrstuvwxyz,!.?7"))


def bpe_of_letters() -> transformers.PreTrainedTokenizerBase:
    """CLIP's tokeniser with letters and a few pairs for a table."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    letters = [letter for letter in WORDS if letter != " "]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "do", *ends]
    vocabulary = {name: index for index, name in enumerate(names)}
    return transformers.CLIPTokenizer(
        vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>"), ("d", "o")], model_max_length=77
    )


def wordpieces() -> transformers.PreTrainedTokenizerBase:
    """BERT's tokeniser."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "two", "dog", "##s", "red", ","]
    return transformers.BertTokenizer(vocab={name: index for index, name in enumerate(words)}, model_max_length=512)


def unigrams(names: list[str] | None = None) -> transformers.PreTrainedTokenizerBase:
    """A tokeniser of pieces with an end and no start, as SigLIP's is."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581photo", "\u2581of", "\u2581cat", "\u2581two", "\u2581dogs"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({one: at for at, one in enumerate(pieces)}, "<unk>"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
        model_input_names=names or ["input_ids"],
    )


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SEEN = {**SMALL, "image_size": SIDE, "patch_size": 8}


def clip():
    text = {**SMALL, "vocab_size": 200, "max_position_embeddings": 40, "eos_token_id": 100}
    tokeniser = bpe_of_letters()
    text |= {"eos_token_id": tokeniser.eos_token_id, "bos_token_id": tokeniser.bos_token_id}
    config = transformers.CLIPConfig(text_config=text, vision_config=SEEN, projection_dim=24)
    return transformers.CLIPModel(config), tokeniser, 40


def siglip():
    text = {**SMALL, "vocab_size": 16, "max_position_embeddings": 64, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=SEEN)
    return transformers.SiglipModel(config), unigrams(), 16


def siglip_masked():
    network, _, most = siglip()
    return network, unigrams(["input_ids", "attention_mask"]), most


def chinese_clip():
    text = {**SMALL, "vocab_size": 30, "max_position_embeddings": 48}
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=SEEN, projection_dim=24)
    return transformers.ChineseCLIPModel(config), wordpieces(), 48


def altclip():
    text = {**SMALL, "vocab_size": 30, "max_position_embeddings": 48, "project_dim": 24, "pad_token_id": 0}
    config = transformers.AltCLIPConfig(text_config=text, vision_config=SEEN, projection_dim=24)
    return transformers.AltCLIPModel(config), wordpieces(), 47


def align():
    text = {**SMALL, "vocab_size": 30, "max_position_embeddings": 48}
    seen = {
        "image_size": SIDE,
        "in_channels": [32, 8],
        "out_channels": [8, 16],
        "kernel_sizes": [3, 3],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2],
        "depthwise_padding": [],
        "hidden_dim": 32,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    }
    config = transformers.AlignConfig(text_config=text, vision_config=seen, projection_dim=16)
    return transformers.AlignModel(config), wordpieces(), 48


FAMILIES = {
    "clip": clip,
    "siglip": siglip,
    "siglip_masked": siglip_masked,
    "chinese_clip": chinese_clip,
    "altclip": altclip,
    "align": align,
}


def saved(directory: Path, family) -> Path:
    torch.manual_seed(3)
    network, tokeniser, _ = family()
    for weight in network.parameters():  # as they are made, all answers are alike
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    for name, value in (("logit_scale", 1.5), ("logit_bias", -0.7), ("temperature", 0.2)):
        if hasattr(network, name):
            torch.nn.init.constant_(getattr(network, name), value)
    network.save_pretrained(directory)
    tokeniser.save_pretrained(directory)
    size = {"shortest_edge": SIDE}
    transformers.CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(directory)
    return directory
