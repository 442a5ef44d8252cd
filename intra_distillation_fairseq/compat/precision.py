"""Flags of precision."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fairseq import options

from intra_distillation_fairseq.compat.wrapping import wrap


def let_bf16_mean_bf16() -> None:
    """P7: fairseq-train takes --bf16 for "this is a TPU" and crashes for want of one."""

    def wrapper(parse: Callable) -> Callable:
        def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
            parsed = parse(parser, input_args, *args, **kwargs)
            namespace = parsed[0] if isinstance(parsed, tuple) else parsed
            namespace.tpu = "--tpu" in (sys.argv if input_args is None else input_args)
            return parsed

        return parse_args_and_arch

    wrap(options, "parse_args_and_arch", wrapper)
