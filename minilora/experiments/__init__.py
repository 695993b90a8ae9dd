"""One question each: `run(...)` gives rows, `plots` draws them."""
