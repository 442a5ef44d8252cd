"""Text in, text out: archives, cleaning, subwords. Knows nothing of torch or fairseq."""
