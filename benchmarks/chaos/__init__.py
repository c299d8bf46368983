"""What survives: a real daemon that is disturbed while agents and an operator keep logs of what it acknowledged."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else it tells of each connection that ends
