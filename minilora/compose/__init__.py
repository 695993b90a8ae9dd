"""Adapters and bases made from others: summed, truncated, extracted, quantized."""
