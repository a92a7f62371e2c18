"""Memory-efficient optimizers: bricks, recipes, and the torch.optim face."""
