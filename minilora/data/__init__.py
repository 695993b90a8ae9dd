"""Texts: fetched, read, cut into batches."""
