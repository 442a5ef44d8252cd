"""Task, model and criterion of fairseq in this process, small, and one forward and backward of them."""

import argparse

import torch
from fairseq import tasks
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf

import intra_distillation_fairseq  # noqa: F401
from intra_distillation_fairseq.criterions.intra_distillation import IntraDistillationCriterionConfig


def make_task(data, name="translation_intra_distillation", **settings):
    cfg = tasks.TASK_DATACLASS_REGISTRY[name](
        data=str(data),
        source_lang="xx",
        target_lang="en",
        dataset_impl="mmap",
        required_seq_len_multiple=1,
        train_subset="train",
        **settings,
    )
    return tasks.TASK_REGISTRY[name].setup_task(cfg)


def make_criterion(task, name="intra_distillation", **settings):
    defaults = {"label_smoothing": 0.1, "sentence_avg": False, "max_update": 100}
    cfg = OmegaConf.structured(IntraDistillationCriterionConfig(**{**defaults, **settings}))
    return CRITERION_REGISTRY[name].build_criterion(cfg, task)


def make_model(task, dropout=0.0, arch="transformer_small", **settings):
    sizes = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
             (("layers", 1), ("embed_dim", 16), ("ffn_embed_dim", 32), ("attention_heads", 2))}  # fmt: skip
    args = argparse.Namespace(max_source_positions=64, max_target_positions=64, dropout=dropout, **sizes, **settings)
    ARCH_CONFIG_REGISTRY[arch](args)
    torch.manual_seed(0)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, task)


def gradient(model, criterion, sample):
    model.train()
    model.zero_grad()
    loss, sample_size, log = criterion(model, sample)
    loss.backward()
    return loss.item(), sample_size, log, torch.cat([p.grad.flatten() for p in model.parameters()])
