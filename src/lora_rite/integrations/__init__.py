"""Where people train: PEFT models, transformers' Trainer, Lightning."""
