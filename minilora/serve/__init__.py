"""One base in memory, many adapters: a bank of them, a cache of slots, an engine that shares each step."""
