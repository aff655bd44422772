"""Engines: how TensorRT builds them in both ways, what they are made of, and how fast they are."""
