"""LoRA files of other tools than PEFT, each read as the PEFT folder that would mean the same."""
