"""Pictures from a model and prompts: what the four inference scripts share."""
