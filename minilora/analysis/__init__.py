"""What an adapter or a model is made of: spectra, counts, figures, reports."""
