"""Optimizations of time and memory alone; without them the results are the same."""
