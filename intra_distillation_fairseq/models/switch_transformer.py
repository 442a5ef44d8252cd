"""`--arch switch_transformer_small` and `_big`: fairseq's transformer with experts for every feed-forward layer."""

# No `from __future__ import annotations` here: fairseq reads the types of a configuration's fields when it is imported.
import functools
import math
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModel,
    transformer_iwslt_de_en,
    transformer_vaswani_wmt_en_de_big,
)
from fairseq.modules import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import nn

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.models.switch_layer import SwitchFeedForward


@dataclass
class SwitchTransformerConfig(TransformerConfig):
    """fairseq's flags of a transformer, and those of the experts under one prefix."""

    switch_experts: int = field(default=4, metadata={"help": "experts in each feed-forward layer, at least 1 (4)"})
    switch_capacity_factor: float = field(
        default=1.25,
        metadata={
            "help": "in training an expert takes at most this many times an equal share of the tokens, above 0 (1.25)"
        },
    )
    switch_loss_weight: float = field(
        default=0.01, metadata={"help": "weight of each layer's load-balancing loss in training, at least 0 (0.01)"}
    )
    switch_jitter: float = field(
        default=0.0,
        metadata={
            "help": "in training the router sees its input times uniform(1 - jitter, 1 + jitter), from 0 to below 1 (0)"
        },
    )
    switch_expert_dropout: Optional[float] = field(
        default=None,
        metadata={"help": "dropout after an expert's activation, from 0 to below 1 (that of --activation-dropout)"},
    )


DEFAULTS = {
    name: value.default
    for name, value in SwitchTransformerConfig.__dataclass_fields__.items()
    if name.startswith("switch_")
}


def check(cfg: SwitchTransformerConfig) -> None:
    """Refuse flags that have no meaning.

    Raises:
        UserError: a flag's value is out of bounds, or one of fairseq's does not work with experts.
    """
    dropout = cfg.switch_expert_dropout
    allowed = {
        "switch_experts": ("at least 1", cfg.switch_experts >= 1),
        "switch_capacity_factor": ("a number above 0", 0 < cfg.switch_capacity_factor < math.inf),
        "switch_loss_weight": ("a number from 0", 0 <= cfg.switch_loss_weight < math.inf),
        "switch_jitter": ("from 0 to below 1", 0 <= cfg.switch_jitter < 1),
        "switch_expert_dropout": ("from 0 to below 1", dropout is None or 0 <= dropout < 1),
    }
    for name, (what, holds) in allowed.items():
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} is '{getattr(cfg, name)}': allowed is {what}")
    if cfg.checkpoint_activations or cfg.offload_activations:
        raise UserError(
            "--checkpoint-activations (or --offload-activations) is set: a switch transformer's load-balancing loss "
            "would lose its gradient; train without, on smaller batches (--max-tokens) with --update-freq"
        )
    if cfg.quant_noise.pq > 0:
        raise UserError("--quant-noise-pq is set: experts have no quantisation noise; train without")


class ExpertsMixin:
    """Puts experts in the place of a fairseq layer's `fc2(dropout(activation(fc1(x))))`.

    All of it is in `fc1`, the rest does nothing: so the layer's own forward, pre-norm and post-norm, remains in use.
    """

    def build_fc1(self, *sizes) -> nn.Module:
        return nn.Identity()  # the experts need the configuration, which not every layer of fairseq keeps

    build_fc2 = build_fc1

    def put_experts(self, cfg: SwitchTransformerConfig, ffn_embed_dim: int) -> None:
        dropout = cfg.switch_expert_dropout
        if dropout is not None:
            self.activation_dropout_module = FairseqDropout(dropout, module_name=type(self).__name__)
        self.fc1 = SwitchFeedForward(
            self.embed_dim,
            ffn_embed_dim,
            cfg.switch_experts,
            cfg.switch_capacity_factor,
            cfg.switch_loss_weight,
            cfg.switch_jitter,
            self.activation_fn,
            self.activation_dropout_module,
        )
        self.activation_fn = nn.Identity()
        self.activation_dropout_module = nn.Identity()


class SwitchEncoderLayer(ExpertsMixin, TransformerEncoderLayerBase):
    """fairseq's encoder layer with experts."""

    def __init__(self, cfg, return_fc=False):
        super().__init__(cfg, return_fc=return_fc)
        self.put_experts(cfg, cfg.encoder.ffn_embed_dim)

    def forward(self, x, encoder_padding_mask, attn_mask=None):
        self.fc1.padding_mask = encoder_padding_mask
        return super().forward(x, encoder_padding_mask, attn_mask)


class SwitchDecoderLayer(ExpertsMixin, TransformerDecoderLayerBase):
    """fairseq's decoder layer with experts."""

    def __init__(self, cfg, no_encoder_attn=False):
        super().__init__(cfg, no_encoder_attn)
        self.put_experts(cfg, cfg.decoder.ffn_embed_dim)

    def forward(self, x, *args, self_attn_padding_mask=None, **kwargs):
        self.fc1.padding_mask = self_attn_padding_mask
        return super().forward(x, *args, self_attn_padding_mask=self_attn_padding_mask, **kwargs)


class SwitchEncoder(TransformerEncoderBase):
    def build_encoder_layer(self, cfg):
        return SwitchEncoderLayer(cfg, return_fc=self.return_fc)


class SwitchDecoder(TransformerDecoderBase):
    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return SwitchDecoderLayer(cfg, no_encoder_attn)


@register_model("switch_transformer")
class SwitchTransformerModel(TransformerModel):
    """Trains under a task that adds the load-balancing loss (tasks/router_loss.py); translates under any."""

    # Whether the task that built the model adds the loss; without it most tokens soon go to one expert.
    router_loss_is_added = False

    @classmethod
    def add_args(cls, parser):
        """fairseq's hook: flags without defaults, so that those of the architecture hold."""
        gen_parser_from_dataclass(parser, SwitchTransformerConfig(), delete_default=True, with_prefix="")

    @classmethod
    def build_model(cls, args, task):
        """fairseq's constructor of models; a wrong flag ends the program with one line instead of a stack trace."""
        cfg = SwitchTransformerConfig.from_namespace(args)
        try:
            check(cfg)
        except UserError as error:
            raise SystemExit(f"error: {error}") from error
        model = super().build_model(cfg, task)
        model.router_loss_is_added = getattr(task, "adds_router_loss", False)
        return model

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return SwitchEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return SwitchDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)

    @functools.wraps(TransformerModel.forward)  # its signature says what it takes
    def forward(self, *args, **kwargs):
        """See fairseq's transformer.

        Raises:
            SystemExit: training under a task that does not add the load-balancing loss.
        """
        if self.training and torch.is_grad_enabled() and self.cfg.switch_loss_weight and not self.router_loss_is_added:
            raise SystemExit(
                "error: --task is one that does not add the load-balancing loss of a switch transformer; use --task "
                "translation_intra_distillation (or --switch-loss-weight 0 to train without that loss)"
            )
        return super().forward(*args, **kwargs)


def _write_defaults(args) -> None:
    """So that a checkpoint says them, and a later version's defaults change no old model."""
    for name, default in DEFAULTS.items():
        setattr(args, name, getattr(args, name, default))


@register_model_architecture("switch_transformer", "switch_transformer_small")
def switch_transformer_small(args) -> None:
    """transformer_small with 4 experts in all 12 layers: 87,805,440 parameters with 12,001 types on both sides."""
    _write_defaults(args)
    transformer_iwslt_de_en(args)


@register_model_architecture("switch_transformer", "switch_transformer_big")
def switch_transformer_big(args) -> None:
    """transformer_big with 4 experts in all 12 layers: 576,887,808 parameters with 32,001 types on both sides."""
    _write_defaults(args)
    transformer_vaswani_wmt_en_de_big(args)
