"""How a model is run: precision, memory layout and the gradient of its input. The step knows none of it."""
