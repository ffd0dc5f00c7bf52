"""What the weights of a graph are called: by the exporter's records, and by the content of a base checkpoint."""
