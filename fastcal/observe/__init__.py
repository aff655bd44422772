"""A network observed: a backend runs it over batches and keeps a histogram of every tensor."""
