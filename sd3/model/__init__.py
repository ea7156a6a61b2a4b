"""The pipeline directory and what goes with it: LoRA files."""
