"""Curvature estimators, one idea a module; `lanczos` has the eigenvalues of the Hessian."""
