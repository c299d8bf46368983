"""Curvature by sharpwatch and its peers, side by side.

On shared cores OpenMP's threads must not spin while they wait for each other: a barrier then takes as long as another
process's time slice (measured: a forward of 7 ms took 470). This has to be said before torch is imported, to all alike.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
