"""Adapters made from adapters and models: summed, truncated, extracted, merged into a base."""
