"""Kinds of adapters beside LoRA: one idea a file. Each keeps the contract `Adapter` of layers.py."""
