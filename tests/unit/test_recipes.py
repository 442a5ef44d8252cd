"""Config files: what is read from them, and every way in which one can be wrong."""

import shlex

import pytest

from intra_distillation_fairseq.cli.train import ROOT
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.recipes import Evaluation, as_flags, find_recipe, read_recipe

GOOD = """
train: {arch: transformer_small, lr: 0.0005, adam-betas: "(0.9, 0.98)", share-all-embeddings: true, dropout: 0.3}
methods:
  transformer: {criterion: label_smoothed_cross_entropy}
  id_x: {criterion: intra_distillation, id-alpha: 5, dropout: 0.2, share-all-embeddings: false}
evaluate: {beam: 4, lenpen: 1, lowercase: true}
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "r é.yaml"
        path.write_text(text, encoding="utf-8")
        return read_recipe(path)

    return write


def test_a_method_replaces_shared_options_and_drops_flags(recipe):
    read = recipe(GOOD)
    assert as_flags(read.options("transformer")) == [
        *("--arch", "transformer_small", "--lr", "0.0005", "--adam-betas", "(0.9, 0.98)", "--share-all-embeddings"),
        *("--dropout", "0.3", "--criterion", "label_smoothed_cross_entropy"),
    ]
    flags = as_flags(read.options("id_x"))
    assert flags[flags.index("--dropout") + 1] == "0.2"
    assert "--share-all-embeddings" not in flags
    assert read.evaluation == Evaluation(beam=4, lenpen=1.0, lowercase=True)


def test_a_value_that_begins_with_a_dash_stays_a_value():
    assert as_flags({"id-alpha": -1}) == ["--id-alpha=-1"]


def test_evaluation_is_optional(recipe):
    assert recipe(GOOD[: GOOD.index("evaluate")]).evaluation == Evaluation()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("train:", "trian:"), "has the unknown section 'trian': the sections are train, methods, evaluate"),
        (("evaluate:", "train2: 1\nevaluate:"), "unknown section 'train2'"),
        (("beam: 4", "beams: 4"), "'evaluate' has the unknown key 'beams': the keys are beam, lenpen, max-len-a,"),
        (("beam: 4", "beam: many"), "'beam' in 'evaluate' is 'many': it must be a whole number"),
        (("beam: 4", "beam: true"), "'beam' in 'evaluate' is 'True': it must be a whole number"),
        (("beam: 4", "beam: 0"), "'beam' in 'evaluate' is '0': it must be at least 1"),
        (("lowercase: true", "lowercase: 1"), "'lowercase' in 'evaluate' is '1': it must be true or false"),
        (("lenpen: 1", "lenpen: x"), "'lenpen' in 'evaluate' is 'x': it must be a number"),
        (
            ("beam: 4", "tokenize: moses"),
            "'tokenize' in 'evaluate' is 'moses': it must be one of 13a, intl, char, zh, none",
        ),
        (
            ("lr: 0.0005", "lr: [1, 2]"),
            "'lr' in 'train' has the value '[1, 2]': allowed are one text, one number, or true",
        ),
        (("lr: 0.0005", "lr:"), "'lr' in 'train' has the value 'None': allowed are"),
        (
            ("id-alpha: 5", "id_alpha: 5"),
            "'id_alpha' in 'methods: id_x' is not a fairseq-train option name: write 'id-alpha'",
        ),
        (("lr: 0.0005", "--lr: 1"), "'--lr' in 'train' is not a fairseq-train option name: write 'lr'"),
        (("lr: 0.0005", "seed: 1"), "'seed' in 'train' cannot be set here: it comes from --seed of train.sh"),
        (("dropout: 0.3", "lr: 1"), "key 'lr' is given twice"),
        (("id_x:", "id x:"), "has the method name 'id x': use small letters, digits and '_'"),
        (("train:", "train: ["), "is not readable as YAML"),
    ],
)
def test_mistakes_are_named(recipe, change, message):
    with pytest.raises(UserError) as caught:
        recipe(GOOD.replace(*change, 1))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "r é.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n", "train: {arch: a}\n", "train: 3\nmethods: {a: {criterion: b}}\n"])
def test_sections_must_be_there(recipe, text):
    with pytest.raises(UserError, match="must be a mapping|needs a section"):
        recipe(text)


def test_an_unknown_method_lists_the_known_ones(recipe):
    with pytest.raises(UserError, match="method 'rdrop' is not in .*: it has transformer, id_x$"):
        recipe(GOOD).options("rdrop")


def test_a_method_without_a_criterion_is_refused(recipe):
    with pytest.raises(UserError, match="gives no 'criterion' for method 'transformer': add it to train or methods"):
        recipe(GOOD.replace("transformer: {criterion: label_smoothed_cross_entropy}", "transformer: {}")).options(
            "transformer"
        )


def test_a_config_is_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(GOOD, encoding="utf-8")
    assert find_recipe("own", ROOT) == tmp_path / "own.yaml"
    for name in ("multi30k_tiny", "configs/multi30k_tiny", "configs/multi30k_tiny.yaml"):
        assert find_recipe(name, ROOT) == ROOT / "configs" / "multi30k_tiny.yaml"
    with pytest.raises(UserError, match="config 'none' does not exist: give .* one of .*configs/multi30k_tiny.yaml"):
        find_recipe("none", ROOT)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_repository_is_valid(path):
    read = read_recipe(path)
    for method in read.methods:
        assert read.options(method)["arch"]


def test_the_published_recipe():
    """Every hyper-parameter of the paper and of the authors' script; configs/ says which is from where."""
    read = read_recipe(ROOT / "configs" / "iwslt14_transformer_small.yaml")
    published = shlex.split(
        "--id-alpha 5 --id-alpha-schedule adaptive --max-update 50000 --id-num-passes 3 --id-q 10 --id-p 5 "
        "--label-smoothing 0.1 --optimizer adam --adam-eps 1e-06 --lr-scheduler inverse_sqrt --lr 0.0005 "
        "--warmup-updates 8000 --dropout 0.3 --attention-dropout 0.1 --weight-decay 0.0001 --max-tokens 4096 "
        "--update-freq 1 --keep-interval-updates 1 --patience 40 --log-interval 100 --ddp-backend legacy_ddp "
        "--fp16-init-scale 16 --max-source-positions 512 --max-target-positions 512 --clip-norm 0.0 "
        "--activation-dropout 0.0 --required-batch-size-multiple 8 --id-divergence x"
    )
    flags = as_flags(read.options("id_x"))
    given = dict(zip(flags, flags[1:]))
    for name, value in zip(published[::2], published[1::2]):
        assert given[name] == value, name
    assert given["--adam-betas"] == "(0.9, 0.98)"
    assert "--skip-invalid-size-inputs-valid-test" in flags
    assert read.evaluation == Evaluation(
        beam=5, lenpen=1.0, max_len_a=0.0, max_len_b=200, batch_size=100, lowercase=True
    )
    transformer = read.options("transformer")
    assert not [key for key in transformer if key.startswith("id-")]
