"""The figures of the paper and of this project, each drawn from files that the commands write, never from a model."""

from intra_distillation_fairseq.analysis.figures.alpha import draw_alpha
from intra_distillation_fairseq.analysis.figures.importance import draw_importance
from intra_distillation_fairseq.analysis.figures.layers import draw_layers
from intra_distillation_fairseq.analysis.figures.passes import draw_passes
from intra_distillation_fairseq.analysis.figures.pruning import draw_pruning
from intra_distillation_fairseq.analysis.figures.sensitivity_curves import draw_sensitivity_curves
from intra_distillation_fairseq.analysis.figures.validation import draw_validation
from intra_distillation_fairseq.analysis.figures.violins import draw_violins

__all__ = [
    "draw_alpha",
    "draw_importance",
    "draw_layers",
    "draw_passes",
    "draw_pruning",
    "draw_sensitivity_curves",
    "draw_validation",
    "draw_violins",
]
