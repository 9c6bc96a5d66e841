"""What the module needs of a Trainer: optimizers, checks, metrics, resumption."""
