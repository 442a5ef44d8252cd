"""Reads a config file (configs/*.yaml) and turns it into fairseq options. Knows nothing of runs, torch or fairseq."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from intra_distillation_fairseq.errors import UserError

SECTIONS = ("train", "methods", "evaluate")
TOKENIZERS = ("13a", "intl", "char", "zh", "none")
# Options that train.sh sets itself: a second value in a config, or after `--`, would contradict the run folder.
OPTIONS_OF_TRAIN = {
    "data": "the first argument of train.sh",
    "save-dir": "--save-dir of train.sh",
    "seed": "--seed of train.sh",
    "user-dir": "the plugin itself",
    "task": "train.sh (every method trains under translation_intra_distillation)",
    "source-lang": "manifest.json of the data folder",
    "target-lang": "manifest.json of the data folder",
    "log-format": "train.sh, which reads its progress from fairseq's json log",
    "fp16": "--precision of train.sh",
    "bf16": "--precision of train.sh",
}
# Options that fairseq obeys at every start, so that a run that was stopped would lose what it has trained, and what to
# give instead.
OPTIONS_OF_EVERY_START = {
    "restore-file": "continue-once FILE",
    **{f"reset-{part}": "finetune-from-model FILE" for part in ("optimizer", "lr-scheduler", "meters", "dataloader")},
}
_KEY = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\Z")
_METHOD = re.compile(r"[a-z][a-z0-9_]*\Z")


@dataclass(frozen=True)
class Evaluation:
    """How a test set is translated and scored; the defaults are those of the authors' published script.

    Attributes:
        beam: hypotheses kept by the beam search.
        lenpen: exponent of the length penalty (1 = mean log-probability per token).
        max_len_a, max_len_b: a translation has at most a * source tokens + b tokens.
        batch_size: sentences translated at once; decides speed and memory, not the result.
        lowercase: lower-case hypotheses and references before scoring, as published for IWSLT'14.
        tokenize: sacrebleu's tokeniser for BLEU.
    """

    beam: int = 5
    lenpen: float = 1.0
    max_len_a: float = 0.0
    max_len_b: int = 200
    batch_size: int = 100
    lowercase: bool = False
    tokenize: str = "13a"


@dataclass(frozen=True)
class Recipe:
    """One config file, checked.

    Attributes:
        path: the file.
        train: fairseq-train options shared by all methods, without the leading dashes.
        methods: what each method adds to or changes in `train`.
        evaluation: the evaluate section.
    """

    path: Path
    train: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    evaluation: Evaluation

    def options(self, method: str) -> dict[str, Any]:
        """The options of one method, its own replacing the shared ones.

        Raises:
            UserError: the config does not have this method, or the result cannot be trained.
        """
        if method not in self.methods:
            raise UserError(f"method '{method}' is not in {self.path}: it has {', '.join(self.methods)}")
        options = {**self.train, **self.methods[method]}
        for needed in ("arch", "criterion"):
            if not options.get(needed):
                raise UserError(f"{self.path} gives no '{needed}' for method '{method}': add it to train or methods")
        return options


def as_flags(options: dict[str, Any]) -> list[str]:
    """Options as command-line words: true is a bare flag, false leaves the option out."""
    words: list[str] = []
    for key, value in options.items():
        if value is True:
            words.append(f"--{key}")
        elif value is not False:
            text = str(value)
            words += [f"--{key}={text}"] if text.startswith("-") else [f"--{key}", text]
    return words


def find_recipe(name: str, root: Path) -> Path:
    """The file of a config given as a path, a path without .yaml, or the bare name of one in the repository's configs/.

    Args:
        name: what the user wrote.
        root: the repository's folder, for names that do not exist from the current folder.
    Raises:
        UserError: there is no such file; lists the configs there are.
    """
    tried = [
        Path(name),
        Path(name + ".yaml"),
        root / name,
        root / (name + ".yaml"),
        root / "configs" / (name + ".yaml"),
    ]
    for path in tried:
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(f"configs/{path.name}" for path in (root / "configs").glob("*.yaml")))
    raise UserError(
        f"config '{name}' does not exist: give the path of a YAML file" + (f", or one of {known}" * bool(known))
    )


def read_recipe(path: Path) -> Recipe:
    """Read and check a config file.

    Raises:
        UserError: not YAML, an unknown or repeated key, or a value of the wrong type; names the valid ones.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping with the sections {', '.join(SECTIONS)}")
    for key in content:
        if key not in SECTIONS:
            raise UserError(f"{path} has the unknown section '{key}': the sections are {', '.join(SECTIONS)}")
    for section in ("train", "methods"):
        if not isinstance(content.get(section), dict) or not content[section]:
            raise UserError(f"{path} needs a section '{section}' with at least one entry")
    for method, options in content["methods"].items():
        if not isinstance(method, str) or not _METHOD.match(method):
            raise UserError(f"{path} has the method name '{method}': use small letters, digits and '_', as in id_x")
        _check_options(path, f"methods: {method}", options)
    _check_options(path, "train", content["train"])
    return Recipe(path, content["train"], content["methods"], _evaluation(path, content.get("evaluate") or {}))


def evaluation_from(values: dict[str, Any]) -> Evaluation:
    """The evaluation kept in a run.json."""
    return Evaluation(**values)


def evaluation_as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """What `evaluation_from` takes."""
    return asdict(evaluation)


def _check_options(path: Path, section: str, options: Any) -> None:
    if not isinstance(options, dict):
        raise UserError(f"{path}: '{section}' must be a mapping of fairseq-train options, not '{options}'")
    for key, value in options.items():
        if not isinstance(key, str) or not _KEY.match(key):
            wanted = str(key).lstrip("-").replace("_", "-")
            raise UserError(f"{path}: '{key}' in '{section}' is not a fairseq-train option name: write '{wanted}'")
        if key in OPTIONS_OF_TRAIN:
            raise UserError(f"{path}: '{key}' in '{section}' cannot be set here: it comes from {OPTIONS_OF_TRAIN[key]}")
        if key in OPTIONS_OF_EVERY_START:
            raise UserError(f"{path}: '{key}' in '{section}' cannot be set: {at_every_start(key)}")
        if not isinstance(value, (str, int, float, bool)) or value == "":
            raise UserError(
                f"{path}: '{key}' in '{section}' has the value '{value}': allowed are one text, one number, "
                "or true for a bare flag (false leaves it out)"
            )


def at_every_start(option: str) -> str:
    """Why an option of OPTIONS_OF_EVERY_START is not taken, and what to give."""
    return (
        "fairseq obeys it at every start, so that the run would lose what it has trained when it goes on after a stop: "
        f"give {OPTIONS_OF_EVERY_START[option]}, which counts at the first start only"
    )


def _evaluation(path: Path, values: Any) -> Evaluation:
    known = {field.name.replace("_", "-"): field.default for field in fields(Evaluation)}
    if not isinstance(values, dict):
        raise UserError(f"{path}: 'evaluate' must be a mapping with keys of {', '.join(known)}")
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{path}: 'evaluate' has the unknown key '{key}': the keys are {', '.join(known)}")
        kind = type(known[key])
        # bool is an int to Python; a yes/no where a number is meant is a mistake all the same.
        right = isinstance(value, bool) if kind is bool else isinstance(value, kind) and not isinstance(value, bool)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            right, value = True, float(value)
        if not right:
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
            raise UserError(f"{path}: '{key}' in 'evaluate' is '{value}': it must be {names[kind]}")
        if key in ("beam", "batch-size", "max-len-b") and value < 1:
            raise UserError(f"{path}: '{key}' in 'evaluate' is '{value}': it must be at least 1")
        if key == "tokenize" and value not in TOKENIZERS:
            raise UserError(f"{path}: 'tokenize' in 'evaluate' is '{value}': it must be one of {', '.join(TOKENIZERS)}")
        checked[key.replace("-", "_")] = value
    return Evaluation(**checked)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key: YAML would take the last one and drop a hyper-parameter in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
