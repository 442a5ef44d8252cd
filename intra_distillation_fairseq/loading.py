"""Opens a trained model for use in Python: model, task and config from a run folder or a checkpoint file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig
from torch import nn

from intra_distillation_fairseq import (
    checkpoints,
    plugin,  # noqa: F401  a checkpoint names the task and architectures of the plugin
)
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.prepared import PreparedData, open_prepared
from intra_distillation_fairseq.experiments.recipes import Evaluation, evaluation_from
from intra_distillation_fairseq.experiments.runs import RunFolder


@dataclass
class Loaded:
    """A trained model, opened. Unpacks into `model, task, config`.

    Attributes:
        model: fairseq's model in float32 and evaluation mode.
        task: fairseq's task, with both dictionaries; its data sets are loaded when asked for.
        config: fairseq's configuration of the training, `data` pointing to where the data is now.
        checkpoint: the file it was read from.
        update: completed updates, None if the file does not say.
        record: run.json of its run folder, None for a checkpoint from elsewhere.
        data: its prepared data folder, None where there is only a folder of binarised data.
    """

    model: nn.Module
    task: FairseqTask
    config: DictConfig
    checkpoint: Path
    update: int | None
    record: dict[str, Any] | None
    data: PreparedData | None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.task, self.config))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def evaluation(self) -> Evaluation:
        """How its recipe translates the test set; the defaults without a run folder."""
        return evaluation_from(self.record["evaluation"]) if self.record else Evaluation()

    def translate(self, sentences: str | Sequence[str], beam: int | None = None) -> str | list[str]:
        """Translate plain text, written as the training text is (lower-cased where that is).

        Args:
            sentences: one sentence, or several.
            beam: hypotheses kept by the search; None: as the recipe says.
        Returns:
            A translation for a sentence, a list for several, in their order.
        Raises:
            UserError: the data folder is not known, or has no sentencepiece model.
        """
        if isinstance(sentences, str):
            return self.translate([sentences], beam)[0]
        if self.data is None:
            raise UserError(
                "no sentencepiece model: give load(..., data=FOLDER) a folder made by one of the prepare scripts"
            )
        spm = self.data.folder / "spm" / "spm.model"
        if not spm.is_file():
            raise UserError(
                f"no sentencepiece model: '{spm}' does not exist, so give load(..., data=FOLDER) a folder made by one "
                "of the prepare scripts"
            )
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm))
        dictionary = self.task.source_dictionary
        tokens = [
            dictionary.encode_line(" ".join(pieces.encode(line, out_type=str)), add_if_not_exist=False).long()
            for line in sentences
        ]
        evaluation = self.evaluation
        options = {"beam": beam or evaluation.beam, "lenpen": evaluation.lenpen}
        options.update(max_len_a=evaluation.max_len_a, max_len_b=evaluation.max_len_b)
        was_training = self.model.training
        self.model.eval()
        generator = self.task.build_generator([self.model], DictConfig({**_GENERATION, **options}))
        dataset = self.task.build_dataset_for_inference(tokens, [len(line) for line in tokens])
        translations = {}
        order = dataset.ordered_indices().tolist()  # by length: little padding
        for start in range(0, len(order), evaluation.batch_size):
            numbers = order[start : start + evaluation.batch_size]
            batch = dataset.collater([dataset[i] for i in numbers])
            batch = utils.move_to_cuda(batch, self.device) if self.device.type == "cuda" else batch
            found = self.task.inference_step(generator, [self.model], batch)
            for number, hypotheses in zip(batch["id"].tolist(), found):
                translations[number] = self.task.target_dictionary.string(hypotheses[0]["tokens"], "sentencepiece")
        self.model.train(was_training)
        return [translations[number] for number in range(len(tokens))]


# Of fairseq's generation settings those that its task asks for; the search itself has defaults for the rest.
_GENERATION = {"max_len_a": 0, "max_len_b": 200, "min_len": 1, "nbest": 1, "print_alignment": None}


_SIGNS_OF_OTHER_PARAMETERS = ("size mismatch for", "Missing key(s)")  # torch's words, in the second line


def load(
    run_dir: str | Path,
    checkpoint: str = "best",
    *,
    data: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Loaded:
    """Open a trained model: `model, task, config = load("runs/de-en/id_x/seed1")`.

    Only torch's safe loader is used, so that a file from a stranger cannot run code.

    Args:
        run_dir: a run folder of train.sh, any folder of fairseq checkpoints, or a checkpoint file.
        checkpoint: in a folder: best (lowest validation loss), last, or the name of a file there.
        data: prepared data folder, or fairseq's folder of binarised data; None: the one it was trained on.
        device: where to put the model, as in "cuda".
    Raises:
        UserError: no such folder or file, not a checkpoint of fairseq, or data with other dictionaries.
    """
    path = find_checkpoint(Path(run_dir), checkpoint)
    record = RunFolder(path.parent).read() or RunFolder(path.resolve().parent).read()  # a link into a run folder
    prepared, binarised = _find_data(data, record)
    overrides = {"data": str(binarised)} if binarised else {}
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path), overrides)  # vetted, as compat has it
    if not (state.get("cfg") or state.get("args")):
        raise UserError(f"'{path}' is not a fairseq checkpoint: it has no configuration ('cfg')")
    if not binarised:
        _check_known_data(state, path)
    try:
        models, config, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], state=state)
    except UserError:
        raise
    except Exception as error:  # fairseq raises many kinds for a configuration that it did not write
        if not any(sign in str(error) for sign in _SIGNS_OF_OTHER_PARAMETERS):
            raise UserError(
                f"'{path}' cannot be opened ({checkpoints.cause(error)}): is it made by fairseq?"
            ) from error
        reason = " ".join(str(error).partition("\n")[2].partition("\n")[0].split())
        raise UserError(
            f"the parameters of '{path}' do not fit the dictionaries of '{binarised}' or its own configuration "
            f"({reason}): give the data folder that it was trained on"
        ) from None
    model = models[0].float().to(device).eval()
    update = (state.get("optimizer_history") or [{}])[-1].get("num_updates")
    return Loaded(model, task, config, path, update, record, prepared)


def find_checkpoint(place: Path, name: str = "best") -> Path:
    """The checkpoint file that a user means.

    Args:
        place: a checkpoint file, or a folder of them.
        name: in a folder: best, last, or a file's name.
    Returns:
        Its absolute path. A link to a file stays one: what is made of it belongs beside it.
    Raises:
        UserError: there is none; lists those there are.
    """
    if place.is_file():
        return place.parent.resolve() / place.name
    if not place.is_dir():
        raise UserError(f"'{place}' does not exist: give a run folder of train.sh or a checkpoint file")
    path = place / (f"checkpoint_{name}.pt" if name in ("best", "last") else name)
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in place.glob("*.pt"))) or "no checkpoint"
        raise UserError(f"checkpoint '{name}': '{path}' does not exist (the folder has {there}): train first")
    return path.parent.resolve() / path.name


def _find_data(given: str | Path | None, record: dict[str, Any] | None) -> tuple[PreparedData | None, Path | None]:
    """The prepared folder and the one fairseq reads: the second alone if binarised by hand, neither if unknown."""
    if given is None and record is None:
        return None, None
    folder = Path(given or record["data"])
    if given is not None and not (folder / "manifest.json").exists() and any(folder.glob("dict.*.txt")):
        return None, folder.resolve()
    prepared = open_prepared(folder, ())
    if record and prepared.dictionary_digest != record["dictionary_digest"]:
        raise UserError(
            f"the dictionaries of '{prepared.folder}' are not those the model was trained with: give "
            f"'{record['data']}', or a folder prepared with its sentencepiece model"
        )
    return prepared, prepared.bin


def _check_known_data(state: dict[str, Any], path: Path) -> None:
    """A checkpoint without a run folder says itself where its data is; fairseq's own error is a stack trace."""
    settings = state["cfg"]["task"] if state.get("cfg") else state["args"]
    data = str(getattr(settings, "data", "") or "").split(":")[0]
    if not data or not any(Path(data).glob("dict.*.txt")):
        raise UserError(f"the data of '{path}' is not at '{data}' any more: give the data folder")
