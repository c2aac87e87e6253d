"""What speaks to the network; knows no model."""
