"""Kinds of adapters other than LoRA: one idea per file. Each keeps the contract `Adapter` of layers.py."""
