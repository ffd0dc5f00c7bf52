"""Training: data, and the loop that fits whatever in a module requires gradients."""
