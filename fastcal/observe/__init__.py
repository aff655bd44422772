"""The network observed: batches run with every activation visible, histograms, scales."""
