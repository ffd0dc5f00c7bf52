"""What a candidate is compared with: fp64 references, and the model as it is deployed."""
