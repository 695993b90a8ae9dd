"""A base and an adapter -> the merged base; and where the modules of an adapter stand in a base."""
