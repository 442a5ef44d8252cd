"""Exact parameter counts of the named architectures (paper: 49.98M and 275M)."""

import argparse

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

import intra_distillation_fairseq  # noqa: F401  registers the architectures


def dictionary(types: int) -> Dictionary:
    result = Dictionary()
    for i in range(types - len(result)):
        result.add_symbol(str(i))
    return result


@pytest.mark.parametrize(
    ("arch", "types", "parameters"),
    [("transformer_small", 12_001, 49_976_832), ("transformer_big", 32_001, 274_664_448)],
)
def test_parameter_count(arch, types, parameters):
    args = argparse.Namespace(max_source_positions=512, max_target_positions=512)
    ARCH_CONFIG_REGISTRY[arch](args)
    words = dictionary(types)
    task = argparse.Namespace(source_dictionary=words, target_dictionary=words)
    with torch.device("meta"):  # no memory for the 275M
        model = ARCH_MODEL_REGISTRY[arch].build_model(args, task)
    assert sum(p.numel() for p in model.parameters()) == parameters
