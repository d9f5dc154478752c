"""What moves the weights: parameter groups, the course of the lr, the optimiser."""
