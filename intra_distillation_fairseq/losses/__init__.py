"""The divergence between K output distributions. Knows nothing of fairseq."""
