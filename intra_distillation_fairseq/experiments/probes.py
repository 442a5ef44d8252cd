"""Looks at one part of an installation, in a process of its own: a part that cannot be imported breaks only its probe.

`ask` starts the process; everything else here runs in it, imports what it looks at, and knows nothing of advice.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

_LIMIT_S = 300
# Named like the command, so that the package does not import torch and fairseq by itself (see its __init__).
_CHILD = "import sys; sys.argv[0] = 'intra-distillation'; import {module} as probes; probes.answer({name!r})"
REQUIRED = {
    "numpy": "numpy",
    "sentencepiece": "sentencepiece",
    "sacrebleu": "sacrebleu",
    "sacremoses": "sacremoses",
    "regex": "regex",
    "PyYAML": "yaml",
    "tqdm": "tqdm",
}
_TOLERANCE = 1e-4


class Unanswered(Exception):
    """The process ended without an answer; the text says why, in one line."""


def ask(name: str) -> dict[str, Any]:
    """Run a probe of PROBES in a process of its own.

    Raises:
        Unanswered: see there.
    """
    code = _CHILD.format(module=__name__, name=name)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
    except subprocess.TimeoutExpired:
        raise Unanswered(f"no answer within {_LIMIT_S} s") from None
    lines = done.stdout.strip().split("\n")
    if done.returncode == 0:
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(lines[-1])
    said = done.stderr.strip().split("\n")[-1] or f"exit status {done.returncode}"
    raise Unanswered(said if done.returncode >= 0 else f"killed by signal {-done.returncode}: {said}")


def answer(name: str) -> None:
    """In the process: print what the probe found, as the last line."""
    print("\n" + json.dumps(PROBES[name]()))


def packages() -> dict[str, Any]:
    """For each required package `version` and `error`: why it cannot be imported, or None."""
    return {
        name: {"version": version(name), "error": _try(importlib.import_module, REQUIRED[name])} for name in REQUIRED
    }


def torch_and_gpus() -> dict[str, Any]:
    """torch, its GPUs, and whether processes can talk to each other: None, or why not."""
    import torch
    from torch import distributed

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported()
        capability = f"{facts.major}.{facts.minor}"
        gpus.append({"name": facts.name, "gib": facts.total_memory / 2**30, "capability": capability, "bf16": bf16})
    backends = {"gloo": "cpu", **({"nccl": "cuda"} if gpus else {})}
    there = distributed.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "distributed": {
            backend: _try(_sum_over_processes, backend, device) if there else "torch was built without it"
            for backend, device in backends.items()
        },
    }


def _sum_over_processes(backend: str, device: str) -> None:
    """With one process only; what usually fails is already the meeting."""
    import torch
    from torch import distributed

    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            distributed.all_reduce(torch.ones(1, device=device))
        finally:
            distributed.destroy_process_group()


def loss_backends() -> dict[str, Any]:
    """For each implementation of the loss: None where its value and gradient are those of `reference`, or why not."""
    import torch

    from intra_distillation_fairseq.losses import backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lacking = backends.why_no_triton(device, 3)
    return {
        name: lacking if name == "triton" and lacking else _try(_compare_with_reference, backends, name, device)
        for name in backends.BACKENDS
    }


def _compare_with_reference(backends: Any, name: str, device: Any) -> None:
    import torch

    from intra_distillation_fairseq.losses.objective import Objective

    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 5, 8, generator=generator)  # K x N x H
    weight = torch.randn(17, 8, generator=generator)
    target = torch.tensor([3, 5, 1, 9, 16])  # the third is padding
    objective = Objective(divergence="x", divergence_weight=2.0, label_smoothing=0.1, ignore_index=1)
    results = []
    for one in ("reference", name):
        leaf = features.to(device, copy=True).requires_grad_()
        loss = backends.BACKENDS[one].from_features(leaf, weight.to(device), None, target.to(device), objective).loss
        loss.backward()
        logits = (features @ weight.T).to(device).requires_grad_()
        also = backends.BACKENDS[one].from_logits(logits, target.to(device), objective).loss
        also.backward()
        results.append(torch.cat([value.detach().flatten().cpu() for value in (loss, also, leaf.grad, logits.grad)]))
    error = ((results[1] - results[0]).abs().max() / results[0].abs().max()).item()
    if not error < _TOLERANCE:
        raise ArithmeticError(f"its values differ from those of reference by {error:.1e}")


def fairseq_and_plugin() -> dict[str, Any]:
    """Where fairseq comes from, whether its compiled batching is there, and what the plugin has done to it."""
    import fairseq

    found: dict[str, Any] = {
        "path": os.path.dirname(fairseq.__file__ or ""),
        "distributions": {name: there for name in ("fairseq", "fairseq-fixed") if (there := version(name))},
        "compiled": _try(importlib.import_module, "fairseq.data.data_utils_fast"),
    }
    found["plugin"] = _try(importlib.import_module, "intra_distillation_fairseq.plugin")
    found["mended"] = {}
    if found["plugin"] is None:
        from intra_distillation_fairseq.compat import wrapping

        found["mended"] = wrapping.in_place()
    return found


def version(distribution: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try(function: Callable[..., Any], *arguments: Any) -> str | None:
    """None, or in one line why it failed."""
    try:
        function(*arguments)
    except Exception as error:  # whatever a broken installation makes of it
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return None


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "packages": packages,
    "torch": torch_and_gpus,
    "losses": loss_backends,
    "fairseq": fairseq_and_plugin,
}
