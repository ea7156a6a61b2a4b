"""The native engine: DreamBooth fine-tuning of SD3 behind the flags of the published scripts."""
