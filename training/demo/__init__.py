"""What the demo adapters are trained on, beside their data sets."""
