"""Tuning: what INT8 costs at a network's outputs, and how to make that less."""
