"""The loss as a function of the weights, and its Hessian products."""
