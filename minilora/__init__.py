"""minilora: LoRA from scratch in NumPy. Read lora.py first; README.md lists the files in reading order."""

__version__ = "0.1.0"
