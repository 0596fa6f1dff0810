"""Training data of the demo adapters, in addition to their data sets."""
