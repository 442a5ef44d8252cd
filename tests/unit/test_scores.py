"""Scores against numbers worked out by hand and against the sacrebleu command."""

import json
import subprocess
import sys

import pytest

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.scores import score

REFERENCES = ["The cat sat on the mat , today .", "A dog barks.", "ja , guten tag ."]
HYPOTHESES = ["the cat sat on the mat , today .", "A dog barks.", "ja, guten Tag."]


def test_a_perfect_translation_scores_100():
    values = score(REFERENCES, REFERENCES, lowercase=False)
    assert values["bleu"] == pytest.approx(100)
    assert values["chrf"] == pytest.approx(100)
    assert values["sentences"] == 3
    assert values["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert values["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_lowercase_lowers_both_sides():
    assert score(HYPOTHESES, REFERENCES, lowercase=False)["bleu"] < 90
    assert score(HYPOTHESES, REFERENCES, lowercase=True)["bleu"] == pytest.approx(100)


def test_the_number_is_that_of_the_sacrebleu_command(tmp_path):
    reference = tmp_path / "r.txt"
    reference.write_text("\n".join(REFERENCES) + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "sacrebleu", str(reference), "-m", "bleu", "chrf", "-b", "-w", "4", "--force"],
        input="\n".join(HYPOTHESES) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    values = score(HYPOTHESES, REFERENCES, lowercase=False)
    assert json.loads(done.stdout) == [values["bleu"], values["chrf"]]


def test_a_count_mismatch_names_both():
    with pytest.raises(UserError, match="there are 2 hypotheses for 3 references: they must be of one test set"):
        score(HYPOTHESES[:2], REFERENCES, lowercase=False)


def test_an_empty_set_is_refused():
    with pytest.raises(UserError, match="0 hypotheses and 0 references: the test set is empty"):
        score([], [], lowercase=False)
