"""The `intra-distillation` command: arguments, messages and exit codes; the work is done elsewhere."""
