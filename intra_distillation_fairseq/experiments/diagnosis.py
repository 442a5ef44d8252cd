"""Looks over an installation, part by part: what is there, whether it works, and what to do where it does not.

Must get to its end whatever is missing, so nothing here imports a package at the top.
"""

from __future__ import annotations

import importlib.metadata
import locale
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from intra_distillation_fairseq.experiments import probes
from intra_distillation_fairseq.experiments.probes import Unanswered

OK, WARNING, FAIL = "ok", "warning", "FAIL"
_INSTALL = "run bash scripts/setup.sh"
_DISTRIBUTION = "intra-distillation-fairseq"
# Packages that some commands go without -> what needs them.
_OPTIONAL = {
    "matplotlib": "figures",
    "tensorboardX": "--tensorboard-logdir",
    "wandb": "--wandb-project",
    "triton": "the loss back end triton",
}
_TRIED_FAIRSEQS = {("fairseq", "0.12.2"), ("fairseq-fixed", "0.12.3.1")}
_LEAST_DISK_GB, _LEAST_MEMORY_GB = 5, 2
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class Finding(NamedTuple):
    """What was found of one part.

    Attributes:
        part: its name.
        status: OK, WARNING or FAIL.
        text: what is there.
        advice: what to do; "" where nothing is to be done.
        log: the end of what a failed command said.
    """

    part: str
    status: str
    text: str
    advice: str = ""
    log: str = ""

    def line(self) -> str:
        """For the reader."""
        return f"{self.status:8} {self.part:14} {self.text}" + (f": {self.advice}" if self.advice else "")


def examine(*, trial: bool, cpu: bool = False) -> Iterator[Finding]:
    """Everything, the quick parts first; each finding as soon as it is known.

    Args:
        trial: also train, go on with it and translate, on an invented text.
        cpu: keep that off the GPU.
    """
    yield _python()
    yield _encoding()
    yield _machine()
    disk = _disk()
    yield disk
    if disk.status == FAIL:
        return
    healthy = True
    with _scratch() as folder:
        for finding in _installed():
            healthy = healthy and finding.status != FAIL
            yield finding
        if trial and healthy:
            yield _trial(folder, cpu)
        elif trial:
            yield Finding("trial", WARNING, "no training was tried", "mend the failures above first")


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder that goes away with all that the processes which look at the parts leave in it."""
    before = {name: os.environ.get(name) for name in ("TMPDIR", "TRITON_CACHE_DIR")}
    with tempfile.TemporaryDirectory(prefix="intra-distillation-") as folder:
        os.environ.update(dict.fromkeys(before, folder))
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value


def _installed() -> Iterator[Finding]:
    yield from _probed("packages", _packages)
    yield from _optional()
    yield from _probed("torch", _torch)
    yield from _probed("fairseq", _fairseq)
    yield from _probed("losses", _losses)


def _python() -> Finding:
    text = f"{platform.python_version()}, {sys.executable}, {platform.platform()}"
    return Finding("python", OK, text)


def _encoding() -> Finding:
    found = {
        "locale": locale.getpreferredencoding(False),
        "file names": sys.getfilesystemencoding(),
        "terminal": getattr(sys.stdout, "encoding", None) or "none",
    }
    text = ", ".join(f"{what} {encoding}" for what, encoding in found.items())
    if all(encoding.lower().replace("-", "") == "utf8" for encoding in found.values()):
        return Finding("encoding", OK, text)
    return Finding("encoding", WARNING, text, "letters beyond ASCII may not be shown; set LC_ALL=C.UTF-8")


def _machine() -> Finding:
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    total, free = _memory_gb()
    text = f"{cores} CPU cores, OMP_NUM_THREADS {threads or 'not set'}, {free:.1f} of {total:.1f} GB memory free"
    if threads and threads.isdigit() and int(threads) > cores:
        return Finding("machine", WARNING, text, f"more threads than cores slow training down; set it to {cores}")
    if free < _LEAST_MEMORY_GB:
        return Finding("machine", WARNING, text, "little for a training; end what else runs")
    return Finding("machine", OK, text)


def _memory_gb() -> tuple[float, float]:
    """All of it, and what is free."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
    facts = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if value}
    return facts["MemTotal"] * 1024 / 1e9, facts.get("MemAvailable", facts["MemFree"]) * 1024 / 1e9


def _disk() -> Finding:
    try:
        folders = {"here": Path.cwd(), "for temporary files": Path(tempfile.gettempdir())}
        free = {what: shutil.disk_usage(folder).free / 1e9 for what, folder in folders.items()}
    except OSError as error:
        return Finding("disk", FAIL, str(error), "go to a folder that exists; set TMPDIR to one that can be written")
    text = ", ".join(f"{free[what]:.1f} GB free {what} ({folder})" for what, folder in folders.items())
    if min(free.values()) < _LEAST_DISK_GB:
        return Finding("disk", WARNING, text, "little for data and checkpoints; free some, or set TMPDIR")
    return Finding("disk", OK, text)


def _probed(part: str, judge: Callable[[dict[str, Any]], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        found = probes.ask(part)
    except Unanswered as error:
        yield Finding(part, FAIL, f"does not work ({error})", _INSTALL)
        return
    yield from judge(found)


def _packages(found: dict[str, Any]) -> Iterator[Finding]:
    pinned = _pinned()
    for name, (version, error) in ((name, one.values()) for name, one in found.items()):
        if error:
            yield Finding(name, FAIL, f"cannot be imported ({error})", _INSTALL)
        elif pinned.get(name, version) != version:
            yield Finding(name, WARNING, f"{version}", f"bytes and scores are those of {pinned[name]}; {_INSTALL}")
        else:
            yield Finding(name, OK, version or "of an unknown version")


def _pinned() -> dict[str, str]:
    """Package -> the one version that the plugin wants."""
    try:
        wanted = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.fullmatch(r"([\w.-]+)==([\w.]+)", requirement) for requirement in wanted)
    return {match[1]: match[2] for match in found if match}


def _optional() -> Iterator[Finding]:
    for name, needs in _OPTIONAL.items():
        version = probes.version(name)
        yield Finding(name, OK, version or f"not installed; only {needs} would need it")


def _torch(found: dict[str, Any]) -> Iterator[Finding]:
    cuda = f"CUDA {found['cuda']}" if found["cuda"] else "without CUDA"
    text = f"{found['version']}, {cuda}, {found['threads']} threads"
    old = tuple(int(number) for number in re.findall(r"\d+", found["version"])[:2]) < (2, 6)
    yield Finding("torch", FAIL, text, f"2.6 or newer is needed; {_INSTALL}") if old else Finding("torch", OK, text)
    for gpu in found["gpus"]:
        bf16 = "bfloat16" if gpu["bf16"] else "no bfloat16"
        yield Finding("gpu", OK, f"{gpu['name']}, {gpu['gib']:.0f} GiB, capability {gpu['capability']}, {bf16}")
    if not found["gpus"] and _NVIDIA_DRIVER.exists():
        advice = "see CUDA_VISIBLE_DEVICES and nvidia-smi, or name a torch for its driver (TORCH_SPEC of setup.sh)"
        yield Finding("gpu", WARNING, "this machine has NVIDIA's driver, but torch sees no GPU", advice)
    elif not found["gpus"]:
        yield Finding("gpu", OK, "none; trainings run on the CPU")
    for backend, error in found["distributed"].items():
        if error:
            yield Finding(backend, WARNING, f"does not work ({error})", "trainings in one process do not need it")
        else:
            yield Finding(backend, OK, "works, for trainings in several processes")


def _fairseq(found: dict[str, Any]) -> Iterator[Finding]:
    distributions = found["distributions"]
    text = ", ".join(f"{name} {version}" for name, version in distributions.items()) or "of an unknown version"
    text += f", {found['path']}"
    if len(distributions) > 1:
        yield Finding("fairseq", FAIL, text, f"two of one import name overwrite each other; {_INSTALL}")
    elif not _TRIED_FAIRSEQS & set(distributions.items()):
        tried = " and ".join(f"{name} {version}" for name, version in sorted(_TRIED_FAIRSEQS))
        yield Finding("fairseq", WARNING, text, f"tried are {tried}")
    else:
        yield Finding("fairseq", OK, text)
    if found["compiled"]:
        yield Finding("batching", FAIL, f"fairseq's compiled part is missing ({found['compiled']})", _INSTALL)
    else:
        yield Finding("batching", OK, "fairseq's compiled part is there")
    replaced = [name for name, stands in found["mended"].items() if not stands]
    if found["plugin"]:
        yield Finding("plugin", FAIL, f"cannot be imported ({found['plugin']})", _INSTALL)
    elif replaced:
        advice = "another --user-dir or package has put its own functions there: train without it"
        yield Finding("plugin", FAIL, f"mends of fairseq that are not in place: {', '.join(replaced)}", advice)
    else:
        version = probes.version(_DISTRIBUTION) or "not installed, imported from its folder"
        yield Finding("plugin", OK, f"{version}; functions of fairseq mended by {', '.join(found['mended'])}")


def _losses(found: dict[str, Any]) -> Iterator[Finding]:
    for name, error in found.items():
        if not error:
            yield Finding(f"loss {name}", OK, "works")
        elif name == "triton":
            no_gpu = "needs a CUDA GPU" in error
            advice = "" if no_gpu else "chunked is used instead"
            yield Finding(f"loss {name}", OK if no_gpu else WARNING, f"not to be used: {error}", advice)
        else:
            yield Finding(f"loss {name}", FAIL, f"does not work ({error})", _INSTALL)


def _trial(folder: Path, cpu: bool) -> Finding:
    from intra_distillation_fairseq.experiments import trial  # imports packages

    try:
        return Finding("trial", OK, trial.run(folder, cpu=cpu))
    except trial.Failed as error:
        return Finding("trial", FAIL, str(error), "--json FILE keeps the end of its log", error.log)
