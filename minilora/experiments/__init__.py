"""One question per file, answered in rows; `harness` runs the grids, `rank_figures` draws the rows."""
