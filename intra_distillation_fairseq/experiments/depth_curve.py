"""Score, size and speed of a run's model cut to its first n layers, for each n.

Kept in RUN/analysis: layers.json for the best checkpoint, which figures read, layers_<name>.json for any other.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.prepared import PreparedData, open_prepared
from intra_distillation_fairseq.experiments.recipes import Evaluation, evaluation_as_dict
from intra_distillation_fairseq.experiments.table_text import DASH, grid
from intra_distillation_fairseq.experiments.translation import translate_and_score
from intra_distillation_fairseq.files import file_sha256, lock, read_json, write_json
from intra_distillation_fairseq.progress import Pace

FORMAT = 1
_IN_WORDS = {
    "checkpoint_sha256": "another checkpoint of this name",
    "test": "another test set",
    "evaluation": "another search or scoring",
}
_SPEEDS = ("sentences_per_second", "tokens_per_second", "translation_seconds")
_TSV = (
    *("run", "layers", "parameters", "parameters_without_embeddings", "bleu", "chrf"),
    *("sentences_per_second", "tokens_per_second", "repeats"),
)


@contextmanager
def opened(run: Path, checkpoint: str, **options: Any) -> Iterator[DepthCurve]:
    """A run's curve, with the analysis folder locked and a copy of the checkpoint while the body runs.

    A training that goes on exchanges its checkpoints; all n are cut from one and the same.

    Args:
        run: the run folder.
        checkpoint: best, last, or a file's name there.
        options: those of DepthCurve.
    Raises:
        UserError: no such checkpoint, the folder is in use or cannot be written, or what DepthCurve refuses.
    """
    from intra_distillation_fairseq.loading import find_checkpoint  # imports torch

    source, folder = find_checkpoint(run, checkpoint), run / "analysis"
    held = folder / ".layers.lock"
    try:
        folder.mkdir(exist_ok=True)
        held.touch()
    except OSError as error:
        raise UserError(
            f"'{folder}', where the measurements are kept, cannot be written ({error.strerror}): copy the run to a "
            "folder that can"
        ) from None
    with lock(held, "the analysis folder"):
        copy = folder / ".source.pt"
        try:
            shutil.copyfile(source, copy)
            yield DepthCurve(run, source, copy, **options)
        finally:
            copy.unlink(missing_ok=True)


class DepthCurve:
    """Measures one run, one translation of the test set after the other; what is done is kept.

    Args:
        run: the run folder.
        checkpoint: the checkpoint's file there, by which it is called.
        source: its bytes, in a file that nobody exchanges.
        layers: the n to measure; None: every one from the full depth to 1.
        data: a prepared folder; None: the one it was trained on.
        device: name of the GPU, or None to keep off it.
        force: measure again what is known, and replace what was measured with other inputs.
    Raises:
        UserError: no such data, an n that the model does not have, or what is known was measured with other inputs.
    """

    def __init__(
        self,
        run: Path,
        checkpoint: Path,
        source: Path,
        *,
        layers: Sequence[int] | None = None,
        data: Path | None = None,
        device: str | None = None,
        force: bool = False,
    ):
        from intra_distillation_fairseq import checkpoints  # imports torch
        from intra_distillation_fairseq.loading import load
        from intra_distillation_fairseq.models.depth import depth, first_layers

        loaded = load(checkpoint, data=data)
        if loaded.data is None:
            raise UserError(f"the prepared data folder of '{run}' is not known: give it with --data")
        self._data: PreparedData = open_prepared(loaded.data.folder, ("test",))
        self._evaluation: Evaluation = loaded.evaluation
        self._device = device
        self._source = source
        self.depth = depth(loaded.model)
        self.layers = sorted(set(layers or range(1, min(self.depth) + 1)), reverse=True)
        self._sizes = {n: _sizes(first_layers(loaded.model, n)) for n in self.layers}
        name = checkpoint.stem.removeprefix("checkpoint_")
        self._suffix = "" if name == "best" else f"_{name}"
        self.folder = run / "analysis"
        self.path = self.folder / f"layers{self._suffix}.json"
        self.record = {
            "format": FORMAT,
            "checkpoint": checkpoint.name,
            "checkpoint_sha256": file_sha256(source),
            "update": checkpoints.facts(source).update,
            "full": {"encoder_layers": self.depth[0], "decoder_layers": self.depth[1], **_sizes(loaded.model)},
            "inputs": self._inputs(),
            "points": [],
        }
        old = read_json(self.path)
        if isinstance(old, dict):
            self._take_over(old, force)

    def _take_over(self, old: dict[str, Any], force: bool) -> None:
        """Whatever decides a score or a speed: points of other inputs do not belong into one curve."""
        differences = _differences(old, self.record)
        if differences and not force:
            raise UserError(
                f"'{self.path}' was measured with other inputs ({'; '.join(differences)}): measure as it was, or "
                "replace all of it with --force"
            )
        if not differences:
            again = self.layers if force else ()
            self.record["points"] = [point for point in old["points"] if point["layers"] not in again]

    def _inputs(self) -> dict[str, Any]:
        stem = self._data.bin / f"test.{self._data.pair}.{self._data.source_lang}"
        files = [stem.with_name(stem.name + ".bin"), self._data.references]
        return {
            "test": [file_sha256(path) for path in files],
            "evaluation": evaluation_as_dict(self._evaluation),
            "device": self._device or "cpu",
            "processor": _processor(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        }

    def measure(self, repeats: int, say: Callable[[str], None]) -> None:
        """Translate with each n, all n once, then all of them again, so that a busy moment does not hit one n alone.

        Args:
            repeats: translations with each n.
            say: prints one line of progress.
        """
        missing = [(repeat, n) for repeat in range(repeats) for n in self.layers if len(self._measured(n)) <= repeat]
        pace = Pace(len(missing))
        pace.note(0)
        for number, (repeat, n) in enumerate(missing, 1):
            self._measure_once(n, f"{n} layers, {repeat + 1} of {repeats}")
            pace.note(number)
            point = self._point(n)
            speed = f"{point['sentences_per_second']:.1f} sentences/s"
            say(f"{n} layers: BLEU {point['bleu']:.2f}, {speed}; {pace.rest('translations')}")

    def _point(self, n: int) -> dict[str, Any] | None:
        return next((point for point in self.record["points"] if point["layers"] == n), None)

    def _measured(self, n: int) -> list[dict[str, float]]:
        return (self._point(n) or {"measured": []})["measured"]

    def _measure_once(self, n: int, label: str) -> None:
        from intra_distillation_fairseq import checkpoints  # imports torch
        from intra_distillation_fairseq.models.depth import truncate_state

        out = self.folder / f"{n}layers{self._suffix}"
        cut = out / ".checkpoint.pt"
        out.mkdir(parents=True, exist_ok=True)
        try:
            checkpoints.write(truncate_state(checkpoints.load(self._source), n), cut)
            score = translate_and_score(self._data, cut, self._evaluation, out, cpu=self._device is None, label=label)
        finally:
            cut.unlink(missing_ok=True)
        measured = [*self._measured(n), {name: score[name] for name in _SPEEDS}]
        point = {
            "layers": n,
            **self._sizes[n],
            **{name: score[name] for name in ("bleu", "chrf", "bleu_signature", "chrf_signature") if name in score},
            **{name: statistics.median(one[name] for one in measured) for name in _SPEEDS},
            "repeats": len(measured),
            "measured": measured,
        }
        others = [other for other in self.record["points"] if other["layers"] != n]
        self.record["points"] = sorted([*others, point], key=lambda one: -one["layers"])
        write_json(self.path, self.record)


def _sizes(model: Any) -> dict[str, int]:
    """Parameters, shared ones once; and those that are not in token or position embeddings or the output projection."""
    total = sum(parameter.numel() for parameter in model.parameters())
    outside = sum(
        parameter.numel() for name, parameter in model.named_parameters()
        if not any(part in name for part in ("embed_tokens", "embed_positions", "output_projection"))
    )  # fmt: skip
    return {"parameters": total, "parameters_without_embeddings": outside}


def _processor() -> str:
    """Its name as Linux gives it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two records were measured with and differ in, in words."""
    if old.get("format") != new["format"]:
        return ["another version of the file"]
    found = ["checkpoint_sha256"] if old.get("checkpoint_sha256") != new["checkpoint_sha256"] else []
    before, now = old.get("inputs") or {}, new["inputs"]
    for key in now:
        if before.get(key) == now[key]:
            continue
        if isinstance(now[key], (dict, list)):
            found.append(key)
        else:
            found.append(f"{key} is {now[key] or 'not set'}, there {before.get(key) or 'not set'}")
    return [_IN_WORDS.get(key, key) for key in found]


def _full(record: dict[str, Any]) -> dict[str, Any] | None:
    """The point of the uncut model."""
    whole = (record["full"]["encoder_layers"], record["full"]["decoder_layers"])
    return next((point for point in record["points"] if (point["layers"],) * 2 == whole), None)


def markdown(records: dict[str, dict[str, Any]]) -> str:
    """A table of all runs.

    Args:
        records: label -> content of layers.json.
    """
    head = ["run", "layers", "parameters", "% of full", "without embeddings", "BLEU", "% of full", "chrF"]
    lines = []
    for label, record in records.items():
        full = _full(record)
        for point in record["points"]:
            bleu = f"{100 * point['bleu'] / full['bleu']:.1f}" if full and full["bleu"] else DASH
            faster = point["sentences_per_second"] / full["sentences_per_second"] if full else None
            lines.append(
                [
                    label,
                    str(point["layers"]),
                    f"{point['parameters']:,}",
                    f"{100 * point['parameters'] / record['full']['parameters']:.1f}",
                    f"{point['parameters_without_embeddings']:,}",
                    f"{point['bleu']:.2f}",
                    bleu,
                    f"{point['chrf']:.2f}",
                    f"{point['sentences_per_second']:.1f}",
                    f"{faster:.2f}" if faster else DASH,
                ]
            )
    return grid([*head, "sentences/s", "speed-up"], lines) + "\n"


def tsv(records: dict[str, dict[str, Any]]) -> str:
    """One line for each run and n."""
    lines = ["\t".join(_TSV)]
    for label, record in records.items():
        lines += ["\t".join([label, *(str(point[name]) for name in _TSV[1:])]) for point in record["points"]]
    return "\n".join(lines) + "\n"
