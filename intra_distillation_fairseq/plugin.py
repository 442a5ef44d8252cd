"""Registers everything with fairseq; importing it twice does no harm."""
