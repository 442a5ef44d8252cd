"""Intra-distillation (Xu, Koehn, Murray, EMNLP 2022, arXiv:2205.11416) as a fairseq plugin.

Importing this package, by `--user-dir` or from Python, registers its task, criterion and architectures with fairseq and
puts the mends of `compat/` in place.
"""

import os
import sys

# The command `intra-distillation` works on text files too and must not wait three seconds for torch and fairseq: those
# of its sub-commands that need the plugin import it themselves.
if os.path.basename(sys.argv[0] if sys.argv else "") != "intra-distillation":
    from intra_distillation_fairseq import plugin  # noqa: F401


def load(run_dir, checkpoint="best", *, data=None, device="cpu"):
    """Open a trained model: `model, task, config = load(RUN_DIR)`; see `loading.load`."""
    from intra_distillation_fairseq import loading

    return loading.load(run_dir, checkpoint, data=data, device=device)
