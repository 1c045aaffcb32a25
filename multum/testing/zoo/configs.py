"""Networks of the transformers package, from configurations of tiny sizes."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import MissingExtra
from .entry import ZOO, Entry, entry

_BY_HAND = len(ZOO)


def _transformer(kind: str, config: str, example: Any, **options: Any) -> Entry:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "examples", f"The model {kind}") from error
    settings = getattr(transformers, config)(**options)
    settings.use_cache = False
    return getattr(transformers, kind)(settings), example


_IDS = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
_BOTH = {"input_ids": _IDS["input_ids"], "decoder_input_ids": _IDS["input_ids"] + 1}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
_CAUSAL = _SMALL | {"vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _image(size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


@entry
def bert() -> Entry:
    return _transformer("BertForSequenceClassification", "BertConfig", _IDS, vocab_size=60, max_position_embeddings=16, **_SMALL)


@entry
def albert() -> Entry:
    """One layer, used twice; the embedding is narrower than the rest."""
    options = _SMALL | {"vocab_size": 60, "embedding_size": 8, "max_position_embeddings": 16}
    return _transformer("AlbertForSequenceClassification", "AlbertConfig", _IDS, **options)


@entry
def distilbert() -> Entry:
    options = {"vocab_size": 60, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 16}
    return _transformer("DistilBertForSequenceClassification", "DistilBertConfig", _IDS, **options)


@entry
def vit() -> Entry:
    return _transformer("ViTForImageClassification", "ViTConfig", _image(16), image_size=16, patch_size=8, num_labels=5, **_SMALL)


@entry
def swin() -> Entry:
    options = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
    return _transformer("SwinForImageClassification", "SwinConfig", _image(32), num_labels=5, **options)


@entry
def segformer() -> Entry:
    """Attention over a smaller image of keys, a depthwise convolution in the perceptron, levels joined in the decoder."""
    options = {"hidden_sizes": [8, 16], "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "num_attention_heads": [2, 4],
               "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16, "num_labels": 5}  # fmt: skip
    return _transformer("SegformerForSemanticSegmentation", "SegformerConfig", _image(32), **options)


@entry
def levit() -> Entry:
    """Attention with batch norm, hence no axis that a norm holds together."""
    options = {"image_size": 32, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 4, 4], "depths": [1, 1, 1], "key_dim": [4, 4, 4]}
    return _transformer("LevitForImageClassification", "LevitConfig", _image(32), **options, num_labels=5)


@entry
def convnext_v2() -> Entry:
    options = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16, "num_labels": 5}
    return _transformer("ConvNextV2ForImageClassification", "ConvNextV2Config", _image(16), **options)


@entry
def gpt2() -> Entry:
    options = {"vocab_size": 60, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return _transformer("GPT2LMHeadModel", "GPT2Config", {"input_ids": _IDS["input_ids"]}, **options)


@entry
def gpt_neox() -> Entry:
    """Heads come first in the fused projection; a quarter of each is rotated; attention and perceptron run side by side."""
    return _transformer("GPTNeoXForCausalLM", "GPTNeoXConfig", {"input_ids": _IDS["input_ids"]}, **_CAUSAL)


@entry
def llama() -> Entry:
    return _transformer("LlamaForCausalLM", "LlamaConfig", {"input_ids": _IDS["input_ids"]}, **_CAUSAL, num_key_value_heads=2)


@entry
def gemma() -> Entry:
    """Tied embeddings; heads are wider than their share of the stream."""
    options = _CAUSAL | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    return _transformer("GemmaForCausalLM", "GemmaConfig", {"input_ids": _IDS["input_ids"]}, **options)


@entry
def mamba() -> Entry:
    """A state-space model: its scan over time, unrolled."""
    options = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4} | _SPECIAL
    return _transformer("MambaForCausalLM", "MambaConfig", {"input_ids": _IDS["input_ids"]}, **options)


@entry
def t5_encoder() -> Entry:
    options = {"vocab_size": 60, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return _transformer("T5EncoderModel", "T5Config", {"input_ids": _IDS["input_ids"]}, **options)


@entry
def t5() -> Entry:
    """Encoder and decoder, gated perceptrons, untied."""
    options = {"vocab_size": 60, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "tie_word_embeddings": False}
    return _transformer("T5ForConditionalGeneration", "T5Config", _BOTH, **options, feed_forward_proj="gated-gelu")


_SIDES = {
    f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 32))
}


@entry
def bart() -> Entry:
    options = _SIDES | _SPECIAL | {"vocab_size": 60, "d_model": 16, "max_position_embeddings": 16}
    return _transformer("BartForConditionalGeneration", "BartConfig", _BOTH, **options)


@entry
def whisper() -> Entry:
    """Sound in, text out: convolutions before the encoder."""
    sizes = {"vocab_size": 60, "num_mel_bins": 8, "d_model": 16, "max_source_positions": 10, "max_target_positions": 16}
    options = _SIDES | _SPECIAL | sizes | dict.fromkeys(("suppress_tokens", "begin_suppress_tokens")) | {"decoder_start_token_id": 1}
    example = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": _IDS["input_ids"]}
    return _transformer("WhisperForConditionalGeneration", "WhisperConfig", example, **options)


@entry
def clip() -> Entry:
    """A tower for texts and one for images, each with a projection to the same space."""
    text = _CAUSAL | {"pad_token_id": 0}
    options = {"text_config": text, "vision_config": _SMALL | {"image_size": 16, "patch_size": 8}, "projection_dim": 12}
    return _transformer("CLIPModel", "CLIPConfig", _IDS | _image(16), **options)


CONFIGS = tuple(ZOO)[_BY_HAND:]  # the models that need the transformers package
