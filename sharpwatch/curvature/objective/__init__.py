"""The loss as a function of the weights, and products with its Hessian."""
