"""Adapters made from adapters and models: truncated, extracted, merged into a base."""
