"""What guards a run: checks of steps, gradients, weights and outputs."""
