"""Training of the zoo: recipes, the loop, checkpoints, figures and the card."""
