"""SacreBLEU and chrF of translations, with their signatures."""

from __future__ import annotations

from typing import Any

from intra_distillation_fairseq.errors import UserError


def score(hypotheses: list[str], references: list[str], *, lowercase: bool, tokenize: str = "13a") -> dict[str, Any]:
    """Score a test set.

    Args:
        hypotheses: detokenised translations, in the order of the references.
        references: one reference each.
        lowercase: lower-case both first. The published IWSLT'14 scores are those of lower-cased text, scored by
            `sacrebleu -b -w 2` in the authors' script, whose signature therefore says case:mixed.
        tokenize: sacrebleu's tokeniser for BLEU.
    Returns:
        bleu, bleu_signature, chrf, chrf_signature, sentences.
    Raises:
        UserError: their numbers differ, or there are none.
    """
    if len(hypotheses) != len(references):
        raise UserError(
            f"there are {len(hypotheses)} hypotheses for {len(references)} references: they must be of one test set, "
            "line by line"
        )
    if not references:
        raise UserError("there are 0 hypotheses and 0 references: the test set is empty")
    from sacrebleu.metrics import BLEU, CHRF  # slow to import

    if lowercase:
        hypotheses, references = [text.lower() for text in hypotheses], [text.lower() for text in references]
    # force: part of IWSLT'14's references comes tokenised (docs/data.md), which sacrebleu would warn about every time.
    bleu, chrf = BLEU(tokenize=tokenize, force=True), CHRF()
    values = {name: metric.corpus_score(hypotheses, [references]) for name, metric in (("bleu", bleu), ("chrf", chrf))}
    return {
        "bleu": round(values["bleu"].score, 4),
        "bleu_signature": str(bleu.get_signature()),
        "chrf": round(values["chrf"].score, 4),
        "chrf_signature": str(chrf.get_signature()),
        "sentences": len(references),
    }
