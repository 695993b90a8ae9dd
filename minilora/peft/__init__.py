"""Adapter folders in PEFT's form, without PEFT."""
