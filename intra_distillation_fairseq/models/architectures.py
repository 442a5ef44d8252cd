"""The two transformers of the paper under its names: embeddings and output projection are not shared."""

from __future__ import annotations

from fairseq.models import register_model_architecture
from fairseq.models.transformer import transformer_iwslt_de_en, transformer_vaswani_wmt_en_de_big


@register_model_architecture("transformer", "transformer_small")
def transformer_small(args) -> None:
    """6 + 6 layers, width 512, FFN 1024, 4 heads: 49,976,832 parameters with 12,001 types on both sides."""
    transformer_iwslt_de_en(args)


@register_model_architecture("transformer", "transformer_big")
def transformer_big(args) -> None:
    """6 + 6 layers, width 1024, FFN 4096, 16 heads: 274,664,448 parameters with 32,001 types on both sides."""
    transformer_vaswani_wmt_en_de_big(args)
