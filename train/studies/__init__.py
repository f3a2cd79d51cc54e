"""Short trainings that show what the method does: the demo and the ablation."""
