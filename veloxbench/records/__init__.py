"""Records and what may be said of them without measuring: their form, their journal, their provenance, intervals over
their samples, and which of them count. Pure data: no MLX, no model, nothing of the measuring rooms is imported here.
"""

from veloxbench.records.arm import Arm
from veloxbench.records.record import Estimate, Record, Subject

__all__ = ["Arm", "Estimate", "Record", "Subject"]
