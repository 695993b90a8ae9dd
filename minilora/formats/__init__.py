"""Files: whole or not at all; safetensors, GGUF, Hugging Face's folders, tokenizers."""
