"""Results for people: the comparison of INT8 with FP32, the report, sheets of images."""
