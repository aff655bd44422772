"""What a person looks at: the comparison of INT8 with FP32, the report, sheets of images."""
