"""Architectures of transformers, built from tiny configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import transformers as hf
from torch import nn

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TEXT = ("input_ids:1x12:int64", "attention_mask:1x12:int64")
IMAGE = ("pixel_values:1x3x32x32",)
SEQUENCE = ("input_ids:1=sequence[1..32]", "attention_mask:1=sequence")


class Architecture(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    axes: tuple[str, ...]
    outputs: tuple[str, ...]


def resnet() -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return hf.ResNetForImageClassification(config)


def convnext() -> nn.Module:
    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_labels=3)
    return hf.ConvNextForImageClassification(config)


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**TINY, image_size=32, patch_size=8))


def swin() -> nn.Module:
    config = hf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4
    )
    return hf.SwinForImageClassification(config)


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(
        hf.BertConfig(**TINY, vocab_size=40, max_position_embeddings=32)
    )


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32
    )
    return hf.DistilBertForSequenceClassification(config)


def mobilenet_v2() -> nn.Module:
    return hf.MobileNetV2ForImageClassification(
        hf.MobileNetV2Config(image_size=32, depth_multiplier=0.25, min_depth=4, num_labels=3)
    )


def segformer() -> nn.Module:
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 2], hidden_sizes=[8, 16],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    return hf.SegformerForSemanticSegmentation(config)


def yolos() -> nn.Module:
    return hf.YolosForObjectDetection(
        hf.YolosConfig(**TINY, image_size=[32, 32], patch_size=8, num_detection_tokens=5)
    )


def whisper_encoder() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=40, num_mel_bins=8, encoder_layers=2, encoder_attention_heads=2,
        decoder_layers=1, decoder_attention_heads=2, d_model=16, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_source_positions=20, max_target_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return hf.WhisperModel(config).encoder


def clip() -> nn.Module:
    config = hf.CLIPConfig(
        text_config={**TINY, "vocab_size": 40, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config={**TINY, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return hf.CLIPModel(config)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, use_cache=False
    )
    return hf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = hf.LlamaConfig(
        **TINY, vocab_size=40, max_position_embeddings=32, num_key_value_heads=1, use_cache=False
    )
    return hf.LlamaForCausalLM(config)


def t5_encoder() -> nn.Module:
    config = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return hf.T5EncoderModel(config)


def wav2vec2() -> nn.Module:
    config = hf.Wav2Vec2Config(
        **TINY, vocab_size=10, conv_dim=[8, 8], conv_stride=[5, 2], conv_kernel=[10, 3],
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return hf.Wav2Vec2ForCTC(config)


LOGITS = ("logits",)
ARCHITECTURES = {
    each.make.__name__: each
    for each in (
        Architecture(resnet, IMAGE, (), LOGITS),
        Architecture(convnext, IMAGE, (), LOGITS),
        Architecture(vit, IMAGE, (), LOGITS),
        Architecture(swin, IMAGE, (), LOGITS),
        Architecture(bert, TEXT, SEQUENCE, LOGITS),
        Architecture(distilbert, TEXT, SEQUENCE, LOGITS),
        Architecture(mobilenet_v2, IMAGE, (), LOGITS),
        Architecture(segformer, IMAGE, (), LOGITS),
        Architecture(yolos, IMAGE, (), ("logits", "pred_boxes", "last_hidden_state")),
        Architecture(whisper_encoder, ("input_features:1x8x40",), (), ("last_hidden_state",)),
        Architecture(clip, (*TEXT, *IMAGE), SEQUENCE, ()),
        Architecture(gpt2, TEXT, SEQUENCE, LOGITS),
        Architecture(llama, TEXT, SEQUENCE, LOGITS),
        Architecture(t5_encoder, TEXT, SEQUENCE, ("last_hidden_state",)),
        Architecture(wav2vec2, ("input_values:1x400",), (), LOGITS),
    )
}
