"""BERT over bytes: a teacher for texts, small enough to be trained here, built by the transformers library.

Jacob Devlin, Ming-Wei Chang, Kenton Lee, Kristina Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding", NAACL 2019, arXiv:1810.04805.

The encoder of BERT, with random weights and the 256 bytes as its tokens, so that no vocabulary is needed; byte 0 is
padding. What the last layer makes of a text's bytes is averaged, and a linear layer scores the classes.

With `patch` above 1 a convolution of that stride makes one token of so many bytes, as in CANINE (arXiv:2103.06874),
which costs less and learns faster on little text.

When: a teacher for `galago.search.nas_kd` or any other student of texts (`galago.datasets.texts`). It has seen no text
before the recipe's: it is no pre-trained language model. Needs `pip install 'galago[text]'`.

Chosen here: the mean of the last layer instead of a token of its own for the class, no segments;
the feed-forward layers are four times as wide as the others, as in the paper.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from galago.errors import UserError


class Bert(nn.Module):
    """Encoder of texts N×1×1×T, bytes as floats 0 to 255, to class scores N×K.

    Args:
        classes: number of outputs.
        length: largest number T of bytes.
        width: numbers a byte.
        layers: how many.
        heads: of attention in each layer; they divide the width.
        patch: bytes a token; more than 1 are brought together by a convolution.
        dropout: share of the features that training leaves out.
    """

    def __init__(
        self,
        classes: int,
        length: int,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        patch: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if patch < 1 or length % patch:
            raise UserError(f"Bert: patches of {patch} bytes do not fill a length of {length}; choose another number")
        if width % heads:
            raise UserError(f"Bert: {heads} heads do not divide a width of {width}; choose another number of either")
        self.classes, self.length, self.width = classes, length, width
        self.layers, self.heads, self.patch, self.dropout = layers, heads, patch, dropout
        self.encoder = _encoder(length // patch, width, layers, heads, dropout)
        together = nn.Conv1d(width, width, 2 * patch - 1, patch, padding=patch - 1)
        self.together = nn.Identity() if patch == 1 else nn.Sequential(together, nn.GELU())
        if patch > 1:  # BERT's own are small, for the normalization that follows at once
            nn.init.normal_(self.encoder.embeddings.word_embeddings.weight)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1).round().long().clamp(0, 255)
        seen = (tokens != 0).view(len(tokens), -1, self.patch).any(2).to(x.dtype)
        embedded = self.together(self.encoder.embeddings.word_embeddings(tokens).transpose(1, 2)).transpose(1, 2)
        features: Tensor = self.encoder(inputs_embeds=embedded, attention_mask=seen).last_hidden_state
        total = (features * seen.unsqueeze(2)).sum(1)
        scores: Tensor = self.linear(total / seen.sum(1, keepdim=True).clamp_min(1.0))
        return scores


def _encoder(length: int, width: int, layers: int, heads: int, dropout: float) -> Any:
    try:
        from transformers import BertConfig, BertModel  # takes seconds, and only texts need it
    except ImportError as error:
        raise UserError("Bert needs the transformers library: pip install 'galago[text]'") from error
    config = BertConfig(
        vocab_size=256,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        type_vocab_size=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False)
