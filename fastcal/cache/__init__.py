"""Calibration caches: the value and its text form, other forms, the record of what a cache was made from, checks."""
