"""Batches of samples as a network expects them: which samples, how they are prepared, and how they are prefetched."""
