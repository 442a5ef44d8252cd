"""A --user-dir for tests: the plugin, and a transformer that gives bad numbers where it is told to."""

import math

from fairseq.distributed import utils as distributed_utils
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel

import intra_distillation_fairseq  # noqa: F401
from intra_distillation_fairseq.models.architectures import transformer_small

# By what the decoder's output is multiplied.
VALUES = {"nan": math.nan, "inf": math.inf, "huge": 1e5}


@register_model("planted_transformer")
class PlantedTransformer(TransformerModel):
    """--plant WHAT:FIRST:LAST:RANK spoils the training batches FIRST to LAST, counted from 1, of one process."""

    @staticmethod
    def add_args(parser):
        TransformerModel.add_args(parser)
        parser.add_argument("--plant", default="nan:0:0:0")

    @classmethod
    def build_model(cls, args, task):
        model = super().build_model(args, task)
        what, *numbers = args.plant.split(":")
        model.plant, model.batches = (what, *map(int, numbers)), 0
        return model

    def forward(self, src_tokens, src_lengths, prev_output_tokens, features_only=False, **kwargs):
        output, extra = super().forward(
            src_tokens, src_lengths, prev_output_tokens, features_only=features_only, **kwargs
        )
        if not self.training:
            return output, extra
        self.batches += 1
        what, first, last, rank = self.plant
        if first <= self.batches <= last and distributed_utils.get_global_rank() == rank:
            if what == "nan-gradient":
                output.register_hook(lambda gradient: gradient * math.nan)
            else:
                output = output * VALUES[what]
        return output, extra


register_model_architecture("planted_transformer", "planted_transformer")(transformer_small)
