"""Scores a model at each ratio of pruned parameters, for several orders; goes on where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intra_distillation_fairseq.analysis.run_files import read_record
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.table_text import DASH, grid
from intra_distillation_fairseq.files import write_json
from intra_distillation_fairseq.progress import Pace

if TYPE_CHECKING:
    from torch import Tensor

    from intra_distillation_fairseq.experiments.prunable_model import PrunableModel

FORMAT = 1
ORDERS = ("sensitivity", "magnitude", "random")
# What decides the points of a curve, and how to name it to the user.
_SETTINGS = {
    "checkpoint_sha256": "the checkpoint's sha256",
    "sensitivity_sha256": "the sensitivity file's sha256",
    "seed": "--seed",
    "data_digest": "the sha256 of the data's manifest",
    "evaluation": "the evaluation",
}
# Settings that decide the points of one order alone; the others decide all.
_OF_ORDER = {"sensitivity_sha256": "sensitivity", "seed": "random"}
_TSV = ("order", "ratio", "pruned", "bleu", "change", "chrf", "bleu_signature")


class PruningRecord:
    """pruning.json: what was pruned, and the points that are known by now.

    Args:
        path: the file; it need not exist.
        settings: checkpoint, number of prunable parameters, and all that decides the points.
        force: drop the points that are of other settings, in the file too.
    Raises:
        UserError: the file is damaged, or has points of other settings, which are named.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, force: bool):
        self.path = path
        self.content = {"format": FORMAT, **settings, "points": []}
        if not path.exists():
            return
        old = read_record(path)
        different = [key for key in _SETTINGS if settings[key] != old.get(key)]
        wrong = {key: [point for point in old["points"] if _decides(key, point)] for key in different}
        if any(wrong.values()) and not force:
            differences = [_difference(key, old.get(key), settings[key]) for key in different if wrong[key]]
            raise UserError(
                f"'{path}' was made with other settings: {'; '.join(differences)}; repeat them to go on, choose "
                "another --out, or begin again with --force"
            )
        dropped = [point for point in old["points"] if any(point in points for points in wrong.values())]
        self.content["points"] = [point for point in old["points"] if point not in dropped]
        if dropped:
            self._write()
        for point in dropped:
            shutil.rmtree(self.folder(point["order"], point["ratio"]), ignore_errors=True)

    @property
    def points(self) -> list[dict[str, Any]]:
        """order, ratio, pruned, bleu, bleu_signature, chrf and seconds of each, by order and ratio."""
        return self.content["points"]

    def find(self, order: str, ratio: float) -> dict[str, Any] | None:
        """A point if it is known; with nothing pruned, every order gives the same one."""
        same = (point for point in self.points if point["ratio"] == ratio and (not ratio or point["order"] == order))
        return next(same, None)

    def add(self, point: dict[str, Any]) -> None:
        """Add a point to the file."""
        self.content["points"] = sorted(
            [*self.points, point], key=lambda one: (ORDERS.index(one["order"]), one["ratio"])
        )
        self._write()

    def drop(self, point: dict[str, Any]) -> None:
        """Take a point out of the file."""
        self.content["points"] = [one for one in self.points if one != point]
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.content)

    def folder(self, order: str, ratio: float) -> Path:
        """Where the translations of a point are."""
        return self.path.with_suffix("") / (f"{order}_{written(ratio)}" if ratio else "unpruned")


def written(ratio: float) -> str:
    """A ratio in a file name, as in 0.3; different ones are written differently."""
    return str(ratio).removesuffix(".0")


def measure(
    record: PruningRecord,
    model: PrunableModel,
    sensitivity: Mapping[str, Tensor],
    orders: Sequence[str],
    ratios: Sequence[float],
    *,
    seed: int,
    force: bool,
    score: Callable[[Path, Path, str], dict[str, Any]],
    save: Path | None,
    say: Callable[[str], None],
) -> int:
    """Measure the points that are not known yet; each one is in the record as soon as it is known.

    Args:
        record: gets the points.
        model: what is pruned.
        sensitivity: of its parameters.
        orders: of ORDERS.
        ratios: pruned shares of its parameters, 0 to 1.
        seed: of the random order.
        force: measure the others anew as well, each of which leaves the record just before.
        score: (checkpoint, folder for the translations, label) -> what `translation.translate_and_score` gives.
        save: folder that gets the checkpoint of each ratio above 0; None: they are not kept.
        say: prints one line of progress.
    Returns:
        How many were measured.
    """
    total = len(model)
    points = ((order, ratio) for order in orders for ratio in ratios if force or not record.find(order, ratio))
    pace = Pace(len({record.folder(*point) for point in points}))
    pace.note(0)
    measured: set[Path] = set()
    for order in orders:
        ranking = None
        for ratio in ratios:
            kept = save / f"pruned_{order}_{written(ratio)}.pt" if save and ratio else None
            folder = record.folder(order, ratio)
            known = record.find(order, ratio)
            if known and force and folder not in measured:
                record.drop(known)
                known = None
            if known and not kept:
                continue
            masks, count = None, 0
            if ratio:
                ranking = ranking or model.ranking(order, sensitivity, seed)
                masks, count = ranking.masks(ratio), ranking.count(ratio)
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint = kept or folder / ".checkpoint.pt"
            try:
                model.write(masks, checkpoint)
                if not known:
                    values = score(checkpoint, folder, f"{order} {written(ratio)}")
                    point = {"order": order, "ratio": ratio, "pruned": count}
                    record.add(point | {name: values[name] for name in ("bleu", "bleu_signature", "chrf", "seconds")})
                    measured.add(folder)
                    pace.note(len(measured))
                    what = f"{order} {written(ratio)}: {count:,} of {total:,} set to zero"
                    say(f"{what}, BLEU {values['bleu']:.2f}; {pace.rest('points')}")
            finally:
                if not kept:
                    checkpoint.unlink(missing_ok=True)
    return len(measured)


def table(record: PruningRecord) -> str:
    """BLEU at each ratio for each order, and its change since nothing was pruned, where that is known."""
    orders, ratios = _orders(record), sorted({point["ratio"] for point in record.points})
    header = ["ratio", "pruned", *(title for order in orders for title in (order, "change"))]
    rows = []
    for ratio in ratios:
        points = [record.find(order, ratio) for order in orders]
        pruned = next(point["pruned"] for point in points if point)
        scores = [text for point in points for text in _score(point, _change(record, point))]
        rows.append([written(ratio), f"{pruned:,}", *scores])
    return grid(header, rows) + "\n"


def tsv(record: PruningRecord) -> str:
    """One line for each order and ratio; an empty field where the score without pruning is not known."""
    lines = ["\t".join(_TSV)]
    for order in _orders(record):
        for ratio in sorted({point["ratio"] for point in record.points}):
            if point := record.find(order, ratio):
                change = _change(record, point)
                values = {
                    **point,
                    "order": order,
                    "ratio": written(ratio),
                    "change": "" if change is None else f"{change:+.4f}",
                }
                lines.append("\t".join(str(values[name]) for name in _TSV))
    return "\n".join(lines) + "\n"


def _orders(record: PruningRecord) -> list[str]:
    found = {point["order"] for point in record.points}
    return [order for order in ORDERS if order in found]


def _change(record: PruningRecord, point: dict[str, Any] | None) -> float | None:
    intact = record.find("", 0)
    return point["bleu"] - intact["bleu"] if point and intact else None


def _score(point: dict[str, Any] | None, change: float | None) -> tuple[str, str]:
    return (f"{point['bleu']:.2f}" if point else DASH, DASH if change is None else f"{change:+.2f}")


def _decides(key: str, point: dict[str, Any]) -> bool:
    """Whether a setting has a part in a point; with nothing pruned the order has none."""
    order = _OF_ORDER.get(key)
    return order is None or (point["order"] == order and point["ratio"] > 0)


def _difference(key: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return f"{_SETTINGS[key]} has " + ", ".join(f"{name} {new.get(name)} (there {old.get(name)})" for name in keys)
    shown = [str(value)[:12] for value in (new, old)]  # of a checksum, enough to tell two apart
    return f"{_SETTINGS[key]} is {shown[0]} (there {shown[1]})"
